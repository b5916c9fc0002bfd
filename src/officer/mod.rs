//! Commands of `sppctl`: key ceremonies, enrolment, approvals, reports, and the clients of the daemon's officer services.

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

pub use approvals_cli::{ApprovalsCommand, RequestArgs, RequestCommand, revoke};
pub use audit_cli::{ExportFormat, ReadAuditCommand, VerifyAuditArgs, fetch_audit};
pub use callers_cli::{IdentitiesCommand, RenewArgs, enroll_via_daemon, list_callers, renew};
pub use ceremony::{CeremonyOutcome, CeremonyPlan, PlannedStep};
pub use ceremony_cli::CeremonyCommand;
pub use enroll::{Enrolment, enroll, record_offline, request};
pub use files::FileError;
pub use hsm_cli::HsmCommand;
pub use hsm_file::HsmFile;
pub use permit::Permit;
pub use pool_cli::{DaemonArgs, PoolCommand};
pub use registry_cli::RegistryCommand;
pub use reload::reload;
pub use reports_cli::{DeviceCommand, ReportCommand, SessionsCommand};
pub use status::{StatusError, describe_status, fetch_status, status_json};
pub use text::print_written;
pub use transcript::{Approval, KeyReport, OfficerStatement, Transcript, VerifiedTranscript, verify_transcript};

use spp_format::certificate::CertificateError;
use spp_format::file_format::Faults;
use spp_format::keys::KeyError;

use crate::hsm::HsmError;

/// Failure of a command that works on the token or on files.
#[derive(Debug, thiserror::Error)]
pub enum OfficerError {
    /// A file has one or more faults.
    #[error("{0}")]
    Faults(#[from] Faults),
    /// The HSM reported an error.
    #[error(transparent)]
    Hsm(#[from] HsmError),
    /// A certificate could not be created or parsed.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// A key could not be created.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A file could not be written or already exists.
    #[error(transparent)]
    File(#[from] FileError),
    /// The ceremony needs an approval.
    #[error(
        "this ceremony {actions} and needs the approval of a second officer: run sppctl approvals request ceremony {file} …"
    )]
    NeedsApproval {
        /// What the ceremony does to existing keys.
        actions: String,
        /// Ceremony file.
        file: String,
    },
    /// The approval is bound to another hash than that of the file.
    #[error("{file} was changed after its approval; request a new one: sppctl approvals request ceremony {file} …")]
    ApprovalMismatch {
        /// Ceremony file.
        file: String,
    },
    /// A step failed after others were completed.
    #[error("{cause}; completed before: {}", outcome.transcript.completed_steps())]
    Interrupted {
        /// Cause.
        cause: String,
        /// Completed steps.
        outcome: Box<CeremonyOutcome>,
    },
    /// Any other error.
    #[error("{0}")]
    Other(String),
}

/// Seconds since the Unix epoch.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
