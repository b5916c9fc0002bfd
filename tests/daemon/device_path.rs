//! The way of one device, from a bare chip to a recovered device, and every repeat on it.

use spp::device::Device;
use spp::package::TransportCurve;
use spp::proto::assemble_response::Delivery;
use spp::proto::get_session_request::Session as Which;
use spp::proto::{AbortRequest, AssembleRequest, CertificateFormat, GetRecordRequest, GetSessionRequest, SessionState};
use tonic::Code;
use tonic_types::StatusExt as _;

use spp_testkit::floor::{
    Floor, Line, Refusal, assemble, assert_proven, chip, complete, gateway, imei, install, package, phone, provision,
    recover, sealed, sensor, session_of, state_of, unproven,
};
use spp_testkit::site::Site;

/// From the order to the receipt, then the flash is lost and comes back from the public database.
async fn the_whole_way(site: &Site, mut device: Device, order: AssembleRequest) {
    let mut line = site.station().await;
    let answer = assemble(&mut line, &order).await.unwrap();
    assert_eq!(matches!(answer.delivery, Some(Delivery::SealedPackage(_))), order.transport_key.is_some());
    let known = session_of(&mut line, device.chip_id()).await.unwrap();
    assert_eq!((known.state(), known.receipt), (SessionState::Issued, None));
    assert_eq!((&known.identity, &known.profile, &*known.station), (&order.identity, &order.profile, "line-1/a"));
    assert_eq!((&known.session_id, known.expires), (&answer.session_id, answer.expires));
    assert!(site.recovery().await.get_record(of(&order)).await.is_err(), "nothing is public before Complete");

    let request = install(&mut device, &answer);
    let installed = package(&device);
    let receipt = complete(&mut line, &request).await.unwrap();
    let by_id = GetSessionRequest { session: Some(Which::SessionId(answer.session_id.clone())) };
    let known = line.get_session(by_id).await.unwrap().into_inner();
    assert_eq!((known.state(), known.receipt), (SessionState::Erased, unproven(&receipt)));

    let public = site.recovery().await.get_record(of(&order)).await.unwrap().into_inner();
    assert_eq!(public.receipt, unproven(&receipt));
    assert_proven(site, &receipt, &public.record_bytes);
    let record = public.record.as_ref().unwrap();
    assert_eq!((&record.chip_id, &record.identity, &record.profile), (&order.chip_id, &order.identity, &order.profile));
    assert_eq!((&record.certificate, record.certificate_format), (&answer.certificate, answer.certificate_format));
    assert_eq!((&record.backup_package, &record.session_id), (&request.backup_package, &answer.session_id));
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
async fn every_product_goes_the_whole_way_and_is_recovered() {
    let site = Site::running();
    let floor = Floor::new(&site);
    the_whole_way(&site, floor.device(1), phone(1)).await;
    let sensor_device = floor.sealing(2, TransportCurve::X25519);
    let order = sensor(2, &sensor_device);
    the_whole_way(&site, sensor_device, order).await;
    let order = gateway(3, &floor.device(3));
    the_whole_way(&site, floor.device(3), order).await;
    for (n, curve) in [(4, TransportCurve::P256), (5, TransportCurve::X25519)] {
        let device = floor.sealing(n, curve);
        let order = sealed(phone(n), &device);
        the_whole_way(&site, device, order).await;
    }
    let status = site.status().await;
    assert_eq!((status.records, status.sessions.unwrap().erased), (5, 5));
}

#[tokio::test]
async fn a_certificate_has_the_form_that_its_profile_says() {
    let site = Site::running();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let device = floor.sealing(2, TransportCurve::P256);
    let cwt = assemble(&mut line, &sensor(2, &device)).await.unwrap();
    assert_eq!(cwt.certificate_format(), CertificateFormat::Cwt);
    let x509 = assemble(&mut line, &phone(1)).await.unwrap();
    assert_eq!(x509.certificate_format(), CertificateFormat::X509);
}

#[tokio::test]
async fn a_repeated_order_gets_the_same_certificate_and_package() {
    let site = Site::running();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    for order in [phone(1), gateway(2, &floor.device(2))] {
        let first = assemble(&mut line, &order).await.unwrap();
        for _ in 0..3 {
            assert_eq!(assemble(&mut line, &order).await.unwrap(), first);
        }
    }
}

#[tokio::test]
async fn orders_at_the_same_time_get_the_same_certificate_and_package() {
    let site = Site::running();
    let line = site.station().await;
    let calls: Vec<_> = (0..16)
        .map(|_| {
            let mut line = line.clone();
            tokio::spawn(async move { assemble(&mut line, &phone(1)).await.unwrap() })
        })
        .collect();
    let mut answers = Vec::new();
    for call in calls {
        answers.push(call.await.unwrap());
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    assert_eq!(site.status().await.sessions.unwrap().issued, 1);
}

#[tokio::test]
async fn a_sealed_repeat_has_the_same_content() {
    let site = Site::running();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let mut device = floor.sealing(1, TransportCurve::P256);
    let order = sealed(phone(1), &device);
    let (one, two) = (assemble(&mut line, &order).await.unwrap(), assemble(&mut line, &order).await.unwrap());
    assert_ne!(one.delivery, two.delivery, "each sealing has an ephemeral key of its own");
    assert_eq!((&one.certificate, &one.session_id), (&two.certificate, &two.session_id));
    let request = install(&mut device, &one);
    let content = package(&device);
    assert_eq!(install(&mut device, &two).backup_package, request.backup_package, "the same package changes nothing");
    assert_eq!(package(&device), content);
}

/// Else a station could ask for the keys of a sealed device again, in clear or sealed to a key of its own.
#[tokio::test]
async fn a_sealed_session_is_delivered_to_its_first_transport_key_alone() {
    let site = Site::running();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let (device, other) = (floor.sealing(1, TransportCurve::P256), floor.sealing(2, TransportCurve::P256));
    assemble(&mut line, &sealed(phone(1), &device)).await.unwrap();
    for order in [phone(1), sealed(phone(1), &other)] {
        let refused = Refusal::of(&assemble(&mut line, &order).await.unwrap_err());
        assert_eq!((refused.code, refused.fields), (Code::FailedPrecondition, vec!["transport_key".to_owned()]));
    }
    assemble(&mut line, &phone(3)).await.unwrap();
    let late = assemble(&mut line, &sealed(phone(3), &floor.sealing(3, TransportCurve::P256))).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition, "a session in clear is not sealed afterwards");
}

/// The profile's keys are part of the package: once they are changed, a session of before cannot be delivered the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_of_a_changed_profile_is_refused_instead_of_given_other_keys() {
    let mut site = Site::running();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let answer = assemble(&mut line, &phone(1)).await.unwrap();
    let request = install(&mut floor.device(1), &answer);
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
async fn a_repeated_complete_gets_the_same_receipt() {
    let site = Site::running();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let (request, receipt) = provision(&mut line, &mut floor.device(1), &phone(1)).await;
    provision(&mut line, &mut floor.device(2), &phone(2)).await;
    assert_eq!(complete(&mut line, &request).await.unwrap(), receipt);
    assert_eq!(complete(&mut site.station().await, &request).await.unwrap(), receipt, "on another connection");
    assert_eq!(site.status().await.records, 2);
}

#[tokio::test]
async fn another_station_may_take_a_device_over() {
    let mut site = Site::new();
    let second = "[[station]]\nname = \"line-1/b\"\nprofiles = [\"phone\"]\nidentities = [\"imei:4901542\"]\n\n[log]";
    site.edit("sppd.toml", "[log]", second);
    site.sppctl("station enroll line-1/b --config sppd.toml --out tls/line-1-b");
    site.start();
    let mut other = Line::new(site.connect(site.line, site.tls("tls/line-1-b")).await.unwrap());
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let answer = assemble(&mut line, &phone(1)).await.unwrap();
    assert_eq!(assemble(&mut other, &phone(1)).await.unwrap(), answer);
    let request = install(&mut floor.device(1), &answer);
    let receipt = complete(&mut other, &request).await.unwrap();
    assert_eq!(complete(&mut line, &request).await.unwrap(), receipt);
}

#[tokio::test]
async fn after_complete_the_device_is_erased_here_and_taken() {
    let site = Site::running();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    provision(&mut line, &mut floor.device(1), &phone(1)).await;
    assert_eq!(state_of(&mut line, &chip(1)).await, SessionState::Erased);
    let refused = assemble(&mut line, &phone(1)).await.unwrap_err();
    assert!(Refusal::of(&refused).is(Code::AlreadyExists, "ALREADY_COMPLETE"), "{refused:?}");
    let details = refused.get_error_details();
    let taken = details.resource_info().unwrap();
    assert_eq!((&*taken.resource_type, &*taken.resource_name), ("chip", &*chip(1).to_string()));
    assert!(details.retry_info().is_none(), "trying again is no use");
}

#[tokio::test]
async fn a_chip_has_one_identity_and_an_identity_one_chip() {
    let site = Site::running();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let answer = assemble(&mut line, &phone(1)).await.unwrap();
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
            let request = install(&mut floor.device(1), &answer);
            complete(&mut line, &request).await.unwrap();
        }
    }
    assert_eq!(site.status().await.records, 1);
}

