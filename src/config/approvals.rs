//! `[approvals]` of `sppd.toml`: the number of officers who must approve each kind of action, besides the requester.

use std::time::Duration;

use serde::Deserialize;
use spp_format::approval::ApprovalRules;
use spp_format::file_format::Faults;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct ApprovalsShape {
    revoke: u8,
    enroll: u8,
    raise_quota: u8,
    change_rules: u8,
    destroy: u8,
    rotate: u8,
    #[serde(with = "humantime_serde")]
    valid_for: Duration,
}

impl Default for ApprovalsShape {
    fn default() -> Self {
        let ApprovalRules { revoke, enroll, raise_quota, change_rules, destroy, rotate, valid_for } =
            ApprovalRules::default();
        Self { revoke, enroll, raise_quota, change_rules, destroy, rotate, valid_for: Duration::from_secs(valid_for) }
    }
}

impl ApprovalsShape {
    pub(super) fn check(self, place: &str, faults: &mut Faults) -> ApprovalRules {
        let Self { revoke, enroll, raise_quota, change_rules, destroy, rotate, valid_for } = self;
        let rules = ApprovalRules {
            revoke,
            enroll,
            raise_quota,
            change_rules,
            destroy,
            rotate,
            valid_for: valid_for.as_secs(),
        };
        faults.note(format!("{place}: approvals"), rules.check());
        rules
    }
}
