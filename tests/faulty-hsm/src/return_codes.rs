//! Parses PKCS#11 return values by name.

use cryptoki_sys as sys;

macro_rules! values {
    ($($name:ident),* $(,)?) => {
        const VALUES: &[(&str, sys::CK_RV)] = &[$((stringify!($name), sys::$name)),*];
    };
}

values![
    CKR_HOST_MEMORY,
    CKR_SLOT_ID_INVALID,
    CKR_GENERAL_ERROR,
    CKR_FUNCTION_FAILED,
    CKR_ARGUMENTS_BAD,
    CKR_DEVICE_ERROR,
    CKR_DEVICE_MEMORY,
    CKR_DEVICE_REMOVED,
    CKR_FUNCTION_CANCELED,
    CKR_FUNCTION_NOT_SUPPORTED,
    CKR_KEY_HANDLE_INVALID,
    CKR_MECHANISM_INVALID,
    CKR_OBJECT_HANDLE_INVALID,
    CKR_OPERATION_ACTIVE,
    CKR_OPERATION_NOT_INITIALIZED,
    CKR_PIN_INCORRECT,
    CKR_PIN_LOCKED,
    CKR_SESSION_CLOSED,
    CKR_SESSION_COUNT,
    CKR_SESSION_HANDLE_INVALID,
    CKR_TOKEN_NOT_PRESENT,
    CKR_TOKEN_NOT_RECOGNIZED,
    CKR_UNWRAPPING_KEY_HANDLE_INVALID,
    CKR_USER_ALREADY_LOGGED_IN,
    CKR_USER_NOT_LOGGED_IN,
    CKR_WRAPPING_KEY_HANDLE_INVALID,
    CKR_RANDOM_NO_RNG,
    CKR_BUFFER_TOO_SMALL,
    CKR_CRYPTOKI_NOT_INITIALIZED,
];

/// Parses a name (`CKR_DEVICE_ERROR`) or a vendor's value (`0x80000001`).
pub(crate) fn value(name: &str) -> Option<sys::CK_RV> {
    if let Some(digits) = name.strip_prefix("0x") {
        return sys::CK_RV::from_str_radix(digits, 16).ok();
    }
    VALUES.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
}
