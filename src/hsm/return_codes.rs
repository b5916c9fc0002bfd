//! The one table of PKCS#11 return values (v3.0 §5.1): what each means here, in classes that say what helps.

use super::failure::FailureClass::{self, ModuleLost, Permanent, Rejected, SessionLost, Transient};

/// A return value for people.
pub(crate) struct ReturnCode {
    /// Its name in the standard.
    pub(crate) name: &'static str,
    pub(crate) class: FailureClass,
    /// What happened.
    pub(crate) happened: &'static str,
    /// What to do, if anybody must do anything.
    pub(crate) advice: &'static str,
}

const fn is(name: &'static str, class: FailureClass, happened: &'static str, advice: &'static str) -> ReturnCode {
    ReturnCode { name, class, happened, advice }
}

/// The meaning of a return value by its name. One that is not in the table, a vendor's say, is taken for a refusal, unless the
/// module's profile knows better.
pub(crate) fn meaning(name: &str) -> Option<&'static ReturnCode> {
    TABLE.iter().find(|meaning| meaning.name == name)
}

const PLUG: &str = "see that the HSM is connected, switched on and not being updated; service goes on by itself";
const SESSION: &str = "a new session is opened";
const KEYS: &str = "handles are looked up again";
const PROFILE: &str = "compare the module's profile with `sppctl hsm check`";
const NOT_AGAIN: &str =
    "it is not tried again, since the token could lock: put the right PIN into its file, then `sppctl hsm retry-pin`";

