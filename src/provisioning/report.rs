//! What is told of devices and their sessions. Nothing is changed here, and no secret is told.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{ProvisionError, Provisioner};
use crate::keys::StoredKey;
use crate::names::{ChipId, DeviceIdentity, ProfileName, StationName};
use crate::store::{
    Listed, ProductionCounts, ProductionSlot, PublishedRecord, Session, SessionPlace, SessionState, StateName,
};

/// Sessions of one chip that are told.
const MOST_OF_A_CHIP: usize = 100;
/// Rows and sessions that are read in one transaction: the line's own transactions wait no longer than that.
const AT_ONCE: usize = 100;
/// Sessions that one call looks at.
const LOOKED_AT: usize = 1000;

/// Which device is asked for.
pub enum DeviceView {
    /// By its chip.
    Chip(ChipId),
    /// By its identity.
    Identity(DeviceIdentity),
}

/// What is known of a device.
pub struct DeviceReport {
    /// The chip.
    pub chip: ChipId,
    /// Its sessions, newest first.
    pub sessions: Vec<Session>,
    /// Where the newest one's key pair is.
    pub key_pair: Option<KeyPairPlace>,
    /// Its newest record.
    pub record: Option<PublishedRecord>,
}

/// Where a session's key pair is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyPairPlace {
    /// The profile has none.
    None,
    /// It was never here.
    Device,
    /// In the secret store.
    Wrapped,
    /// On the token.
    Token,
    /// Not here any more.
    Gone,
}

/// What a row of the production stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProductionBy {
    /// A station.
    Station,
    /// A profile.
    Profile,
    /// An hour.
    Hour,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProductionOf {
    /// This station.
    Station(StationName),
    /// This profile.
    Profile(ProfileName),
    /// This hour since the Unix epoch.
    Hour(u64),
}

/// Which sessions are wanted.
#[derive(Debug, Default)]
pub struct SessionFilter {
    /// Those in this state; all that are not final without it.
    pub state: Option<StateName>,
    /// Those of this station.
    pub station: Option<StationName>,
    /// Those of this profile.
    pub profile: Option<ProfileName>,
    /// Those that were opened so many seconds ago or longer.
    pub older_than: u64,
}

/// A part of a list.
pub struct SessionPage {
    /// What was found.
    pub sessions: Vec<Session>,
    /// Behind which to go on, if others may follow.
    pub next: Option<SessionPlace>,
}

impl Provisioner {
    /// Everything that is known of a device.
    pub async fn device(&self, which: DeviceView) -> Result<DeviceReport, ProvisionError> {
        let chip = match which {
            DeviceView::Chip(chip) => chip,
            DeviceView::Identity(identity) => self.chip_with(&identity).await?,
        };
        let sessions = self.journal.sessions_of_chip(&chip, MOST_OF_A_CHIP).await?;
        let record = self.registry.find_by_chip(&chip).await?;
        if sessions.is_empty() && record.is_none() {
            return Err(ProvisionError::NoSession(format!("of the chip {chip}, and no record")));
        }
        let key_pair = match sessions.first() {
            Some(newest) => Some(self.key_pair_of(newest).await?),
            None => None,
        };
        Ok(DeviceReport { chip, sessions, key_pair, record })
    }

    async fn chip_with(&self, identity: &DeviceIdentity) -> Result<ChipId, ProvisionError> {
        if let Some(session) = self.journal.session_of_identity(identity).await? {
            return Ok(session.chip);
        }
        // The journal may be an old copy, or lost: what is public is known all the same.
        let found = self.registry.find_by_identity(identity).await?;
        let none = || {
            let hint = "and no record; sessions that were given up are found by their chip";
            ProvisionError::NoSession(format!("of the identity {identity}, {hint}"))
        };
        found.map(|found| found.record.chip).ok_or_else(none)
    }

    async fn key_pair_of(&self, session: &Session) -> Result<KeyPairPlace, ProvisionError> {
        Ok(match self.journal.kept_key(&session.id).await? {
            Some(StoredKey::Wrapped(_)) => KeyPairPlace::Wrapped,
            Some(StoredKey::OnToken(_)) => KeyPairPlace::Token,
            None if session.public_key.is_none() => KeyPairPlace::None,
            None if session.own_key_pair => KeyPairPlace::Device,
            None => KeyPairPlace::Gone,
        })
    }

    /// What was produced in these hours since the Unix epoch.
    pub async fn production(
        &self,
        hours: Range<u64>,
        by: ProductionBy,
    ) -> Result<BTreeMap<ProductionOf, ProductionCounts>, ProvisionError> {
        let mut sums: BTreeMap<_, ProductionCounts> = BTreeMap::new();
        let mut last: Option<ProductionSlot> = None;
        loop {
            let rows = self.journal.production(hours.clone(), last.as_ref(), AT_ONCE).await?;
            let is_end = rows.len() < AT_ONCE;
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

    /// Sessions behind that place, at most so many. It stops after so many looks, too: few may be found among many.
    pub async fn sessions(
        &self,
        filter: &SessionFilter,
        mut after: Option<SessionPlace>,
        limit: usize,
    ) -> Result<SessionPage, ProvisionError> {
        let (listed, now) = (filter.listed(), self.clock.now());
        let mut sessions = Vec::new();
        for _ in 0..LOOKED_AT / AT_ONCE {
            let read = self.journal.sessions(listed, after, AT_ONCE).await?;
            let is_end = read.len() < AT_ONCE;
            for session in read {
                after = Some(session.place());
                if filter.lets_pass(&session, now) {
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
    const fn listed(&self) -> Listed {
        match self.state {
            None | Some(StateName::Reserved | StateName::Issued | StateName::Published) => Listed::Unfinished,
            Some(StateName::Erased | StateName::Aborted) => Listed::All,
        }
    }

    fn lets_pass(&self, session: &Session, now: u64) -> bool {
        self.state.is_none_or(|state| state == session.state.name())
            && self.station.as_ref().is_none_or(|station| *station == session.station)
            && self.profile.as_ref().is_none_or(|profile| *profile == session.profile)
            && session.created.saturating_add(self.older_than) <= now
    }
}

/// Something that happened to a device, or will.
#[derive(Debug, PartialEq, Eq)]
pub struct DeviceEvent<'a> {
    /// Seconds since the Unix epoch.
    pub at: u64,
    /// In which session.
    pub session: &'a Session,
    /// What, in words.
    pub what: String,
}

impl DeviceReport {
    /// What happened to its sessions, oldest first.
    pub fn timeline(&self) -> Vec<DeviceEvent<'_>> {
        let mut events: Vec<_> = self.sessions.iter().rev().flat_map(events).collect();
        // Two things of the same second stay in the order in which they must have happened.
        events.sort_by_key(|event| event.at);
        events
    }
}

fn events(session: &Session) -> Vec<DeviceEvent<'_>> {
    let event = |at, what| DeviceEvent { at, session, what };
    let opened = event(session.created, format!("begun by {} as {}", session.station, session.profile));
    let then = match &session.state {
        SessionState::Reserved => event(session.expires, "expires; its certificate is not signed yet".to_owned()),
        SessionState::Issued { .. } => event(session.expires, "expires; its certificate is signed".to_owned()),
        SessionState::Published { publication } => {
            let what = format!("published as record {}; its key pair is about to be erased", publication.index);
            event(publication.published, what)
        }
        SessionState::Erased { publication } => {
            event(publication.published, format!("published as record {}, complete", publication.index))
        }
        SessionState::Aborted { at, reason } => event(*at, format!("given up: {reason}")),
    };
    vec![opened, then]
}
