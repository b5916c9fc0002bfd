//! Runs against an in-memory SPP with injected faults.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use spp_device::SimulatedFab;
use spp_format::certificate::{
    AuthorityCertificate, CertificateRequest, CertificateSerial, IssuedCertificate, IssuerCertificate, Profile,
    SubjectName, authority_certificate, prepare,
};
use spp_format::keys::{DevicePrivateKey, SignatureAlgorithm, generate_p256, sha256};
use spp_format::names::{ChipId, SessionId};
use spp_format::package::{CertificateChain, DataPackage};
use spp_proto::assemble_response::Delivery;
use spp_proto::get_session_request::Session as Which;
use spp_proto::line_server::{Line, LineServer};
use spp_proto::{
    AbortRequest, AbortResponse, AssembleRequest, AssembleResponse, CompleteRequest, CompleteResponse,
    GetSessionRequest, GetSessionResponse, Receipt, SessionState,
};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::client::StationClient;
use super::device_flow::Station;
use super::orders::{self, Order};
use super::pipeline::{Run, run};
use super::retry::RetryPolicy;
use super::run_log::{RunLog, RunResult, flashes};

const P256: SignatureAlgorithm = SignatureAlgorithm::EcdsaP256Sha256;
const PROFILE: &str = r#"
identities = ["imei"]
hardware_type = "1.3.6.1.4.1.32473.1.7"
issuer = "manufacturer"
key_pair.source = "generate"
key_pair.kind = "p256"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn lost_replies_yield_one_receipt_per_device() {
    let site = Site::new().await;
    // Of three calls, one succeeds, one fails before execution, one loses its reply.
    let pattern = [Fault::None, Fault::Refuse(Code::Unavailable), Fault::LoseReply];
    site.spp.plan(pattern.into_iter().cycle().take(90));
    let result = site.run(40).await;
    assert_eq!((result.summary.done, result.summary.failed, result.summary.retries), (40, 0, 60));
    assert_eq!(site.spp.published(), 40);
    assert_eq!(flashes(site.directory.path()).unwrap().len(), 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn complete_device_skipped_or_found_without_journal() {
    let site = Site::new().await;
    site.run(10).await;
    let again = site.run(12).await;
    assert_eq!((again.summary.skipped, again.summary.done), (10, 2));
    std::fs::write(site.directory.path().join("line.jsonl"), "half a li").unwrap();
    let found = site.run(12).await;
    assert_eq!((found.summary.found, found.summary.done, found.summary.failed), (12, 0, 0));
    assert_eq!(site.run(12).await.summary.skipped, 12);
    assert_eq!(site.spp.published(), 12);
}

#[tokio::test(flavor = "multi_thread")]
async fn run_interrupted_between_calls_resumes() {
    let site = Site::new().await;
    // Every Assemble succeeds, every Complete fails permanently.
    site.spp.plan((0..5).flat_map(|_| [Fault::None, Fault::Refuse(Code::Internal)]));
    let first = site.run_with(5, 1).await;
    assert_eq!((first.summary.done, first.summary.failed), (0, 5));
    assert!(first.failures[0].contains("Complete: INTERNAL"), "{:?}", first.failures);
    let before = site.spp.sessions();
    let second = site.run(5).await;
    assert_eq!((second.summary.done, second.summary.failed), (5, 0));
    assert_eq!(site.spp.sessions(), before, "the same sessions continue");
}

#[tokio::test(flavor = "multi_thread")]
async fn complete_device_with_empty_flash_needs_recovery() {
    let site = Site::new().await;
    site.run(3).await;
    let chip = site.orders(3)[1].chip.clone();
    SimulatedFab::open(site.directory.path()).unwrap().device(&chip, None).unwrap().wipe().unwrap();
    for journal in [None, Some("")] {
        if let Some(text) = journal {
            std::fs::write(site.directory.path().join("line.jsonl"), text).unwrap();
        }
        let result = site.run(3).await;
        assert_eq!(result.summary.failed, 1);
        let failure = &result.failures[0];
        assert!(failure.contains(&format!("its flash is empty; run: spp-line recover --chip {chip}")), "{failure}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rejection_reported_once_with_fields() {
    let site = Site::new().await;
    site.spp.plan([Fault::Refuse(Code::InvalidArgument)]);
    let result = site.run_with(2, 1).await;
    assert_eq!((result.summary.done, result.summary.failed, result.summary.retries), (1, 1, 0));
    assert!(
        result.failures[0].ends_with("Assemble: INVALID_ARGUMENT: as planned; identity: wrong"),
        "{:?}",
        result.failures
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn conflicting_order_fails_with_error_of_assemble() {
    let site = Site::new().await;
    site.run(1).await;
    let identity = site.orders(1)[0].identity.clone();
    let conflicting =
        Order { chip: ChipId::from_bytes(&[9; 16]).unwrap(), identity, profile: "phone".parse().unwrap() };
    let result = site.run_orders(vec![conflicting], 1).await;
    assert_eq!(result.summary.failed, 1);
    assert!(result.failures[0].contains("ALREADY_EXISTS: the identity is taken"), "{:?}", result.failures);
    // The same chip ordered with another profile does not count as complete.
    let other = Order { profile: "tablet".parse().unwrap(), ..site.orders(1)[0].clone() };
    let result = site.run_orders(vec![other], 1).await;
    assert!(result.failures[0].contains("ALREADY_EXISTS: the chip is taken"), "{:?}", result.failures);
}

#[tokio::test(flavor = "multi_thread")]
async fn run_stops_when_daemon_unavailable() {
    let site = Site::new().await;
    site.spp.plan(std::iter::repeat_n(Fault::Refuse(Code::Unavailable), 10_000));
    let result = site.run_with(50, 2).await;
    assert_eq!((result.summary.failed, result.summary.not_begun), (2, 48));
    site.spp.plan([]);
    assert_eq!(site.run(50).await.summary.done, 50);
}

/// A directory of devices and an SPP for them.
struct Site {
    directory: TempDir,
    spp: Arc<Spp>,
    channel: Channel,
}

impl Site {
    async fn new() -> Self {
        let directory = spp_test_support::files::temp_dir();
        let spp = Arc::new(Spp::new());
        SimulatedFab::create(directory.path(), spp.manufacturer.public().clone(), None).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let service = LineServer::new(SppService(Arc::clone(&spp)));
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)));
        let channel = Endpoint::from_shared(address).unwrap().connect_lazy();
        Self { directory, spp, channel }
    }

    fn orders(&self, count: usize) -> Vec<Order> {
        let profile = "phone".parse().unwrap();
        orders::simulate(self.directory.path(), count, &profile, &"imei".parse().unwrap()).unwrap()
    }

    async fn run(&self, count: usize) -> RunResult {
        self.run_with(count, 8).await
    }

    async fn run_with(&self, count: usize, parallel: usize) -> RunResult {
        self.run_orders(self.orders(count), parallel).await
    }

    async fn run_orders(&self, orders: Vec<Order>, parallel: usize) -> RunResult {
        let retry_policy = RetryPolicy { deadline: Duration::from_secs(5), retry_for: Duration::from_secs(2) };
        let fab = Arc::new(SimulatedFab::open(self.directory.path()).unwrap());
        let station = Station { fab, sealed: None, own_key_pair: false };
        let clients = vec![StationClient::new(self.channel.clone(), retry_policy)];
        let run_log = RunLog::open(self.directory.path(), None).unwrap();
        run(Run { station, clients, orders, parallel, run_log }).await.unwrap()
    }
}

/// A fault to inject into a call.
#[derive(Clone, Copy)]
enum Fault {
    None,
    Refuse(Code),
    LoseReply,
}

/// An SPP without HSM and disk.
struct Spp {
    manufacturer: DevicePrivateKey,
    issuer: IssuerCertificate,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    faults: VecDeque<Fault>,
    sessions: HashMap<Vec<u8>, SessionEntry>,
    published: u64,
}

struct SessionEntry {
    order: AssembleRequest,
    response: AssembleResponse,
    receipt: Option<Receipt>,
}

impl Spp {
    fn new() -> Self {
        let manufacturer = generate_p256().unwrap();
        let unsigned = authority_certificate(&AuthorityCertificate {
            subject: &SubjectName::with_common_name("Manufacturer").unwrap(),
            public_key: manufacturer.public(),
            algorithm: P256,
            serial: CertificateSerial::from_random([7; 20]),
            not_before: 1_700_000_000,
            not_after: None,
        })
        .unwrap();
        let signature = manufacturer.sign(P256, unsigned.to_be_signed()).unwrap();
        let pem = unsigned.assemble(&signature).unwrap().to_pem().unwrap();
        let issuer = IssuerCertificate::from_pem(&pem, P256).unwrap();
        Self { manufacturer, issuer, state: Mutex::default() }
    }

    fn plan(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state.lock().unwrap().faults = faults.into_iter().collect();
    }

    fn published(&self) -> u64 {
        self.state.lock().unwrap().published
    }

    fn sessions(&self) -> HashMap<Vec<u8>, Vec<u8>> {
        let state = self.state.lock().unwrap();
        state.sessions.iter().map(|(chip, session)| (chip.clone(), session.response.session_id.clone())).collect()
    }

    fn respond<T>(&self, work: impl FnOnce(&mut State) -> Result<T, Status>) -> Result<Response<T>, Status> {
        let mut state = self.state.lock().unwrap();
        let fault = state.faults.pop_front().unwrap_or(Fault::None);
        if let Fault::Refuse(code) = fault {
            return Err(planned(code));
        }
        let response = work(&mut state)?;
        if matches!(fault, Fault::LoseReply) { Err(planned(Code::Unavailable)) } else { Ok(Response::new(response)) }
    }

    /// Assembles a package like the real SPP, with a new key pair.
    fn assemble_new(&self, order: &AssembleRequest, number: u8) -> AssembleResponse {
        let chip = ChipId::from_bytes(&order.chip_id).unwrap();
        let identity = order.identity.parse().unwrap();
        let profile = Profile::from_toml(order.profile.parse().unwrap(), "profile.toml", PROFILE).unwrap();
        let pair = generate_p256().unwrap();
        let request = CertificateRequest {
            profile: &profile,
            issuer: &self.issuer,
            chip: &chip,
            identity: &identity,
            public_key: Some(pair.public()),
            serial: CertificateSerial::from_random([number; 20]),
            not_before: 1_700_000_000,
        };
        let to_sign = prepare(&request).unwrap().lint().unwrap().into_to_sign();
        let signature = self.manufacturer.sign(P256, to_sign.to_be_signed()).unwrap();
        let certificate = IssuedCertificate::assemble(&to_sign, &self.issuer, &signature).unwrap().as_bytes().to_vec();
        let session = SessionId::from_bytes(&sha256(&order.chip_id)[..16]).unwrap();
        let package = DataPackage {
            chip,
            identity,
            profile: order.profile.parse().unwrap(),
            session,
            certificate: CertificateChain::X509 { device: certificate.clone(), issuers: vec![] },
            key_pair: Some(pair),
            symmetric_keys: vec![],
            master_key_version: 0,
        };
        let delivery = Some(Delivery::DataPackage(package.encode().unwrap().expose().clone()));
        let session_id = session.as_bytes().to_vec();
        AssembleResponse { session_id, certificate, certificate_format: 1, delivery, ..Default::default() }
    }
}

/// An error status with an immediate retry delay.
fn planned(code: Code) -> Status {
    let mut details = ErrorDetails::with_bad_request_violation("identity", "wrong");
    details.set_retry_info(Some(Duration::from_millis(1)));
    Status::with_error_details(code, "as planned", details)
}

/// The service: an `Arc` cannot implement a trait of another crate.
struct SppService(Arc<Spp>);

#[async_trait::async_trait]
impl Line for SppService {
    async fn assemble(&self, request: Request<AssembleRequest>) -> Result<Response<AssembleResponse>, Status> {
        let order = request.into_inner();
        self.0.respond(|state| {
            if let Some(session) = state.sessions.get(&order.chip_id) {
                let same = session.order == order && session.receipt.is_none();
                return if same {
                    Ok(session.response.clone())
                } else {
                    Err(Status::already_exists("the chip is taken"))
                };
            }
            if state.sessions.values().any(|session| session.order.identity == order.identity) {
                return Err(Status::already_exists("the identity is taken"));
            }
            let response = self.0.assemble_new(&order, u8::try_from(state.sessions.len() + 1).unwrap());
            let session = SessionEntry { order: order.clone(), response: response.clone(), receipt: None };
            state.sessions.insert(order.chip_id, session);
            Ok(response)
        })
    }

    async fn complete(&self, request: Request<CompleteRequest>) -> Result<Response<CompleteResponse>, Status> {
        let request = request.into_inner();
        self.0.respond(|state| {
            let number = state.published;
            let mut sessions = state.sessions.values_mut();
            let session = sessions.find(|session| session.response.session_id == request.session_id).unwrap();
            if session.receipt.is_none() {
                let record_hash = sha256(&request.backup_package).to_vec();
                let published = Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 });
                session.receipt =
                    Some(Receipt { record_index: number, record_hash, published, tlog_proof: Vec::new() });
                state.published += 1;
            }
            Ok(CompleteResponse { receipt: session.receipt.clone() })
        })
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        Err(Status::unimplemented("spp-line never aborts a session"))
    }

    async fn get_session(&self, request: Request<GetSessionRequest>) -> Result<Response<GetSessionResponse>, Status> {
        let Some(Which::ChipId(chip)) = request.into_inner().session else { return Err(Status::invalid_argument("")) };
        self.0.respond(|state| {
            let session = state.sessions.get(&chip).ok_or_else(|| Status::not_found("no session of the chip"))?;
            let complete = if session.receipt.is_some() { SessionState::Erased } else { SessionState::Issued };
            Ok(GetSessionResponse {
                session_id: session.response.session_id.clone(),
                chip_id: chip,
                identity: session.order.identity.clone(),
                profile: session.order.profile.clone(),
                state: complete.into(),
                receipt: session.receipt.clone(),
                ..GetSessionResponse::default()
            })
        })
    }
}
