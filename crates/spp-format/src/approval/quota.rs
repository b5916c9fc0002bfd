//! The quota of a station: the number of devices that it may begin.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Maximum number of devices that a station may begin, per hour and in total. `None` means no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Quota {
    /// Devices in any 60 minutes.
    pub devices_per_hour: Option<u64>,
    /// Devices since the station was first configured.
    pub devices_total: Option<u64>,
}

impl Quota {
    /// True if both limits are at most those of `other`.
    pub fn is_within(&self, other: &Self) -> bool {
        let within = |limit: Option<u64>, max: Option<u64>| match (limit, max) {
            (_, None) => true,
            (Some(limit), Some(max)) => limit <= max,
            (None, Some(_)) => false,
        };
        within(self.devices_per_hour, other.devices_per_hour) && within(self.devices_total, other.devices_total)
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limit = |limit: Option<u64>| limit.map_or_else(|| "no limit".to_owned(), |n| n.to_string());
        write!(f, "devices per hour: {}, devices in total: {}", limit(self.devices_per_hour), limit(self.devices_total))
    }
}
