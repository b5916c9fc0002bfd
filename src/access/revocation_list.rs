//! The in-memory revocation list that every call is checked against.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use spp_format::certificate::{Caller, CallerCertificate};

use super::Revocation;

/// The revocations by caller. They are checked for each call, so a revocation also takes effect on open connections.
#[derive(Default)]
pub struct RevocationList(RwLock<HashMap<Caller, u64>>);

impl RevocationList {
    /// Adds revocations.
    pub fn revoke(&self, revocations: impl IntoIterator<Item = Revocation>) {
        let mut revoked = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for Revocation { caller, at, .. } in revocations {
            let until = revoked.entry(caller).or_default();
            *until = at.max(*until);
        }
    }

    /// True if the certificate is revoked.
    pub fn is_revoked(&self, certificate: &CallerCertificate) -> bool {
        self.revoked_until(&certificate.caller).is_some_and(|until| certificate.not_before <= until)
    }

    /// The time up to which the caller's certificates are revoked; seconds since the Unix epoch.
    pub fn revoked_until(&self, caller: &Caller) -> Option<u64> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(caller).copied()
    }
}
