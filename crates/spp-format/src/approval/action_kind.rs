//! The kinds of protected actions, one for each approval rule.

use std::fmt;

/// The kind of an action; each kind has its own rule in [`ApprovalRules`](super::ApprovalRules).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProtectedActionKind {
    /// [`ProtectedAction::Revoke`](super::ProtectedAction::Revoke).
    Revoke,
    /// [`ProtectedAction::Enroll`](super::ProtectedAction::Enroll).
    Enroll,
    /// [`ProtectedAction::RaiseQuota`](super::ProtectedAction::RaiseQuota).
    RaiseQuota,
    /// [`ProtectedAction::ChangeRules`](super::ProtectedAction::ChangeRules).
    ChangeRules,
    /// [`ProtectedAction::Ceremony`](super::ProtectedAction::Ceremony) that destroys.
    Destroy,
    /// [`ProtectedAction::Ceremony`](super::ProtectedAction::Ceremony) that replaces.
    Rotate,
}

impl fmt::Display for ProtectedActionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Revoke => "revoke",
            Self::Enroll => "enroll",
            Self::RaiseQuota => "raise-quota",
            Self::ChangeRules => "change-rules",
            Self::Destroy => "destroy",
            Self::Rotate => "rotate",
        })
    }
}
