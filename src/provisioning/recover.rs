//! What anybody may ask for ever after: the record of a chip.

use super::{ProvisionError, Provisioner};
use crate::names::ChipId;
use crate::store::{DeviceRecord, Publication};

impl Provisioner {
    /// The newest record of a chip, its octets as stored, and where it stands.
    pub async fn recover(&self, chip: &ChipId) -> Result<(DeviceRecord, Vec<u8>, Publication), ProvisionError> {
        let found = self.registry.find_by_chip(chip).await?;
        found.ok_or_else(|| ProvisionError::NoRecord(chip.clone()))
    }
}
