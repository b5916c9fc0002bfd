//! The async handle: HSM operations with deadlines, behind a bounded queue.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use spp_format::keys::{DevicePrivateKey, KeyError, KeyType, PublicKey, SignatureAlgorithm};
use spp_format::names::KeyName;
use spp_format::secret::SecretBytes;
use tokio::sync::watch;
use tracing::Instrument as _;

use super::connection::Connection;
use super::failure::HsmError;
use super::failure_class::FailureClass;
use super::kdf::Derivation;
use super::key_manifest::KeyManifest;
use super::members::{HsmId, Hsms, Members, Selection};
use super::objects::{public_key, to_x509_form};
use super::supervisor::supervise;
use super::wire::{Answer, Operation, Priority};
use super::worker_state::State;
use super::{BatchName, StoredKey, WrappedKey};

/// How long a background call waits for a ready worker before it fails.
const BACKGROUND_PATIENCE: Duration = Duration::from_secs(5);

/// A handle on one HSM, or on several with the same keys. All clones share one worker per HSM; the workers end when the last
/// clone is dropped.
#[derive(Clone)]
pub struct Hsm {
    pub(super) members: Arc<Members>,
    pub(super) states: watch::Receiver<Vec<State>>,
    /// The only HSM to use, set by [`Hsm::pinned_to`].
    pub(super) only: Option<HsmId>,
}

/// Options of a call.
pub(super) struct CallOptions {
    pub(super) priority: Priority,
    /// The deadline of the call.
    pub(super) limit: Duration,
    /// Maximum number of attempts.
    pub(super) attempts: u32,
    /// The batch whose owners alone can serve the call; `None` if the keys of the manifest suffice, which every HSM holds.
    pub(super) batch: Option<BatchName>,
    /// Fail instead of waiting for a batch owner, because the caller can use a pair of another HSM.
    pub(super) fail_fast: bool,
}

/// Requests everything that a new device needs from the HSM.
pub struct DeviceKeyRequest {
    /// The source of its key pair; `None` if the profile has no pair or the device generates it.
    pub pair: Option<PairSource>,
    /// The symmetric keys.
    pub derivations: Vec<Derivation>,
    /// Number of public random bytes: session identifier, certificate serial number.
    pub random: usize,
}

/// The source of a new device's key pair.
pub enum PairSource {
    /// Generate a pair and store it wrapped under this key.
    Generate(KeyType, KeyName),
    /// Use a pregenerated pair.
    Stored(PublicKey, StoredKey),
}

/// The keys of a new device.
pub struct DeviceKeys {
    /// The pair, if one was requested.
    pub pair: Option<DeliveredPair>,
    /// The derived keys, in the order of the request.
    pub derived: Vec<SecretBytes>,
    /// Public random bytes.
    pub random: Vec<u8>,
}

/// A pair for delivery.
pub struct DeliveredPair {
    /// The pair in memory.
    pub private: DevicePrivateKey,
    /// Its stored form until the device confirms.
    pub stored: StoredKey,
}

/// Requests the keys of an existing session.
pub struct KeyReloadRequest {
    /// The pair in the secret store.
    pub pair: Option<(PublicKey, StoredKey)>,
    /// The symmetric keys.
    pub derivations: Vec<Derivation>,
}

/// The keys of an existing session, in memory.
pub struct ReloadedKeys {
    /// The pair, if one was requested.
    pub pair: Option<DevicePrivateKey>,
    /// The derived keys, in the order of the request.
    pub derived: Vec<SecretBytes>,
}

impl Hsm {
    /// Starts the supervisors. An unavailable HSM does not delay the start of the daemon. Requires a tokio runtime.
    pub fn start(hsms: impl Into<Hsms>) -> Self {
        let (members, states, publishers) = Members::new(hsms.into());
        for (member, publisher) in members.all.iter().zip(publishers) {
            let supervisor = supervise(Arc::clone(&member.config), publisher, Arc::clone(&member.counters));
            let span = match members.all.len() {
                1 => tracing::Span::none(),
                _ => tracing::error_span!("hsm", name = %member.config.name),
            };
            tokio::spawn(supervisor.instrument(span));
        }
        Self { members: Arc::new(members), states, only: None }
    }

    /// The HSMs of this handle.
    pub fn members(&self) -> impl Iterator<Item = HsmId> + use<> {
        let only = self.only;
        self.members.ids().filter(move |member| only.is_none_or(|only| only == *member))
    }

    /// A handle that uses this HSM only.
    pub fn pinned_to(&self, member: HsmId) -> Self {
        Self { only: Some(member), ..self.clone() }
    }

