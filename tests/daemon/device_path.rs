//! One device from a bare chip to a recovered device, and every repeated call.

use spp_device::Device;
use spp_format::package::TransportCurve;
use spp_proto::assemble_response::Delivery;
use spp_proto::get_session_request::Session as Which;
use spp_proto::{AbortRequest, AssembleRequest, CertificateFormat, GetRecordRequest, GetSessionRequest, SessionState};
use tonic::Code;
use tonic_types::StatusExt as _;

use spp_testkit::devices::{
    Line, Refusal, TestFab, assemble, assert_inclusion, chip, complete, gateway, imei, install, package, phone,
    provision, recover, sealed, sensor, session_of, state_of, without_proof,
};
use spp_testkit::site::Site;

/// Assembles, completes, wipes and recovers one device.
async fn provision_and_recover(site: &Site, mut device: Device, order: AssembleRequest) {
    let mut line = site.station().await;
    let assembled = assemble(&mut line, &order).await.unwrap();
    assert_eq!(matches!(assembled.delivery, Some(Delivery::SealedPackage(_))), order.transport_key.is_some());
    let session = session_of(&mut line, device.chip_id()).await.unwrap();
    assert_eq!((session.state(), session.receipt), (SessionState::Issued, None));
    assert_eq!((&session.identity, &session.profile, &*session.station), (&order.identity, &order.profile, "line-1/a"));
    assert_eq!((&session.session_id, session.expires), (&assembled.session_id, assembled.expires));
    assert!(site.recovery().await.get_record(of(&order)).await.is_err(), "nothing is public before Complete");

    let request = install(&mut device, &assembled);
    let installed = package(&device);
    let receipt = complete(&mut line, &request).await.unwrap();
    let by_id = GetSessionRequest { session: Some(Which::SessionId(assembled.session_id.clone())) };
    let session = line.get_session(by_id).await.unwrap().into_inner();
    assert_eq!((session.state(), session.receipt), (SessionState::Erased, without_proof(&receipt)));

    let public = site.recovery().await.get_record(of(&order)).await.unwrap().into_inner();
    assert_eq!(public.receipt, without_proof(&receipt));
    assert_inclusion(site, &receipt, &public.record_bytes);
    let record = public.record.as_ref().unwrap();
    assert_eq!((&record.chip_id, &record.identity, &record.profile), (&order.chip_id, &order.identity, &order.profile));
    assert_eq!(
        (&record.certificate, record.certificate_format),
        (&assembled.certificate, assembled.certificate_format)
    );
    assert_eq!((&record.backup_package, &record.session_id), (&request.backup_package, &assembled.session_id));
    assert_eq!((record.master_key_version, record.published), (1, receipt.published));

    let flash = site.path(&format!("devices/{}.flash", device.chip_id()));
    let before = std::fs::read(&flash).unwrap();
    device.wipe().unwrap();
    assert!(device.installed().is_err());
    recover(&mut device, &public);
    assert_eq!(package(&device), installed);
    assert_eq!(std::fs::read(&flash).unwrap(), before);
    assert_eq!(device.installed().unwrap().identity.to_string(), order.identity);
}

fn of(order: &AssembleRequest) -> GetRecordRequest {
    GetRecordRequest { chip_id: order.chip_id.clone() }
}

#[tokio::test]
async fn device_of_every_profile_is_provisioned_and_recovered() {
    let site = Site::running();
    let fab = TestFab::new(&site);
    provision_and_recover(&site, fab.device(1), phone(1)).await;
    let sensor_device = fab.sealing_device(2, TransportCurve::X25519);
    let order = sensor(2, &sensor_device);
    provision_and_recover(&site, sensor_device, order).await;
    let order = gateway(3, &fab.device(3));
    provision_and_recover(&site, fab.device(3), order).await;
    for (n, curve) in [(4, TransportCurve::P256), (5, TransportCurve::X25519)] {
        let device = fab.sealing_device(n, curve);
        let order = sealed(phone(n), &device);
        provision_and_recover(&site, device, order).await;
    }
    let status = site.status().await;
    assert_eq!((status.records, status.sessions.unwrap().erased), (5, 5));
}

#[tokio::test]
async fn certificate_format_follows_profile() {
    let site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let device = fab.sealing_device(2, TransportCurve::P256);
    let cwt = assemble(&mut line, &sensor(2, &device)).await.unwrap();
    assert_eq!(cwt.certificate_format(), CertificateFormat::Cwt);
    let x509 = assemble(&mut line, &phone(1)).await.unwrap();
    assert_eq!(x509.certificate_format(), CertificateFormat::X509);
}

#[tokio::test]
async fn repeated_assemble_returns_same_certificate_and_package() {
    let site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    for order in [phone(1), gateway(2, &fab.device(2))] {
        let first = assemble(&mut line, &order).await.unwrap();
        for _ in 0..3 {
            assert_eq!(assemble(&mut line, &order).await.unwrap(), first);
        }
    }
}

