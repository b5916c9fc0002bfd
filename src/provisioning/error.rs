//! Errors of provisioning. They name the field or the other device that caused the error, and never a secret.

use spp_format::names::{ChipId, DeviceIdentity, SessionId, StationName};
use spp_format::package::{BackupError, ConfirmationError, PackageError};
use spp_format::record::UniquenessConflict;

use crate::access::{AccessError, Exceeded, Refused};
use crate::config::NotPermitted;
use crate::hsm::HsmError;
use crate::keypool::PoolError;
use crate::store::{PublishError, ReserveError, StateName, StoreError};

/// One invalid field of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldViolation {
    /// The field's name in the request.
    pub field: &'static str,
    /// The problem, and the expected value.
    pub problem: String,
}

impl FieldViolation {
    /// Creates a violation.
    pub fn new(field: &'static str, problem: impl std::fmt::Display) -> Self {
        Self { field, problem: problem.to_string() }
    }
}

/// The reason why a call failed. Either nothing has changed, or a repeated call continues where the failed one stopped.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    /// The request is malformed.
    #[error("invalid request: {}", list_violations(.0))]
    Invalid(Vec<FieldViolation>),
    /// The request does not meet the requirements of the session or the profile. The caller may send a corrected one.
    #[error("request not accepted: {}", list_violations(.0))]
    NotAccepted(Vec<FieldViolation>),
    /// The caller is not permitted to do this.
    #[error(transparent)]
    NotPermitted(#[from] NotPermitted),
    /// The chip has a session with another order or identity.
    #[error(
        "chip {chip} already has the identity {identity} (session {session}); to change it, abort that session first"
    )]
    ChipTaken {
        /// The chip.
        chip: ChipId,
        /// The identity that the chip has.
        identity: DeviceIdentity,
        /// From which session.
        session: SessionId,
    },
    /// The identity is assigned to another chip.
    #[error("identity {identity} is already assigned to chip {chip} (session {session})")]
    IdentityTaken {
        /// The identity.
        identity: DeviceIdentity,
        /// The chip that has the identity.
        chip: ChipId,
        /// From which session.
        session: SessionId,
    },
    /// The issuer has certified another device under the same subject.
    #[error(
        "identity {identity} has the same certificate subject as that of session {session}: they differ only in kind, case or \
         spaces"
    )]
    SubjectTaken {
        /// The identity of the order.
        identity: DeviceIdentity,
        /// The session of the other device.
        session: SessionId,
    },
    /// The public key that the device generated belongs to another device.
    #[error(
        "the public key of the certificate request is already used in session {0}; the device must generate a new pair"
    )]
    PublicKeyTaken(SessionId),
    /// The device is complete; its key pair is erased from the SPP.
    #[error(
        "chip {chip} is complete (session {session}); get its backup from the public database with Recovery.GetRecord"
    )]
    AlreadyComplete {
        /// The chip.
        chip: ChipId,
        /// From which session.
        session: SessionId,
    },
    /// The session does not exist.
    #[error("no session {0}")]
    NoSession(String),
    /// The session is not in a state that allows the call.
    #[error("session {session} is {state:?}{hint}")]
    WrongState {
        /// The session.
        session: SessionId,
        /// The state of the session.
        state: StateName,
        /// What the caller can do.
        hint: &'static str,
    },
    /// The public database contains a record that the state store does not know: the state store is an old copy.
    #[error("{0}: the state store was rolled back; abort this session and repeat Assemble")]
    RolledBack(UniquenessConflict),
    /// The pool has no pair for this order.
    #[error(transparent)]
    Pool(PoolError),
    /// Another session took the selected pair first.
    #[error("the selected key pair is no longer available; repeat the call")]
    PairUnavailable,
    /// The record does not exist. The message and its timing do not depend on the requested chip.
    #[error("no such record")]
    NoRecord,
    /// The log has no checkpoint with the record yet, because signing it failed.
    #[error("signing the log's checkpoint failed: {0}")]
    Unsigned(String),
    /// Another call holds the chip's lock for too long.
    #[error("another call for chip {0} is in progress; retry later")]
    ChipBusy(ChipId),
    /// The station has reached its quota.
    #[error("station {station} {exceeded}")]
    QuotaExceeded {
        /// The station.
        station: StationName,
        /// The limit that was reached.
        exceeded: Exceeded,
    },
    /// The station has as many unfinished sessions as it may have.
    #[error(
        "station {station} has {limit} open sessions, as many as it may have: complete or abort some (sppctl sessions), or wait \
         until they expire"
    )]
    TooManyOpen {
        /// The station.
        station: StationName,
        /// The limit.
        limit: u64,
    },
    /// That many allocatable identities are already in the public database.
    #[error(
        "the next {0} identities are already in the public database, as after a rollback of the state store; repeat the call \
        to continue after them"
    )]
    Identities(usize),
    /// The access control.
    #[error(transparent)]
    Access(AccessError),
    /// The HSM.
    #[error(transparent)]
    Hsm(#[from] HsmError),
    /// A store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An internal fault of this program or of the PKCS#11 module. It does not occur with a valid configuration.
    #[error("{doing}: {cause}")]
    Internal {
        /// The operation that failed.
        doing: &'static str,
        /// The message of the cause.
        cause: String,
    },
}

