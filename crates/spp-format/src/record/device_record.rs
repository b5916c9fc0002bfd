//! The public record of one device.

use std::time::{Duration, SystemTime};

use ciborium::Value;

use super::fields::{EntryFormat, RecordError};
use crate::names::{ChipId, DeviceIdentity, NameError, ProfileName, SessionId};

static FORMAT: EntryFormat = EntryFormat { name: "a device record", version: 1, max_len: DeviceRecord::MAX_LEN };

/// A record of the public database (`device-record` in `proto/data-package.cddl`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRecord {
    /// The chip ID.
    pub chip: ChipId,
    /// The identity bound to it.
    pub identity: DeviceIdentity,
    /// The product's profile.
    pub profile: ProfileName,
    /// X.509 in DER, or a CWT.
    pub certificate: Vec<u8>,
    /// Whether `certificate` is a CWT.
    pub certificate_is_cwt: bool,
    /// The certificate's serial number, or the CWT's `cti`.
    pub serial: Vec<u8>,
    /// The device's public key, SubjectPublicKeyInfo in DER, if it has one.
    pub public_key: Option<Vec<u8>>,
    /// The backup package. Only the chip can decrypt it.
    pub backup: Vec<u8>,
    /// The version of the master key; 0 if the profile has no symmetric key.
    pub master_key_version: u32,
    /// The session that created the record.
    pub session: SessionId,
    /// Seconds since the Unix epoch.
    pub published: u64,
}

impl DeviceRecord {
    /// Maximum bytes of an encoded record. C2SP tlog-tiles limits a log entry to 65,535 bytes.
    pub const MAX_LEN: usize = 65_535;

    /// Compares everything but the time, because a repeated publication may carry a later one.
    pub fn eq_ignoring_time(&self, other: &Self) -> bool {
        *self == Self { published: self.published, ..other.clone() }
    }

    /// Encodes the record as deterministic CBOR (RFC 8949 §4.2.1). These bytes are stored, hashed and served.
    pub fn to_bytes(&self) -> Result<Vec<u8>, RecordError> {
        FORMAT.write(vec![
            Value::Bytes(self.chip.as_bytes().to_vec()),
            Value::Text(self.identity.to_string()),
            Value::Text(self.profile.to_string()),
            Value::Bytes(self.certificate.clone()),
            Value::Bool(self.certificate_is_cwt),
            Value::Bytes(self.serial.clone()),
            self.public_key.clone().map_or(Value::Null, Value::Bytes),
            Value::Bytes(self.backup.clone()),
            Value::from(self.master_key_version),
            Value::Bytes(self.session.as_bytes().to_vec()),
            Value::from(self.published),
        ])
    }

    /// The record as JSON: bytes in hex, times in RFC 3339.
    pub fn to_json(&self, index: u64, hash: &[u8; 32]) -> serde_json::Value {
        serde_json::json!({
            "chip_id": self.chip,
            "identity": self.identity,
            "profile": self.profile,
            "published": self.published_text(),
            "record_index": index,
            "record_hash": hex::encode(hash),
            "session": self.session,
            "certificate_format": if self.certificate_is_cwt { "CWT" } else { "X.509" },
            "certificate": hex::encode(&self.certificate),
            "certificate_pem": self.certificate_pem(),
            "certificate_serial": hex::encode(&self.serial),
            "public_key": self.public_key.as_ref().map(hex::encode),
            "master_key_version": self.master_key_version,
            "backup_package": hex::encode(&self.backup),
        })
    }

    /// The certificate in PEM; `None` for a CWT.
    pub fn certificate_pem(&self) -> Option<String> {
        if self.certificate_is_cwt {
            return None;
        }
        der::pem::encode_string("CERTIFICATE", der::pem::LineEnding::LF, &self.certificate).ok()
    }

    /// The publication time in RFC 3339.
    pub fn published_text(&self) -> String {
        let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(self.published));
        // RFC 3339 cannot express years after 9999.
        let time = time.filter(|_| self.published < 253_402_300_800);
        time.map_or_else(
            || format!("{} s after 1970", self.published),
            |time| humantime::format_rfc3339_seconds(time).to_string(),
        )
    }

    /// Decodes the output of [`Self::to_bytes`]. Other encodings of the same values are refused.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut fields = FORMAT.read(bytes)?;
        let record = Self {
            chip: ChipId::from_bytes(&fields.bytes(2)?).map_err(|e| FORMAT.error(e))?,
            identity: fields.text(3)?.parse().map_err(|e: NameError| FORMAT.error(e))?,
            profile: fields.text(4)?.parse().map_err(|e: NameError| FORMAT.error(e))?,
            certificate: fields.bytes(5)?,
            certificate_is_cwt: fields.next(6)?.into_bool().map_err(|_| fields.invalid(6))?,
            serial: fields.bytes(7)?,
            public_key: match fields.next(8)? {
                Value::Null => None,
                other => Some(other.into_bytes().map_err(|_| fields.invalid(8))?),
            },
            backup: fields.bytes(9)?,
            master_key_version: u32::try_from(fields.integer(10)?).map_err(|_| fields.invalid(10))?,
            session: SessionId::from_bytes(&fields.bytes(11)?).map_err(|e| FORMAT.error(e))?,
            published: fields.integer(12)?,
        };
        FORMAT.check_canonical(&record.to_bytes()?, bytes)?;
        Ok(record)
    }
}
