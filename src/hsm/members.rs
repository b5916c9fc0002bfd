//! Selects the HSM that serves a call.
//!
//! All HSMs of a handle hold the keys of the key manifest. A call goes to the HSM with the fewest pending calls; an unavailable
//! HSM is skipped until it is ready again. Keys that the daemon generates (batch keys, pairs) exist on one HSM only, the batch
//! owner.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, watch};

use super::BatchName;
use super::connection::{Connection, Counters};
use super::failure::HsmError;
use super::key_manifest::KeyManifest;
use super::supervisor::HsmConfig;
use super::wire::Priority;
use super::worker_state::{State, StatePublisher, state_publishers};

/// One of the HSMs of a handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HsmId(usize);

/// The HSMs of a daemon: at least one, with unique names and the same keys.
#[derive(Debug, Clone)]
pub struct Hsms(Vec<HsmConfig>);

impl From<HsmConfig> for Hsms {
    fn from(one: HsmConfig) -> Self {
        Self(vec![one])
    }
}

impl Hsms {
    /// Combines several HSMs. The call timeout and the queue length of the first one apply to all.
    pub fn several(members: Vec<HsmConfig>) -> Result<Self, String> {
        let Some((first, others)) = members.split_first() else { return Err("no HSM is configured".to_owned()) };
        for (index, other) in others.iter().enumerate() {
            if members.iter().take(index + 1).any(|before| before.name == other.name) {
                return Err(format!("two HSMs are named {}", other.name));
            }
            other.keys.check_same_keys(&first.keys).map_err(|difference| {
                format!(
                    "the keys of HSM {} differ from HSM {}: {difference}; restore them there",
                    other.name, first.name
                )
            })?;
        }
        Ok(Self(members))
    }

    /// The configuration of each HSM.
    pub fn members(&self) -> &[HsmConfig] {
        &self.0
    }

    /// The configuration of each HSM, for values that are known only after it was read.
    pub fn members_mut(&mut self) -> &mut [HsmConfig] {
        &mut self.0
    }

    /// The key manifest. The manifests of all HSMs list the same keys.
    pub fn keys(&self) -> &KeyManifest {
        &self.first().keys
    }

    pub(super) fn first(&self) -> &HsmConfig {
        // Both constructors guarantee it.
        self.0.first().expect("there is at least one HSM")
    }
}

/// One HSM of the handle.
pub(super) struct Member {
    pub(super) config: Arc<HsmConfig>,
    pub(super) counters: Arc<Counters>,
}

/// State shared by all clones of a handle.
pub(super) struct Members {
    pub(super) all: Vec<Member>,
    /// The keys that all HSMs hold.
    pub(super) keys: KeyManifest,
    pub(super) queue: Semaphore,
    pub(super) queue_capacity: usize,
    /// The deadline of a line call.
    pub(super) call_timeout: Duration,
    /// The recorded owners of each batch: the HSMs that hold its key or its pairs. There is more than one if a token was copied
    /// after the daemon had run with it.
    batch_owners: Mutex<HashMap<BatchName, BTreeSet<HsmId>>>,
    /// Random tie-break between HSMs with equal load.
    tie_break: RandomState,
    turn: AtomicU64,
}

/// The HSMs that one call may use.
pub(super) struct Candidates {
    allowed: BTreeSet<HsmId>,
    /// The HSM of the last failed attempt; another one is preferred.
    pub(super) last: Option<HsmId>,
}

impl Candidates {
    /// Removes an HSM that does not hold the requested key. Returns whether a candidate is left.
    pub(super) fn exclude(&mut self, member: HsmId) -> bool {
        self.allowed.remove(&member);
        !self.allowed.is_empty()
    }
}

/// The HSM selected for a call.
pub(super) struct Selection {
    pub(super) member: HsmId,
    pub(super) connection: Arc<Connection>,
    /// Whether another ready HSM could serve the call, or serve a `fail_fast` caller with another key.
    pub(super) others: bool,
}

