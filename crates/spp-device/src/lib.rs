//! Reference implementation of a device: installs, backs up, confirms and recovers what the SPP delivers.
//!
//! Intended as a reference for firmware authors, so `spp-format` is its only dependency in this workspace. A
//! device has three components:
//! - a **ROM** with its chip ID and the manufacturer's public key, which cannot be modified ([`Rom`]);
//! - a **chip key** that never leaves the chip ([`ChipKey`]);
//! - a **flash** that anyone can read, erase or lose ([`Flash`]), so it contains nothing in clear. It holds the certificate
//!   and the backup package, which the public database holds as well.
//!
//! On the line: [`Device::install`], [`Device::backup`], [`Device::confirmation`]. After the flash is lost: fetch the record of
//! the chip ID from the public database and call [`Device::recover`]. Both lead to the same flash content, byte for byte.
//!
//! Trust: the station, the network and the public database may be malicious. A device trusts only its ROM; everything else is
//! accepted only if the manufacturer's signature or the chip key authenticates it.

mod certificate;
mod chip;
mod error;
mod flash;
mod simulated_fab;
#[cfg(test)]
mod tests;

pub use chip::{Chip, ChipKey, Rom};
pub use error::DeviceError;
pub use flash::Flash;
pub use simulated_fab::SimulatedFab;

use spp_format::cbor::{CborError, Reader, Writer};
use spp_format::keys::{DevicePrivateKey, PublicKey, sha256};
use spp_format::names::{ChipId, DeviceIdentity, ProfileName, SessionId};
use spp_format::package::{self, ConfirmationClaims, ConfirmationSigner, DataPackage, TransportPublicKey};
use spp_format::record::DeviceRecord;
use spp_format::secret::SecretBytes;
use spp_format::tlog::{LogProof, VerifiedProof};

/// A delivered data package.
pub enum Delivery<'a> {
    /// Unencrypted; every party that transports it sees the keys.
    Clear(&'a SecretBytes),
    /// Sealed to the chip's transport key.
    Sealed(&'a [u8]),
}

/// The part of a public record that recovery needs.
pub struct PublicRecord<'a> {
    /// The device certificate: DER, or a CWT.
    pub certificate: &'a [u8],
    /// Whether the certificate is a CWT.
    pub is_cwt: bool,
    /// The backup package.
    pub backup: &'a [u8],
}

/// The installed package without its secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstalledPackage {
    /// The session that assembled it.
    pub session: SessionId,
    /// The identity of the device.
    pub identity: DeviceIdentity,
    /// The profile.
    pub profile: ProfileName,
    /// The device certificate: DER, or a CWT.
    pub certificate: Vec<u8>,
    /// Whether the certificate is a CWT.
    pub is_cwt: bool,
    /// The device's public key, if it has a pair.
    pub public_key: Option<PublicKey>,
    /// The purposes of the symmetric keys, in order.
    pub purposes: Vec<String>,
    /// The version of the master key from which they are derived; 0 if there are none.
    pub master_key_version: u32,
}

/// The result of verifying a receipt for this device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedReceipt {
    /// The record's position in the log and the tree that contains it.
    pub proof: VerifiedProof,
    /// The SHA-256 of the record.
    pub record_hash: [u8; 32],
}

/// A chip with its flash.
pub struct Device {
    chip: Chip,
    flash: Flash,
}

impl Device {
    /// Creates a device.
    pub const fn new(chip: Chip, flash: Flash) -> Self {
        Self { chip, flash }
    }

    /// The chip ID in the ROM.
    pub const fn chip_id(&self) -> &ChipId {
        &self.chip.rom.chip
    }

    /// The key to which packages can be sealed; `None` if the chip has no transport key.
    ///
    /// # Errors
    /// If the provider fails.
    pub fn transport_public_key(&self) -> Result<Option<TransportPublicKey>, DeviceError> {
        Ok(self.chip.transport.as_ref().map(package::TransportPrivateKey::public).transpose()?)
    }

    /// The chip's own key pair, for profiles that accept a certificate request. It is derived from the chip key, so it needs no
    /// flash and survives a wipe.
    ///
    /// # Errors
    /// If the provider fails.
    pub fn own_key_pair(&self) -> Result<DevicePrivateKey, DeviceError> {
        self.chip.key.derive_own_pair(self.chip_id())
    }

