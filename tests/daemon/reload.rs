//! Configuration reload: changes apply to new calls, sessions in progress complete unchanged, and a configuration with faults
//! changes nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::{Value, json};
use spp_format::keys::sha256;
use spp_proto::officer_client::OfficerClient;
use spp_proto::{AbortRequest, ReloadRequest, SessionState};
use tonic::{Code, Status};

use spp_testkit::authority::{Authority, now, refused_by_tls, station};
use spp_testkit::ceremony::CeremonyFile;
use spp_testkit::devices::{Line, Refusal, TestFab, assemble, chip, complete, install, phone, provision, state_of};
use spp_testkit::pools::officer;
use spp_testkit::process::Signal;
use spp_testkit::site::Site;
use spp_testkit::tls::{TlsProbe, presented_serials};
use spp_testkit::wait::eventually;

/// Reloads the configuration; returns the changes.
async fn reload(site: &Site) -> Result<Vec<String>, Status> {
    site.officer().await.reload(ReloadRequest {}).await.map(|answer| answer.into_inner().changes)
}

/// The message of a refused reload.
async fn refused_reload(site: &Site) -> String {
    let status = reload(site).await.unwrap_err();
    let refusal = Refusal::of(&status);
    assert!(refusal.is(Code::FailedPrecondition, "CONFIGURATION_REFUSED"), "{refusal:?}");
    status.message().to_owned()
}

/// The reloads in the audit log: caller, outcome, details.
fn audited_reloads(site: &Site) -> Vec<(String, String, Value)> {
    let text = String::from_utf8(site.read("audit/audit.jsonl")).unwrap();
    let entries = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let reloads = entries.filter(|entry| entry["act"] == "config.reload");
    reloads.map(|entry| (text(&entry["caller"]), text(&entry["outcome"]), entry["details"].clone())).collect()
}

const SECOND: &str =
    "[[station]]\nname = \"line-2/b\"\nprofiles = [\"phone\"]\nidentities = [\"imei:4901542\"]\n\n[log]\n";

#[tokio::test]
async fn reload_adds_and_removes_stations() {
    let site = Site::running();
    site.sppctl("station enroll line-2/b --config sppd.toml --out tls/line-2-b");
    let mut second = Line::new(site.connect(site.line, site.tls("tls/line-2-b")).await.unwrap());
    let not_permitted = |status: Status| Refusal::of(&status).is(Code::PermissionDenied, "NOT_PERMITTED");
    site.edit("sppd.toml", "[log]\n", SECOND);
    assert!(not_permitted(assemble(&mut second, &phone(1)).await.unwrap_err()));
    assert_eq!(reload(&site).await.unwrap(), ["station line-2/b: new"]);
    assemble(&mut second, &phone(1)).await.expect("the open connection is accepted");
    site.edit("sppd.toml", SECOND, "[log]\n");
    assert_eq!(reload(&site).await.unwrap(), ["station line-2/b: removed"]);
    assert!(not_permitted(assemble(&mut second, &phone(1)).await.unwrap_err()), "the connection is still open");
    assemble(&mut site.station().await, &phone(1)).await.expect("another one takes over");
    assert_eq!(reload(&site).await.unwrap(), Vec::<String>::new(), "nothing is another");
}

#[tokio::test]
async fn reload_applies_changed_profile_to_new_devices_only() {
    let site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let (mut first, mut second) = (fab.device(1), fab.device(2));
    let pending = install(&mut first, &assemble(&mut line, &phone(1)).await.unwrap());
    site.edit("profiles/phone.toml", "common_name = \"Example Phone\"", "common_name = \"Another Phone\"");
    site.edit("profiles/phone.toml", "length = 32", "length = 16");
    assert_eq!(reload(&site).await.unwrap(), ["profile phone: changed"]);
    complete(&mut line, &pending).await.expect("its package is as it was");
    let answer = assemble(&mut line, &phone(2)).await.unwrap();
    let request = install(&mut second, &answer);
    complete(&mut line, &request).await.unwrap();
    let names = |certificate: &[u8], name: &str| certificate.windows(name.len()).any(|bytes| bytes == name.as_bytes());
    assert!(names(&answer.certificate, "Another Phone") && !names(&answer.certificate, "Example Phone"));
    let lengths = [&first, &second].map(|device| device.package().unwrap().symmetric_keys[0].key().expose().len());
    assert_eq!(lengths, [32, 16]);
}

