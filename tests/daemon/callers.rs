//! Who may call what: a certificate of the right authority, in its time, with one name of the right role.

use std::time::Duration;

use prost::Message as _;
use spp::certificate::{AccessName, Caller, Role};
use spp::proto::get_session_request::Session as Which;
use spp::proto::officer_client::OfficerClient;
use spp::proto::recovery_client::RecoveryClient;
use spp::proto::{AbortRequest, AssembleRequest, GetRecordRequest, GetSessionRequest, GetStatusRequest};
use tonic::transport::{Channel, ClientTlsConfig};
use tonic::{Code, Status};

use spp_testkit::authority::*;
use spp_testkit::floor::{Floor, Line, Refusal, assemble, chip, complete, install, phone, sensor};
use spp_testkit::site::Site;
use spp_testkit::wait::eventually;

/// A site whose daemon trusts a second authority besides its own.
fn site_that_trusts(authority: &Authority) -> Site {
    let mut site = Site::new();
    let both = [site.read("keys/access-ca.pem"), authority.pem.clone().into_bytes()].concat();
    std::fs::write(site.path("tls/clients.pem"), both).unwrap();
    site.edit("sppd.toml", "client_ca = \"keys/access-ca.pem\"", "client_ca = \"tls/clients.pem\"");
    site.start();
    site
}

/// One call on each of the two inner services with this TLS configuration.
async fn call_both(site: &Site, tls: ClientTlsConfig) -> [Result<(), Status>; 2] {
    let broken = |e: tonic::transport::Error| Status::unavailable(format!("{e:?}"));
    let line = match site.connect(site.line, tls.clone()).await {
        Ok(channel) => assemble(&mut Line::new(channel), &phone(1)).await.map(drop),
        Err(e) => Err(broken(e)),
    };
    let officer = match site.connect(site.officer, tls).await {
        Ok(channel) => OfficerClient::new(channel).get_status(GetStatusRequest {}).await.map(drop),
        Err(e) => Err(broken(e)),
    };
    [line, officer]
}

#[tokio::test]
async fn a_caller_without_a_certificate_of_the_right_authority_does_not_get_through_tls() {
    let trusted = Authority::new("Example Second Access CA");
    let site = site_that_trusts(&trusted);
    let foreign = Authority::new("Example Devices Access CA");
    let server = AccessName::Server { dns: vec!["localhost".to_owned()], ips: Vec::new() };
    let with = |identity| site.public_tls().identity(identity);
    for (what, tls) in [
        ("no certificate", site.public_tls()),
        ("a foreign authority of the same name", with(foreign.identity(&station("line-1/a"), now() + 600))),
        ("an expired certificate", with(trusted.identity(&station("line-1/a"), now() - 60))),
        ("a server's certificate", with(trusted.identity(&server, now() + 600))),
    ] {
        for answer in call_both(&site, tls).await {
            assert!(refused_by_tls(&answer), "{what}: {answer:?}");
        }
    }
    let [line, _] = call_both(&site, with(trusted.identity(&station("line-1/a"), now() + 600))).await;
    line.expect("the second authority's station is let in");
    assert_eq!(site.status().await.sessions.unwrap().issued, 1);
}

#[tokio::test]
async fn a_certificate_without_exactly_one_name_is_nobodys() {
    let trusted = Authority::new("Example Second Access CA");
    let site = site_that_trusts(&trusted);
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
            assert!(refused.is(Code::Unauthenticated, "NO_CALLER"), "{names}: {refused:?}");
        }
    }
    assert_eq!(site.status().await.sessions.unwrap().issued, 0);
}

/// Seconds until a certificate ends: enough to connect with it on a busy machine.
const SOON: u64 = 10;

#[tokio::test]
async fn a_connection_does_not_outlive_its_certificate() {
    let trusted = Authority::new("Example Second Access CA");
    let site = site_that_trusts(&trusted);
    let not_after = now() + SOON;
    let tls = site.public_tls().identity(trusted.identity(&station("line-1/a"), not_after));
    let mut line = Line::new(site.connect(site.line, tls).await.unwrap());
    assemble(&mut line, &phone(1)).await.expect("in its time it works");
    eventually("the certificate has ended", async || now() > not_after).await;
    let refused = Refusal::of(&assemble(&mut line, &phone(1)).await.unwrap_err());
    assert!(refused.is(Code::Unauthenticated, "NO_CALLER"), "{refused:?}");
}

