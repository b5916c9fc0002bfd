//! Errors of the reference device.

use std::path::PathBuf;

use spp_format::package::{BackupError, ConfirmationError, PackageError};
use spp_format::tlog::TlogError;

/// Why a device operation failed. The flash is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A package, certificate or record for another device, session or identity.
    #[error("{what} for {field} {found}, expected {expected}; nothing stored")]
    NotForThisDevice {
        /// The rejected object.
        what: &'static str,
        /// The field that differs.
        field: &'static str,
        /// The field's value.
        found: String,
        /// The expected value.
        expected: String,
    },
    /// The manufacturer did not issue the certificate for this chip.
    #[error("certificate rejected: {0}; nothing stored")]
    Certificate(String),
    /// The package cannot be decrypted or decoded.
    #[error("data package rejected: {0}")]
    Package(#[from] PackageError),
    /// The backup cannot be encrypted or decrypted.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// The certificate's public key does not match the device's private key.
    #[error("the private key of the {0} does not match the certificate; nothing stored")]
    KeyMismatch(&'static str),
    /// The chip has no transport key, so it cannot open a sealed package.
    #[error("this chip has no transport key; request an unsealed delivery")]
    NoTransportKey,
    /// The receipt does not prove that this device's record is in the log.
    #[error("receipt rejected: {0}; request it again; if it is rejected again, the log is inconsistent")]
    Receipt(#[from] TlogError),
    /// The confirmation cannot be created.
    #[error(transparent)]
    Confirmation(#[from] ConfirmationError),
    /// Erased, or never personalized.
    #[error("flash empty; install a package or recover the device")]
    Empty,
    /// The flash content is invalid.
    #[error("flash damaged ({0}); wipe and recover the device")]
    Damaged(String),
    /// The file that simulates flash or silicon is not accessible.
    #[error("{operation} {path} failed: {source}")]
    File {
        /// The operation.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The I/O error.
        #[source]
        source: std::io::Error,
    },
    /// The simulated fab cannot be created or opened.
    #[error("simulated fab {path}: {problem}")]
    SimulatedFab {
        /// The fab's file.
        path: PathBuf,
        /// Description of the problem and its remedy.
        problem: String,
    },
    /// The provider failed to derive a key.
    #[error("cannot derive a chip key: {0}")]
    Derivation(String),
}
