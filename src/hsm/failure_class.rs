//! Failure classes, one per recovery action.

use serde::{Deserialize, Serialize};

/// The recovery action for a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureClass {
    /// Retry the call.
    Transient,
    /// Open a new session, log in and look up the handles again.
    SessionLost,
    /// Start a new worker process.
    ModuleLost,
    /// An officer must act. A retry could lock the token.
    Permanent,
    /// None: the module does not accept the request.
    Rejected,
    /// None: a key that the daemon generated on the token no longer exists.
    Absent,
}
