//! Why a command of the station did not begin or did not succeed.

use std::path::{Path, PathBuf};

use super::retry::CallFailure;
use crate::device::DeviceError;
use crate::names::ChipId;

/// What went wrong outside the way of a single device. The message says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// A file or directory cannot be used.
    #[error("{doing} {} failed: {source}", .path.display())]
    File {
        /// What was done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A file was read and is not what it should be.
    #[error("{}: {problem}", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },
    /// A list of orders has faults; all of them are told, with their lines.
    #[error("{} cannot be used, nothing was begun:\n{}", .path.display(), shown(.faults))]
    Orders {
        /// The list.
        path: PathBuf,
        /// Each with its line.
        faults: Vec<String>,
    },
    /// What was asked for does not go together.
    #[error("{0}")]
    Usage(String),
    /// The daemon cannot be reached, or it and the station do not trust each other.
    #[error("no connection to {server}: {cause}")]
    Connection {
        /// Where it should be.
        server: String,
        /// Why not, and what to do.
        cause: String,
    },
    /// A call was answered with an error.
    #[error(transparent)]
    Call(#[from] CallFailure),
    /// A mirror cannot be read.
    #[error("{0}; is it a mirror, made by sppctl registry export, and does it have this chip?")]
    Mirror(String),
    /// An answer of the daemon contradicts itself.
    #[error("the record of chip {chip} was not believed: {problem}")]
    Record {
        /// Whose record.
        chip: ChipId,
        /// What does not fit.
        problem: String,
    },
    /// The device refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl LineError {
    /// The exit code of the process: 1 if a device or the daemon refused, 2 if the usage or the set-up is wrong.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Call(_) | Self::Record { .. } | Self::Mirror(_) | Self::Device(_) => 1,
            _ => 2,
        }
    }

    pub(super) fn file(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { doing, path, source }
    }

    pub(super) fn content(path: &Path, problem: impl std::fmt::Display) -> Self {
        Self::Content { path: path.to_owned(), problem: problem.to_string() }
    }
}

/// As many faults as fit on a screen.
fn shown(faults: &[String]) -> String {
    const MOST: usize = 30;
    let mut lines: Vec<_> = faults.iter().take(MOST).map(|fault| format!("  {fault}")).collect();
    if faults.len() > MOST {
        lines.push(format!("  and {} more", faults.len() - MOST));
    }
    lines.join("\n")
}