#[tokio::test]
async fn an_aborted_session_frees_chip_and_identity_and_its_keys_are_never_used_again() {
    let site = Site::running();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let first = assemble(&mut line, &phone(1)).await.unwrap();
    let request = install(&mut floor.device(1), &first);
    let old_key = floor.device(1).installed().unwrap().public_key.unwrap();
    let abort = AbortRequest { session_id: first.session_id.clone(), reason: "the board is scrapped".to_owned() };
    for _ in 0..2 {
        line.abort(abort.clone()).await.expect("twice is fine");
        assert_eq!(state_of(&mut line, &chip(1)).await, SessionState::Aborted);
    }
    let refused = Refusal::of(&complete(&mut line, &request).await.unwrap_err());
    assert!(refused.is(Code::FailedPrecondition, "WRONG_STATE"), "{refused:?}");

    let second = assemble(&mut line, &phone(1)).await.unwrap();
    assert_ne!((&second.session_id, &second.certificate), (&first.session_id, &first.certificate));
    let mut device = floor.device(1);
    let request = install(&mut device, &second);
    assert_ne!(device.installed().unwrap().public_key.unwrap(), old_key, "a new pair");
    let other_chip = AssembleRequest { identity: imei(1), ..phone(2) };
    line.abort(AbortRequest { session_id: second.session_id.clone(), reason: String::new() }).await.unwrap();
    assemble(&mut line, &other_chip).await.expect("the identity is free for another chip");
    assert!(complete(&mut line, &request).await.is_err());
    let sessions = site.status().await.sessions.unwrap();
    assert_eq!((sessions.aborted, sessions.issued, sessions.erased), (2, 1, 0));
}

