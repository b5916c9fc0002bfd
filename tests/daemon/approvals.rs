//! Approvals: requests of one officer that another officer signs. They are bound to the exact content, expire, and are used once.

use std::process::Output;

use serde_json::Value;
use spp_proto::access_client::AccessClient;
use spp_proto::{DecideApprovalRequest, GetStatusRequest, RequestApprovalRequest};
use tonic::Code;
use tonic::transport::Channel;

use spp_testkit::ceremony::CeremonyFile;
use spp_testkit::devices::{Line, Refusal, assemble, phone};
use spp_testkit::officers::*;
use spp_testkit::site::Site;

fn assert_refused(output: &Output, why: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains(why), "{why}: {stderr}");
}

async fn access_client(site: &Site, tls: &str) -> AccessClient<Channel> {
    AccessClient::new(site.connect(site.officer, site.tls(tls)).await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoked_station_is_refused_on_open_connection() {
    let site = site_with_three_officers();
    let mut line = site.station().await;
    assemble(&mut line, &phone(1)).await.unwrap();
    let request = sppctl_json(&site, "tls/officer", "station revoke line-1/a --reason stolen");
    let id = request["id"].as_str().unwrap();
    assemble(&mut line, &phone(2)).await.expect("one officer alone changes nothing");
    assert_refused(&decide(&site, "tls/officer", &format!("approve {id}")), "another officer must");
    assert_refused(&decide_with_input(&site, "tls/o-2", &format!("approve {id}"), "00000000"), "nothing was done");
    assert_refused(&decide_with_input(&site, "tls/o-2", &format!("approve {id}"), ""), "nothing was done");
    assemble(&mut line, &phone(3)).await.expect("the request is still pending");
    approve(&site, id);
    let refused = Refusal::of(&assemble(&mut line, &phone(4)).await.unwrap_err());
    assert!(refused.is(Code::Unauthenticated, "REVOKED"), "{refused:?}");
    let mut again = site.station().await;
    assert!(Refusal::of(&assemble(&mut again, &phone(4)).await.unwrap_err()).is(Code::Unauthenticated, "REVOKED"));
    let listed = String::from_utf8(sppctl_as(&site, "tls/officer", "station list").stdout).unwrap();
    assert!(listed.contains("line-1/a") && listed.contains("stolen"), "{listed}");
    // A new enrolment, which needs two officers too, admits the station again. The old certificate stays revoked.
    site.sppctl("request --out tls/renewed");
    let command = "station enroll line-1/a --csr tls/renewed/request.pem --out tls/made";
    assert_refused(&sppctl_as(&site, "tls/officer", command), "approvals request enroll station line-1/a");
    let request =
        sppctl_json(&site, "tls/officer", "approvals request enroll station line-1/a --csr tls/renewed/request.pem");
    approve(&site, request["id"].as_str().unwrap());
    assert!(sppctl_as(&site, "tls/officer", command).status.success());
    for file in ["certificate.pem", "ca.pem"] {
        std::fs::copy(site.path(&format!("tls/made/{file}")), site.path(&format!("tls/renewed/{file}"))).unwrap();
    }
    std::thread::sleep(std::time::Duration::from_secs(1));
    let mut renewed = Line::new(site.connect(site.line, site.tls("tls/renewed")).await.unwrap());
    assemble(&mut renewed, &phone(4)).await.unwrap();
    assert!(assemble(&mut line, &phone(5)).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn approvals_survive_daemon_restart() {
    let mut site = site_with_three_officers();
    let revocation = sppctl_json(&site, "tls/officer", "officer revoke o-3 --reason left");
    let pending = sppctl_json(&site, "tls/officer", "approvals request quota line-1/a --devices-total 5");
    approve(&site, revocation["id"].as_str().unwrap());
    site.kill();
    site.start();
    let listed = sppctl_json(&site, "tls/officer", "approvals list --all");
    let listed = listed["approvals"].as_array().unwrap();
    let mut states: Vec<_> = listed.iter().map(|approval| approval["state"].as_str().unwrap()).collect();
    states.sort_unstable();
    assert_eq!(states, ["done", "pending"]);
    // The list omits the signed statements of decided requests, which would exceed the response size.
    for approval in listed {
        let statement = approval["requested"]["statement"].as_str().unwrap();
        assert_eq!(statement.is_empty(), approval["state"] == "done", "{approval}");
        assert!(!approval["description"].as_str().unwrap().is_empty(), "{approval}");
    }
    let done = sppctl_json(&site, "tls/officer", &format!("approvals show {}", revocation["id"].as_str().unwrap()));
    assert!(done["approvals"][0]["statement"].as_str().unwrap().contains("approve"), "{done}");
    assert_refused(&sppctl_as(&site, "tls/o-3", "approvals list"), "revoked");
    approve(&site, pending["id"].as_str().unwrap());
    assert_refused(
        &decide(&site, "tls/officer", &format!("reject {} --reason late", pending["id"].as_str().unwrap())),
        "done already",
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn decision_with_other_content_or_signature_is_refused() {
    let site = site_with_three_officers();
    let request =
        sppctl_json(&site, "tls/officer", "approvals request quota line-1/a --devices-per-hour 7 --valid-for 1h");
    let id = hex::decode(request["id"].as_str().unwrap()).unwrap();
    let (mut one, mut two) = (access_client(&site, "tls/officer").await, access_client(&site, "tls/o-2").await);
    // The decision with the signature of the request: another officer's, and over another statement.
    let signature = hex::decode(request["requested"]["signature"].as_str().unwrap()).unwrap();
    let decision =
        DecideApprovalRequest { id: id.clone(), approve: true, reason: String::new(), signature: signature.clone() };
    let refused = Refusal::of(&two.decide_approval(decision.clone()).await.unwrap_err());
    assert!(refused.is(Code::PermissionDenied, "BAD_SIGNATURE"), "{refused:?}");
    // The request with another content under the same signature.
    let statement = request["requested"]["statement"].as_str().unwrap();
    let action = statement.lines().find_map(|line| line.strip_prefix("content   ")).unwrap().to_owned();
    let expires = Some(prost_types::Timestamp { seconds: request["expires"].as_i64().unwrap(), nanos: 0 });
    let request = RequestApprovalRequest { id: id.clone(), action: action.replace(":7,", ":8,"), expires, signature };
    assert_ne!(request.action, action);
    let refused = Refusal::of(&one.request_approval(request.clone()).await.unwrap_err());
    assert!(refused.is(Code::PermissionDenied, "BAD_SIGNATURE"), "{refused:?}");
    let repeated =
        one.request_approval(RequestApprovalRequest { action: action.clone(), ..request.clone() }).await.unwrap();
    assert_eq!(repeated.into_inner().approval.unwrap().state, "pending", "a repeated request is the same request");
    let spaced = RequestApprovalRequest { action: action.replace(':', ": "), ..request };
    let refused = Refusal::of(&one.request_approval(spaced).await.unwrap_err());
    assert_eq!((refused.code, refused.fields), (Code::InvalidArgument, vec!["action".to_owned()]));
    let unknown = DecideApprovalRequest { id: vec![9; 8], ..decision };
    assert!(Refusal::of(&two.decide_approval(unknown).await.unwrap_err()).is(Code::NotFound, "NO_REQUEST"));
}

#[test]
fn approved_rules_take_effect_at_once() {
    let site = site_with_three_officers();
    let request = sppctl_json(&site, "tls/officer", "approvals request rules --raise-quota 2 --longest 2h");
    approve(&site, request["id"].as_str().unwrap());
    let request = sppctl_json(&site, "tls/officer", "approvals request quota line-1/a --devices-total none");
    assert_eq!(request["needed"], 2);
    let id = request["id"].as_str().unwrap();
    approve(&site, id);
    assert_eq!(sppctl_json(&site, "tls/officer", &format!("approvals show {id}"))["state"], "pending");
    assert!(decide(&site, "tls/o-3", &format!("approve {id}")).status.success());
    assert_eq!(sppctl_json(&site, "tls/officer", &format!("approvals show {id}"))["state"], "done");
    assert_refused(&sppctl_as(&site, "tls/officer", "approvals request rules --destroy 0"), "1 to 9 approvals");
    assert_refused(
        &sppctl_as(&site, "tls/officer", "approvals request quota line-1/a --devices-total none --valid-for 3h"),
        "at most 7200 seconds",
    );
    assert_refused(
        &sppctl_as(&site, "tls/officer", "approvals request quota line-8/x --devices-total 5"),
        "not configured",
    );
    let listed = String::from_utf8(sppctl_as(&site, "tls/officer", "approvals list").stdout).unwrap();
    assert!(listed.contains("raise-quota 2") && listed.contains("valid for 2h"), "{listed}");
}

#[test]
fn audit_log_contains_both_officers_signatures() {
    let site = site_with_three_officers();
    let request = sppctl_json(&site, "tls/officer", "approvals request quota line-1/a --devices-total none");
    approve(&site, request["id"].as_str().unwrap());
    let entries = String::from_utf8(site.read("audit/audit.jsonl")).unwrap();
    let entry_of = |action: &str, outcome: &str| -> Value {
        let parsed = entries.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let mut matching = parsed.filter(|entry| entry["act"] == action && entry["outcome"] == outcome);
        matching.next().unwrap_or_else(|| panic!("no {action} {outcome} in {entries:?}"))
    };
    for (action, caller) in [("approval.request", "officer o-1"), ("approval.approve", "officer o-2")] {
        assert_eq!(entry_of(action, "done")["caller"], caller);
        let details = entry_of(action, "begun")["details"].clone();
        let bytes = |name: &str| hex::decode(details[name].as_str().unwrap()).unwrap();
        let statement = details["statement"].as_str().unwrap();
        spp_format::approval::verify_statement(statement.as_bytes(), &bytes("signature"), &bytes("certificate"))
            .unwrap();
        assert!(statement.contains(request["id"].as_str().unwrap()), "{statement}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn caller_renews_own_certificate_before_expiry() {
    let site = site_with_three_officers();
    let line = format!("https://127.0.0.1:{}", site.line);
    let before = site.read("tls/line-1-a/certificate.pem");
    let not_yet = site.sppctl(&format!("renew --server {line} --tls tls/line-1-a --within 30d"));
    assert!(not_yet.contains("not renewed") && site.read("tls/line-1-a/certificate.pem") == before, "{not_yet}");
    site.sppctl(&format!("renew --server {line} --tls tls/line-1-a"));
    assert_ne!(site.read("tls/line-1-a/certificate.pem"), before);
    assemble(&mut site.station().await, &phone(1)).await.unwrap();
    site.sppctl(&format!("renew --server {line} --tls tls/line-1-a --out tls/next"));
    assert_ne!(site.read("tls/next/key.pem"), site.read("tls/line-1-a/key.pem"));
    let mut next = Line::new(site.connect(site.line, site.tls("tls/next")).await.unwrap());
    assemble(&mut next, &phone(2)).await.unwrap();
    let listed = sppctl_json(&site, "tls/officer", "station list");
    assert_eq!(listed["certificates"][0]["requested_by"], "station line-1/a");
    assert!(site.officer().await.get_status(GetStatusRequest {}).await.is_ok());
}

#[test]
fn rotation_runs_once_with_approval_of_its_exact_file() {
    let site = site_with_three_officers();
    let rotation = "[[rotate_master_key]]\nkey = \"master-1\"\nname = \"master-2\"\n";
    std::fs::write(site.path("rotation.toml"), rotation).unwrap();
    let run = "ceremony run rotation.toml --hsm hsm.toml --out keys --officer o-1";
    let alone = site.try_sppctl(run);
    assert_refused(&alone, "needs the approval");
    assert_refused(&sppctl_as(&site, "tls/officer", run), "no unused approval of this file");
    let request = sppctl_json(&site, "tls/officer", "approvals request ceremony rotation.toml");
    assert_refused(&sppctl_as(&site, "tls/officer", run), "no unused approval of this file");
    approve(&site, request["id"].as_str().unwrap());
    // A file that differs only by a comment.
    std::fs::write(site.path("rotation.toml"), format!("{rotation}# more\n")).unwrap();
    assert_refused(&sppctl_as(&site, "tls/officer", run), "no unused approval of this file");
    std::fs::write(site.path("rotation.toml"), rotation).unwrap();
    assert_refused(&sppctl_as(&site, "tls/o-3", run), "neither requested nor approved");
    let held = sppctl_as(&site, "tls/officer", run);
    assert!(held.status.success(), "{}", String::from_utf8_lossy(&held.stderr));
    let transcript: Value = serde_json::from_slice(&site.read("keys/transcript-2.json")).unwrap();
    let approval = &transcript["approval"];
    assert_eq!((&approval["requested_by"], &approval["approved_by"]), (&"o-1".into(), &serde_json::json!(["o-2"])));
    let signed = approval["statements"].as_array().unwrap();
    assert!(signed.len() == 2 && signed[1]["statement"].as_str().unwrap().contains("verb      approve"), "{signed:?}");
    assert_refused(&sppctl_as(&site, "tls/officer", run), "was already replaced by master-2");
    let manifest = String::from_utf8(site.read("keys/keys.toml")).unwrap();
    assert!(manifest.contains("master-2") && manifest.contains("replaces = \"master-1\""), "{manifest}");
    let tail = site.sppctl("audit tail --config sppd.toml -n 50 --json");
    let entries: Vec<Value> = tail.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let entry_of =
        |action: &str| entries.iter().find(|entry| entry["act"] == action && entry["outcome"] == "done").unwrap();
    assert_eq!(entry_of("ceremony.begin")["details"]["request"], request["id"]);
    assert!(entry_of("ceremony.end")["details"]["act 01"].as_str().unwrap().contains("master-2"), "{entries:?}");
    let mut kinds = std::fs::read_dir(site.path("keys")).unwrap().flatten().map(|entry| entry.file_name());
    assert!(kinds.any(|name| name.to_string_lossy().starts_with("transcript-2")));
}

#[test]
fn enrolling_an_officer_needs_another_officers_approval() {
    let site = site_with_three_officers();
    site.sppctl("request --out tls/own");
    let command = "officer enroll o-9 --csr tls/own/request.pem --out tls/made";
    assert_refused(&sppctl_as(&site, "tls/officer", command), "needs the approval of another officer");
    assert_refused(
        &sppctl_as(&site, "tls/officer", "officer enroll o-2 --out tls/other"),
        "needs the approval of another officer",
    );
    let request = sppctl_json(&site, "tls/officer", "approvals request enroll officer o-9 --csr tls/own/request.pem");
    let id = request["id"].as_str().unwrap();
    assert_refused(&sppctl_as(&site, "tls/officer", command), "needs the approval of another officer");
    approve(&site, id);
    // The approval is valid only for this key, lifetime and name, and only once.
    assert_refused(
        &sppctl_as(&site, "tls/officer", &format!("{command} --days 9")),
        "needs the approval of another officer",
    );
    assert_refused(&sppctl_as(&site, "tls/o-3", command), "needs the approval of another officer");
    assert!(sppctl_as(&site, "tls/officer", command).status.success());
    assert_refused(
        &sppctl_as(&site, "tls/officer", &command.replace("made", "again")),
        "needs the approval of another officer",
    );
}

#[test]
fn officer_cannot_vote_on_own_revocation() {
    let site = site_with_three_officers();
    let request = sppctl_json(&site, "tls/officer", "officer revoke o-3 --reason left");
    let id = request["id"].as_str().unwrap();
    assert_refused(
        &decide(&site, "tls/o-3", &format!("reject {id} --reason no")),
        "cannot approve or reject their own revocation",
    );
    assert_refused(
        &decide(&site, "tls/o-3", &format!("approve {id}")),
        "cannot approve or reject their own revocation",
    );
    approve(&site, id);
    assert_refused(&sppctl_as(&site, "tls/o-3", "approvals list"), "revoked");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn call_in_progress_is_refused_after_revocation() {
    let site = site_with_three_officers();
    let channel = site.connect(site.line, site.tls("tls/line-1-a")).await.unwrap();
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    // The request headers are sent at once, the message only after the revocation.
    let (sender, receiver) = tokio::sync::mpsc::channel::<()>(1);
    let message = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let path = "/spp.v1.Access/RenewCertificate".parse().unwrap();
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let call = tokio::spawn(async move { client.client_streaming(tonic::Request::new(message), path, codec).await });
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    let request = sppctl_json(&site, "tls/officer", "station revoke line-1/a --reason stolen");
    approve(&site, request["id"].as_str().unwrap());
    sender.send(()).await.unwrap();
    drop(sender);
    let refused = Refusal::of(&call.await.unwrap().unwrap_err());
    assert!(refused.is(Code::Unauthenticated, "REVOKED"), "{refused:?}");
}

#[test]
fn failed_ceremony_records_completed_actions() {
    let site = site_with_three_officers();
    let log_key = CeremonyFile::new().log_key("log-2", "spp.example/more");
    let text = CeremonyFile::new().signing_key("more", "p256", "csr", "More").log_key("log-2", "spp.example/more");
    std::fs::write(site.path("more.toml"), text.text()).unwrap();
    // A dangling symlink, which the check before the ceremony does not detect.
    std::os::unix::fs::symlink("/nowhere", site.path("keys/log-2.vkey")).unwrap();
    let run = "ceremony run more.toml --hsm hsm.toml --out keys --officer o-1";
    assert_refused(&sppctl_as(&site, "tls/officer", run), "completed before: made more");
    let tail = site.sppctl("audit tail --config sppd.toml -n 50 --json");
    let mut entries = tail.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let ended = entries.rfind(|entry| entry["act"] == "ceremony.end" && entry["outcome"] == "done").unwrap();
    let details = &ended["details"];
    assert!(details["failure"].as_str().unwrap().contains("log-2.vkey"), "{details}");
    assert!(details["act 01"].as_str().unwrap().starts_with("made more "), "{details}");
    assert_eq!(
        details["transcript_sha256"],
        hex::encode(spp_format::keys::sha256(&site.read("keys/transcript-2.json")))
    );
    site.sppctl("ceremony verify keys/transcript-2.txt --log keys/log-1.vkey");
    // The ceremony continues with the action that was not done.
    std::fs::remove_file(site.path("keys/log-2.vkey")).unwrap();
    std::fs::write(site.path("more.toml"), log_key.text()).unwrap();
    assert!(sppctl_as(&site, "tls/officer", run).status.success());
}
