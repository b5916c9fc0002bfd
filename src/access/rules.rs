//! How many officers must approve what.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::action::ProtectedActionKind;

/// Most approvals that can be asked for.
const MOST: u8 = 9;
/// A request stands for at least a minute and at most so long.
const LONGEST: u64 = 30 * 24 * 60 * 60;

/// Officers besides the one who requests, for each kind of act, and how long a request stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ApprovalRules {
    /// Revoking a caller.
    pub revoke: u8,
    /// Letting in an officer, or somebody who was revoked.
    pub enroll: u8,
    /// Raising a station's quota.
    pub raise_quota: u8,
    /// Changing these rules.
    pub change_rules: u8,
    /// Ceremonies that destroy keys.
    pub destroy: u8,
    /// Ceremonies that replace keys.
    pub rotate: u8,
    /// Seconds for which a request stands.
    pub valid_for: u64,
}

impl Default for ApprovalRules {
    fn default() -> Self {
        Self { revoke: 1, enroll: 1, raise_quota: 1, change_rules: 1, destroy: 1, rotate: 1, valid_for: 24 * 60 * 60 }
    }
}

impl ApprovalRules {
    /// How many must approve such an act.
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

    /// Nobody does any of it alone, and no request stands for ever.
    pub fn check(&self) -> Result<(), String> {
        let counts = [self.revoke, self.enroll, self.raise_quota, self.change_rules, self.destroy, self.rotate];
        if counts.iter().any(|count| !(1..=MOST).contains(count)) {
            return Err(format!("each act needs 1 to {MOST} approvals besides the request"));
        }
        if (60..=LONGEST).contains(&self.valid_for) {
            Ok(())
        } else {
            Err("a request stands for 1 minute to 30 days".to_owned())
        }
    }
}

impl fmt::Display for ApprovalRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { revoke, enroll, raise_quota, change_rules, destroy, rotate, valid_for } = self;
        let valid = humantime::format_duration(std::time::Duration::from_secs(*valid_for));
        write!(
            f,
            "approvals besides the request: revoke {revoke}, enroll {enroll}, raise-quota {raise_quota}, change-rules {change_rules}, \
             destroy {destroy}, rotate {rotate}; a request stands for {valid}"
        )
    }
}
