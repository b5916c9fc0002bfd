//! Runs against a processing point that is a map in memory, with troubles on the way.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::device_flow::Station;
use super::orders::{self, Order};
use super::pipeline::{Run, run};
use super::retry::Patience;
use super::run_log::{Ended, RunLog, flashes};
use crate::certificate::{
    AuthorityCertificate, CertificateRequest, CertificateSerial, IssuedCertificate, IssuerCertificate, Profile,
    SubjectName, authority_certificate, prepare,
};
use crate::device::SimulatedFab;
use crate::keys::{DevicePrivateKey, SignatureAlgorithm, generate_p256, sha256};
use crate::names::{ChipId, SessionId};
use crate::package::{CertificateChain, DataPackage};
use crate::proto::assemble_response::Delivery;
use crate::proto::get_session_request::Session as Which;
use crate::proto::line_server::{Line, LineServer};
use crate::proto::{
    AbortRequest, AbortResponse, AssembleRequest, AssembleResponse, CompleteRequest, CompleteResponse,
    GetSessionRequest, GetSessionResponse, Receipt, SessionState,
};

const P256: SignatureAlgorithm = SignatureAlgorithm::EcdsaP256Sha256;
const PROFILE: &str = r#"
identities = ["imei"]
hardware_type = "1.3.6.1.4.1.32473.1.7"
issuer = "manufacturer"
key_pair.source = "generate"
key_pair.kind = "p256"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn every_device_gets_one_receipt_however_many_replies_are_lost() {
    let site = Site::new().await;
    // Every third call fails before it is begun, or succeeds and its reply is lost.
    let pattern = [Trouble::None, Trouble::Refuse(Code::Unavailable), Trouble::LoseReply];
    site.spp.plan(pattern.into_iter().cycle().take(90));
    let ended = site.run(40).await;
    assert_eq!((ended.summary.done, ended.summary.failed, ended.summary.retries), (40, 0, 60));
    assert_eq!(site.spp.published(), 40);
    assert_eq!(flashes(site.directory.path()).unwrap().len(), 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_complete_is_skipped_and_what_the_journal_lost_is_found() {
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
async fn a_run_that_ended_between_the_calls_is_taken_up() {
    let site = Site::new().await;
    // Every Assemble succeeds, every Complete fails for good.
    site.spp.plan((0..5).flat_map(|_| [Trouble::None, Trouble::Refuse(Code::Internal)]));
    let first = site.run_with(5, 1).await;
    assert_eq!((first.summary.done, first.summary.failed), (0, 5));
    assert!(first.failures[0].contains("Complete: INTERNAL"), "{:?}", first.failures);
    let before = site.spp.sessions();
    let second = site.run(5).await;
    assert_eq!((second.summary.done, second.summary.failed), (5, 0));
    assert_eq!(site.spp.sessions(), before, "the same sessions went on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_complete_device_without_its_flash_is_to_be_recovered() {
    let site = Site::new().await;
    site.run(3).await;
    let chip = site.orders(3)[1].chip.clone();
    SimulatedFab::open(site.directory.path()).unwrap().device(&chip, None).unwrap().wipe().unwrap();
    for journal in [None, Some("")] {
        if let Some(text) = journal {
            std::fs::write(site.directory.path().join("line.jsonl"), text).unwrap();
        }
        let ended = site.run(3).await;
        assert_eq!(ended.summary.failed, 1);
        let failure = &ended.failures[0];
        assert!(failure.contains(&format!("its flash is empty; run: spp-line recover --chip {chip}")), "{failure}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_told_once_with_its_fields() {
    let site = Site::new().await;
    site.spp.plan([Trouble::Refuse(Code::InvalidArgument)]);
    let ended = site.run_with(2, 1).await;
    assert_eq!((ended.summary.done, ended.summary.failed, ended.summary.retries), (1, 1, 0));
    assert!(
        ended.failures[0].ends_with("Assemble: INVALID_ARGUMENT: as planned; identity: wrong"),
        "{:?}",
        ended.failures
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_of_another_chip_fails_with_the_answer_of_assemble() {
    let site = Site::new().await;
    site.run(1).await;
    let identity = site.orders(1)[0].identity.clone();
    let stranger = Order { chip: ChipId::from_bytes(&[9; 16]).unwrap(), identity, profile: "phone".parse().unwrap() };
    let ended = site.run_orders(vec![stranger], 1).await;
    assert_eq!(ended.summary.failed, 1);
    assert!(ended.failures[0].contains("ALREADY_EXISTS: the identity is taken"), "{:?}", ended.failures);
    // The chip that has it, ordered with another profile, is not taken for complete.
    let other = Order { profile: "tablet".parse().unwrap(), ..site.orders(1)[0].clone() };
    let ended = site.run_orders(vec![other], 1).await;
    assert!(ended.failures[0].contains("ALREADY_EXISTS: the chip is taken"), "{:?}", ended.failures);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_stops_when_nobody_answers_any_more() {
    let site = Site::new().await;
    site.spp.plan(std::iter::repeat_n(Trouble::Refuse(Code::Unavailable), 10_000));
    let ended = site.run_with(50, 2).await;
    assert_eq!((ended.summary.failed, ended.summary.not_begun), (2, 48));
    site.spp.plan([]);
    assert_eq!(site.run(50).await.summary.done, 50);
}

/// A directory of devices and a processing point for them.
struct Site {
    directory: TempDir,
    spp: Arc<Spp>,
    channel: Channel,
}

impl Site {
    async fn new() -> Self {
        let directory = spp_testkit::files::temp_dir();
        let spp = Arc::new(Spp::new());
        SimulatedFab::create(directory.path(), spp.manufacturer.public().clone(), None).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let service = LineServer::new(Arc::clone(&spp));
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)));
        let channel = Endpoint::from_shared(address).unwrap().connect_lazy();
        Self { directory, spp, channel }
    }

    fn orders(&self, count: usize) -> Vec<Order> {
        let profile = "phone".parse().unwrap();
        orders::simulate(self.directory.path(), count, &profile, &"imei".parse().unwrap()).unwrap()
    }

    async fn run(&self, count: usize) -> Ended {
        self.run_with(count, 8).await
    }

    async fn run_with(&self, count: usize, parallel: usize) -> Ended {
        self.run_orders(self.orders(count), parallel).await
    }

    async fn run_orders(&self, orders: Vec<Order>, parallel: usize) -> Ended {
        let patience = Patience { deadline: Duration::from_secs(5), retry_for: Duration::from_secs(2) };
        let fab = Arc::new(SimulatedFab::open(self.directory.path()).unwrap());
        let station = Station { fab, sealed: None, own_pair: false, patience };
        let book = RunLog::open(self.directory.path(), None).unwrap();
        run(Run { station, channels: vec![self.channel.clone()], orders, parallel, book }).await.unwrap()
    }
}

/// What happens to a call.
#[derive(Clone, Copy)]
enum Trouble {
    None,
    Refuse(Code),
    LoseReply,
}

/// A processing point without HSM and disk.
struct Spp {
    manufacturer: DevicePrivateKey,
    issuer: IssuerCertificate,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    troubles: VecDeque<Trouble>,
    sessions: HashMap<Vec<u8>, Known>,
    published: u64,
}

struct Known {
    order: AssembleRequest,
    answer: AssembleResponse,
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

    fn plan(&self, troubles: impl IntoIterator<Item = Trouble>) {
        self.state.lock().unwrap().troubles = troubles.into_iter().collect();
    }

    fn published(&self) -> u64 {
        self.state.lock().unwrap().published
    }

    fn sessions(&self) -> HashMap<Vec<u8>, Vec<u8>> {
        let state = self.state.lock().unwrap();
        state.sessions.iter().map(|(chip, known)| (chip.clone(), known.answer.session_id.clone())).collect()
    }

    fn answer<T>(&self, work: impl FnOnce(&mut State) -> Result<T, Status>) -> Result<Response<T>, Status> {
        let mut state = self.state.lock().unwrap();
        let trouble = state.troubles.pop_front().unwrap_or(Trouble::None);
        if let Trouble::Refuse(code) = trouble {
            return Err(planned(code));
        }
        let answer = work(&mut state)?;
        if matches!(trouble, Trouble::LoseReply) { Err(planned(Code::Unavailable)) } else { Ok(Response::new(answer)) }
    }

    /// A package as the real one makes it, with a pair of its own.
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
        let signature = self.manufacturer.sign(P256, &to_sign.to_be_signed).unwrap();
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

/// A status whose advice is to come again at once.
fn planned(code: Code) -> Status {
    let mut details = ErrorDetails::with_bad_request_violation("identity", "wrong");
    details.set_retry_info(Some(Duration::from_millis(1)));
    Status::with_error_details(code, "as planned", details)
}

#[async_trait::async_trait]
impl Line for Arc<Spp> {
    async fn assemble(&self, request: Request<AssembleRequest>) -> Result<Response<AssembleResponse>, Status> {
        let order = request.into_inner();
        self.answer(|state| {
            if let Some(known) = state.sessions.get(&order.chip_id) {
                let same = known.order == order && known.receipt.is_none();
                return if same { Ok(known.answer.clone()) } else { Err(Status::already_exists("the chip is taken")) };
            }
            if state.sessions.values().any(|known| known.order.identity == order.identity) {
                return Err(Status::already_exists("the identity is taken"));
            }
            let answer = self.assemble_new(&order, u8::try_from(state.sessions.len() + 1).unwrap());
            let known = Known { order: order.clone(), answer: answer.clone(), receipt: None };
            state.sessions.insert(order.chip_id, known);
            Ok(answer)
        })
    }

    async fn complete(&self, request: Request<CompleteRequest>) -> Result<Response<CompleteResponse>, Status> {
        let request = request.into_inner();
        self.answer(|state| {
            let number = state.published;
            let mut sessions = state.sessions.values_mut();
            let known = sessions.find(|known| known.answer.session_id == request.session_id).unwrap();
            if known.receipt.is_none() {
                let record_hash = sha256(&request.backup_package).to_vec();
                let published = Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 });
                known.receipt = Some(Receipt { record_index: number, record_hash, published, tlog_proof: Vec::new() });
                state.published += 1;
            }
            Ok(CompleteResponse { receipt: known.receipt.clone() })
        })
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        Err(Status::unimplemented("a station that goes on never aborts"))
    }

    async fn get_session(&self, request: Request<GetSessionRequest>) -> Result<Response<GetSessionResponse>, Status> {
        let Some(Which::ChipId(chip)) = request.into_inner().session else { return Err(Status::invalid_argument("")) };
        self.answer(|state| {
            let known = state.sessions.get(&chip).ok_or_else(|| Status::not_found("no session of the chip"))?;
            let complete = if known.receipt.is_some() { SessionState::Erased } else { SessionState::Issued };
            Ok(GetSessionResponse {
                session_id: known.answer.session_id.clone(),
                chip_id: chip,
                identity: known.order.identity.clone(),
                profile: known.order.profile.clone(),
                state: complete.into(),
                receipt: known.receipt.clone(),
                ..GetSessionResponse::default()
            })
        })
    }
}