    /// Installs a delivered package. Installing the same package again changes nothing; its backup stays the same.
    ///
    /// # Errors
    /// If the package is not for this device and session, or its certificate or key is wrong. The flash is then unchanged.
    pub fn install(&mut self, session: &SessionId, delivery: &Delivery<'_>) -> Result<InstalledPackage, DeviceError> {
        // 1. Decrypt.
        let opened = match delivery {
            Delivery::Clear(bytes) => SecretBytes::copy_of(bytes.expose()),
            Delivery::Sealed(sealed) => {
                let transport = self.chip.transport.as_ref().ok_or(DeviceError::NoTransportKey)?;
                package::open(sealed, transport, session, self.chip_id())?
            }
        };
        // 2. Decode; this checks every private value against the public key.
        let package = DataPackage::decode(opened.expose())?;
        // 3. Check session, chip, identity and the manufacturer's signature.
        expect("data package", "session", &package.session, session)?;
        let installed = self.check(&package)?;
        // 4. Store it encrypted: the stored form is the backup.
        if !self.has_stored(&opened) {
            let certificate = package.certificate.device_certificate();
            let backup = self.chip.key.encrypt(&opened, self.chip_id(), certificate)?;
            self.flash.write(&FlashContent { certificate: certificate.to_vec(), backup }.to_bytes()?)?;
        }
        Ok(installed)
    }

    /// The backup of the installed package; returns the same bytes every time.
    ///
    /// # Errors
    /// If nothing is installed, or the flash is damaged.
    pub fn backup(&self) -> Result<Vec<u8>, DeviceError> {
        Ok(self.flash_content()?.backup)
    }

    /// Proves to the manufacturer that this device holds its key, this package and this backup.
    ///
    /// # Errors
    /// If nothing is installed, or the flash is damaged.
    pub fn confirmation(&self) -> Result<Vec<u8>, DeviceError> {
        let backup = self.backup()?;
        let bytes = self.decrypt_package()?;
        let package = DataPackage::decode(bytes.expose())?;
        let claims = ConfirmationClaims::new(package.session, self.chip_id().clone(), &bytes, &backup);
        if package.certificate.is_cwt() {
            let key = package.symmetric_keys.first().ok_or(DeviceError::KeyMismatch("data package"))?;
            return Ok(package::confirm(&claims, &ConfirmationSigner::Symmetric(key.key()))?);
        }
        let pair = match package.key_pair {
            Some(pair) => pair,
            None => self.own_key_pair()?,
        };
        Ok(package::confirm(&claims, &ConfirmationSigner::Pair(&pair))?)
    }

    /// The installed package, verified against the ROM again.
    ///
    /// # Errors
    /// If nothing is installed, or the flash is damaged.
    pub fn installed(&self) -> Result<InstalledPackage, DeviceError> {
        self.check(&self.package()?)
    }

    /// The package, for the device's own use of its keys.
    ///
    /// # Errors
    /// If nothing is installed, or the flash is damaged.
    pub fn package(&self) -> Result<DataPackage, DeviceError> {
        Ok(DataPackage::decode(self.decrypt_package()?.expose())?)
    }

    /// Verifies a receipt: it proves that a tree signed by the log contains the record of this device with the certificate and
    /// backup in its flash. `published` is the receipt's timestamp, which is part of the record. Returns `None` if the ROM has
    /// no log key.
    ///
    /// # Errors
    /// If the flash cannot be read, or the receipt does not prove this.
    pub fn verify_receipt(&self, published: u64, proof: &[u8]) -> Result<Option<VerifiedReceipt>, DeviceError> {
        let Some(log) = &self.chip.rom.log else { return Ok(None) };
        let record = self.expected_record(published)?.to_bytes().map_err(|e| DeviceError::Damaged(e.to_string()))?;
        let proof = LogProof::from_bytes(proof)?.verify(&record, log)?;
        Ok(Some(VerifiedReceipt { proof, record_hash: sha256(&record) }))
    }

    /// Rebuilds this device's public record from its flash.
    fn expected_record(&self, published: u64) -> Result<DeviceRecord, DeviceError> {
        let content = self.flash_content()?;
        let package = self.package()?;
        let is_cwt = package.certificate.is_cwt();
        let certificate =
            certificate::verify_certificate(&content.certificate, is_cwt, &self.chip.rom.manufacturer, self.chip_id())?;
        Ok(DeviceRecord {
            chip: self.chip_id().clone(),
            identity: package.identity.clone(),
            profile: package.profile.clone(),
            certificate: content.certificate,
            certificate_is_cwt: is_cwt,
            serial: certificate.serial().to_vec(),
            public_key: certificate.public_key().map(|key| key.spki_der().to_vec()),
            backup: content.backup,
            master_key_version: package.master_key_version,
            session: package.session,
            published,
        })
    }

