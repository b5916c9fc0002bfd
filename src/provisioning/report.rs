//! Read-only reports on devices, sessions and production. They contain no secrets.

use std::collections::BTreeMap;
use std::ops::Range;

use spp_format::names::{ChipId, DeviceIdentity, ProfileName, StationName};
use spp_format::record::PublishedRecord;

use super::{ProvisionError, Provisioner};
use crate::hsm::StoredKey;
use crate::store::{ProductionCounts, ProductionSlot, Session, SessionCursor, SessionSet, SessionState, StateName};

/// Maximum number of sessions in a device report.
const MAX_SESSIONS_PER_CHIP: usize = 100;
/// Rows and sessions per read transaction. This bounds how long a transaction of the assembly line waits.
const CHUNK: usize = 100;
/// Maximum number of sessions that one call scans.
const MAX_SCANNED: usize = 1000;

/// Selects a device.
pub enum DeviceView {
    /// By chip ID.
    Chip(ChipId),
    /// By device identity.
    Identity(DeviceIdentity),
}

/// All information about a device.
pub struct DeviceReport {
    /// The chip.
    pub chip: ChipId,
    /// Its sessions, newest first.
    pub sessions: Vec<Session>,
    /// Location of the newest session's key pair.
    pub key_pair: Option<KeyPairLocation>,
    /// Its newest public record.
    pub record: Option<PublishedRecord>,
}

/// The location of a session's key pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyPairLocation {
    /// The profile has no key pair.
    None,
    /// The device generated it; the SPP never had it.
    Device,
    /// In the secret store, wrapped.
    Wrapped,
    /// On the HSM's token.
    Token,
    /// Erased from the SPP.
    Erased,
}

/// The grouping of a production report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProductionBy {
    /// By station.
    Station,
    /// By profile.
    Profile,
    /// By hour.
    Hour,
}

/// The group of one row of a production report.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProductionOf {
    /// A station.
    Station(StationName),
    /// A profile.
    Profile(ProfileName),
    /// An hour, counted since the Unix epoch.
    Hour(u64),
}

/// Filter of a session list.
#[derive(Debug, Default)]
pub struct SessionFilter {
    /// Sessions in this state; without it, all sessions that are not final.
    pub state: Option<StateName>,
    /// Sessions of this station.
    pub station: Option<StationName>,
    /// Sessions of this profile.
    pub profile: Option<ProfileName>,
    /// Sessions that were opened at least this many seconds ago.
    pub older_than: u64,
}

/// One page of a session list.
pub struct SessionPage {
    /// The sessions of this page.
    pub sessions: Vec<Session>,
    /// Where the next page begins, if more sessions may follow.
    pub next: Option<SessionCursor>,
}

impl Provisioner {
    /// Reports on a device: sessions, key pair location and public record.
    pub async fn device(&self, selector: DeviceView) -> Result<DeviceReport, ProvisionError> {
        let chip = match selector {
            DeviceView::Chip(chip) => chip,
            DeviceView::Identity(identity) => self.chip_of_identity(&identity).await?,
        };
        let sessions = self.journal.sessions_of_chip(&chip, MAX_SESSIONS_PER_CHIP).await?;
        let record = self.registry.find_by_chip(&chip).await?;
        if sessions.is_empty() && record.is_none() {
            return Err(ProvisionError::NoSession(format!("of the chip {chip}, and no public record")));
        }
        let key_pair = match sessions.first() {
            Some(newest) => Some(self.key_pair_location(newest).await?),
            None => None,
        };
        Ok(DeviceReport { chip, sessions, key_pair, record })
    }

    async fn chip_of_identity(&self, identity: &DeviceIdentity) -> Result<ChipId, ProvisionError> {
        if let Some(session) = self.journal.session_of_identity(identity).await? {
            return Ok(session.chip);
        }
        // The journal may be an old copy or lost; the public database still has the record.
        let found = self.registry.find_by_identity(identity).await?;
        let none = || {
            let hint = "and no public record; look up aborted sessions by their chip";
            ProvisionError::NoSession(format!("of the identity {identity}, {hint}"))
        };
        found.map(|found| found.record.chip).ok_or_else(none)
    }

