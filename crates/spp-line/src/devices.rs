//! The commands `devices` and `wipe` for the simulated devices of a directory.

use std::collections::BTreeMap;
use std::path::Path;

use comfy_table::{ContentArrangement, Table, presets};
use spp_device::{DeviceError, SimulatedFab};
use spp_format::names::ChipId;

use super::{LineError, journal, orders, run_log};

/// Erases a device's flash.
pub(super) fn wipe(chip: &ChipId, devices: &Path) -> Result<String, LineError> {
    let mut device = SimulatedFab::open(devices)?.device(chip, None)?;
    let before = match device.installed() {
        Ok(installed) => format!("previous identity {}", installed.identity),
        Err(DeviceError::Empty) => "it was already empty".to_owned(),
        Err(error) => format!("previous state: {error}"),
    };
    device.wipe()?;
    Ok(format!("wiped chip {chip}; {before}\n"))
}

/// The locally known state of one device.
#[derive(Default)]
struct DeviceState {
    identity: String,
    profile: String,
    /// `ordered`: flash empty; `installed`: completion not known locally; `complete`; `wiped` and `damaged`: needs recovery.
    state: &'static str,
    session: String,
    record: String,
}

/// Lists the devices of the directory as a table.
pub(super) fn table(devices: &Path) -> Result<String, LineError> {
    let listed = read_states(devices)?;
    let mut states: BTreeMap<&str, usize> = BTreeMap::new();
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["chip", "identity", "profile", "state", "session", "record"]);
    for (chip, device) in &listed {
        let DeviceState { identity, profile, state, session, record } = device;
        *states.entry(state).or_default() += 1;
        table.add_row([&chip.to_string(), identity, profile, *state, session, record]);
    }
    let states: Vec<_> = states.iter().map(|(state, count)| format!("{count} {state}")).collect();
    Ok(format!("{table}\n{} devices: {}\n", listed.len(), states.join(", ")))
}

fn read_states(devices: &Path) -> Result<BTreeMap<ChipId, DeviceState>, LineError> {
    let fab = SimulatedFab::open(devices)?;
    let mut states: BTreeMap<ChipId, DeviceState> = BTreeMap::new();
    let list = orders::list_path(devices);
    for order in if list.exists() { orders::read(&list)? } else { Vec::new() } {
        let (identity, profile) = (order.identity.to_string(), order.profile.to_string());
        states.insert(order.chip, DeviceState { identity, profile, state: "ordered", ..DeviceState::default() });
    }
    for (chip, entry) in journal::read(devices)? {
        states.insert(
            chip,
            DeviceState {
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
        let device = states.entry(chip).or_default();
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
    Ok(states)
}
