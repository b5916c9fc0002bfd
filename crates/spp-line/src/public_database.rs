//! Fetches a chip's record from the public database or a mirror.

use std::path::{Path, PathBuf};
use std::time::Duration;

use spp_format::names::ChipId;
use spp_format::record::{DeviceRecord, PublishedRecord};
use spp_format::tlog::{LogKey, LogProof, VerifiedProof};
use spp_log::registry::read_chip;
use spp_proto::get_proof_request::Record;
use spp_proto::recovery_client::RecoveryClient;
use spp_proto::{GetProofRequest, GetRecordRequest};
use tonic::transport::Uri;

use super::LineError;
use super::connection::{Tls, connect};
use super::retry::RetryPolicy;

/// A fetched record that matches its receipt.
pub(super) struct FetchedRecord {
    pub(super) record: DeviceRecord,
    /// The record's index in the log, counted from 0.
    pub(super) index: u64,
    /// SHA-256 of the record's bytes.
    pub(super) hash: [u8; 32],
    /// The verified inclusion proof, if the log's key is known.
    pub(super) proof: Option<VerifiedProof>,
}

impl FetchedRecord {
    /// Describes the verification of the inclusion proof.
    pub(super) fn proof_text(&self) -> String {
        match &self.proof {
            Some(proof) => format!("verified: entry {} of {} signed entries", self.index, proof.checkpoint.size()),
            None => "not verified; provide the log's public key with --log FILE.vkey".to_owned(),
        }
    }
}

/// Access to the public database.
pub(super) struct RecordReader {
    pub(super) source: RecordSource,
    /// The log's key; without it, only the certificate authenticates the record.
    pub(super) key: Option<LogKey>,
}

/// The source of records.
pub(super) enum RecordSource {
    /// The daemon, and the CA of its certificate.
    Daemon { server: Uri, authority: PathBuf },
    /// A mirror: a directory or a web server.
    Mirror { place: String, authority: Option<PathBuf> },
}

impl RecordReader {
    /// Fetches the newest record of the chip. Parses the record's bytes rather than the message's fields, because the bytes are
    /// what the log hashes.
    pub(super) async fn fetch_record(&self, chip: &ChipId) -> Result<FetchedRecord, LineError> {
        let rejected = |problem: String| LineError::Record { chip: chip.clone(), problem };
        let (published, proof) = match &self.source {
            RecordSource::Daemon { server, authority } => self.fetch_from_daemon(chip, server, authority).await?,
            RecordSource::Mirror { place, authority } => self.read_mirror(chip, place, authority.as_deref()).await?,
        };
        if published.record.chip != *chip {
            return Err(rejected(format!("it belongs to chip {}", published.record.chip)));
        }
        let verified = match (&self.key, proof) {
            (Some(key), Some(proof)) => Some(proof.verify(&published.bytes, key).map_err(|e| rejected(e.to_string()))?),
            _ => None,
        };
        let index = verified.as_ref().map_or(published.publication.index, |verified| verified.index);
        Ok(FetchedRecord { record: published.record, index, hash: published.publication.record_hash, proof: verified })
    }

    async fn fetch_from_daemon(
        &self,
        chip: &ChipId,
        server: &Uri,
        authority: &Path,
    ) -> Result<(PublishedRecord, Option<LogProof>), LineError> {
        let retry_policy = RetryPolicy { deadline: Duration::from_secs(15), retry_for: Duration::from_secs(10) };
        let endpoint = Tls::public(authority)?.endpoint(server)?;
        let channel = connect(&endpoint, 1, &retry_policy).await?.swap_remove(0);
        let attempt = || {
            let request = retry_policy.request(GetRecordRequest { chip_id: chip.as_bytes().to_vec() });
            let mut client = RecoveryClient::new(channel.clone());
            async move { client.get_record(request).await }
        };
        let response = retry_policy.call("GetRecord", &mut 0, attempt).await?;
        let rejected = |problem: String| LineError::Record { chip: chip.clone(), problem };
        let receipt = response.receipt.ok_or_else(|| rejected("no receipt".to_owned()))?;
        let published = PublishedRecord::from_bytes(receipt.record_index, response.record_bytes);
        let published = published.map_err(|e| rejected(e.to_string()))?;
        if receipt.record_hash != published.publication.record_hash {
            return Err(rejected("the record's hash differs from the receipt".to_owned()));
        }
        if self.key.is_none() {
            return Ok((published, None));
        }
        let attempt = || {
            let record = Some(Record::RecordIndex(receipt.record_index));
            let request = retry_policy.request(GetProofRequest { record });
            let mut client = RecoveryClient::new(channel.clone());
            async move { client.get_proof(request).await }
        };
        let response = retry_policy.call("GetProof", &mut 0, attempt).await?;
        let proof = LogProof::from_bytes(&response.tlog_proof).map_err(|e| rejected(e.to_string()))?;
        Ok((published, Some(proof)))
    }

    async fn read_mirror(
        &self,
        chip: &ChipId,
        place: &str,
        authority: Option<&Path>,
    ) -> Result<(PublishedRecord, Option<LogProof>), LineError> {
        let (chip_id, place, authority) = (chip.clone(), place.to_owned(), authority.map(Path::to_owned));
        let read = tokio::task::spawn_blocking(move || read_chip(&place, &chip_id, authority.as_deref())).await;
        let read = read.map_err(|e| LineError::Usage(format!("reading the mirror failed: {e}")))?;
        let (bytes, proof) = read.map_err(|e| LineError::Mirror(e.to_string()))?;
        let rejected = |problem: String| LineError::Record { chip: chip.clone(), problem };
        let proof = LogProof::from_bytes(&proof).map_err(|e| rejected(e.to_string()))?;
        let published = PublishedRecord::from_bytes(proof.index(), bytes).map_err(|e| rejected(e.to_string()))?;
        Ok((published, Some(proof)))
    }
}
