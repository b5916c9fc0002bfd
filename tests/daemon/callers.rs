//! Caller authentication and authorization: issuing CA, validity, exactly one name, revocation, role, and station confinement.

use std::time::Duration;

use prost::Message as _;
use spp_format::certificate::{AccessName, Caller, Role};
use spp_proto::get_session_request::Session as Selector;
use spp_proto::officer_client::OfficerClient;
use spp_proto::recovery_client::RecoveryClient;
use spp_proto::{AbortRequest, AssembleRequest, GetRecordRequest, GetSessionRequest, GetStatusRequest};
use tonic::transport::{Channel, ClientTlsConfig};
use tonic::{Code, Status};

use spp_testkit::authority::*;
use spp_testkit::devices::{Line, Refusal, TestFab, assemble, chip, complete, install, phone, sensor};
use spp_testkit::site::Site;
use spp_testkit::wait::eventually;

/// Starts a site whose daemon trusts a second CA besides its own.
fn site_trusting(authority: &Authority) -> Site {
    let mut site = Site::new();
    let both = [site.read("keys/access-ca.pem"), authority.pem.clone().into_bytes()].concat();
    std::fs::write(site.path("tls/clients.pem"), both).unwrap();
    site.edit("sppd.toml", "client_ca = \"keys/access-ca.pem\"", "client_ca = \"tls/clients.pem\"");
    site.start();
    site
}

/// Makes one call on each mutual-TLS listener with this TLS configuration.
async fn call_both(site: &Site, tls: ClientTlsConfig) -> [Result<(), Status>; 2] {
    let unavailable = |e: tonic::transport::Error| Status::unavailable(format!("{e:?}"));
    let line = match site.connect(site.line, tls.clone()).await {
        Ok(channel) => assemble(&mut Line::new(channel), &phone(1)).await.map(drop),
        Err(e) => Err(unavailable(e)),
    };
    let officer = match site.connect(site.officer, tls).await {
        Ok(channel) => OfficerClient::new(channel).get_status(GetStatusRequest {}).await.map(drop),
        Err(e) => Err(unavailable(e)),
    };
    [line, officer]
}

#[tokio::test]
async fn tls_rejects_callers_without_certificate_of_trusted_ca() {
    let trusted = Authority::new("Example Second Access CA");
    let site = site_trusting(&trusted);
    let foreign = Authority::new("Example Devices Access CA");
    let server = AccessName::Server { dns: vec!["localhost".to_owned()], ips: Vec::new() };
    let with_identity = |identity| site.public_tls().identity(identity);
    for (what, tls) in [
        ("no certificate", site.public_tls()),
        ("an untrusted CA of the same name", with_identity(foreign.identity(&station("line-1/a"), now() + 600))),
        ("an expired certificate", with_identity(trusted.identity(&station("line-1/a"), now() - 60))),
        ("a server's certificate", with_identity(trusted.identity(&server, now() + 600))),
    ] {
        for answer in call_both(&site, tls).await {
            assert!(refused_by_tls(&answer), "{what}: {answer:?}");
        }
    }
    let [line, _] = call_both(&site, with_identity(trusted.identity(&station("line-1/a"), now() + 600))).await;
    line.expect("the second CA's station is accepted");
    assert_eq!(site.status().await.sessions.unwrap().issued, 1);
}

#[tokio::test]
async fn certificate_without_exactly_one_name_is_unauthenticated() {
    let trusted = Authority::new("Example Second Access CA");
    let site = site_trusting(&trusted);
    for names in [
        "",
        "subjectAltName=DNS:line-1",
        "subjectAltName=URI:spp://station/line-1/a,URI:spp://officer/o-1",
        "subjectAltName=URI:spp://station/line-1/a,URI:spp://station/line-1/b",
        "subjectAltName=URI:spp://auditors/x",
        "subjectAltName=URI:spp://station/",
        "subjectAltName=URI:https://station/line-1/a",
    ] {
        let tls = site.public_tls().identity(trusted.identity_with(&site, names));
        for answer in call_both(&site, tls).await {
            let refused = Refusal::of(&answer.unwrap_err());
            assert!(refused.is(Code::Unauthenticated, "UNAUTHENTICATED_CALLER"), "{names}: {refused:?}");
        }
    }
    assert_eq!(site.status().await.sessions.unwrap().issued, 0);
}

/// Validity of a short-lived certificate in seconds: enough to connect with it on a busy machine.
const SHORT_VALIDITY: u64 = 10;