/// Who is let in to each method, of the five roles: as in DESIGN, and told a second time on purpose.
const MAY: &[(&str, &[&str])] = &[
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

/// The methods of the two inner services, as the daemon describes them.
fn inner_methods() -> Vec<String> {
    let files = prost_types::FileDescriptorSet::decode(spp::proto::DESCRIPTORS).unwrap().file;
    let services = files.iter().flat_map(|file| file.service.iter().map(move |service| (file.package(), service)));
    let inner = services.filter(|(_, service)| service.name() != "Recovery");
    let methods = |(package, service): (&str, &prost_types::ServiceDescriptorProto)| -> Vec<String> {
        service.method.iter().map(|method| format!("/{package}.{}/{}", service.name(), method.name())).collect()
    };
    inner.flat_map(methods).collect()
}

#[tokio::test]
async fn every_method_serves_the_roles_of_the_table_alone() {
    let mut site = Site::new();
    for role in ["auditor", "back-office", "monitor"] {
        site.sppctl(&format!("{role} enroll x-1 --config sppd.toml --out tls/{role}"));
    }
    site.start();
    let methods = inner_methods();
    assert_eq!(methods.len(), MAY.len(), "a new method belongs into this test");
    let directories = [
        ("station", "tls/line-1-a"),
        ("officer", "tls/officer"),
        ("auditor", "tls/auditor"),
        ("back-office", "tls/back-office"),
        ("monitor", "tls/monitor"),
    ];
    for method in &methods {
        let (_, may) = MAY.iter().find(|(known, _)| known == method).unwrap();
        let port = if method.contains("Line") { site.line } else { site.officer };
        for (role, directory) in directories {
            let channel = site.connect(port, site.tls(directory)).await.unwrap();
            let refused = call(method, &channel).await.err().map(|status| Refusal::of(&status));
            let wrong_role = refused.as_ref().is_some_and(|refused| refused.is(Code::PermissionDenied, "WRONG_ROLE"));
            assert_eq!(!wrong_role, may.contains(&role), "{role} {method}: {refused:?}");
        }
    }
}

/// What a method says to an empty message.
async fn call(method: &str, channel: &Channel) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.map_err(|e| Status::unavailable(format!("{e:?}")))?;
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    client.unary(tonic::Request::new(()), method.parse().unwrap(), codec).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_method_refuses_nobody_the_expired_and_the_revoked() {
    let trusted = Authority::new("Example Second Access CA");
    let site = site_that_trusts(&trusted);
    site.sppctl("officer enroll o-2 --config sppd.toml --out tls/o-2");
    let methods = inner_methods();
    for (port, method) in [site.line, site.officer].iter().flat_map(|port| methods.iter().map(move |m| (*port, m))) {
        // TLS 1.3 tells a client only with its first call that it lacks a certificate.
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
        let (short, long) = (connect(now() + SOON).await, connect(now() + 600).await);
        let revoke = format!("{role} revoke x-1 --reason test");
        let asked = spp_testkit::officers::told(&site, "tls/officer", &revoke);
        spp_testkit::officers::approve(&site, asked["id"].as_str().unwrap());
        connected.push((role, short, long));
    }
    let not_after = now() + SOON;
    eventually("the short certificates have ended", async || now() > not_after).await;
    for (role, short, long) in connected {
        for ((line, officer), reason) in [(short, "NO_CALLER"), (long, "REVOKED")] {
            for method in &methods {
                let channel = if method.contains("Line") { &line } else { &officer };
                let refused = Refusal::of(&call(method, channel).await.expect_err(method));
                assert!(refused.is(Code::Unauthenticated, reason), "{role} {method}: {refused:?}");
            }
        }
    }
}

#[tokio::test]
async fn each_service_serves_its_role_alone() {
    let site = Site::running();
    let [line, officer] = call_both(&site, site.tls("tls/line-1-a")).await;
    line.unwrap();
    let refused = Refusal::of(&officer.unwrap_err());
    assert!(refused.is(Code::PermissionDenied, "WRONG_ROLE"), "{refused:?}");

    let mut line = Line::new(site.connect(site.line, site.tls("tls/officer")).await.unwrap());
    let session = Some(Which::ChipId(chip(1).as_bytes().to_vec()));
    let complete = spp::proto::CompleteRequest { session_id: vec![1; 16], ..Default::default() };
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
async fn each_listener_has_its_services_alone() {
    let site = Site::running();
    let public = site.connect(site.public, site.public_tls()).await.expect("the public needs no certificate");
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
async fn a_station_works_on_its_profiles_and_identities_alone() {
    let mut site = Site::new();
    let second =
        "[[station]]\nname = \"line-2/b\"\nprofiles = [\"sensor\", \"phone\"]\nidentities = [\"eui48:00\"]\n\n[log]";
    site.edit("sppd.toml", "[log]", second);
    for name in ["line-2/b", "line-9/z"] {
        let out = name.replace('/', "-");
        site.sppctl(&format!("station enroll {name} --config sppd.toml --out tls/{out}"));
    }
    site.start();
    let (floor, mut first) = (Floor::new(&site), site.station().await);
    let mut second = Line::new(site.connect(site.line, site.tls("tls/line-2-b")).await.unwrap());
    let mut unknown = Line::new(site.connect(site.line, site.tls("tls/line-9-z")).await.unwrap());

    let answer = assemble(&mut first, &phone(1)).await.unwrap();
    let request = install(&mut floor.device(1), &answer);
    let session = || Some(Which::SessionId(answer.session_id.clone()));
    let abort = AbortRequest { session_id: answer.session_id.clone(), reason: String::new() };
    let other_profile = AssembleRequest { profile: "gateway".to_owned(), ..phone(2) };
    let gateway_order = spp_testkit::floor::gateway(2, &floor.device(2));
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
    let device = floor.sealing(3, spp::package::TransportCurve::P256);
    assemble(&mut second, &sensor(3, &device)).await.expect("within its confinement it works");
    complete(&mut first, &request).await.expect("nothing was changed by the others");
}

#[tokio::test]
async fn a_stations_key_stays_where_it_was_made() {
    let mut site = Site::new();
    site.sppctl("request --out tls/own");
    let key = site.read("tls/own/key.pem");
    site.edit("sppd.toml", "name = \"line-1/a\"", "name = \"line-7/c\"");
    site.sppctl("station enroll line-7/c --config sppd.toml --csr tls/own/request.pem --out tls/answer");
    assert!(!site.path("tls/answer/key.pem").exists(), "whoever enrols has no key");
    for file in ["certificate.pem", "ca.pem"] {
        std::fs::copy(site.path(&format!("tls/answer/{file}")), site.path(&format!("tls/own/{file}"))).unwrap();
    }
    site.start();
    let mut line = Line::new(site.connect(site.line, site.tls("tls/own")).await.unwrap());
    assemble(&mut line, &phone(1)).await.unwrap();
    assert_eq!(site.read("tls/own/key.pem"), key);
    for (words, what) in [
        ("request --out tls/own", "nothing is overwritten"),
        ("station enroll x --config sppd.toml --csr tls/own/key.pem --out tls/x", "not a CERTIFICATE REQUEST"),
        ("station enroll x --config sppd.toml --csr tls/none.pem --out tls/x", "tls/none.pem: No such file"),
    ] {
        let output = site.try_sppctl(words);
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && why.contains(what), "{words}: {why}");
    }
    // A request that was changed on its way is not signed by its key any more.
    let request = String::from_utf8(site.read("tls/own/request.pem")).unwrap();
    let (label, mut der) = der::pem::decode_vec(request.as_bytes()).unwrap();
    *der.last_mut().unwrap() ^= 1;
    let changed = der::pem::encode_string(label, der::pem::LineEnding::LF, &der).unwrap();
    std::fs::write(site.path("changed.pem"), changed).unwrap();
    let output = site.try_sppctl("station enroll x --config sppd.toml --csr changed.pem --out tls/x");
    assert!(String::from_utf8_lossy(&output.stderr).contains("not signed by its own key"), "{output:?}");
}

#[tokio::test]
async fn whoever_says_nothing_holds_up_nobody_and_is_sent_away() {
    let site = Site::running();
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(tokio::net::TcpStream::connect(("127.0.0.1", site.line)).await.unwrap());
    }
    assemble(&mut site.station().await, &phone(1)).await.expect("their handshakes are waited for by nobody else");
    for mut stream in silent {
        let mut byte = [0; 1];
        let read = tokio::io::AsyncReadExt::read(&mut stream, &mut byte);
        let ended = tokio::time::timeout(Duration::from_secs(20), read).await;
        assert!(matches!(ended, Ok(Ok(0) | Err(_))), "{ended:?}");
    }
}
