//! What was produced when, where and of what: numbers that the state store keeps beside the sessions.

use serde::{Deserialize, Serialize};

use super::session::{Session, SessionState};
use crate::names::{ProfileName, StationName};

/// Seconds of an hour, the finest time of which production is told.
pub const HOUR: u64 = 3600;

/// Devices of one profile, at the station that opened their sessions, in one hour.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProductionSlot {
    /// Hours since the Unix epoch.
    pub hour: u64,
    /// Who opened the sessions, also where another station took over.
    pub station: StationName,
    /// What the products get.
    pub profile: ProfileName,
}

impl ProductionSlot {
    /// Where an act on a session counts that happened at `at`, seconds since the Unix epoch.
    pub(super) fn of(session: &Session, at: u64) -> Self {
        Self { hour: at / HOUR, station: session.station.clone(), profile: session.profile.clone() }
    }
}

/// What happened to devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProductionCounts {
    /// Sessions that were opened.
    pub begun: u64,
    /// Records that were published.
    pub completed: u64,
    /// Sessions that were given up or expired.
    pub aborted: u64,
}

impl ProductionCounts {
    /// Adds others.
    pub const fn add(&mut self, more: Self) {
        self.begun += more.begun;
        self.completed += more.completed;
        self.aborted += more.aborted;
    }

    /// What reaching a state counts, and when it happened; nothing for the steps between.
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
