//! The daemon's audit log: creation by an officer, recorded events, tamper detection and accepted loss.

use serde_json::Value;
use spp_format::keys::sha256;
use spp_proto::officer_client::OfficerClient;
use spp_proto::{AbortRequest, AssembleRequest, FillPoolRequest};
use tonic::Code;

use spp_testkit::ceremony::CeremonyFile;
use spp_testkit::devices::{Refusal, TestFab, assemble, chip, phone, provision};
use spp_testkit::process::{child_command, output, program};
use spp_testkit::site::Site;
use spp_testkit::wait::eventually_blocking;

const VERIFY: &str = "audit verify --config sppd.toml";

fn entries(site: &Site) -> Vec<Value> {
    let text = String::from_utf8(site.read("audit/audit.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn start_and_stop_are_recorded_with_the_configuration_hash() {
    let mut site = site_without_enrolments();
    assert!(site.stop().success());
    site.edit("sppd.toml", "\"24h\"", "\"23h\"");
    site.start();
    site.kill();
    site.start();
    let entries = entries(&site);
    let acts: Vec<_> = entries.iter().map(|entry| entry["act"].as_str().unwrap()).collect();
    let expected = ["start", "stop", "audit.checkpoint", "start", "start"];
    assert_eq!(acts, expected, "a killed daemon records no stop");
    assert_eq!(entries[4]["details"]["configuration"], hex::encode(sha256(&site.read("sppd.toml"))));
    assert_ne!(entries[4]["details"]["configuration"], entries[0]["details"]["configuration"]);
    assert_eq!(entries[0]["details"]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!((&entries[0]["node"], &entries[0]["caller"]), (&"demo".into(), &"sppd".into()));
    let text = site.sppctl(VERIFY);
    assert!(text.starts_with("5 entries, chain intact; 1 checkpoints in the log and 1 in the public"), "{text}");
    assert!(site.stop().success());
    let found: Value = serde_json::from_str(&site.sppctl(&format!("{VERIFY} --json"))).unwrap();
    assert_eq!((&found["whole"], &found["entries"], &found["covered"]), (&true.into(), &7.into(), &6.into()));
}

#[test]
fn verify_names_the_changed_line() {
    let mut site = site_without_enrolments();
    assert!(site.stop().success());
    site.edit("audit/audit.jsonl", "\"sppd\"", "\"nobody\"");
    let output = site.try_sppctl(&format!("{VERIFY} --json"));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.success(), &found["whole"], &found["line"]), (false, &false.into(), &2.into()));
    let output = site.try_sppctl(VERIFY);
    assert!(output.stdout.is_empty() && String::from_utf8_lossy(&output.stderr).contains("line 2: "));
}

#[test]
fn missing_log_is_created_by_officer_only() {
    let mut site = Site::new();
    std::fs::remove_dir_all(site.path("audit")).unwrap();
    for arguments in ["--config sppd.toml", "--config sppd.toml --check"] {
        let output = site.run("sppd", arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains("sppctl audit init"), "{text}");
        assert!(!text.contains("listening") && !site.path("audit").exists(), "{text}");
    }
    site.sppctl("audit init --config sppd.toml");
    assert!(!site.path("audit/spool").exists());
    assert!(!site.try_sppctl("audit init --config sppd.toml").status.success(), "an existing log is not overwritten");
    site.start();
    assert_eq!(site.sppctl(VERIFY), "1 entries, chain intact\n");
}

#[test]
fn tail_show_and_export_refuse_entries_outside_the_chain() {
    let mut site = site_without_enrolments();
    assert!(site.stop().success());
    let text = site.sppctl("audit tail --config sppd.toml");
    let lines: Vec<_> = text.lines().collect();
    assert!(lines.len() == 3 && lines[0].contains(" start ") && lines[1].contains(" stop "), "{text}");
    assert_eq!(site.sppctl("audit tail --config sppd.toml -n 2").lines().collect::<Vec<_>>(), lines[1..]);
    let entry: Value = serde_json::from_str(&site.sppctl("audit show 0 --config sppd.toml --json")).unwrap();
    assert_eq!(entry, without_chain(&entries(&site)[0]));
    assert!(site.sppctl("audit show 1 --config sppd.toml").contains("act      stop"));
    let none = site.try_sppctl("audit show 7 --config sppd.toml");
    assert!(String::from_utf8_lossy(&none.stderr).contains("has no entry 7"), "{none:?}");

    let exported = site.sppctl("audit export --config sppd.toml --from 2020-01-01");
    let all: Vec<Value> = exported.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(all, entries(&site).iter().map(without_chain).collect::<Vec<_>>());
    assert_eq!(site.sppctl("audit export --config sppd.toml --to 2020-01-01"), "");
    site.sppctl("audit export --config sppd.toml --format csv --out audit.csv");
    let rows = String::from_utf8(site.read("audit.csv")).unwrap();
    assert!(
        rows.starts_with("sequence,time,node,caller,act,outcome,details\n0,") && rows.matches(",sppd,").count() == 3,
        "{rows}"
    );
    let again = site.try_sppctl("audit export --config sppd.toml --out audit.csv");
    assert!(String::from_utf8_lossy(&again.stderr).contains("never overwrites a file"), "{again:?}");

    site.edit("audit/audit.jsonl", "\"sppd\"", "\"nobody\"");
    for arguments in ["tail", "export", "show 1"] {
        let output = site.try_sppctl(&format!("audit {arguments} --config sppd.toml"));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains("line 2: "), "{arguments}: {error}");
    }
}

