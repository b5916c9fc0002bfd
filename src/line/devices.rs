//! The simulated devices of a directory: what each holds, and losing it.

use std::collections::BTreeMap;
use std::path::Path;

use comfy_table::{ContentArrangement, Table, presets};

use super::LineError;
use super::{journal, orders, run_log};
use crate::device::{DeviceError, SimulatedFab};
use crate::names::ChipId;

/// Empties a device's flash, as an accident would.
pub(super) fn wipe(chip: &ChipId, devices: &Path) -> Result<String, LineError> {
    let mut device = SimulatedFab::open(devices)?.device(chip, None)?;
    let before = match device.installed() {
        Ok(installed) => format!("it was {}", installed.identity),
        Err(DeviceError::Empty) => "it was empty before".to_owned(),
        Err(error) => format!("before, {error}"),
    };
    device.wipe()?;
    Ok(format!("wiped chip {chip}; {before}\n"))
}

/// What is known here of one device.
#[derive(Default)]
struct Known {
    identity: String,
    profile: String,
    /// `ordered`: its flash is empty; `installed`: not known here to be complete; `complete`; `wiped` and `damaged`: to be
    /// recovered.
    state: &'static str,
    session: String,
    record: String,
}

/// The devices of the directory as a table.
pub(super) fn table(devices: &Path) -> Result<String, LineError> {
    let known = known(devices)?;
    let mut states: BTreeMap<&str, usize> = BTreeMap::new();
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["chip", "identity", "profile", "state", "session", "record"]);
    for (chip, device) in &known {
        let Known { identity, profile, state, session, record } = device;
        *states.entry(state).or_default() += 1;
        table.add_row([&chip.to_string(), identity, profile, *state, session, record]);
    }
    let states: Vec<_> = states.iter().map(|(state, count)| format!("{count} {state}")).collect();
    Ok(format!("{table}\n{} devices: {}\n", known.len(), states.join(", ")))
}

fn known(devices: &Path) -> Result<BTreeMap<ChipId, Known>, LineError> {
    let fab = SimulatedFab::open(devices)?;
    let mut known: BTreeMap<ChipId, Known> = BTreeMap::new();
    let list = orders::list_in(devices);
    for order in if list.exists() { orders::read(&list)? } else { Vec::new() } {
        let (identity, profile) = (order.identity.to_string(), order.profile.to_string());
        known.insert(order.chip, Known { identity, profile, state: "ordered", ..Known::default() });
    }
    for (chip, entry) in journal::read(devices)? {
        known.insert(
            chip,
            Known {
                identity: entry.identity.to_string(),
                profile: entry.profile.to_string(),
                state: "wiped",
                session: entry.receipt.session.to_string(),
                record: entry.receipt.record_index.to_string(),
            },
        );
    }
    for chip in run_log::flashes(devices)? {
        let installed = fab.device(&chip, None)?.installed();
        let device = known.entry(chip).or_default();
        match installed {
            Ok(installed) => {
                device.identity = installed.identity.to_string();
                device.profile = installed.profile.to_string();
                device.session = installed.session.to_string();
                device.state = if device.record.is_empty() { "installed" } else { "complete" };
            }
            Err(_) => device.state = "damaged",
        }
    }
    Ok(known)
}
