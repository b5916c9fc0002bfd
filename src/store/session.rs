//! Sessions as stored in the journal, and the trait of the state store.

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

/// One device's passage through the SPP. Contains no secrets: key pairs are in the secret store, wrapped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// The session ID.
    pub id: SessionId,
    /// The chip ID.
    pub chip: ChipId,
    /// The identity that the certificate binds to the chip.
    pub identity: DeviceIdentity,
    /// The product's profile.
    pub profile: ProfileName,
    /// The station that opened the session.
    pub station: StationName,
    /// When the session was opened, seconds since the Unix epoch.
    pub created: u64,
    /// When the session expires and its key pair is destroyed, seconds since the Unix epoch.
    pub expires: u64,
    /// The device's public key, SubjectPublicKeyInfo in DER; `None` for profiles without a key pair.
    pub public_key: Option<Vec<u8>>,
    /// Whether the device generated its own pair (CSR), so that the secret store has none.
    pub own_key_pair: bool,
    /// SHA-256 of the chip's transport public key, if the package is sealed to it. A retry with another key is refused.
    pub sealed_to: Option<[u8; 32]>,
    /// SHA-256 of the other inputs of the package: the profile's symmetric keys and the issuer's chain. A retry after these
    /// changed could not reproduce the package, so it is refused.
    pub recipe: [u8; 32],
    /// The master key from which the symmetric keys are derived.
    pub master_key: Option<MasterKeyVersion>,
    /// The certificate to sign.
    pub certificate: CertificateToSign,
    /// The session's state.
    pub state: SessionState,
}

impl Session {
    /// Reports whether the session has expired at `now`, seconds since the Unix epoch.
    pub const fn has_expired(&self, now: u64) -> bool {
        self.expires <= now
    }

    /// The session's position in listings.
    pub const fn cursor(&self) -> SessionCursor {
        SessionCursor { created: self.created, id: self.id }
    }
}

/// A position in a listing: the next page starts after this session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionCursor {
    /// When the session was opened, seconds since the Unix epoch.
    pub created: u64,
    /// The session ID.
    pub id: SessionId,
}

/// Which sessions to list, and in which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionSet {
    /// Sessions that are not final, oldest first.
    Unfinished,
    /// All sessions, by session ID. IDs are random, so the order does not reflect age.
    All,
}

/// A master key and its version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MasterKeyVersion {
    /// Name of the key in the HSM.
    pub key: KeyName,
    /// Version, from 1.
    pub version: u32,
}

/// A linted certificate that is not signed yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateToSign {
    /// The issuer's signing key.
    pub issuer: KeyName,
    /// The signature algorithm.
    pub algorithm: SignatureAlgorithm,
    /// Whether the bytes are a COSE Sig_structure of a CWT (RFC 9052 §4.4) rather than an X.509 TBSCertificate.
    pub is_cwt: bool,
    /// The certificate's serial number (or `cti`), unique among published records.
    pub serial: Vec<u8>,
    /// The bytes to be signed.
    pub to_be_signed: Vec<u8>,
}

/// The state of a session: `Reserved → Issued → Published → Erased`, or `Aborted`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionState {
    /// Keys are reserved; the certificate is not signed yet.
    Reserved,
    /// The certificate is signed.
    Issued {
        /// The certificate as delivered.
        certificate: Vec<u8>,
    },
    /// The record is public.
    Published {
        /// The publication.
        publication: Publication,
    },
    /// The key pair is erased from the secret store. Final.
    Erased {
        /// The publication.
        publication: Publication,
    },
    /// Aborted; the key pair is destroyed. Final.
    Aborted {
        /// When, seconds since the Unix epoch.
        at: u64,
        /// The reason.
        reason: String,
    },
}

/// A session state without its data.
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

    /// Reports whether no further state can follow.
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::Erased { .. } | Self::Aborted { .. })
    }
}

impl StateName {
    /// Reports whether one step may take a session from this state to `to`. All storage engines use this rule.
    pub fn can_advance_to(self, to: Self) -> bool {
        matches!(
            (self, to),
            (Self::Reserved, Self::Issued | Self::Aborted)
                | (Self::Issued, Self::Published | Self::Aborted)
                | (Self::Published, Self::Erased)
        )
    }