#[tokio::test]
async fn concurrent_assembles_return_same_certificate_and_package() {
    let site = Site::running();
    let line = site.station().await;
    let calls: Vec<_> = (0..16)
        .map(|_| {
            let mut line = line.clone();
            tokio::spawn(async move { assemble(&mut line, &phone(1)).await.unwrap() })
        })
        .collect();
    let mut responses = Vec::new();
    for call in calls {
        responses.push(call.await.unwrap());
    }
    assert!(responses.iter().all(|response| *response == responses[0]));
    assert_eq!(site.status().await.sessions.unwrap().issued, 1);
}

#[tokio::test]
async fn repeated_sealed_assemble_has_same_content() {
    let site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let mut device = fab.sealing_device(1, TransportCurve::P256);
    let order = sealed(phone(1), &device);
    let (one, two) = (assemble(&mut line, &order).await.unwrap(), assemble(&mut line, &order).await.unwrap());
    assert_ne!(one.delivery, two.delivery, "each sealed package has its own ephemeral key");
    assert_eq!((&one.certificate, &one.session_id), (&two.certificate, &two.session_id));
    let request = install(&mut device, &one);
    let content = package(&device);
    assert_eq!(install(&mut device, &two).backup_package, request.backup_package, "the same package changes nothing");
    assert_eq!(package(&device), content);
}

/// Otherwise a station could request the keys of a sealed device again, in clear or sealed to its own key.
#[tokio::test]
async fn sealed_session_delivered_only_to_its_first_transport_key() {
    let site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let (device, other) = (fab.sealing_device(1, TransportCurve::P256), fab.sealing_device(2, TransportCurve::P256));
    assemble(&mut line, &sealed(phone(1), &device)).await.unwrap();
    for order in [phone(1), sealed(phone(1), &other)] {
        let refused = Refusal::of(&assemble(&mut line, &order).await.unwrap_err());
        assert_eq!((refused.code, refused.fields), (Code::FailedPrecondition, vec!["transport_key".to_owned()]));
    }
    assemble(&mut line, &phone(3)).await.unwrap();
    let late = assemble(&mut line, &sealed(phone(3), &fab.sealing_device(3, TransportCurve::P256))).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition, "an unsealed session cannot be sealed later");
}

/// The profile's keys are part of the package, so a session cannot be delivered unchanged after the profile's keys change.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_of_changed_profile_rejected() {
    let mut site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let assembled = assemble(&mut line, &phone(1)).await.unwrap();
    let request = install(&mut fab.device(1), &assembled);
    site.stop();
    site.edit("profiles/phone.toml", "length = 32", "length = 16");
    site.start();
    let mut line = site.station().await;
    for refused in [assemble(&mut line, &phone(1)).await.err(), complete(&mut line, &request).await.err()] {
        let refused = Refusal::of(&refused.unwrap());
        assert_eq!((refused.code, refused.fields), (Code::FailedPrecondition, vec!["profile".to_owned()]));
    }
    site.stop();
    site.edit("profiles/phone.toml", "length = 16", "length = 32");
    site.start();
    complete(&mut site.station().await, &request).await.unwrap();
}

#[tokio::test]
async fn repeated_complete_returns_same_receipt() {
    let site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let (request, receipt) = provision(&mut line, &mut fab.device(1), &phone(1)).await;
    provision(&mut line, &mut fab.device(2), &phone(2)).await;
    assert_eq!(complete(&mut line, &request).await.unwrap(), receipt);
    assert_eq!(complete(&mut site.station().await, &request).await.unwrap(), receipt, "on another connection");
    assert_eq!(site.status().await.records, 2);
}

#[tokio::test]
async fn device_may_continue_at_other_station() {
    let mut site = Site::new();
    let second = "[[station]]\nname = \"line-1/b\"\nprofiles = [\"phone\"]\nidentities = [\"imei:4901542\"]\n\n[log]";
    site.edit("sppd.toml", "[log]", second);
    site.sppctl("station enroll line-1/b --config sppd.toml --out tls/line-1-b");
    site.start();
    let mut other = Line::new(site.connect(site.line, site.tls("tls/line-1-b")).await.unwrap());
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let assembled = assemble(&mut line, &phone(1)).await.unwrap();
    assert_eq!(assemble(&mut other, &phone(1)).await.unwrap(), assembled);
    let request = install(&mut fab.device(1), &assembled);
    let receipt = complete(&mut other, &request).await.unwrap();
    assert_eq!(complete(&mut line, &request).await.unwrap(), receipt);
}

#[tokio::test]
async fn completed_device_is_erased_and_not_reassembled() {
    let site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    provision(&mut line, &mut fab.device(1), &phone(1)).await;
    assert_eq!(state_of(&mut line, &chip(1)).await, SessionState::Erased);
    let refused = assemble(&mut line, &phone(1)).await.unwrap_err();
    assert!(Refusal::of(&refused).is(Code::AlreadyExists, "ALREADY_COMPLETE"), "{refused:?}");
    let details = refused.get_error_details();
    let taken = details.resource_info().unwrap();
    assert_eq!((&*taken.resource_type, &*taken.resource_name), ("chip", &*chip(1).to_string()));
    assert!(details.retry_info().is_none(), "a retry is useless");
}

