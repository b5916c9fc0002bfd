//! Station quotas: limits on the number of devices that a station may begin.

use std::fmt;

use serde::{Deserialize, Serialize};
use spp_format::approval::Quota;

const MINUTE: u64 = 60;
/// Length of the sliding window, in minutes.
const WINDOW: u64 = 60;

/// The quota in force, and the configured quota that it was derived from. An approved raise stays in force until the
/// configured quota changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedQuota {
    /// The quota of the configuration then.
    pub configured: Quota,
    /// The quota in force.
    pub in_force: Quota,
}

/// The configured quota is higher than the one in force, which needs an officer's approval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeedsApproval;

impl AppliedQuota {
    /// Applies a configured quota. The first one and lower ones take effect as they are; a higher one does not take effect.
    pub fn apply(known: Option<Self>, configured: Quota) -> Result<Self, NeedsApproval> {
        match known {
            None => Ok(Self { configured, in_force: configured }),
            Some(known) if known.configured == configured => Ok(known),
            Some(known) if configured.is_within(&known.in_force) => Ok(Self { configured, in_force: configured }),
            Some(_) => Err(NeedsApproval),
        }
    }
}

/// The devices that a station has begun.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    total: u64,
    /// Number of devices begun per minute, within the last hour, oldest first.
    minutes: Vec<(u64, u64)>,
}

/// The limit that is exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exceeded {
    /// The limit per hour, and the seconds until the station may begin another device.
    PerHour(u64, u64),
    /// The limit in total.
    Total(u64),
}

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerHour(limit, seconds) => {
                write!(f, "has begun {limit} devices in the last hour, its quota; retry in {seconds} s")
            }
            Self::Total(limit) => {
                write!(
                    f,
                    "has begun {limit} devices, its quota; ask an officer to raise it (sppctl approvals request quota)"
                )
            }
        }
    }
}

impl Usage {
    /// Checks that the quota permits one more device at `now`.
    pub fn check_quota(&self, quota: &Quota, now: u64) -> Result<(), Exceeded> {
        if let Some(limit) = quota.devices_total.filter(|limit| self.total >= *limit) {
            return Err(Exceeded::Total(limit));
        }
        if let Some(limit) = quota.devices_per_hour.filter(|limit| self.in_last_hour(now) >= *limit) {
            let oldest = self.minutes.iter().find(|(of, _)| of + WINDOW > now / MINUTE);
            let free = oldest.map_or(0, |(of, _)| (of + WINDOW) * MINUTE);
            return Err(Exceeded::PerHour(limit, free.saturating_sub(now).max(1)));
        }
        Ok(())
    }

    /// Counts one more device at `now`, if the quota permits it.
    pub fn begin(&mut self, quota: &Quota, now: u64) -> Result<(), Exceeded> {
        self.check_quota(quota, now)?;
        let minute = now / MINUTE;
        self.minutes.retain(|(of, _)| of + WINDOW > minute);
        // Devices counted while the clock was ahead count as begun now.
        let ahead: u64 = self.minutes.iter().filter(|(of, _)| *of >= minute).map(|(_, count)| count).sum();
        self.minutes.retain(|(of, _)| *of < minute);
        self.minutes.push((minute, ahead + 1));
        self.total += 1;
        Ok(())
    }

    /// Number of devices begun in the hour before `now`.
    pub fn in_last_hour(&self, now: u64) -> u64 {
        let minute = now / MINUTE;
        self.minutes.iter().filter(|(of, _)| of + WINDOW > minute).map(|(_, count)| count).sum()
    }

    /// Number of devices begun in total.
    pub const fn total(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn quota(per_hour: impl Into<Option<u64>>, total: impl Into<Option<u64>>) -> Quota {
        Quota { devices_per_hour: per_hour.into(), devices_total: total.into() }
    }

    #[test]
    fn hourly_quota_recovers_and_total_quota_does_not() {
        let mut usage = Usage::default();
        let (hourly, now) = (quota(2, 3), 1_000_000_020);
        assert_eq!(usage.begin(&hourly, now), Ok(()));
        assert_eq!(usage.begin(&hourly, now + 120), Ok(()));
        assert_eq!(usage.begin(&hourly, now + 180), Err(Exceeded::PerHour(2, 3600 - 180 - now % 60)));
        assert_eq!(usage.begin(&hourly, now + 3600), Ok(()), "the first is an hour ago");
        assert_eq!((usage.total(), usage.in_last_hour(now + 3600)), (3, 2));
        assert_eq!(usage.begin(&hourly, now + 10 * 3600), Err(Exceeded::Total(3)));
    }

    #[test]
    fn clock_set_back_blocks_station_for_at_most_an_hour() {
        let (mut usage, hourly, now) = (Usage::default(), quota(3, None), 1_000_000_000);
        usage.begin(&hourly, now + 86_400).unwrap();
        usage.begin(&hourly, now).unwrap();
        usage.begin(&hourly, now).unwrap();
        assert!(usage.begin(&hourly, now).is_err());
        assert_eq!(usage.begin(&hourly, now + 3600), Ok(()));
    }

    #[test]
    fn configuration_lowers_quota_and_only_approval_raises_it() {
        let apply = AppliedQuota::apply;
        let first = apply(None, quota(10, None)).unwrap();
        assert_eq!(first.in_force, quota(10, None));
        assert_eq!(apply(Some(first), quota(11, None)), Err(NeedsApproval));
        assert_eq!(apply(Some(first), quota(None, None)), Err(NeedsApproval));
        let lower = apply(Some(first), quota(5, 100)).unwrap();
        assert_eq!(lower.in_force, quota(5, 100));
        let raised = AppliedQuota { in_force: quota(20, None), ..first };
        assert_eq!(apply(Some(raised), quota(10, None)), Ok(raised), "the file has not changed, the raise stands");
        assert_eq!(apply(Some(raised), quota(15, None)).unwrap().in_force, quota(15, None));
    }

    proptest! {
        #[test]
        fn devices_in_any_hour_stay_within_quota(steps in proptest::collection::vec(0_u64..900, 1..200), limit in 1_u64..20) {
            let (mut usage, mut now, mut begun) = (Usage::default(), 1_000_000_000, Vec::new());
            for step in steps {
                now += step;
                if usage.begin(&quota(limit, None), now).is_ok() {
                    begun.push(now);
                }
            }
            for at in &begun {
                let in_hour = begun.iter().filter(|other| **other <= *at && **other + 59 * 60 > *at).count();
                prop_assert!(in_hour as u64 <= limit, "{in_hour} until {at}");
            }
        }
    }
}
