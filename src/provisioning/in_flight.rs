//! Packages between Assemble and Complete, in memory for a short time, so that the usual device costs no second unwrapping in
//! the HSM. A repeat or a late Complete finds its keys in the secret store instead.
//!
//! Trust: whoever reads the process's memory sees packages in flight, as before; this makes it the last minute's.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::names::{ChipId, SessionId};
use crate::package::DataPackage;
use crate::secret::SecretBytes;

/// Packages kept at once; the oldest gives way.
const PLACES: usize = 1024;
/// A package that nobody came back for is wiped after so long.
const KEPT_FOR: Duration = Duration::from_secs(60);

/// A package as values and as the bytes that the device got.
pub(super) struct InFlightPackage {
    pub(super) package: DataPackage,
    pub(super) bytes: SecretBytes,
}

/// The packages of the last minute. What is removed is wiped.
#[derive(Default)]
pub(super) struct InFlight(Mutex<PackageCache>);

#[derive(Default)]
struct PackageCache {
    packages: HashMap<SessionId, InFlightPackage>,
    /// In the order they came; some are taken already.
    order: VecDeque<(Instant, SessionId)>,
}

impl InFlight {
    /// Keeps a package for the next call of its session.
    pub(super) fn keep(&self, session: SessionId, package: InFlightPackage) {
        let mut shelf = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shelf.clear_old(Instant::now(), PLACES - 1);
        if shelf.packages.insert(session, package).is_none() {
            shelf.order.push_back((Instant::now(), session));
        }
    }

    /// Takes the package of a session, if it is still there.
    pub(super) fn take(&self, session: &SessionId) -> Option<InFlightPackage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).packages.remove(session)
    }

    /// The chip of a session whose package is here.
    pub(super) fn chip_of(&self, session: &SessionId) -> Option<ChipId> {
        let shelf = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shelf.packages.get(session).map(|ready_members| ready_members.package.chip.clone())
    }

    /// Wipes what is too old.
    pub(super) fn sweep(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear_old(Instant::now(), PLACES);
    }
}

impl PackageCache {
    /// A session that was taken and kept again stands at its first time: it is wiped early, never late.
    fn clear_old(&mut self, now: Instant, places: usize) {
        while let Some((since, session)) = self.order.front() {
            let old = now.duration_since(*since) >= KEPT_FOR;
            if !old && self.order.len() <= places && self.packages.contains_key(session) {
                return;
            }
            self.packages.remove(session);
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::package::{CertificateChain, SymmetricKey};

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
    fn a_package_is_taken_once() {
        let shelf = InFlight::default();
        shelf.keep(session(1), package(1));
        assert_eq!(shelf.take(&session(1)).unwrap().bytes.expose(), &1u32.to_be_bytes());
        assert!(shelf.take(&session(1)).is_none());
    }

    #[test]
    fn the_shelf_has_an_end_and_the_oldest_gives_way() {
        let shelf = InFlight::default();
        for n in 0..2 * PLACES as u32 {
            shelf.keep(session(n), package(n));
        }
        let inner = shelf.0.lock().unwrap();
        assert_eq!((inner.packages.len(), inner.order.len()), (PLACES, PLACES));
        assert!(!inner.packages.contains_key(&session(0)));
    }

    #[test]
    fn what_is_old_is_wiped_and_what_was_taken_leaves_no_trace() {
        let shelf = InFlight::default();
        shelf.keep(session(1), package(1));
        shelf.keep(session(2), package(2));
        drop(shelf.take(&session(1)));
        let mut inner = shelf.0.lock().unwrap();
        inner.clear_old(Instant::now(), PLACES);
        assert_eq!((inner.packages.len(), inner.order.len()), (1, 1));
        inner.clear_old(Instant::now() + KEPT_FOR, PLACES);
        assert!(inner.packages.is_empty() && inner.order.is_empty());
    }
}
