//! Identifier types, parsed once at each input (configuration, command line, wire).
//!
//! The daemon uses these types instead of `String`, so that identifiers cannot be swapped. A value is valid by construction and
//! has one text form, which logs, files and the wire use.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a name was refused. The message describes a valid one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(String);

impl NameError {
    /// An error with this message, for names that other modules define.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// The unique chip identifier from the chip's ROM: opaque, 8 to 64 bytes, shown in lower-case hex.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChipId(Vec<u8>);

impl ChipId {
    /// Minimum bytes of a chip ID.
    pub const MIN_LEN: usize = 8;
    /// Maximum bytes of a chip ID.
    pub const MAX_LEN: usize = 64;

    /// Accepts 8 to 64 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NameError> {
        if (Self::MIN_LEN..=Self::MAX_LEN).contains(&bytes.len()) {
            Ok(Self(bytes.to_vec()))
        } else {
            Err(NameError::new(format!(
                "invalid chip ID: expected {} to {} bytes, found {}",
                Self::MIN_LEN,
                Self::MAX_LEN,
                bytes.len()
            )))
        }
    }

    /// The bytes as in the chip's ROM.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl FromStr for ChipId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let bytes = hex::decode(text).map_err(|e| NameError::new(format!("invalid chip ID: expected hex: {e}")))?;
        Self::from_bytes(&bytes)
    }
}

impl fmt::Display for ChipId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

/// The device identity that the certificate binds to the chip. Each kind has one canonical text form, shown below.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DeviceIdentity {
    /// `imei:490154203237518`: 15 digits, the last of them the Luhn check digit (3GPP TS 23.003 §6.2.1).
    Imei(Imei),
    /// `meid:a0000000002329`: 14 hex digits, lower case, the first not below `a` (3GPP2 S.R0048-A).
    Meid(String),
    /// `eui48:0123456789ab`: 12 hex digits, lower case, no separators.
    Eui48([u8; 6]),
    /// `eui64:0123456789abcdef`: 16 hex digits, lower case, no separators.
    Eui64([u8; 8]),
    /// `serial:SN-0001`: 1 to 64 characters of ASN.1 PrintableString (X.520 `serialNumber`).
    Serial(String),
}

/// An IMEI with valid length and check digit.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Imei(String);

impl Imei {
    /// The type allocation code: the first 8 digits.
    pub fn tac(&self) -> &str {
        &self.0[..8]
    }

    /// The serial number within the TAC: digits 9 to 14.
    pub fn snr(&self) -> &str {
        &self.0[8..14]
    }

    /// All 15 digits.
    pub fn digits(&self) -> &str {
        &self.0
    }

    /// The Luhn check digit of 14 digits (3GPP TS 23.003 Annex B); `None` unless there are exactly 14 digits.
    pub fn check_digit(first_14: &str) -> Option<u8> {
        if first_14.len() != 14 || !first_14.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let sum: u32 = first_14
            .bytes()
            .enumerate()
            .map(|(i, b)| {
                let digit = u32::from(b - b'0') * if i % 2 == 1 { 2 } else { 1 };
                digit / 10 + digit % 10
            })
            .sum();
        u8::try_from((10 - sum % 10) % 10).ok()
    }
}

impl DeviceIdentity {
    /// The kind, which is the prefix of the canonical form: `imei`, `meid`, `eui48`, `eui64` or `serial`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Imei(_) => "imei",
            Self::Meid(_) => "meid",
            Self::Eui48(_) => "eui48",
            Self::Eui64(_) => "eui64",
            Self::Serial(_) => "serial",
        }
    }

    /// Refuses a serial number that begins or ends with a space, or has two in a row. Names ignore such spaces (RFC 5280 §7.1),
    /// so two such identities could have one certificate subject. Records of earlier versions may have them; orders may not.
    pub fn check_spaces(&self) -> Result<(), NameError> {
        match self {
            Self::Serial(text) if text.split(' ').any(str::is_empty) => Err(NameError::new(
                "a serial number must not begin or end with a space, or have two in a row: certificates ignore them",
            )),
            _ => Ok(()),
        }
    }

    /// The part after the colon of the canonical form.
    pub fn value(&self) -> String {
        match self {
            Self::Imei(imei) => imei.0.clone(),
            Self::Meid(text) | Self::Serial(text) => text.clone(),
            Self::Eui48(bytes) => hex::encode(bytes),
            Self::Eui64(bytes) => hex::encode(bytes),
        }
    }
}