    async fn key_pair_location(&self, session: &Session) -> Result<KeyPairLocation, ProvisionError> {
        Ok(match self.journal.stored_key(&session.id).await? {
            Some(StoredKey::Wrapped(_)) => KeyPairLocation::Wrapped,
            Some(StoredKey::OnToken(_)) => KeyPairLocation::Token,
            None if session.public_key.is_none() => KeyPairLocation::None,
            None if session.own_key_pair => KeyPairLocation::Device,
            None => KeyPairLocation::Erased,
        })
    }

    /// Production counts of these hours since the Unix epoch, grouped.
    pub async fn production(
        &self,
        hours: Range<u64>,
        by: ProductionBy,
    ) -> Result<BTreeMap<ProductionOf, ProductionCounts>, ProvisionError> {
        let mut sums: BTreeMap<_, ProductionCounts> = BTreeMap::new();
        let mut last: Option<ProductionSlot> = None;
        loop {
            let rows = self.journal.production(hours.clone(), last.as_ref(), CHUNK).await?;
            let is_end = rows.len() < CHUNK;
            last = rows.last().map(|(slot, _)| slot.clone());
            for (slot, counts) in rows {
                let of = match by {
                    ProductionBy::Station => ProductionOf::Station(slot.station),
                    ProductionBy::Profile => ProductionOf::Profile(slot.profile),
                    ProductionBy::Hour => ProductionOf::Hour(slot.hour),
                };
                sums.entry(of).or_default().add(counts);
            }
            if is_end {
                return Ok(sums);
            }
        }
    }

    /// Lists up to `limit` sessions after `after`. A call scans a bounded number of sessions, so a page may be short or empty and
    /// still have a successor.
    pub async fn sessions(
        &self,
        filter: &SessionFilter,
        mut after: Option<SessionCursor>,
        limit: usize,
    ) -> Result<SessionPage, ProvisionError> {
        let (listing, now) = (filter.listing(), self.clock.now());
        let mut sessions = Vec::new();
        for _ in 0..MAX_SCANNED / CHUNK {
            let read = self.journal.sessions(listing, after, CHUNK).await?;
            let is_end = read.len() < CHUNK;
            for session in read {
                after = Some(session.cursor());
                if filter.matches(&session, now) {
                    sessions.push(session);
                }
                if sessions.len() == limit {
                    return Ok(SessionPage { sessions, next: after });
                }
            }
            if is_end {
                return Ok(SessionPage { sessions, next: None });
            }
        }
        Ok(SessionPage { sessions, next: after })
    }
}

impl SessionFilter {
    const fn listing(&self) -> SessionSet {
        match self.state {
            None | Some(StateName::Reserved | StateName::Issued | StateName::Published) => SessionSet::Unfinished,
            Some(StateName::Erased | StateName::Aborted) => SessionSet::All,
        }
    }

    fn matches(&self, session: &Session, now: u64) -> bool {
        self.state.is_none_or(|state| state == session.state.name())
            && self.station.as_ref().is_none_or(|station| *station == session.station)
            && self.profile.as_ref().is_none_or(|profile| *profile == session.profile)
            && session.created.saturating_add(self.older_than) <= now
    }
}

/// A past or future event in a device's life.
#[derive(Debug, PartialEq, Eq)]
pub struct DeviceEvent<'a> {
    /// Seconds since the Unix epoch.
    pub at: u64,
    /// The session of the event.
    pub session: &'a Session,
    /// Description of the event.
    pub description: String,
}

impl DeviceReport {
    /// The events of all sessions, oldest first.
    pub fn timeline(&self) -> Vec<DeviceEvent<'_>> {
        let mut events: Vec<_> = self.sessions.iter().rev().flat_map(events).collect();
        // The sort is stable: events of the same second stay in their causal order.
        events.sort_by_key(|event| event.at);
        events
    }
}

fn events(session: &Session) -> Vec<DeviceEvent<'_>> {
    let event = |at, description| DeviceEvent { at, session, description };
    let opened = event(session.created, format!("opened by {} with profile {}", session.station, session.profile));
    let latest = match &session.state {
        SessionState::Reserved => event(session.expires, "expires; its certificate is not signed yet".to_owned()),
        SessionState::Issued { .. } => event(session.expires, "expires; its certificate is signed".to_owned()),
        SessionState::Published { publication } => {
            let description = format!("published as record {}; its key pair is being erased", publication.index);
            event(publication.published, description)
        }
        SessionState::Erased { publication } => {
            event(publication.published, format!("published as record {}, complete", publication.index))
        }
        SessionState::Aborted { at, reason } => event(*at, format!("aborted: {reason}")),
    };
    vec![opened, latest]
}
