//! What can go wrong with an HSM, in classes that say what helps, and the one table from CKR codes to them.

use std::time::Duration;

use cryptoki::error::{Error, RvError};
use serde::{Deserialize, Serialize};

/// What helps against a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureClass {
    /// Trying again.
    Transient,
    /// A new session, a login and new handles.
    SessionLost,
    /// A new worker process.
    ModuleLost,
    /// An officer. Trying again could lock the token.
    Permanent,
    /// Nothing: the request itself is wrong for this module.
    Rejected,
    /// Nothing: the key that the daemon made on the token is no longer there.
    Absent,
}

/// A failure inside the worker, as it travels to the handle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) class: FailureClass,
    /// What was being done, to what, and the CKR name if the module gave one.
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(class: FailureClass, message: impl Into<String>) -> Self {
        Self { class, message: message.into() }
    }

    /// What cryptoki says, with what was being done.
    pub(crate) fn of(doing: &str, error: &Error) -> Self {
        let (class, hint) = classify(error);
        let name = match error {
            Error::Pkcs11(rv, function) => format!("{} in {function:?}", ckr_name(*rv)),
            other => other.to_string(),
        };
        let hint = if hint.is_empty() { String::new() } else { format!("; {hint}") };
        Self { class, message: format!("{doing}: {name}{hint}") }
    }
}

/// Adds what was being done to a result of cryptoki.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T> Doing<T> for cryptoki::error::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|e| Failure::of(&what(), &e))
    }
}

/// `PinIncorrect` → `CKR_PIN_INCORRECT`.
fn ckr_name(rv: RvError) -> String {
    let camel = format!("{rv:?}");
    let mut name = String::from("CKR");
    for c in camel.chars() {
        if c.is_ascii_uppercase() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

/// The one table. `GENERAL_ERROR` is what SoftHSM says to a damaged wrapped key too, so it must not cost the worker.
fn classify(error: &Error) -> (FailureClass, &'static str) {
    use FailureClass::{ModuleLost, Permanent, Rejected, SessionLost, Transient};
    let Error::Pkcs11(rv, _) = error else {
        return match error {
            Error::LibraryLoading(_) => (ModuleLost, "check the library path in the module's profile"),
            _ => (Rejected, ""),
        };
    };
    match rv {
        RvError::PinIncorrect => {
            (Permanent, "the user PIN is wrong; it is not tried again, since the token could lock")
        }
        RvError::PinLocked => (Permanent, "the user PIN is locked; the security officer must unlock it"),
        RvError::PinInvalid | RvError::PinLenRange => {
            (Permanent, "the user PIN cannot be one of this token; it is not tried again, since the token could lock")
        }
        RvError::PinExpired => (Permanent, "the user PIN has expired; the security officer must set a new one"),
        RvError::UserPinNotInitialized => (Permanent, "the token has no user PIN; initialise it first"),
        RvError::SessionHandleInvalid
        | RvError::SessionClosed
        | RvError::ObjectHandleInvalid
        | RvError::KeyHandleInvalid
        | RvError::WrappingKeyHandleInvalid
        | RvError::UnwrappingKeyHandleInvalid
        | RvError::UserNotLoggedIn
        | RvError::OperationActive
        | RvError::OperationNotInitialized => (SessionLost, ""),
        RvError::CryptokiNotInitialized
        | RvError::DeviceError
        | RvError::DeviceRemoved
        | RvError::TokenNotPresent
        | RvError::TokenNotRecognized
        | RvError::SlotIdInvalid => (ModuleLost, "the HSM or its token is away"),
        RvError::GeneralError
        | RvError::FunctionFailed
        | RvError::HostMemory
        | RvError::DeviceMemory
        | RvError::SessionCount
        | RvError::FunctionCanceled => (Transient, ""),
        RvError::MechanismInvalid => (Rejected, "the module does not have this mechanism"),
        _ => (Rejected, ""),
    }
}

/// What a caller of [`super::Hsm`] gets when a verb did not work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HsmError {
    /// The HSM is away or its worker is being replaced; service resumes without help.
    #[error("the HSM is not available now: {why}")]
    Unavailable {
        /// Why, with the CKR name if there is one.
        why: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// Too many calls wait already.
    #[error("the HSM's queue is full ({waiting} calls)")]
    Busy {
        /// Calls that wait.
        waiting: usize,
    },
    /// The answer did not come in time.
    #[error("the HSM did not answer within {0:?}")]
    Deadline(Duration),
    /// An officer has to act: wrong PIN, locked token.
    #[error("the HSM needs an officer: {0}")]
    Stopped(String),
    /// The module cannot do what was asked.
    #[error("the HSM refused: {0}")]
    Refused(String),
    /// A key that the daemon made on the token is not there: it was destroyed.
    #[error("{0}")]
    Absent(String),
    /// The register of keys and the token disagree, or what came back is not what was asked for.
    #[error("the HSM's answer is not right: {0}")]
    Wrong(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ckr_keeps_its_name() {
        assert_eq!(ckr_name(RvError::PinIncorrect), "CKR_PIN_INCORRECT");
        assert_eq!(ckr_name(RvError::ObjectHandleInvalid), "CKR_OBJECT_HANDLE_INVALID");
    }

    #[test]
    fn a_wrong_pin_is_permanent_and_a_lost_session_is_not() {
        let class = |rv| classify(&Error::Pkcs11(rv, cryptoki::context::Function::Login)).0;
        for rv in [RvError::PinIncorrect, RvError::PinInvalid, RvError::PinLenRange, RvError::PinLocked] {
            assert_eq!(class(rv), FailureClass::Permanent, "{rv:?}");
        }
        for rv in [RvError::SessionHandleInvalid, RvError::KeyHandleInvalid, RvError::WrappingKeyHandleInvalid] {
            assert_eq!(class(rv), FailureClass::SessionLost, "{rv:?}");
        }
        assert_eq!(class(RvError::DeviceRemoved), FailureClass::ModuleLost);
        assert_eq!(class(RvError::GeneralError), FailureClass::Transient);
    }
}
