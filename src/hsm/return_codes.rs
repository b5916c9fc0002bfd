//! The table of PKCS#11 return values (v3.0 §5.1): failure class, cause and advice for each.

use super::failure_class::FailureClass::{self, ModuleLost, Permanent, Rejected, SessionLost, Transient};

/// A PKCS#11 return value with its explanation.
pub(crate) struct ReturnCode {
    /// The name in the standard.
    pub(crate) name: &'static str,
    pub(crate) class: FailureClass,
    /// The cause.
    pub(crate) cause: &'static str,
    /// The recommended action; empty if none is needed.
    pub(crate) advice: &'static str,
}

const fn code(name: &'static str, class: FailureClass, cause: &'static str, advice: &'static str) -> ReturnCode {
    ReturnCode { name, class, cause, advice }
}

/// Finds a return value by its name. A value that is not in the table, for example a vendor's, counts as `Rejected` unless the
/// module's profile overrides it.
pub(crate) fn find_return_code(name: &str) -> Option<&'static ReturnCode> {
    TABLE.iter().find(|code| code.name == name)
}

const RECONNECT: &str =
    "check that the HSM is connected, powered on and not being updated; service resumes without a restart";
const SESSION: &str = "a new session is opened";
const KEYS: &str = "handles are looked up again";
const PROFILE: &str = "compare the module's profile with `sppctl hsm check`";
const NO_RETRY: &str =
    "no further attempt is made, because the token could lock: correct the PIN file, then run `sppctl hsm retry-pin`";

