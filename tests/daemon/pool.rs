//! Key pools over gRPC: stations wait for an empty pool, erased pairs never return, and paused filling resumes.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use serde_json::Value;
use spp::store::SessionReader as _;
use spp_proto::{AbortRequest, AssembleRequest, AssembleResponse, GetPoolStatusResponse, SessionState};
use tonic::Code;
use tonic_types::StatusExt as _;

use spp_testkit::devices::{Line, Refusal, assemble, chip, phone, state_of};
use spp_testkit::pools::*;
use spp_testkit::site::Site;

/// The order for device `n` as a router: an RSA pair of the pool.
fn router(n: u64) -> AssembleRequest {
    AssembleRequest { identity: format!("serial:R-{n}"), profile: "router".to_owned(), ..phone(n) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_pool_returns_retry_delay_then_serves_all() {
    let mut site = Site::new();
    use_rsa_routers(&site);
    site.start();
    wait_for_pools(&site, "two routers' pairs are ready", is_full).await;
    let line = site.station().await;
    let orders = || (1..=9).map(|n| (line.clone(), router(n)));
    let at_once = orders().map(|(mut line, order)| tokio::spawn(async move { assemble(&mut line, &order).await }));
    let mut empty = 0;
    for answer in at_once.collect::<Vec<_>>() {
        let Err(status) = answer.await.unwrap() else { continue };
        let refused = Refusal::of(&status);
        assert!(refused.is(Code::ResourceExhausted, "POOL_EMPTY"), "{status:?}");
        assert!(status.message().contains("no rsa-2048 pair is ready"), "{status:?}");
        let delay = retry_delay(&status).expect("it says when to come again");
        assert!((Duration::from_millis(200)..=Duration::from_secs(30)).contains(&delay), "{delay:?}");
        let metadata = status.get_error_details().error_info().unwrap().metadata.clone();
        assert_eq!(metadata["key_type"], "rsa-2048");
        let rate: f64 = metadata["fill_rate_per_second"].parse().unwrap();
        assert!(rate > 0.0, "two pairs were made: {metadata:?}");
        empty += 1;
    }
    assert!(empty >= 2, "only {empty} of 9 came to an empty pool of 2");
    let mut keys = HashSet::new();
    for (mut line, order) in orders() {
        assert!(
            keys.insert(public_key(&assemble_with_retries(&mut line, &order).await.certificate)),
            "{}",
            order.identity
        );
    }
    let status = wait_for_pools(&site, "it is full again", is_full).await;
    assert_eq!((status.kinds[0].reserved, status.kinds[0].reserved_total, status.session_pairs), (9, 9, 0));
}

/// Without leases the store would refuse the second reservation, and the order would have to be repeated needlessly.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_orders_never_share_a_pair() {
    let mut site = pooled_site(2, 4);
    site.start();
    wait_for_pools(&site, "all pools are full", is_full).await;
    let line = site.station().await;
    let taker = |task: u64| {
        let mut line = line.clone();
        tokio::spawn(async move {
            for n in (1..=10).map(|n| 100 * task + n) {
                while let Err(status) = assemble(&mut line, &pooled(n)).await {
                    assert!(Refusal::of(&status).is(Code::ResourceExhausted, "POOL_EMPTY"), "{status:?}");
                    // Retry sooner than the refusal says, so that all calls meet an empty pool.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        })
    };
    for task in (0..32).map(taker).collect::<Vec<_>>() {
        task.await.unwrap();
    }
}

#[test]
fn station_waits_for_empty_pool_and_completes_all_devices() {
    let mut site = Site::new();
    use_rsa_routers(&site);
    site.start();
    let (line, devices) = (site.line, 6);
    let output = site.spp_line(&format!(
        "provision --server https://127.0.0.1:{line} --tls tls/line-1-a --devices devices --simulate {devices} \
         --profile router --identity-prefix serial:R --manufacturer keys/manufacturer-ca.pem --report report.csv"
    ));
    let text = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains(&format!("{devices} of {devices} devices are complete")), "{text}");
    let report = String::from_utf8(site.read("report.csv")).unwrap();
    let rows: Vec<Vec<_>> = report.lines().map(|line| line.split(',').collect()).collect();
    let column = rows[0].iter().position(|name| *name == "retries").unwrap();
    let retries: u32 = rows[1..].iter().map(|row| row[column].parse::<u32>().unwrap()).sum();
    assert!(retries > 0, "{devices} devices of a pool with two pairs never waited: {report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pool_or_generate_does_not_wait_for_empty_pool() {
    let mut site = Site::new();
    add_profile(&site, "hurried", "router", &[("source = \"pool\"", "source = \"pool-or-generate\"")]);
    site.start();
    wait_for_pools(&site, "two routers' pairs are ready", is_full).await;
    let line = site.station().await;
    let hurried = |n| AssembleRequest { profile: "hurried".to_owned(), ..router(n) };
    let at_once = (1..=16).map(|n| {
        let (mut line, order) = (line.clone(), hurried(n));
        tokio::spawn(async move { assemble(&mut line, &order).await })
    });
    let mut keys = HashSet::new();
    for answer in at_once.collect::<Vec<_>>() {
        assert!(keys.insert(public_key(&answer.await.unwrap().expect("no order is refused").certificate)));
    }
    let status = wait_for_pools(&site, "it is full again", is_full).await;
    let (pooled, made) = (status.kinds[0].reserved, status.session_pairs);
    assert!(pooled >= 2 && made >= 1, "{status:?}");
    assert_eq!(pooled + made, 16, "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn aborted_pair_is_destroyed_and_never_offered_again() {
    let mut site = pooled_site(8, 16);
    site.edit("sppd.toml", "shred_after = \"1h\"", "shred_after = \"1s\"");
    site.edit("sppd.toml", "batch_size = 1000", "batch_size = 10");
    site.start();
    let mut given = BTreeMap::new();
    let mut sessions = Vec::new();
    for round in 1..=3 {
        let line = site.station().await;
        let tasks: Vec<_> = (1..=12).map(|n| tokio::spawn(assemble_and_abort(line.clone(), n))).collect();
        for (n, task) in (1..).zip(tasks) {
            for answer in task.await.unwrap() {
                let key = public_key(&answer.certificate);
                assert_eq!(given.insert(key, n), None, "in round {round} a key came back to device {n}");
                sessions.push(answer.session_id);
            }
        }
        site.kill();
        site.start();
    }
    let status = wait_for_pools(&site, "all is shredded", is_idle).await;
    let p256 = status.kinds.iter().find(|kind| kind.kind == "p256").unwrap();
    assert_eq!((p256.reserved, p256.reserved_total), (0, given.len() as u64));
    assert_eq!(p256.made_total, p256.ready + p256.reserved_total, "what is neither ready nor was taken is lost");
    assert!(tokio::task::block_in_place(|| site.stop()).success());
    let store = open_store(&site);
    let ready = ready_keys(&all_pairs(&store).await);
    assert!(given.keys().all(|key| !ready.contains(key)), "the key of an aborted session is ready again");
    for session in sessions {
        let session = spp_format::names::SessionId::from_bytes(&session).unwrap();
        assert_eq!(store.stored_key(&session).await.unwrap(), None);
    }
}

/// Assembles and aborts the same device repeatedly.
async fn assemble_and_abort(mut line: Line, n: u64) -> Vec<AssembleResponse> {
    let mut answers = Vec::new();
    for _ in 0..4 {
        let answer = assemble_with_retries(&mut line, &pooled(n)).await;
        let abort = AbortRequest { session_id: answer.session_id.clone(), reason: "a test".to_owned() };
        line.abort(abort.clone()).await.unwrap();
        line.abort(abort).await.expect("it may be repeated");
        assert_eq!(state_of(&mut line, &chip(n)).await, SessionState::Aborted);
        answers.push(answer);
    }
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filling_pauses_below_disk_floor_and_resumes() {
    let mut site = pooled_site(10, 20);
    site.start();
    wait_for_pools(&site, "all pools are full", is_full).await;
    assert!(tokio::task::block_in_place(|| site.stop()).success());
    // A floor above the free space of any disk.
    site.edit("sppd.toml", "free_space_floor = \"1 MiB\"", "free_space_floor = \"4000 TiB\"");
    site.edit("sppd.toml", "low = 10\nhigh = 20", "low = 30\nhigh = 40");
    site.spawn();
    site.until_listening().await;
    let kind = |status: &GetPoolStatusResponse| status.kinds.iter().find(|kind| kind.kind == "p256").unwrap().clone();
    let status = wait_for_pools(&site, "it is paused", |status| !kind(status).paused.is_empty()).await;
    let paused = kind(&status);
    assert!(
        paused.paused.contains("the disk has only") && paused.paused.contains("filling resumes when space is free"),
        "{paused:?}"
    );
    let reported: Value =
        serde_json::from_str(&site.sppctl(&format!("pool status --json {}", officer(&site)))).unwrap();
    let reported = reported["kinds"].as_array().unwrap().iter().find(|kind| kind["kind"] == "p256").unwrap().clone();
    assert!(reported["paused"].as_str().unwrap().contains("the disk has only"), "{reported}");
    assert!(site.sppctl(&format!("pool status {}", officer(&site))).contains("paused: the disk has only"));
    assert_eq!(paused.made_total, 20, "{paused:?}");
    let mut line = site.station().await;
    let refused = Refusal::of(&assemble(&mut line, &pooled(2)).await.unwrap_err());
    assert!(refused.is(Code::ResourceExhausted, "DISK_FULL"), "{refused:?}");
    assert_eq!(kind(&wait_for_pools(&site, "it answers", |_| true).await).ready, 20, "a refused order takes no pair");

    assert!(tokio::task::block_in_place(|| site.stop()).success());
    site.edit("sppd.toml", "free_space_floor = \"4000 TiB\"", "free_space_floor = \"1 MiB\"");
    site.start();
    let full = kind(&wait_for_pools(&site, "it is full", is_full).await);
    assert_eq!((full.ready, &*full.paused), (40, ""));
    assemble_with_retries(&mut site.station().await, &pooled(2)).await;
}

#[test]
fn invalid_pool_configuration_is_reported_with_location() {
    let site = pooled_site(10, 20);
    use_rsa_routers(&site);
    let twice = "kind = \"p256\"\nlow = 10\nhigh = 20";
    let router = "kind = \"rsa-2048\"\nlow = 1\nhigh = 2";
    for (from, to, faults) in [
        (
            twice,
            "kind = \"ed25519\"\nlow = 10\nhigh = 20",
            &["profile pooled: key_pair: uses a pool of p256 pairs", "[[keypool.pool]]"][..],
        ),
        (twice, "kind = \"p256\"\nlow = 20\nhigh = 10", &["keypool.pool p256: low must be at least 1"]),
        (twice, "kind = \"p256\"\nlow = 0\nhigh = 10", &["keypool.pool p256: low must be at least 1"]),
        (
            router,
            twice,
            &["keypool.pool p256: is configured twice", "profile router: key_pair: uses a pool of rsa-2048 pairs"],
        ),
        (twice, "kind = \"p521\"\nlow = 10\nhigh = 20", &["p521"]),
        (twice, "kind = \"p256\"\nlow = 10\nhigh = 20\nmiddle = 15", &["unknown field `middle`"]),
        ("shred_after = \"1h\"", "shred_after = \"0s\"", &["keypool.shred_after: must be from 1 second"]),
        ("batch_size = 1000", "batch_size = 0", &["keypool.batch_size: must be from 1"]),
        ("store = \"wrapped\"", "store = \"paper\"", &["unknown variant `paper`"]),
    ] {
        site.edit("sppd.toml", from, to);
        assert_check_reports(&site, faults);
        site.edit("sppd.toml", to, from);
    }
    site.edit("sppd.toml", "store = \"wrapped\"", "store = \"hsm\"");
    site.edit("sppd.toml", "low = 10\nhigh = 20", "low = 10\nhigh = 999");
    assert_check_reports(&site, &["keypool.store: the pools may hold 1001 pairs", "SoftHSM 2 supports 1000"]);
    site.edit("sppd.toml", "high = 999", "high = 998");
    let output = site.run("sppd", "--config sppd.toml --check");
    assert!(output.status.success(), "as many as it is good for: {}", String::from_utf8_lossy(&output.stderr));
}

fn assert_check_reports(site: &Site, faults: &[&str]) {
    let output = site.run("sppd", "--config sppd.toml --check");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(78), "{faults:?}: {text}");
    assert!(text.contains("sppd.toml"), "{text}");
    for fault in faults {
        assert!(text.contains(fault), "{fault} is missing in: {text}");
    }
}

/// Background work runs on threads with the lowest priority.
#[test]
fn worker_background_threads_have_lowest_priority() {
    let mut site = Site::new();
    site.edit("hsm-config/softhsm2.toml", "background_nice = 0", "# background_nice = 19");
    site.start();
    let usual = rustix::process::getpriority_process(None).unwrap();
    let mut seen = [0, 0];
    for thread in std::fs::read_dir(format!("/proc/{}/task", site.worker_pid().unwrap())).unwrap() {
        let stat = std::fs::read_to_string(thread.unwrap().path().join("stat")).unwrap();
        // proc(5): the name is in parentheses; nice is the 17th field after it.
        let (before, fields) = stat.rsplit_once(") ").unwrap();
        let nice: i32 = fields.split(' ').nth(16).unwrap().parse().unwrap();
        if before.ends_with("hsm-background") {
            assert_eq!(nice, 19, "the lowest");
            seen[0] += 1;
        } else if before.ends_with("hsm-session") {
            assert_eq!(nice, usual, "the priority of the daemon");
            seen[1] += 1;
        }
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
}
