//! Reports: equal numbers in all formats, each event counted once, and access by role.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use spp_proto::get_device_request::Device as Which;
use spp_proto::production_client::ProductionClient;
use spp_proto::{
    AbortSessionRequest, GetDeviceRequest, GetProductionRequest, ListSessionsRequest, ProductionBy, SessionState,
};
use tonic::Code;
use tonic::transport::Channel;

use spp_testkit::devices::{
    Line, Refusal, TestFab, assemble, chip, complete, gateway, imei, phone, provision, state_of,
};
use spp_testkit::pools::officer;
use spp_testkit::site::Site;

/// A site with two stations, an officer, an auditor and a monitor.
fn site() -> Site {
    let mut site = Site::new();
    let second = "[[station]]\nname = \"line-2/b\"\nprofiles = [\"phone\"]\nidentities = [\"imei:4901542\"]\n\n[log]";
    site.edit("sppd.toml", "[log]", second);
    site.sppctl("station enroll line-2/b --config sppd.toml --out tls/line-2-b");
    for role in ["auditor", "monitor"] {
        site.sppctl(&format!("{role} enroll x-1 --config sppd.toml --out tls/{role}"));
    }
    site.start();
    site
}

/// Completes four devices, leaves number 5 in progress and aborts number 6. Repeats every repeatable call. Returns the sessions
/// of numbers 5 and 6.
async fn provision_devices(site: &Site) -> [String; 2] {
    let (fab, mut first) = (TestFab::new(site), site.station().await);
    let mut second = Line::new(site.connect(site.line, site.tls("tls/line-2-b")).await.unwrap());
    for n in [1, 2] {
        let (request, _) = provision(&mut first, &mut fab.device(n), &phone(n)).await;
        complete(&mut first, &request).await.unwrap();
    }
    let mut own = fab.device(3);
    let order = gateway(3, &own);
    provision(&mut first, &mut own, &order).await;
    provision(&mut second, &mut fab.device(4), &phone(4)).await;
    let mut sessions = [5, 6].map(|_| String::new());
    for (n, session) in [5, 6].into_iter().zip(&mut sessions) {
        for _ in 0..2 {
            *session = hex::encode(assemble(&mut second, &phone(n)).await.unwrap().session_id);
        }
    }
    for _ in 0..2 {
        let command = format!("sessions abort {} --reason display-broken {}", sessions[1], officer(site));
        let output = tokio::task::block_in_place(|| site.sppctl(&command));
        assert!(output.contains(&chip(6).to_string()) && output.ends_with(": display-broken\n"), "{output}");
    }
    sessions
}

/// The last two hours: the test may run at midnight or across the end of an hour.
fn recently() -> String {
    let hour = now() / 3600 - 1;
    format!("--from {}", humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(hour * 3600)))
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

fn report(site: &Site, command: &str) -> String {
    site.sppctl(&format!("report production {command} {} {}", recently(), officer(site)))
}

fn sppctl_json(site: &Site, command: &str) -> Value {
    serde_json::from_str(&site.sppctl(&format!("{command} --json {}", officer(site)))).unwrap()
}

