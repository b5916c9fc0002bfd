//! A profile with the issuer that signs for it.

use spp_format::certificate::Profile;
use spp_format::keys::sha256;
use spp_format::names::{DeviceIdentity, KeyName};

use super::issuer::Issuer;
use crate::hsm::Derivation;

/// A profile with the issuer that signs for it.
pub(super) struct Product {
    /// The certificate template, key types, and delivery and confirmation rules.
    pub(super) profile: Profile,
    /// The signing key and certificate of the issuer.
    pub(super) issuer: Issuer,
}

impl Product {
    /// Hash of the inputs that determine the package bytes besides the session itself: see
    /// [`Session::recipe`](crate::store::Session).
    pub(super) fn recipe(&self) -> [u8; 32] {
        let mut parts = Vec::new();
        for key in self.profile.symmetric_keys() {
            parts.push(format!("{}/{}", key.purpose, key.length).into_bytes());
        }
        if !self.profile.is_cwt() {
            parts.extend(self.issuer.certificate().chain().iter().cloned());
        }
        // Hash each part separately, so that part boundaries are unambiguous.
        let hashes: Vec<u8> = parts.iter().flat_map(|part| sha256(part)).collect();
        sha256(&hashes)
    }

    /// The derivations of a device's symmetric keys, from the profile's master key or from the one that the session began with.
    pub(super) fn derivations(&self, identity: &DeviceIdentity, master: Option<&KeyName>) -> Vec<Derivation> {
        let specs = self.profile.symmetric_keys().iter();
        let with_master = specs.filter_map(|spec| Some((spec, master?)));
        with_master
            .map(|(spec, key)| Derivation::device_key(key.clone(), &spec.purpose, identity, usize::from(spec.length)))
            .collect()
    }
}
