//! The async handle: few verbs, each with a deadline, behind a queue with an end.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::Instrument as _;

use super::connection::Connection;
use super::failure::{FailureClass, HsmError};
use super::kdf::Derivation;
use super::key_manifest::KeyManifest;
use super::members::{Chosen, HsmId, Hsms, Members};
use super::objects::{public_key, to_x509_form};
use super::supervisor::{State, supervise};
use super::wire::{Answer, Operation, Priority};
use crate::keys::{
    BatchName, DevicePrivateKey, KeyError, KeyKind, PublicKey, SignatureAlgorithm, StoredKey, WrappedKey,
};
use crate::names::KeyName;
use crate::secret::SecretBytes;

/// How long background work waits for a worker before it says so.
const BACKGROUND_PATIENCE: Duration = Duration::from_secs(5);

/// The HSM, or several with the same keys. Clones share one worker for each; they end when the last clone is dropped.
#[derive(Clone)]
pub struct Hsm {
    pub(super) members: Arc<Members>,
    pub(super) states: watch::Receiver<Vec<State>>,
    /// The only one that is asked, for a handle of [`Hsm::at`].
    pub(super) only: Option<HsmId>,
}

/// How a call is made.
pub(super) struct CallOptions {
    pub(super) lane: Priority,
    /// Within which it is answered.
    pub(super) limit: Duration,
    /// How often it is tried at most.
    pub(super) attempts: u32,
    /// The batch whose keeper alone can answer; none if the keys of the register are enough, which every HSM has.
    pub(super) about: Option<BatchName>,
    /// Whether the caller has another way than to wait for the HSM that keeps what is asked for.
    pub(super) impatient: bool,
}

/// What a new device needs from the HSM, in one request.
pub struct DeviceKeyOrder {
    /// Where its pair comes from; none for profiles without, or whose device makes its own.
    pub pair: Option<PairOrder>,
    /// The symmetric keys.
    pub derivations: Vec<Derivation>,
    /// Bytes of public randomness: session identifier, certificate serial number.
    pub random: usize,
}

/// Where a new device's pair comes from.
pub enum PairOrder {
    /// It is made, and kept wrapped under this key.
    Make(KeyKind, KeyName),
    /// It was made in advance.
    Kept(PublicKey, StoredKey),
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
    pub kept: StoredKey,
}

/// Keys that a session has already.
pub struct HeldKeyOrder {
    /// The pair in the secret store.
    pub pair: Option<(PublicKey, StoredKey)>,
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

impl Hsm {
    /// Starts the supervisors; a dead HSM does not block the start of the daemon. Needs a tokio runtime.
    pub fn start(hsms: impl Into<Hsms>) -> Self {
        let (members, states, seats) = Members::new(hsms.into());
        for (member, seat) in members.all.iter().zip(seats) {
            let supervisor = supervise(Arc::clone(&member.config), seat, Arc::clone(&member.counters));
            let span = match members.all.len() {
                1 => tracing::Span::none(),
                _ => tracing::error_span!("hsm", name = %member.config.name),
            };
            tokio::spawn(supervisor.instrument(span));
        }
        Self { members: Arc::new(members), states, only: None }
    }

    /// The HSMs.
    pub fn each(&self) -> impl Iterator<Item = HsmId> + use<> {
        let only = self.only;
        self.members.each().filter(move |member| only.is_none_or(|only| only == *member))
    }

    /// A handle that asks this one alone.
    pub fn at(&self, member: HsmId) -> Self {
        Self { only: Some(member), ..self.clone() }
    }

    /// Those that serve calls at this moment, who has least to do first.
    pub fn ready_members(&self) -> Vec<HsmId> {
        self.members.ready(&self.states.borrow(), Priority::Line)
    }

    /// Who keeps a batch, as far as that is on record.
    pub fn keepers(&self, batch: BatchName) -> BTreeSet<HsmId> {
        self.members.keepers(batch)
    }

    /// Puts it on record that this HSM keeps a batch.
    pub fn add_keeper(&self, batch: BatchName, keeper: HsmId) {
        self.members.add_keeper(batch, keeper);
    }

