//! The personal device: what a chip does with what the processing point gives it.
//!
//! Written to be read by firmware authors as the reference. A device has three things:
//! - a **ROM** with its chip ID and the manufacturer's public key: nobody can change them ([`Rom`]);
//! - a **chip key** that never leaves the chip ([`ChipKey`]);
//! - a **flash** that can be read, wiped and lost by anybody ([`Flash`]); so nothing in it is in clear. It holds
//!   what the public database holds too: the certificate and the backup package.
//!
//! On the line: [`Device::install`], [`Device::backup`], [`Device::confirmation`]. Later, when the flash was lost: ask the
//! public database for the chip ID's record and [`Device::recover`]. Both end in the same flash, byte for byte.
//!
//! Trust: the station, the network and the public database may lie. A device believes its ROM alone, and all else only
//! as far as the manufacturer's signature and its own chip key reach.

mod certificate;
mod chip;
mod flash;
mod simulated_fab;
#[cfg(test)]
mod tests;

pub use chip::{Chip, ChipKey, Rom};
pub use flash::Flash;
pub use simulated_fab::SimulatedFab;

use std::path::PathBuf;

use crate::keys::{DevicePrivateKey, PublicKey, sha256};
use crate::names::{ChipId, DeviceIdentity, ProfileName, SessionId};
use crate::package::cbor::{CborError, Reader, Writer};
use crate::package::{
    self, BackupRefused, ConfirmationClaims, ConfirmationRefused, ConfirmationSigner, DataPackage, PackageError,
    TransportPublicKey,
};
use crate::secret::SecretBytes;
use crate::store::DeviceRecord;
use crate::tlog::{LogProof, TlogError, VerifiedProof};

