//! The async handle: few verbs, each with a deadline, behind a queue with an end.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, watch};

use super::connection::{Connection, Counters};
use super::failure::{FailureClass, HsmError};
use super::kdf::Derivation;
use super::objects::{public_key, to_x509_form};
use super::register::KeyRegister;
use super::statistics::CallStatistic;
use super::supervisor::{HsmConfig, State, supervise};
use super::wire::{Answer, Lane, Operation};
use crate::keys::{DevicePrivateKey, KeptKey, KeyError, KeyKind, PublicKey, SignatureAlgorithm, WrappedKey};
use crate::names::KeyName;
use crate::secret::SecretBytes;

/// How long background work waits for a worker before it says so.
const BACKGROUND_PATIENCE: Duration = Duration::from_secs(5);

/// The HSM. Clones share one worker; it ends when the last clone is dropped.
#[derive(Clone)]
pub struct Hsm {
    config: Arc<HsmConfig>,
    state: watch::Receiver<State>,
    queue: Arc<Semaphore>,
    counters: Arc<Counters>,
}

/// What a new device needs from the HSM, in one request.
pub struct DeviceKeyOrder {
    /// Where its pair comes from; none for profiles without, or whose device makes its own.
    pub pair: Option<PairOrder>,
    /// The symmetric keys.
    pub derivations: Vec<Derivation>,
    /// Octets of public randomness: session identifier, certificate serial number.
    pub random: usize,
}

/// Where a new device's pair comes from.
pub enum PairOrder {
    /// It is made, and kept wrapped under this key.
    Make(KeyKind, KeyName),
    /// It was made in advance.
    Kept(PublicKey, KeptKey),
}

/// What a new device gets from the HSM.
pub struct DeviceKeys {
    /// The pair, if one was ordered.
    pub pair: Option<DeliveredPair>,
    /// In the order of the derivations.
    pub derived: Vec<SecretBytes>,
    /// Public randomness.
    pub random: Vec<u8>,
}

/// A pair for delivery.
pub struct DeliveredPair {
    /// The pair in memory.
    pub private: DevicePrivateKey,
    /// How it is kept until the device has confirmed.
    pub kept: KeptKey,
}

/// Keys that a session has already.
pub struct HeldKeyOrder {
    /// The pair in the secret store.
    pub pair: Option<(PublicKey, KeptKey)>,
    /// The symmetric keys.
    pub derivations: Vec<Derivation>,
}

/// Keys that a session has already, in memory again.
pub struct HeldKeys {
    /// The pair, if one was asked for.
    pub pair: Option<DevicePrivateKey>,
    /// In the order of the derivations.
    pub derived: Vec<SecretBytes>,
}

/// The HSM at this moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HsmStatus {
    /// Whether calls are served.
    pub ready: bool,
    /// Why not.
    pub trouble: String,
    /// The module's description of itself.
    pub module: String,
    /// The token's label.
    pub token_label: String,
    /// The token's serial number.
    pub token_serial: String,
    /// How often the worker was started.
    pub worker_starts: u64,
    /// Calls that wait or are with the worker.
    pub calls_in_flight: u64,
    /// Calls answered.
    pub calls_answered: u64,
    /// Calls that may wait at once.
    pub queue: u64,
    /// What was asked of its workers, and what came of it.
    pub calls: Vec<CallStatistic>,
}

impl Hsm {
    /// Starts the supervisor; a dead HSM does not block the start of the daemon. Needs a tokio runtime.
    pub fn start(config: HsmConfig) -> Self {
        let config = Arc::new(config);
        let counters = Arc::new(Counters::default());
        let retry_after = Duration::from_secs(1);
        let (sender, state) =
            watch::channel(State::Away { why: "the worker is being started".to_owned(), retry_after });
        tokio::spawn(supervise(Arc::clone(&config), sender, Arc::clone(&counters)));
        let queue = Arc::new(Semaphore::new(config.queue));
        Self { config, state, queue, counters }
    }

    /// Waits until calls are served, or says why they are not.
    pub async fn ready(&self, within: Duration) -> Result<(), HsmError> {
        self.connection(Instant::now() + within).await.map(drop)
    }

    /// Within which every call of the line is answered.
    pub fn call_timeout(&self) -> Duration {
        self.config.call_timeout
    }