#[tokio::test]
async fn expired_certificate_is_refused_on_open_connection() {
    let trusted = Authority::new("Example Second Access CA");
    let site = site_trusting(&trusted);
    let not_after = now() + SHORT_VALIDITY;
    let tls = site.public_tls().identity(trusted.identity(&station("line-1/a"), not_after));
    let mut line = Line::new(site.connect(site.line, tls).await.unwrap());
    assemble(&mut line, &phone(1)).await.expect("the call succeeds before expiry");
    eventually("the certificate has expired", async || now() > not_after).await;
    let refused = Refusal::of(&assemble(&mut line, &phone(1)).await.unwrap_err());
    assert!(refused.is(Code::Unauthenticated, "UNAUTHENTICATED_CALLER"), "{refused:?}");
}

/// The roles that may call each method. Deliberately independent of the daemon's own table.
const ALLOWED_ROLES: &[(&str, &[&str])] = &[
    ("/spp.v1.Access/RenewCertificate", &["station", "officer", "auditor", "back-office", "monitor"]),
    ("/spp.v1.Access/EnrollCaller", &["officer"]),
    ("/spp.v1.Access/ListCallers", &["officer", "auditor"]),
    ("/spp.v1.Access/RequestApproval", &["officer"]),
    ("/spp.v1.Access/ListApprovals", &["officer", "auditor"]),
    ("/spp.v1.Access/GetApproval", &["officer", "auditor"]),
    ("/spp.v1.Access/DecideApproval", &["officer"]),
    ("/spp.v1.Access/UseApproval", &["officer"]),
    ("/spp.v1.Access/RecordCeremony", &["officer"]),
    ("/spp.v1.Access/ReadAuditLog", &["officer", "auditor"]),
    ("/spp.v1.Access/LoadIdentities", &["officer"]),
    ("/spp.v1.Access/ListIdentities", &["officer", "auditor"]),
    ("/spp.v1.Line/Assemble", &["station"]),
    ("/spp.v1.Line/Complete", &["station"]),
    ("/spp.v1.Line/Abort", &["station"]),
    ("/spp.v1.Line/GetSession", &["station"]),
    ("/spp.v1.Officer/GetStatus", &["officer", "auditor", "monitor"]),
    ("/spp.v1.Officer/GetPoolStatus", &["officer", "auditor", "monitor"]),
    ("/spp.v1.Officer/FillPool", &["officer"]),
    ("/spp.v1.Officer/ShredPool", &["officer"]),
    ("/spp.v1.Officer/Reload", &["officer"]),
    ("/spp.v1.Production/GetProduction", &["officer", "auditor", "monitor"]),
    ("/spp.v1.Production/GetDevice", &["officer", "auditor"]),
    ("/spp.v1.Production/ListSessions", &["officer", "auditor"]),
    ("/spp.v1.Production/AbortSession", &["officer"]),
];

/// Lists the methods of the mutual-TLS listeners from the daemon's descriptors.
fn inner_methods() -> Vec<String> {
    let files = prost_types::FileDescriptorSet::decode(spp_proto::DESCRIPTORS).unwrap().file;
    let services = files.iter().flat_map(|file| file.service.iter().map(move |service| (file.package(), service)));
    let inner = services.filter(|(_, service)| service.name() != "Recovery");
    let methods = |(package, service): (&str, &prost_types::ServiceDescriptorProto)| -> Vec<String> {
        service.method.iter().map(|method| format!("/{package}.{}/{}", service.name(), method.name())).collect()
    };
    inner.flat_map(methods).collect()
}

#[tokio::test]
async fn every_method_serves_only_its_allowed_roles() {
    let mut site = Site::new();
    for role in ["auditor", "back-office", "monitor"] {
        site.sppctl(&format!("{role} enroll x-1 --config sppd.toml --out tls/{role}"));
    }
    site.start();
    let methods = inner_methods();
    assert_eq!(methods.len(), ALLOWED_ROLES.len(), "add new methods to ALLOWED_ROLES");
    let directories = [
        ("station", "tls/line-1-a"),
        ("officer", "tls/officer"),
        ("auditor", "tls/auditor"),
        ("back-office", "tls/back-office"),
        ("monitor", "tls/monitor"),
    ];
    for method in &methods {
        let (_, allowed) = ALLOWED_ROLES.iter().find(|(known, _)| known == method).unwrap();
        let port = if method.contains("Line") { site.line } else { site.officer };
        for (role, directory) in directories {
            let channel = site.connect(port, site.tls(directory)).await.unwrap();
            let refused = call(method, &channel).await.err().map(|status| Refusal::of(&status));
            let wrong_role = refused.as_ref().is_some_and(|refused| refused.is(Code::PermissionDenied, "WRONG_ROLE"));
            assert_eq!(!wrong_role, allowed.contains(&role), "{role} {method}: {refused:?}");
        }
    }
}

