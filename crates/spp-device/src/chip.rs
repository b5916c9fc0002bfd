//! The chip: ROM content and keys that are fixed at manufacture.

use aws_lc_rs::agreement::{ECDH_P256, PrivateKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use spp_format::cbor::Writer;
use spp_format::keys::{DevicePrivateKey, KeyType, PrivateParts, PublicKey};
use spp_format::names::ChipId;
use spp_format::package::{self, BackupIv, TransportPrivateKey};
use spp_format::secret::{Secret, SecretBytes};
use spp_format::tlog::LogKey;

use super::DeviceError;

/// The content of the chip's ROM. Public and immutable.
#[derive(Debug, Clone)]
pub struct Rom {
    /// The unique chip identifier.
    pub chip: ChipId,
    /// The manufacturer's public signature key: the device's root of trust.
    pub manufacturer: PublicKey,
    /// The key of the log that contains the device's record; without it, the chip stores receipts unverified.
    pub log: Option<LogKey>,
}

/// The unique secret chip key. It encrypts and decrypts within this type and cannot be exported.
pub struct ChipKey(Secret<[u8; 32]>);

impl ChipKey {
    /// Programs the key into the chip, once, at manufacture.
    pub const fn burn_in(bytes: Secret<[u8; 32]>) -> Self {
        Self(bytes)
    }

    pub(super) fn encrypt(
        &self,
        package: &SecretBytes,
        chip: &ChipId,
        certificate: &[u8],
    ) -> Result<Vec<u8>, DeviceError> {
        Ok(package::make_backup(package, &self.0, chip, certificate, BackupIv::random()?)?)
    }

    pub(super) fn decrypt(&self, backup: &[u8], chip: &ChipId, certificate: &[u8]) -> Result<SecretBytes, DeviceError> {
        Ok(package::open_backup(backup, &self.0, chip, certificate)?)
    }

    /// Derives a P-256 key pair from the chip key.
    pub(super) fn derive_own_pair(&self, chip: &ChipId) -> Result<DevicePrivateKey, DeviceError> {
        let failed = |e: spp_format::keys::KeyError| DeviceError::Derivation(e.to_string());
        let (scalar, point) = derive_p256(&self.0, "own key pair", chip)?;
        let public = PublicKey::from_ec_point(KeyType::P256, &point).map_err(failed)?;
        DevicePrivateKey::from_parts(public, PrivateParts::Ec(scalar)).map_err(failed)
    }
}

/// A chip as it leaves the fab.
pub struct Chip {
    /// The publicly readable ROM.
    pub rom: Rom,
    pub(super) key: ChipKey,
    pub(super) transport: Option<TransportPrivateKey>,
}

impl Chip {
    /// Creates a chip; a chip without a transport key cannot receive sealed packages.
    pub const fn new(rom: Rom, key: ChipKey, transport: Option<TransportPrivateKey>) -> Self {
        Self { rom, key, transport }
    }
}

/// Derives 32 bytes for one purpose of one chip from a silicon secret with HKDF-SHA-256 (RFC 5869).
pub(super) fn derive(
    secret: &Secret<[u8; 32]>,
    purpose: &str,
    chip: &ChipId,
    attempt: i64,
) -> Result<Secret<[u8; 32]>, DeviceError> {
    let failed = || DeviceError::Derivation("HKDF failed in the provider".into());
    let mut info = Writer::with_limit(128);
    info.array(3).text(purpose).bytes(chip.as_bytes()).int(attempt);
    let info = info.finish_public().ok_or_else(failed)?;
    let mut derived = Secret::new([0; 32]);
    // Exposed to derive from one and to fill the other.
    let prk = Salt::new(HKDF_SHA256, b"spp/v1/silicon").extract(secret.expose());
    let key = prk.expand(&[&info], HKDF_SHA256).map_err(|_| failed())?.fill(derived.expose_mut());
    key.map_err(|_| failed())?;
    Ok(derived)
}

/// Derives a P-256 key pair as scalar and uncompressed point. One in 2^32 derived values is not a valid scalar; it is skipped.
pub(super) fn derive_p256(
    secret: &Secret<[u8; 32]>,
    purpose: &str,
    chip: &ChipId,
) -> Result<(SecretBytes, Vec<u8>), DeviceError> {
    for attempt in 0..4 {
        let scalar = derive(secret, purpose, chip, attempt)?;
        // Exposed to the provider, which validates the scalar and computes the point.
        let point = PrivateKey::from_private_key(&ECDH_P256, scalar.expose())
            .ok()
            .and_then(|key| key.compute_public_key().ok());
        if let Some(point) = point {
            return Ok((SecretBytes::copy_of(scalar.expose()), point.as_ref().to_vec()));
        }
    }
    Err(DeviceError::Derivation("no valid scalar in four attempts".into()))
}