/// Removes the chain hash, which exists in the file only.
fn without_chain(entry: &Value) -> Value {
    let mut entry = entry.clone();
    entry.as_object_mut().unwrap().remove("previous");
    entry
}

/// Returns a site whose audit log begins with the daemon's start, without the enrolments on its token.
fn site_without_enrolments() -> Site {
    without_enrolments(Site::new())
}

fn without_enrolments(mut site: Site) -> Site {
    std::fs::remove_dir_all(site.path("audit/spool")).unwrap();
    site.start();
    site
}

/// Returns a stopped site that has provisioned a device and published an audit checkpoint.
async fn site_with_checkpoint() -> Site {
    provision_and_stop(Site::new()).await
}

async fn provision_and_stop(site: Site) -> Site {
    let mut site = without_enrolments(site);
    provision(&mut site.station().await, &mut TestFab::new(&site).device(1), &phone(1)).await;
    tokio::task::block_in_place(|| assert!(site.stop().success()));
    site
}

fn lines(site: &Site) -> Vec<String> {
    String::from_utf8(site.read("audit/audit.jsonl")).unwrap().lines().map(str::to_owned).collect()
}

fn write_log(site: &Site, lines: &[String]) {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(site.path("audit/audit.jsonl"), text).unwrap();
}

/// Recomputes the hash chain of the lines, as an attacker would.
fn rechained(lines: &[String]) -> Vec<String> {
    let (mut previous, mut rechained) = ("0".repeat(64), Vec::new());
    for (sequence, line) in lines.iter().enumerate() {
        let entry: Value = serde_json::from_str(line).unwrap();
        let mut text =
            line.replacen(&format!("\"sequence\":{}", entry["sequence"]), &format!("\"sequence\":{sequence}"), 1);
        let link = |hash: &str| format!("\"previous\":\"{hash}\"");
        text = text.replace(&link(entry["previous"].as_str().unwrap()), &link(&previous));
        previous = hex::encode(sha256(text.as_bytes()));
        rechained.push(text);
    }
    rechained
}

/// Starts the daemon and asserts that it refuses to start. A daemon that serves is terminated and fails the assertion.
fn refused_start(site: &Site) -> std::process::Output {
    let mut command = child_command("timeout");
    command.arg("120").arg(program("sppd")).args(["--config", "sppd.toml"]).current_dir(site.path(""));
    let output = output(command);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    output
}

/// Returns the JSON of a line's details.
fn details_of(line: &str) -> String {
    let begin = line.find("\"details\":").unwrap() + "\"details\":".len();
    let end = line.find(",\"outcome\"").unwrap();
    line[begin..end].to_owned()
}