    /// Erases the flash. ROM and chip key are unaffected.
    ///
    /// # Errors
    /// If the flash cannot be written.
    pub fn wipe(&mut self) -> Result<(), DeviceError> {
        self.flash.wipe()
    }

    /// Restores an erased device from its public record. The record may come from any source.
    ///
    /// # Errors
    /// If the record is for another chip, or was modified. The flash is then unchanged.
    pub fn recover(&mut self, record: &PublicRecord<'_>) -> Result<InstalledPackage, DeviceError> {
        let bytes = self.chip.key.decrypt(record.backup, self.chip_id(), record.certificate)?;
        let package = DataPackage::decode(bytes.expose())?;
        let certificate = &package.certificate;
        if certificate.device_certificate() != record.certificate || certificate.is_cwt() != record.is_cwt {
            return Err(DeviceError::Certificate("the record's certificate differs from the one in the backup".into()));
        }
        let installed = self.check(&package)?;
        let content = FlashContent { certificate: record.certificate.to_vec(), backup: record.backup.to_vec() };
        self.flash.write(&content.to_bytes()?)?;
        Ok(installed)
    }

    /// Verifies a package before it is stored, regardless of its source.
    fn check(&self, package: &DataPackage) -> Result<InstalledPackage, DeviceError> {
        expect("data package", "chip", &package.chip, self.chip_id())?;
        let bytes = package.certificate.device_certificate();
        let certificate = certificate::verify_certificate(
            bytes,
            package.certificate.is_cwt(),
            &self.chip.rom.manufacturer,
            self.chip_id(),
        )?;
        if !certificate.binds_identity(&package.identity) {
            let found = package.identity.value();
            expect("data package", "identity", &*found, certificate.identity_value())?;
            return Err(DeviceError::Certificate("it binds another type of identity".into()));
        }
        if let Some(certified) = certificate.public_key() {
            let (owner, public_key) = match &package.key_pair {
                Some(pair) => ("data package", pair.public().clone()),
                None => ("chip", self.own_key_pair()?.public().clone()),
            };
            if public_key != *certified {
                return Err(DeviceError::KeyMismatch(owner));
            }
        }
        Ok(InstalledPackage {
            session: package.session,
            identity: package.identity.clone(),
            profile: package.profile.clone(),
            certificate: bytes.to_vec(),
            is_cwt: package.certificate.is_cwt(),
            public_key: certificate.public_key().cloned(),
            purposes: package.symmetric_keys.iter().map(|key| key.purpose().to_owned()).collect(),
            master_key_version: package.master_key_version,
        })
    }

    /// Whether exactly this package is stored; `false` if the flash is damaged.
    fn has_stored(&self, bytes: &SecretBytes) -> bool {
        self.decrypt_package().is_ok_and(|stored| {
            aws_lc_rs::constant_time::verify_slices_are_equal(stored.expose(), bytes.expose()).is_ok()
        })
    }

    fn decrypt_package(&self) -> Result<SecretBytes, DeviceError> {
        let content = self.flash_content()?;
        self.chip.key.decrypt(&content.backup, self.chip_id(), &content.certificate)
    }

    fn flash_content(&self) -> Result<FlashContent, DeviceError> {
        let bytes = self.flash.read()?.ok_or(DeviceError::Empty)?;
        FlashContent::from_bytes(&bytes).map_err(|e| DeviceError::Damaged(e.to_string()))
    }
}

/// The content of the flash: `{1: certificate, 2: backup package}` in deterministic CBOR. Contains no secret.
struct FlashContent {
    certificate: Vec<u8>,
    backup: Vec<u8>,
}

impl FlashContent {
    fn to_bytes(&self) -> Result<Vec<u8>, DeviceError> {
        let mut out = Writer::with_limit(flash::CAPACITY);
        out.map(2).int(1).bytes(&self.certificate).int(2).bytes(&self.backup);
        out.finish_public().ok_or_else(|| DeviceError::Damaged("content too large".into()))
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, CborError> {
        let mut reader = Reader::new(bytes);
        let mut map = reader.map()?;
        let certificate = map.required_bytes(1)?;
        let backup = map.required_bytes(2)?;
        map.end()?;
        reader.end()?;
        Ok(Self { certificate: certificate.to_vec(), backup: backup.to_vec() })
    }
}

fn expect<T: PartialEq + std::fmt::Display + ?Sized>(
    what: &'static str,
    field: &'static str,
    found: &T,
    expected: &T,
) -> Result<(), DeviceError> {
    if found == expected {
        return Ok(());
    }
    Err(DeviceError::NotForThisDevice { what, field, found: found.to_string(), expected: expected.to_string() })
}
