//! Production statistics on sled: one row for each hour, station and profile with at least one event.
//!
//! | key | value |
//! |---|---|
//! | `h` + hour, 8 bytes + station + 0 + profile + 0 | number of devices begun, completed, aborted |

use std::ops::Range;

use spp_format::names::{ProfileName, StationName};

use super::view::View;
use crate::store::production::{ProductionCounts, ProductionSlot};
use crate::store::{Session, StoreError};

/// Counts that a session has reached its state. Runs in the transaction that changes the state, so that a crash cannot lose or
/// duplicate the count.
pub(super) fn count(view: &mut View<'_>, session: &Session) -> Result<(), StoreError> {
    let Some((at, reached)) = ProductionCounts::of_reaching(session) else { return Ok(()) };
    let key = slot_key(&ProductionSlot::of(session, at));
    let mut counts: ProductionCounts = view.get(&key, || ROW.into())?.unwrap_or_default();
    counts.add(reached);
    view.put(&key, &counts)
}

pub(super) fn list(
    view: &View<'_>,
    hours: &Range<u64>,
    after: Option<&ProductionSlot>,
    limit: usize,
) -> Result<Vec<(ProductionSlot, ProductionCounts)>, StoreError> {
    // Keys of the previous hour sort before the suffix 0xFFFF that `keys_after` appends, because names are ASCII.
    let before = hours.start.checked_sub(1).map_or_else(|| PREFIX.to_vec(), hour_key);
    let begin = after.map_or(before, slot_key);
    let mut rows = Vec::new();
    for key in view.keys_after(PREFIX, &begin, limit)? {
        let slot = slot(&key).ok_or_else(|| view.damaged(ROW.into(), "malformed key"))?;
        if slot.hour >= hours.end {
            break;
        }
        let counts = view.get(&key, || ROW.into())?.unwrap_or_default();
        rows.push((slot, counts));
    }
    Ok(rows)
}

const PREFIX: &[u8] = b"h";
const ROW: &str = "a production row";

fn hour_key(hour: u64) -> Vec<u8> {
    [PREFIX, hour.to_be_bytes().as_slice()].concat()
}

/// Zero-terminated names prevent one key from being a prefix of another, which `View` would take for a piece of it.
fn slot_key(slot: &ProductionSlot) -> Vec<u8> {
    let (station, profile) = (slot.station.as_str().as_bytes(), slot.profile.as_str().as_bytes());
    [hour_key(slot.hour).as_slice(), station, &[0], profile, &[0]].concat()
}

fn slot(key: &[u8]) -> Option<ProductionSlot> {
    let (hour, names) = key.strip_prefix(PREFIX)?.split_first_chunk()?;
    let mut names = std::str::from_utf8(names).ok()?.strip_suffix('\0')?.split('\0');
    let station: StationName = names.next()?.parse().ok()?;
    let profile: ProfileName = names.next()?.parse().ok()?;
    let slot = ProductionSlot { hour: u64::from_be_bytes(*hour), station, profile };
    names.next().is_none().then_some(slot)
}
