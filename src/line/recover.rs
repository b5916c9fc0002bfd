//! A chip's record from the public database, and the device made whole with it.

use std::path::Path;
use std::time::Duration;

use tonic::transport::Uri;

use super::LineError;
use super::connection::{Tls, connect};
use super::retry::Patience;
use crate::device::{Fab, Installed, PublicRecord};
use crate::keys::sha256;
use crate::names::ChipId;
use crate::proto::GetRecordRequest;
use crate::proto::recovery_client::RecoveryClient;
use crate::store::DeviceRecord;

/// A record that is what its receipt says.
pub(super) struct Found {
    pub(super) record: DeviceRecord,
    /// Its place, counted from 0.
    pub(super) index: u64,
    /// SHA-256 of its octets.
    pub(super) hash: [u8; 32],
}

/// Anybody's way to the public database.
pub(super) struct Public<'a> {
    pub(super) server: &'a Uri,
    /// The CA of the server's certificate.
    pub(super) authority: &'a Path,
}

impl Public<'_> {
    /// The newest record of the chip. Its octets are read, not the message's fields: they are what was hashed.
    pub(super) async fn record(&self, chip: &ChipId) -> Result<Found, LineError> {
        let patience = Patience { deadline: Duration::from_secs(15), retry_for: Duration::from_secs(10) };
        let endpoint = Tls::public(self.authority)?.endpoint(self.server)?;
        let channel = connect(&endpoint, 1, &patience).await?.swap_remove(0);
        let attempt = || {
            let request = patience.request(GetRecordRequest { chip_id: chip.as_bytes().to_vec() });
            let mut client = RecoveryClient::new(channel.clone());
            async move { client.get_record(request).await }
        };
        let answer = patience.call("GetRecord", &mut 0, attempt).await?;
        let doubt = |problem: String| LineError::Record { chip: chip.clone(), problem };
        let receipt = answer.receipt.ok_or_else(|| doubt("it has no receipt".to_owned()))?;
        let hash = sha256(&answer.record_bytes);
        if receipt.record_hash != hash {
            return Err(doubt("its octets do not have the hash of the receipt".to_owned()));
        }
        let record = DeviceRecord::from_bytes(&answer.record_bytes).map_err(|e| doubt(e.to_string()))?;
        if record.chip != *chip {
            return Err(doubt(format!("it is of chip {}", record.chip)));
        }
        Ok(Found { record, index: receipt.record_index, hash })
    }
}

/// Brings back what a simulated device had; the device itself verifies and decrypts it.
pub(super) async fn recover(chip: &ChipId, devices: &Path, public: &Public<'_>) -> Result<String, LineError> {
    let mut device = Fab::open(devices)?.device(chip, None)?;
    let found = public.record(chip).await?;
    let record = &found.record;
    let public_record =
        PublicRecord { certificate: &record.certificate, is_cwt: record.certificate_is_cwt, backup: &record.backup };
    let installed = device.recover(&public_record)?;
    Ok(told(&installed, &found))
}

fn told(installed: &Installed, found: &Found) -> String {
    let key_pair = match &installed.public_key {
        Some(key) => format!("{} sha256:{}", key.kind(), hex::encode(key.fingerprint())),
        None => "none".to_owned(),
    };
    let symmetric = match installed.purposes.as_slice() {
        [] => "none".to_owned(),
        purposes => format!("{} (master key version {})", purposes.join(", "), installed.master_key_version),
    };
    let lines = [
        ("recovered chip", found.record.chip.to_string()),
        ("identity", installed.identity.to_string()),
        ("profile", installed.profile.to_string()),
        ("key pair", key_pair),
        ("symmetric keys", symmetric),
        ("certificate", format!("serial {}", hex::encode(&found.record.serial))),
        ("session", installed.session.to_string()),
        ("record", found.index.to_string()),
    ];
    super::show::lines(&lines)
}
