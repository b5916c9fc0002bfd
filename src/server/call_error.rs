//! The error type of gRPC and HTTP calls. It wraps the errors of the modules below `server`.

use crate::access::{AccessError, Refused};
use crate::audit::AuditError;
use crate::hsm::HsmError;
use crate::keypool::PoolError;
use crate::provisioning::{FieldViolation, ProvisionError, list_violations};
use crate::server::reload::ReloadError;
use crate::store::StoreError;

/// Why a call failed. Only the server knows every kind of error; each module below knows its own.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// The request is malformed.
    #[error("invalid request: {}", list_violations(.0))]
    Invalid(Vec<FieldViolation>),
    /// The number of calls in progress has reached the limit.
    #[error("overloaded: {0} calls in progress; retry later")]
    Overloaded(usize),
    /// The call's task ended without an answer.
    #[error("the task of the call ended without an answer: {0}")]
    Ended(String),
    /// Provisioning.
    #[error(transparent)]
    Provision(ProvisionError),
    /// The access control.
    #[error(transparent)]
    Access(AccessError),
    /// The pools of key pairs.
    #[error(transparent)]
    Pool(PoolError),
    /// The audit log. An action that cannot be recorded is not performed.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// A new configuration did not take effect.
    #[error(transparent)]
    Reload(ReloadError),
    /// The HSM.
    #[error(transparent)]
    Hsm(HsmError),
    /// A store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl CallError {
    /// An error about one invalid field.
    pub(super) fn invalid(field: &'static str, problem: impl std::fmt::Display) -> Self {
        Self::Invalid(vec![FieldViolation::new(field, problem)])
    }
}

// Each conversion unwraps what another module only passes on, so that an error has one form, wherever it comes from.

impl From<ProvisionError> for CallError {
    fn from(error: ProvisionError) -> Self {
        match error {
            ProvisionError::Invalid(violations) => Self::Invalid(violations),
            ProvisionError::Access(error) => error.into(),
            ProvisionError::Pool(error) => error.into(),
            ProvisionError::Hsm(error) => Self::Hsm(error),
            ProvisionError::Store(error) => Self::Store(error),
            other => Self::Provision(other),
        }
    }
}

impl From<AccessError> for CallError {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Refused(Refused::Quota { station, exceeded }) => {
                Self::Provision(ProvisionError::QuotaExceeded { station, exceeded })
            }
            AccessError::Hsm(error) => Self::Hsm(error),
            AccessError::Store(error) => Self::Store(error),
            other => Self::Access(other),
        }
    }
}

impl From<PoolError> for CallError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::TooMany { .. } => Self::invalid("to", error),
            PoolError::Hsm(error) => Self::Hsm(error),
            PoolError::Store(error) => Self::Store(error),
            other => Self::Pool(other),
        }
    }
}

impl From<ReloadError> for CallError {
    fn from(error: ReloadError) -> Self {
        match error {
            ReloadError::Audit(error) => Self::Audit(error),
            // Not unwrapped: the officer who reloads is shown the store's own message.
            other @ (ReloadError::Refused(_) | ReloadError::Access(_)) => Self::Reload(other),
        }
    }
}
