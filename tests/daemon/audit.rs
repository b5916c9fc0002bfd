//! The audit log of a daemon: it is made by an officer, tells of each start and stop, and a change in it is found.

use serde_json::Value;
use spp::keys::sha256;
use spp::proto::officer_client::OfficerClient;
use spp::proto::{AbortRequest, AssembleRequest, FillPoolRequest};
use tonic::Code;

use spp_testkit::ceremony::CeremonyFile;
use spp_testkit::floor::{Floor, Refusal, assemble, chip, phone, provision};
use spp_testkit::process::{output, program, tethered};
use spp_testkit::site::Site;
use spp_testkit::wait::eventually_blocking;

const VERIFY: &str = "audit verify --config sppd.toml";

fn entries(site: &Site) -> Vec<Value> {
    let text = String::from_utf8(site.read("audit/audit.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn each_start_and_stop_is_recorded_with_what_was_in_force() {
    let mut site = site_without_enrolments();
    assert!(site.stop().success());
    site.edit("sppd.toml", "\"24h\"", "\"23h\"");
    site.start();
    site.kill();
    site.start();
    let entries = entries(&site);
    let acts: Vec<_> = entries.iter().map(|entry| entry["act"].as_str().unwrap()).collect();
    let wanted = ["start", "stop", "audit.checkpoint", "start", "start"];
    assert_eq!(acts, wanted, "a daemon that was killed could not tell of its end");
    assert_eq!(entries[4]["details"]["configuration"], hex::encode(sha256(&site.read("sppd.toml"))));
    assert_ne!(entries[4]["details"]["configuration"], entries[0]["details"]["configuration"]);
    assert_eq!(entries[0]["details"]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!((&entries[0]["node"], &entries[0]["caller"]), (&"demo".into(), &"sppd".into()));
    let told = site.sppctl(VERIFY);
    assert!(told.starts_with("5 entries, chain is whole; 1 signed checkpoints in it and 1 in the public"), "{told}");
    assert!(site.stop().success());
    let found: Value = serde_json::from_str(&site.sppctl(&format!("{VERIFY} --json"))).unwrap();
    assert_eq!((&found["whole"], &found["entries"], &found["covered"]), (&true.into(), &7.into(), &6.into()));
}

#[test]
fn a_change_is_found_and_the_line_named() {
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
fn the_daemon_never_makes_the_log_and_an_officer_can_make_it_alone() {
    let mut site = Site::new();
    std::fs::remove_dir_all(site.path("audit")).unwrap();
    for words in ["--config sppd.toml", "--config sppd.toml --check"] {
        let output = site.run("sppd", words);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains("sppctl audit init"), "{text}");
        assert!(!text.contains("listening") && !site.path("audit").exists(), "{text}");
    }
    site.sppctl("audit init --config sppd.toml");
    assert!(!site.path("audit/spool").exists());
    assert!(!site.try_sppctl("audit init --config sppd.toml").status.success(), "nothing is made twice");
    site.start();
    assert_eq!(site.sppctl(VERIFY), "1 entries, chain is whole\n");
}

#[test]
fn entries_are_read_by_people_and_programs_and_none_that_does_not_fit() {
    let mut site = site_without_enrolments();
    assert!(site.stop().success());
    let told = site.sppctl("audit tail --config sppd.toml");
    let lines: Vec<_> = told.lines().collect();
    assert!(lines.len() == 3 && lines[0].contains(" start ") && lines[1].contains(" stop "), "{told}");
    assert_eq!(site.sppctl("audit tail --config sppd.toml -n 2").lines().collect::<Vec<_>>(), lines[1..]);
    let one: Value = serde_json::from_str(&site.sppctl("audit show 0 --config sppd.toml --json")).unwrap();
    assert_eq!(one, without_chain(&entries(&site)[0]));
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
    assert!(String::from_utf8_lossy(&again.stderr).contains("overwrites nothing"), "{again:?}");

    site.edit("audit/audit.jsonl", "\"sppd\"", "\"nobody\"");
    for words in ["tail", "export", "show 1"] {
        let output = site.try_sppctl(&format!("audit {words} --config sppd.toml"));
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && why.contains("line 2: "), "{words}: {why}");
    }
}

/// An entry as it is told: its place in the chain is the file's affair.
fn without_chain(entry: &Value) -> Value {
    let mut entry = entry.clone();
    entry.as_object_mut().unwrap().remove("previous");
    entry
}

/// A site whose audit log begins with the daemon's start: the enrolments on its token are not taken in.
fn site_without_enrolments() -> Site {
    without_enrolments(Site::new())
}

fn without_enrolments(mut site: Site) -> Site {
    std::fs::remove_dir_all(site.path("audit/spool")).unwrap();
    site.start();
    site
}

/// A site that made a device, stopped, and so has a published end of its audit log.
async fn site_with_a_past() -> Site {
    with_a_past(Site::new()).await
}

async fn with_a_past(site: Site) -> Site {
    let mut site = without_enrolments(site);
    provision(&mut site.station().await, &mut Floor::new(&site).device(1), &phone(1)).await;
    tokio::task::block_in_place(|| assert!(site.stop().success()));
    site
}

fn lines(site: &Site) -> Vec<String> {
    String::from_utf8(site.read("audit/audit.jsonl")).unwrap().lines().map(str::to_owned).collect()
}

fn put(site: &Site, lines: &[String]) {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(site.path("audit/audit.jsonl"), text).unwrap();
}

/// The lines with a chain that is whole again, as somebody makes them who knows how it is made.
fn chained(lines: &[String]) -> Vec<String> {
    let (mut previous, mut made) = ("0".repeat(64), Vec::new());
    for (sequence, line) in lines.iter().enumerate() {
        let entry: Value = serde_json::from_str(line).unwrap();
        let mut text =
            line.replacen(&format!("\"sequence\":{}", entry["sequence"]), &format!("\"sequence\":{sequence}"), 1);
        let link = |hash: &str| format!("\"previous\":\"{hash}\"");
        text = text.replace(&link(entry["previous"].as_str().unwrap()), &link(&previous));
        previous = hex::encode(sha256(text.as_bytes()));
        made.push(text);
    }
    made
}

/// A start that ends by itself, with a refusal: a daemon that serves is ended, and is none.
fn refused_start(site: &Site) -> std::process::Output {
    let mut command = tethered("timeout");
    command.arg("120").arg(program("sppd")).args(["--config", "sppd.toml"]).current_dir(site.path(""));
    let output = output(command);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    output
}

/// The JSON of a line's details.
fn details_of(line: &str) -> String {
    let begin = line.find("\"details\":").unwrap() + "\"details\":".len();
    let end = line.find(",\"outcome\"").unwrap();
    line[begin..end].to_owned()
}

fn not_verified(site: &Site, tampering: &str, why: &str) {
    let output = site.try_sppctl(VERIFY);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains(why),
        "{tampering}: {said} {}",
        String::from_utf8_lossy(&output.stdout)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_tampering_is_found_also_by_somebody_who_makes_the_chain_whole_again() {
    let site = site_with_a_past().await;
    let before = lines(&site);
    let acts: Vec<_> = entries(&site).iter().map(|entry| entry["act"].as_str().unwrap().to_owned()).collect();
    assert_eq!(acts, ["start", "line.assemble", "line.complete", "stop", "audit.checkpoint"]);
    assert!(site.sppctl(VERIFY).contains("1 in the public database fit, the newest covers 4 entries, 1 came after it"));
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
    for (tampering, lines, in_chain, made_whole) in [
        ("edit", &edited, "line 3: it does not follow", "entry 3 or one before it is not the one"),
        ("delete", &deleted, "line 3: its sequence is 3", "entry 3 or one before it is not the one"),
        ("reorder", &reordered, "line 2: its sequence is 2", "entry 3 or one before it is not the one"),
        ("insert", &inserted, "line 3: its sequence is 1", "entry 3 or one before it is not the one"),
        ("truncate", &cut, "knows 4: the newest 1 are missing", "knows 4: the newest 1 are missing"),
    ] {
        put(&site, lines);
        not_verified(&site, tampering, in_chain);
        put(&site, &chained(lines));
        not_verified(&site, tampering, made_whole);
    }
    // The checkpoint itself, without its signature's key.
    let forged = with(|lines| lines[4] = lines[4].replace("entries   4", "entries   3"));
    put(&site, &chained(&forged));
    not_verified(&site, "forge a checkpoint", "line 5: its checkpoint: ");
    // A loss that nobody accepted, made up to hide the cut.
    let loss = before[4].replace("audit.checkpoint", "audit.loss");
    let mut entry: Value = serde_json::from_str(&loss).unwrap();
    for (index, known) in [("1", "4"), ("1", "9"), ("7", "4")] {
        entry["details"] = serde_json::json!({ "index": index, "known": known, "kept": "1" });
        let lost =
            vec![before[0].clone(), before[4].replacen(&details_of(&before[4]), &entry["details"].to_string(), 1)];
        let lost: Vec<_> = lost.into_iter().map(|line| line.replace("audit.checkpoint", "audit.loss")).collect();
        put(&site, &chained(&lost));
        let why = if (index, known) == ("1", "4") { "--given-up 1" } else { "the public database does not know" };
        not_verified(&site, "a made-up loss", why);
    }
    // A part of the public database is missing, or all of it but the log knows better.
    put(&site, &before);
    let (edge, aside) = (site.path("public/edge"), site.path("aside"));
    std::fs::rename(&edge, &aside).unwrap();
    not_verified(&site, "no public database", "it is an older copy");
    std::fs::rename(&aside, &edge).unwrap();
    site.sppctl(VERIFY);
    // Everything written anew, by a daemon of another site, and an empty log.
    let other = with_a_past(Site::with_own_keys()).await;
    put(&site, &lines(&other));
    not_verified(&site, "replace", "line 5: its checkpoint: ");
    put(&site, &[]);
    not_verified(&site, "empty", "it has 0 entries, and the checkpoint in entry 1 of the public database knows 4");
    put(&site, &before);
    site.sppctl(VERIFY);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_was_cut_off_is_not_gone_on_with_until_an_officer_accepts_the_loss() {
    let mut site = site_with_a_past().await;
    let before = lines(&site);
    put(&site, &before[..2]);
    // However often it is tried, and with whatever is put behind it.
    for filler in [&[][..], &before[2..3], &before[2..3]] {
        let mut longer = before[..2].to_vec();
        longer.extend(filler.iter().cycle().take(5 * filler.len()).cloned());
        put(&site, &chained(&longer));
        refused_start(&site);
        assert_eq!(lines(&site).len(), longer.len(), "nothing is added to it");
    }
    put(&site, &before[..2]);
    let output = refused_start(&site);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success()
            && said.contains("not entry 3 as entry 1 of the public database")
            && said.contains("accepted_loss = 1"),
        "{said}"
    );
    assert_eq!(lines(&site).len(), 2, "a start that is refused makes it no longer");
    site.edit("sppd.toml", "[audit]\n", "[audit]\naccepted_loss = 1\n");
    tokio::task::block_in_place(|| {
        site.start();
        assert!(site.stop().success());
    });
    not_verified(&site, "an accepted loss that nobody confirms", "confirm it with --given-up 1");
    let told = site.sppctl(&format!("{VERIFY} --given-up 1"));
    assert!(told.contains("1 checkpoints are of entries that were given up as lost"), "{told}");
    let acts: Vec<_> = entries(&site).iter().map(|entry| entry["act"].as_str().unwrap().to_owned()).collect();
    assert_eq!(acts, ["start", "line.assemble", "audit.loss", "start", "stop", "audit.checkpoint"]);
    // With the change taken back, everything goes on.
    site.edit("sppd.toml", "accepted_loss = 1\n", "");
    tokio::task::block_in_place(|| {
        site.start();
        assert!(site.stop().success());
    });
    // The acceptance is of that loss and of no other.
    let before = lines(&site);
    put(&site, &before[..5]);
    site.edit("sppd.toml", "[audit]\n", "[audit]\naccepted_loss = 1\n");
    let output = refused_start(&site);
    assert!(String::from_utf8_lossy(&output.stderr).contains("accepted_loss = 3"), "{output:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acts_and_refusals_are_recorded_and_no_flood_fills_the_log() {
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
    assert_eq!(assembled.len(), 3, "one that was done, one that was refused, and how often: {assembled:?}");
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
async fn what_cannot_be_recorded_is_not_answered_and_then_not_begun() {
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
    assert_eq!(issued, 2, "the first was made and not delivered, the others were not begun");
    std::fs::write(site.path("audit/audit.jsonl"), before).unwrap();
    for n in 1..=3 {
        assemble(&mut line, &phone(n)).await.unwrap();
    }
    let told = site.sppctl(VERIFY);
    assert!(told.contains("chain is whole"), "{told}");
    let acts: Vec<_> = entries(&site).iter().map(|entry| entry["act"].as_str().unwrap().to_owned()).collect();
    assert!(acts.contains(&"audit.resumed".to_owned()), "{acts:?}");
}

#[test]
fn what_officers_do_on_the_token_is_taken_in_also_while_the_daemon_runs() {
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
    eventually_blocking("the log has what was done on the token", || {
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
async fn an_auditor_copies_the_log_and_verifies_it_elsewhere() {
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
        let told = site.try_sppctl(verify);
        let fits = String::from_utf8_lossy(&told.stdout).contains("in the public database fit, the newest covers");
        if told.status.success() && fits { Ok(()) } else { Err(told) }
    });
    assert!(site.sppctl("audit tail --directory copy").contains("line.assemble"));
    // A copy of another log is not gone on with.
    std::fs::write(site.path("copy/audit.jsonl"), vec![b'x'; 1 << 20]).unwrap();
    let output = site.try_sppctl(&fetch);
    assert!(String::from_utf8_lossy(&output.stderr).contains("does not have so many bytes"), "{output:?}");
}
