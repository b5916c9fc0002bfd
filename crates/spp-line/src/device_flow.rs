//! Provisioning of one device, from the station's point of view.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use spp_device::{Delivery, Device, DeviceError, SimulatedFab};
use spp_format::names::SessionId;
use spp_format::package::TransportCurve;
use spp_format::secret::SecretBytes;
use spp_proto as proto;
use spp_proto::assemble_response::Delivery as Delivered;
use spp_proto::{AssembleRequest, AssembleResponse, CompleteRequest, SessionState, TransportKey, TransportKeyType};
use tonic::Code;

use super::client::StationClient;
use super::csr;
use super::journal::StoredReceipt;
use super::orders::Order;
use super::retry::CallFailure;

/// Settings shared by all devices of a run.
pub(super) struct Station {
    /// The devices' silicon.
    pub(super) fab: Arc<SimulatedFab>,
    /// Curve of the transport key to which packages are sealed; `None` requests unsealed packages.
    pub(super) sealed: Option<TransportCurve>,
    /// Whether devices generate their own key pair and send a certificate request.
    pub(super) own_key_pair: bool,
}

/// The result of one device and its durations.
pub(super) struct DeviceResult {
    pub(super) outcome: Result<Outcome, Failure>,
    pub(super) times: Times,
}

/// How a device became complete.
pub(super) enum Outcome {
    /// Provisioned in this run.
    Done(StoredReceipt),
    /// Completed in an earlier run, but missing in the station's journal.
    Found(StoredReceipt),
    /// Completed in an earlier run according to the station's journal; no calls were made.
    Skipped(StoredReceipt),
}

