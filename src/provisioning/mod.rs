//! The provisioning workflow of one device: [`Provisioner::assemble`], [`Provisioner::complete`], [`Provisioner::recover`], and
//! [`Provisioner::resume_sessions`] for sessions that a crash interrupted.
//!
//! Each workflow is one function, read from top to bottom. The types enforce the order of the steps: a session is prepared
//! from the `AdmittedOrder` that only `admit.rs` makes, a signature needs the [`Intent`](crate::store::Intent) that only a
//! journaled reservation gives, and an erasure needs the [`PublicationReceipt`](crate::store::PublicationReceipt) that only
//! a durable publication gives. Every session ends in `end_session.rs`.
//!
//! `impl Provisioner` is divided by step, one file each: `assemble.rs` and `complete.rs` call the steps in order, and each step
//! (`admit.rs`, `deliver.rs`, `end_session.rs`, ...) has its own. What several of them use is here.

mod abort;
mod admit;
mod assemble;
mod complete;
mod deliver;
mod end_session;
mod error;
mod in_flight;
mod issuer;
mod locks;
mod pair_supplier;
mod policy;
mod product;
mod recover;
mod report;
mod request;
mod session_recovery;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use spp_format::names::{ChipId, SessionId};

pub use crate::clock::Clock;
pub use abort::SessionView;
pub use complete::{Completion, Receipt};
pub(crate) use error::list_violations;
pub use error::{FieldViolation, ProvisionError};
pub use policy::Policy;
pub use report::{DeviceReport, DeviceView, KeyPairLocation, ProductionBy, ProductionOf, SessionFilter, SessionPage};
pub use request::{AssembleRequest, Assembled, Delivery};
pub use session_recovery::{RecoveryReport, recovery_loop};

use crate::hsm::Hsm;
use crate::keypool::KeyPool;
use crate::store::{AccessStore, Journal, Loaded, Registry, Session};
use in_flight::InFlight;
use locks::ChipLocks;
use pair_supplier::PairSupplier;

/// The services that provisioning uses, connected once at startup.
pub struct Provisioner {
    hsm: Hsm,
    journal: Journal,
    registry: Registry,
    pool: Arc<KeyPool>,
    pairs: PairSupplier,
    access: Arc<dyn AccessStore>,
    policy: ArcSwap<Policy>,
    session_lifetime: Duration,
    chip_locks: ChipLocks,
    in_flight: InFlight,
    clock: Clock,
}

impl Provisioner {
    /// Creates a provisioner that uses these services and the system clock.
    pub fn new(
        hsm: Hsm,
        journal: Journal,
        registry: Registry,
        pool: Arc<KeyPool>,
        access: Arc<dyn AccessStore>,
        policy: Policy,
        session_lifetime: Duration,
    ) -> Self {
        Self {
            pairs: PairSupplier::new(hsm.clone(), Arc::clone(&pool), registry.clone()),
            hsm,
            journal,
            registry,
            pool,
            access,
            policy: ArcSwap::from_pointee(policy),
            session_lifetime,
            chip_locks: ChipLocks::default(),
            in_flight: InFlight::default(),
            clock: Clock::system(),
        }
    }

    /// Replaces the clock.
    #[must_use]
    pub fn with_clock(self, clock: Clock) -> Self {
        Self { clock, ..self }
    }

    /// The HSM, for status.
    pub const fn hsm(&self) -> &Hsm {
        &self.hsm
    }

    /// The journal, for status.
    pub const fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The public database, for status.
    pub const fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The pools of key pairs.
    pub const fn pool(&self) -> &Arc<KeyPool> {
        &self.pool
    }

    /// The current policy. A long-running call keeps the returned policy, so that it sees one configuration throughout.
    pub fn policy(&self) -> Arc<Policy> {
        self.policy.load_full()
    }

    /// Replaces the policy. Calls in progress finish under the policy that they began with.
    pub fn replace_policy(&self, policy: Policy) {
        self.policy.store(Arc::new(policy.with_signers_of(&self.policy())));
    }

    /// The chip of a session, to lock it. The caller must read the session again once it holds the lock.
    async fn chip_of(&self, id: &SessionId) -> Result<ChipId, ProvisionError> {
        match self.in_flight.chip_of(id) {
            Some(chip) => Ok(chip),
            None => Ok(self.load(id).await?.session().chip.clone()),
        }
    }

    async fn load(&self, id: &SessionId) -> Result<Loaded, ProvisionError> {
        self.journal.load(id).await?.ok_or_else(|| ProvisionError::NoSession(id.to_string()))
    }
}

fn wrong_state(session: &Session, hint: &'static str) -> ProvisionError {
    ProvisionError::WrongState { session: session.id, state: session.state.name(), hint }
}
