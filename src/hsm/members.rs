//! The HSMs behind one handle. All of them have the keys of the register; a call goes to the one that has least to do, and one that is
//! away is left out until it is back. What the daemon makes itself, the key of a batch or a pair, is on one of them alone.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, watch};

use super::connection::{Connection, Counters};
use super::failure::HsmError;
use super::key_manifest::KeyManifest;
use super::supervisor::{HsmConfig, State};
use super::wire::Priority;
use crate::keys::BatchName;

/// One of the HSMs of a handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HsmId(usize);

/// The HSMs of a daemon: at least one, each with a name of its own, all with the same keys.
#[derive(Debug, Clone)]
pub struct Hsms(Vec<HsmConfig>);

impl From<HsmConfig> for Hsms {
    fn from(one: HsmConfig) -> Self {
        Self(vec![one])
    }
}

impl Hsms {
    /// Several; the first one says how long a call may take and how many may wait.
    pub fn several(members: Vec<HsmConfig>) -> Result<Self, String> {
        let Some((first, others)) = members.split_first() else { return Err("there is no HSM".to_owned()) };
        for (at, other) in others.iter().enumerate() {
            if members.iter().take(at + 1).any(|before| before.name == other.name) {
                return Err(format!("two HSMs are named {}", other.name));
            }
            other.keys.agrees_with(&first.keys).map_err(|difference| {
                format!("the HSM {} has not the keys of {}: {difference}; restore them there", other.name, first.name)
            })?;
        }
        Ok(Self(members))
    }

    /// How each of them is reached.
    pub fn members(&self) -> &[HsmConfig] {
        &self.0
    }

    /// The same, for what is known only after the configuration.
    pub fn members_mut(&mut self) -> &mut [HsmConfig] {
        &mut self.0
    }

    /// The register of keys; every HSM's has the same keys.
    pub fn keys(&self) -> &KeyManifest {
        &self.first().keys
    }

    pub(super) fn first(&self) -> &HsmConfig {
        // Both ways of making one see to it.
        self.0.first().expect("there is at least one HSM")
    }
}

/// A supervisor's place among the states that everybody sees.
pub(super) struct StatePublisher {
    states: watch::Sender<Vec<State>>,
    member: usize,
}

impl StatePublisher {
    pub(super) fn tell(&self, state: State) {
        self.states.send_modify(|states| {
            if let Some(mine) = states.get_mut(self.member) {
                *mine = state;
            }
        });
    }

    /// Resolves when nobody holds the handle any more.
    pub(super) async fn closed(&self) {
        self.states.closed().await;
    }
}

/// One HSM, as the handle knows it.
pub(super) struct Member {
    pub(super) config: Arc<HsmConfig>,
    pub(super) counters: Arc<Counters>,
}

/// What all clones of a handle share.
pub(super) struct Members {
    pub(super) all: Vec<Member>,
    /// The keys that all of them have.
    pub(super) keys: KeyManifest,
    pub(super) queue: Semaphore,
    pub(super) places: usize,
    /// Within which every call of the line is answered.
    pub(super) call_timeout: Duration,
    /// Which HSM has a batch's key, or its pairs, as far as that is on record. More than one, where a token was copied too late.
    keepers: Mutex<HashMap<BatchName, BTreeSet<HsmId>>>,
    /// Who of those is asked that have equally much to do.
    lots: RandomState,
    turn: AtomicU64,
}

/// Whom one call has asked so far.
pub(super) struct Asked {
    /// Those it may go to at all.
    allowed: BTreeSet<HsmId>,
    /// Asked last, in vain: another one is preferred.
    pub(super) last: Option<HsmId>,
}

impl Asked {
    /// It does not have what is asked for. Whether anybody is left who might.
    pub(super) fn exclude(&mut self, member: HsmId) -> bool {
        self.allowed.remove(&member);
        !self.allowed.is_empty()
    }
}

/// Who answers a call.
pub(super) struct Chosen {
    pub(super) member: HsmId,
    pub(super) connection: Arc<Connection>,
    /// Whether another one that is ready could answer it, too, or give an impatient caller another answer.
    pub(super) others: bool,
}

impl Members {
    pub(super) fn new(hsms: Hsms) -> (Self, watch::Receiver<Vec<State>>, Vec<StatePublisher>) {
        let (call_timeout, places) = (hsms.first().call_timeout, hsms.first().queue);
        let keys = hsms.keys().clone();
        let one = |config| Member { config: Arc::new(config), counters: Arc::new(Counters::default()) };
        let all: Vec<_> = hsms.0.into_iter().map(one).collect();
        let begun = || State::Unavailable {
            why: "the worker is being started".to_owned(),
            retry_after: Duration::from_secs(1),
        };
        let (sender, states) = watch::channel(all.iter().map(|_| begun()).collect());
        let seats = (0..all.len()).map(|member| StatePublisher { states: sender.clone(), member }).collect();
        let (queue, keepers) = (Semaphore::new(places), Mutex::default());
        let (lots, turn) = (RandomState::new(), AtomicU64::new(0));
        (Self { all, keys, queue, places, call_timeout, keepers, lots, turn }, states, seats)
    }