impl fmt::Display for DeviceIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind(), self.value())
    }
}

impl FromStr for DeviceIdentity {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let (kind, value) = text.split_once(':').ok_or_else(|| {
            NameError::new("invalid device identity: expected KIND:VALUE, for example imei:490154203237518")
        })?;
        match kind {
            "imei" => parse_imei(value).map(Self::Imei),
            "meid" => parse_meid(value).map(Self::Meid),
            "eui48" => parse_hex_exact(value, "EUI-48").map(Self::Eui48),
            "eui64" => parse_hex_exact(value, "EUI-64").map(Self::Eui64),
            "serial" => parse_serial(value).map(Self::Serial),
            _ => Err(NameError::new("unknown kind of device identity: expected imei, meid, eui48, eui64 or serial")),
        }
    }
}

fn parse_imei(value: &str) -> Result<Imei, NameError> {
    if value.len() != 15 || !value.bytes().all(|b| b.is_ascii_digit()) {
        return Err(NameError::new("invalid IMEI: expected exactly 15 digits, including the check digit"));
    }
    let expected = Imei::check_digit(&value[..14]);
    if expected.map(|d| d + b'0') != value.bytes().last() {
        return Err(NameError::new("invalid IMEI: the last digit is not the Luhn check digit of the first 14"));
    }
    Ok(Imei(value.to_owned()))
}

fn parse_meid(value: &str) -> Result<String, NameError> {
    let lower = value.to_ascii_lowercase();
    let hex_digits = lower.len() == 14 && lower.bytes().all(|b| b.is_ascii_hexdigit());
    if !hex_digits || lower.as_bytes()[0] < b'a' {
        return Err(NameError::new("invalid MEID: expected 14 hex digits, the first from a to f"));
    }
    Ok(lower)
}

fn parse_hex_exact<const N: usize>(value: &str, type_name: &str) -> Result<[u8; N], NameError> {
    let mut bytes = [0; N];
    hex::decode_to_slice(value, &mut bytes).map_err(|_| {
        NameError::new(format!("invalid {type_name}: expected exactly {} hex digits without separators", 2 * N))
    })?;
    Ok(bytes)
}

fn parse_serial(value: &str) -> Result<String, NameError> {
    let printable = |b: u8| b.is_ascii_alphanumeric() || b" '()+,-./:=?".contains(&b);
    if (1..=64).contains(&value.len()) && value.bytes().all(printable) {
        Ok(value.to_owned())
    } else {
        Err(NameError::new(
            "invalid serial: expected 1 to 64 characters of PrintableString: letters, digits, space and '()+,-./:=?",
        ))
    }
}

/// Checks an assigned name: lower-case letters, digits, `-`, `_` and `.`, with parts separated by `/` if allowed.
fn check_assigned_name(text: &str, type_name: &str, separators: bool) -> Result<(), NameError> {
    let is_valid_part = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b))
            && part.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
    };
    let is_valid =
        text.len() <= 64 && if separators { text.split('/').all(is_valid_part) } else { is_valid_part(text) };
    if is_valid {
        return Ok(());
    }
    let slash = if separators { ", parts separated by /" } else { "" };
    Err(NameError::new(format!(
        "invalid {type_name}: expected 1 to 64 lower-case letters, digits and - _ . starting with a letter or digit{slash}"
    )))
}

