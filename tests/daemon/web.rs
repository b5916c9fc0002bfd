//! The public listener over HTTP: records, proofs and the log, and rate limits. `tests/pages` tests the web pages in a browser.

use std::sync::Arc;

use spp_format::tlog::{LogKey, LogProof, SignedCheckpoint};
use spp_proto::get_proof_request::Record;
use spp_proto::{GetCheckpointRequest, GetProofRequest, GetRecordRequest};
use tonic::Code;
use tonic_types::StatusExt as _;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

use spp_testkit::devices::{TestFab, assemble, chip, phone, provision};
use spp_testkit::site::Site;

/// An HTTP client of the public listener.
pub struct Reader {
    agent: ureq::Agent,
    prefix: String,
}

pub struct Answer {
    pub status: u16,
    pub headers: ureq::http::HeaderMap,
    pub body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

impl Reader {
    pub fn of(site: &Site) -> Self {
        let authority = site.read("keys/access-ca.pem");
        let certificates = parse_pem(&authority).filter_map(|item| match item.unwrap() {
            PemItem::Certificate(certificate) => Some(certificate),
            _ => None,
        });
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::Specific(Arc::new(certificates.collect())))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .build();
        let config = ureq::Agent::config_builder().tls_config(tls).http_status_as_error(false).max_redirects(0);
        Self { agent: config.build().into(), prefix: format!("https://localhost:{}", site.public) }
    }

    pub fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        let request = self.agent.get(format!("{}{path}", self.prefix));
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        tokio::task::block_in_place(|| {
            let mut answer = request.call().unwrap();
            let body = answer.body_mut().read_to_vec().unwrap();
            Answer { status: answer.status().as_u16(), headers: answer.headers().clone(), body }
        })
    }
}

