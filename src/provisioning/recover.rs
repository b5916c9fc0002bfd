//! Public lookups: the record of a chip, and the proof that the record is in the log.

use spp_format::names::ChipId;
use spp_format::record::PublishedRecord;
use spp_format::tlog::LogProof;

use super::{ProvisionError, Provisioner};

impl Provisioner {
    /// The newest record of a chip.
    pub async fn recover(&self, chip: &ChipId) -> Result<PublishedRecord, ProvisionError> {
        self.registry.find_by_chip(chip).await?.ok_or(ProvisionError::NoRecord)
    }

    /// The proof that the entry at `index`, a record or not, is in the tree of the newest checkpoint.
    pub async fn prove(&self, index: u64) -> Result<LogProof, ProvisionError> {
        self.registry.prove(index).await?.ok_or(ProvisionError::NoRecord)
    }
}
