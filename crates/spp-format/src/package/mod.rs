//! Data package, sealed delivery, backup package and key confirmation in CBOR and COSE. Pure: no I/O, no clock, no HSM.
//!
//! Data flow, as specified in `proto/data-package.cddl`:
//! 1. The SPP [encodes](DataPackage::encode) the data package and may [`seal`] it to the chip.
//! 2. The device [`open`]s and [decodes](DataPackage::decode) it, encrypts it under its chip key ([`make_backup`]) and
//!    proves possession of the key ([`confirm`]).
//! 3. The SPP accepts the backup ([`BackupPackage::accept`]) and verifies the proof ([`verify_confirmation`]).
//!
//! Trust: all decoded bytes may come from an attacker. Sizes are checked before parsing.

mod backup;
mod clear;
mod confirmation;
mod cose_key;
mod data;
mod gcm;
#[cfg(any(test, feature = "testing"))]
pub mod samples;
mod seal;
mod symmetric_key;
mod transport;

pub use backup::{BackupError, BackupFormat, BackupIv, BackupPackage, BackupRules, make_backup, open_backup};
pub use confirmation::{
    ConfirmationClaims, ConfirmationError, ConfirmationKey, ConfirmationSigner, KeyConfirmation, confirm,
    verify_confirmation,
};
pub use data::{CertificateChain, DataPackage};
pub use seal::{open, seal};
pub use symmetric_key::SymmetricKey;
pub use transport::{TransportCurve, TransportPrivateKey, TransportPublicKey};

use crate::keys::KeyError;

/// Maximum size of a data package in bytes.
pub const MAX_PACKAGE_LEN: usize = 16 * 1024;
/// Maximum size of a sealed package in bytes: the package and its envelope.
pub const MAX_SEALED_LEN: usize = MAX_PACKAGE_LEN + 512;
/// Maximum size of a backup package in bytes; a profile may set a lower limit.
pub const MAX_BACKUP_LEN: usize = 32 * 1024;
/// Maximum size of a key confirmation in bytes.
pub const MAX_CONFIRMATION_LEN: usize = 4096;

/// Why a data package could not be encoded, decoded, sealed or opened. Names fields and never contains key material.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackageError {
    /// Exceeds the maximum size that a device must support.
    #[error("{what} too large: more than {max} bytes; use fewer issuers or shorter keys")]
    TooLarge {
        /// The structure.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// A field is missing, malformed or inconsistent with other fields.
    #[error("{what}, {field}: {problem}")]
    Field {
        /// The structure.
        what: &'static str,
        /// The field as named in `proto/data-package.cddl`.
        field: &'static str,
        /// Description of the problem.
        problem: String,
    },
    /// The values of a key are invalid.
    #[error("data package, {field}: {source}")]
    Key {
        /// The key.
        field: &'static str,
        /// The error of the key module.
        source: KeyError,
    },
    /// The chip's transport public key is unusable.
    #[error("transport key: {0}; read it from the chip again")]
    TransportKey(&'static str),
    /// Sealed for another chip or session, or modified.
    #[error("sealed package does not decrypt with this chip's transport key for this session; request it again")]
    DoesNotOpen,
    /// The cryptographic provider failed unexpectedly.
    #[error("the cryptographic provider failed: {0}; retry, and replace the machine if it fails again")]
    Provider(&'static str),
}

/// Creates an error constructor for one field of one structure.
fn field_error<E: std::fmt::Display>(what: &'static str, field: &'static str) -> impl FnOnce(E) -> PackageError {
    move |problem| PackageError::Field { what, field, problem: problem.to_string() }
}

/// Creates an error constructor for a field of the data package.
fn package_error<E: std::fmt::Display>(field: &'static str) -> impl FnOnce(E) -> PackageError {
    field_error("data package", field)
}
