//! Four eyes: what one officer asks for, another approves; signed, bound to the exact content, for a time, once.

use std::process::Output;

use serde_json::Value;
use spp::proto::access_client::AccessClient;
use spp::proto::{DecideApprovalRequest, GetStatusRequest, RequestApprovalRequest};
use tonic::Code;
use tonic::transport::Channel;

use spp_testkit::ceremony::CeremonyFile;
use spp_testkit::floor::{Line, Refusal, assemble, phone};
use spp_testkit::officers::*;
use spp_testkit::site::Site;

fn refused_with(output: &Output, why: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains(why), "{why}: {said}");
}

async fn desk(site: &Site, tls: &str) -> AccessClient<Channel> {
    AccessClient::new(site.connect(site.officer, site.tls(tls)).await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_station_is_refused_at_once_on_its_open_connection() {
    let site = site_of_three();
    let mut line = site.station().await;
    assemble(&mut line, &phone(1)).await.unwrap();
    let asked = told(&site, "tls/officer", "station revoke line-1/a --reason stolen");
    let id = asked["id"].as_str().unwrap();
    assemble(&mut line, &phone(2)).await.expect("one officer alone changes nothing");
    refused_with(&decide(&site, "tls/officer", &format!("approve {id}")), "another officer must");
    refused_with(&typed(&site, "tls/o-2", &format!("approve {id}"), "00000000"), "nothing was done");
    refused_with(&typed(&site, "tls/o-2", &format!("approve {id}"), ""), "nothing was done");
    assemble(&mut line, &phone(3)).await.expect("nothing is decided");
    approve(&site, id);
    let refused = Refusal::of(&assemble(&mut line, &phone(4)).await.unwrap_err());
    assert!(refused.is(Code::Unauthenticated, "REVOKED"), "{refused:?}");
    let mut again = site.station().await;
    assert!(Refusal::of(&assemble(&mut again, &phone(4)).await.unwrap_err()).is(Code::Unauthenticated, "REVOKED"));
    let listed = String::from_utf8(ask(&site, "tls/officer", "station list").stdout).unwrap();
    assert!(listed.contains("line-1/a") && listed.contains("stolen"), "{listed}");
    // Enrolled anew, it works again; the old certificate does not. That takes two officers as well.
    site.sppctl("request --out tls/anew");
    let words = "station enroll line-1/a --csr tls/anew/request.pem --out tls/made";
    refused_with(&ask(&site, "tls/officer", words), "approvals request enroll station line-1/a");
    let asked = told(&site, "tls/officer", "approvals request enroll station line-1/a --csr tls/anew/request.pem");
    approve(&site, asked["id"].as_str().unwrap());
    assert!(ask(&site, "tls/officer", words).status.success());
    for file in ["certificate.pem", "ca.pem"] {
        std::fs::copy(site.path(&format!("tls/made/{file}")), site.path(&format!("tls/anew/{file}"))).unwrap();
    }
    std::thread::sleep(std::time::Duration::from_secs(1));
    let mut anew = Line::new(site.connect(site.line, site.tls("tls/anew")).await.unwrap());
    assemble(&mut anew, &phone(4)).await.unwrap();
    assert!(assemble(&mut line, &phone(5)).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_agreed_on_outlives_the_daemon() {
    let mut site = site_of_three();
    let revocation = told(&site, "tls/officer", "officer revoke o-3 --reason left");
    let pending = told(&site, "tls/officer", "approvals request quota line-1/a --devices-total 5");
    approve(&site, revocation["id"].as_str().unwrap());
    site.kill();
    site.start();
    let listed = told(&site, "tls/officer", "approvals list --all");
    let listed = listed["approvals"].as_array().unwrap();
    let mut states: Vec<_> = listed.iter().map(|approval| approval["state"].as_str().unwrap()).collect();
    states.sort_unstable();
    assert_eq!(states, ["done", "pending"]);
    // A list of everything that was ever signed would outgrow an answer.
    for approval in listed {
        let statement = approval["requested"]["statement"].as_str().unwrap();
        assert_eq!(statement.is_empty(), approval["state"] == "done", "{approval}");
        assert!(!approval["description"].as_str().unwrap().is_empty(), "{approval}");
    }
    let done = told(&site, "tls/officer", &format!("approvals show {}", revocation["id"].as_str().unwrap()));
    assert!(done["approvals"][0]["statement"].as_str().unwrap().contains("approve"), "{done}");
    refused_with(&ask(&site, "tls/o-3", "approvals list"), "revoked");
    approve(&site, pending["id"].as_str().unwrap());
    refused_with(
        &decide(&site, "tls/officer", &format!("reject {} --reason late", pending["id"].as_str().unwrap())),
        "done already",
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_approved_but_what_was_signed() {
    let site = site_of_three();
    let asked = told(&site, "tls/officer", "approvals request quota line-1/a --devices-per-hour 7 --valid-for 1h");
    let id = hex::decode(asked["id"].as_str().unwrap()).unwrap();
    let (mut one, mut two) = (desk(&site, "tls/officer").await, desk(&site, "tls/o-2").await);
    // Somebody else's signature, and one over something else.
    let signature = hex::decode(asked["requested"]["signature"].as_str().unwrap()).unwrap();
    let decision =
        DecideApprovalRequest { id: id.clone(), approve: true, reason: String::new(), signature: signature.clone() };
    let refused = Refusal::of(&two.decide_approval(decision.clone()).await.unwrap_err());
    assert!(refused.is(Code::PermissionDenied, "BAD_SIGNATURE"), "{refused:?}");
    // The request with another content under the same signature.
    let statement = asked["requested"]["statement"].as_str().unwrap();
    let act = statement.lines().find_map(|line| line.strip_prefix("content   ")).unwrap().to_owned();
    let expires = Some(prost_types::Timestamp { seconds: asked["expires"].as_i64().unwrap(), nanos: 0 });
    let request = RequestApprovalRequest { id: id.clone(), act: act.replace(":7,", ":8,"), expires, signature };
    assert_ne!(request.act, act);
    let refused = Refusal::of(&one.request_approval(request.clone()).await.unwrap_err());
    assert!(refused.is(Code::PermissionDenied, "BAD_SIGNATURE"), "{refused:?}");
    let repeated = one.request_approval(RequestApprovalRequest { act: act.clone(), ..request.clone() }).await.unwrap();
    assert_eq!(repeated.into_inner().approval.unwrap().state, "pending", "the same request again is the same request");
    let spaced = RequestApprovalRequest { act: act.replace(':', ": "), ..request };
    let refused = Refusal::of(&one.request_approval(spaced).await.unwrap_err());
    assert_eq!((refused.code, refused.fields), (Code::InvalidArgument, vec!["act".to_owned()]));
    let unknown = DecideApprovalRequest { id: vec![9; 8], ..decision };
    assert!(Refusal::of(&two.decide_approval(unknown).await.unwrap_err()).is(Code::NotFound, "NO_REQUEST"));
}

#[test]
fn rules_are_changed_by_two_and_count_at_once() {
    let site = site_of_three();
    let asked = told(&site, "tls/officer", "approvals request rules --raise-quota 2 --longest 2h");
    approve(&site, asked["id"].as_str().unwrap());
    let asked = told(&site, "tls/officer", "approvals request quota line-1/a --devices-total none");
    assert_eq!(asked["needed"], 2);
    let id = asked["id"].as_str().unwrap();
    approve(&site, id);
    assert_eq!(told(&site, "tls/officer", &format!("approvals show {id}"))["state"], "pending");
    assert!(decide(&site, "tls/o-3", &format!("approve {id}")).status.success());
    assert_eq!(told(&site, "tls/officer", &format!("approvals show {id}"))["state"], "done");
    refused_with(&ask(&site, "tls/officer", "approvals request rules --destroy 0"), "1 to 9 approvals");
    refused_with(
        &ask(&site, "tls/officer", "approvals request quota line-1/a --devices-total none --valid-for 3h"),
        "at most 7200 seconds",
    );
    refused_with(&ask(&site, "tls/officer", "approvals request quota line-8/x --devices-total 5"), "not configured");
    let listed = String::from_utf8(ask(&site, "tls/officer", "approvals list").stdout).unwrap();
    assert!(listed.contains("raise-quota 2") && listed.contains("stands for 2h"), "{listed}");
}

#[test]
fn the_audit_log_keeps_both_signatures() {
    let site = site_of_three();
    let asked = told(&site, "tls/officer", "approvals request quota line-1/a --devices-total none");
    approve(&site, asked["id"].as_str().unwrap());
    let entries = String::from_utf8(site.read("audit/audit.jsonl")).unwrap();
    let of = |act: &str, outcome: &str| -> Value {
        let parsed = entries.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let mut found = parsed.filter(|entry| entry["act"] == act && entry["outcome"] == outcome);
        found.next().unwrap_or_else(|| panic!("no {act} {outcome} in {entries:?}"))
    };
    for (act, caller) in [("approval.request", "officer o-1"), ("approval.approve", "officer o-2")] {
        assert_eq!(of(act, "done")["caller"], caller);
        let details = of(act, "begun")["details"].clone();
        let bytes = |name: &str| hex::decode(details[name].as_str().unwrap()).unwrap();
        let statement = details["statement"].as_str().unwrap();
        spp::access::verify_statement(statement.as_bytes(), &bytes("signature"), &bytes("certificate")).unwrap();
        assert!(statement.contains(asked["id"].as_str().unwrap()), "{statement}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_renewed_by_its_caller_before_it_ends() {
    let site = site_of_three();
    let line = format!("https://127.0.0.1:{}", site.line);
    let before = site.read("tls/line-1-a/certificate.pem");
    let not_yet = site.sppctl(&format!("renew --server {line} --tls tls/line-1-a --within 30d"));
    assert!(not_yet.contains("nothing was done") && site.read("tls/line-1-a/certificate.pem") == before, "{not_yet}");
    site.sppctl(&format!("renew --server {line} --tls tls/line-1-a"));
    assert_ne!(site.read("tls/line-1-a/certificate.pem"), before);
    assemble(&mut site.station().await, &phone(1)).await.unwrap();
    site.sppctl(&format!("renew --server {line} --tls tls/line-1-a --out tls/next"));
    assert_ne!(site.read("tls/next/key.pem"), site.read("tls/line-1-a/key.pem"));
    let mut next = Line::new(site.connect(site.line, site.tls("tls/next")).await.unwrap());
    assemble(&mut next, &phone(2)).await.unwrap();
    let listed = told(&site, "tls/officer", "station list");
    assert_eq!(listed["certificates"][0]["by"], "station line-1/a");
    assert!(site.officer().await.get_status(GetStatusRequest {}).await.is_ok());
}

#[test]
fn a_rotation_is_held_once_with_the_approval_of_its_very_file_and_is_on_record() {
    let site = site_of_three();
    let rotation = "[[rotate_master_key]]\nkey = \"master-1\"\nname = \"master-2\"\n";
    std::fs::write(site.path("rotation.toml"), rotation).unwrap();
    let run = "ceremony run rotation.toml --hsm hsm.toml --out keys --officer o-1";
    let alone = site.try_sppctl(run);
    refused_with(&alone, "needs the approval");
    refused_with(&ask(&site, "tls/officer", run), "no approval of this file waits");
    let asked = told(&site, "tls/officer", "approvals request ceremony rotation.toml");
    refused_with(&ask(&site, "tls/officer", run), "no approval of this file waits");
    approve(&site, asked["id"].as_str().unwrap());
    // Another file, by as little as a comment.
    std::fs::write(site.path("rotation.toml"), format!("{rotation}# more\n")).unwrap();
    refused_with(&ask(&site, "tls/officer", run), "no approval of this file waits");
    std::fs::write(site.path("rotation.toml"), rotation).unwrap();
    refused_with(&ask(&site, "tls/o-3", run), "neither requested nor approved");
    let held = ask(&site, "tls/officer", run);
    assert!(held.status.success(), "{}", String::from_utf8_lossy(&held.stderr));
    let transcript: Value = serde_json::from_slice(&site.read("keys/transcript-2.json")).unwrap();
    let approval = &transcript["approval"];
    assert_eq!((&approval["requested_by"], &approval["approved_by"]), (&"o-1".into(), &serde_json::json!(["o-2"])));
    let signed = approval["statements"].as_array().unwrap();
    assert!(signed.len() == 2 && signed[1]["statement"].as_str().unwrap().contains("verb      approve"), "{signed:?}");
    refused_with(&ask(&site, "tls/officer", run), "was replaced by master-2 already");
    let register = String::from_utf8(site.read("keys/keys.toml")).unwrap();
    assert!(register.contains("master-2") && register.contains("replaces = \"master-1\""), "{register}");
    let told = site.sppctl("audit tail --config sppd.toml -n 50 --json");
    let entries: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |act: &str| entries.iter().find(|entry| entry["act"] == act && entry["outcome"] == "done").unwrap();
    assert_eq!(of("ceremony.begin")["details"]["request"], asked["id"]);
    assert!(of("ceremony.end")["details"]["act 01"].as_str().unwrap().contains("master-2"), "{entries:?}");
    let mut kinds = std::fs::read_dir(site.path("keys")).unwrap().flatten().map(|entry| entry.file_name());
    assert!(kinds.any(|name| name.to_string_lossy().starts_with("transcript-2")));
}

#[test]
fn nobody_makes_a_second_officer_of_himself() {
    let site = site_of_three();
    site.sppctl("request --out tls/own");
    let words = "officer enroll o-9 --csr tls/own/request.pem --out tls/made";
    refused_with(&ask(&site, "tls/officer", words), "takes the approval of another officer");
    refused_with(
        &ask(&site, "tls/officer", "officer enroll o-2 --out tls/other"),
        "takes the approval of another officer",
    );
    let asked = told(&site, "tls/officer", "approvals request enroll officer o-9 --csr tls/own/request.pem");
    let id = asked["id"].as_str().unwrap();
    refused_with(&ask(&site, "tls/officer", words), "takes the approval of another officer");
    approve(&site, id);
    // Approved for this key, these days and this name alone, and once.
    refused_with(&ask(&site, "tls/officer", &format!("{words} --days 9")), "takes the approval of another officer");
    refused_with(&ask(&site, "tls/o-3", words), "takes the approval of another officer");
    assert!(ask(&site, "tls/officer", words).status.success());
    refused_with(&ask(&site, "tls/officer", &words.replace("made", "again")), "takes the approval of another officer");
}

#[test]
fn whoever_is_to_be_revoked_decides_nothing_on_it() {
    let site = site_of_three();
    let asked = told(&site, "tls/officer", "officer revoke o-3 --reason left");
    let id = asked["id"].as_str().unwrap();
    refused_with(&decide(&site, "tls/o-3", &format!("reject {id} --reason no")), "decides nothing on it");
    refused_with(&decide(&site, "tls/o-3", &format!("approve {id}")), "decides nothing on it");
    approve(&site, id);
    refused_with(&ask(&site, "tls/o-3", "approvals list"), "revoked");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_was_let_in_before_the_revocation_and_said_after_it_is_refused() {
    let site = site_of_three();
    let channel = site.connect(site.line, site.tls("tls/line-1-a")).await.unwrap();
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    // The head of the request goes out at once, the message when it is told to.
    let (say, said) = tokio::sync::mpsc::channel::<()>(1);
    let message = tokio_stream::wrappers::ReceiverStream::new(said);
    let path = "/spp.v1.Access/RenewCertificate".parse().unwrap();
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let call = tokio::spawn(async move { client.client_streaming(tonic::Request::new(message), path, codec).await });
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    let asked = told(&site, "tls/officer", "station revoke line-1/a --reason stolen");
    approve(&site, asked["id"].as_str().unwrap());
    say.send(()).await.unwrap();
    drop(say);
    let refused = Refusal::of(&call.await.unwrap().unwrap_err());
    assert!(refused.is(Code::Unauthenticated, "REVOKED"), "{refused:?}");
}

#[test]
fn what_a_ceremony_did_before_it_failed_is_on_record() {
    let site = site_of_three();
    let log_key = CeremonyFile::new().log_key("log-2", "spp.example/more");
    let text = CeremonyFile::new().signing_key("more", "p256", "csr", "More").log_key("log-2", "spp.example/more");
    std::fs::write(site.path("more.toml"), text.text()).unwrap();
    // There is something that a look before does not see.
    std::os::unix::fs::symlink("/nowhere", site.path("keys/log-2.vkey")).unwrap();
    let run = "ceremony run more.toml --hsm hsm.toml --out keys --officer o-1";
    refused_with(&ask(&site, "tls/officer", run), "done before that: made more");
    let told = site.sppctl("audit tail --config sppd.toml -n 50 --json");
    let mut entries = told.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let ended = entries.rfind(|entry| entry["act"] == "ceremony.end" && entry["outcome"] == "done").unwrap();
    let details = &ended["details"];
    assert!(details["failure"].as_str().unwrap().contains("log-2.vkey"), "{details}");
    assert!(details["act 01"].as_str().unwrap().starts_with("made more "), "{details}");
    assert_eq!(details["transcript_sha256"], hex::encode(spp::keys::sha256(&site.read("keys/transcript-2.json"))));
    site.sppctl("ceremony verify keys/transcript-2.txt --log keys/log-1.vkey");
    // It goes on with what was not done.
    std::fs::remove_file(site.path("keys/log-2.vkey")).unwrap();
    std::fs::write(site.path("more.toml"), log_key.text()).unwrap();
    assert!(ask(&site, "tls/officer", run).status.success());
}
