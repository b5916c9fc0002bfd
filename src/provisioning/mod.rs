//! ★ The story of one device: [`Provisioner::assemble`], [`Provisioner::complete`], [`Provisioner::recover`], and
//! [`Provisioner::restart`] for what a crash left.
//!
//! Each story is one function, read from top to bottom. The steps cannot be taken out of order: a signature needs the
//! [`Intent`](crate::store::Intent) that only a journaled reservation gives, an erasure needs the
//! [`PublicationReceipt`](crate::store::PublicationReceipt) that only a durable publication gives.

mod abort;
mod admit;
mod assemble;
mod complete;
mod deliver;
mod error;
mod in_flight;
mod issuer;
mod locks;
mod name;
mod pair_supplier;
mod policy;
mod recover;
mod report;
mod session_recovery;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

pub use crate::clock::Clock;
pub use abort::SessionView;
pub use assemble::{Assembled, Delivery, Order};
pub use complete::{Completion, Receipt};
pub use error::{FieldViolation, ProvisionError};
pub use name::Wanted;
pub use policy::Policy;
pub use report::{DeviceReport, DeviceView, KeyPairPlace, ProductionBy, ProductionOf, SessionFilter, SessionPage};
pub use session_recovery::{RecoveryReport, recovery_loop};

use crate::certificate::Profile;
use crate::hsm::Hsm;
use crate::keypool::KeyPool;
use crate::keys::sha256;
use crate::store::{AccessStore, Journal, Registry};
use in_flight::InFlight;
use issuer::Issuer;
use locks::ChipLocks;

/// Everything a device's way needs, wired once at start.
pub struct Provisioner {
    hsm: Hsm,
    journal: Journal,
    registry: Registry,
    pool: Arc<KeyPool>,
    access: Arc<dyn AccessStore>,
    rules: ArcSwap<Policy>,
    session_lifetime: Duration,
    chips: ChipLocks,
    in_flight: InFlight,
    clock: Clock,
}

/// A profile with the issuer that signs for it.
struct Product {
    /// What the product gets.
    profile: Profile,
    /// Who signs.
    issuer: Issuer,
}

impl Product {
    /// What decides a package's bytes beside the session itself: see [`Session::recipe`](crate::store::Session).
    fn recipe(&self) -> [u8; 32] {
        let mut parts = Vec::new();
        for rule in self.profile.symmetric_keys() {
            parts.push(format!("{}/{}", rule.purpose, rule.length).into_bytes());
        }
        if !self.profile.is_cwt() {
            parts.extend(self.issuer.certificate().chain().iter().cloned());
        }
        // Each part by its hash, so that none can run into the next.
        let hashes: Vec<u8> = parts.iter().flat_map(|part| sha256(part)).collect();
        sha256(&hashes)
    }
}

impl Provisioner {
    /// Wires the rooms together.
    pub fn new(
        hsm: Hsm,
        journal: Journal,
        registry: Registry,
        pool: Arc<KeyPool>,
        access: Arc<dyn AccessStore>,
        rules: Policy,
        session_lifetime: Duration,
    ) -> Self {
        Self {
            hsm,
            journal,
            registry,
            pool,
            access,
            rules: ArcSwap::from_pointee(rules),
            session_lifetime,
            chips: ChipLocks::default(),
            in_flight: InFlight::default(),
            clock: Clock::system(),
        }
    }

    /// The same with another clock.
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

    /// The rules at this moment. What goes on for longer keeps them, and is under one configuration.
    pub fn rules(&self) -> Arc<Policy> {
        self.rules.load_full()
    }

    /// From now on it goes by these rules; calls in flight end under those that they began with.
    pub fn exchange(&self, rules: Policy) {
        self.rules.store(Arc::new(rules.after(&self.rules())));
    }
}
