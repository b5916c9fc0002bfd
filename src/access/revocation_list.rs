//! Who is revoked, as every call is asked for.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use super::Revocation;
use crate::certificate::{Caller, CallerCertificate};

/// The revocations, in memory: looked at with each call, so that an open connection ends with its certificate.
#[derive(Default)]
pub struct RevocationList(RwLock<HashMap<Caller, u64>>);

impl RevocationList {
    /// From now on these, and those before.
    pub fn revoke(&self, revocations: impl IntoIterator<Item = Revocation>) {
        let mut revoked = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for Revocation { caller, at, .. } in revocations {
            let until = revoked.entry(caller).or_default();
            *until = at.max(*until);
        }
    }

    /// Whether the certificate is of no use any more.
    pub fn is_revoked(&self, certificate: &CallerCertificate) -> bool {
        self.revoked_until(&certificate.caller).is_some_and(|until| certificate.not_before <= until)
    }

    /// Up to which moment the caller's certificates are of no use.
    pub fn revoked_until(&self, caller: &Caller) -> Option<u64> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(caller).copied()
    }
}
