//! Ranges of device identities from which the daemon assigns each identity once.

use serde::{Deserialize, Serialize};
use spp_format::names::{DeviceIdentity, Imei, NameError};

/// Maximum number of identities in a range.
const MAX_COUNT: u64 = 1_000_000_000;

/// `count` consecutive identities from the first on. An IMEI is counted without its check digit. A serial number is counted
/// by its trailing digits; their number stays the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityRange {
    first: DeviceIdentity,
    count: u64,
}

/// An identity as a number within its series. The identities of one series differ only in this number.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SeriesPosition {
    series: String,
    number: u64,
    /// The highest number of the series.
    last: u64,
}

impl IdentityRange {
    /// Creates a range. Fails if it is empty, too long, or extends beyond the end of its series.
    pub fn new(first: DeviceIdentity, count: u64) -> Result<Self, NameError> {
        if !(1..=MAX_COUNT).contains(&count) {
            return Err(NameError::new(format!("range has {count} identities; the limits are 1 and {MAX_COUNT}")));
        }
        let position = position_of(&first)?;
        match position.number.checked_add(count - 1) {
            Some(last) if last <= position.last => Ok(Self { first, count }),
            _ => Err(NameError::new(format!("{count} identities from {first} extend beyond the end of the series"))),
        }
    }

    /// The range between two identities of one series, inclusive.
    pub fn between(first: DeviceIdentity, last: &DeviceIdentity) -> Result<Self, NameError> {
        let (from, to) = (position_of(&first)?, position_of(last)?);
        if from.series != to.series || to.number < from.number {
            return Err(NameError::new(format!("{last} does not follow {first} in the same series")));
        }
        Self::new(first, (to.number - from.number).saturating_add(1))
    }

    /// The first identity.
    pub const fn first(&self) -> &DeviceIdentity {
        &self.first
    }

    /// The number of identities.
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// The identity at index `n`, from 0; `None` beyond the end.
    pub fn nth(&self, n: u64) -> Option<DeviceIdentity> {
        if n >= self.count {
            return None;
        }
        let number = position_of(&self.first).ok()?.number.checked_add(n)?;
        identity_at(&self.first, number)
    }

    /// The last identity.
    pub fn last(&self) -> DeviceIdentity {
        // A range has at least one identity, the first.
        self.nth(self.count - 1).unwrap_or_else(|| self.first.clone())
    }

    /// True if the ranges share an identity.
    pub fn overlaps(&self, other: &Self) -> bool {
        let (Ok(one), Ok(two)) = (position_of(&self.first), position_of(&other.first)) else { return false };
        one.series == two.series
            && one.number < two.number.saturating_add(other.count)
            && two.number < one.number.saturating_add(self.count)
    }
}

fn position_of(identity: &DeviceIdentity) -> Result<SeriesPosition, NameError> {
    let text = identity.to_string();
    let value = text.split_once(':').map_or("", |(_, value)| value);
    let hex = |digits: &str| u64::from_str_radix(digits, 16).map_err(|e| NameError::new(e.to_string()));
    let series = identity.kind().to_owned();
    let position = match identity {
        DeviceIdentity::Imei(imei) => {
            // The TAC is allocated to one device type, so a range must not cross into the next TAC.
            let snr =
                imei.snr().parse().map_err(|_| NameError::new(format!("{identity}: an IMEI must have digits only")))?;
            SeriesPosition { series: format!("{series}:{}", imei.tac()), number: snr, last: 999_999 }
        }
        DeviceIdentity::Meid(_) => SeriesPosition { series, number: hex(value)?, last: 0xff_ffff_ffff_ffff },
        DeviceIdentity::Eui48(_) => SeriesPosition { series, number: hex(value)?, last: 0xffff_ffff_ffff },
        DeviceIdentity::Eui64(_) => SeriesPosition { series, number: hex(value)?, last: u64::MAX },
        DeviceIdentity::Serial(_) => {
            let (stem, digits) = serial_parts(value);
            let number = digits.parse().map_err(|_| {
                NameError::new(format!("{identity} cannot start a range: the serial number must end in 1 to 18 digits"))
            })?;
            // At most 18 digits, so the value fits into 64 bits.
            let last = 10_u64.saturating_pow(u32::try_from(digits.len()).unwrap_or(u32::MAX)) - 1;
            SeriesPosition { series: format!("{series}:{stem}/{}", digits.len()), number, last }
        }
    };
    Ok(position)
}