/// Why a device did not do what it was asked. Its flash is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A package, certificate or record of another device, session or identity.
    #[error("the {what} is for {field} {found}, this device expects {expected}; nothing was stored")]
    NotForThisDevice {
        /// What was given.
        what: &'static str,
        /// Which field differs.
        field: &'static str,
        /// What the field says.
        found: String,
        /// What it should say.
        expected: String,
    },
    /// The certificate is not one of the manufacturer for this chip.
    #[error("the certificate was refused: {0}; nothing was stored")]
    Certificate(String),
    /// The package cannot be opened or read.
    #[error("the data package was refused: {0}")]
    Package(#[from] PackageError),
    /// The backup cannot be made or opened.
    #[error(transparent)]
    Backup(#[from] BackupRefused),
    /// The certificate's public key is not the one of the device's private key.
    #[error("the private key of the {0} does not belong to the certificate; nothing was stored")]
    KeyMismatch(&'static str),
    /// The chip has no transport key, so nothing can be sealed to it.
    #[error("this chip has no transport key; ask for a delivery that is not sealed")]
    NoTransportKey,
    /// The receipt does not prove that this device, as it is, is in the log.
    #[error("the receipt was refused: {0}; ask for it again, and if that does not help, the log is not what it says")]
    Receipt(#[from] TlogError),
    /// The confirmation could not be made.
    #[error(transparent)]
    Confirmation(#[from] ConfirmationRefused),
    /// Wiped, or never personalized.
    #[error("the flash is empty; install a package or recover the device")]
    Empty,
    /// The flash holds something else.
    #[error("the flash is damaged ({0}); wipe and recover the device")]
    Damaged(String),
    /// The file that stands for flash or silicon cannot be used.
    #[error("{doing} {path} failed: {source}")]
    File {
        /// What was done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The simulated fab cannot be made or opened.
    #[error("the fab in {path}: {problem}")]
    SimulatedFab {
        /// Its file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The provider failed to make a key.
    #[error("deriving a key of the chip failed: {0}")]
    Derivation(String),
}

/// A data package on its way into the device.
pub enum Delivery<'a> {
    /// As it is; whoever carries it sees the keys.
    Clear(&'a SecretBytes),
    /// Sealed to the chip's transport key.
    Sealed(&'a [u8]),
}

/// What the public database knows of a chip, as far as its recovery needs it.
pub struct PublicRecord<'a> {
    /// The device certificate: DER, or a CWT.
    pub certificate: &'a [u8],
    /// Whether it is a CWT.
    pub is_cwt: bool,
    /// The backup package.
    pub backup: &'a [u8],
}

/// What is installed, without its secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// The session that made it.
    pub session: SessionId,
    /// The identity of the device.
    pub identity: DeviceIdentity,
    /// What the product got.
    pub profile: ProfileName,
    /// The device certificate: DER, or a CWT.
    pub certificate: Vec<u8>,
    /// Whether it is a CWT.
    pub is_cwt: bool,
    /// The device's public key, if it has a pair.
    pub public_key: Option<PublicKey>,
    /// What the symmetric keys are for, in their order.
    pub purposes: Vec<String>,
    /// The version of the master key behind them; 0 if there are none.
    pub master_key_version: u32,
}

/// A receipt that proves its own device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedReceipt {
    /// Where the record is, and in which tree.
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
    /// Switches a device on.
    pub const fn new(chip: Chip, flash: Flash) -> Self {
        Self { chip, flash }
    }

    /// The chip ID in the ROM.
    pub const fn chip_id(&self) -> &ChipId {
        &self.chip.rom.chip
    }

    /// Where a package can be sealed to; `None` if the chip has no transport key.
    ///
    /// # Errors
    /// If the provider fails.
    pub fn transport_public_key(&self) -> Result<Option<TransportPublicKey>, DeviceError> {
        Ok(self.chip.transport.as_ref().map(package::TransportPrivateKey::public).transpose()?)
    }

    /// The key pair that the chip made for itself, for profiles that take a certificate request: derived from the chip
    /// key, so that it needs no place in the flash and survives a wipe.
    ///
    /// # Errors
    /// If the provider fails.
    pub fn own_key_pair(&self) -> Result<DevicePrivateKey, DeviceError> {
        self.chip.key.own_pair(self.chip_id())
    }

    /// Takes a delivered package in. The same package again changes nothing: its backup stays the same.
    ///
    /// # Errors
    /// If the package is not for this device and session, or its certificate or key is wrong. The flash is unchanged then.
    pub fn install(&mut self, session: &SessionId, delivery: &Delivery<'_>) -> Result<Installed, DeviceError> {
        // 1. Open it.
        let opened = match delivery {
            Delivery::Clear(bytes) => SecretBytes::copy_of(bytes.expose()),
            Delivery::Sealed(sealed) => {
                let transport = self.chip.transport.as_ref().ok_or(DeviceError::NoTransportKey)?;
                package::open(sealed, transport, session, self.chip_id())?
            }
        };
        // 2. Read it; every number of the private key is checked against the public one.
        let package = DataPackage::decode(opened.expose())?;
        // 3. It must be for this session, this chip, this identity, and signed by the manufacturer.
        expect("data package", "session", &package.session, session)?;
        let installed = self.check(&package)?;
        // 4. Store it, encrypted: what is stored is the backup.
        if !self.holds(&opened) {
            let certificate = package.certificate.device_certificate();
            let backup = self.chip.key.encrypt(&opened, self.chip_id(), certificate)?;
            self.flash.write(&Stored { certificate: certificate.to_vec(), backup }.to_bytes()?)?;
        }
        Ok(installed)
    }

    /// The backup package of what is installed; the same bytes every time.
    ///
    /// # Errors
    /// If nothing is installed, or the flash is damaged.
    pub fn backup(&self) -> Result<Vec<u8>, DeviceError> {
        Ok(self.stored()?.backup)
    }

    /// Proves to the manufacturer that this device holds its key, this package and this backup.
    ///
    /// # Errors
    /// If nothing is installed, or the flash is damaged.
    pub fn confirmation(&self) -> Result<Vec<u8>, DeviceError> {
        let backup = self.backup()?;
        let bytes = self.decrypted()?;
        let package = DataPackage::decode(bytes.expose())?;
        let claims = ConfirmationClaims::about(package.session, self.chip_id().clone(), &bytes, &backup);
        if package.certificate.is_cwt() {
            let key = package.symmetric_keys.first().ok_or(DeviceError::KeyMismatch("data package"))?;
            return Ok(package::confirm(&claims, &ConfirmationSigner::Symmetric(key.key()))?);
        }
        let pair = match package.key_pair {
            Some(delivered) => delivered,
            None => self.own_key_pair()?,
        };
        Ok(package::confirm(&claims, &ConfirmationSigner::Pair(&pair))?)
    }

    /// What is installed, checked against the ROM again.
    ///
    /// # Errors
    /// If nothing is installed, or the flash is damaged.
    pub fn installed(&self) -> Result<Installed, DeviceError> {
        self.check(&self.package()?)
    }

    /// The package, for the device's own use of its keys.
    ///
    /// # Errors
    /// If nothing is installed, or the flash is damaged.
    pub fn package(&self) -> Result<DataPackage, DeviceError> {
        Ok(DataPackage::decode(self.decrypted()?.expose())?)
    }

    /// Verifies a receipt: this very device, with the certificate and the backup that are in its flash, is in a tree that the log
    /// has signed. `published` is the time that the receipt names; it is part of the record. A chip that knows no log says `None`.
    ///
    /// # Errors
    /// If the flash cannot be read, or the receipt proves something else.
    pub fn verify_receipt(&self, published: u64, proof: &[u8]) -> Result<Option<VerifiedReceipt>, DeviceError> {
        let Some(log) = &self.chip.rom.log else { return Ok(None) };
        let record = self.record(published)?.to_bytes().map_err(|e| DeviceError::Damaged(e.to_string()))?;
        let proof = LogProof::from_bytes(proof)?.verify(&record, log)?;
        Ok(Some(VerifiedReceipt { proof, record_hash: sha256(&record) }))
    }

    /// The record of this device as it must be in the public database, put together from what the device holds.
    fn record(&self, published: u64) -> Result<DeviceRecord, DeviceError> {
        let stored = self.stored()?;
        let package = self.package()?;
        let is_cwt = package.certificate.is_cwt();
        let certificate =
            certificate::verify_certificate(&stored.certificate, is_cwt, &self.chip.rom.manufacturer, self.chip_id())?;
        Ok(DeviceRecord {
            chip: self.chip_id().clone(),
            identity: package.identity.clone(),
            profile: package.profile.clone(),
            certificate: stored.certificate,
            certificate_is_cwt: is_cwt,
            serial: certificate.serial().to_vec(),
            public_key: certificate.public_key().map(|key| key.spki_der().to_vec()),
            backup: stored.backup,
            master_key_version: package.master_key_version,
            session: package.session,
            published,
        })
    }

    /// Empties the flash. ROM and chip key stay.
    ///
    /// # Errors
    /// If the flash cannot be written.
    pub fn wipe(&mut self) -> Result<(), DeviceError> {
        self.flash.wipe()
    }

    /// Makes a wiped device whole again with its record from the public database, whoever brought it.
    ///
    /// # Errors
    /// If the record is not of this chip, or was altered. The flash is unchanged then.
    pub fn recover(&mut self, record: &PublicRecord<'_>) -> Result<Installed, DeviceError> {
        let bytes = self.chip.key.decrypt(record.backup, self.chip_id(), record.certificate)?;
        let package = DataPackage::decode(bytes.expose())?;
        let certificate = &package.certificate;
        if certificate.device_certificate() != record.certificate || certificate.is_cwt() != record.is_cwt {
            return Err(DeviceError::Certificate("the record's is not the one in the backup".into()));
        }
        let installed = self.check(&package)?;
        let stored = Stored { certificate: record.certificate.to_vec(), backup: record.backup.to_vec() };
        self.flash.write(&stored.to_bytes()?)?;
        Ok(installed)
    }

    /// What must be true of every package before it is stored, wherever it came from.
    fn check(&self, package: &DataPackage) -> Result<Installed, DeviceError> {
        expect("data package", "chip", &package.chip, self.chip_id())?;
        let bytes = package.certificate.device_certificate();
        let certificate = certificate::verify_certificate(
            bytes,
            package.certificate.is_cwt(),
            &self.chip.rom.manufacturer,
            self.chip_id(),
        )?;
        if !certificate.is_for(&package.identity) {
            let found = package.identity.value();
            expect("data package", "identity", &*found, certificate.identity_value())?;
            return Err(DeviceError::Certificate("it binds an identity of another kind".into()));
        }
        if let Some(certified) = certificate.public_key() {
            let (whose, held) = match &package.key_pair {
                Some(delivered) => ("data package", delivered.public().clone()),
                None => ("chip", self.own_key_pair()?.public().clone()),
            };
            if held != *certified {
                return Err(DeviceError::KeyMismatch(whose));
            }
        }
        Ok(Installed {
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

    /// Whether exactly this package is stored; a damaged flash holds nothing.
    fn holds(&self, bytes: &SecretBytes) -> bool {
        self.decrypted()
            .is_ok_and(|held| aws_lc_rs::constant_time::verify_slices_are_equal(held.expose(), bytes.expose()).is_ok())
    }

    fn decrypted(&self) -> Result<SecretBytes, DeviceError> {
        let stored = self.stored()?;
        self.chip.key.decrypt(&stored.backup, self.chip_id(), &stored.certificate)
    }

    fn stored(&self) -> Result<Stored, DeviceError> {
        let bytes = self.flash.read()?.ok_or(DeviceError::Empty)?;
        Stored::from_bytes(&bytes).map_err(|e| DeviceError::Damaged(e.to_string()))
    }
}

/// The content of the flash: `{1: certificate, 2: backup package}` in deterministic CBOR. Nothing in it is secret.
struct Stored {
    certificate: Vec<u8>,
    backup: Vec<u8>,
}

impl Stored {
    fn to_bytes(&self) -> Result<Vec<u8>, DeviceError> {
        let mut out = Writer::with_limit(flash::CAPACITY);
        out.map(2).int(1).bytes(&self.certificate).int(2).bytes(&self.backup);
        out.finish_public().ok_or_else(|| DeviceError::Damaged("the content would be too large".into()))
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, CborError> {
        let mut reader = Reader::new(bytes);
        let mut map = reader.map()?;
        let certificate = if map.key(1)? { map.reader.bytes()? } else { return Err(CborError::MissingKey(1)) };
        let backup = if map.key(2)? { map.reader.bytes()? } else { return Err(CborError::MissingKey(2)) };
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
