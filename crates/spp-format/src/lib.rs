//! The formats of the secure processing point, for the daemon, its clients and firmware authors.
//!
//! Pure: no clock, no network, no HSM, no storage. [`file_format`] opens a file of secrets to check its mode; nothing else
//! does I/O.
//!
//! | module | content |
//! |---|---|
//! | [`names`], [`secret`] | identifiers, and values that are wiped |
//! | [`keys`] | key types, algorithms, public and private keys |
//! | [`tlog`] | a transparency log: notes, checkpoints, tiles, proofs |
//! | [`cbor`], [`package`] | deterministic CBOR; data package, sealing, backup, key confirmation |
//! | [`file_format`] | files that people write: all faults of a file at once, with their places |
//! | [`certificate`] | profile, certificate, CWT, linting, access certificates |
//! | [`record`] | entries of the public database |
//! | [`approval`], [`audit`] | statements that officers sign; checkpoints of the audit log |
//!
//! # A device's data package
//!
//! Firmware parses the package, encrypts it with the chip's key, and proves that it has its keys. The package, the backup and the
//! confirmation of this example are the test vector `tests/vectors/symmetric.json`; `proto/data-package.cddl` specifies them.
//! [`spp_device`](../spp_device/index.html) is a complete reference device.
//!
//! ```
//! use spp_format::names::ChipId;
//! use spp_format::package::{BackupIv, ConfirmationClaims, ConfirmationSigner, DataPackage, confirm, make_backup};
//! use spp_format::secret::{Secret, SecretBytes};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let vector: serde_json::Value = serde_json::from_str(include_str!("../../../tests/vectors/symmetric.json"))?;
//! let bytes = |field: &str| hex::decode(vector.pointer(field).and_then(|value| value.as_str()).unwrap_or_default());
//!
//! // 1. Parse what the station forwarded. The device is this chip, or it refuses the package.
//! let received = SecretBytes::new(bytes("/outputs/package")?);
//! let package = DataPackage::decode(received.expose())?;
//! assert_eq!(package.chip, ChipId::from_bytes(&bytes("/inputs/chip")?)?);
//! assert_eq!(package.identity.to_string(), "imei:490154203237518");
//! assert_eq!(package.symmetric_keys[0].purpose(), "channel");
//!
//! // 2. Encrypt the package with the chip's secret key: this is the backup that the public database keeps.
//! let chip_key = Secret::new(<[u8; 32]>::try_from(bytes("/inputs/chip_key")?.as_slice())?);
//! let certificate = package.certificate.device_certificate();
//! let backup = make_backup(&received, &chip_key, &package.chip, certificate, BackupIv::random()?)?;
//!
//! // 3. Prove possession of the keys for exactly this package and this backup.
//! let claims = ConfirmationClaims::new(package.session, package.chip.clone(), &received, &backup);
//! let confirmation = confirm(&claims, &ConfirmationSigner::Symmetric(package.symmetric_keys[0].key()))?;
//! assert_eq!(confirmation.len(), bytes("/outputs/confirmation")?.len());
//! # Ok(())
//! # }
//! ```

pub mod approval;
pub mod audit;
pub mod cbor;
pub mod certificate;
pub mod file_format;
pub mod keys;
pub mod names;
pub mod package;
pub mod record;
pub mod secret;
pub mod tlog;
