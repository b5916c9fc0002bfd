//! Ends sessions: erases the key pair after publication, or aborts the session. Complete, Abort, expiry, crash recovery and
//! officers end sessions only through this module.

use spp_format::names::{ChipId, SessionId};
use spp_format::record::Publication;

use super::{ProvisionError, Provisioner};
use crate::store::{Abortable, PublicationReceipt, Session};

impl Provisioner {
    /// Journals the publication, then erases the key pair. After a crash in between, or if either step fails, a repeated
    /// call or the recovery loop continues from the journaled state.
    pub(super) async fn publish_and_erase(&self, receipt: PublicationReceipt) -> Result<Publication, ProvisionError> {
        self.journal.publish(&receipt).await?;
        self.erase(receipt).await
    }

    /// Erases the pair of a session that is journaled as published. If the public database does not have the record, it was
    /// rolled back, and the pair is retained.
    pub(super) async fn finish_erasure(&self, chip: &ChipId, id: SessionId) -> Result<Publication, ProvisionError> {
        let receipt = self.registry.find_receipt(chip, id).await?.ok_or_else(|| ProvisionError::Internal {
            doing: "erasing a published key pair",
            cause: format!(
                "no public record of session {id}: the public database was rolled back; the pair is retained"
            ),
        })?;
        self.erase(receipt).await
    }

    /// Consumes the proof that the record is public; no other value permits an erasure.
    async fn erase(&self, receipt: PublicationReceipt) -> Result<Publication, ProvisionError> {
        let publication = receipt.publication();
        self.in_flight.take(&receipt.session());
        self.journal.erase(receipt).await?;
        self.pool.erased();
        Ok(publication)
    }

    /// Aborts a session, which destroys its key pair and frees its chip and identity. The device or the station may have seen the
    /// pair, so it is never given to another chip.
    pub(super) async fn abort_session(&self, session: Abortable, reason: String) -> Result<Session, ProvisionError> {
        self.in_flight.take(&session.session().id);
        let aborted = self.journal.abort(session, self.clock.now(), reason).await?;
        self.pool.erased();
        Ok(aborted)
    }
}
