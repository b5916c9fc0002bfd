//! The chip: what is fixed when the silicon is made.

use aws_lc_rs::agreement::{ECDH_P256, PrivateKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};

use super::DeviceError;
use crate::keys::{DevicePrivateKey, KeyKind, PrivateParts, PublicKey};
use crate::names::ChipId;
use crate::package::{self, BackupIv, TransportPrivateKey, cbor::Writer};
use crate::secret::{Secret, SecretBytes};
use crate::tlog::LogKey;

/// What is in the chip's ROM. Not secret, and not changeable.
#[derive(Debug, Clone)]
pub struct Rom {
    /// The unique chip identifier.
    pub chip: ChipId,
    /// The manufacturer's public signature key: the root of all trust of the device.
    pub manufacturer: PublicKey,
    /// The key of the log that is to have the device's record; a chip without it keeps receipts unverified.
    pub log: Option<LogKey>,
}

/// The unique secret chip key. It encrypts and decrypts within this type and there is no way to read it.
pub struct ChipKey(Secret<[u8; 32]>);

impl ChipKey {
    /// Burns the key in, once, when the silicon is made.
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

    /// A P-256 pair that is a function of the chip key.
    pub(super) fn own_pair(&self, chip: &ChipId) -> Result<DevicePrivateKey, DeviceError> {
        let failed = |e: crate::keys::KeyError| DeviceError::Derivation(e.to_string());
        let (scalar, point) = derive_p256(&self.0, "own key pair", chip)?;
        let public = PublicKey::from_ec_point(KeyKind::P256, &point).map_err(failed)?;
        DevicePrivateKey::from_parts(public, PrivateParts::Ec(scalar)).map_err(failed)
    }
}

/// A chip as it leaves the fab.
pub struct Chip {
    /// What anybody may read.
    pub rom: Rom,
    pub(super) key: ChipKey,
    pub(super) transport: Option<TransportPrivateKey>,
}

impl Chip {
    /// Puts a chip together; without a transport key nothing can be sealed to it.
    pub const fn new(rom: Rom, key: ChipKey, transport: Option<TransportPrivateKey>) -> Self {
        Self { rom, key, transport }
    }
}

/// HKDF-SHA-256 (RFC 5869) of a secret of the silicon: 32 bytes for one purpose of one chip.
pub(super) fn derive(
    secret: &Secret<[u8; 32]>,
    purpose: &str,
    chip: &ChipId,
    attempt: i64,
) -> Result<Secret<[u8; 32]>, DeviceError> {
    let failed = || DeviceError::Derivation("the provider refused".into());
    let mut info = Writer::with_limit(128);
    info.array(3).text(purpose).bytes(chip.as_bytes()).int(attempt);
    let info = info.finish_public().ok_or_else(failed)?;
    let mut derived = Secret::new([0; 32]);
    // The one exposed to derive from it, the other to be filled.
    let prk = Salt::new(HKDF_SHA256, b"spp/v1/silicon").extract(secret.expose());
    let key = prk.expand(&[&info], HKDF_SHA256).map_err(|_| failed())?.fill(derived.expose_mut());
    key.map_err(|_| failed())?;
    Ok(derived)
}

/// A P-256 pair as scalar and uncompressed point. One in 2^32 derived values is no scalar: then the next is taken.
pub(super) fn derive_p256(
    secret: &Secret<[u8; 32]>,
    purpose: &str,
    chip: &ChipId,
) -> Result<(SecretBytes, Vec<u8>), DeviceError> {
    for attempt in 0..4 {
        let scalar = derive(secret, purpose, chip, attempt)?;
        // Exposed to the provider, which says whether it is a scalar and computes the point.
        let point = PrivateKey::from_private_key(&ECDH_P256, scalar.expose())
            .ok()
            .and_then(|key| key.compute_public_key().ok());
        if let Some(point) = point {
            return Ok((SecretBytes::copy_of(scalar.expose()), point.as_ref().to_vec()));
        }
    }
    Err(DeviceError::Derivation("no scalar was found in four attempts".into()))
}