    pub(super) fn each(&self) -> impl Iterator<Item = HsmId> + use<> {
        (0..self.all.len()).map(HsmId)
    }

    pub(super) fn get(&self, member: HsmId) -> Option<&Member> {
        self.all.get(member.0)
    }

    /// The name of one, where there is more than one to be told apart.
    fn name(&self, member: HsmId) -> Option<&str> {
        let name = || self.get(member).map(|member| member.config.name.as_str());
        (self.all.len() > 1).then(name).flatten()
    }

    /// The same with the HSM's name before it, where there are several.
    pub(super) fn told(&self, member: HsmId, what: &str) -> String {
        self.name(member).map_or_else(|| what.to_owned(), |name| format!("HSM {name}: {what}"))
    }

    fn records(&self) -> MutexGuard<'_, HashMap<BatchName, BTreeSet<HsmId>>> {
        self.keepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn keepers(&self, batch: BatchName) -> BTreeSet<HsmId> {
        self.records().get(&batch).cloned().unwrap_or_default()
    }

    pub(super) fn add_keeper(&self, batch: BatchName, keeper: HsmId) {
        self.records().entry(batch).or_default().insert(keeper);
    }

    pub(super) fn adopt(&self, batch: BatchName, keeper: HsmId) -> bool {
        let mut records = self.records();
        let keepers = records.entry(batch).or_default();
        if keepers.is_empty() {
            keepers.insert(keeper);
        }
        keepers.contains(&keeper)
    }

    pub(super) fn forget_keepers(&self, batch: BatchName) {
        self.records().remove(&batch);
    }

    /// Whom a call may ask: who keeps the batch that it is about, or all. Of a batch whose keeper is not on record all are asked, one
    /// after the other.
    pub(super) fn may_be_asked(&self, about: Option<BatchName>, only: Option<HsmId>) -> Asked {
        let keepers = about.map(|batch| self.keepers(batch)).unwrap_or_default();
        let may = |member: &HsmId| match only {
            Some(only) => only == *member,
            None => keepers.is_empty() || keepers.contains(member),
        };
        Asked { allowed: self.each().filter(may).collect(), last: None }
    }

    /// Those that are ready: who has not just failed and is not late, and has least to do, first.
    pub(super) fn ready(&self, states: &[State], lane: Priority) -> Vec<HsmId> {
        // By lot, else each HSM would get always the same of a device's questions.
        let turn = self.lots.hash_one(self.turn.fetch_add(1, Ordering::Relaxed)) % states.len().max(1) as u64;
        let several = states.len() > 1;
        let ready = states.iter().enumerate().filter_map(|(at, state)| {
            let State::Ready(connection) = state else { return None };
            let load = several.then(|| (connection.is_avoided(), connection.pending.count(lane)));
            Some((load, (at as u64 + turn) % states.len() as u64, HsmId(at)))
        });
        let mut ready: Vec<_> = ready.collect();
        ready.sort_unstable();
        ready.into_iter().map(|(.., member)| member).collect()
    }

    /// Who answers a call; waits for one until then. Not at all if `impatient` and another HSM than those it may ask is ready: the
    /// caller has another way.
    pub(super) async fn choose(
        &self,
        states: &watch::Receiver<Vec<State>>,
        lane: Priority,
        asked: &Asked,
        impatient: bool,
        until: Instant,
    ) -> Result<Chosen, HsmError> {
        let mut states = states.clone();
        loop {
            let (why, retry_after) = {
                let states = states.borrow_and_update();
                let ready = self.ready(&states, lane);
                let mine = || ready.iter().copied().filter(|member| asked.allowed.contains(member));
                let others = mine().nth(1).is_some() || (impatient && ready.len() > 1);
                if let Some(member) = mine().find(|member| Some(*member) != asked.last).or_else(|| mine().next())
                    && let Some(State::Ready(connection)) = states.get(member.0)
                {
                    return Ok(Chosen { member, connection: Arc::clone(connection), others });
                }
                let away = self.why_away(&states, &asked.allowed);
                if impatient && !ready.is_empty() {
                    let why = away.map_or_else(|error| error.to_string(), |(why, _)| why);
                    return Err(HsmError::Unavailable { why, retry_after: Duration::from_millis(100) });
                }
                away?
            };
            match tokio::time::timeout_at(until.into(), states.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(HsmError::Unavailable { why, retry_after }),
            }
        }
    }

    /// Why none of them is ready, and when one may be; an error if only an officer helps.
    fn why_away(&self, states: &[State], members: &BTreeSet<HsmId>) -> Result<(String, Duration), HsmError> {
        let of = |member: &HsmId| states.get(member.0).map(|state| (*member, state));
        let (mut away, mut stopped) = (None::<(String, Duration)>, Vec::new());
        for (member, state) in members.iter().filter_map(of) {
            match state {
                State::Unavailable { why, retry_after } => {
                    away.get_or_insert((self.told(member, why), *retry_after));
                }
                State::Stopped { why } => stopped.push(self.told(member, why)),
                State::Ready(_) => {}
            }
        }
        away.ok_or_else(|| HsmError::Stopped(stopped.join("; ")))
    }
}