#[tokio::test]
async fn session_without_profile_waits_or_can_be_aborted() {
    let site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let waiting = install(&mut fab.device(1), &assemble(&mut line, &phone(1)).await.unwrap());
    let aborted = assemble(&mut line, &phone(2)).await.unwrap();
    std::fs::rename(site.path("profiles/phone.toml"), site.path("phone.toml")).unwrap();
    site.edit("sppd.toml", "profiles = [\"phone\", ", "profiles = [");
    assert_eq!(reload(&site).await.unwrap(), ["profile phone: removed", "station line-1/a: changed"]);
    let refused = complete(&mut line, &waiting).await.unwrap_err();
    assert!(Refusal::of(&refused).is(Code::FailedPrecondition, "NOT_ACCEPTED"), "{refused:?}");
    assert!(refused.message().contains("configure it again, or abort the session"), "{refused:?}");
    let abort = AbortRequest { session_id: aborted.session_id, reason: "its profile is gone".to_owned() };
    line.abort(abort).await.unwrap();
    assert_eq!(state_of(&mut line, &chip(2)).await, SessionState::Aborted);
    std::fs::rename(site.path("phone.toml"), site.path("profiles/phone.toml")).unwrap();
    site.edit("sppd.toml", "profiles = [", "profiles = [\"phone\", ");
    reload(&site).await.unwrap();
    complete(&mut line, &waiting).await.unwrap();
}

/// A site with a second signing key for devices, which no profile names yet.
fn site_with_two_manufacturers() -> Site {
    let site = Site::new();
    let ceremony = CeremonyFile::new().signing_key("manufacturer-2", "p256", "self-signed", "Devices CA 2");
    std::fs::write(site.path("second.toml"), ceremony.text()).unwrap();
    site.sppctl("ceremony run second.toml --hsm hsm.toml --out keys-2");
    let second = String::from_utf8(site.read("keys-2/keys.toml")).unwrap();
    let at = second.find("[[signing_key]]").unwrap();
    let keys = [String::from_utf8(site.read("keys/keys.toml")).unwrap(), second[at..].to_owned()].concat();
    std::fs::write(site.path("keys/keys.toml"), keys).unwrap();
    std::fs::copy(site.path("keys-2/manufacturer-2-ca.pem"), site.path("keys/manufacturer-2-ca.pem")).unwrap();
    site
}

#[tokio::test]
async fn session_is_signed_with_its_key_after_issuer_change() {
    let mut site = site_with_two_manufacturers();
    // A phone without symmetric keys, which C_Sign would derive: only signing the certificate must fail.
    let derived =
        "[[symmetric_key]]\npurpose = \"channel\"\n# Bytes: 16, 24 or 32.\nlength = 32\nmaster_key = \"master-1\"\n";
    site.edit("profiles/phone.toml", derived, "");
    site.use_faulty_module();
    site.fail("");
    site.start();
    let mut line = site.station().await;
    for n in [1, 2] {
        site.fail("C_Sign return CKR_ARGUMENTS_BAD");
        assemble(&mut line, &phone(n)).await.expect_err("no signature can be made");
        assert_eq!(state_of(&mut line, &chip(n)).await, SessionState::Reserved);
        site.fail("");
        site.wait_ready();
    }
    for profile in ["phone", "sensor", "gateway", "router"] {
        site.edit(&format!("profiles/{profile}.toml"), "issuer = \"manufacturer\"", "issuer = \"manufacturer-2\"");
    }
    assert_eq!(reload(&site).await.unwrap().len(), 4);
    // The stored certificate is signed with the earlier key, but the chain in the package would be a different one.
    let refused = assemble(&mut line, &phone(1)).await.unwrap_err();
    assert!(refused.message().contains("abort the session and repeat Assemble"), "{refused:?}");
    assert_eq!(state_of(&mut line, &chip(1)).await, SessionState::Issued);
    assemble(&mut line, &phone(3)).await.expect("new ones are signed with the new key");
    site.kill();
    site.start();
    let mut line = site.station().await;
    // The recovery run at the start may come before the HSM is ready; the next one follows half a minute later.
    eventually("a recovery run signs it", async || state_of(&mut line, &chip(2)).await == SessionState::Issued).await;
}