#[tokio::test]
async fn chip_and_identity_bound_one_to_one() {
    let site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let assembled = assemble(&mut line, &phone(1)).await.unwrap();
    let other_identity = AssembleRequest { identity: imei(2), ..phone(1) };
    let other_chip = AssembleRequest { identity: imei(1), ..phone(2) };
    for before_complete in [true, false] {
        for (order, reason, kind, name) in [
            (&other_identity, "CHIP_TAKEN", "chip", chip(1).to_string()),
            (&other_chip, "IDENTITY_TAKEN", "identity", imei(1)),
        ] {
            let refused = assemble(&mut line, order).await.unwrap_err();
            assert!(Refusal::of(&refused).is(Code::AlreadyExists, reason), "{refused:?}");
            let details = refused.get_error_details();
            let taken = details.resource_info().unwrap();
            assert_eq!((&*taken.resource_type, &taken.resource_name), (kind, &name));
        }
        if before_complete {
            let request = install(&mut fab.device(1), &assembled);
            complete(&mut line, &request).await.unwrap();
        }
    }
    assert_eq!(site.status().await.records, 1);
}

#[tokio::test]
async fn aborted_session_frees_chip_and_discards_keys() {
    let site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let first = assemble(&mut line, &phone(1)).await.unwrap();
    let request = install(&mut fab.device(1), &first);
    let old_key = fab.device(1).installed().unwrap().public_key.unwrap();
    let abort = AbortRequest { session_id: first.session_id.clone(), reason: "the board is scrapped".to_owned() };
    for _ in 0..2 {
        line.abort(abort.clone()).await.expect("abort is idempotent");
        assert_eq!(state_of(&mut line, &chip(1)).await, SessionState::Aborted);
    }
    let refused = Refusal::of(&complete(&mut line, &request).await.unwrap_err());
    assert!(refused.is(Code::FailedPrecondition, "WRONG_STATE"), "{refused:?}");

    let second = assemble(&mut line, &phone(1)).await.unwrap();
    assert_ne!((&second.session_id, &second.certificate), (&first.session_id, &first.certificate));
    let mut device = fab.device(1);
    let request = install(&mut device, &second);
    assert_ne!(device.installed().unwrap().public_key.unwrap(), old_key, "a new key pair");
    let other_chip = AssembleRequest { identity: imei(1), ..phone(2) };
    line.abort(AbortRequest { session_id: second.session_id.clone(), reason: String::new() }).await.unwrap();
    assemble(&mut line, &other_chip).await.expect("the identity is free for another chip");
    assert!(complete(&mut line, &request).await.is_err());
    let sessions = site.status().await.sessions.unwrap();
    assert_eq!((sessions.aborted, sessions.issued, sessions.erased), (2, 1, 0));
}

#[tokio::test]
async fn published_session_cannot_be_aborted() {
    let site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let (request, receipt) = provision(&mut line, &mut fab.device(1), &phone(1)).await;
    let abort = AbortRequest { session_id: request.session_id.clone(), reason: "too late".to_owned() };
    let refused = Refusal::of(&line.abort(abort).await.unwrap_err());
    assert!(refused.is(Code::FailedPrecondition, "WRONG_STATE"), "{refused:?}");
    assert_eq!(session_of(&mut line, &chip(1)).await.unwrap().receipt, without_proof(&receipt));
}

#[test]
fn spp_line_provisions_wipes_and_recovers() {
    let site = Site::running();
    let run = |words: String| {
        let output = site.spp_line(&words);
        let text = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
        (output.status.success(), text)
    };
    let provision = |server: u16| {
        let server = format!("https://localhost:{server} --tls tls/line-1-a --devices fab");
        run(format!(
            "provision --simulate 20 --profile phone --parallel 8 --server {server} --manufacturer keys/manufacturer-ca.pem \
             --report report.csv --retry-for 1s"
        ))
    };
    let (ok, text) = provision(site.line);
    assert!(ok, "{text}");
    let report = String::from_utf8(site.read("report.csv")).unwrap();
    assert_eq!(report.lines().count(), 1 + 20, "{report}");
    let (ok, text) = provision(site.line);
    assert!(ok, "a repeated run changes nothing: {text}");
    let orders = String::from_utf8(site.read("fab/orders.csv")).unwrap();
    let chip = orders.lines().nth(1).unwrap().split(',').next().unwrap().to_owned();
    let flash = format!("fab/{chip}.flash");
    let before = site.read(&flash);
    let public = format!("--server https://localhost:{} --ca tls/server/ca.pem", site.public);
    for words in [
        format!("wipe --chip {chip} --devices fab"),
        format!("recover --chip {chip} --devices fab {public}"),
        format!("show --chip {chip} {public}"),
    ] {
        let (ok, text) = run(words.clone());
        assert!(ok, "{words}: {text}");
    }
    assert_eq!(site.read(&flash), before);
    let unknown = format!("recover --chip {} --devices fab {public}", "00".repeat(16));
    assert!(!run(unknown.clone()).0, "{unknown}");
}
