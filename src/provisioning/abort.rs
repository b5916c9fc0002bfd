//! Giving a session up, and looking at one.

use super::complete::wrong_state;
use super::{ProvisionError, Provisioner};
use crate::names::{ChipId, SessionId, StationName};
use crate::store::{Abortable, Loaded, Session, SessionState};

/// Which session is asked for.
pub enum SessionView {
    /// By its name.
    Id(SessionId),
    /// The chip's newest.
    Chip(ChipId),
}

impl Provisioner {
    /// Destroys the key pair of a session that was not published. Repeating it is no error. A station gives up what it may work on.
    pub async fn abort(&self, station: &StationName, id: SessionId, reason: String) -> Result<(), ProvisionError> {
        let rules = self.rules();
        let _chip = self.chips.hold(&self.chip_of(&id).await?).await?;
        let taken_up = self.load(&id).await?;
        rules.permit(station, taken_up.session())?;
        self.give_up(taken_up, reason).await.map(drop)
    }

    /// The same for an officer, who is confined to nothing. Answers with the session as it is then.
    pub async fn abort_any(&self, id: SessionId, reason: String) -> Result<Session, ProvisionError> {
        let _chip = self.chips.hold(&self.chip_of(&id).await?).await?;
        let taken_up = self.load(&id).await?;
        self.give_up(taken_up, reason).await
    }

    /// The caller holds the chip.
    async fn give_up(&self, taken_up: Loaded, reason: String) -> Result<Session, ProvisionError> {
        let known = taken_up.session().clone();
        let id = known.id;
        let abortable = match taken_up {
            Loaded::Intent(intent) => Abortable::Intent(intent),
            // Published before a crash, not yet journaled: it is too late.
            Loaded::Issued(issued) => match self.registry.receipt_of(&known.chip, id).await? {
                None => Abortable::Issued(issued),
                Some(_) => return Err(wrong_state(issued.session(), ", but its record is public: repeat Complete")),
            },
            Loaded::Final(session) if matches!(session.state, SessionState::Aborted { .. }) => return Ok(session),
            Loaded::Published(_) | Loaded::Final(_) => {
                return Err(wrong_state(&known, ": a published device cannot be aborted"));
            }
        };
        self.in_flight.take(&id);
        tracing::info!(session = %id, chip = %known.chip, %reason, "the session is given up");
        let given_up = self.journal.abort(abortable, self.clock.now(), reason).await?;
        self.pool.erased();
        Ok(given_up)
    }

    /// Where a session stands; a station sees what it may work on.
    pub async fn view(&self, station: &StationName, which: &SessionView) -> Result<Session, ProvisionError> {
        let rules = self.rules();
        let session = match which {
            SessionView::Id(id) => self.load(id).await?.session().clone(),
            SessionView::Chip(chip) => {
                let found = self.journal.load_chip(chip).await?;
                let none = || ProvisionError::NoSession(format!("of the chip {chip}"));
                found.map(|known| known.session().clone()).ok_or_else(none)?
            }
        };
        rules.permit(station, &session)?;
        Ok(session)
    }
}