impl Outcome {
    pub(super) const fn receipt(&self) -> &StoredReceipt {
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

/// Durations of the steps, including retries and pauses. A step that was not reached has none.
#[derive(Default)]
pub(super) struct Times {
    pub(super) assemble: Option<Duration>,
    pub(super) device: Option<Duration>,
    pub(super) complete: Option<Duration>,
    pub(super) total: Duration,
    pub(super) retries: u32,
}

/// Why a device has no receipt. Repeating the order resumes the device.
#[derive(Debug)]
pub(super) enum Failure {
    /// A call failed.
    Call(CallFailure),
    /// The device rejected its data, or its flash failed.
    Device(DeviceError),
    /// The daemon's response is invalid.
    Response(&'static str, String),
    /// The device is complete in the public database, but its flash content is lost.
    NeedsRecovery(String),
    /// A failure of the station itself.
    Station(String),
}

impl Failure {
    /// The failed step, for reports.
    pub(super) const fn step(&self) -> &'static str {
        match self {
            Self::Call(call) => call.name(),
            Self::Response(call, _) => call,
            Self::Device(_) | Self::NeedsRecovery(_) => "device",
            Self::Station(_) => "station",
        }
    }

    /// Whether the next device would fail as well, because the daemon is unavailable.
    pub(super) const fn is_unavailable(&self) -> bool {
        matches!(self, Self::Call(call) if call.unavailable)
    }

    pub(super) fn flash_lost(order: &Order, reason: impl fmt::Display) -> Self {
        let chip = &order.chip;
        Self::NeedsRecovery(format!(
            "the device is complete in the public database, but {reason}; run: spp-line recover --chip {chip}"
        ))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call(call) => f.write_str(&call.reason()),
            Self::Device(error) => error.fmt(f),
            Self::Response(_, problem) => write!(f, "invalid response: {problem}"),
            Self::NeedsRecovery(text) | Self::Station(text) => f.write_str(text),
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

impl Station {
    /// Provisions one device up to its receipt. Never aborts a session: repeating the order resumes an interrupted device,
    /// because each step is idempotent.
    pub(super) async fn provision(&self, client: &StationClient, order: &Order) -> DeviceResult {
        let mut times = Times::default();
        let start = Instant::now();
        let outcome = self.run_steps(client, order, &mut times).await;
        times.total = start.elapsed();
        DeviceResult { outcome, times }
    }

    async fn run_steps(&self, client: &StationClient, order: &Order, times: &mut Times) -> Result<Outcome, Failure> {
        // 1. Read the order's inputs from the chip: ID, transport key, certificate request.
        let device = self.fab.device(&order.chip, self.sealed)?;
        let request = self.assemble_request(&device, order)?;
        // 2. Assemble: certificate and keys. A repeated order returns the same.
        let assembled = match self.assemble(client, request, times).await {
            Err(conflict) if conflict.code() == Code::AlreadyExists => {
                return self.finish_completed(client, device, order, conflict, times).await;
            }
            assembled => assembled?,
        };
        let session = session_id("Assemble", &assembled.session_id)?;
        // 3. The device verifies, stores, backs up and confirms. Its flash is synced before Complete is called: from then on
        // only the device holds the key pair.
        let proof = run_on_device(times, move || install(device, &session, assembled)).await?;
        // 4. Complete: the daemon publishes the record and erases the key pair.
        let receipt = self.complete(client, session, proof, times).await?;
        // 5. The device verifies that the log contains its record; the station stores the receipt.
        self.store_receipt(order, receipt).await.map(Outcome::Done)
    }

    /// Handles `ALREADY_EXISTS`: the chip or the identity is in use. If this very device is complete, a crash lost the journal
    /// entry or the response of an earlier run, and the receipt can be fetched again.
    async fn finish_completed(
        &self,
        client: &StationClient,
        device: Device,
        order: &Order,
        conflict: CallFailure,
        times: &mut Times,
    ) -> Result<Outcome, Failure> {
        // 1. Find the chip's session. If there is none, the identity is in use by another chip.
        let existing = match client.session_of_chip_counting(&order.chip, &mut times.retries).await {
            Err(failure) if failure.code() == Code::NotFound => return Err(conflict.into()),
            existing => existing?,
        };
        // 2. A session for another identity or profile must not be completed; report the original error.
        let same = existing.identity == order.identity.to_string() && existing.profile == order.profile.as_str();
        let complete = matches!(existing.state(), SessionState::Published | SessionState::Erased);
        if !same || !complete {
            return Err(conflict.into());
        }
        // 3. The device must still hold the published data.
        let session = session_id("GetSession", &existing.session_id)?;
        let read = run_on_device(times, move || installed_proof(&device, &session)).await;
        let proof = read.map_err(|lost| match lost {
            Failure::Device(DeviceError::Empty) => Failure::flash_lost(order, "its flash is empty"),
            other => Failure::flash_lost(order, other),
        })?;
        // 4. Repeating Complete makes a daemon that was interrupted finish the erasure, and returns the receipt again.
        let receipt = self.complete(client, session, proof, times).await?;
        self.store_receipt(order, receipt).await.map(Outcome::Found)
    }

    fn assemble_request(&self, device: &Device, order: &Order) -> Result<AssembleRequest, Failure> {
        let transport_key = device.transport_public_key()?.map(|key| TransportKey {
            r#type: match key.curve() {
                TransportCurve::P256 => TransportKeyType::P256.into(),
                TransportCurve::X25519 => TransportKeyType::X25519.into(),
            },
            public_key: key.as_bytes().to_vec(),
        });
        let csr = if self.own_key_pair {
            csr::request(&device.own_key_pair()?)
                .map_err(|e| Failure::Station(format!("creating the certificate request: {e}")))?
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
        client: &StationClient,
        request: AssembleRequest,
        times: &mut Times,
    ) -> Result<AssembleResponse, CallFailure> {
        let start = Instant::now();
        let response = client.assemble_counting(request, &mut times.retries).await;
        times.assemble = Some(start.elapsed());
        response.map_err(|failure| self.add_option_hint(failure))
    }

    /// Adds the command-line option that the profile requires.
    fn add_option_hint(&self, failure: CallFailure) -> CallFailure {
        match (self.sealed, self.own_key_pair) {
            (None, _) if failure.concerns_field("transport_key") => {
                failure.with_hint("add --sealed x25519 or --sealed p256")
            }
            (_, false) if failure.concerns_field("csr") => failure.with_hint("add --csr"),
            (_, true) if failure.concerns_field("csr") => failure.with_hint("remove --csr"),
            _ => failure,
        }
    }

    async fn complete(
        &self,
        client: &StationClient,
        session: SessionId,
        proof: DeviceProof,
        times: &mut Times,
    ) -> Result<UnverifiedReceipt, Failure> {
        let start = Instant::now();
        let request = CompleteRequest {
            session_id: session.as_bytes().to_vec(),
            backup_package: proof.backup,
            key_confirmation: proof.confirmation,
        };
        let response = client.complete_counting(request, &mut times.retries).await;
        times.complete = Some(start.elapsed());
        let missing = || Failure::Response("Complete", "no receipt".to_owned());
        parse_receipt("Complete", session, response?.receipt.ok_or_else(missing)?)
    }

    /// Lets the device verify the receipt, and stores it in a file next to the flash.
    async fn store_receipt(&self, order: &Order, receipt: UnverifiedReceipt) -> Result<StoredReceipt, Failure> {
        let (fab, chip) = (Arc::clone(&self.fab), order.chip.clone());
        let stored = tokio::task::spawn_blocking(move || {
            let device = fab.device(&chip, None)?;
            if let Some(verified) = device.verify_receipt(receipt.published, &receipt.proof)? {
                // The receipt's fields must match its proof.
                let hash = hex::encode(verified.record_hash);
                if (verified.proof.index, &hash) != (receipt.fields.record_index, &receipt.fields.record_hash) {
                    let problem = "the receipt's index or hash differs from its proof".to_owned();
                    return Err(Failure::Response("Complete", problem));
                }
            }
            // Not synced: after a crash the receipt can be fetched again.
            let path = fab.receipt_path(&chip);
            std::fs::write(&path, &receipt.proof)
                .map_err(|e| Failure::Station(format!("writing {}: {e}", path.display())))?;
            Ok(receipt.fields)
        });
        stored.await.map_err(|e| Failure::Station(format!("the simulated device stopped: {e}")))?
    }
}

/// The device's input to Complete.
struct DeviceProof {
    backup: Vec<u8>,
    confirmation: Vec<u8>,
}

fn install(mut device: Device, session: &SessionId, assembled: AssembleResponse) -> Result<DeviceProof, Failure> {
    match assembled.delivery {
        Some(Delivered::DataPackage(bytes)) => {
            device.install(session, &Delivery::Clear(&SecretBytes::new(bytes)))?;
        }
        Some(Delivered::SealedPackage(sealed)) => {
            device.install(session, &Delivery::Sealed(&sealed))?;
        }
        None => return Err(Failure::Response("Assemble", "no package".to_owned())),
    }
    Ok(DeviceProof { backup: device.backup()?, confirmation: device.confirmation()? })
}

/// Reads the Complete input from a device that an earlier run installed, if it still holds this session's package.
fn installed_proof(device: &Device, session: &SessionId) -> Result<DeviceProof, Failure> {
    let installed = device.installed()?;
    if installed.session != *session {
        let problem =
            format!("the flash holds session {}, expected session {session} of the record", installed.session);
        return Err(Failure::Station(problem));
    }
    Ok(DeviceProof { backup: device.backup()?, confirmation: device.confirmation()? })
}

/// Runs the device's work, which waits for disks, on a blocking thread.
async fn run_on_device(
    times: &mut Times,
    work: impl FnOnce() -> Result<DeviceProof, Failure> + Send + 'static,
) -> Result<DeviceProof, Failure> {
    let start = Instant::now();
    let proof = tokio::task::spawn_blocking(work).await;
    times.device = Some(start.elapsed());
    proof.map_err(|e| Failure::Station(format!("the simulated device stopped: {e}")))?
}

fn session_id(call: &'static str, bytes: &[u8]) -> Result<SessionId, Failure> {
    SessionId::from_bytes(bytes).map_err(|e| Failure::Response(call, e.to_string()))
}

/// The daemon's receipt before the device has verified it.
struct UnverifiedReceipt {
    fields: StoredReceipt,
    /// Seconds since the Unix epoch.
    published: u64,
    /// C2SP tlog-proof.
    proof: Vec<u8>,
}

fn parse_receipt(
    call: &'static str,
    session: SessionId,
    receipt: proto::Receipt,
) -> Result<UnverifiedReceipt, Failure> {
    let proto::Receipt { record_index, record_hash, published, tlog_proof } = receipt;
    let time = published.and_then(|time| SystemTime::try_from(time).ok());
    let seconds = time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    match (record_hash.len(), time, seconds) {
        (32, Some(published), Some(seconds)) => Ok(UnverifiedReceipt {
            fields: StoredReceipt {
                session,
                record_index,
                record_hash: hex::encode(record_hash),
                published: humantime::format_rfc3339_seconds(published).to_string(),
            },
            published: seconds.as_secs(),
            proof: tlog_proof,
        }),
        _ => Err(Failure::Response(call, "the receipt has no 32-byte hash or no timestamp".to_owned())),
    }
}