/// Exit status and standard error.
fn refused(site: &Site, command: &str) -> (Option<i32>, String) {
    let output = site.try_sppctl(command);
    assert!(output.stdout.is_empty(), "{command}: {}", String::from_utf8_lossy(&output.stdout));
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

async fn production(site: &Site) -> ProductionClient<Channel> {
    ProductionClient::new(site.connect(site.officer, site.tls("tls/officer")).await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn production_report_formats_agree_and_survive_kill() {
    let mut site = site();
    provision_devices(&site).await;
    tokio::task::block_in_place(|| {
        for _ in 0..2 {
            check_production_reports(&site);
            site.kill();
            site.start();
        }
    });
}

fn check_production_reports(site: &Site) {
    let table = report(site, "--by station");
    let lines: Vec<_> = table.lines().skip(1).collect();
    let cells: Vec<Vec<_>> = lines.iter().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        cells,
        [
            ["station", "begun", "completed", "aborted"],
            ["line-1/a", "3", "3", "0"],
            ["line-2/b", "3", "1", "1"],
            ["total", "6", "4", "1"]
        ],
        "{table}"
    );
    assert!(lines.iter().all(|line| line.len() == lines[0].len()), "the columns end in one place: {table}");
    assert_eq!(report(site, "--by profile --csv"), "profile,begun,completed,aborted\ngateway,1,1,0\nphone,5,3,1\n");
    let profiles: Value = serde_json::from_str(&report(site, "--by profile --json")).unwrap();
    let rows = json!([
        { "profile": "gateway", "begun": 1, "completed": 1, "aborted": 0 },
        { "profile": "phone", "begun": 5, "completed": 3, "aborted": 1 },
    ]);
    assert_eq!((&profiles["rows"], &profiles["by"]), (&rows, &json!("profile")));
    let hours: Value = serde_json::from_str(&report(site, "--by hour --json")).unwrap();
    let sum = |what: &str| hours["rows"].as_array().unwrap().iter().map(|row| row[what].as_u64().unwrap()).sum::<u64>();
    assert_eq!([sum("begun"), sum("completed"), sum("aborted")], [6, 4, 1], "{hours}");
    for total in [&profiles["total"], &hours["total"]] {
        assert_eq!(*total, json!({ "begun": 6, "completed": 4, "aborted": 1 }));
    }
    let before = format!("report production --from 2020-01-01 --to 2020-01-02 --csv {}", officer(site));
    assert_eq!(site.sppctl(&before), "station,begun,completed,aborted\n");
    site.sppctl(&format!("report production {}", officer(site)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn device_show_finds_history_by_chip_and_identity() {
    let site = site();
    let [_, aborted] = provision_devices(&site).await;
    let mut line = site.station().await;
    assemble(&mut line, &phone(6)).await.unwrap();
    let escaped = AbortSessionRequest {
        session_id: line_session(&mut line, 6).await,
        reason: "wiped\u{1b}[2J by hand\n".to_owned(),
    };
    production(&site).await.abort_session(escaped).await.unwrap();
    tokio::task::block_in_place(|| {
        let by_chip = sppctl_json(&site, &format!("device show {}", chip(2)));
        assert_eq!(sppctl_json(&site, &format!("device show {}", imei(2))), by_chip);
        let session = &by_chip["sessions"][0];
        assert_eq!((&session["state"], &session["station"]), (&json!("erased"), &json!("line-1/a")));
        assert_eq!((&session["profile"], &session["identity"]), (&json!("phone"), &json!(imei(2))));
        assert_eq!((&by_chip["key_pair"], &by_chip["published"]["record"]["index"]), (&json!("erased"), &json!(1)));
        assert_eq!(by_chip["published"]["record"], session["record"]);
        assert_eq!(
            (&session["master_key_version"], &by_chip["published"]["master_key_version"]),
            (&json!(1), &json!(1))
        );
        let names: Vec<_> =
            by_chip["certificate"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
        assert!(names.contains(&"Subject") && names.contains(&"Valid until"), "{names:?}");
        assert!(by_chip.get("audit").is_none());
        let text = site.sppctl(&format!("device show {} {}", chip(2), officer(&site)));
        for part in [
            "erased at this site",
            "opened by line-1/a with profile phone",
            "published as record 1, complete",
            "Valid until",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }

        assert_eq!(sppctl_json(&site, "device show serial:GW-3")["key_pair"], "of-device");
        let in_progress = sppctl_json(&site, &format!("device show {}", chip(5)));
        assert_eq!((&in_progress["key_pair"], &in_progress["published"]), (&json!("wrapped"), &Value::Null));
        assert!(!in_progress["certificate"].as_array().unwrap().is_empty(), "it is signed: {in_progress}");

        let device = sppctl_json(&site, &format!("device show {} --config sppd.toml", chip(6)));
        let sessions = device["sessions"].as_array().unwrap();
        assert_eq!((sessions.len(), &sessions[1]["session"]), (2, &json!(aborted)));
        let audit = device["audit"].as_array().unwrap();
        let (aborted, assembled): (Vec<_>, Vec<_>) = audit.iter().partition(|entry| entry["act"] == "session.abort");
        assert_eq!((assembled.len(), aborted.len()), (3, 6), "three acts of two entries: {device}");
        for (entries, reason) in aborted.chunks(2).zip(["display-broken", "display-broken", "wiped\u{1b}[2J by hand\n"])
        {
            assert_eq!((&entries[0]["act"], &entries[0]["caller"]), (&json!("session.abort"), &json!("officer o-1")));
            assert_eq!((&entries[0]["outcome"], &entries[1]["outcome"]), (&json!("begun"), &json!("done")));
            let details = &entries[1]["details"];
            assert_eq!((&details["chip"], &details["reason"]), (&json!(chip(6).to_string()), &json!(reason)));
        }
        let text = site.sppctl(&format!("device show {} --config sppd.toml {}", chip(6), officer(&site)));
        assert!(!text.contains('\u{1b}') && text.contains("aborted: wiped\\u{1b}[2J by hand\\n"), "{text}");
        let timeline = text.find("aborted: display-broken").unwrap() < text.find("aborted: wiped").unwrap();
        assert!(timeline && text.contains("session.abort"), "{text}");

        let (status, text) = refused(&site, &format!("device show {} {}", chip(99), officer(&site)));
        assert!(status == Some(1) && text.contains("no session of the chip"), "{text}");
        let (status, text) = refused(&site, &format!("device show {} {}", imei(6), officer(&site)));
        assert!(status == Some(1) && text.contains("aborted sessions by their chip"), "{text}");
        let (status, text) = refused(&site, &format!("device show nonsense {}", officer(&site)));
        assert!(status == Some(2) && text.contains("imei:490154203237518"), "{text}");
    });
}

async fn line_session(line: &mut Line, n: u64) -> Vec<u8> {
    spp_testkit::devices::session_of(line, &chip(n)).await.unwrap().session_id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_are_filtered_and_aborted_by_officers() {
    let site = site();
    let [in_progress, aborted] = provision_devices(&site).await;
    tokio::task::block_in_place(|| {
        let listed = |command: &str| -> Vec<Value> {
            sppctl_json(&site, &format!("sessions list {command}")).as_array().unwrap().clone()
        };
        let ids = |command: &str| -> Vec<String> {
            listed(command).iter().map(|session| session["session"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(ids(""), std::slice::from_ref(&in_progress));
        assert_eq!(ids("--state issued --station line-2/b --profile phone"), std::slice::from_ref(&in_progress));
        for none in ["--station line-1/a", "--profile gateway", "--older-than 1h", "--state reserved"] {
            assert_eq!(ids(none), [""; 0], "{none}");
            assert_eq!(site.sppctl(&format!("sessions list {none} {}", officer(&site))), "no sessions\n");
        }
        assert_eq!(ids("--state aborted"), std::slice::from_ref(&aborted));
        assert_eq!(listed("--state aborted")[0]["reason"], "display-broken");
        assert_eq!((ids("--state erased").len(), ids("--state erased --profile gateway").len()), (4, 1));
        let output = site.try_sppctl(&format!("sessions list --state erased --limit 2 {}", officer(&site)));
        assert_eq!(String::from_utf8(output.stdout).unwrap().lines().count(), 3, "a header and two rows");
        assert!(String::from_utf8_lossy(&output.stderr).contains("--limit"));

        let complete = &ids("--state erased")[0];
        let abort = |session: &str| refused(&site, &format!("sessions abort {session} --reason x {}", officer(&site)));
        let (status, text) = abort(complete);
        assert!(status == Some(1) && text.contains("a published device cannot be aborted"), "{text}");
        let (status, text) = abort(&"0".repeat(32));
        assert!(status == Some(1) && text.contains("no session 0000"), "{text}");
        assert_eq!(abort("12").0, Some(2));
        let log = site.sppctl("audit tail --config sppd.toml -n 4");
        assert_eq!(log.matches("failed: ").count(), 2, "what was tried is on record: {log}");
    });
    assert_eq!(state_of(&mut site.station().await, &chip(5)).await, SessionState::Issued);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn auditor_reads_reports_and_monitor_reads_numbers() {
    let site = site();
    let [in_progress, _] = provision_devices(&site).await;
    tokio::task::block_in_place(|| {
        let as_role = |role: &str| format!("--server https://127.0.0.1:{} --tls tls/{role}", site.officer);
        let reads = [
            format!("report production {} --csv", recently()),
            format!("device show {}", chip(1)),
            "sessions list".to_owned(),
        ];
        let abort = format!("sessions abort {in_progress} --reason x");
        let auditor = as_role("auditor");
        for read in &reads {
            site.sppctl(&format!("{read} {auditor}"));
        }
        site.sppctl(&format!("{} {}", reads[0], as_role("monitor")));
        for command in [
            format!("{abort} {auditor}"),
            format!("{} {}", reads[1], as_role("monitor")),
            format!("{} {}", reads[2], as_role("monitor")),
            format!("{} {}", reads[0], as_role("line-1-a")),
        ] {
            let (status, text) = refused(&site, &command);
            assert!(status == Some(1) && text.contains("may not call"), "{command}: {text}");
        }
    });
    assert_eq!(state_of(&mut site.station().await, &chip(5)).await, SessionState::Issued);
}

#[tokio::test]
async fn invalid_report_request_names_its_fields() {
    let site = Site::running();
    let mut client = production(&site).await;
    let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
    let by = ProductionBy::Station.into();
    for (request, fields) in [
        (GetProductionRequest::default(), vec!["from", "to", "by"]),
        (GetProductionRequest { from: at(3601), to: at(-3600), by }, vec!["from", "to"]),
        (GetProductionRequest { from: at(3600), to: at(3600), by }, vec!["to"]),
        (GetProductionRequest { from: at(0), to: at(367 * 86_400), by }, vec!["to"]),
        (GetProductionRequest { from: at(0), to: at(3600), by: 9 }, vec!["by"]),
    ] {
        let refused = Refusal::of(&client.get_production(request).await.unwrap_err());
        assert!(refused.is(Code::InvalidArgument, "INVALID") && refused.fields == fields, "{fields:?}: {refused:?}");
    }
    for (device, field) in [
        (None, "device"),
        (Some(Which::ChipId(vec![1; 7])), "chip_id"),
        (Some(Which::Identity("imei:1".to_owned())), "identity"),
    ] {
        let refused = Refusal::of(&client.get_device(GetDeviceRequest { device }).await.unwrap_err());
        assert!(refused.is(Code::InvalidArgument, "INVALID") && refused.fields == [field], "{refused:?}");
    }
    let wrong = ListSessionsRequest {
        state: 17,
        station: "Line 1".to_owned(),
        profile: "/".to_owned(),
        older_than: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
        page_size: 1001,
        page_token: vec![1; 23],
    };
    let refused = Refusal::of(&client.list_sessions(wrong).await.unwrap_err());
    let fields = ["state", "station", "profile", "older_than", "page_size", "page_token"];
    assert!(refused.is(Code::InvalidArgument, "INVALID") && refused.fields == fields, "{refused:?}");
    for reason in [String::new(), " ".to_owned(), "x".repeat(201)] {
        let request = AbortSessionRequest { session_id: vec![1; 15], reason };
        let refused = Refusal::of(&client.abort_session(request).await.unwrap_err());
        assert!(refused.is(Code::InvalidArgument, "INVALID"), "{refused:?}");
        assert_eq!(refused.fields, ["session_id", "reason"]);
    }
}
