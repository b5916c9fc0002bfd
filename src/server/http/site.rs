//! Defines the state that all handlers of the public listener share.

use std::sync::Arc;

use spp_format::names::ChipId;
use spp_format::record::PublishedRecord;
use spp_format::tlog::{LogKey, WitnessKey};
use tokio::sync::Semaphore;

use super::rate::RateLimit;
use crate::provisioning::Provisioner;
use crate::server::call_error::CallError;

/// State shared by all handlers.
pub(super) struct Site {
    pub(super) provisioner: Arc<Provisioner>,
    pub(super) title: String,
    pub(super) key: LogKey,
    /// Witnesses whose cosignatures are shown.
    pub(super) witnesses: Vec<WitnessKey>,
    pub(super) rate: RateLimit,
    pub(super) requests: Semaphore,
    pub(super) bundles: Arc<Semaphore>,
}

impl Site {
    /// Returns the newest record of the chip in the request path.
    pub(super) async fn find(&self, chip: &str) -> Result<PublishedRecord, CallError> {
        let chip: ChipId = chip.parse().map_err(|e| CallError::invalid("chip_id", e))?;
        Ok(self.provisioner.recover(&chip).await?)
    }
}
