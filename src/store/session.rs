//! A session as the journal keeps it, and the trait of the state store.

use std::ops::Range;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::StoreError;
use super::production::{ProductionCounts, ProductionSlot};
use super::public::Publication;
use super::secret::PairToReserve;
use crate::access::Exceeded;
use crate::keys::{SignatureAlgorithm, StoredKey};
use crate::names::{ChipId, DeviceIdentity, KeyName, ProfileName, SessionId, StationName};

/// One device's way, as journaled. Contains no secret: key pairs are in the secret store, wrapped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Its name.
    pub id: SessionId,
    /// The chip.
    pub chip: ChipId,
    /// The identity that the certificate binds to the chip.
    pub identity: DeviceIdentity,
    /// What the product gets.
    pub profile: ProfileName,
    /// Who opened it.
    pub station: StationName,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// Seconds since the Unix epoch; after that the key pair is destroyed.
    pub expires: u64,
    /// The device's public key, SubjectPublicKeyInfo in DER; none for profiles without a key pair.
    pub public_key: Option<Vec<u8>>,
    /// Whether the device made its own pair (CSR), so that there is none in the secret store.
    pub own_key_pair: bool,
    /// SHA-256 of the chip's transport public key, if the package is sealed to it: a repeat is sealed to the same key or refused.
    pub sealed_to: Option<[u8; 32]>,
    /// SHA-256 of what else decides the package's bytes: the profile's symmetric keys and the issuer's chain. A repeat after
    /// these were changed could not give the same package, so it is refused.
    pub recipe: [u8; 32],
    /// From which master key the symmetric keys are derived.
    pub master_key: Option<MasterKeyUse>,
    /// The certificate that will be signed, exactly these bytes.
    pub certificate: CertificateToSign,
    /// How far it is.
    pub state: SessionState,
}

impl Session {
    /// Whether its time is over. `now` in seconds since the Unix epoch.
    pub const fn has_expired(&self, now: u64) -> bool {
        self.expires <= now
    }

    /// Where it stands in a list.
    pub const fn place(&self) -> SessionPlace {
        SessionPlace { created: self.created, id: self.id }
    }
}

/// Where a list of sessions is gone on with: behind this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionPlace {
    /// When the session was opened, seconds since the Unix epoch.
    pub created: u64,
    /// Its name.
    pub id: SessionId,
}

/// Which sessions are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listed {
    /// Those that are not final, oldest first.
    Unfinished,
    /// All of them, by their names, which tell nothing of their age.
    All,
}

/// A master key and its version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MasterKeyUse {
    /// The key's name in the HSM.
    pub key: KeyName,
    /// Counted from 1.
    pub version: u32,
}

/// What the intent is about: linted, not yet signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateToSign {
    /// The manufacturer's signing key.
    pub issuer: KeyName,
    /// How it is signed.
    pub algorithm: SignatureAlgorithm,
    /// Whether the bytes are a COSE Sig_structure of a CWT (RFC 9052 §4.4) rather than an X.509 TBSCertificate.
    pub is_cwt: bool,
    /// The certificate's serial number (or `cti`), unique among published records.
    pub serial: Vec<u8>,
    /// The bytes to be signed.
    pub to_be_signed: Vec<u8>,
}

/// `Reserved → Issued → Published → Erased`, or `Aborted`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionState {
    /// Keys reserved, certificate intended.
    Reserved,
    /// The certificate is signed.
    Issued {
        /// The certificate as delivered.
        certificate: Vec<u8>,
    },
    /// The record is public.
    Published {
        /// Where.
        publication: Publication,
    },
    /// The key pair is erased here. Final.
    Erased {
        /// Where the record is.
        publication: Publication,
    },
    /// Given up; the key pair is destroyed. Final.
    Aborted {
        /// Seconds since the Unix epoch.
        at: u64,
        /// Why.
        reason: String,
    },
}

/// A state's name alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StateName {
    /// See [`SessionState::Reserved`].
    Reserved,
    /// See [`SessionState::Issued`].
    Issued,
    /// See [`SessionState::Published`].
    Published,
    /// See [`SessionState::Erased`].
    Erased,
    /// See [`SessionState::Aborted`].
    Aborted,
}

impl SessionState {
    /// The state's name.
    pub const fn name(&self) -> StateName {
        match self {
            Self::Reserved => StateName::Reserved,
            Self::Issued { .. } => StateName::Issued,
            Self::Published { .. } => StateName::Published,
            Self::Erased { .. } => StateName::Erased,
            Self::Aborted { .. } => StateName::Aborted,
        }
    }

    /// Whether nothing more will happen to the session.
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::Erased { .. } | Self::Aborted { .. })
    }
}

impl StateName {
    /// Whether a session may go from this state to another in one step. Every engine asks here.
    pub fn leads_to(self, to: Self) -> bool {
        matches!(
            (self, to),
            (Self::Reserved, Self::Issued | Self::Aborted)
                | (Self::Issued, Self::Published | Self::Aborted)
                | (Self::Published, Self::Erased)
        )
    }

