//! The content of a device certificate before it is built, and its serial number.

use super::IssuerCertificate;
use super::profile::Profile;
use crate::keys::{PublicKey, SignatureAlgorithm};
use crate::names::{ChipId, DeviceIdentity};

/// The content of a device certificate.
#[derive(Debug, Clone, Copy)]
pub struct CertificateRequest<'a> {
    /// The profile.
    pub profile: &'a Profile,
    /// The issuer certificate of the profile's signing key.
    pub issuer: &'a IssuerCertificate,
    /// The chip.
    pub chip: &'a ChipId,
    /// The identity to bind to the chip.
    pub identity: &'a DeviceIdentity,
    /// The device's public key; `None` requests a CWT, which the profile must allow.
    pub public_key: Option<&'a PublicKey>,
    /// The serial number.
    pub serial: CertificateSerial,
    /// Seconds since the Unix epoch.
    pub not_before: u64,
}

impl CertificateRequest<'_> {
    /// The signature algorithm.
    pub fn algorithm(&self) -> SignatureAlgorithm {
        self.profile.signature().unwrap_or(self.issuer.algorithm())
    }

    /// Seconds since the Unix epoch; `None` for no expiry.
    pub(super) fn not_after(&self) -> Option<u64> {
        let days = self.profile.certificate().validity_days?;
        Some(self.not_before.saturating_add(u64::from(days) * 86_400))
    }
}

/// A certificate's serial number: 20 bytes, positive (RFC 5280 §4.1.2.2), 158 of its bits random.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CertificateSerial([u8; Self::LEN]);

impl CertificateSerial {
    /// Length in bytes: the maximum of RFC 5280 §4.1.2.2.
    pub const LEN: usize = 20;

    /// Creates a serial number from the HSM's random bytes. The first two bits become `01`: positive, and always 20 bytes long.
    pub const fn from_random(mut random: [u8; Self::LEN]) -> Self {
        random[0] = random[0] & 0x7f | 0x40;
        Self(random)
    }

    /// The bytes, big-endian, as stored and encoded.
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}