fn identity_at(first: &DeviceIdentity, number: u64) -> Option<DeviceIdentity> {
    let text = match first {
        DeviceIdentity::Imei(imei) => {
            let body = format!("{}{number:06}", imei.tac());
            format!("imei:{body}{}", Imei::check_digit(&body)?)
        }
        DeviceIdentity::Meid(_) => format!("meid:{number:014x}"),
        DeviceIdentity::Eui48(_) => format!("eui48:{number:012x}"),
        DeviceIdentity::Eui64(_) => format!("eui64:{number:016x}"),
        DeviceIdentity::Serial(value) => {
            let (stem, digits) = serial_parts(value);
            format!("serial:{stem}{number:0width$}", width = digits.len())
        }
    };
    text.parse().ok()
}

/// Splits a serial number into its stem and its trailing digits, at most 18.
fn serial_parts(value: &str) -> (&str, &str) {
    let digits = value.bytes().rev().take_while(u8::is_ascii_digit).count().min(18);
    value.split_at(value.len() - digits)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(first: &str, count: u64) -> Result<IdentityRange, NameError> {
        IdentityRange::new(first.parse().unwrap(), count)
    }

    #[test]
    fn nth_counts_by_the_rules_of_each_identity_kind() {
        for (first, second, last_of_three) in [
            ("imei:490154203237518", "imei:490154203237526", "imei:490154203237534"),
            ("meid:a00000000000ff", "meid:a0000000000100", "meid:a0000000000101"),
            ("eui48:0123456789ff", "eui48:012345678a00", "eui48:012345678a01"),
            ("eui64:00000000000000ff", "eui64:0000000000000100", "eui64:0000000000000101"),
            ("serial:SN-0099", "serial:SN-0100", "serial:SN-0101"),
        ] {
            let three = range(first, 3).unwrap();
            assert_eq!(three.nth(1).unwrap().to_string(), second);
            assert_eq!(three.last().to_string(), last_of_three);
            assert_eq!(three.nth(3), None);
            assert_eq!(IdentityRange::between(three.first().clone(), &three.last()).unwrap(), three);
        }
    }

    #[test]
    fn range_beyond_its_series_is_rejected() {
        let body = "49015420999999";
        let last = format!("imei:{body}{}", Imei::check_digit(body).unwrap());
        assert!(range(&last, 1).is_ok());
        assert!(range(&last, 2).unwrap_err().to_string().contains("beyond the end of the series"));
        assert!(range("serial:SN-98", 3).is_err());
        assert!(range("serial:SN-X", 1).unwrap_err().to_string().contains("must end in 1 to 18 digits"));
        assert!(range("serial:SN-1", 0).is_err());
        let other_series = IdentityRange::between("serial:A-1".parse().unwrap(), &"serial:B-2".parse().unwrap());
        assert!(other_series.is_err());
    }

    #[test]
    fn ranges_of_different_series_do_not_overlap() {
        let of = |first, count| range(first, count).unwrap();
        assert!(of("serial:A-10", 5).overlaps(&of("serial:A-14", 1)));
        assert!(!of("serial:A-10", 5).overlaps(&of("serial:A-15", 1)));
        assert!(!of("serial:A-10", 5).overlaps(&of("serial:B-10", 5)));
        assert!(!of("serial:A-10", 5).overlaps(&of("serial:A-010", 5)));
    }

    proptest! {
        #[test]
        fn identities_of_a_range_are_distinct(first in 0_u64..0xffff_ffff, count in 1_u64..200) {
            let range = range(&format!("eui48:{first:012x}"), count).unwrap();
            let all: std::collections::BTreeSet<_> = (0..count).map(|n| range.nth(n).unwrap()).collect();
            prop_assert_eq!(all.len() as u64, count);
        }
    }
}
