//! Supervises the worker process: starts it, checks its keys, and replaces it when it hangs, dies or reaches its operation limit.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use spp_format::keys::SignatureAlgorithm;
use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;

use super::connection::{Connection, Counters, connect, read_frame, write_frame};
use super::failure::{Failure, HsmError};
use super::failure_class::FailureClass;
use super::kdf::Derivation;
use super::key_manifest::KeyManifest;
use super::module::ModuleProfile;
use super::objects::to_x509_form;
use super::pin::PinSource;
use super::pin_agent::PinAgent;
use super::pin_attempts::{PinAttempts, version};
use super::transport::TransportReceiver;
use super::wire::{self, Answer, KeyOnToken, Operation, Priority, Start, Started};
use super::worker;
use super::worker_state::{State, StatePublisher};

/// Configuration of one HSM.
#[derive(Debug, Clone)]
pub struct HsmConfig {
    /// The name of the HSM, unique within the configuration.
    pub name: String,
    /// The profile of the PKCS#11 module.
    pub module: ModuleProfile,
    /// The source of the user PIN, which the worker reads.
    pub pin: PinSource,
    /// The process that holds a typed PIN, for [`PinSource::Prompt`].
    pub pin_agent: Option<Arc<PinAgent>>,
    /// The file that records a refused PIN.
    pub pin_refused: PathBuf,
    /// The keys that the token must hold.
    pub keys: KeyManifest,
    /// The deadline of a line call.
    pub call_timeout: Duration,
    /// Maximum number of queued calls; further calls are refused.
    pub queue: usize,
    /// The program started as the worker: `sppd` itself.
    pub worker_program: PathBuf,
    /// The supervisor's intervals.
    pub pacing: SupervisorPacing,
}

/// The supervisor's intervals. The defaults are for production; tests use shorter ones.
#[derive(Debug, Clone, Copy)]
pub struct SupervisorPacing {
    /// The first delay before a lost worker is restarted.
    pub first_backoff: Duration,
    /// The longest restart delay; the delay doubles after each failure. A recovered HSM may remain unused for this long.
    pub longest_backoff: Duration,
    /// A worker that has served for this long resets the restart delay.
    pub steady_after: Duration,
    /// The interval between two checks for a hung worker.
    pub poll_interval: Duration,
    /// The interval between two checks for an officer's action after a refused PIN.
    pub officer_poll_interval: Duration,
}

impl Default for SupervisorPacing {
    fn default() -> Self {
        Self {
            first_backoff: Duration::from_millis(100),
            longest_backoff: Duration::from_secs(2),
            steady_after: Duration::from_secs(5),
            poll_interval: Duration::from_millis(250),
            officer_poll_interval: Duration::from_secs(1),
        }
    }
}

/// Time limit of a worker start: loading, login and key audit.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Time limit of a worker start if a person enters the PIN at the HSM.
const PIN_ENTRY_LIMIT: Duration = Duration::from_secs(5 * 60);
/// How long a worker that is being replaced may finish background work.
const BACKGROUND_DRAIN: Duration = Duration::from_millis(200);

