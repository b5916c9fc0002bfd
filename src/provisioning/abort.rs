//! Aborting and viewing sessions.

use spp_format::names::{ChipId, SessionId, StationName};

use super::{ProvisionError, Provisioner, wrong_state};
use crate::store::{Abortable, Loaded, Session, SessionState};

/// Selects a session.
pub enum SessionView {
    /// By its session ID.
    Id(SessionId),
    /// The newest session of a chip.
    Chip(ChipId),
}

impl Provisioner {
    /// Aborts a session that is not published, and destroys its key pair. A repeated call succeeds. A station may abort only
    /// sessions that it may work on.
    pub async fn abort(&self, station: &StationName, id: SessionId, reason: String) -> Result<(), ProvisionError> {
        let policy = self.policy();
        let _chip = self.chip_locks.lock(&self.chip_of(&id).await?).await?;
        let loaded = self.load(&id).await?;
        policy.permit(station, loaded.session())?;
        self.abort_loaded(loaded, reason).await.map(drop)
    }

    /// Aborts a session for an officer, without a station's restrictions. Returns the aborted session.
    pub async fn abort_any(&self, id: SessionId, reason: String) -> Result<Session, ProvisionError> {
        let _chip = self.chip_locks.lock(&self.chip_of(&id).await?).await?;
        let loaded = self.load(&id).await?;
        self.abort_loaded(loaded, reason).await
    }

    /// Aborts the session. The caller holds the chip's lock.
    async fn abort_loaded(&self, loaded: Loaded, reason: String) -> Result<Session, ProvisionError> {
        let known = loaded.session().clone();
        let id = known.id;
        let abortable = match loaded {
            Loaded::Intent(intent) => Abortable::Intent(intent),
            // Published before a crash, not yet journaled: it can no longer be aborted.
            Loaded::Issued(issued) => match self.registry.find_receipt(&known.chip, id).await? {
                None => Abortable::Issued(issued),
                Some(_) => return Err(wrong_state(issued.session(), ", but its record is public: repeat Complete")),
            },
            Loaded::Final(session) if matches!(session.state, SessionState::Aborted { .. }) => return Ok(session),
            Loaded::Published(_) | Loaded::Final(_) => {
                return Err(wrong_state(&known, ": a published device cannot be aborted"));
            }
        };
        tracing::info!(session = %id, chip = %known.chip, %reason, "aborting session");
        self.abort_session(abortable, reason).await
    }

    /// Returns a session. A station sees only sessions that it may work on.
    pub async fn view(&self, station: &StationName, selector: &SessionView) -> Result<Session, ProvisionError> {
        let policy = self.policy();
        let session = match selector {
            SessionView::Id(id) => self.load(id).await?.session().clone(),
            SessionView::Chip(chip) => {
                let found = self.journal.load_by_chip(chip).await?;
                let none = || ProvisionError::NoSession(format!("of the chip {chip}"));
                found.map(|known| known.session().clone()).ok_or_else(none)?
            }
        };
        policy.permit(station, &session)?;
        Ok(session)
    }
}
