//! ★ One device's way on the line, as the station sees it.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tonic::Code;
use tonic::transport::Channel;

use super::csr;
use super::journal::Receipt;
use super::orders::Order;
use super::retry::{CallFailure, Patience};
use crate::device::{Delivery, Device, DeviceError, SimulatedFab};
use crate::names::SessionId;
use crate::package::TransportCurve;
use crate::proto::assemble_response::Delivery as Delivered;
use crate::proto::get_session_request::Session as Which;
use crate::proto::line_client::LineClient;
use crate::proto::{
    self, AssembleRequest, AssembleResponse, CompleteRequest, GetSessionRequest, GetSessionResponse, SessionState,
    TransportKey, TransportKeyType,
};
use crate::secret::SecretBytes;

/// What every device of a run has in common.
pub(super) struct Station {
    /// The devices' silicon.
    pub(super) fab: Arc<SimulatedFab>,
    /// Ask for packages that are sealed to the chip's transport key of this curve.
    pub(super) sealed: Option<TransportCurve>,
    /// Whether devices make their own key pair and send a request.
    pub(super) own_pair: bool,
    /// How long to wait for what may heal.
    pub(super) patience: Patience,
}

/// What became of one device, and how long it took.
pub(super) struct DeviceFlow {
    pub(super) outcome: Result<Outcome, Failure>,
    pub(super) times: Times,
}

/// A device that is complete.
pub(super) enum Outcome {
    /// It went the whole way now.
    Done(Receipt),
    /// It had gone the whole way before, and only the station did not remember.
    Found(Receipt),
    /// The station's journal knew: nothing was done.
    Skipped(Receipt),
}

impl Outcome {
    pub(super) const fn receipt(&self) -> &Receipt {
        match self {
            Self::Done(receipt) | Self::Found(receipt) | Self::Skipped(receipt) => receipt,
        }
    }

    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Done(_) => "done",
            Self::Found(_) => "found",
            Self::Skipped(_) => "skipped",
        }
    }
}

/// Durations of the parts, retries and pauses included. A part that was not reached has none.
#[derive(Default)]
pub(super) struct Times {
    pub(super) assemble: Option<Duration>,
    pub(super) device: Option<Duration>,
    pub(super) complete: Option<Duration>,
    pub(super) total: Duration,
    pub(super) retries: u32,
}

/// Why a device did not get to its receipt. The same order again takes it up where it is.
#[derive(Debug)]
pub(super) enum Failure {
    /// A call.
    Call(CallFailure),
    /// The device refused, or its flash failed.
    Device(DeviceError),
    /// The daemon's answer was not understood.
    Answer(&'static str, String),
    /// The device is complete and its flash has lost it.
    ToBeRecovered(String),
    /// The station itself.
    Station(String),
}

impl Failure {
    /// Where on the way it happened, for reports.
    pub(super) const fn step(&self) -> &'static str {
        match self {
            Self::Call(call) => call.name(),
            Self::Answer(call, _) => call,
            Self::Device(_) | Self::ToBeRecovered(_) => "device",
            Self::Station(_) => "station",
        }
    }

    /// Whether the next device would fare the same, since nobody answers.
    pub(super) const fn is_away(&self) -> bool {
        matches!(self, Self::Call(call) if call.away)
    }

    pub(super) fn flash_lost(order: &Order, why: impl fmt::Display) -> Self {
        let chip = &order.chip;
        Self::ToBeRecovered(format!(
            "the device is complete in the public database, but {why}; run: spp-line recover --chip {chip}"
        ))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call(call) => f.write_str(&call.reason()),
            Self::Device(error) => error.fmt(f),
            Self::Answer(_, problem) => write!(f, "the answer was not understood: {problem}"),
            Self::ToBeRecovered(text) | Self::Station(text) => f.write_str(text),
        }
    }
}

impl From<CallFailure> for Failure {
    fn from(failure: CallFailure) -> Self {
        Self::Call(failure)
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}

type Client = LineClient<Channel>;

impl Station {
    /// Brings one device from bare chip to receipt. Never gives anything up: a device that stops half-way is taken up by the
    /// same order, since each step gives again what it gave before.
    pub(super) async fn provision(&self, client: &Client, order: &Order) -> DeviceFlow {
        let mut times = Times::default();
        let begun = Instant::now();
        let outcome = self.walk(client, order, &mut times).await;
        times.total = begun.elapsed();
        DeviceFlow { outcome, times }
    }