    /// The worker's threads for what nobody waits for.
    pub fn background_threads(&self) -> usize {
        self.config.module.background_threads
    }

    /// The register that the token was checked against.
    pub fn keys(&self) -> &KeyRegister {
        &self.config.keys
    }

    /// How it is.
    pub fn status(&self) -> HsmStatus {
        let mut status = HsmStatus {
            worker_starts: self.counters.starts.load(Ordering::Relaxed),
            calls_answered: self.counters.answered.load(Ordering::Relaxed),
            calls: self.counters.calls.all(),
            queue: self.config.queue as u64,
            calls_in_flight: self.config.queue.saturating_sub(self.queue.available_permits()) as u64,
            ..HsmStatus::default()
        };
        match &*self.state.borrow() {
            State::Ready(connection) => {
                status.ready = true;
                status.module.clone_from(&connection.module);
                status.token_label.clone_from(&connection.token.label);
                status.token_serial.clone_from(&connection.token.serial);
                status.calls_in_flight = status.calls_in_flight.max(connection.in_flight() as u64);
            }
            State::Away { why, .. } | State::Stopped { why } => status.trouble.clone_from(why),
        }
        status
    }

    /// Resolves at the next change between serving and not serving.
    pub async fn changed(&mut self) {
        // The supervisor lives as long as this handle; its end is a change too.
        let _ = self.state.changed().await;
    }

    /// Signs; ECDSA gives DER. For certificates go through [`crate::provisioning::Issuer`], which asks for the intent.
    pub(crate) async fn sign(
        &self,
        key: &KeyName,
        algorithm: SignatureAlgorithm,
        message: &[u8],
    ) -> Result<Vec<u8>, HsmError> {
        let operations = || vec![Operation::Sign { key: key.clone(), algorithm, message: message.to_vec() }];
        let (_, public) = self
            .config
            .keys
            .signers()
            .find(|(name, _)| *name == key)
            .ok_or_else(|| HsmError::Refused(format!("the key {key} is not one of the register that sign")))?;
        self.call(operations, |mut answers, _| {
            let Answer::Signature(raw) = answers.next()? else { return Err(unexpected()) };
            let signature = to_x509_form(algorithm, raw)?;
            let verified = public.verify(algorithm, message, &signature);
            verified.map_err(|_| HsmError::Wrong(format!("a signature with {key} that does not verify")))?;
            Ok(signature)
        })
        .await
    }

    /// Public randomness of the HSM.
    pub async fn random(&self, len: usize) -> Result<Vec<u8>, HsmError> {
        let order = DeviceKeyOrder { pair: None, derivations: Vec::new(), random: len };
        self.device_keys(&order).await.map(|keys| keys.random)
    }

    /// Derives keys: SP 800-108 in counter mode.
    pub async fn derive(&self, derivations: Vec<Derivation>) -> Result<Vec<SecretBytes>, HsmError> {
        self.held_keys(&HeldKeyOrder { pair: None, derivations }).await.map(|keys| keys.derived)
    }

    /// Generates, derives and draws what a new device needs, in one request.
    pub async fn device_keys(&self, order: &DeviceKeyOrder) -> Result<DeviceKeys, HsmError> {
        let derive = self.derive_operations(&order.derivations)?;
        let random = u32::try_from(order.random).map_err(|e| HsmError::Refused(e.to_string()))?;
        let operations = || {
            let pair = order.pair.iter().map(|pair| match pair {
                PairOrder::Make(kind, wrapping_key) => {
                    Operation::GeneratePair { kind: *kind, wrapping_key: wrapping_key.clone() }
                }
                PairOrder::Kept(public, kept) => delivery(public, kept),
            });
            pair.chain(derive()).chain([Operation::Random { len: random }]).collect()
        };
        self.call(operations, |mut answers, connection| {
            let pair = match &order.pair {
                Some(PairOrder::Make(kind, wrapping_key)) => {
                    Some(new_pair(*kind, wrapping_key, answers.next()?, connection)?)
                }
                Some(PairOrder::Kept(public, kept)) => {
                    let private = delivered(public, answers.next()?, connection)?;
                    Some(DeliveredPair { private, kept: kept.clone() })
                }
                None => None,
            };
            let derived = answers.derived(order.derivations.len())?;
            let Answer::Random(random) = answers.next()? else { return Err(unexpected()) };
            Ok(DeviceKeys { pair, derived, random: random.into_secret().expose().clone() })
        })
        .await
    }