/// Calls a method with an empty message.
async fn call(method: &str, channel: &Channel) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.map_err(|e| Status::unavailable(format!("{e:?}")))?;
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    client.unary(tonic::Request::new(()), method.parse().unwrap(), codec).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_method_refuses_unauthenticated_callers() {
    let trusted = Authority::new("Example Second Access CA");
    let site = site_trusting(&trusted);
    site.sppctl("officer enroll o-2 --config sppd.toml --out tls/o-2");
    let methods = inner_methods();
    for (port, method) in [site.line, site.officer].iter().flat_map(|port| methods.iter().map(move |m| (*port, m))) {
        // In TLS 1.3 a client learns only with its first call that the server requires a certificate.
        if let Ok(channel) = site.connect(port, site.public_tls()).await {
            let answer = call(method, &channel).await;
            assert!(refused_by_tls(&answer), "{method}: {answer:?}");
        }
    }
    let mut connected = Vec::new();
    for role in Role::ALL {
        let name = AccessName::Client(Caller::new(role, "x-1").unwrap());
        let connect = async |not_after| {
            let tls = site.public_tls().identity(trusted.identity(&name, not_after));
            let (line, officer) = (site.connect(site.line, tls.clone()).await, site.connect(site.officer, tls).await);
            (line.unwrap(), officer.unwrap())
        };
        let (expiring, revoked) = (connect(now() + SHORT_VALIDITY).await, connect(now() + 600).await);
        let revoke = format!("{role} revoke x-1 --reason test");
        let asked = spp_testkit::officers::sppctl_json(&site, "tls/officer", &revoke);
        spp_testkit::officers::approve(&site, asked["id"].as_str().unwrap());
        connected.push((role, expiring, revoked));
    }
    let not_after = now() + SHORT_VALIDITY;
    eventually("the short-lived certificates have expired", async || now() > not_after).await;
    for (role, expiring, revoked) in connected {
        for ((line, officer), reason) in [(expiring, "UNAUTHENTICATED_CALLER"), (revoked, "REVOKED")] {
            for method in &methods {
                let channel = if method.contains("Line") { &line } else { &officer };
                let refused = Refusal::of(&call(method, channel).await.expect_err(method));
                assert!(refused.is(Code::Unauthenticated, reason), "{role} {method}: {refused:?}");
            }
        }
    }
}

#[tokio::test]
async fn wrong_role_is_refused_by_each_service() {
    let site = Site::running();
    let [line, officer] = call_both(&site, site.tls("tls/line-1-a")).await;
    line.unwrap();
    let refused = Refusal::of(&officer.unwrap_err());
    assert!(refused.is(Code::PermissionDenied, "WRONG_ROLE"), "{refused:?}");

    let mut line = Line::new(site.connect(site.line, site.tls("tls/officer")).await.unwrap());
    let session = Some(Selector::ChipId(chip(1).as_bytes().to_vec()));
    let complete = spp_proto::CompleteRequest { session_id: vec![1; 16], ..Default::default() };
    for refused in [
        line.assemble(phone(1)).await.unwrap_err(),
        line.complete(complete).await.unwrap_err(),
        line.abort(AbortRequest { session_id: vec![1; 16], reason: String::new() }).await.unwrap_err(),
        line.get_session(GetSessionRequest { session }).await.unwrap_err(),
    ] {
        assert!(Refusal::of(&refused).is(Code::PermissionDenied, "WRONG_ROLE"), "{refused:?}");
    }
}

#[tokio::test]
async fn each_listener_serves_only_its_own_services() {
    let site = Site::running();
    let public =
        site.connect(site.public, site.public_tls()).await.expect("the public listener needs no client certificate");
    let mut recovery = RecoveryClient::new(public.clone());
    let record = GetRecordRequest { chip_id: chip(1).as_bytes().to_vec() };
    assert_eq!(recovery.get_record(record).await.unwrap_err().code(), Code::NotFound);
    let on_officer = site.connect(site.officer, site.tls("tls/line-1-a")).await.unwrap();
    let on_line = site.connect(site.line, site.tls("tls/officer")).await.unwrap();
    for refused in [
        Line::new(public.clone()).assemble(phone(1)).await.unwrap_err(),
        Line::new(on_officer).assemble(phone(1)).await.unwrap_err(),
        OfficerClient::new(public).get_status(GetStatusRequest {}).await.unwrap_err(),
        OfficerClient::new(on_line).get_status(GetStatusRequest {}).await.unwrap_err(),
    ] {
        assert_eq!(refused.code(), Code::Unimplemented, "{refused:?}");
    }
    assert_eq!(site.status().await.sessions.unwrap().issued, 0);
}