#[tokio::test]
async fn a_published_device_cannot_be_aborted() {
    let site = Site::running();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let (request, receipt) = provision(&mut line, &mut floor.device(1), &phone(1)).await;
    let abort = AbortRequest { session_id: request.session_id.clone(), reason: "too late".to_owned() };
    let refused = Refusal::of(&line.abort(abort).await.unwrap_err());
    assert!(refused.is(Code::FailedPrecondition, "WRONG_STATE"), "{refused:?}");
    assert_eq!(session_of(&mut line, &chip(1)).await.unwrap().receipt, unproven(&receipt));
}

#[test]
fn the_reference_station_takes_devices_the_whole_way_and_back() {
    let site = Site::running();
    let run = |words: String| {
        let output = site.spp_line(&words);
        let text = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
        (output.status.success(), text)
    };
    let provision = |server: u16| {
        let server = format!("https://localhost:{server} --tls tls/line-1-a --devices floor");
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
    assert!(ok, "the same again changes nothing: {text}");
    let orders = String::from_utf8(site.read("floor/orders.csv")).unwrap();
    let chip = orders.lines().nth(1).unwrap().split(',').next().unwrap().to_owned();
    let flash = format!("floor/{chip}.flash");
    let before = site.read(&flash);
    let public = format!("--server https://localhost:{} --ca tls/server/ca.pem", site.public);
    for words in [
        format!("wipe --chip {chip} --devices floor"),
        format!("recover --chip {chip} --devices floor {public}"),
        format!("show --chip {chip} {public}"),
    ] {
        let (ok, text) = run(words.clone());
        assert!(ok, "{words}: {text}");
    }
    assert_eq!(site.read(&flash), before);
    let unknown = format!("recover --chip {} --devices floor {public}", "00".repeat(16));
    assert!(!run(unknown.clone()).0, "{unknown}");
}
