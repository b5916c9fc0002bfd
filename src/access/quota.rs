//! How many devices a station may begin.

use std::fmt;

use serde::{Deserialize, Serialize};

const MINUTE: u64 = 60;
/// Minutes of the hour that counts.
const WINDOW: u64 = 60;

/// How many devices a station may begin in any hour, and at all; without a number there is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Quota {
    /// In any 60 minutes.
    pub devices_per_hour: Option<u64>,
    /// Since the station is known.
    pub devices_total: Option<u64>,
}

impl Quota {
    /// Whether everything that it permits, the other one does, too.
    pub fn is_within(&self, other: &Self) -> bool {
        let within = |mine: Option<u64>, theirs: Option<u64>| match (mine, theirs) {
            (_, None) => true,
            (Some(mine), Some(theirs)) => mine <= theirs,
            (None, Some(_)) => false,
        };
        within(self.devices_per_hour, other.devices_per_hour) && within(self.devices_total, other.devices_total)
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |number: Option<u64>| number.map_or_else(|| "no limit".to_owned(), |n| n.to_string());
        write!(f, "devices: {} in any hour, {} in total", number(self.devices_per_hour), number(self.devices_total))
    }
}

/// The quota in force, beside the one that the configuration had when it was settled: an approved raise stands until the
/// configuration says something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettledQuota {
    /// What the configuration said.
    pub configured: Quota,
    /// What counts.
    pub in_force: Quota,
}

/// The configuration gives a station more than what is in force: that takes the approval of another officer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeedsApproval;

impl SettledQuota {
    /// What is in force with a configuration: the first one as it is, a lower one as it is, a higher one not at all.
    pub fn settle(known: Option<Self>, configured: Quota) -> Result<Self, NeedsApproval> {
        match known {
            None => Ok(Self { configured, in_force: configured }),
            Some(known) if known.configured == configured => Ok(known),
            Some(known) if configured.is_within(&known.in_force) => Ok(Self { configured, in_force: configured }),
            Some(_) => Err(NeedsApproval),
        }
    }
}

/// What a station has begun.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    total: u64,
    /// Devices by the minute in which they were begun, oldest first, of the last hour.
    minutes: Vec<(u64, u64)>,
}

/// Which limit is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exceeded {
    /// So many in an hour; some will be free after so many seconds.
    PerHour(u64, u64),
    /// So many at all.
    Total(u64),
}

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerHour(limit, after) => {
                write!(f, "has begun {limit} devices in an hour, which is its quota; in {after} s it may begin more")
            }
            Self::Total(limit) => {
                write!(
                    f,
                    "has begun {limit} devices, which is all it may; an officer raises its quota (sppctl approvals request quota)"
                )
            }
        }
    }
}

impl Usage {
    /// Whether the quota has room for one more at that moment.
    pub fn has_room(&self, quota: &Quota, now: u64) -> Result<(), Exceeded> {
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

    /// One more at that moment, if the quota has room.
    pub fn begin(&mut self, quota: &Quota, now: u64) -> Result<(), Exceeded> {
        self.has_room(quota, now)?;
        let minute = now / MINUTE;
        self.minutes.retain(|(of, _)| of + WINDOW > minute);
        // What was begun while the clock was ahead was begun by now.
        let ahead: u64 = self.minutes.iter().filter(|(of, _)| *of >= minute).map(|(_, count)| count).sum();
        self.minutes.retain(|(of, _)| *of < minute);
        self.minutes.push((minute, ahead + 1));
        self.total += 1;
        Ok(())
    }

    /// Begun in the hour before that moment.
    pub fn in_last_hour(&self, now: u64) -> u64 {
        let minute = now / MINUTE;
        self.minutes.iter().filter(|(of, _)| of + WINDOW > minute).map(|(_, count)| count).sum()
    }

    /// Begun at all.
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
    fn what_is_used_up_is_free_again_after_an_hour_or_never() {
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
    fn a_clock_that_was_ahead_holds_nobody_up_for_longer_than_an_hour() {
        let (mut usage, hourly, now) = (Usage::default(), quota(3, None), 1_000_000_000);
        usage.begin(&hourly, now + 86_400).unwrap();
        usage.begin(&hourly, now).unwrap();
        usage.begin(&hourly, now).unwrap();
        assert!(usage.begin(&hourly, now).is_err());
        assert_eq!(usage.begin(&hourly, now + 3600), Ok(()));
    }

    #[test]
    fn the_configuration_lowers_and_only_an_approval_raises() {
        let settle = SettledQuota::settle;
        let first = settle(None, quota(10, None)).unwrap();
        assert_eq!(first.in_force, quota(10, None));
        assert_eq!(settle(Some(first), quota(11, None)), Err(NeedsApproval));
        assert_eq!(settle(Some(first), quota(None, None)), Err(NeedsApproval));
        let lower = settle(Some(first), quota(5, 100)).unwrap();
        assert_eq!(lower.in_force, quota(5, 100));
        let raised = SettledQuota { in_force: quota(20, None), ..first };
        assert_eq!(settle(Some(raised), quota(10, None)), Ok(raised), "the file has not changed, the raise stands");
        assert_eq!(settle(Some(raised), quota(15, None)).unwrap().in_force, quota(15, None));
    }

    proptest! {
        #[test]
        fn no_hour_has_more_than_the_quota(steps in proptest::collection::vec(0_u64..900, 1..200), limit in 1_u64..20) {
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
