//! A chip's record from the public database or a mirror of it, and the device made whole with it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::Uri;

use super::LineError;
use super::connection::{Tls, connect};
use super::retry::Patience;
use crate::device::{Installed, PublicRecord, SimulatedFab};
use crate::names::ChipId;
use crate::proto::get_proof_request::Record;
use crate::proto::recovery_client::RecoveryClient;
use crate::proto::{GetProofRequest, GetRecordRequest};
use crate::registry::read_chip;
use crate::store::{DeviceRecord, PublishedRecord};
use crate::tlog::{LogKey, LogProof, VerifiedProof};

/// A record that is what its receipt says.
pub(super) struct Found {
    pub(super) record: DeviceRecord,
    /// Its place, counted from 0.
    pub(super) index: u64,
    /// SHA-256 of its bytes.
    pub(super) hash: [u8; 32],
    /// That it is in the log, if the log's key is known.
    pub(super) proven: Option<VerifiedProof>,
}

impl Found {
    /// What is known of its being in the log.
    pub(super) fn proven_text(&self) -> String {
        match &self.proven {
            Some(proven) => format!("proven: entry {} of {} signed ones", self.index, proven.checkpoint.size()),
            None => "not verified; give the log's public key with --log FILE.vkey".to_owned(),
        }
    }
}

/// Anybody's way to the public database.
pub(super) struct Public {
    pub(super) place: Place,
    /// The log's key; without it the record is believed as far as its certificate goes.
    pub(super) key: Option<LogKey>,
}

/// Where the record is asked for.
pub(super) enum Place {
    /// At the daemon, and the CA of its certificate.
    Daemon { server: Uri, authority: PathBuf },
    /// In a directory or at a web server, which need no daemon.
    Mirror { place: String, authority: Option<PathBuf> },
}

impl Public {
    /// The newest record of the chip. Its bytes are read, not the message's fields: they are what was hashed.
    pub(super) async fn record(&self, chip: &ChipId) -> Result<Found, LineError> {
        let doubt = |problem: String| LineError::Record { chip: chip.clone(), problem };
        let (found, proof) = match &self.place {
            Place::Daemon { server, authority } => self.ask_daemon(chip, server, authority).await?,
            Place::Mirror { place, authority } => self.read_mirror(chip, place, authority.as_deref()).await?,
        };
        if found.record.chip != *chip {
            return Err(doubt(format!("it is of chip {}", found.record.chip)));
        }
        let proven = match (&self.key, proof) {
            (Some(key), Some(proof)) => Some(proof.verify(&found.bytes, key).map_err(|e| doubt(e.to_string()))?),
            _ => None,
        };
        let index = proven.as_ref().map_or(found.publication.index, |proven| proven.index);
        Ok(Found { record: found.record, index, hash: found.publication.record_hash, proven })
    }

    async fn ask_daemon(
        &self,
        chip: &ChipId,
        server: &Uri,
        authority: &Path,
    ) -> Result<(PublishedRecord, Option<LogProof>), LineError> {
        let patience = Patience { deadline: Duration::from_secs(15), retry_for: Duration::from_secs(10) };
        let endpoint = Tls::public(authority)?.endpoint(server)?;
        let channel = connect(&endpoint, 1, &patience).await?.swap_remove(0);
        let attempt = || {
            let request = patience.request(GetRecordRequest { chip_id: chip.as_bytes().to_vec() });
            let mut client = RecoveryClient::new(channel.clone());
            async move { client.get_record(request).await }
        };
        let answer = patience.call("GetRecord", &mut 0, attempt).await?;
        let doubt = |problem: String| LineError::Record { chip: chip.clone(), problem };
        let receipt = answer.receipt.ok_or_else(|| doubt("it has no receipt".to_owned()))?;
        let found = PublishedRecord::from_bytes(receipt.record_index, answer.record_bytes);
        let found = found.map_err(|e| doubt(e.to_string()))?;
        if receipt.record_hash != found.publication.record_hash {
            return Err(doubt("its bytes do not have the hash of the receipt".to_owned()));
        }
        if self.key.is_none() {
            return Ok((found, None));
        }
        let attempt = || {
            let record = Some(Record::RecordIndex(receipt.record_index));
            let request = patience.request(GetProofRequest { record });
            let mut client = RecoveryClient::new(channel.clone());
            async move { client.get_proof(request).await }
        };
        let answer = patience.call("GetProof", &mut 0, attempt).await?;
        let proof = LogProof::from_bytes(&answer.tlog_proof).map_err(|e| doubt(e.to_string()))?;
        Ok((found, Some(proof)))
    }

    async fn read_mirror(
        &self,
        chip: &ChipId,
        place: &str,
        authority: Option<&Path>,
    ) -> Result<(PublishedRecord, Option<LogProof>), LineError> {
        let (asked, place, authority) = (chip.clone(), place.to_owned(), authority.map(Path::to_owned));
        let read = tokio::task::spawn_blocking(move || read_chip(&place, &asked, authority.as_deref())).await;
        let read = read.map_err(|e| LineError::Usage(format!("reading the mirror stopped: {e}")))?;
        let (bytes, proof) = read.map_err(|e| LineError::Mirror(e.to_string()))?;
        let doubt = |problem: String| LineError::Record { chip: chip.clone(), problem };
        let proof = LogProof::from_bytes(&proof).map_err(|e| doubt(e.to_string()))?;
        let found = PublishedRecord::from_bytes(proof.index(), bytes).map_err(|e| doubt(e.to_string()))?;
        Ok((found, Some(proof)))
    }
}

/// Brings back what a simulated device had; the device itself verifies and decrypts it.
pub(super) async fn recover(chip: &ChipId, devices: &Path, public: &Public) -> Result<String, LineError> {
    let mut device = SimulatedFab::open(devices)?.device(chip, None)?;
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
        ("log", found.proven_text()),
    ];
    super::show::lines(&lines)
}