impl ProvisionError {
    /// An error about one invalid field.
    pub fn invalid(field: &'static str, problem: impl std::fmt::Display) -> Self {
        Self::Invalid(vec![FieldViolation::new(field, problem)])
    }

    /// An error about one field that is not accepted.
    pub(crate) fn not_accepted(field: &'static str, problem: impl std::fmt::Display) -> Self {
        Self::NotAccepted(vec![FieldViolation::new(field, problem)])
    }

    /// An internal error.
    pub(crate) fn internal<E: std::fmt::Display>(doing: &'static str) -> impl FnOnce(E) -> Self {
        move |cause| Self::Internal { doing, cause: cause.to_string() }
    }
}

/// Joins violations to one line.
pub(crate) fn list_violations(violations: &[FieldViolation]) -> String {
    violations.iter().map(|v| format!("{}: {}", v.field, v.problem)).collect::<Vec<_>>().join("; ")
}

impl From<AccessError> for ProvisionError {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Refused(Refused::Quota { station, exceeded }) => Self::QuotaExceeded { station, exceeded },
            AccessError::Store(error) => Self::Store(error),
            AccessError::Hsm(error) => Self::Hsm(error),
            other => Self::Access(other),
        }
    }
}

impl From<ReserveError> for ProvisionError {
    fn from(error: ReserveError) -> Self {
        match error {
            ReserveError::ChipTaken(s) => Self::ChipTaken { chip: s.chip, identity: s.identity, session: s.id },
            ReserveError::IdentityTaken(s) => Self::IdentityTaken { identity: s.identity, chip: s.chip, session: s.id },
            ReserveError::SubjectTaken { identity, holder } => Self::SubjectTaken { identity, session: holder.id },
            ReserveError::PublicKeyTaken(s) => Self::PublicKeyTaken(s.id),
            ReserveError::PairUnavailable => Self::PairUnavailable,
            ReserveError::QuotaExceeded { station, exceeded } => Self::QuotaExceeded { station, exceeded },
            ReserveError::Store(error) => Self::Store(error),
        }
    }
}

impl From<PoolError> for ProvisionError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Hsm(error) => Self::Hsm(error),
            PoolError::Store(error) => Self::Store(error),
            other => Self::Pool(other),
        }
    }
}

impl From<PublishError> for ProvisionError {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::Conflict(taken) => Self::RolledBack(taken),
            PublishError::Record(error) => Self::not_accepted("backup_package", error),
            PublishError::Unsigned(why) => Self::Unsigned(why),
            PublishError::Store(error) => Self::Store(error),
        }
    }
}

impl From<BackupError> for ProvisionError {
    fn from(error: BackupError) -> Self {
        Self::not_accepted("backup_package", error)
    }
}

impl From<ConfirmationError> for ProvisionError {
    fn from(error: ConfirmationError) -> Self {
        Self::not_accepted("key_confirmation", error)
    }
}

impl From<PackageError> for ProvisionError {
    fn from(error: PackageError) -> Self {
        match error {
            PackageError::TransportKey(problem) => Self::invalid("transport_key", problem),
            other => Self::Internal { doing: "building the data package", cause: other.to_string() },
        }
    }
}
