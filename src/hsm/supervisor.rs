//! The supervisor of the worker process: starts it, checks its keys, replaces it when it hangs, dies or has done its share.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;

use super::connection::{Connection, Counters, connect, read_frame, write_frame};
use super::failure::{Failure, FailureClass, HsmError};
use super::kdf::Derivation;
use super::key_manifest::KeyManifest;
use super::members::StatePublisher;
use super::module::ModuleProfile;
use super::objects::to_x509_form;
use super::pin::PinSource;
use super::pin_agent::PinAgent;
use super::pin_attempts::{PinAttempts, version};
use super::transport::TransportReceiver;
use super::wire::{self, Answer, KeyOnToken, Operation, Priority, Start, Started};
use super::worker;
use crate::keys::SignatureAlgorithm;

/// What the HSM's side of the daemon needs.
#[derive(Debug, Clone)]
pub struct HsmConfig {
    /// What it is called where there are several.
    pub name: String,
    /// The module.
    pub module: ModuleProfile,
    /// Where the user PIN is read, by the worker.
    pub pin: PinSource,
    /// Who keeps a PIN that was typed; with [`PinSource::Prompt`].
    pub pin_keeper: Option<Arc<PinAgent>>,
    /// Where it is remembered that a PIN was refused.
    pub pin_refused: PathBuf,
    /// What the token must hold.
    pub keys: KeyManifest,
    /// Every call is answered within this.
    pub call_timeout: Duration,
    /// Calls that may wait at once; more are refused.
    pub queue: usize,
    /// The program that is started as the worker; `sppd` itself.
    pub worker_program: PathBuf,
    /// How long the supervisor waits between its own steps.
    pub pacing: SupervisorPacing,
}

