//! Recovers a device with its record from the public database or a mirror.

use std::path::Path;

use spp_device::{InstalledPackage, PublicRecord, SimulatedFab};
use spp_format::names::ChipId;

use super::LineError;
use super::public_database::{FetchedRecord, RecordReader};
use super::show::lines;

/// Recovers a simulated device; the device itself verifies and decrypts the record.
pub(super) async fn recover(chip: &ChipId, devices: &Path, database: &RecordReader) -> Result<String, LineError> {
    let mut device = SimulatedFab::open(devices)?.device(chip, None)?;
    let fetched = database.fetch_record(chip).await?;
    let record = &fetched.record;
    let public_record =
        PublicRecord { certificate: &record.certificate, is_cwt: record.certificate_is_cwt, backup: &record.backup };
    let installed = device.recover(&public_record)?;
    Ok(describe(&installed, &fetched))
}

fn describe(installed: &InstalledPackage, fetched: &FetchedRecord) -> String {
    let key_pair = match &installed.public_key {
        Some(key) => format!("{} sha256:{}", key.kind(), hex::encode(key.fingerprint())),
        None => "none".to_owned(),
    };
    let symmetric = match installed.purposes.as_slice() {
        [] => "none".to_owned(),
        purposes => format!("{} (master key version {})", purposes.join(", "), installed.master_key_version),
    };
    let rows = [
        ("recovered chip", fetched.record.chip.to_string()),
        ("identity", installed.identity.to_string()),
        ("profile", installed.profile.to_string()),
        ("key pair", key_pair),
        ("symmetric keys", symmetric),
        ("certificate", format!("serial {}", hex::encode(&fetched.record.serial))),
        ("session", installed.session.to_string()),
        ("record", fetched.index.to_string()),
        ("log", fetched.proof_text()),
    ];
    lines(&rows)
}
