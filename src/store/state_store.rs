//! The trait of the state store, which storage engines implement.

use std::ops::Range;

use async_trait::async_trait;
use spp_format::certificate::IssuedSubject;
use spp_format::names::{ChipId, DeviceIdentity, SessionId, StationName};

use super::StoreError;
use super::production::{ProductionCounts, ProductionSlot};
use super::secret::PairToReserve;
use super::session::{Session, SessionCounts, SessionCursor, SessionSet, SessionState};
use crate::access::Exceeded;
use crate::hsm::StoredKey;
use crate::state_name::StateName;

/// Why a reservation was refused.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// The chip has an unfinished or finished session.
    #[error("the chip already has session {}", .0.id)]
    ChipTaken(Box<Session>),
    /// The identity belongs to another chip.
    #[error("the identity belongs to chip {}", .0.chip)]
    IdentityTaken(Box<Session>),
    /// The certificate's issuer has another session's certificate with the same subject.
    #[error("session {} already has the subject of a certificate for {identity}", .holder.id)]
    SubjectTaken {
        /// The identity of the refused session.
        identity: DeviceIdentity,
        /// The other session.
        holder: Box<Session>,
    },
    /// The public key that the device generated belongs to another session's device.
    #[error("session {} already has the public key", .0.id)]
    PublicKeyTaken(Box<Session>),
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

/// Reads of the session journal.
#[async_trait]
pub trait SessionReader: Send + Sync {
    /// A session by ID.
    async fn session(&self, id: &SessionId) -> Result<Option<Session>, StoreError>;

    /// The newest session of a chip, aborted ones included.
    async fn session_of_chip(&self, chip: &ChipId) -> Result<Option<Session>, StoreError>;

    /// The session that holds an identity (aborted ones do not).
    async fn session_of_identity(&self, identity: &DeviceIdentity) -> Result<Option<Session>, StoreError>;

    /// The session whose certificate has this issuer and subject (aborted ones do not).
    async fn session_of_subject(&self, subject: &IssuedSubject) -> Result<Option<Session>, StoreError>;

    /// The session whose device has this public key, SubjectPublicKeyInfo in DER (aborted ones do not).
    async fn session_of_public_key(&self, spki: &[u8]) -> Result<Option<Session>, StoreError>;

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

    /// Number of a station's sessions that are not final. The store maintains it, so the call does not scan; of a store of an
    /// earlier version it counts the unfinished sessions until the station begins or ends one.
    async fn open_sessions(&self, station: &StationName) -> Result<u64, StoreError>;

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

/// The private store: the journal of sessions and the secret store, in one database.
///
/// Trust: an attacker who controls it can withhold or roll back sessions, but cannot read keys without the HSM.
/// Every write survives power loss once the call returns.
#[async_trait]
pub trait StateStore: SessionReader {
    /// Atomically journals a new session in state Reserved and assigns its key pair. All earlier sessions of the chip and the
    /// identity must be aborted, and a pooled pair must be ready. The subject of the certificate must not be that of another
    /// session that is not aborted, and neither must the public key of a device that generated its own pair. Repeating the
    /// same reservation succeeds. Fails with `QuotaExceeded` beyond the station's quota in force, with `WrongState` if another
    /// session has the ID, and with `Full` below the disk space floor.
    async fn reserve(&self, session: &Session, pair: Option<&PairToReserve>) -> Result<(), ReserveError>;

    /// Moves a session from state `from` to state `to`. Fails with `WrongState` if it is not in `from`, or if the step is not
    /// allowed ([`StateName::can_advance_to`]). `Erased` and `Aborted` permanently erase the key pair in the same transaction.
    /// Aborting releases the chip, the identity, the certificate's subject and the public key. A session that is already in
    /// state `to`, with equal data, is returned unchanged. A missing session is `Damaged`, because callers only know IDs from
    /// the store.
    async fn advance(&self, session: &SessionId, from: StateName, to: SessionState) -> Result<Session, StoreError>;
}