fn assert_not_verified(site: &Site, tampering: &str, expected: &str) {
    let output = site.try_sppctl(VERIFY);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && error.contains(expected),
        "{tampering}: {error} {}",
        String::from_utf8_lossy(&output.stdout)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tampering_is_detected_even_with_recomputed_chain() {
    let site = site_with_checkpoint().await;
    let before = lines(&site);
    let acts: Vec<_> = entries(&site).iter().map(|entry| entry["act"].as_str().unwrap().to_owned()).collect();
    assert_eq!(acts, ["start", "line.assemble", "line.complete", "stop", "audit.checkpoint"]);
    assert!(
        site.sppctl(VERIFY).contains("1 in the public database verified, the newest covers 4 entries, 1 follow it")
    );
    let with = |change: fn(&mut Vec<String>)| {
        let mut lines = before.clone();
        change(&mut lines);
        lines
    };
    let edited = with(|lines| lines[1] = lines[1].replace("station line-1/a", "station line-1/b"));
    let deleted = with(|lines| drop(lines.remove(2)));
    let reordered = with(|lines| lines.swap(1, 2));
    let inserted = with(|lines| lines.insert(2, lines[1].clone()));
    let cut = with(|lines| lines.truncate(3));
    for (tampering, lines, chain_error, checkpoint_error) in [
        ("edit", &edited, "line 3: does not continue", "entry 3 or an earlier one was replaced"),
        ("delete", &deleted, "line 3: sequence is 3", "entry 3 or an earlier one was replaced"),
        ("reorder", &reordered, "line 2: sequence is 2", "entry 3 or an earlier one was replaced"),
        ("insert", &inserted, "line 3: sequence is 1", "entry 3 or an earlier one was replaced"),
        ("truncate", &cut, "covers 4: the newest 1 are missing", "covers 4: the newest 1 are missing"),
    ] {
        write_log(&site, lines);
        assert_not_verified(&site, tampering, chain_error);
        write_log(&site, &rechained(lines));
        assert_not_verified(&site, tampering, checkpoint_error);
    }
    // A changed checkpoint, without the signing key.
    let forged = with(|lines| lines[4] = lines[4].replace("entries   4", "entries   3"));
    write_log(&site, &rechained(&forged));
    assert_not_verified(&site, "forge a checkpoint", "line 5: checkpoint: ");
    // A forged loss entry, to hide the truncation.
    let loss = before[4].replace("audit.checkpoint", "audit.loss");
    let mut entry: Value = serde_json::from_str(&loss).unwrap();
    for (index, known) in [("1", "4"), ("1", "9"), ("7", "4")] {
        entry["details"] = serde_json::json!({ "index": index, "known": known, "kept": "1" });
        let lost =
            vec![before[0].clone(), before[4].replacen(&details_of(&before[4]), &entry["details"].to_string(), 1)];
        let lost: Vec<_> = lost.into_iter().map(|line| line.replace("audit.checkpoint", "audit.loss")).collect();
        write_log(&site, &rechained(&lost));
        let expected = if (index, known) == ("1", "4") {
            "--accepted-loss 1"
        } else {
            "without a matching checkpoint in the public database"
        };
        assert_not_verified(&site, "a forged loss", expected);
    }
    // A part of the public database is missing.
    write_log(&site, &before);
    let (edge, aside) = (site.path("public/edge"), site.path("aside"));
    std::fs::rename(&edge, &aside).unwrap();
    assert_not_verified(&site, "no public database", "fetch a newer copy");
    std::fs::rename(&aside, &edge).unwrap();
    site.sppctl(VERIFY);
    // The log of another site, and an empty log.
    let other = provision_and_stop(Site::with_own_keys()).await;
    write_log(&site, &lines(&other));
    assert_not_verified(&site, "replace", "line 5: checkpoint: ");
    write_log(&site, &[]);
    assert_not_verified(
        &site,
        "empty",
        "the log has 0 entries, but the checkpoint in entry 1 of the public database covers 4",
    );
    write_log(&site, &before);
    site.sppctl(VERIFY);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncated_log_blocks_the_start_until_loss_is_accepted() {
    let mut site = site_with_checkpoint().await;
    let before = lines(&site);
    write_log(&site, &before[..2]);
    // Repeated starts and forged entries after the cut do not change that.
    for filler in [&[][..], &before[2..3], &before[2..3]] {
        let mut longer = before[..2].to_vec();
        longer.extend(filler.iter().cycle().take(5 * filler.len()).cloned());
        write_log(&site, &rechained(&longer));
        refused_start(&site);
        assert_eq!(lines(&site).len(), longer.len(), "a refused start appends nothing");
    }
    write_log(&site, &before[..2]);
    let output = refused_start(&site);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success()
            && error.contains("does not match the checkpoint of 4 entries in entry 1 of the public database")
            && error.contains("accepted_loss = 1"),
        "{error}"
    );
    assert_eq!(lines(&site).len(), 2, "a refused start appends nothing");
    site.edit("sppd.toml", "[audit]\n", "[audit]\naccepted_loss = 1\n");
    tokio::task::block_in_place(|| {
        site.start();
        assert!(site.stop().success());
    });
    assert_not_verified(&site, "an accepted loss without confirmation", "confirm it with --accepted-loss 1");
    let text = site.sppctl(&format!("{VERIFY} --accepted-loss 1"));
    assert!(text.contains("1 checkpoints cover entries accepted as lost"), "{text}");
    let acts: Vec<_> = entries(&site).iter().map(|entry| entry["act"].as_str().unwrap().to_owned()).collect();
    assert_eq!(acts, ["start", "line.assemble", "audit.loss", "start", "stop", "audit.checkpoint"]);
    // After the configuration change is reverted, the daemon starts normally.
    site.edit("sppd.toml", "accepted_loss = 1\n", "");
    tokio::task::block_in_place(|| {
        site.start();
        assert!(site.stop().success());
    });
    // The acceptance covers that loss only.
    let before = lines(&site);
    write_log(&site, &before[..5]);
    site.edit("sppd.toml", "[audit]\n", "[audit]\naccepted_loss = 1\n");
    let output = refused_start(&site);
    assert!(String::from_utf8_lossy(&output.stderr).contains("accepted_loss = 3"), "{output:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn actions_are_recorded_and_repeated_refusals_aggregated() {
    let mut site = Site::new();
    site.sppctl("auditor enroll x-1 --config sppd.toml --out tls/auditor");
    site.start();
    let mut line = site.station().await;
    let answer = assemble(&mut line, &phone(1)).await.unwrap();
    let outside = AssembleRequest { identity: "imei:353918050000002".to_owned(), ..phone(2) };
    for _ in 0..50 {
        assemble(&mut line, &outside).await.unwrap_err();
    }
    let abort = AbortRequest { session_id: answer.session_id.clone(), reason: "scratched".to_owned() };
    line.abort(abort).await.unwrap();
    let mut auditor = OfficerClient::new(site.connect(site.officer, site.tls("tls/auditor")).await.unwrap());
    auditor.fill_pool(FillPoolRequest::default()).await.unwrap_err();
    tokio::task::block_in_place(|| assert!(site.stop().success()));
    let entries = entries(&site);
    let of = |act: &str| entries.iter().filter(|entry| entry["act"] == act).collect::<Vec<_>>();
    let assembled = of("line.assemble");
    assert_eq!(assembled.len(), 3, "one success, one refusal, and one aggregate: {assembled:?}");
    assert_eq!(assembled[0]["outcome"], "done");
    assert_eq!(assembled[0]["details"]["session"], hex::encode(&answer.session_id));
    assert_eq!(assembled[0]["details"]["chip"], chip(1).to_string());
    assert!(assembled[1]["outcome"].as_str().unwrap().starts_with("refused: "), "{assembled:?}");
    assert_eq!(
        (&assembled[1]["caller"], &assembled[2]["details"]["repeated"]),
        (&"station line-1/a".into(), &"49".into())
    );
    assert_eq!(of("line.abort")[0]["details"]["reason"], "scratched");
    let wrong_role = of("call");
    assert_eq!(wrong_role[0]["caller"], "auditor x-1");
    assert_eq!(wrong_role[0]["details"]["method"], "/spp.v1.Officer/FillPool");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unwritable_log_withholds_answers_and_blocks_new_calls() {
    let site = site_without_enrolments();
    let mut line = site.station().await;
    assemble(&mut line, &phone(1)).await.unwrap();
    let before = site.read("audit/audit.jsonl");
    std::fs::OpenOptions::new().write(true).open(site.path("audit/audit.jsonl")).unwrap().set_len(7).unwrap();
    for n in [2, 3, 3] {
        let refused = Refusal::of(&assemble(&mut line, &phone(n)).await.unwrap_err());
        assert!(refused.is(Code::Unavailable, "AUDIT_LOG_UNAVAILABLE"), "{refused:?}");
    }
    let issued = site.status().await.sessions.unwrap().issued;
    assert_eq!(issued, 2, "the first session was created but not delivered, the others were not begun");
    std::fs::write(site.path("audit/audit.jsonl"), before).unwrap();
    for n in 1..=3 {
        assemble(&mut line, &phone(n)).await.unwrap();
    }
    let text = site.sppctl(VERIFY);
    assert!(text.contains("chain intact"), "{text}");
    let acts: Vec<_> = entries(&site).iter().map(|entry| entry["act"].as_str().unwrap().to_owned()).collect();
    assert!(acts.contains(&"audit.resumed".to_owned()), "{acts:?}");
}

#[test]
fn offline_token_events_are_imported_while_the_daemon_runs() {
    let mut site = Site::running();
    let of = |site: &Site, name: &str| -> Vec<(String, String)> {
        let entries = entries(site).into_iter().filter(|entry| entry["act"] == "token.act");
        let of = entries.filter(|entry| entry["details"]["name"].as_str().is_some_and(|named| named.contains(name)));
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        of.map(|entry| (text(&entry["details"]["act"]), text(&entry["outcome"]))).collect()
    };
    let done = |act: &str| vec![(act.to_owned(), "begun".to_owned()), (act.to_owned(), "done".to_owned())];
    assert_eq!(of(&site, "localhost"), done("server.enroll"));
    assert_eq!(of(&site, "line-1/a"), done("station.enroll"));
    std::fs::write(site.path("check.toml"), CeremonyFile::new().check_value("master-1").text()).unwrap();
    site.sppctl("ceremony run check.toml --hsm hsm.toml --out keys --officer o-1 --config sppd.toml");
    site.sppctl("monitor enroll m-1 --config sppd.toml --out tls/monitor");
    assert!(!site.try_sppctl("monitor enroll m-1 --config sppd.toml --out tls/monitor").status.success());
    eventually_blocking("the log has the offline token events", || {
        let found = of(&site, "m-1");
        if found.len() < 4 { Err(found) } else { Ok(()) }
    });
    assert_eq!(of(&site, "m-1")[..2], done("monitor.enroll"));
    let ceremony: Vec<_> = entries(&site).into_iter().filter(|entry| entry["details"]["act"] == "ceremony").collect();
    assert_eq!((&ceremony[0]["outcome"], &ceremony[1]["outcome"]), (&"begun".into(), &"done".into()));
    assert!(ceremony[1]["details"]["act 01"].as_str().unwrap().contains("master-1"), "{ceremony:?}");
    assert!(of(&site, "m-1")[3].1.starts_with("failed: "));
    assert!(site.stop().success());
    site.sppctl(VERIFY);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn auditor_verifies_a_fetched_copy_of_the_log() {
    let mut site = Site::new();
    site.sppctl("auditor enroll x-1 --config sppd.toml --out tls/auditor");
    site.edit("sppd.toml", "# checkpoint_every = \"60s\"", "checkpoint_every = \"1s\"");
    site.start();
    let fetch = format!("audit fetch --out copy --server https://127.0.0.1:{} --tls tls/auditor", site.officer);
    let mut line = site.station().await;
    for n in 1..=3 {
        assemble(&mut line, &phone(n)).await.unwrap();
        assert!(site.sppctl(&fetch).contains("bytes in copy"));
    }
    let verify = "audit verify --directory copy --log public --key keys/log-1.vkey --access-ca keys/access-ca.pem";
    eventually_blocking("the copy has a checkpoint", || {
        site.sppctl(&fetch);
        assert_eq!(
            site.read("copy/audit.jsonl"),
            site.read("audit/audit.jsonl")[..site.read("copy/audit.jsonl").len()]
        );
        let output = site.try_sppctl(verify);
        let verified =
            String::from_utf8_lossy(&output.stdout).contains("in the public database verified, the newest covers");
        if output.status.success() && verified { Ok(()) } else { Err(output) }
    });
    assert!(site.sppctl("audit tail --directory copy").contains("line.assemble"));
    // A copy of another log is not continued.
    std::fs::write(site.path("copy/audit.jsonl"), vec![b'x'; 1 << 20]).unwrap();
    let output = site.try_sppctl(&fetch);
    assert!(String::from_utf8_lossy(&output.stderr).contains("is beyond the end of the log"), "{output:?}");
}
