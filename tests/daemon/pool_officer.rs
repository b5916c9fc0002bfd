//! Officer commands on pools: consistent numbers in all outputs, audit entries for every action, and refusal of other roles.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use spp_proto::officer_client::OfficerClient;
use spp_proto::{FillPoolRequest, GetPoolStatusRequest, ShredPoolRequest};
use tonic::Code;

use spp_testkit::devices::{Refusal, TestFab, phone, provision};
use spp_testkit::pools::{assemble_with_retries, is_full, officer, pooled, pooled_site, wait_for_pools};
use spp_testkit::ports::free_port;
use spp_testkit::site::Site;

fn pool(site: &Site, words: &str) -> Output {
    site.try_sppctl(&format!("pool {words} {}", officer(site)))
}

/// Runs `sppctl pool`. It must succeed, and print no progress without a terminal.
fn pool_output(site: &Site, words: &str) -> String {
    let output = pool(site, words);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "pool {words}: {stderr}");
    assert_eq!(stderr, "", "pool {words}");
    String::from_utf8(output.stdout).unwrap()
}

fn pool_json(site: &Site, words: &str) -> Value {
    let text = pool_output(site, &format!("{words} --json"));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("pool {words}: {e}: {text}"))
}

/// The exit status and standard error of a refused command; standard output must be empty.
fn refused(site: &Site, words: &str) -> (Option<i32>, String) {
    let output = pool(site, words);
    assert!(output.stdout.is_empty(), "pool {words}: {}", String::from_utf8_lossy(&output.stdout));
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn kind(status: &Value, kind: &str) -> Value {
    status["kinds"].as_array().unwrap().iter().find(|entry| entry["kind"] == kind).unwrap().clone()
}

/// The columns of the table row that begins with `begin`.
fn row(table: &str, begin: &str) -> Vec<String> {
    let row = table.lines().find_map(|line| line.trim().strip_prefix(begin));
    row.unwrap_or_else(|| panic!("no {begin} in {table}")).split_whitespace().map(str::to_owned).collect()
}

/// Pool actions in the audit log: caller, action, outcome, details.
fn audited_actions(site: &Site) -> Vec<[String; 4]> {
    let text = String::from_utf8(site.read("audit/audit.jsonl")).unwrap();
    let entries = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let act = |entry: Value| {
        [text(&entry["caller"]), text(&entry["act"]), text(&entry["outcome"]), entry["details"].to_string()]
    };
    entries.map(act).filter(|act| act[1].starts_with("pool.")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pool_fill_waits_and_is_audited() {
    let mut site = pooled_site(10, 20);
    site.start();
    wait_for_pools(&site, "all pools are full", is_full).await;
    tokio::task::block_in_place(|| {
        let table = pool_output(&site, "fill p256 --to 33");
        let ready: u64 = row(&table, "p256")[0].parse().unwrap();
        assert!((33..=34).contains(&ready), "the table at its end: {table}");
        let status = pool_json(&site, "fill p256 --to 41");
        assert!((41..=42).contains(&kind(&status, "p256")["ready"].as_u64().unwrap()), "{status}");
        let status = pool_json(&site, "fill ed25519");
        assert_eq!(kind(&status, "ed25519")["ready"], 2, "up to the high mark: {status}");
        pool_output(&site, "fill");
        pool_output(&site, "fill p256 --to 5");
        let audited_actions = audited_actions(&site);
        assert_eq!(audited_actions.len(), 10, "{audited_actions:?}");
        for (pair, details) in audited_actions.chunks(2).zip([
            json!({ "kinds": "p256", "to": "33" }),
            json!({ "kinds": "p256", "to": "41" }),
            json!({ "kinds": "ed25519", "to": "high mark" }),
            json!({ "kinds": "p256 ed25519", "to": "high mark" }),
            json!({ "kinds": "p256", "to": "5" }),
        ]) {
            let begun = ["officer o-1", "pool.fill", "begun", &details.to_string()];
            assert_eq!(pair[0], begun);
            assert_eq!(pair[1], [begun[0], begun[1], "done", begun[3]]);
        }

        let (status, text) = refused(&site, "fill p521");
        assert_eq!(status, Some(2), "{text}");
        assert!(text.contains("p521") && text.contains("p256") && text.contains("rsa-4096"), "it lists them: {text}");
        assert_eq!(refused(&site, "fill p256 --to 0").0, Some(2));
        let (status, text) = refused(&site, "fill rsa-2048");
        assert_eq!(status, Some(1), "{text}");
        assert!(text.contains("no pool of rsa-2048 pairs; add a [[keypool.pool]]"), "{text}");
        let last = self::audited_actions(&site).pop().unwrap();
        assert!(last[2].starts_with("failed: no pool of rsa-2048"), "{last:?}");
        let verified = site.sppctl("audit verify --config sppd.toml");
        assert!(verified.contains("chain intact"), "{verified}");
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pool_shred_is_reported_and_audited() {
    let mut site = pooled_site(10, 20);
    site.start();
    wait_for_pools(&site, "all pools are full", is_full).await;
    const NOTHING: &str = "nothing to shred: no pair was erased since the last shredding\n";
    tokio::task::block_in_place(|| assert_eq!(pool_output(&site, "shred"), NOTHING));
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    provision(&mut line, &mut fab.device(1), &pooled(1)).await;
    provision(&mut line, &mut fab.device(2), &phone(2)).await;
    assemble_with_retries(&mut line, &pooled(3)).await;
    assemble_with_retries(&mut line, &phone(4)).await;
    tokio::task::block_in_place(|| {
        let due = pool_json(&site, "status");
        assert!(kind(&due, "p256")["next_shred"].is_u64() && due["session_next_shred"].is_u64(), "{due}");
        assert!(kind(&due, "ed25519")["next_shred"].is_null(), "{due}");
        assert_eq!(pool_output(&site, "shred ed25519"), NOTHING);
        // 18 pairs are ready, one belongs to a session.
        assert_eq!(pool_output(&site, "shred p256"), "1 batch keys destroyed, 19 pairs rewrapped\n");
        assert_eq!(pool_json(&site, "shred"), json!({ "batches": 1, "moved": 1, "discarded": 0 }));
        assert_eq!(pool_output(&site, "shred"), NOTHING);
        let done = pool_json(&site, "status");
        assert!(kind(&done, "p256")["next_shred"].is_null() && done["session_next_shred"].is_null(), "{done}");
        assert_eq!((&kind(&done, "p256")["ready"], &kind(&done, "p256")["reserved"]), (&json!(18), &json!(1)));
        let (status, text) = refused(&site, "shred p521");
        assert!(status == Some(2) && text.contains("rsa-4096"), "{text}");

        let audited_actions = audited_actions(&site);
        assert_eq!(audited_actions.len(), 10, "{audited_actions:?}");
        for (pair, (kind, batches, moved)) in audited_actions.chunks(2).zip([
            ("all", "0", "0"),
            ("ed25519", "0", "0"),
            ("p256", "1", "19"),
            ("all", "1", "1"),
            ("all", "0", "0"),
        ]) {
            let begun = json!({ "kind": kind, "quarantined": "false" });
            let done =
                json!({ "batches": batches, "discarded": "0", "kind": kind, "moved": moved, "quarantined": "false" });
            assert_eq!(pair[0], ["officer o-1", "pool.shred", "begun", &begun.to_string()]);
            assert_eq!(pair[1], ["officer o-1", "pool.shred", "done", &done.to_string()]);
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pool_table_json_and_metrics_agree() {
    let port = free_port();
    let mut site = pooled_site(10, 20);
    site.edit("sppd.toml", "# metrics = \"127.0.0.1:7446\"", &format!("metrics = \"127.0.0.1:{port}\""));
    site.start();
    wait_for_pools(&site, "all pools are full", is_full).await;
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    provision(&mut line, &mut fab.device(1), &pooled(1)).await;
    assemble_with_retries(&mut line, &pooled(2)).await;
    assemble_with_retries(&mut line, &phone(3)).await;
    tokio::task::block_in_place(|| {
        let status = pool_json(&site, "status");
        let p256 = kind(&status, "p256");
        for (name, value) in [
            ("low", 10),
            ("high", 20),
            ("ready", 18),
            ("reserved", 1),
            ("quarantined", 0),
            ("unavailable", 0),
            ("batches", 1),
            ("made_total", 20),
            ("reserved_total", 2),
            ("discarded_total", 0),
        ] {
            assert_eq!(p256[name], value, "{name}: {status}");
        }
        assert_eq!((&p256["filling"], &p256["paused"]), (&json!(false), &json!("")));
        assert!(p256["fill_rate_per_second"].as_f64().unwrap() > 0.0 && p256["oldest"].is_u64(), "{p256}");
        assert_eq!((&status["store"], &status["serving"]), (&json!("wrapped"), &json!(true)));
        assert_eq!(
            (&status["session_batches"], &status["session_pairs"], &status["pairs_to_destroy"]),
            (&json!(1), &json!(1), &json!(0))
        );
        assert_eq!((&status["rolled_back"], &status["error"]), (&json!(""), &json!("")));

        let table = pool_output(&site, "status");
        assert!(table.starts_with("pairs are stored in the state store, wrapped by the HSM\n"), "{table}");
        let header = table.lines().nth(1).unwrap();
        for column in ["kind", "ready", "low", "high", "reserved", "fill rate", "age", "batches", "next shred"] {
            assert!(header.contains(column), "{column}: {table}");
        }
        assert_eq!(row(&table, "p256")[..4], ["18", "10", "20", "1"], "{table}");
        assert!(row(&table, "p256").contains(&"in".to_owned()), "when it is shredded: {table}");
        assert_eq!(row(&table, "ed25519")[..4], ["2", "1", "2", "0"], "{table}");
        assert_eq!(row(&table, "on demand")[3], "1", "{table}");

        let metrics = scrape(port);
        let value = |line: &str| {
            metrics.lines().find_map(|reported| reported.strip_prefix(line)).map(|value| value.trim().to_owned())
        };
        for name in ["p256", "ed25519"] {
            let reported = kind(&status, name);
            for (metric, field) in [
                ("ready_pairs", "ready"),
                ("reserved_pairs", "reserved"),
                ("quarantined_pairs", "quarantined"),
                ("unavailable_pairs", "unavailable"),
                ("low_mark", "low"),
                ("high_mark", "high"),
                ("batches", "batches"),
                ("made_pairs", "made_total"),
                ("reserved_total", "reserved_total"),
                ("discarded_pairs", "discarded_total"),
            ] {
                let found = value(&format!("spp_pool_{metric}{{kind=\"{name}\"}}"));
                assert_eq!(found, Some(reported[field].to_string()), "{metric} of {name}: {metrics}");
            }
            for (metric, wanted) in [
                ("filling", 0.0),
                ("paused", 0.0),
                ("fill_rate_per_second", reported["fill_rate_per_second"].as_f64().unwrap()),
            ] {
                let found: f64 = value(&format!("spp_pool_{metric}{{kind=\"{name}\"}}")).unwrap().parse().unwrap();
                assert!((found - wanted).abs() < 0.001, "{metric} of {name}: {metrics}");
            }
        }
        for (metric, wanted) in
            [("serving", "1"), ("pairs_to_destroy", "0"), ("session_batches", "1"), ("session_pairs", "1")]
        {
            assert_eq!(value(&format!("spp_pool_{metric} ")).as_deref(), Some(wanted), "{metric}: {metrics}");
        }
    });
}

fn scrape(port: u16) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

#[tokio::test]
async fn station_cannot_view_fill_or_shred_pools() {
    let mut site = pooled_site(1, 2);
    site.start();
    let mut officer = OfficerClient::new(site.connect(site.officer, site.tls("tls/line-1-a")).await.unwrap());
    for refused in [
        officer.get_pool_status(GetPoolStatusRequest {}).await.map(drop).unwrap_err(),
        officer.fill_pool(FillPoolRequest { kind: "p256".to_owned(), to: 100 }).await.map(drop).unwrap_err(),
        officer.shred_pool(ShredPoolRequest::default()).await.map(drop).unwrap_err(),
    ] {
        assert!(Refusal::of(&refused).is(Code::PermissionDenied, "WRONG_ROLE"), "{refused:?}");
    }
    assert_eq!(audited_actions(&site), Vec::<[String; 4]>::new(), "nothing was begun");
    let full = wait_for_pools(&site, "all pools are full", is_full).await;
    assert!(full.kinds.iter().all(|kind| kind.ready == 2), "{full:?}");
}

/// While devices take pairs, the pool may never reach the ordered number at one time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pool_fill_ends_while_devices_take_pairs() {
    let mut site = pooled_site(10, 60);
    site.start();
    wait_for_pools(&site, "all pools are full", is_full).await;
    let (mut line, stop) = (site.station().await, Arc::new(AtomicBool::new(false)));
    let taker = tokio::spawn({
        let stop = Arc::clone(&stop);
        async move {
            for n in (1..).take_while(|_| !stop.load(Ordering::Relaxed)) {
                assemble_with_retries(&mut line, &pooled(n)).await;
                tokio::time::sleep(Duration::from_millis(15)).await;
            }
        }
    });
    for _ in 0..3 {
        let until = Instant::now() + Duration::from_secs(20);
        let request = FillPoolRequest { kind: "p256".to_owned(), to: 80 };
        let mut steps = site.officer().await.fill_pool(request).await.unwrap().into_inner();
        loop {
            let step = tokio::time::timeout_at(until.into(), steps.message()).await.expect("it ends").unwrap().unwrap();
            assert_eq!((&*step.kind, step.target), ("p256", 80));
            if step.done {
                break;
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    taker.await.unwrap();
}