#[tokio::test]
async fn station_is_confined_to_its_profiles_and_identities() {
    let mut site = Site::new();
    let second =
        "[[station]]\nname = \"line-2/b\"\nprofiles = [\"sensor\", \"phone\"]\nidentities = [\"eui48:00\"]\n\n[log]";
    site.edit("sppd.toml", "[log]", second);
    for name in ["line-2/b", "line-9/z"] {
        let out = name.replace('/', "-");
        site.sppctl(&format!("station enroll {name} --config sppd.toml --out tls/{out}"));
    }
    site.start();
    let (fab, mut first) = (TestFab::new(&site), site.station().await);
    let mut second = Line::new(site.connect(site.line, site.tls("tls/line-2-b")).await.unwrap());
    let mut unknown = Line::new(site.connect(site.line, site.tls("tls/line-9-z")).await.unwrap());

    let answer = assemble(&mut first, &phone(1)).await.unwrap();
    let request = install(&mut fab.device(1), &answer);
    let session = || Some(Selector::SessionId(answer.session_id.clone()));
    let abort = AbortRequest { session_id: answer.session_id.clone(), reason: String::new() };
    let other_profile = AssembleRequest { profile: "gateway".to_owned(), ..phone(2) };
    let gateway_order = spp_testkit::devices::gateway(2, &fab.device(2));
    for station in [&mut second, &mut unknown] {
        for refused in [
            assemble(station, &phone(2)).await.unwrap_err(),
            assemble(station, &phone(1)).await.unwrap_err(),
            assemble(station, &other_profile).await.unwrap_err(),
            assemble(station, &gateway_order).await.unwrap_err(),
            complete(station, &request).await.unwrap_err(),
            station.abort(abort.clone()).await.unwrap_err(),
            station.get_session(GetSessionRequest { session: session() }).await.unwrap_err(),
        ] {
            assert!(Refusal::of(&refused).is(Code::PermissionDenied, "NOT_PERMITTED"), "{refused:?}");
        }
    }
    let device = fab.sealing_device(3, spp_format::package::TransportCurve::P256);
    assemble(&mut second, &sensor(3, &device)).await.expect("an order within the confinement succeeds");
    complete(&mut first, &request).await.expect("the refused calls changed nothing");
}

#[tokio::test]
async fn csr_enrolment_leaves_the_key_with_the_station() {
    let mut site = Site::new();
    site.sppctl("request --out tls/own");
    let key = site.read("tls/own/key.pem");
    site.edit("sppd.toml", "name = \"line-1/a\"", "name = \"line-7/c\"");
    site.sppctl("station enroll line-7/c --config sppd.toml --csr tls/own/request.pem --out tls/answer");
    assert!(!site.path("tls/answer/key.pem").exists(), "enrolment by CSR writes no key");
    for file in ["certificate.pem", "ca.pem"] {
        std::fs::copy(site.path(&format!("tls/answer/{file}")), site.path(&format!("tls/own/{file}"))).unwrap();
    }
    site.start();
    let mut line = Line::new(site.connect(site.line, site.tls("tls/own")).await.unwrap());
    assemble(&mut line, &phone(1)).await.unwrap();
    assert_eq!(site.read("tls/own/key.pem"), key);
    for (arguments, expected) in [
        ("request --out tls/own", "is never overwritten"),
        ("station enroll x --config sppd.toml --csr tls/own/key.pem --out tls/x", "expected CERTIFICATE REQUEST"),
        ("station enroll x --config sppd.toml --csr tls/none.pem --out tls/x", "tls/none.pem: No such file"),
    ] {
        let output = site.try_sppctl(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(expected), "{arguments}: {error}");
    }
    // A CSR that was changed in transit no longer verifies under its own key.
    let request = String::from_utf8(site.read("tls/own/request.pem")).unwrap();
    let (label, mut der) = der::pem::decode_vec(request.as_bytes()).unwrap();
    *der.last_mut().unwrap() ^= 1;
    let changed = der::pem::encode_string(label, der::pem::LineEnding::LF, &der).unwrap();
    std::fs::write(site.path("changed.pem"), changed).unwrap();
    let output = site.try_sppctl("station enroll x --config sppd.toml --csr changed.pem --out tls/x");
    assert!(String::from_utf8_lossy(&output.stderr).contains("not signed by its own key"), "{output:?}");
}

#[tokio::test]
async fn silent_connections_time_out_and_delay_no_caller() {
    let site = Site::running();
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(tokio::net::TcpStream::connect(("127.0.0.1", site.line)).await.unwrap());
    }
    assemble(&mut site.station().await, &phone(1)).await.expect("pending handshakes do not delay other callers");
    for mut stream in silent {
        let mut byte = [0; 1];
        let read = tokio::io::AsyncReadExt::read(&mut stream, &mut byte);
        let ended = tokio::time::timeout(Duration::from_secs(20), read).await;
        assert!(matches!(ended, Ok(Ok(0) | Err(_))), "{ended:?}");
    }
}
