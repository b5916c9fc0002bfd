//! Why a device's way did not go on. Says which field or which other device is in the way, and never a secret.

use crate::access::{AccessError, Exceeded, Refused};
use crate::audit::AuditError;
use crate::config::NotPermitted;
use crate::hsm::HsmError;
use crate::keypool::PoolError;
use crate::names::{ChipId, DeviceIdentity, SessionId, StationName};
use crate::package::{BackupRefused, ConfirmationRefused, PackageError};
use crate::reload::ReloadError;
use crate::store::{PublishError, ReserveError, StateName, StoreError, Taken};

/// One field that is wrong, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldViolation {
    /// The field's name in the request.
    pub field: &'static str,
    /// What is wrong and what would be right.
    pub problem: String,
}

impl FieldViolation {
    /// A violation.
    pub fn new(field: &'static str, problem: impl std::fmt::Display) -> Self {
        Self { field, problem: problem.to_string() }
    }
}

/// What stopped a call. In every case nothing has changed, or a repeat continues where it stopped.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    /// The request is wrong in itself.
    #[error("the request is wrong: {}", list(.0))]
    Invalid(Vec<FieldViolation>),
    /// The request does not fit what the session or the profile asks for; a better one may be sent.
    #[error("not accepted: {}", list(.0))]
    NotAccepted(Vec<FieldViolation>),
    /// The caller may not do this.
    #[error(transparent)]
    NotPermitted(#[from] NotPermitted),
    /// The chip has another order, or another identity.
    #[error(
        "the chip {chip} already has the identity {identity} (session {session}); abort that session first if it is wrong"
    )]
    ChipTaken {
        /// The chip.
        chip: ChipId,
        /// What it has.
        identity: DeviceIdentity,
        /// From which session.
        session: SessionId,
    },
    /// The identity is on another chip.
    #[error("the identity {identity} is already on the chip {chip} (session {session})")]
    IdentityTaken {
        /// The identity.
        identity: DeviceIdentity,
        /// Who has it.
        chip: ChipId,
        /// From which session.
        session: SessionId,
    },
    /// The device went the whole way before; its key pair is no longer here.
    #[error(
        "the chip {chip} is complete (session {session}); its backup is in the public database: Recovery.GetRecord"
    )]
    AlreadyComplete {
        /// The chip.
        chip: ChipId,
        /// From which session.
        session: SessionId,
    },
    /// There is no such session.
    #[error("there is no session {0}")]
    NoSession(String),
    /// The session is not in a state that allows the call.
    #[error("session {session} is {state:?}{hint}")]
    WrongState {
        /// The session.
        session: SessionId,
        /// Its state.
        state: StateName,
        /// What to do.
        hint: &'static str,
    },
    /// The public database has what the state store does not know: the state store is an old copy.
    #[error("{0}: the state store was rolled back; abort this session and assemble the device anew")]
    RolledBack(Taken),
    /// No pair of the pool.
    #[error(transparent)]
    Pool(PoolError),
    /// The pair that was chosen was taken meanwhile.
    #[error("the key pair that was chosen for this device is no longer there; repeat the call")]
    PairGone,
    /// There is no such record. It says the same, in the same time, of whatever was asked for.
    #[error("there is no such record")]
    NoRecord,
    /// The log has no checkpoint with the record yet, since none could be signed.
    #[error("the log's checkpoint could not be signed: {0}")]
    Unsigned(String),
    /// Too many calls for the same chip wait already.
    #[error("the chip {0} is being worked on by another call")]
    ChipBusy(ChipId),
    /// So many calls are being answered that this one is not begun.
    #[error("{0} calls are being answered already")]
    Overloaded(usize),
    /// The station has begun as many devices as it may.
    #[error("the station {station} {exceeded}")]
    QuotaExceeded {
        /// Which one.
        station: StationName,
        /// Which limit.
        exceeded: Exceeded,
    },
    /// So many of the identities that could be given out are in the public database already.
    #[error(
        "the next {0} identities are in the public database already, as after a rollback of the state store; repeat the call to go on \
        behind them"
    )]
    Identities(usize),
    /// What officers ask of the desk.
    #[error(transparent)]
    Access(AccessError),
    /// A new configuration did not take effect.
    #[error(transparent)]
    Reload(#[from] ReloadError),
    /// The audit log: what cannot be recorded is not done.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The HSM.
    #[error(transparent)]
    Hsm(#[from] HsmError),
    /// A store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What never happens with a valid configuration: a fault of this program or of the module.
    #[error("{doing}: {cause}")]
    Internal {
        /// What was being done.
        doing: &'static str,
        /// The cause's words.
        cause: String,
    },
}

impl ProvisionError {
    /// One wrong field.
    pub fn invalid(field: &'static str, problem: impl std::fmt::Display) -> Self {
        Self::Invalid(vec![FieldViolation::new(field, problem)])
    }

    /// One field that is not accepted.
    pub(crate) fn not_accepted(field: &'static str, problem: impl std::fmt::Display) -> Self {
        Self::NotAccepted(vec![FieldViolation::new(field, problem)])
    }

    /// A fault that is not the caller's.
    pub(crate) fn internal<E: std::fmt::Display>(doing: &'static str) -> impl FnOnce(E) -> Self {
        move |cause| Self::Internal { doing, cause: cause.to_string() }
    }
}

fn list(violations: &[FieldViolation]) -> String {
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
            ReserveError::PairGone => Self::PairGone,
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
            PoolError::TooMany { .. } => Self::invalid("to", error),
            other => Self::Pool(other),
        }
    }
}

impl From<PublishError> for ProvisionError {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::Taken(taken) => Self::RolledBack(taken),
            PublishError::Record(error) => Self::not_accepted("backup_package", error),
            PublishError::Unsigned(why) => Self::Unsigned(why),
            PublishError::Store(error) => Self::Store(error),
        }
    }
}

impl From<BackupRefused> for ProvisionError {
    fn from(error: BackupRefused) -> Self {
        Self::not_accepted("backup_package", error)
    }
}

impl From<ConfirmationRefused> for ProvisionError {
    fn from(error: ConfirmationRefused) -> Self {
        Self::not_accepted("key_confirmation", error)
    }
}

impl From<PackageError> for ProvisionError {
    fn from(error: PackageError) -> Self {
        match error {
            PackageError::TransportKey(problem) => Self::invalid("transport_key", problem),
            other => Self::Internal { doing: "assembling the data package", cause: other.to_string() },
        }
    }
}
