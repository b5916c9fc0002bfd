//! Cache of data packages between Assemble and Complete, so that Complete usually needs no second unwrapping in the HSM. A
//! repeated or late Complete reads its keys from the secret store instead.
//!
//! Security: an attacker who reads the process memory sees packages in flight in any case; the cache extends this to one minute.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use spp_format::names::{ChipId, SessionId};
use spp_format::package::DataPackage;
use spp_format::secret::SecretBytes;

/// Capacity of the cache. A new package evicts the oldest one.
const CAPACITY: usize = 1024;
/// A package is wiped after this time if Complete does not take it.
const TIME_TO_LIVE: Duration = Duration::from_secs(60);

/// A package, decoded and encoded. The device received these bytes.
pub(super) struct InFlightPackage {
    pub(super) package: DataPackage,
    pub(super) bytes: SecretBytes,
}

/// The packages of the last minute. Removing a package wipes it.
#[derive(Default)]
pub(super) struct InFlight(Mutex<PackageCache>);

#[derive(Default)]
struct PackageCache {
    packages: HashMap<SessionId, InFlightPackage>,
    /// Insertion order. Some of the packages may have been taken already.
    order: VecDeque<(Instant, SessionId)>,
}

impl InFlight {
    /// Caches a package for the next call of its session.
    pub(super) fn insert(&self, session: SessionId, package: InFlightPackage) {
        let mut cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cache.evict(Instant::now(), CAPACITY - 1);
        if cache.packages.insert(session, package).is_none() {
            cache.order.push_back((Instant::now(), session));
        }
    }

    /// Takes the package of a session out of the cache, if it is cached.
    pub(super) fn take(&self, session: &SessionId) -> Option<InFlightPackage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).packages.remove(session)
    }

    /// The chip of a session whose package is cached.
    pub(super) fn chip_of(&self, session: &SessionId) -> Option<ChipId> {
        let cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cache.packages.get(session).map(|cached| cached.package.chip.clone())
    }

    /// Wipes expired packages.
    pub(super) fn sweep(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).evict(Instant::now(), CAPACITY);
    }
}

impl PackageCache {
    /// Evicts expired packages, and the oldest ones above `capacity`. A package that was taken and inserted again keeps its first
    /// insertion time, so it is wiped early, never late.
    fn evict(&mut self, now: Instant, capacity: usize) {
        while let Some((inserted, session)) = self.order.front() {
            let expired = now.duration_since(*inserted) >= TIME_TO_LIVE;
            if !expired && self.order.len() <= capacity && self.packages.contains_key(session) {
                return;
            }
            self.packages.remove(session);
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use spp_format::package::{CertificateChain, SymmetricKey};

    use super::*;

    fn session(n: u32) -> SessionId {
        SessionId::from_bytes(&[[0; 12].as_slice(), &n.to_be_bytes()].concat()).unwrap()
    }

    fn package(n: u32) -> InFlightPackage {
        let package = DataPackage {
            chip: ChipId::from_bytes(&[1; 8]).unwrap(),
            identity: "serial:A".parse().unwrap(),
            profile: "sensor".parse().unwrap(),
            session: session(n),
            certificate: CertificateChain::Cwt(vec![1]),
            key_pair: None,
            symmetric_keys: vec![SymmetricKey::new("channel", SecretBytes::new(vec![7; 32])).unwrap()],
            master_key_version: 1,
        };
        InFlightPackage { package, bytes: SecretBytes::new(n.to_be_bytes().to_vec()) }
    }

    #[test]
    fn in_flight_package_is_taken_once() {
        let cache = InFlight::default();
        cache.insert(session(1), package(1));
        assert_eq!(cache.take(&session(1)).unwrap().bytes.expose(), &1u32.to_be_bytes());
        assert!(cache.take(&session(1)).is_none());
    }

    #[test]
    fn full_cache_evicts_oldest_package() {
        let cache = InFlight::default();
        for n in 0..2 * CAPACITY as u32 {
            cache.insert(session(n), package(n));
        }
        let inner = cache.0.lock().unwrap();
        assert_eq!((inner.packages.len(), inner.order.len()), (CAPACITY, CAPACITY));
        assert!(!inner.packages.contains_key(&session(0)));
    }

    #[test]
    fn evict_removes_taken_and_expired_packages() {
        let cache = InFlight::default();
        cache.insert(session(1), package(1));
        cache.insert(session(2), package(2));
        drop(cache.take(&session(1)));
        let mut inner = cache.0.lock().unwrap();
        inner.evict(Instant::now(), CAPACITY);
        assert_eq!((inner.packages.len(), inner.order.len()), (1, 1));
        inner.evict(Instant::now() + TIME_TO_LIVE, CAPACITY);
        assert!(inner.packages.is_empty() && inner.order.is_empty());
    }
}
