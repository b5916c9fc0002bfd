//! Failures of an HSM, classified by the recovery action.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::Duration;

use cryptoki::error::{Error, RvError};
use serde::{Deserialize, Serialize};

use super::failure_class::FailureClass;
use super::return_codes::find_return_code;

/// A failure inside the worker, as sent to the handle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) class: FailureClass,
    /// The failed action, its object, and the CKR name if the module returned one.
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(class: FailureClass, message: impl Into<String>) -> Self {
        Self { class, message: message.into() }
    }

    /// Converts a cryptoki error: the failed action, the return value, its cause and the advice.
    pub(crate) fn of(context: &str, error: &Error) -> Self {
        let (rv, function) = match error {
            Error::Pkcs11(rv, function) => (*rv, function),
            Error::LibraryLoading(cause) => {
                let message = format!("{context}: {cause}; check the library path in the module's profile");
                return Self { class: FailureClass::ModuleLost, message };
            }
            other => return Self { class: FailureClass::Rejected, message: format!("{context}: {other}") },
        };
        let name = ckr_name(rv);
        let known = find_return_code(&name);
        let class = known.map_or(FailureClass::Rejected, |meaning| meaning.class);
        let class = CLASS_OVERRIDES.get().and_then(|overrides| overrides.get(&name)).copied().unwrap_or(class);
        let mut message = format!("{context}: {name} in C_{function:?}");
        for words in known.iter().flat_map(|meaning| [meaning.cause, meaning.advice]).filter(|w| !w.is_empty()) {
            message.push_str("; ");
            message.push_str(words);
        }
        Self { class, message }
    }
}

/// Failure classes that the module's profile overrides, by return value.
static CLASS_OVERRIDES: OnceLock<BTreeMap<String, FailureClass>> = OnceLock::new();

/// Sets the overrides of the module's profile, before the module is loaded. A process loads one module.
pub(super) fn set_failure_overrides(overrides: BTreeMap<String, FailureClass>) {
    let _ = CLASS_OVERRIDES.set(overrides);
}

/// Adds the failed action to a cryptoki error.
pub(crate) trait FailureContext<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T> FailureContext<T> for cryptoki::error::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|e| Failure::of(&what(), &e))
    }
}

/// `PinIncorrect` → `CKR_PIN_INCORRECT`; a vendor's value is its number.
fn ckr_name(rv: RvError) -> String {
    if let RvError::VendorDefined(value) | RvError::UnknownErrorCode(value) = rv {
        return format!("CKR_{value:#X}");
    }
    let mut name = String::from("CKR");
    for c in format!("{rv:?}").chars() {
        if c.is_ascii_uppercase() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

/// An error of an [`super::Hsm`] call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HsmError {
    /// The HSM is unreachable or its worker is being replaced; service resumes without intervention.
    #[error("HSM unavailable: {reason}")]
    Unavailable {
        /// The reason, with the CKR name if there is one.
        reason: String,
        /// When to retry.
        retry_after: Duration,
    },
    /// The call queue is full.
    #[error("HSM queue full: {waiting} calls waiting; retry later")]
    Busy {
        /// Number of waiting calls.
        waiting: usize,
    },
    /// The call timed out.
    #[error("HSM call timed out after {0:?}")]
    Deadline(Duration),
    /// An officer must act: wrong PIN, locked token.
    #[error("HSM stopped, an officer must act: {0}")]
    Stopped(String),
    /// The module rejected the request.
    #[error("HSM rejected the request: {0}")]
    Refused(String),
    /// A key that the daemon generated on the token no longer exists: it was destroyed.
    #[error("{0}")]
    Absent(String),
    /// The key manifest and the token differ, or the answer is invalid.
    #[error("invalid HSM answer: {0}")]
    InvalidAnswer(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ckr_name_matches_standard() {
        assert_eq!(ckr_name(RvError::PinIncorrect), "CKR_PIN_INCORRECT");
        assert_eq!(ckr_name(RvError::ObjectHandleInvalid), "CKR_OBJECT_HANDLE_INVALID");
    }

    #[test]
    fn return_values_map_to_failure_classes() {
        let of = |rv| Failure::of("logging in", &Error::Pkcs11(rv, cryptoki::context::Function::Login));
        for rv in [RvError::PinIncorrect, RvError::PinInvalid, RvError::PinLenRange, RvError::PinLocked] {
            assert_eq!(of(rv).class, FailureClass::Permanent, "{rv:?}");
        }
        for rv in [RvError::SessionHandleInvalid, RvError::KeyHandleInvalid, RvError::WrappingKeyHandleInvalid] {
            assert_eq!(of(rv).class, FailureClass::SessionLost, "{rv:?}");
        }
        assert_eq!(of(RvError::DeviceRemoved).class, FailureClass::ModuleLost);
        assert_eq!(of(RvError::GeneralError).class, FailureClass::Transient);
        assert_eq!(of(RvError::VendorDefined(0x8000_0001)).class, FailureClass::Rejected);
        let message = of(RvError::PinIncorrect).message;
        assert_eq!(
            message,
            "logging in: CKR_PIN_INCORRECT in C_Login; the user PIN is wrong; no further attempt is made, because the token \
             could lock: correct the PIN file, then run `sppctl hsm retry-pin`"
        );
    }

    /// Names derived from cryptoki's enum match the names in the table.
    #[test]
    fn cryptoki_names_are_found_in_the_table() {
        for rv in [
            RvError::FipsSelfTestFailed,
            RvError::RandomNoRng,
            RvError::CryptokiNotInitialized,
            RvError::UnwrappingKeyHandleInvalid,
            RvError::UserPinNotInitialized,
            RvError::SlotIdInvalid,
        ] {
            assert!(find_return_code(&ckr_name(rv)).is_some(), "{rv:?}");
        }
        assert_eq!(ckr_name(RvError::VendorDefined(0x8000_0001)), "CKR_0x80000001");
    }
}