    /// The state from which a session goes to this one on its usual way, to name it in a refusal.
    pub const fn comes_from(self) -> Self {
        match self {
            Self::Reserved | Self::Issued => Self::Reserved,
            Self::Published | Self::Aborted => Self::Issued,
            Self::Erased => Self::Published,
        }
    }
}

/// Why a reservation was refused.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// The chip has an unfinished or finished session.
    #[error("the chip has session {}", .0.id)]
    ChipTaken(Box<Session>),
    /// The identity is on another chip.
    #[error("the identity is on chip {}", .0.chip)]
    IdentityTaken(Box<Session>),
    /// The pair is not offered any more, or the batch that it was made for is at its end: another one is needed.
    #[error("the pair that was chosen is no longer there")]
    PairGone,
    /// The station has begun as many devices as it may.
    #[error("the station {station} has begun as many devices as it may")]
    QuotaExceeded {
        /// Which one.
        station: StationName,
        /// Which limit.
        exceeded: Exceeded,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Sessions by state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SessionCounts {
    /// In state Reserved.
    pub reserved: u64,
    /// In state Issued.
    pub issued: u64,
    /// In state Published.
    pub published: u64,
    /// In state Erased.
    pub erased: u64,
    /// In state Aborted.
    pub aborted: u64,
}

impl SessionCounts {
    /// The count of one state.
    pub const fn of_mut(&mut self, state: StateName) -> &mut u64 {
        match state {
            StateName::Reserved => &mut self.reserved,
            StateName::Issued => &mut self.issued,
            StateName::Published => &mut self.published,
            StateName::Erased => &mut self.erased,
            StateName::Aborted => &mut self.aborted,
        }
    }
}

/// The private store: the journal of sessions and the secret store, in one database.
///
/// Trust: whoever controls it can withhold or roll back sessions, and read no key without the HSM.
/// Every write is on the disk, power loss included, before the call returns.
#[async_trait]
pub trait StateStore: Send + Sync {
    /// Journals a new session in state Reserved together with its key pair: both or neither. The chip and the identity must
    /// have no session but aborted ones; a pooled pair must be ready, and is the session's alone from then on. The very same
    /// reservation again is answered as the first one was; one beyond the quota in force of its station is `QuotaExceeded`; `OtherState` if the session's name is in use otherwise. Refused
    /// with `Full` below the disk's floor.
    async fn reserve(&self, session: &Session, pair: Option<&PairToReserve>) -> Result<(), ReserveError>;

    /// Moves a session from one state to another; `OtherState` if it is not in `from`, or if no step leads from there to `to`
    /// ([`StateName::leads_to`]). Moving to `Erased` or `Aborted` removes the key pair in the same transaction, for good: it never
    /// becomes ready again. Aborting
    /// frees chip and identity. A session that is in the very state `to` already, content included, is answered as it is.
    /// A session that is not in the store is `Damaged`: callers only know names that the store gave them.
    async fn advance(&self, session: &SessionId, from: StateName, to: SessionState) -> Result<Session, StoreError>;

    /// A session by name.
    async fn session(&self, id: &SessionId) -> Result<Option<Session>, StoreError>;

    /// The newest session of a chip, aborted ones included.
    async fn session_of_chip(&self, chip: &ChipId) -> Result<Option<Session>, StoreError>;

    /// The session that holds an identity (aborted ones do not).
    async fn session_of_identity(&self, identity: &DeviceIdentity) -> Result<Option<Session>, StoreError>;

    /// The key pair of a session, while it is in the secret store.
    async fn kept_key(&self, session: &SessionId) -> Result<Option<StoredKey>, StoreError>;

    /// All sessions that are not final, oldest first. Costs as much as there are unfinished ones.
    async fn unfinished(&self) -> Result<Vec<Session>, StoreError>;

    /// Sessions behind that place, at most so many: fewer are the last ones. Costs as much as there are in the answer.
    async fn sessions(
        &self,
        which: Listed,
        after: Option<SessionPlace>,
        limit: usize,
    ) -> Result<Vec<Session>, StoreError>;

    /// A chip's sessions, newest first, at most so many. All but the newest are aborted.
    async fn sessions_of_chip(&self, chip: &ChipId, limit: usize) -> Result<Vec<Session>, StoreError>;

    /// How many sessions are in each state; kept, not counted each time.
    async fn counts(&self) -> Result<SessionCounts, StoreError>;

    /// What was produced in these hours since the Unix epoch, as far as anything was, in the order of hour, station and profile;
    /// from behind that slot on, at most so many rows: fewer are the last ones. Kept with the sessions, in the same transactions:
    /// over all hours the sums are the [counts](Self::counts). An act counts in the hour in which it happened, a device that is
    /// complete in the hour of its publication; a repeat counts nothing.
    async fn production(
        &self,
        hours: Range<u64>,
        after: Option<&ProductionSlot>,
        limit: usize,
    ) -> Result<Vec<(ProductionSlot, ProductionCounts)>, StoreError>;

    /// Free bytes where the store lives, and the floor under which new devices are refused.
    fn room(&self) -> Result<(u64, u64), StoreError>;
}