/// `CKR_GENERAL_ERROR` is transient, because SoftHSM also returns it for a damaged wrapped key. The worker is replaced only after
/// consecutive failures.
const TABLE: &[ReturnCode] = &[
    // The PIN.
    code("CKR_PIN_INCORRECT", Permanent, "the user PIN is wrong", NO_RETRY),
    code("CKR_PIN_INVALID", Permanent, "the PIN has characters that the token does not allow", NO_RETRY),
    code("CKR_PIN_LEN_RANGE", Permanent, "the PIN is longer or shorter than the token allows", NO_RETRY),
    code(
        "CKR_PIN_LOCKED",
        Permanent,
        "the user PIN is locked",
        "the token's security officer must set a new one (C_InitPIN)",
    ),
    code("CKR_PIN_EXPIRED", Permanent, "the user PIN has expired", "set a new one with the vendor's tool"),
    code("CKR_PIN_TOO_WEAK", Permanent, "the token requires a stronger PIN", "set a new one with the vendor's tool"),
    code("CKR_USER_PIN_NOT_INITIALIZED", Permanent, "the token has no user PIN", "initialise it: `sppctl token init`"),
    code(
        "CKR_USER_ANOTHER_ALREADY_LOGGED_IN",
        ModuleLost,
        "another user is logged in",
        "log the security officer out of the token",
    ),
    code(
        "CKR_USER_TOO_MANY_TYPES",
        ModuleLost,
        "another user is logged in",
        "log the security officer out of the token",
    ),
    code("CKR_USER_TYPE_INVALID", Rejected, "the token has no such user", PROFILE),
    code("CKR_USER_ALREADY_LOGGED_IN", Transient, "the user is logged in already", ""),
    // Sessions and handles.
    code("CKR_SESSION_HANDLE_INVALID", SessionLost, "the session does not exist", SESSION),
    code("CKR_SESSION_CLOSED", SessionLost, "the session was closed", SESSION),
    code("CKR_USER_NOT_LOGGED_IN", SessionLost, "the user was logged out, or the token was reset", SESSION),
    code("CKR_OBJECT_HANDLE_INVALID", SessionLost, "an object was removed, or the token was reset", KEYS),
    code("CKR_KEY_HANDLE_INVALID", SessionLost, "a key was removed, or the token was reset", KEYS),
    code("CKR_WRAPPING_KEY_HANDLE_INVALID", SessionLost, "a wrapping key was removed, or the token was reset", KEYS),
    code("CKR_UNWRAPPING_KEY_HANDLE_INVALID", SessionLost, "a wrapping key was removed, or the token was reset", KEYS),
    code("CKR_OPERATION_ACTIVE", SessionLost, "another operation is active in the session", SESSION),
    code("CKR_OPERATION_NOT_INITIALIZED", SessionLost, "no operation is active in the session", SESSION),
    code(
        "CKR_SESSION_COUNT",
        Transient,
        "the token has no free session",
        "end other programs that use it, or set fewer threads in the module's profile",
    ),
    code("CKR_SESSION_READ_ONLY", Rejected, "the session cannot write", PROFILE),
    code("CKR_SESSION_EXISTS", Rejected, "the token is in use", "stop sppd and other programs that use it"),
    // The module and its token.
    code("CKR_CRYPTOKI_NOT_INITIALIZED", ModuleLost, "the module has shut down", RECONNECT),
    code("CKR_DEVICE_ERROR", ModuleLost, "the HSM has failed", RECONNECT),
    code("CKR_DEVICE_REMOVED", ModuleLost, "the HSM or its token was removed", RECONNECT),
    code("CKR_TOKEN_NOT_PRESENT", ModuleLost, "the slot has no token", RECONNECT),
    code("CKR_TOKEN_NOT_RECOGNIZED", ModuleLost, "the module does not recognise the token", RECONNECT),
    code("CKR_SLOT_ID_INVALID", ModuleLost, "the slot does not exist", RECONNECT),
    code("CKR_TOKEN_WRITE_PROTECTED", Rejected, "the token is write-protected", "remove the write protection"),
    code("CKR_GENERAL_ERROR", Transient, "the module failed without a reason", "see the vendor's log"),
    code("CKR_FUNCTION_FAILED", Transient, "the call failed without a reason", "see the vendor's log"),
    code("CKR_FUNCTION_CANCELED", Transient, "the call was cancelled", ""),
    code("CKR_CANCEL", Transient, "the call was cancelled", ""),
    code("CKR_FUNCTION_REJECTED", Permanent, "an operator rejected the call at the HSM", "ask the HSM's operator"),
    code("CKR_HOST_MEMORY", Transient, "the module is out of memory", "check the memory of this machine"),
    code("CKR_DEVICE_MEMORY", Transient, "the HSM is out of memory", "destroy unused objects"),
    code("CKR_RANDOM_NO_RNG", Rejected, "the token has no random number generator", "use an HSM that has one"),
    code("CKR_LIBRARY_LOAD_FAILED", ModuleLost, "the module lacks a library", "install the vendor's complete client"),
    code("CKR_CANT_LOCK", Rejected, "the module cannot be used by several threads", PROFILE),
    code("CKR_NEED_TO_CREATE_THREADS", Rejected, "the module must create its own threads", PROFILE),
    code(
        "CKR_FIPS_SELF_TEST_FAILED",
        ModuleLost,
        "the HSM failed its self-tests",
        "contact the vendor; nothing is signed until the tests pass",
    ),
    code("CKR_MUTEX_BAD", ModuleLost, "the module's locks are broken", ""),
    code("CKR_MUTEX_NOT_LOCKED", ModuleLost, "the module's locks are broken", ""),
    // The request.
    code(
        "CKR_MECHANISM_INVALID",
        Rejected,
        "the module does not have this mechanism",
        "`sppctl hsm check` shows what is missing",
    ),
    code("CKR_MECHANISM_PARAM_INVALID", Rejected, "the module does not accept these parameters", PROFILE),
    code(
        "CKR_FUNCTION_NOT_SUPPORTED",
        Rejected,
        "the module does not have this function",
        "`sppctl hsm check` shows what is missing",
    ),
    code("CKR_CURVE_NOT_SUPPORTED", Rejected, "the module does not have this curve", "choose another key type"),
    code("CKR_KEY_SIZE_RANGE", Rejected, "the module has no keys of this size", "choose another key type"),
    code("CKR_KEY_TYPE_INCONSISTENT", Rejected, "the key has another type", "make a new one: `sppctl ceremony run`"),
    code(
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        Rejected,
        "the key may not be used for this",
        "make a new one: `sppctl ceremony run`",
    ),
    code(
        "CKR_KEY_NOT_WRAPPABLE",
        Rejected,
        "the module cannot wrap keys of this type",
        "add the key type to `unwrappable` in the module's profile",
    ),
    code("CKR_KEY_UNEXTRACTABLE", Rejected, "the key is not extractable", ""),
    code("CKR_WRAPPED_KEY_INVALID", Rejected, "a wrapped key is damaged, or was wrapped under another key", ""),
    code("CKR_WRAPPED_KEY_LEN_RANGE", Rejected, "a wrapped key is damaged", ""),
    code("CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT", Rejected, "the wrapping key has another type", PROFILE),
    code("CKR_UNWRAPPING_KEY_SIZE_RANGE", Rejected, "the wrapping key has another size", PROFILE),
    code("CKR_WRAPPING_KEY_TYPE_INCONSISTENT", Rejected, "the wrapping key has another type", PROFILE),
    code("CKR_WRAPPING_KEY_SIZE_RANGE", Rejected, "the wrapping key has another size", PROFILE),
    code("CKR_ATTRIBUTE_TYPE_INVALID", Rejected, "the module does not know an attribute", PROFILE),
    code("CKR_ATTRIBUTE_VALUE_INVALID", Rejected, "the module does not accept an attribute's value", PROFILE),
    code("CKR_ATTRIBUTE_READ_ONLY", Rejected, "the module sets an attribute itself", PROFILE),
    code("CKR_ATTRIBUTE_SENSITIVE", Rejected, "the attribute is a secret of the HSM", ""),
    code("CKR_TEMPLATE_INCONSISTENT", Rejected, "the module does not accept this combination of attributes", PROFILE),
    code("CKR_TEMPLATE_INCOMPLETE", Rejected, "the module requires more attributes", PROFILE),
    code("CKR_ACTION_PROHIBITED", Rejected, "the token's rules forbid it", "ask the token's security officer"),
    code("CKR_DOMAIN_PARAMS_INVALID", Rejected, "the module does not accept this curve", "choose another key type"),
    code("CKR_ARGUMENTS_BAD", Rejected, "the module does not accept these arguments", PROFILE),
    code("CKR_DATA_INVALID", Rejected, "the module does not accept this data", ""),
    code("CKR_DATA_LEN_RANGE", Rejected, "the module does not accept data of this length", ""),
    // cryptoki queries the length first, so a buffer is too small only if the module then returns more.
    code("CKR_BUFFER_TOO_SMALL", Transient, "the module returned more bytes than it had announced", ""),
    code("CKR_ENCRYPTED_DATA_INVALID", Rejected, "the encrypted data is damaged", ""),
    code("CKR_SIGNATURE_INVALID", Rejected, "the signature is invalid", ""),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn return_value_names_are_unique() {
        let mut names = std::collections::BTreeSet::new();
        for code in TABLE {
            assert!(code.name.starts_with("CKR_") && names.insert(code.name), "{}", code.name);
            assert!(!code.cause.is_empty(), "{}", code.name);
        }
    }

    #[test]
    fn permanent_return_values_have_advice() {
        for code in TABLE.iter().filter(|code| code.class == Permanent) {
            assert!(!code.advice.is_empty(), "{}", code.name);
        }
    }
}
