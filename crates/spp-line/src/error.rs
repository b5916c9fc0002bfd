//! Errors of the spp-line commands.

use std::path::{Path, PathBuf};

use spp_device::DeviceError;
use spp_format::names::ChipId;

use super::retry::CallFailure;

/// An error outside the provisioning of a single device. The message includes the next step.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// A file or directory is not accessible.
    #[error("{operation} {} failed: {source}", .path.display())]
    File {
        /// The operation.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The I/O error.
        #[source]
        source: std::io::Error,
    },
    /// A file has invalid content.
    #[error("{}: {problem}", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Description of the problem and its remedy.
        problem: String,
    },
    /// Faults in a list of orders. All are reported with their lines.
    #[error("{} is invalid, nothing was started:\n{}", .path.display(), format_faults(.faults))]
    Orders {
        /// The list.
        path: PathBuf,
        /// Each fault with its line.
        faults: Vec<String>,
    },
    /// Conflicting options.
    #[error("{0}")]
    Usage(String),
    /// The daemon is unreachable, or TLS authentication failed.
    #[error("cannot connect to {server}: {cause}")]
    Connection {
        /// The server's address.
        server: String,
        /// The cause and its remedy.
        cause: String,
    },
    /// A call failed.
    #[error(transparent)]
    Call(#[from] CallFailure),
    /// A mirror cannot be read.
    #[error("{0}; check that it is a mirror created by sppctl registry export and that it contains this chip")]
    Mirror(String),
    /// The daemon or mirror returned an inconsistent record.
    #[error("record of chip {chip} rejected: {problem}")]
    Record {
        /// The requested chip.
        chip: ChipId,
        /// The inconsistency.
        problem: String,
    },
    /// The device rejected an operation.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl LineError {
    /// The process exit code: 1 if a device or the daemon rejected an operation, 2 for invalid usage or setup.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Call(_) | Self::Record { .. } | Self::Mirror(_) | Self::Device(_) => 1,
            _ => 2,
        }
    }

    pub(super) fn file(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { operation, path, source }
    }

    pub(super) fn content(path: &Path, problem: impl std::fmt::Display) -> Self {
        Self::Content { path: path.to_owned(), problem: problem.to_string() }
    }
}

/// Formats as many faults as fit on a screen.
fn format_faults(faults: &[String]) -> String {
    const MAX_FAULTS: usize = 30;
    let mut lines: Vec<_> = faults.iter().take(MAX_FAULTS).map(|fault| format!("  {fault}")).collect();
    if faults.len() > MAX_FAULTS {
        lines.push(format!("  and {} more", faults.len() - MAX_FAULTS));
    }
    lines.join("\n")
}
