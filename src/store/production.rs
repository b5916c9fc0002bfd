//! Production statistics per hour, station and profile, which the state store updates together with the sessions.

use serde::{Deserialize, Serialize};
use spp_format::names::{ProfileName, StationName};

use super::session::{Session, SessionState};

/// Seconds per hour, the resolution of production statistics.
pub const SECONDS_PER_HOUR: u64 = 3600;

/// Key of a row: one hour, one station, one profile.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProductionSlot {
    /// Hours since the Unix epoch.
    pub hour: u64,
    /// The station that opened the sessions, even if another station continued them.
    pub station: StationName,
    /// The product's profile.
    pub profile: ProfileName,
}

impl ProductionSlot {
    /// The row for an event of a session at `at`, seconds since the Unix epoch.
    pub(super) fn of(session: &Session, at: u64) -> Self {
        Self { hour: at / SECONDS_PER_HOUR, station: session.station.clone(), profile: session.profile.clone() }
    }
}

/// Number of devices per outcome.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProductionCounts {
    /// Sessions opened.
    pub begun: u64,
    /// Records published.
    pub completed: u64,
    /// Sessions aborted or expired.
    pub aborted: u64,
}

impl ProductionCounts {
    /// Adds `more` to the counts.
    pub const fn add(&mut self, more: Self) {
        self.begun += more.begun;
        self.completed += more.completed;
        self.aborted += more.aborted;
    }

    /// The counts to add for reaching the session's current state, and the time of that event. `None` for intermediate states.
    pub(super) fn of_reaching(session: &Session) -> Option<(u64, Self)> {
        let none = Self::default();
        match &session.state {
            SessionState::Reserved => Some((session.created, Self { begun: 1, ..none })),
            SessionState::Published { publication } => Some((publication.published, Self { completed: 1, ..none })),
            SessionState::Aborted { at, .. } => Some((*at, Self { aborted: 1, ..none })),
            SessionState::Issued { .. } | SessionState::Erased { .. } => None,
        }
    }
}
