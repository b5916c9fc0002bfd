//! Approval rules: the number of officers who must approve each kind of action.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::action_kind::ProtectedActionKind;

/// Maximum number of approvals that a rule may require.
const MAX_APPROVALS: u8 = 9;
/// Maximum lifetime of a request, in seconds. The minimum is one minute.
const MAX_VALIDITY: u64 = 30 * 24 * 60 * 60;

/// Number of approvals besides the requesting officer, for each kind of action, and the lifetime of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ApprovalRules {
    /// Revoking a caller.
    pub revoke: u8,
    /// Enrolling an officer or a revoked caller.
    pub enroll: u8,
    /// Raising a station's quota.
    pub raise_quota: u8,
    /// Changing these rules.
    pub change_rules: u8,
    /// Ceremonies that destroy keys.
    pub destroy: u8,
    /// Ceremonies that replace keys.
    pub rotate: u8,
    /// Lifetime of a request, in seconds.
    pub valid_for: u64,
}

impl Default for ApprovalRules {
    fn default() -> Self {
        Self { revoke: 1, enroll: 1, raise_quota: 1, change_rules: 1, destroy: 1, rotate: 1, valid_for: 24 * 60 * 60 }
    }
}

impl ApprovalRules {
    /// Number of approvals that an action of this kind needs.
    pub const fn needed(&self, kind: ProtectedActionKind) -> u8 {
        match kind {
            ProtectedActionKind::Revoke => self.revoke,
            ProtectedActionKind::Enroll => self.enroll,
            ProtectedActionKind::RaiseQuota => self.raise_quota,
            ProtectedActionKind::ChangeRules => self.change_rules,
            ProtectedActionKind::Destroy => self.destroy,
            ProtectedActionKind::Rotate => self.rotate,
        }
    }

    /// Checks that no action is possible with one officer, and that requests expire.
    pub fn check(&self) -> Result<(), String> {
        let counts = [self.revoke, self.enroll, self.raise_quota, self.change_rules, self.destroy, self.rotate];
        if counts.iter().any(|count| !(1..=MAX_APPROVALS).contains(count)) {
            return Err(format!("each action must need 1 to {MAX_APPROVALS} approvals besides the request"));
        }
        if (60..=MAX_VALIDITY).contains(&self.valid_for) {
            Ok(())
        } else {
            Err("valid-for must be from 1 minute to 30 days".to_owned())
        }
    }
}

impl fmt::Display for ApprovalRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { revoke, enroll, raise_quota, change_rules, destroy, rotate, valid_for } = self;
        let valid = humantime::format_duration(std::time::Duration::from_secs(*valid_for));
        write!(
            f,
            "approvals needed besides the requester: revoke {revoke}, enroll {enroll}, raise-quota {raise_quota}, \
             change-rules {change_rules}, destroy {destroy}, rotate {rotate}; requests are valid for {valid}"
        )
    }
}