impl Members {
    pub(super) fn new(hsms: Hsms) -> (Self, watch::Receiver<Vec<State>>, Vec<StatePublisher>) {
        let (call_timeout, queue_capacity) = (hsms.first().call_timeout, hsms.first().queue);
        let keys = hsms.keys().clone();
        let one = |config| Member { config: Arc::new(config), counters: Arc::new(Counters::default()) };
        let all: Vec<_> = hsms.0.into_iter().map(one).collect();
        let (publishers, states) = state_publishers(all.len());
        let (queue, batch_owners) = (Semaphore::new(queue_capacity), Mutex::default());
        let (tie_break, turn) = (RandomState::new(), AtomicU64::new(0));
        (Self { all, keys, queue, queue_capacity, call_timeout, batch_owners, tie_break, turn }, states, publishers)
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = HsmId> + use<> {
        (0..self.all.len()).map(HsmId)
    }

    pub(super) fn get(&self, member: HsmId) -> Option<&Member> {
        self.all.get(member.0)
    }

    /// The name of an HSM; `None` if the handle has only one.
    fn name(&self, member: HsmId) -> Option<&str> {
        let name = || self.get(member).map(|member| member.config.name.as_str());
        (self.all.len() > 1).then(name).flatten()
    }

    /// Prefixes a message with the HSM's name if the handle has several HSMs.
    pub(super) fn with_member_name(&self, member: HsmId, message: &str) -> String {
        self.name(member).map_or_else(|| message.to_owned(), |name| format!("HSM {name}: {message}"))
    }

    fn owners(&self) -> MutexGuard<'_, HashMap<BatchName, BTreeSet<HsmId>>> {
        self.batch_owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn batch_owners(&self, batch: BatchName) -> BTreeSet<HsmId> {
        self.owners().get(&batch).cloned().unwrap_or_default()
    }

    pub(super) fn add_batch_owner(&self, batch: BatchName, owner: HsmId) {
        self.owners().entry(batch).or_default().insert(owner);
    }

    pub(super) fn claim_batch(&self, batch: BatchName, owner: HsmId) -> bool {
        let mut owners = self.owners();
        let batch_owners = owners.entry(batch).or_default();
        if batch_owners.is_empty() {
            batch_owners.insert(owner);
        }
        batch_owners.contains(&owner)
    }

    pub(super) fn forget_batch_owners(&self, batch: BatchName) {
        self.owners().remove(&batch);
    }

    /// The HSMs that a call may use: the owners of its batch, or all. If no owner is recorded, all are tried one after the other.
    pub(super) fn candidates(&self, batch: Option<BatchName>, only: Option<HsmId>) -> Candidates {
        let batch_owners = batch.map(|batch| self.batch_owners(batch)).unwrap_or_default();
        let is_allowed = |member: &HsmId| match only {
            Some(only) => only == *member,
            None => batch_owners.is_empty() || batch_owners.contains(member),
        };
        Candidates { allowed: self.ids().filter(is_allowed).collect(), last: None }
    }

    /// The ready HSMs in order of preference: no recent failure and no late call first, then the fewest pending calls.
    pub(super) fn ready(&self, states: &[State], priority: Priority) -> Vec<HsmId> {
        // Random tie-break: a fixed order would send the same step of every device's flow to the same HSM.
        let turn = self.tie_break.hash_one(self.turn.fetch_add(1, Ordering::Relaxed)) % states.len().max(1) as u64;
        let several = states.len() > 1;
        let ready = states.iter().enumerate().filter_map(|(index, state)| {
            let State::Ready(connection) = state else { return None };
            let load = several.then(|| (connection.is_deprioritized(), connection.pending.count(priority)));
            Some((load, (index as u64 + turn) % states.len() as u64, HsmId(index)))
        });
        let mut ready: Vec<_> = ready.collect();
        ready.sort_unstable();
        ready.into_iter().map(|(.., member)| member).collect()
    }

    /// Selects a ready candidate, and waits for one until the deadline. With `fail_fast` it does not wait while an HSM outside
    /// the candidates is ready, because the caller can use another key there.
    pub(super) async fn select(
        &self,
        states: &watch::Receiver<Vec<State>>,
        priority: Priority,
        candidates: &Candidates,
        fail_fast: bool,
        until: Instant,
    ) -> Result<Selection, HsmError> {
        let mut states = states.clone();
        loop {
            let (reason, retry_after) = {
                let states = states.borrow_and_update();
                let ready = self.ready(&states, priority);
                let allowed = || ready.iter().copied().filter(|member| candidates.allowed.contains(member));
                let others = allowed().nth(1).is_some() || (fail_fast && ready.len() > 1);
                let preferred = || allowed().find(|member| Some(*member) != candidates.last);
                if let Some(member) = preferred().or_else(|| allowed().next())
                    && let Some(State::Ready(connection)) = states.get(member.0)
                {
                    return Ok(Selection { member, connection: Arc::clone(connection), others });
                }
                let unavailable = self.unavailable_reason(&states, &candidates.allowed);
                if fail_fast && !ready.is_empty() {
                    let reason = unavailable.map_or_else(|error| error.to_string(), |(reason, _)| reason);
                    return Err(HsmError::Unavailable { reason, retry_after: Duration::from_millis(100) });
                }
                unavailable?
            };
            match tokio::time::timeout_at(until.into(), states.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(HsmError::Unavailable { reason, retry_after }),
            }
        }
    }

    /// Why no candidate is ready, and when to retry; an error if all of them need an officer.
    fn unavailable_reason(&self, states: &[State], members: &BTreeSet<HsmId>) -> Result<(String, Duration), HsmError> {
        let of = |member: &HsmId| states.get(member.0).map(|state| (*member, state));
        let (mut unavailable, mut stopped) = (None::<(String, Duration)>, Vec::new());
        for (member, state) in members.iter().filter_map(of) {
            match state {
                State::Unavailable { reason, retry_after } => {
                    unavailable.get_or_insert((self.with_member_name(member, reason), *retry_after));
                }
                State::Stopped { reason } => stopped.push(self.with_member_name(member, reason)),
                State::Ready(_) => {}
            }
        }
        unavailable.ok_or_else(|| HsmError::Stopped(stopped.join("; ")))
    }
}