    /// The HSMs that currently serve calls, least loaded first.
    pub fn ready_members(&self) -> Vec<HsmId> {
        self.members.ready(&self.states.borrow(), Priority::Line)
    }

    /// The recorded owners of a batch.
    pub fn batch_owners(&self, batch: BatchName) -> BTreeSet<HsmId> {
        self.members.batch_owners(batch)
    }

    /// Records that this HSM owns a batch.
    pub fn add_batch_owner(&self, batch: BatchName, owner: HsmId) {
        self.members.add_batch_owner(batch, owner);
    }

    /// Records that this HSM owns a batch unless another HSM does. Returns whether this HSM owns it now.
    pub fn claim_batch(&self, batch: BatchName, owner: HsmId) -> bool {
        self.members.claim_batch(batch, owner)
    }

    /// Removes the owners of a batch that has ended.
    pub fn forget_batch_owners(&self, batch: BatchName) {
        self.members.forget_batch_owners(batch);
    }

    /// Waits until an HSM is ready; the error says why none is.
    pub async fn ready(&self, within: Duration) -> Result<(), HsmError> {
        let candidates = self.members.candidates(None, self.only);
        let until = Instant::now() + within;
        self.members.select(&self.states, Priority::Line, &candidates, false, until).await.map(drop)
    }

    /// The deadline of a line call.
    pub fn call_timeout(&self) -> Duration {
        self.members.call_timeout
    }

    /// The number of background threads of a worker.
    pub fn background_threads(&self, member: HsmId) -> usize {
        self.members.get(member).map_or(1, |member| member.config.module.background_threads)
    }

    /// The key manifest that the tokens were checked against. All HSMs hold the same keys.
    pub fn keys(&self) -> &KeyManifest {
        &self.members.keys
    }

    /// Resolves when an HSM starts or stops serving.
    pub async fn changed(&mut self) {
        // An error means that the supervisors have ended, which is a change too.
        let _ = self.states.changed().await;
    }

    /// Signs any bytes; ECDSA signatures are DER. Other modules sign with a capability of [`signing`](super::signing).
    pub(super) async fn sign(
        &self,
        key: &KeyName,
        algorithm: SignatureAlgorithm,
        message: &[u8],
    ) -> Result<Vec<u8>, HsmError> {
        let operations = || vec![Operation::Sign { key: key.clone(), algorithm, message: message.to_vec() }];
        let (_, public) = self
            .keys()
            .signers()
            .find(|(name, _)| *name == key)
            .ok_or_else(|| HsmError::Refused(format!("the key manifest has no signing or log key {key}")))?;
        self.call(None, false, operations, |mut answers, _| {
            let Answer::Signature(raw) = answers.next()? else { return Err(unexpected()) };
            let signature = to_x509_form(algorithm, raw)?;
            let verified = public.verify(algorithm, message, &signature);
            verified.map_err(|_| HsmError::InvalidAnswer(format!("the signature of {key} does not verify")))?;
            Ok(signature)
        })
        .await
    }

    /// Public random bytes from the HSM.
    pub async fn random(&self, len: usize) -> Result<Vec<u8>, HsmError> {
        let order = DeviceKeyRequest { pair: None, derivations: Vec::new(), random: len };
        self.device_keys(&order).await.map(|keys| keys.random)
    }

    /// Derives keys with the SP 800-108 KDF in counter mode.
    pub async fn derive(&self, derivations: Vec<Derivation>) -> Result<Vec<SecretBytes>, HsmError> {
        self.reload_keys(&KeyReloadRequest { pair: None, derivations }).await.map(|keys| keys.derived)
    }

    /// Provides the keys and random bytes of a new device in one request.
    pub async fn device_keys(&self, order: &DeviceKeyRequest) -> Result<DeviceKeys, HsmError> {
        let derive = self.derive_operations(&order.derivations)?;
        let random = u32::try_from(order.random).map_err(|e| HsmError::Refused(e.to_string()))?;
        let operations = || {
            let pair = order.pair.iter().map(|pair| match pair {
                PairSource::Generate(kind, wrapping_key) => {
                    Operation::GeneratePair { kind: *kind, wrapping_key: wrapping_key.clone() }
                }
                PairSource::Stored(public, stored) => delivery(public, stored),
            });
            pair.chain(derive()).chain([Operation::Random { len: random }]).collect()
        };
        // Only the batch's owners can unwrap its pairs.
        let batch = match &order.pair {
            Some(PairSource::Generate(_, key)) => BatchName::from_key_name(key),
            Some(PairSource::Stored(_, stored)) => stored.batch(),
            None => None,
        };
        self.call(batch, order.pair.is_some(), operations, |mut answers, connection| {
            let pair = match &order.pair {
                Some(PairSource::Generate(kind, wrapping_key)) => {
                    Some(new_pair(*kind, wrapping_key, answers.next()?, connection)?)
                }
                Some(PairSource::Stored(public, stored)) => {
                    let private = delivered(public, answers.next()?, connection)?;
                    Some(DeliveredPair { private, stored: stored.clone() })
                }
                None => None,
            };
            let derived = answers.derived(order.derivations.len())?;
            let Answer::Random(random) = answers.next()? else { return Err(unexpected()) };
            Ok(DeviceKeys { pair, derived, random: random.into_secret().expose().clone() })
        })
        .await
    }

