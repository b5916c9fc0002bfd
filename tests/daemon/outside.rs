//! Interoperability: OpenSSL verifies the certificates; standard gRPC health and reflection clients work.

use spp_format::certificate::certificate_pem;
use spp_format::package::CertificateChain;
use tokio_stream::{StreamExt as _, once};
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use spp_testkit::devices::{TestFab, assemble, gateway, install, phone};
use spp_testkit::process::{Signal, send};
use spp_testkit::site::Site;
use spp_testkit::wait::eventually;

#[tokio::test]
async fn certificates_and_chains_verify_with_openssl() {
    let site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    for (n, order) in [(1, phone(1)), (2, gateway(2, &fab.device(2)))] {
        let answer = assemble(&mut line, &order).await.unwrap();
        let mut device = fab.device(n);
        install(&mut device, &answer);
        let CertificateChain::X509 { device: certificate, issuers } = device.package().unwrap().certificate else {
            panic!("{} has an X.509 certificate", order.profile)
        };
        assert_eq!(certificate, answer.certificate);
        std::fs::write(site.path("device.pem"), certificate_pem(&certificate).unwrap()).unwrap();
        let chain: String = issuers.iter().map(|der| certificate_pem(der).unwrap()).collect();
        std::fs::write(site.path("chain.pem"), chain).unwrap();
        for roots in ["keys/manufacturer-ca.pem", "chain.pem"] {
            let verified = site.openssl(&format!("verify -x509_strict -CAfile {roots} device.pem"));
            assert!(verified.contains("device.pem: OK"), "{verified}");
        }
        let text = site.openssl("x509 -in device.pem -noout -text");
        assert!(text.contains("Dec 31 23:59:59 9999 GMT") && text.contains("Digital Signature"), "{text}");
        if order.profile == "phone" {
            let (tac, snr) = order.identity["imei:".len()..].split_at(8);
            assert!(text.contains(&format!("URI:urn:gsma:imei:{tac}-{}-0", &snr[..6])), "{text}");
        }
    }
    let verified =
        site.openssl("verify -x509_strict -CAfile keys/access-ca.pem -purpose sslserver tls/server/certificate.pem");
    assert!(verified.contains("OK"), "{verified}");
}

async fn health(channel: &Channel, service: &str) -> ServingStatus {
    let request = HealthCheckRequest { service: service.to_owned() };
    HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner().status()
}

async fn wait_for_health(channel: &Channel, service: &str, expected: ServingStatus) {
    eventually(&format!("{service} is {expected:?}"), async || health(channel, service).await == expected).await;
}

#[tokio::test]
async fn line_health_follows_the_hsm_and_recovery_stays_serving() {
    let site = Site::running();
    let line = site.connect(site.line, site.tls("tls/line-1-a")).await.unwrap();
    let public = site.connect(site.public, site.public_tls()).await.unwrap();
    for service in ["", "spp.v1.Line", "spp.v1.Officer", "spp.v1.Production", "spp.v1.Recovery"] {
        assert_eq!(health(&line, service).await, ServingStatus::Serving, "{service}");
        assert_eq!(health(&public, service).await, ServingStatus::Serving, "{service}");
    }
    std::fs::rename(site.path("hsm/tokens"), site.path("hsm/elsewhere")).unwrap();
    send(site.worker_pid().unwrap(), Signal::KILL);
    wait_for_health(&line, "spp.v1.Line", ServingStatus::NotServing).await;
    for service in ["", "spp.v1.Recovery"] {
        assert_eq!(health(&public, service).await, ServingStatus::Serving, "{service}");
    }
    let status = site.status().await;
    assert!(!status.ready);
    let missing = |service: &str| -> Vec<_> {
        let service = status.services.iter().find(|status| status.service == service).unwrap();
        service.missing.iter().map(|missing| missing.dependency.as_str()).collect()
    };
    assert_eq!((missing("spp.v1.Line"), missing("spp.v1.Recovery")), (vec!["hsm"], vec![]));
    assert_eq!(missing("spp.v1.Officer"), Vec::<&str>::new());
    std::fs::rename(site.path("hsm/elsewhere"), site.path("hsm/tokens")).unwrap();
    wait_for_health(&line, "spp.v1.Line", ServingStatus::Serving).await;
    assemble(&mut site.station().await, &phone(1)).await.expect("Line serves again without a restart");
    let unknown = HealthCheckRequest { service: "spp.v1.Coffee".to_owned() };
    let refused = HealthClient::new(line).check(unknown).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn reflection_lists_the_services() {
    let site = Site::running();
    let channel = site.connect(site.public, site.public_tls()).await.unwrap();
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers =
        ServerReflectionClient::new(channel).server_reflection_info(once(request)).await.unwrap().into_inner();
    let answer = answers.next().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(listed)) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = listed.service.into_iter().map(|service| service.name).collect();
    for service in ["spp.v1.Line", "spp.v1.Officer", "spp.v1.Production", "spp.v1.Recovery", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|name| name == service), "{service} is missing in {names:?}");
    }
}