    /// Puts it on record that this HSM keeps a batch, if nobody else does. Whether it does now.
    pub fn adopt(&self, batch: BatchName, keeper: HsmId) -> bool {
        self.members.adopt(batch, keeper)
    }

    /// The batch is over.
    pub fn forget_keepers(&self, batch: BatchName) {
        self.members.forget_keepers(batch);
    }

    /// Waits until calls are served, or says why they are not.
    pub async fn ready(&self, within: Duration) -> Result<(), HsmError> {
        let asked = self.members.may_be_asked(None, self.only);
        let until = Instant::now() + within;
        self.members.choose(&self.states, Priority::Line, &asked, false, until).await.map(drop)
    }

    /// Within which every call of the line is answered.
    pub fn call_timeout(&self) -> Duration {
        self.members.call_timeout
    }

    /// A worker's threads for what nobody waits for.
    pub fn background_threads(&self, member: HsmId) -> usize {
        self.members.get(member).map_or(1, |member| member.config.module.background_threads)
    }

    /// The register that the tokens were checked against; all have the same keys.
    pub fn keys(&self) -> &KeyManifest {
        &self.members.keys
    }

    /// Resolves at the next change of one of them between serving and not serving.
    pub async fn changed(&mut self) {
        // The supervisors live as long as this handle; their end is a change too.
        let _ = self.states.changed().await;
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
            .keys()
            .signers()
            .find(|(name, _)| *name == key)
            .ok_or_else(|| HsmError::Refused(format!("the key {key} is not one of the register that sign")))?;
        self.call(None, false, operations, |mut answers, _| {
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
        // Another HSM has other pairs.
        let about = match &order.pair {
            Some(PairOrder::Make(_, key)) => BatchName::of_key(key),
            Some(PairOrder::Kept(_, kept)) => kept.batch(),
            None => None,
        };
        self.call(about, order.pair.is_some(), operations, |mut answers, connection| {
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
        let about = order.pair.as_ref().and_then(|(_, kept)| kept.batch());
        self.call(about, false, operations, |mut answers, connection| {
            let pair = match &order.pair {
                Some((public, _)) => Some(delivered(public, answers.next()?, connection)?),
                None => None,
            };
            Ok(HeldKeys { pair, derived: answers.derived(order.derivations.len())? })
        })
        .await
    }

    /// Destroys a key of the register on every token; it is gone when this returns.
    pub async fn destroy(&self, key: &KeyName) -> Result<(), HsmError> {
        let operations = || vec![Operation::Destroy { key: key.clone() }];
        for member in self.each() {
            let hsm = self.at(member);
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

    /// The derivations as operations; a closure, since a retry needs them again.
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
                .ok_or_else(|| HsmError::Refused(format!("the master key {name} is not in the register of keys")))?;
            if !(1..=Derivation::MAX_LEN).contains(&derivation.length) {
                return Err(HsmError::Refused(format!("a derived key of {} bytes", derivation.length)));
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

    /// Sends operations to a worker, waits for a new one if none is there, and tries transient failures again, on another HSM if
    /// there is one, all within the deadline. An answer that is not right costs the worker, and the question is asked once more.
    ///
    /// Every operation may be repeated: what a lost worker did is gone with its session objects. Only
    /// a destruction whose answer was lost cannot be told from a key that is missing; it stays an error, for an officer.
    async fn call<T>(
        &self,
        about: Option<BatchName>,
        impatient: bool,
        operations: impl Fn() -> Vec<Operation>,
        read: impl Fn(Answers, &Connection) -> Result<T, HsmError>,
    ) -> Result<T, HsmError> {
        let places = self.members.places;
        let _place = self.members.queue.try_acquire().map_err(|_| HsmError::Busy { waiting: places })?;
        let terms =
            CallOptions { lane: Priority::Line, limit: self.call_timeout(), attempts: u32::MAX, about, impatient };
        self.call_on(terms, operations, read).await
    }

    /// The same on other terms, without a place in the line's queue.
    pub(super) async fn call_on<T>(
        &self,
        terms: CallOptions,
        operations: impl Fn() -> Vec<Operation>,
        read: impl Fn(Answers, &Connection) -> Result<T, HsmError>,
    ) -> Result<T, HsmError> {
        let CallOptions { lane, limit, attempts, about, impatient } = terms;
        let until = Instant::now() + limit;
        let mut asked = self.members.may_be_asked(about, self.only);
        let mut attempt = 0;
        let (mut was_wrong, mut was_refused) = (false, false);
        loop {
            // Whoever works in the background looks again later; the line has nothing better to do than to wait.
            let patience = if lane == Priority::Line { until } else { until.min(Instant::now() + BACKGROUND_PATIENCE) };
            let chosen = self.members.choose(&self.states, lane, &asked, impatient, patience).await?;
            let Chosen { member, connection, others } = chosen;
            // One that hangs must not have all the time where another one could answer.
            let left = until.saturating_duration_since(Instant::now());
            let share = if others && !impatient && lane == Priority::Line { left / 2 } else { left };
            let begun = Instant::now();
            let answer = tokio::time::timeout(share, connection.call(lane, operations(), begun + share)).await;
            let failed = match answer {
                Err(_) if share == left => return Err(HsmError::Deadline(limit)),
                Err(_) => {
                    connection.note_late();
                    Failed::Here(format!("it did not answer within {share:?}"))
                }
                Ok(Some(Ok(answers))) => match read(Answers(answers.into_iter()), &connection) {
                    // Two workers say the same: it is what they were asked with that is wrong.
                    Err(HsmError::Wrong(wrong)) if std::mem::replace(&mut was_wrong, true) => {
                        return Err(HsmError::Wrong(wrong));
                    }
                    Err(HsmError::Wrong(wrong)) => {
                        tracing::error!(%wrong, "the HSM gave an answer that is not right; its worker is replaced");
                        connection.condemn(&wrong);
                        Failed::Here(wrong)
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
                            Failed::Here(failure.message)
                        }
                        FailureClass::Permanent | FailureClass::Rejected
                            if others && !std::mem::replace(&mut was_refused, true) =>
                        {
                            Failed::Here(failure.message)
                        }
                        FailureClass::Permanent => return Err(HsmError::Stopped(failure.message)),
                        FailureClass::Rejected => return Err(HsmError::Refused(failure.message)),
                        FailureClass::Absent if asked.exclude(member) => Failed::NotHere,
                        FailureClass::Absent => return Err(HsmError::Absent(failure.message)),
                    }
                }
                Ok(None) => Failed::Here("the worker ended".to_owned()),
            };
            let Failed::Here(why) = failed else { continue };
            asked.last = Some(member);
            attempt += 1;
            let pause = Duration::from_millis(10 << attempt.min(5));
            let other_way = impatient && others;
            if other_way || Instant::now() + pause >= until || attempt >= attempts {
                return Err(HsmError::Unavailable { why: self.members.told(member, &why), retry_after: pause });
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// Why an attempt was in vain.
enum Failed {
    /// It may be tried again, on another HSM or on this one.
    Here(String),
    /// The HSM does not have what was asked for; another one may.
    NotHere,
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

fn delivery(public: &PublicKey, kept: &StoredKey) -> Operation {
    let kind = public.kind();
    match kept {
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
    kind: KeyKind,
    wrapping_key: &KeyName,
    answer: Answer,
    connection: &Connection,
) -> Result<DeliveredPair, HsmError> {
    let Answer::Pair { public, kept, delivered } = answer else { return Err(unexpected()) };
    let public = public_key(kind, public)?;
    let plain = connection.transport.unwrap(&delivered)?;
    let private = DevicePrivateKey::from_unwrapped(public, &plain).map_err(wrong_key)?;
    let kept = StoredKey::Wrapped(WrappedKey { wrapping_key: wrapping_key.clone(), blob: kept });
    Ok(DeliveredPair { private, kept })
}

fn wrong_key(error: KeyError) -> HsmError {
    HsmError::Wrong(error.to_string())
}

pub(super) fn unexpected() -> HsmError {
    HsmError::Wrong("an answer of another kind than the question".to_owned())
}