    /// Unwraps and derives the keys of an existing session in one request.
    pub async fn reload_keys(&self, order: &KeyReloadRequest) -> Result<ReloadedKeys, HsmError> {
        let derive = self.derive_operations(&order.derivations)?;
        let operations = || {
            let pair = order.pair.iter().map(|(public, stored)| delivery(public, stored));
            pair.chain(derive()).collect()
        };
        let batch = order.pair.as_ref().and_then(|(_, stored)| stored.batch());
        self.call(batch, false, operations, |mut answers, connection| {
            let pair = match &order.pair {
                Some((public, _)) => Some(delivered(public, answers.next()?, connection)?),
                None => None,
            };
            Ok(ReloadedKeys { pair, derived: answers.derived(order.derivations.len())? })
        })
        .await
    }

    /// Destroys a key of the manifest on every token. The key no longer exists when this returns.
    pub async fn destroy(&self, key: &KeyName) -> Result<(), HsmError> {
        let operations = || vec![Operation::Destroy { key: key.clone() }];
        for member in self.members() {
            let hsm = self.pinned_to(member);
            let destroyed = hsm.call(None, false, operations, |mut answers, _| match answers.next()? {
                Answer::Destroyed => Ok(()),
                _ => Err(unexpected()),
            });
            destroyed.await?;
            if let Some(member) = self.members.get(member) {
                member.counters.destroyed.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone());
            }
        }
        Ok(())
    }

    /// Converts the derivations to operations. Returns a closure, because a retry needs the operations again.
    fn derive_operations<'a>(
        &self,
        derivations: &'a [Derivation],
    ) -> Result<impl Fn() -> Vec<Operation> + use<'a>, HsmError> {
        let mut prfs = Vec::with_capacity(derivations.len());
        for derivation in derivations {
            let name = &derivation.master_key;
            let key = self
                .keys()
                .master_key(name)
                .ok_or_else(|| HsmError::Refused(format!("the master key {name} is not in the key manifest")))?;
            if !(1..=Derivation::MAX_LEN).contains(&derivation.length) {
                let (length, most) = (derivation.length, Derivation::MAX_LEN);
                return Err(HsmError::Refused(format!("derived key of {length} bytes: expected 1 to {most}")));
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

    /// Sends operations to a worker within the deadline. Waits for a ready worker, and retries transient failures, on another HSM
    /// if there is one. After an invalid answer the worker is replaced and the call is retried once.
    ///
    /// Every operation can be repeated: the session objects of a lost worker are lost with it. The exception is a destruction
    /// whose answer was lost: it looks like a missing key and remains an error for an officer.
    async fn call<T>(
        &self,
        batch: Option<BatchName>,
        fail_fast: bool,
        operations: impl Fn() -> Vec<Operation>,
        read: impl Fn(Answers, &Connection) -> Result<T, HsmError>,
    ) -> Result<T, HsmError> {
        let queue_capacity = self.members.queue_capacity;
        let _permit = self.members.queue.try_acquire().map_err(|_| HsmError::Busy { waiting: queue_capacity })?;
        let options =
            CallOptions { priority: Priority::Line, limit: self.call_timeout(), attempts: u32::MAX, batch, fail_fast };
        self.call_on(options, operations, read).await
    }

    /// Like [`Self::call`], with explicit options and without the limit of the line's queue.
    pub(super) async fn call_on<T>(
        &self,
        options: CallOptions,
        operations: impl Fn() -> Vec<Operation>,
        read: impl Fn(Answers, &Connection) -> Result<T, HsmError>,
    ) -> Result<T, HsmError> {
        let CallOptions { priority, limit, attempts, batch, fail_fast } = options;
        let until = Instant::now() + limit;
        let mut candidates = self.members.candidates(batch, self.only);
        let mut attempt = 0;
        let (mut was_invalid, mut was_rejected) = (false, false);
        loop {
            // A background job retries later by itself; a line call waits until its deadline.
            let patience =
                if priority == Priority::Line { until } else { until.min(Instant::now() + BACKGROUND_PATIENCE) };
            let selection = self.members.select(&self.states, priority, &candidates, fail_fast, patience).await?;
            let Selection { member, connection, others } = selection;
            // A hung HSM must not use up the deadline if another HSM could answer.
            let left = until.saturating_duration_since(Instant::now());
            let share = if others && !fail_fast && priority == Priority::Line { left / 2 } else { left };
            let started = Instant::now();
            let answer = tokio::time::timeout(share, connection.call(priority, operations(), started + share)).await;
            let failed = match answer {
                Err(_) if share == left => return Err(HsmError::Deadline(limit)),
                Err(_) => {
                    connection.record_late();
                    AttemptFailure::Retryable(format!("no answer within {share:?}"))
                }
                Ok(Some(Ok(answers))) => match read(Answers(answers.into_iter()), &connection) {
                    // Two workers gave an invalid answer: the input of the call is at fault.
                    Err(HsmError::InvalidAnswer(reason)) if std::mem::replace(&mut was_invalid, true) => {
                        return Err(HsmError::InvalidAnswer(reason));
                    }
                    Err(HsmError::InvalidAnswer(reason)) => {
                        tracing::error!(%reason, "invalid HSM answer, replacing the worker");
                        connection.request_replacement(&reason);
                        AttemptFailure::Retryable(reason)
                    }
                    answer => {
                        connection.record(None);
                        return answer;
                    }
                },
                Ok(Some(Err(failure))) => {
                    if attempt == 0 && failure.class != FailureClass::Absent {
                        connection.record(Some(&failure));
                    }
                    match failure.class {
                        FailureClass::Transient | FailureClass::SessionLost | FailureClass::ModuleLost => {
                            AttemptFailure::Retryable(failure.message)
                        }
                        FailureClass::Permanent | FailureClass::Rejected
                            if others && !std::mem::replace(&mut was_rejected, true) =>
                        {
                            AttemptFailure::Retryable(failure.message)
                        }
                        FailureClass::Permanent => return Err(HsmError::Stopped(failure.message)),
                        FailureClass::Rejected => return Err(HsmError::Refused(failure.message)),
                        FailureClass::Absent if candidates.exclude(member) => AttemptFailure::KeyAbsent,
                        FailureClass::Absent => return Err(HsmError::Absent(failure.message)),
                    }
                }
                Ok(None) => AttemptFailure::Retryable("worker ended".to_owned()),
            };
            let AttemptFailure::Retryable(reason) = failed else { continue };
            candidates.last = Some(member);
            attempt += 1;
            let pause = Duration::from_millis(10 << attempt.min(5));
            let use_other_pair = fail_fast && others;
            if use_other_pair || Instant::now() + pause >= until || attempt >= attempts {
                return Err(HsmError::Unavailable {
                    reason: self.members.with_member_name(member, &reason),
                    retry_after: pause,
                });
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// Why an attempt failed.
enum AttemptFailure {
    /// The call can be retried, on this HSM or another one.
    Retryable(String),
    /// This HSM does not hold the key; another one may.
    KeyAbsent,
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

fn delivery(public: &PublicKey, stored: &StoredKey) -> Operation {
    let kind = public.kind();
    match stored {
        StoredKey::Wrapped(WrappedKey { wrapping_key, blob }) => {
            Operation::Rewrap { kind, wrapping_key: wrapping_key.clone(), blob: blob.clone() }
        }
        StoredKey::OnToken(pair) => Operation::DeliverPair { kind, pair: pair.clone() },
    }
}

fn delivered(public: &PublicKey, answer: Answer, connection: &Connection) -> Result<DevicePrivateKey, HsmError> {
    let Answer::Rewrapped(delivered) = answer else { return Err(unexpected()) };
    let plain = connection.transport.unwrap(&delivered)?;
    DevicePrivateKey::from_unwrapped(public.clone(), &plain).map_err(wrong_key)
}

fn new_pair(
    kind: KeyType,
    wrapping_key: &KeyName,
    answer: Answer,
    connection: &Connection,
) -> Result<DeliveredPair, HsmError> {
    let Answer::Pair { public, stored, delivered } = answer else { return Err(unexpected()) };
    let public = public_key(kind, public)?;
    let plain = connection.transport.unwrap(&delivered)?;
    let private = DevicePrivateKey::from_unwrapped(public, &plain).map_err(wrong_key)?;
    let stored = StoredKey::Wrapped(WrappedKey { wrapping_key: wrapping_key.clone(), blob: stored });
    Ok(DeliveredPair { private, stored })
}

fn wrong_key(error: KeyError) -> HsmError {
    HsmError::InvalidAnswer(error.to_string())
}

pub(super) fn unexpected() -> HsmError {
    HsmError::InvalidAnswer("the answer does not match the request".to_owned())
}