    async fn walk(&self, client: &Client, order: &Order, times: &mut Times) -> Result<Outcome, Failure> {
        // 1. The chip says what the order needs of it: its ID, its transport key, its own key's request.
        let device = self.fab.device(&order.chip, self.sealed)?;
        let request = self.order_for(&device, order)?;
        // 2. Assemble: certificate and keys. The same again for an order that was begun before.
        let assembled = match self.assemble(client, request, times).await {
            Err(taken) if taken.code() == Code::AlreadyExists => {
                return self.look_back(client, device, order, taken, times).await;
            }
            assembled => assembled?,
        };
        let session = session_id("Assemble", &assembled.session_id)?;
        // 3. The device verifies, stores, backs up and confirms. Its flash is on the disk before Complete is called: from
        //    then on the key pair exists there alone.
        let answer = on_the_device(times, move || install(device, &session, assembled)).await?;
        // 4. Complete: the record is public, the key pair erased at the daemon.
        let proven = self.complete(client, session, answer, times).await?;
        // 5. The device verifies that it is in the log; the receipt is kept with it, and where it stands in the journal.
        self.keep(order, proven).await.map(Outcome::Done)
    }

    /// The daemon has the chip or the identity already. If it is this very device and it is complete, an earlier run's journal
    /// entry or reply was lost in a crash, and the receipt is still to be had.
    async fn look_back(
        &self,
        client: &Client,
        device: Device,
        order: &Order,
        taken: CallFailure,
        times: &mut Times,
    ) -> Result<Outcome, Failure> {
        // 1. Which session has the chip? None: it was the identity that is taken.
        let known = match self.session_of(client, order, times).await {
            Err(failure) if failure.code() == Code::NotFound => return Err(taken.into()),
            known => known?,
        };
        // 2. Another identity or product on this chip is not ours to finish; the first answer says it best.
        let same = known.identity == order.identity.to_string() && known.profile == order.profile.as_str();
        let complete = matches!(known.state(), SessionState::Published | SessionState::Erased);
        if !same || !complete {
            return Err(taken.into());
        }
        // 3. The device must still hold what is public.
        let session = session_id("GetSession", &known.session_id)?;
        let held = on_the_device(times, move || held_answer(&device, &session)).await;
        let answer = held.map_err(|lost| match lost {
            Failure::Device(DeviceError::Empty) => Failure::flash_lost(order, "its flash is empty"),
            other => Failure::flash_lost(order, other),
        })?;
        // 4. Complete once more lets a daemon finish that was stopped before the erasure, and gives the proof again.
        let proven = self.complete(client, session, answer, times).await?;
        self.keep(order, proven).await.map(Outcome::Found)
    }

    fn order_for(&self, device: &Device, order: &Order) -> Result<AssembleRequest, Failure> {
        let transport_key = device.transport_public_key()?.map(|key| TransportKey {
            r#type: match key.curve() {
                TransportCurve::P256 => TransportKeyType::P256.into(),
                TransportCurve::X25519 => TransportKeyType::X25519.into(),
            },
            public_key: key.as_bytes().to_vec(),
        });
        let csr = if self.own_pair {
            csr::request(&device.own_key_pair()?).map_err(|e| Failure::Station(format!("making the request: {e}")))?
        } else {
            Vec::new()
        };
        Ok(AssembleRequest {
            chip_id: order.chip.as_bytes().to_vec(),
            identity: order.identity.to_string(),
            profile: order.profile.to_string(),
            csr,
            transport_key,
            allocate_identity: false,
        })
    }

    async fn assemble(
        &self,
        client: &Client,
        request: AssembleRequest,
        times: &mut Times,
    ) -> Result<AssembleResponse, CallFailure> {
        let begun = Instant::now();
        let attempt = || {
            let (mut client, request) = (client.clone(), self.patience.request(request.clone()));
            async move { client.assemble(request).await }
        };
        let answer = self.patience.call("Assemble", &mut times.retries, attempt).await;
        times.assemble = Some(begun.elapsed());
        answer.map_err(|failure| self.with_hint(failure))
    }

    /// What the profile wants and this run did not give, in the words of the command line.
    fn with_hint(&self, failure: CallFailure) -> CallFailure {
        match (self.sealed, self.own_pair) {
            (None, _) if failure.is_about("transport_key") => {
                failure.with_hint("give --sealed x25519 or --sealed p256")
            }
            (_, false) if failure.is_about("csr") => failure.with_hint("give --csr"),
            (_, true) if failure.is_about("csr") => failure.with_hint("leave --csr out"),
            _ => failure,
        }
    }

    async fn complete(
        &self,
        client: &Client,
        session: SessionId,
        answer: Answer,
        times: &mut Times,
    ) -> Result<Proven, Failure> {
        let begun = Instant::now();
        let request = CompleteRequest {
            session_id: session.as_bytes().to_vec(),
            backup_package: answer.backup,
            key_confirmation: answer.confirmation,
        };
        let attempt = || {
            let (mut client, request) = (client.clone(), self.patience.request(request.clone()));
            async move { client.complete(request).await }
        };
        let response = self.patience.call("Complete", &mut times.retries, attempt).await;
        times.complete = Some(begun.elapsed());
        let missing = || Failure::Answer("Complete", "it has no receipt".to_owned());
        proven_of("Complete", session, response?.receipt.ok_or_else(missing)?)
    }