/// `CKR_GENERAL_ERROR` is what SoftHSM says to a damaged wrapped key, too, so it must not cost the worker; nothing but failures for
/// a while does.
const TABLE: &[ReturnCode] = &[
    // The PIN.
    is("CKR_PIN_INCORRECT", Permanent, "the user PIN is wrong", NOT_AGAIN),
    is("CKR_PIN_INVALID", Permanent, "the PIN has characters that no PIN of this token has", NOT_AGAIN),
    is("CKR_PIN_LEN_RANGE", Permanent, "the PIN is longer or shorter than any of this token", NOT_AGAIN),
    is(
        "CKR_PIN_LOCKED",
        Permanent,
        "the user PIN is locked",
        "the token's security officer must set a new one (C_InitPIN)",
    ),
    is("CKR_PIN_EXPIRED", Permanent, "the user PIN has expired", "set a new one with the vendor's tool"),
    is("CKR_PIN_TOO_WEAK", Permanent, "the token wants another PIN", "set a new one with the vendor's tool"),
    is("CKR_USER_PIN_NOT_INITIALIZED", Permanent, "the token has no user PIN", "initialise it: `sppctl token init`"),
    is(
        "CKR_USER_ANOTHER_ALREADY_LOGGED_IN",
        ModuleLost,
        "another user is logged in",
        "log the security officer out of the token",
    ),
    is("CKR_USER_TOO_MANY_TYPES", ModuleLost, "another user is logged in", "log the security officer out of the token"),
    is("CKR_USER_TYPE_INVALID", Rejected, "the token has no such user", PROFILE),
    is("CKR_USER_ALREADY_LOGGED_IN", Transient, "the user is logged in already", ""),
    // Sessions and handles.
    is("CKR_SESSION_HANDLE_INVALID", SessionLost, "the session is gone", SESSION),
    is("CKR_SESSION_CLOSED", SessionLost, "the session was closed", SESSION),
    is("CKR_USER_NOT_LOGGED_IN", SessionLost, "somebody logged the user out, or the token was reset", SESSION),
    is("CKR_OBJECT_HANDLE_INVALID", SessionLost, "an object is gone, or the token was reset", KEYS),
    is("CKR_KEY_HANDLE_INVALID", SessionLost, "a key is gone, or the token was reset", KEYS),
    is("CKR_WRAPPING_KEY_HANDLE_INVALID", SessionLost, "a wrapping key is gone, or the token was reset", KEYS),
    is("CKR_UNWRAPPING_KEY_HANDLE_INVALID", SessionLost, "a wrapping key is gone, or the token was reset", KEYS),
    is("CKR_OPERATION_ACTIVE", SessionLost, "the session is in the middle of something else", SESSION),
    is("CKR_OPERATION_NOT_INITIALIZED", SessionLost, "the session has forgotten what it was doing", SESSION),
    is(
        "CKR_SESSION_COUNT",
        Transient,
        "the token has no session left",
        "end other programs that use it, or set fewer threads in the module's profile",
    ),
    is("CKR_SESSION_READ_ONLY", Rejected, "the session cannot write", PROFILE),
    is("CKR_SESSION_EXISTS", Rejected, "the token is in use", "stop sppd and other programs that use it"),
    // The module and its token.
    is("CKR_CRYPTOKI_NOT_INITIALIZED", ModuleLost, "the module has shut down", PLUG),
    is("CKR_DEVICE_ERROR", ModuleLost, "the HSM has failed", PLUG),
    is("CKR_DEVICE_REMOVED", ModuleLost, "the HSM or its token was taken away", PLUG),
    is("CKR_TOKEN_NOT_PRESENT", ModuleLost, "there is no token in the slot", PLUG),
    is("CKR_TOKEN_NOT_RECOGNIZED", ModuleLost, "the module does not know this token", PLUG),
    is("CKR_SLOT_ID_INVALID", ModuleLost, "the slot is gone", PLUG),
    is("CKR_TOKEN_WRITE_PROTECTED", Rejected, "the token cannot be written", "lift its write protection"),
    is("CKR_GENERAL_ERROR", Transient, "the module failed and does not say why", "see the vendor's log"),
    is("CKR_FUNCTION_FAILED", Transient, "the call failed and the module does not say why", "see the vendor's log"),
    is("CKR_FUNCTION_CANCELED", Transient, "the call was cancelled", ""),
    is("CKR_CANCEL", Transient, "the call was cancelled", ""),
    is("CKR_FUNCTION_REJECTED", Permanent, "a person at the HSM refused", "ask who keeps the HSM"),
    is("CKR_HOST_MEMORY", Transient, "the module has no memory left", "look at the memory of this machine"),
    is("CKR_DEVICE_MEMORY", Transient, "the HSM has no memory left", "destroy objects that nobody needs"),
    is("CKR_RANDOM_NO_RNG", Rejected, "the token gives no random numbers", "this product needs an HSM that does"),
    is("CKR_LIBRARY_LOAD_FAILED", ModuleLost, "the module lacks a library", "install the vendor's whole client"),
    is("CKR_CANT_LOCK", Rejected, "the module cannot be used by several threads", PROFILE),
    is("CKR_NEED_TO_CREATE_THREADS", Rejected, "the module must start threads of its own", PROFILE),
    is(
        "CKR_FIPS_SELF_TEST_FAILED",
        ModuleLost,
        "the HSM failed its own tests",
        "ask the vendor; until then nothing is signed",
    ),
    is("CKR_MUTEX_BAD", ModuleLost, "the module's locks are broken", ""),
    is("CKR_MUTEX_NOT_LOCKED", ModuleLost, "the module's locks are broken", ""),
    // What was asked for.
    is(
        "CKR_MECHANISM_INVALID",
        Rejected,
        "the module does not have this mechanism",
        "`sppctl hsm check` tells what is missing",
    ),
    is("CKR_MECHANISM_PARAM_INVALID", Rejected, "the module does not take these parameters", PROFILE),
    is(
        "CKR_FUNCTION_NOT_SUPPORTED",
        Rejected,
        "the module does not have this function",
        "`sppctl hsm check` tells what is missing",
    ),
    is("CKR_CURVE_NOT_SUPPORTED", Rejected, "the module does not have this curve", "choose another kind of key"),
    is("CKR_KEY_SIZE_RANGE", Rejected, "the module has no keys of this size", "choose another kind of key"),
    is("CKR_KEY_TYPE_INCONSISTENT", Rejected, "the key is of another type", "make a new one: `sppctl ceremony run`"),
    is(
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        Rejected,
        "the key may not be used for this",
        "make a new one: `sppctl ceremony run`",
    ),
    is(
        "CKR_KEY_NOT_WRAPPABLE",
        Rejected,
        "the module cannot wrap such keys",
        "name the kind in `unwrappable` of the module's profile",
    ),
    is("CKR_KEY_UNEXTRACTABLE", Rejected, "the key does not leave the HSM", ""),
    is("CKR_WRAPPED_KEY_INVALID", Rejected, "a wrapped key is damaged, or was wrapped under another key", ""),
    is("CKR_WRAPPED_KEY_LEN_RANGE", Rejected, "a wrapped key is damaged", ""),
    is("CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT", Rejected, "the wrapping key is of another type", PROFILE),
    is("CKR_UNWRAPPING_KEY_SIZE_RANGE", Rejected, "the wrapping key has another size", PROFILE),
    is("CKR_WRAPPING_KEY_TYPE_INCONSISTENT", Rejected, "the wrapping key is of another type", PROFILE),
    is("CKR_WRAPPING_KEY_SIZE_RANGE", Rejected, "the wrapping key has another size", PROFILE),
    is("CKR_ATTRIBUTE_TYPE_INVALID", Rejected, "the module does not know an attribute", PROFILE),
    is("CKR_ATTRIBUTE_VALUE_INVALID", Rejected, "the module does not take an attribute's value", PROFILE),
    is("CKR_ATTRIBUTE_READ_ONLY", Rejected, "the module sets an attribute itself", PROFILE),
    is("CKR_ATTRIBUTE_SENSITIVE", Rejected, "the attribute is a secret of the HSM", ""),
    is("CKR_TEMPLATE_INCONSISTENT", Rejected, "the module does not take these attributes together", PROFILE),
    is("CKR_TEMPLATE_INCOMPLETE", Rejected, "the module wants more attributes", PROFILE),
    is("CKR_ACTION_PROHIBITED", Rejected, "the token's rules forbid it", "ask the token's security officer"),
    is("CKR_DOMAIN_PARAMS_INVALID", Rejected, "the module does not take this curve", "choose another kind of key"),
    is("CKR_ARGUMENTS_BAD", Rejected, "the module does not take these arguments", PROFILE),
    is("CKR_DATA_INVALID", Rejected, "the module does not take these data", ""),
    is("CKR_DATA_LEN_RANGE", Rejected, "the module does not take so many bytes", ""),
    // cryptoki asks for the length first, so a buffer is never too small unless the module has changed its mind.
    is("CKR_BUFFER_TOO_SMALL", Transient, "the module gave more than it had announced", ""),
    is("CKR_ENCRYPTED_DATA_INVALID", Rejected, "what was encrypted is damaged", ""),
    is("CKR_SIGNATURE_INVALID", Rejected, "the signature is wrong", ""),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_return_value_has_one_meaning() {
        let mut names = std::collections::BTreeSet::new();
        for meaning in TABLE {
            assert!(meaning.name.starts_with("CKR_") && names.insert(meaning.name), "{}", meaning.name);
            assert!(!meaning.happened.is_empty(), "{}", meaning.name);
        }
    }

    #[test]
    fn whatever_an_officer_must_help_with_says_how() {
        for meaning in TABLE.iter().filter(|meaning| meaning.class == Permanent) {
            assert!(!meaning.advice.is_empty(), "{}", meaning.name);
        }
    }
}
