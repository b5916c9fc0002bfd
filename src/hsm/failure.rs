//! What can go wrong with an HSM, in classes that say what helps.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::Duration;

use cryptoki::error::{Error, RvError};
use serde::{Deserialize, Serialize};

use super::return_codes::meaning;

/// What helps against a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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

    /// What cryptoki says, with what was being done, what happened and what to do.
    pub(crate) fn of(doing: &str, error: &Error) -> Self {
        let (rv, function) = match error {
            Error::Pkcs11(rv, function) => (*rv, function),
            Error::LibraryLoading(cause) => {
                let message = format!("{doing}: {cause}; check the library path in the module's profile");
                return Self { class: FailureClass::ModuleLost, message };
            }
            other => return Self { class: FailureClass::Rejected, message: format!("{doing}: {other}") },
        };
        let name = ckr_name(rv);
        let known = meaning(&name);
        let class = known.map_or(FailureClass::Rejected, |meaning| meaning.class);
        let class = OF_MODULE.get().and_then(|of_module| of_module.get(&name)).copied().unwrap_or(class);
        let mut message = format!("{doing}: {name} in C_{function:?}");
        for words in known.iter().flat_map(|meaning| [meaning.happened, meaning.advice]).filter(|w| !w.is_empty()) {
            message.push_str("; ");
            message.push_str(words);
        }
        Self { class, message }
    }
}

/// The classes of return values that this process's module means otherwise.
static OF_MODULE: OnceLock<BTreeMap<String, FailureClass>> = OnceLock::new();

/// From the module's profile, before the module is loaded: a process has one module.
pub(super) fn learn(of_module: BTreeMap<String, FailureClass>) {
    let _ = OF_MODULE.set(of_module);
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
        let told = of(RvError::PinIncorrect).message;
        assert_eq!(
            told,
            "logging in: CKR_PIN_INCORRECT in C_Login; the user PIN is wrong; it is not tried again, since the token could \
             lock: put the right PIN into its file, then `sppctl hsm retry-pin`"
        );
    }

    /// cryptoki's names lead to the table.
    #[test]
    fn what_the_line_meets_most_has_a_meaning() {
        for rv in [
            RvError::FipsSelfTestFailed,
            RvError::RandomNoRng,
            RvError::CryptokiNotInitialized,
            RvError::UnwrappingKeyHandleInvalid,
            RvError::UserPinNotInitialized,
            RvError::SlotIdInvalid,
        ] {
            assert!(meaning(&ckr_name(rv)).is_some(), "{rv:?}");
        }
        assert_eq!(ckr_name(RvError::VendorDefined(0x8000_0001)), "CKR_0x80000001");
    }
}