#[tokio::test]
async fn reload_changes_certificate_for_new_connections_only() {
    let site = Site::running();
    site.sppctl("server enroll --config sppd.toml --dns localhost --ip 127.0.0.1 --out tls/server-2");
    let (mutual, public) = (TlsProbe::with_certificate(&site, "tls/line-1-a"), TlsProbe::anonymous(&site));
    let listeners = [(site.line, &mutual), (site.officer, &mutual), (site.public, &public)];
    let (mut line, first) = (site.station().await, presented_serials(&listeners).await);
    site.edit("sppd.toml", "\"tls/server/certificate.pem\"", "\"tls/server-2/certificate.pem\"");
    site.edit("sppd.toml", "\"tls/server/key.pem\"", "\"tls/server-2/key.pem\"");
    assert_eq!(presented_serials(&listeners).await, first);
    assert_eq!(reload(&site).await.unwrap(), ["tls.certificate: changed", "tls.key: changed"]);
    let second = presented_serials(&listeners).await;
    for (before, after) in first.iter().zip(&second) {
        assert_ne!(before, after, "each listener shows another serial number");
    }
    assert!(second.iter().all(|serial| *serial == second[0]), "{second:?}");
    assemble(&mut line, &phone(1)).await.expect("the open connection goes on");
    assemble(&mut site.station().await, &phone(2)).await.unwrap();

    // A separate certificate for the public listener.
    site.sppctl("server enroll --config sppd.toml --dns localhost --out tls/public");
    let own = "[public]\ncertificate = \"tls/public/certificate.pem\"\nkey = \"tls/public/key.pem\"\n";
    site.edit("sppd.toml", "[public]\n", own);
    assert_eq!(reload(&site).await.unwrap(), ["public.certificate: new", "public.key: new"]);
    let third = presented_serials(&listeners).await;
    assert!(third[..2] == second[..2] && third[2] != second[2], "{third:?}");
}

#[tokio::test]
async fn reload_applies_client_ca_to_new_connections() {
    let site = Site::running();
    let another = Authority::new("Example Second Access CA");
    let tls = || site.public_tls().identity(another.identity(&station("line-1/a"), now() + 600));
    let call = async || match site.connect(site.line, tls()).await {
        Ok(channel) => {
            let mut line = Line::new(channel);
            assemble(&mut line, &phone(1)).await.map(|_| line)
        }
        Err(e) => Err(Status::unavailable(e.to_string())),
    };
    assert!(refused_by_tls(&call().await.map(drop)));
    let both = [site.read("keys/access-ca.pem"), another.pem.clone().into_bytes()].concat();
    std::fs::write(site.path("tls/clients.pem"), both).unwrap();
    site.edit("sppd.toml", "client_ca = \"keys/access-ca.pem\"", "client_ca = \"tls/clients.pem\"");
    assert_eq!(reload(&site).await.unwrap(), ["tls.client_ca: changed"]);
    let mut open = call().await.unwrap();
    std::fs::copy(site.path("keys/access-ca.pem"), site.path("tls/clients.pem")).unwrap();
    assert_eq!(reload(&site).await.unwrap(), ["tls.client_ca: changed"]);
    assert!(refused_by_tls(&call().await.map(drop)));
    assemble(&mut open, &phone(1)).await.expect("an open connection goes on");
}