macro_rules! assigned_name {
    ($(#[$doc:meta])* $name:ident, $type_name:literal, separators: $separators:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                check_assigned_name(text, $type_name, $separators)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

assigned_name!(
    /// The name of a station, for example `line-3/a`; the part after `spp://station/` in its certificate.
    StationName, "station name", separators: true
);
assigned_name!(
    /// The name of an officer; the part after `spp://officer/` in the certificate.
    OfficerName, "officer name", separators: true
);
assigned_name!(
    /// The name of an auditor; the part after `spp://auditor/` in the certificate.
    AuditorName, "auditor name", separators: true
);
assigned_name!(
    /// The name of a back office system; the part after `spp://back-office/` in its certificate.
    BackOfficeName, "back office name", separators: true
);
assigned_name!(
    /// The name of a monitor; the part after `spp://monitor/` in its certificate.
    MonitorName, "monitor name", separators: true
);
assigned_name!(
    /// The name of a profile.
    ProfileName, "profile name", separators: false
);
assigned_name!(
    /// The name of a key in the HSM: its `CKA_LABEL`, unique on the token for its object class.
    KeyName, "key name", separators: false
);

/// The identifier of a session: 16 random bytes from the HSM, shown in lower-case hex.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId([u8; 16]);

impl SessionId {
    /// Bytes of a session ID.
    pub const LEN: usize = 16;

    /// Accepts exactly 16 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NameError> {
        bytes.try_into().map(Self).map_err(|_| {
            NameError::new(format!("invalid session ID: expected {} bytes, found {}", Self::LEN, bytes.len()))
        })
    }

    /// The bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl FromStr for SessionId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        parse_hex_exact(text, "session ID").map(Self)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// Implements `Debug`, `Serialize` and `Deserialize` with the text form.
macro_rules! text_form {
    ($($name:ty),+) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )+};
}
pub(crate) use text_form;

text_form!(ChipId, DeviceIdentity, StationName, OfficerName, AuditorName, BackOfficeName, MonitorName);
text_form!(ProfileName, KeyName, SessionId);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn imei_with_wrong_length_or_check_digit_is_refused() {
        assert!("imei:490154203237518".parse::<DeviceIdentity>().is_ok());
        for wrong in ["imei:490154203237517", "imei:49015420323751", "imei:4901542032375180", "imei:49015420323751x"] {
            assert!(wrong.parse::<DeviceIdentity>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn imei_has_tac_and_serial_number() {
        let Ok(DeviceIdentity::Imei(imei)) = "imei:490154203237518".parse() else { unreachable!() };
        assert_eq!((imei.tac(), imei.snr()), ("49015420", "323751"));
    }

    #[test]
    fn identity_has_one_canonical_text_form() {
        for (input, canonical) in [
            ("meid:A0000000002329", "meid:a0000000002329"),
            ("eui48:0123456789AB", "eui48:0123456789ab"),
            ("eui64:0123456789ABCDEF", "eui64:0123456789abcdef"),
            ("serial:SN-0001/A", "serial:SN-0001/A"),
        ] {
            assert_eq!(input.parse::<DeviceIdentity>().map(|i| i.to_string()), Ok(canonical.to_owned()));
        }
        for wrong in ["", "imei", "mac:00", "eui48:01:23:45:67:89:ab", "serial:", "serial:a@b", "meid:10000000002329"] {
            assert!(wrong.parse::<DeviceIdentity>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn insignificant_spaces_of_serial_found() {
        let has = |text: &str| text.parse::<DeviceIdentity>().unwrap().check_spaces().is_err();
        assert!(["serial: a", "serial:a ", "serial:a  b", "serial: "].into_iter().all(has));
        assert!(!["serial:a", "serial:a b", "serial:a b c", "imei:490154203237518"].into_iter().any(has));
    }

    #[test]
    fn chip_id_length_is_8_to_64_bytes() {
        assert!(ChipId::from_bytes(&[1; 7]).is_err());
        assert!(ChipId::from_bytes(&[1; 8]).is_ok());
        assert!(ChipId::from_bytes(&[1; 64]).is_ok());
        assert!(ChipId::from_bytes(&[1; 65]).is_err());
    }

    #[test]
    fn profile_name_with_separator_is_refused() {
        assert!("line-3/a".parse::<StationName>().is_ok());
        for wrong in ["", "/a", "a/", "a//b", "A", "a b", "../x", "-a"] {
            assert!(wrong.parse::<StationName>().is_err(), "{wrong}");
        }
        assert!("a/b".parse::<ProfileName>().is_err());
    }

    proptest! {
        #[test]
        fn chip_id_text_form_roundtrips(bytes in proptest::collection::vec(any::<u8>(), 8..=64)) {
            let chip = ChipId::from_bytes(&bytes).unwrap();
            prop_assert_eq!(chip.to_string().parse::<ChipId>().unwrap(), chip);
        }

        #[test]
        fn identity_text_form_roundtrips(text in "(imei|meid|eui48|eui64|serial):[ -~]{0,70}") {
            if let Ok(identity) = text.parse::<DeviceIdentity>() {
                prop_assert_eq!(identity.to_string().parse::<DeviceIdentity>().unwrap(), identity);
            }
        }

        #[test]
        fn imei_with_wrong_check_digit_is_refused(first in "[0-9]{14}", wrong in 0u8..10) {
            let right = Imei::check_digit(&first).unwrap();
            let parsed = format!("imei:{first}{wrong}").parse::<DeviceIdentity>();
            prop_assert_eq!(parsed.is_ok(), wrong == right);
        }
    }
}