pub fn log_key(site: &Site) -> LogKey {
    String::from_utf8(site.read("keys/log-1.vkey")).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn record_is_served_as_json_cbor_pem_with_etag() {
    let site = Site::running();
    let (fab, reader) = (TestFab::new(&site), Reader::of(&site));
    provision(&mut site.station().await, &mut fab.device(1), &phone(1)).await;
    let known = GetRecordRequest { chip_id: chip(1).as_bytes().to_vec() };
    let known = site.recovery().await.get_record(known).await.unwrap().into_inner();
    let path = format!("/v1/devices/{}", chip(1));

    let json = reader.get(&path, &[]);
    assert_eq!((json.status, json.header("content-type")), (200, "application/json"));
    let value: serde_json::Value = serde_json::from_slice(&json.body).unwrap();
    assert_eq!(value["identity"], phone(1).identity);
    assert_eq!(value["record_hash"], hex::encode(&known.receipt.as_ref().unwrap().record_hash));
    let cbor = reader.get(&path, &[("accept", "application/cbor")]);
    assert_eq!((cbor.header("content-type"), &cbor.body), ("application/cbor", &known.record_bytes));
    let pem = reader.get(&path, &[("accept", "text/html;q=0.9, application/x-pem-file")]);
    assert!(pem.body.starts_with(b"-----BEGIN CERTIFICATE-----"));
    assert_eq!(reader.get(&path, &[("accept", "image/png")]).status, 406);
    assert_eq!(
        reader.get(&path.to_uppercase().replace("/V1/DEVICES", "/v1/devices"), &[]).status,
        200,
        "upper-case hex is accepted"
    );

    for form in [&json, &cbor, &pem] {
        let (tag, kind) = (form.header("etag"), form.header("content-type"));
        assert!(form.header("cache-control").contains("max-age") && form.header("vary").contains("accept"), "{kind}");
        let again = reader.get(&path, &[("accept", kind), ("if-none-match", tag)]);
        assert_eq!((again.status, again.body.len(), again.header("etag")), (304, 0, tag), "{kind}");
    }
    assert_ne!(json.header("etag"), cbor.header("etag"), "each form has its own ETag");
    assert_eq!(json.header("x-content-type-options"), "nosniff");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proofs_and_checkpoints_match_over_grpc_and_http() {
    let site = Site::running();
    let (fab, reader, key) = (TestFab::new(&site), Reader::of(&site), log_key(&site));
    let mut line = site.station().await;
    for n in 1..=3 {
        provision(&mut line, &mut fab.device(n), &phone(n)).await;
    }
    let mut recovery = site.recovery().await;
    for n in 1..=3 {
        let record = GetRecordRequest { chip_id: chip(n).as_bytes().to_vec() };
        let record = recovery.get_record(record).await.unwrap().into_inner();
        let index = record.receipt.unwrap().record_index;
        let by_chip = GetProofRequest { record: Some(Record::ChipId(chip(n).as_bytes().to_vec())) };
        let by_chip = recovery.get_proof(by_chip).await.unwrap().into_inner();
        let by_index = GetProofRequest { record: Some(Record::RecordIndex(index)) };
        assert_eq!(recovery.get_proof(by_index).await.unwrap().into_inner(), by_chip);
        let over_http = reader.get(&format!("/v1/devices/{}/proof", chip(n)), &[]);
        assert_eq!(over_http.body, by_chip.tlog_proof);
        let proven = LogProof::from_bytes(&over_http.body).unwrap().verify(&record.record_bytes, &key).unwrap();
        assert_eq!((proven.index, proven.checkpoint.size()), (index, 3));
    }
    let checkpoint = recovery.get_checkpoint(GetCheckpointRequest {}).await.unwrap().into_inner();
    let over_http = reader.get("/checkpoint", &[]);
    assert_eq!(
        (over_http.header("content-type"), &over_http.body),
        ("text/plain; charset=utf-8", &checkpoint.checkpoint)
    );
    let verified = SignedCheckpoint::verify(&over_http.body, &key).unwrap();
    assert_eq!((verified.size(), verified.root().to_vec()), (checkpoint.size, checkpoint.root_hash));
    let beyond = recovery.get_proof(GetProofRequest { record: Some(Record::RecordIndex(3)) }).await.unwrap_err();
    assert_eq!(beyond.code(), Code::NotFound);
    let nothing = recovery.get_proof(GetProofRequest { record: None }).await.unwrap_err();
    assert_eq!(nothing.code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiles_are_served_as_specified() {
    let site = Site::running();
    let (fab, reader) = (TestFab::new(&site), Reader::of(&site));
    let mut line = site.station().await;
    for n in 1..=3 {
        provision(&mut line, &mut fab.device(n), &phone(n)).await;
    }
    for width in 1..=3 {
        for path in [format!("/tile/0/000.p/{width}"), format!("/tile/entries/000.p/{width}")] {
            let tile = reader.get(&path, &[]);
            assert_eq!((tile.status, tile.header("content-type")), (200, "application/octet-stream"), "{path}");
            assert!(tile.header("cache-control").contains("immutable"), "{path}");
        }
    }
    assert_eq!(reader.get("/tile/0/000.p/3", &[]).body.len(), 96);
    for path in [
        "/tile/0/000",
        "/tile/0/000.p/4",
        "/tile/0/000.p/0",
        "/tile/0/001",
        "/tile/1/000.p/1",
        "/tile/entries/000",
        "/tile/entries/000.p/4",
        "/tile/8/0/000",
        "/tile/data/000",
        "/tile/0/../../store.toml",
        "/tile/0/%2e%2e/store.toml",
        "/tile/entries/..%2f..%2fstore.toml",
        "/tile/",
        "/tile/64/000",
    ] {
        assert_eq!(reader.get(path, &[]).status, 404, "{path}");
    }
    let zipped = reader.get("/tile/entries/000.p/3", &[("accept-encoding", "gzip")]);
    // The client decompresses the body and removes the encoding header; the missing length shows that the body was compressed.
    assert_eq!(zipped.header("content-length"), "");
    assert_eq!(zipped.body, reader.get("/tile/entries/000.p/3", &[("accept-encoding", "identity")]).body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_and_pending_chips_get_identical_answers() {
    let site = Site::running();
    let (fab, reader) = (TestFab::new(&site), Reader::of(&site));
    let mut line = site.station().await;
    provision(&mut line, &mut fab.device(1), &phone(1)).await;
    // One chip is being provisioned, the others are unknown: minimum and maximum length, a prefix and an extension of a known ID.
    assemble(&mut line, &phone(2)).await.unwrap();
    let known = chip(1).as_bytes().to_vec();
    let unknown =
        [chip(2).as_bytes().to_vec(), vec![7; 8], vec![9; 64], known[..8].to_vec(), [&known[..], &[0]].concat()];
    let mut recovery = site.recovery().await;
    let mut answers = Vec::new();
    for chip_id in unknown {
        let path = hex::encode(&chip_id);
        let over_http =
            [reader.get(&format!("/v1/devices/{path}"), &[]), reader.get(&format!("/v1/devices/{path}/proof"), &[])];
        let over_http = over_http.map(|answer| {
            let length: usize = answer.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
            (answer.status, length, answer.body)
        });
        let status = recovery.get_record(GetRecordRequest { chip_id }).await.unwrap_err();
        answers.push((over_http, status.code(), status.message().to_owned(), status.details().to_vec()));
    }
    assert_eq!((answers[0].0[0].0, answers[0].1), (404, Code::NotFound));
    assert!(answers.iter().all(|one| *one == answers[0]), "{answers:?}");

    for list in ["/v1/devices", "/v1/devices/", "/devices/", "/chip", "/chip/", "/chip/abc"] {
        assert_ne!(reader.get(list, &[]).status, 200, "{list}");
    }
    let (short, wrong) = (reader.get("/v1/devices/c4c4", &[]), reader.get("/v1/devices/xyz", &[]));
    assert_eq!((short.status, wrong.status), (400, 400));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rate_limited_address_gets_retry_after() {
    let mut site = Site::new();
    site.edit("sppd.toml", "requests_per_second = 100\nburst = 400", "requests_per_second = 1\nburst = 5");
    site.start();
    let (fab, reader) = (TestFab::new(&site), Reader::of(&site));
    let answers: Vec<_> = (0..8).map(|_| reader.get("/checkpoint", &[])).collect();
    let refused: Vec<_> = answers.iter().filter(|answer| answer.status == 429).collect();
    assert!((2..=3).contains(&refused.len()), "{}", refused.len());
    assert!(refused.iter().all(|answer| (1..=2).contains(&answer.header("retry-after").parse().unwrap())));
    let status = site.recovery().await.get_record(GetRecordRequest { chip_id: vec![7; 8] }).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.get_error_details().retry_info().is_some_and(|retry| retry.retry_delay.is_some()));
    assert_eq!(status.get_error_details().error_info().unwrap().reason, "RATE_LIMITED");
    provision(&mut site.station().await, &mut fab.device(1), &phone(1)).await;
}