#[tokio::test]
async fn reload_changes_log_level() {
    let site = Site::running();
    let mut line = site.station().await;
    assemble(&mut line, &phone(1)).await.unwrap();
    assert!(!site.log().contains("DEBUG"), "{}", site.log());
    site.edit("sppd.toml", "level = \"info\"", "level = \"debug\"");
    assert_eq!(reload(&site).await.unwrap(), ["log.level: info -> debug"]);
    assemble(&mut line, &phone(2)).await.unwrap();
    site.until_logged("DEBUG");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reload_by_sighup_and_sppctl_is_audited() {
    let site = Site::running();
    let hash = || hex::encode(sha256(&site.read("sppd.toml")));
    let sppctl =
        |more: &str| tokio::task::block_in_place(|| site.try_sppctl(&format!("reload {}{more}", officer(&site))));
    site.edit("sppd.toml", "[log]\n", SECOND);
    site.signal(Signal::HUP);
    site.until_logged("configuration reloaded");
    let details = json!({ "configuration": hash(), "changes": "station line-2/b: new" });
    let mut expected =
        vec![("sppd".to_owned(), "begun".to_owned(), details.clone()), ("sppd".to_owned(), "done".to_owned(), details)];
    eventually("both entries are on record", async || audited_reloads(&site).len() >= 2).await;
    assert_eq!(audited_reloads(&site), expected);

    site.edit("sppd.toml", "level = \"info\"", "level = \"warn\"");
    let output = sppctl(" --json");
    let output_json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output_json, json!({ "changes": ["log.level: info -> warn"], "configuration_sha256": hash() }));
    let details = json!({ "configuration": hash(), "changes": "log.level: info -> warn" });
    expected.push(("officer o-1".to_owned(), "begun".to_owned(), details.clone()));
    expected.push(("officer o-1".to_owned(), "done".to_owned(), details));
    assert_eq!(audited_reloads(&site), expected);

    let text = String::from_utf8(sppctl("").stdout).unwrap();
    assert_eq!(text, format!("no changes; SHA-256 of the file: {}\n", hash()));

    site.edit("sppd.toml", "level = \"warn\"", "level = \"=\"");
    let output = sppctl("");
    let why = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && why.contains("log.level"), "{why}");
    let (caller, outcome, _) = audited_reloads(&site).pop().unwrap();
    assert!(caller == "officer o-1" && outcome.starts_with("refused: sppd.toml: log.level: "), "{outcome}");
    site.signal(Signal::HUP);
    site.until_logged("reload on SIGHUP failed");
    assert!(site.status().await.ready);
}

#[tokio::test]
async fn reload_with_faults_changes_nothing() {
    let site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    site.edit("sppd.toml", "name = \"demo\"", "name = \"demo\"\ncolour = \"blue\"");
    site.edit("sppd.toml", "profiles = [\"phone\"", "profiles = [\"toaster\", \"phone\"");
    site.edit("profiles/phone.toml", "kind = \"p256\"", "kind = \"p257\"");
    // Valid changes, which are not applied either.
    site.edit("profiles/phone.toml", "length = 32", "length = 16");
    site.edit("sppd.toml", "[log]\n", SECOND);
    for n in 1..=3 {
        let message = refused_reload(&site).await;
        for fault in ["unknown field `colour`", "unknown profile toaster", "p257"] {
            assert!(message.contains(fault), "{fault} is missing in: {message}");
        }
        let mut device = fab.device(n);
        provision(&mut line, &mut device, &phone(n)).await;
        assert_eq!(device.package().unwrap().symmetric_keys[0].key().expose().len(), 32);
    }
    let (caller, outcome, details) = audited_reloads(&site).pop().unwrap();
    assert_eq!((&*caller, &details), ("officer o-1", &json!({})));
    for fault in ["refused: ", "colour", "toaster", "p257"] {
        assert!(outcome.contains(fault), "{fault} is missing in: {outcome}");
    }
}

