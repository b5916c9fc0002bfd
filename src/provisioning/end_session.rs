//! The two ends of a session: published and erased, or aborted. Complete, expiry, restart and officers end sessions here only.

use spp_format::record::Publication;

use super::{ProvisionError, Provisioner};
use crate::store::{Abortable, PublicationReceipt, Session};

impl Provisioner {
    /// Journals the publication, then erases the key pair. Consumes the proof that the record is public; no other value permits an
    /// erasure. After a crash in between, or if either step fails, repeating the call finishes the session.
    pub(super) async fn erase_published(&self, receipt: PublicationReceipt) -> Result<Publication, ProvisionError> {
        let publication = receipt.publication();
        self.in_flight.take(&receipt.session());
        self.journal.publish(&receipt).await?;
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