    /// Unwraps and derives what a session has already, in one request.
    pub async fn held_keys(&self, order: &HeldKeyOrder) -> Result<HeldKeys, HsmError> {
        let derive = self.derive_operations(&order.derivations)?;
        let operations = || {
            let pair = order.pair.iter().map(|(public, kept)| delivery(public, kept));
            pair.chain(derive()).collect()
        };
        self.call(operations, |mut answers, connection| {
            let pair = match &order.pair {
                Some((public, _)) => Some(delivered(public, answers.next()?, connection)?),
                None => None,
            };
            Ok(HeldKeys { pair, derived: answers.derived(order.derivations.len())? })
        })
        .await
    }

    /// Destroys a key on the token; it is gone when this returns.
    pub async fn destroy(&self, key: &KeyName) -> Result<(), HsmError> {
        let operations = || vec![Operation::Destroy { key: key.clone() }];
        self.call(operations, |mut answers, _| match answers.next()? {
            Answer::Destroyed => Ok(()),
            _ => Err(unexpected()),
        })
        .await?;
        self.counters.destroyed.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone());
        Ok(())
    }

    /// The derivations as operations; a closure, since a retry needs them again.
    fn derive_operations<'a>(
        &self,
        derivations: &'a [Derivation],
    ) -> Result<impl Fn() -> Vec<Operation> + use<'a>, HsmError> {
        let mut prfs = Vec::with_capacity(derivations.len());
        for derivation in derivations {
            let name = &derivation.master_key;
            let key =
                self.config.keys.master_key(name).ok_or_else(|| {
                    HsmError::Refused(format!("the master key {name} is not in the register of keys"))
                })?;
            if !(1..=Derivation::MAX_LEN).contains(&derivation.length) {
                return Err(HsmError::Refused(format!("a derived key of {} octets", derivation.length)));
            }
            prfs.push(key.prf);
        }
        Ok(move || {
            let operation = |(derivation, prf): (&Derivation, &super::kdf::Prf)| Operation::Derive {
                key: derivation.master_key.clone(),
                prf: *prf,
                fixed_input: derivation.fixed_input(),
                len: u32::try_from(derivation.length).unwrap_or(u32::MAX),
            };
            derivations.iter().zip(&prfs).map(operation).collect()
        })
    }

    /// Sends operations to the worker, waits for a new worker if this one is lost, and tries transient failures again, all
    /// within the deadline. An answer that is not right costs the worker, and the question is asked once more.
    ///
    /// Every operation may be repeated: what a lost worker did is gone with its session objects. Only
    /// a destruction whose answer was lost cannot be told from a key that is missing; it stays an error, for an officer.
    pub(super) async fn call<T>(
        &self,
        operations: impl Fn() -> Vec<Operation>,
        read: impl Fn(Answers, &Connection) -> Result<T, HsmError>,
    ) -> Result<T, HsmError> {
        let _place = self.queue.try_acquire().map_err(|_| HsmError::Busy { waiting: self.config.queue })?;
        self.call_within(Lane::Line, self.config.call_timeout, u32::MAX, operations, read).await
    }

    /// The same for either lane, without a place in the line's queue, tried at most so often.
    pub(super) async fn call_within<T>(
        &self,
        lane: Lane,
        limit: Duration,
        attempts: u32,
        operations: impl Fn() -> Vec<Operation>,
        read: impl Fn(Answers, &Connection) -> Result<T, HsmError>,
    ) -> Result<T, HsmError> {
        let until = Instant::now() + limit;
        let mut attempt = 0;
        let mut why = String::new();
        let mut was_wrong = false;
        loop {
            // Whoever works in the background looks again later; the line has nothing better to do than to wait.
            let patience = if lane == Lane::Line { until } else { until.min(Instant::now() + BACKGROUND_PATIENCE) };
            let connection = self.connection(patience).await?;
            let answer = tokio::time::timeout_at(until.into(), connection.call(lane, operations(), until)).await;
            match answer {
                Err(_) => return Err(HsmError::Deadline(limit)),
                Ok(Some(Ok(answers))) => match read(Answers(answers.into_iter()), &connection) {
                    // Two workers say the same: it is what they were asked with that is wrong.
                    Err(HsmError::Wrong(wrong)) if std::mem::replace(&mut was_wrong, true) => {
                        return Err(HsmError::Wrong(wrong));
                    }
                    Err(HsmError::Wrong(wrong)) => {
                        tracing::error!(%wrong, "the HSM gave an answer that is not right; its worker is replaced");
                        connection.condemn(&wrong);
                        why = wrong;
                    }
                    answer => {
                        connection.note(None);
                        return answer;
                    }
                },
                Ok(Some(Err(failure))) => {
                    if attempt == 0 && failure.class != FailureClass::Absent {
                        connection.note(Some(&failure));
                    }
                    match failure.class {
                        FailureClass::Transient | FailureClass::SessionLost | FailureClass::ModuleLost => {
                            why = failure.message;
                        }
                        FailureClass::Permanent => return Err(HsmError::Stopped(failure.message)),
                        FailureClass::Rejected => return Err(HsmError::Refused(failure.message)),
                        FailureClass::Absent => return Err(HsmError::Absent(failure.message)),
                    }
                }
                Ok(None) => "the worker ended".clone_into(&mut why),
            }
            attempt += 1;
            let pause = Duration::from_millis(10 << attempt.min(5));
            if Instant::now() + pause >= until || attempt >= attempts {
                return Err(HsmError::Unavailable { why, retry_after: pause });
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// The worker that serves; waits for one until the deadline.
    async fn connection(&self, until: Instant) -> Result<Arc<Connection>, HsmError> {
        let mut state = self.state.clone();
        loop {
            let current = state.borrow_and_update().clone();
            let (why, retry_after) = match current {
                State::Ready(connection) => return Ok(connection),
                State::Stopped { why } => return Err(HsmError::Stopped(why)),
                State::Away { why, retry_after } => (why, retry_after),
            };
            match tokio::time::timeout_at(until.into(), state.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(HsmError::Unavailable { why, retry_after }),
            }
        }
    }
}

/// The answers to one call, in order.
pub(super) struct Answers(std::vec::IntoIter<Answer>);

impl Answers {
    pub(super) fn next(&mut self) -> Result<Answer, HsmError> {
        self.0.next().ok_or_else(unexpected)
    }

    fn derived(&mut self, count: usize) -> Result<Vec<SecretBytes>, HsmError> {
        let one = |answer| match answer {
            Answer::Derived(secret) => Ok(secret.into_secret()),
            _ => Err(unexpected()),
        };
        (0..count).map(|_| self.next().and_then(one)).collect()
    }
}

fn delivery(public: &PublicKey, kept: &KeptKey) -> Operation {
    let kind = public.kind();
    match kept {
        KeptKey::Wrapped(WrappedKey { wrapping_key, blob }) => {
            Operation::Rewrap { kind, wrapping_key: wrapping_key.clone(), blob: blob.clone() }
        }
        KeptKey::OnToken(pair) => Operation::DeliverPair { kind, pair: pair.clone() },
    }
}

fn delivered(public: &PublicKey, answer: Answer, connection: &Connection) -> Result<DevicePrivateKey, HsmError> {
    let Answer::Rewrapped(delivered) = answer else { return Err(unexpected()) };
    let plain = connection.transport.unwrap(&delivered)?;
    DevicePrivateKey::from_unwrapped(public.clone(), &plain).map_err(wrong_key)
}

fn new_pair(
    kind: KeyKind,
    wrapping_key: &KeyName,
    answer: Answer,
    connection: &Connection,
) -> Result<DeliveredPair, HsmError> {
    let Answer::Pair { public, kept, delivered } = answer else { return Err(unexpected()) };
    let public = public_key(kind, public)?;
    let plain = connection.transport.unwrap(&delivered)?;
    let private = DevicePrivateKey::from_unwrapped(public, &plain).map_err(wrong_key)?;
    let kept = KeptKey::Wrapped(WrappedKey { wrapping_key: wrapping_key.clone(), blob: kept });
    Ok(DeliveredPair { private, kept })
}

fn wrong_key(error: KeyError) -> HsmError {
    HsmError::Wrong(error.to_string())
}

pub(super) fn unexpected() -> HsmError {
    HsmError::Wrong("an answer of another kind than the question".to_owned())
}