/// How long the supervisor waits between its own steps. The default is for production; tests have shorter ones.
#[derive(Debug, Clone, Copy)]
pub struct SupervisorPacing {
    /// The first wait before a lost worker is started again.
    pub first_backoff: Duration,
    /// The longest such wait, each being twice the one before: how long an HSM that is back may go unnoticed.
    pub longest_backoff: Duration,
    /// A worker that served this long resets the wait to the first one.
    pub steady_after: Duration,
    /// The interval between two checks for a hanging worker.
    pub poll_interval: Duration,
    /// The interval between two checks whether an officer has acted on a refused PIN.
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

/// How long a start may take: loading, login and the audit of the keys.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take where a person enters the PIN at the HSM.
const PERSON_LIMIT: Duration = Duration::from_secs(5 * 60);
/// How long a worker that is replaced may go on with background work.
const BACKGROUND_DRAIN: Duration = Duration::from_millis(200);

/// What callers see of the worker.
#[derive(Clone)]
pub(crate) enum State {
    /// Being started, the first time or again.
    Unavailable { why: String, retry_after: Duration },
    /// Serving.
    Ready(Arc<Connection>),
    /// Only an officer helps.
    Stopped { why: String },
}

/// Runs until nobody holds the handle any more.
pub(crate) async fn supervise(config: Arc<HsmConfig>, seat: StatePublisher, counters: Arc<Counters>) {
    let pacing = config.pacing;
    let mut wait = pacing.first_backoff;
    let attempts = PinAttempts::new(config.pin_refused.clone());
    loop {
        if let Some(why) = attempts.refused(&config.pin) {
            tracing::error!(%why, "the PIN was refused before, and is not tried again until an officer has acted");
            seat.tell(State::Stopped { why });
            tokio::select! {
                () = officer_acted(&attempts, &config) => {}
                () = seat.closed() => return,
            }
            tracing::info!("an officer has acted; the HSM is tried again");
            seat.tell(State::Unavailable {
                why: "the worker is being started".to_owned(),
                retry_after: pacing.first_backoff,
            });
        }
        let tried = version(&config.pin);
        counters.starts.fetch_add(1, Ordering::Relaxed);
        let ended = tokio::select! {
            ended = one_life(&config, &seat, &counters, &mut wait) => ended,
            () = seat.closed() => return,
        };
        match ended {
            Ended::Replaced => continue,
            Ended::Lost(why) => {
                tracing::warn!(%why, retry_in = ?wait, "the HSM worker is gone; it is started again");
                seat.tell(State::Unavailable { why, retry_after: wait });
            }
            Ended::Permanent(why) => {
                let mut remembered = attempts.remember(tried, &why);
                seat.tell(State::Stopped { why: why.clone() });
                // What cannot be remembered is not tried again by this process either.
                while let Err(error) = remembered {
                    tracing::error!(%error, "it cannot be remembered that the PIN was refused; do not restart sppd before it is right");
                    tokio::select! {
                        () = tokio::time::sleep(pacing.officer_poll_interval) => {}
                        () = seat.closed() => return,
                    }
                    remembered = attempts.remember(tried, &why);
                }
                if !is_read_anew(&config.pin) {
                    tracing::error!(%why, "the PIN of this process is the wrong one: `sppctl hsm retry-pin`, then restart sppd");
                    return seat.closed().await;
                }
                continue;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(pacing.longest_backoff),
            () = seat.closed() => return,
        }
    }
}

/// Whether another attempt of this process could be one with another PIN: what was typed, or given at the start by systemd, stays.
const fn is_read_anew(pin: &PinSource) -> bool {
    matches!(pin, PinSource::File(_) | PinSource::Protected)
}

/// Resolves when the PIN's file is another one, or an officer has allowed one more attempt.
async fn officer_acted(attempts: &PinAttempts, config: &HsmConfig) {
    while attempts.refused(&config.pin).is_some() {
        tokio::time::sleep(config.pacing.officer_poll_interval).await;
    }
}

/// Why a worker's life ended.
enum Ended {
    /// It had done its share.
    Replaced,
    Lost(String),
    Permanent(String),
}

impl From<HsmError> for Ended {
    fn from(error: HsmError) -> Self {
        match error {
            HsmError::Stopped(why) => Self::Permanent(why),
            other => Self::Lost(other.to_string()),
        }
    }
}

/// Starts a worker, checks it, lets it serve, and says why it ended.
async fn one_life(config: &HsmConfig, seat: &StatePublisher, counters: &Arc<Counters>, wait: &mut Duration) -> Ended {
    // A person at the HSM takes longer than a module.
    let limit = if config.pin == PinSource::Protected { PERSON_LIMIT } else { START_LIMIT };
    let started = tokio::time::timeout(limit, start(config, counters)).await;
    let (mut child, connection, mut closed) = match started {
        Ok(Ok(worker)) => worker,
        Ok(Err(ended)) => return ended,
        Err(_) => return Ended::Lost(format!("the worker was not ready within {limit:?}")),
    };
    let connection = Arc::new(connection);
    tracing::info!(module = %connection.module, token = %connection.token.label, "the HSM is ready");
    seat.tell(State::Ready(Arc::clone(&connection)));
    let (served_since, mut answered) = (Instant::now(), 0);
    let mut looked_at = Instant::now();
    let done_before = counters.operations.load(Ordering::Relaxed);
    let limit = config.module.recycle_after_operations;
    loop {
        tokio::select! {
            why = &mut closed => {
                let why = why.unwrap_or_else(|_| "its socket closed".to_owned());
                return Ended::Lost(format!("{why}{}", exit_of(&mut child).await));
            }
            why = connection.condemned() => {
                let _ = child.kill().await;
                connection.pending.close();
                return Ended::Lost(why);
            }
            () = tokio::time::sleep(config.pacing.poll_interval) => {}
        }
        if served_since.elapsed() >= config.pacing.steady_after {
            *wait = config.pacing.first_backoff;
        }
        // A token that is taken away while nobody asks is noticed, too, or one that nobody asks any more.
        let so_far = counters.answered.load(Ordering::Relaxed);
        if so_far != std::mem::replace(&mut answered, so_far) {
            looked_at = Instant::now();
        }
        if looked_at.elapsed() >= config.module.keep_alive || connection.is_doubtful() {
            let checked = tokio::time::timeout(config.module.hang_after, check_keys(config, &connection)).await;
            if let Err(error) = checked.unwrap_or(Err(HsmError::Deadline(config.module.hang_after))) {
                let _ = child.kill().await;
                connection.pending.close();
                return Ended::from(error);
            }
            connection.note_checked();
            (looked_at, answered) = (Instant::now(), counters.answered.load(Ordering::Relaxed));
        }
        if connection.pending.has_one_that_hangs(config.module.hang_after) {
            let _ = child.kill().await;
            connection.pending.close();
            return Ended::Lost(format!("it did not answer for {:?} and was killed", config.module.hang_after));
        }
        if limit > 0 && counters.operations.load(Ordering::Relaxed) - done_before >= limit {
            let retry_after = config.pacing.first_backoff;
            seat.tell(State::Unavailable { why: "the worker is being replaced".to_owned(), retry_after });
            drain(&connection, config.module.hang_after).await;
            tracing::info!(after = limit, "the HSM worker has done its share and is replaced");
            return Ended::Replaced;
        }
    }
}

/// Waits for the line's calls that are with the worker; new ones wait for the next worker already, and so background calls are
/// waited for only a moment: what they had done is done again.
async fn drain(connection: &Connection, limit: Duration) {
    let begun = Instant::now();
    let busy = |lane, limit| connection.pending.count(lane) > 0 && begun.elapsed() < limit;
    while busy(Priority::Line, limit) || busy(Priority::Background, BACKGROUND_DRAIN.min(limit)) {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn exit_of(child: &mut Child) -> String {
    match tokio::time::timeout(Duration::from_secs(1), child.wait()).await {
        Ok(Ok(status)) => format!(" ({status})"),
        _ => String::new(),
    }
}

async fn start(
    config: &HsmConfig,
    counters: &Arc<Counters>,
) -> Result<(Child, Connection, oneshot::Receiver<String>), Ended> {
    let lost = |what: &str, e: &dyn std::fmt::Display| Ended::Lost(format!("{what}: {e}"));
    let module = config.module.clone();
    let looked = tokio::task::spawn_blocking(move || module.look_after_files()).await;
    let looked = looked.map_err(|e| lost("looking after the module's files", &e))?;
    looked.map_err(|e| lost("looking after the module's files", &e))?;
    let receiver = tokio::task::spawn_blocking(TransportReceiver::generate)
        .await
        .map_err(|e| lost("making a transport pair", &e))??;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(|e| lost("making a socket pair", &e))?;
    let child = spawn(config, theirs).map_err(|e| lost("starting the HSM worker", &e))?;
    ours.set_nonblocking(true).map_err(|e| lost("the worker's socket", &e))?;
    let socket = UnixStream::from_std(ours).map_err(|e| lost("the worker's socket", &e))?;
    let (read, mut write) = socket.into_split();
    let mut read = BufReader::new(read);
    let order = start_order(config, counters, receiver.public_copy());
    write_frame(&mut write, &order).await.map_err(|e| lost("talking to the HSM worker", &e))?;
    let answer: Result<Started, Failure> = match read_frame(&mut read).await {
        Ok(Some(body)) => wire::parse(&body).map_err(|e| lost("reading the worker's answer", &e))?,
        Ok(None) => return Err(Ended::Lost("the HSM worker ended while it loaded the module".to_owned())),
        Err(e) => return Err(lost("reading the worker's answer", &e)),
    };
    let started = answer.map_err(|failure| match failure.class {
        FailureClass::Permanent => Ended::Permanent(failure.message),
        _ => Ended::Lost(failure.message),
    })?;
    let transport = receiver.open(config.module.oaep_hash, config.module.wrap, &started.transport_key)?;
    let (connection, closed) = connect(read, write, transport, started, Arc::clone(counters));
    check_keys(config, &connection).await?;
    Ok((child, connection, closed))
}

/// The worker is this program again; its environment is what the module's profile says and nothing else, its standard
/// input is the socket. It has a process group of its own, so that Ctrl-C on a terminal drains before it dies.
fn spawn(config: &HsmConfig, socket: std::os::unix::net::UnixStream) -> std::io::Result<Child> {
    let pin = match &config.pin_keeper {
        Some(keeper) => Stdio::from(keeper.hand()?),
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

fn start_order(config: &HsmConfig, counters: &Counters, transport_rsa: wire::TransportRsa) -> Start {
    let destroyed = counters.destroyed.lock().unwrap_or_else(PoisonError::into_inner);
    let wanted = config.keys.all().filter(|(name, ..)| !destroyed.contains(*name));
    let keys: BTreeMap<_, _> = wanted
        .map(|(name, id, role, provenance)| {
            (name.clone(), KeyOnToken { id: id.to_vec(), role: role.by(config.module.kdf), provenance })
        })
        .collect();
    Start {
        module: config.module.clone(),
        token: config.keys.token.clone(),
        pin: if config.pin_keeper.is_some() { PinSource::Handed } else { config.pin.clone() },
        keys,
        transport_rsa,
    }
}

/// The keys are the ones of the register, and they work: signing keys against their public halves, master keys against
/// their check values. Not certificates or checkpoints are signed here, but a text that neither can be.
async fn check_keys(config: &HsmConfig, connection: &Connection) -> Result<(), HsmError> {
    let until = Instant::now() + START_LIMIT;
    let one = async |operation| match connection.call(Priority::Line, vec![operation], until).await {
        Some(Ok(answers)) => answers.into_iter().next().ok_or_else(|| HsmError::Wrong("an empty answer".to_owned())),
        Some(Err(failure)) => Err(HsmError::Wrong(failure.message)),
        None => Err(HsmError::Wrong("the worker ended while its keys were checked".to_owned())),
    };
    for (key, public) in config.keys.signers() {
        let algorithm = SignatureAlgorithm::default_for(public.kind());
        let message = [b"spp/v1/key-check".as_slice(), key.as_str().as_bytes()].concat();
        let answer = one(Operation::Sign { key: key.clone(), algorithm, message: message.clone() }).await?;
        let Answer::Signature(raw) = answer else { return Err(HsmError::Wrong("no signature".to_owned())) };
        let signature = to_x509_form(algorithm, raw)?;
        public
            .verify(algorithm, &message, &signature)
            .map_err(|_| HsmError::Wrong(format!("the key {key} is not the one of the register")))?;
    }
    for key in &config.keys.master {
        let check = Derivation::check_value(key.name.clone());
        let len = u32::try_from(check.length).unwrap_or(u32::MAX);
        let operation =
            Operation::Derive { key: key.name.clone(), prf: key.prf, fixed_input: check.fixed_input(), len };
        let Answer::Derived(value) = one(operation).await? else {
            return Err(HsmError::Wrong("no check value".to_owned()));
        };
        // The check value is public: it is in the register in clear.
        if value.into_secret().expose() != &key.check_value {
            return Err(HsmError::Wrong(format!(
                "the master key {} has another check value than the register",
                key.name
            )));
        }
    }
    Ok(())
}