    /// The state that usually precedes this one, for error messages.
    pub const fn predecessor(self) -> Self {
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
    #[error("the chip already has session {}", .0.id)]
    ChipTaken(Box<Session>),
    /// The identity belongs to another chip.
    #[error("the identity belongs to chip {}", .0.chip)]
    IdentityTaken(Box<Session>),
    /// The pair or its batch is no longer available. The caller must choose another pair.
    #[error("the selected key pair is no longer available")]
    PairUnavailable,
    /// The station's quota is exhausted.
    #[error("the quota of station {station} is exhausted")]
    QuotaExceeded {
        /// The station.
        station: StationName,
        /// The exceeded limit.
        exceeded: Exceeded,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Number of sessions per state.
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
    /// Mutable access to the count of one state.
    pub const fn count_mut(&mut self, state: StateName) -> &mut u64 {
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
/// Trust: an attacker who controls it can withhold or roll back sessions, but cannot read keys without the HSM.
/// Every write survives power loss once the call returns.
#[async_trait]
pub trait StateStore: Send + Sync {
    /// Atomically journals a new session in state Reserved and assigns its key pair. All earlier sessions of the chip and the
    /// identity must be aborted, and a pooled pair must be ready. Repeating the same reservation succeeds. Fails with
    /// `QuotaExceeded` beyond the station's quota in force, with `WrongState` if another session has the ID, and with `Full`
    /// below the disk space floor.
    async fn reserve(&self, session: &Session, pair: Option<&PairToReserve>) -> Result<(), ReserveError>;

    /// Moves a session from state `from` to state `to`. Fails with `WrongState` if it is not in `from`, or if the step is not
    /// allowed ([`StateName::can_advance_to`]). `Erased` and `Aborted` permanently erase the key pair in the same transaction.
    /// Aborting releases the chip and the identity. A session that is already in state `to`, with equal data, is returned
    /// unchanged. A missing session is `Damaged`, because callers only know IDs from the store.
    async fn advance(&self, session: &SessionId, from: StateName, to: SessionState) -> Result<Session, StoreError>;

    /// A session by ID.
    async fn session(&self, id: &SessionId) -> Result<Option<Session>, StoreError>;

    /// The newest session of a chip, aborted ones included.
    async fn session_of_chip(&self, chip: &ChipId) -> Result<Option<Session>, StoreError>;

    /// The session that holds an identity (aborted ones do not).
    async fn session_of_identity(&self, identity: &DeviceIdentity) -> Result<Option<Session>, StoreError>;

    /// The key pair of a session, while it is in the secret store.
    async fn stored_key(&self, session: &SessionId) -> Result<Option<StoredKey>, StoreError>;

    /// All sessions that are not final, oldest first. The cost is proportional to their number.
    async fn unfinished(&self) -> Result<Vec<Session>, StoreError>;

    /// Up to `limit` sessions after the cursor. Fewer than `limit` means the last page. Cost is proportional to the page size.
    async fn sessions(
        &self,
        set: SessionSet,
        after: Option<SessionCursor>,
        limit: usize,
    ) -> Result<Vec<Session>, StoreError>;

    /// Up to `limit` sessions of a chip, newest first. All but the newest are aborted.
    async fn sessions_of_chip(&self, chip: &ChipId, limit: usize) -> Result<Vec<Session>, StoreError>;

    /// Number of sessions per state. The store maintains the counts, so the call does not scan.
    async fn counts(&self) -> Result<SessionCounts, StoreError>;

    /// Up to `limit` production rows of a range of hours since the Unix epoch, ordered by hour, station and profile, after row
    /// `after`. Fewer than `limit` means the last page. Rows change in the same transactions as the sessions, so their sums equal
    /// the [counts](Self::counts). An event counts in its own hour, a completed device in the hour of its publication. Repeated
    /// steps count once.
    async fn production(
        &self,
        hours: Range<u64>,
        after: Option<&ProductionSlot>,
        limit: usize,
    ) -> Result<Vec<(ProductionSlot, ProductionCounts)>, StoreError>;

    /// Free disk space, and the floor below which new devices are refused, in bytes.
    fn disk_space(&self) -> Result<(u64, u64), StoreError>;
}