/// Runs until the last handle is dropped.
pub(crate) async fn supervise(config: Arc<HsmConfig>, publisher: StatePublisher, counters: Arc<Counters>) {
    let pacing = config.pacing;
    let mut wait = pacing.first_backoff;
    let attempts = PinAttempts::new(config.pin_refused.clone());
    loop {
        if let Some(reason) = attempts.refused(&config.pin) {
            tracing::error!(%reason, "user PIN was refused; no further attempt until an officer acts");
            publisher.publish(State::Stopped { reason });
            tokio::select! {
                () = wait_for_officer(&attempts, &config) => {}
                () = publisher.closed() => return,
            }
            tracing::info!("officer has acted, restarting the HSM worker");
            publisher.publish(State::Unavailable {
                reason: "worker starting".to_owned(),
                retry_after: pacing.first_backoff,
            });
        }
        let pin_version = version(&config.pin);
        counters.starts.fetch_add(1, Ordering::Relaxed);
        let end = tokio::select! {
            end = run_worker(&config, &publisher, &counters, &mut wait) => end,
            () = publisher.closed() => return,
        };
        match end {
            WorkerEnd::Replaced => continue,
            WorkerEnd::Lost(reason) => {
                tracing::warn!(%reason, retry_in = ?wait, "HSM worker lost, restarting");
                publisher.publish(State::Unavailable { reason, retry_after: wait });
            }
            WorkerEnd::Permanent(reason) => {
                let mut recorded = attempts.record(pin_version, &reason);
                publisher.publish(State::Stopped { reason: reason.clone() });
                // Without the record, this process must not try the PIN again either.
                while let Err(error) = recorded {
                    tracing::error!(%error, "cannot record the refused PIN; do not restart sppd before the PIN is correct");
                    tokio::select! {
                        () = tokio::time::sleep(pacing.officer_poll_interval) => {}
                        () = publisher.closed() => return,
                    }
                    recorded = attempts.record(pin_version, &reason);
                }
                if !rereads_pin(&config.pin) {
                    tracing::error!(%reason, "user PIN of this process is wrong: run `sppctl hsm retry-pin`, then restart sppd");
                    return publisher.closed().await;
                }
                continue;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(pacing.longest_backoff),
            () = publisher.closed() => return,
        }
    }
}

/// Whether this process can get another PIN from the source. A typed PIN and a systemd credential are fixed until a restart.
const fn rereads_pin(pin: &PinSource) -> bool {
    matches!(pin, PinSource::File(_) | PinSource::Protected)
}

/// Resolves when the PIN file has changed or an officer has allowed one more attempt.
async fn wait_for_officer(attempts: &PinAttempts, config: &HsmConfig) {
    while attempts.refused(&config.pin).is_some() {
        tokio::time::sleep(config.pacing.officer_poll_interval).await;
    }
}

/// Why a worker ended.
enum WorkerEnd {
    /// It had reached its operation limit.
    Replaced,
    /// It failed; a new worker may work.
    Lost(String),
    /// An officer must act before another start.
    Permanent(String),
}

impl From<HsmError> for WorkerEnd {
    fn from(error: HsmError) -> Self {
        match error {
            HsmError::Stopped(reason) => Self::Permanent(reason),
            other => Self::Lost(other.to_string()),
        }
    }
}

/// Starts a worker, checks it and monitors it until it ends.
async fn run_worker(
    config: &HsmConfig,
    publisher: &StatePublisher,
    counters: &Arc<Counters>,
    wait: &mut Duration,
) -> WorkerEnd {
    let limit = if config.pin == PinSource::Protected { PIN_ENTRY_LIMIT } else { START_LIMIT };
    let started = tokio::time::timeout(limit, start(config, counters)).await;
    let (mut child, connection, mut closed) = match started {
        Ok(Ok(worker)) => worker,
        Ok(Err(end)) => return end,
        Err(_) => return WorkerEnd::Lost(format!("worker not ready within {limit:?}")),
    };
    let connection = Arc::new(connection);
    tracing::info!(module = %connection.module, token = %connection.token.label, "HSM ready");
    publisher.publish(State::Ready(Arc::clone(&connection)));
    let (served_since, mut answered) = (Instant::now(), 0);
    let mut last_activity = Instant::now();
    let operations_before = counters.operations.load(Ordering::Relaxed);
    let limit = config.module.recycle_after_operations;
    loop {
        tokio::select! {
            reason = &mut closed => {
                let reason = reason.unwrap_or_else(|_| "worker socket closed".to_owned());
                return WorkerEnd::Lost(format!("{reason}{}", exit_status(&mut child).await));
            }
            reason = connection.replacement_requested() => {
                let _ = child.kill().await;
                connection.pending.close();
                return WorkerEnd::Lost(reason);
            }
            () = tokio::time::sleep(config.pacing.poll_interval) => {}
        }
        if served_since.elapsed() >= config.pacing.steady_after {
            *wait = config.pacing.first_backoff;
        }
        // Check the keys of an HSM that gets no calls, because it is idle or because calls prefer others since a failure: a
        // removed token or a recovered HSM is detected without a call.
        let answered_now = counters.answered.load(Ordering::Relaxed);
        if answered_now != std::mem::replace(&mut answered, answered_now) {
            last_activity = Instant::now();
        }
        if last_activity.elapsed() >= config.module.keep_alive || connection.needs_check() {
            let checked = tokio::time::timeout(config.module.hang_after, check_keys(config, &connection)).await;
            if let Err(error) = checked.unwrap_or(Err(HsmError::Deadline(config.module.hang_after))) {
                let _ = child.kill().await;
                connection.pending.close();
                return WorkerEnd::from(error);
            }
            connection.record_check();
            (last_activity, answered) = (Instant::now(), counters.answered.load(Ordering::Relaxed));
        }
        if connection.pending.has_hung_call(config.module.hang_after) {
            let _ = child.kill().await;
            connection.pending.close();
            return WorkerEnd::Lost(format!("worker killed: no answer for {:?}", config.module.hang_after));
        }
        if limit > 0 && counters.operations.load(Ordering::Relaxed) - operations_before >= limit {
            let retry_after = config.pacing.first_backoff;
            publisher.publish(State::Unavailable { reason: "worker being replaced".to_owned(), retry_after });
            drain(&connection, config.module.hang_after).await;
            tracing::info!(operations = limit, "replacing the HSM worker at its operation limit");
            return WorkerEnd::Replaced;
        }
    }
}

/// Waits for the pending line calls. New calls already wait for the next worker, so background calls are cut off after
/// [`BACKGROUND_DRAIN`] and repeated.
async fn drain(connection: &Connection, limit: Duration) {
    let started = Instant::now();
    let busy = |priority, limit| connection.pending.count(priority) > 0 && started.elapsed() < limit;
    while busy(Priority::Line, limit) || busy(Priority::Background, BACKGROUND_DRAIN.min(limit)) {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn exit_status(child: &mut Child) -> String {
    match tokio::time::timeout(Duration::from_secs(1), child.wait()).await {
        Ok(Ok(status)) => format!(" ({status})"),
        _ => String::new(),
    }
}

async fn start(
    config: &HsmConfig,
    counters: &Arc<Counters>,
) -> Result<(Child, Connection, oneshot::Receiver<String>), WorkerEnd> {
    let lost = |what: &str, e: &dyn std::fmt::Display| WorkerEnd::Lost(format!("{what}: {e}"));
    let module = config.module.clone();
    let restored = tokio::task::spawn_blocking(move || module.restore_files()).await;
    let restored = restored.map_err(|e| lost("backing up or restoring the module's files", &e))?;
    restored.map_err(|e| lost("backing up or restoring the module's files", &e))?;
    let receiver = tokio::task::spawn_blocking(TransportReceiver::generate)
        .await
        .map_err(|e| lost("generating the transport RSA pair", &e))??;
    let (socket, worker_socket) =
        std::os::unix::net::UnixStream::pair().map_err(|e| lost("creating a socket pair", &e))?;
    let child = spawn(config, worker_socket).map_err(|e| lost("starting the HSM worker", &e))?;
    socket.set_nonblocking(true).map_err(|e| lost("configuring the worker's socket", &e))?;
    let socket = UnixStream::from_std(socket).map_err(|e| lost("configuring the worker's socket", &e))?;
    let (read, mut write) = socket.into_split();
    let mut read = BufReader::new(read);
    let request = start_request(config, counters, receiver.public_copy());
    write_frame(&mut write, &request).await.map_err(|e| lost("writing to the HSM worker", &e))?;
    let answer: Result<Started, Failure> = match read_frame(&mut read).await {
        Ok(Some(body)) => wire::parse(&body).map_err(|e| lost("reading the worker's answer", &e))?,
        Ok(None) => return Err(WorkerEnd::Lost("HSM worker ended while loading the module".to_owned())),
        Err(e) => return Err(lost("reading the worker's answer", &e)),
    };
    let started = answer.map_err(|failure| match failure.class {
        FailureClass::Permanent => WorkerEnd::Permanent(failure.message),
        _ => WorkerEnd::Lost(failure.message),
    })?;
    let transport = receiver.open(config.module.oaep_hash, config.module.wrap, &started.transport_key)?;
    let (connection, closed) = connect(read, write, transport, started, Arc::clone(counters));
    check_keys(config, &connection).await?;
    Ok((child, connection, closed))
}

/// Starts this program as the worker. Its environment is exactly that of the module's profile; its standard input is the socket.
/// It gets its own process group, so that Ctrl-C on a terminal does not kill it before the daemon has drained its calls.
fn spawn(config: &HsmConfig, socket: std::os::unix::net::UnixStream) -> std::io::Result<Child> {
    let pin = match &config.pin_agent {
        Some(agent) => Stdio::from(agent.pin_pipe()?),
        None => Stdio::null(),
    };
    Command::new(&config.worker_program)
        .arg(worker::ARGUMENT)
        .env_clear()
        .envs(&config.module.environment)
        .stdin(Stdio::from(OwnedFd::from(socket)))
        .stdout(pin)
        .stderr(Stdio::inherit())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

fn start_request(config: &HsmConfig, counters: &Counters, transport_rsa: wire::TransportRsa) -> Start {
    let destroyed = counters.destroyed.lock().unwrap_or_else(PoisonError::into_inner);
    let expected = config.keys.all().filter(|(name, ..)| !destroyed.contains(*name));
    let keys: BTreeMap<_, _> = expected
        .map(|(name, id, role, provenance)| {
            (name.clone(), KeyOnToken { id: id.to_vec(), role: role.with_route(config.module.kdf), provenance })
        })
        .collect();
    Start {
        module: config.module.clone(),
        token: config.keys.token.clone(),
        pin: if config.pin_agent.is_some() { PinSource::FromAgent } else { config.pin.clone() },
        keys,
        transport_rsa,
    }
}

/// Checks that the keys match the manifest and work: signing keys against their public keys, master keys against their check
/// values. The signed message can be neither a certificate nor a checkpoint.
async fn check_keys(config: &HsmConfig, connection: &Connection) -> Result<(), HsmError> {
    let until = Instant::now() + START_LIMIT;
    let call = async |operation| match connection.call(Priority::Line, vec![operation], until).await {
        Some(Ok(answers)) => {
            answers.into_iter().next().ok_or_else(|| HsmError::InvalidAnswer("empty answer".to_owned()))
        }
        Some(Err(failure)) => Err(HsmError::InvalidAnswer(failure.message)),
        None => Err(HsmError::InvalidAnswer("worker ended during the key check".to_owned())),
    };
    for (key, public) in config.keys.signers() {
        let algorithm = SignatureAlgorithm::default_for(public.kind());
        let message = [b"spp/v1/key-check".as_slice(), key.as_str().as_bytes()].concat();
        let answer = call(Operation::Sign { key: key.clone(), algorithm, message: message.clone() }).await?;
        let Answer::Signature(raw) = answer else { return Err(HsmError::InvalidAnswer("no signature".to_owned())) };
        let signature = to_x509_form(algorithm, raw)?;
        public
            .verify(algorithm, &message, &signature)
            .map_err(|_| HsmError::InvalidAnswer(format!("the key {key} does not match the key manifest")))?;
    }
    for key in &config.keys.master {
        let check = Derivation::check_value(key.name.clone());
        let len = u32::try_from(check.length).unwrap_or(u32::MAX);
        let operation =
            Operation::Derive { key: key.name.clone(), prf: key.prf, fixed_input: check.fixed_input(), len };
        let Answer::Derived(value) = call(operation).await? else {
            return Err(HsmError::InvalidAnswer("no check value".to_owned()));
        };
        // The check value is public: the manifest holds it in clear.
        if value.into_secret().expose() != &key.check_value {
            return Err(HsmError::InvalidAnswer(format!(
                "the check value of the master key {} differs from the key manifest",
                key.name
            )));
        }
    }
    Ok(())
}