    /// The device verifies the receipt; then it is a file beside its flash.
    async fn keep(&self, order: &Order, proven: Proven) -> Result<Receipt, Failure> {
        let (fab, chip) = (Arc::clone(&self.fab), order.chip.clone());
        let kept = tokio::task::spawn_blocking(move || {
            let device = fab.device(&chip, None)?;
            if let Some(verified) = device.verify_receipt(proven.published, &proven.proof)? {
                // What the daemon says beside the proof must be what the proof proves.
                let hash = hex::encode(verified.record_hash);
                if (verified.proof.index, &hash) != (proven.receipt.record_index, &proven.receipt.record_hash) {
                    let problem = "the receipt says another place or hash than its proof".to_owned();
                    return Err(Failure::Answer("Complete", problem));
                }
            }
            // Not synced: should a crash take it, anybody can have it again.
            let path = fab.receipt_file(&chip);
            std::fs::write(&path, &proven.proof)
                .map_err(|e| Failure::Station(format!("writing {}: {e}", path.display())))?;
            Ok(proven.receipt)
        });
        kept.await.map_err(|e| Failure::Station(format!("the simulated device stopped: {e}")))?
    }

    async fn session_of(
        &self,
        client: &Client,
        order: &Order,
        times: &mut Times,
    ) -> Result<GetSessionResponse, CallFailure> {
        let request = GetSessionRequest { session: Some(Which::ChipId(order.chip.as_bytes().to_vec())) };
        let attempt = || {
            let (mut client, request) = (client.clone(), self.patience.request(request.clone()));
            async move { client.get_session(request).await }
        };
        self.patience.call("GetSession", &mut times.retries, attempt).await
    }
}

/// What the device gives back.
struct Answer {
    backup: Vec<u8>,
    confirmation: Vec<u8>,
}

fn install(mut device: Device, session: &SessionId, assembled: AssembleResponse) -> Result<Answer, Failure> {
    match assembled.delivery {
        Some(Delivered::DataPackage(bytes)) => {
            device.install(session, &Delivery::Clear(&SecretBytes::new(bytes)))?;
        }
        Some(Delivered::SealedPackage(sealed)) => {
            device.install(session, &Delivery::Sealed(&sealed))?;
        }
        None => return Err(Failure::Answer("Assemble", "it has no package".to_owned())),
    }
    Ok(Answer { backup: device.backup()?, confirmation: device.confirmation()? })
}

/// The answer of a device that was installed before, if it still holds this session's package.
fn held_answer(device: &Device, session: &SessionId) -> Result<Answer, Failure> {
    let installed = device.installed()?;
    if installed.session != *session {
        let problem = format!("the flash holds session {}, the record is of session {session}", installed.session);
        return Err(Failure::Station(problem));
    }
    Ok(Answer { backup: device.backup()?, confirmation: device.confirmation()? })
}

/// Runs the device's work, which waits for disks, beside the threads that wait for the network.
async fn on_the_device(
    times: &mut Times,
    work: impl FnOnce() -> Result<Answer, Failure> + Send + 'static,
) -> Result<Answer, Failure> {
    let begun = Instant::now();
    let answer = tokio::task::spawn_blocking(work).await;
    times.device = Some(begun.elapsed());
    answer.map_err(|e| Failure::Station(format!("the simulated device stopped: {e}")))?
}

fn session_id(call: &'static str, bytes: &[u8]) -> Result<SessionId, Failure> {
    SessionId::from_bytes(bytes).map_err(|e| Failure::Answer(call, e.to_string()))
}

/// A receipt as the daemon gave it; nobody has verified it yet.
struct Proven {
    receipt: Receipt,
    /// Seconds since the Unix epoch.
    published: u64,
    /// C2SP tlog-proof.
    proof: Vec<u8>,
}

fn proven_of(call: &'static str, session: SessionId, receipt: proto::Receipt) -> Result<Proven, Failure> {
    let proto::Receipt { record_index, record_hash, published, tlog_proof } = receipt;
    let time = published.and_then(|time| SystemTime::try_from(time).ok());
    let seconds = time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    match (record_hash.len(), time, seconds) {
        (32, Some(published), Some(seconds)) => Ok(Proven {
            receipt: Receipt {
                session,
                record_index,
                record_hash: hex::encode(record_hash),
                published: humantime::format_rfc3339_seconds(published).to_string(),
            },
            published: seconds.as_secs(),
            proof: tlog_proof,
        }),
        _ => Err(Failure::Answer(call, "the receipt has no hash of 32 bytes, or no time".to_owned())),
    }
}
