//! Data package, sealed delivery, backup package, key confirmation: CBOR and COSE. Pure: no I/O, no clock, no HSM.
//!
//! The way of the bytes, as `proto/data-package.cddl` draws it:
//! 1. the processing point [encodes](DataPackage::encode) what the device gets, and may [`seal`] it to the chip;
//! 2. the device [`open`]s and [decodes](DataPackage::decode) it, encrypts it under its chip key ([`make_backup`]) and
//!    proves that it holds the key ([`confirm`]);
//! 3. the processing point takes the backup in ([`BackupPackage::accept`]) and checks the proof
//!    ([`verify_confirmation`]).
//!
//! Trust: everything that is read here may come from an attacker. Sizes are checked before anything is parsed.

mod backup;
pub(crate) mod cbor;
mod clear;
mod confirmation;
mod cose_key;
mod data;
mod gcm;
#[cfg(test)]
pub(crate) mod samples;
mod seal;
mod transport;

pub use backup::{BackupFormat, BackupIv, BackupPackage, BackupRefused, BackupRules, make_backup, open_backup};
pub use confirmation::{
    ConfirmationClaims, ConfirmationKey, ConfirmationRefused, ConfirmationSigner, KeyConfirmation, confirm,
    verify_confirmation,
};
pub use data::{CertificateChain, DataPackage, SymmetricKey};
pub use seal::{open, seal};
pub use transport::{TransportCurve, TransportPrivateKey, TransportPublicKey};

use crate::keys::KeyError;

/// Most bytes of a data package.
pub const MAX_PACKAGE_LEN: usize = 16 * 1024;
/// Most bytes of a sealed package: the package and its envelope.
pub const MAX_SEALED_LEN: usize = MAX_PACKAGE_LEN + 512;
/// Most bytes of a backup package; a profile may allow fewer.
pub const MAX_BACKUP_LEN: usize = 32 * 1024;
/// Most bytes of a key confirmation.
pub const MAX_CONFIRMATION_LEN: usize = 4096;

/// Why bytes are no data package, values cannot become one, or a package cannot be sealed or opened.
/// Names fields and never says what a key is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackageError {
    /// Larger than a device must be able to hold.
    #[error("the {what} has more than {max} bytes; use fewer issuers or shorter keys")]
    TooLarge {
        /// Which bytes.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// A field is missing, malformed or does not fit the others.
    #[error("{what}, {field}: {problem}")]
    Field {
        /// Which bytes.
        what: &'static str,
        /// The field, in the words of `proto/data-package.cddl`.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The numbers of a key do not make one.
    #[error("data package, {field}: {source}")]
    Key {
        /// Which key.
        field: &'static str,
        /// Why not.
        source: KeyError,
    },
    /// The chip's transport public key cannot be used.
    #[error("transport key: {0}; read it from the chip again")]
    TransportKey(&'static str),
    /// The sealed package is for another chip or session, or it was altered.
    #[error("the sealed package does not open with this chip's transport key for this session; ask for it again")]
    DoesNotOpen,
    /// The cryptographic provider failed where it never should.
    #[error("{0} failed in the cryptographic provider; try again, and replace the machine if it happens again")]
    Provider(&'static str),
}

/// An error constructor for one field of one kind of bytes.
fn field_error<E: std::fmt::Display>(what: &'static str, field: &'static str) -> impl FnOnce(E) -> PackageError {
    move |problem| PackageError::Field { what, field, problem: problem.to_string() }
}