#[tokio::test]
async fn reload_names_settings_that_need_a_restart() {
    let site = Site::running();
    let unchanged = String::from_utf8(site.read("sppd.toml")).unwrap();
    site.edit("sppd.toml", &format!("line = \"127.0.0.1:{}\"", site.line), "line = \"127.0.0.1:1\"");
    site.edit("sppd.toml", "name = \"demo\"", "name = \"other\"");
    site.edit("sppd.toml", "\"24h\"", "\"23h\"");
    site.edit("sppd.toml", "shred_after = \"1h\"", "shred_after = \"2h\"");
    site.edit("sppd.toml", "batch_period = \"50ms\"", "batch_period = \"60ms\"");
    site.edit("sppd.toml", "burst = 400", "burst = 500");
    site.edit("sppd.toml", "format = \"human\"", "format = \"json\"");
    site.edit("sppd.toml", "[log]\n", SECOND);
    let message = refused_reload(&site).await;
    let fixed = [
        "listen.line",
        "node.name",
        "sessions.lifetime",
        "keypool.shred_after",
        "registry.batch_period",
        "public.burst",
        "log.format",
    ];
    for setting in fixed {
        assert!(
            message.contains(&format!("{setting}: cannot be changed while the daemon runs")),
            "{setting}: {message}"
        );
    }
    assert_eq!(
        (message.matches("restart sppd").count(), message.contains("station")),
        (fixed.len(), false),
        "{message}"
    );
    std::fs::write(site.path("sppd.toml"), unchanged).unwrap();
    site.edit("keys/keys.toml", "version = 1", "version = 2");
    site.edit("hsm-config/softhsm2.toml", "[worker]\n", "[worker]\nhang_after = \"29s\"\n");
    let message = refused_reload(&site).await;
    assert!(message.contains("hsm.keys: cannot") && message.contains("hsm.module: cannot"), "{message}");
}

#[tokio::test]
async fn reload_requires_officer_role() {
    let mut site = Site::new();
    site.sppctl("auditor enroll a-1 --config sppd.toml --out tls/auditor");
    site.start();
    site.edit("sppd.toml", "[log]\n", SECOND);
    let mut auditor = OfficerClient::new(site.connect(site.officer, site.tls("tls/auditor")).await.unwrap());
    let refused = auditor.reload(ReloadRequest {}).await.unwrap_err();
    assert!(Refusal::of(&refused).is(Code::PermissionDenied, "WRONG_ROLE"), "{refused:?}");
    assert!(audited_reloads(&site).is_empty());
    assert_eq!(reload(&site).await.unwrap(), ["station line-2/b: new"], "it has not taken effect before");
}

/// Provisions devices while two officers repeatedly reload all reloadable settings.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_succeed_during_repeated_reloads() {
    const TASKS: u64 = 6;
    let site = Arc::new(Site::running());
    site.sppctl("server enroll --config sppd.toml --dns localhost --ip 127.0.0.1 --out tls/server-2");
    let load = Arc::new(Load { fab: TestFab::new(&site), made: AtomicU64::new(0), stop: AtomicBool::new(false) });
    let tasks: Vec<_> = (0..TASKS).map(|task| tokio::spawn(work(Arc::clone(&site), Arc::clone(&load), task))).collect();
    for round in 0..10 {
        let edit = |file: &str, one: &str, other: &str| {
            let (from, to) = if round % 2 == 0 { (one, other) } else { (other, one) };
            let text = String::from_utf8(site.read(file)).unwrap();
            assert!(text.contains(from), "{file} has no {from}");
            std::fs::write(site.path(file), text.replace(from, to)).unwrap();
        };
        edit("profiles/phone.toml", "length = 32", "length = 16");
        edit("profiles/phone.toml", "Example Phone", "Another Phone");
        edit("sppd.toml", "tls/server/", "tls/server-2/");
        let (one, other) = tokio::join!(reload(&site), reload(&site));
        let mut changes = [one.unwrap().len(), other.unwrap().len()];
        changes.sort_unstable();
        assert_eq!(changes, [0, 3], "the second reload waits for the first and finds no change");
        load.until_made((round + 1) * TASKS).await;
    }
    load.stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(site.status().await.records, load.made.load(Ordering::Relaxed));
}

struct Load {
    fab: TestFab,
    made: AtomicU64,
    stop: AtomicBool,
}

impl Load {
    async fn until_made(&self, devices: u64) {
        eventually("so many devices are made", async || self.made.load(Ordering::Relaxed) >= devices).await;
    }
}

/// Provisions devices, each on its own connection, until the stop.
async fn work(site: Arc<Site>, load: Arc<Load>, task: u64) {
    for n in (task * 100_000..).take_while(|_| !load.stop.load(Ordering::Relaxed)) {
        provision(&mut site.station().await, &mut load.fab.device(n), &phone(n)).await;
        load.made.fetch_add(1, Ordering::Relaxed);
    }
}
