//! What security officers do: key ceremonies on the token, enrolment of callers, the stores' creation, a look at the daemon, reports.

mod access_client;
mod approvals_cli;
mod audit_cli;
mod callers_cli;
mod ceremony;
mod ceremony_cli;
mod device;
mod enroll;
mod files;
mod hsm_cli;
mod hsm_file;
mod permit;
mod pool;
mod pool_cli;
mod production;
mod registry_cli;
mod reload;
mod reports_cli;
mod sessions;
mod status;
mod text;
mod transcript;

pub use approvals_cli::{ApprovalsCommand, AskArgs, RequestCommand, revoke};
pub use audit_cli::{Form, ReadAuditCommand, VerifyAuditArgs, fetch_audit};
pub use callers_cli::{IdentitiesCommand, RenewArgs, enroll_at_desk, list_callers, renew};
pub use ceremony::{CeremonyPlan, Held, PlannedAct};
pub use ceremony_cli::CeremonyCommand;
pub use enroll::{Enrolment, enroll, on_record, request};
pub use files::FileError;
pub use hsm_cli::HsmCommand;
pub use hsm_file::HsmFile;
pub use permit::Permit;
pub use pool_cli::{DaemonArgs, PoolCommand};
pub use registry_cli::RegistryCommand;
pub use reload::reload;
pub use reports_cli::{DeviceCommand, ReportCommand, SessionsCommand};
pub use status::{StatusError, connect_and_ask, describe_status, status_json};
pub use text::tell_written;
pub use transcript::{Approval, KeyReport, OfficerStatement, Transcript, VerifiedTranscript, verify_transcript};

use crate::certificate::CertificateError;
use crate::config::Faults;
use crate::hsm::HsmError;
use crate::keys::KeyError;

/// Why an officer's act stopped. What was done before it is said by the act itself.
#[derive(Debug, thiserror::Error)]
pub enum OfficerError {
    /// A file is wrong.
    #[error("{0}")]
    Faults(#[from] Faults),
    /// The token.
    #[error(transparent)]
    Hsm(#[from] HsmError),
    /// A certificate could not be made.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// A key could not be made.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A file could not be written, or is there already.
    #[error(transparent)]
    File(#[from] FileError),
    /// One officer alone may not hold it.
    #[error(
        "this ceremony {acts}: it needs the approval of a second officer; sppctl approvals request ceremony {file} …"
    )]
    NeedsApproval {
        /// What it does to keys that are there.
        acts: String,
        /// The ceremony file.
        file: String,
    },
    /// The approval was given for other bytes than the file has.
    #[error(
        "the approval is not of {file} as it is now: it was changed since; sppctl approvals request ceremony {file} …"
    )]
    ApprovalOfAnother {
        /// The ceremony file.
        file: String,
    },
    /// It failed when some of it was done already.
    #[error("{why}; done before that: {}", held.transcript.done())]
    CutShort {
        /// What has failed.
        why: String,
        /// What was done before.
        held: Box<Held>,
    },
    /// Anything else, in words.
    #[error("{0}")]
    Other(String),
}

/// Seconds since the Unix epoch.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
