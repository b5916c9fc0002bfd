//! The record of one device: what the world may know of it, for ever.

use std::time::{Duration, SystemTime};

use ciborium::Value;

use super::fields::{Form, RecordError};
use crate::names::{ChipId, DeviceIdentity, NameError, ProfileName, SessionId};

static FORM: Form = Form { what: "a device record", version: 1, most: DeviceRecord::MAX_LEN };

/// A record of the public database (`device-record` in `proto/data-package.cddl`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRecord {
    /// The chip.
    pub chip: ChipId,
    /// The identity bound to it.
    pub identity: DeviceIdentity,
    /// What the product got.
    pub profile: ProfileName,
    /// X.509 in DER, or a CWT.
    pub certificate: Vec<u8>,
    /// Whether `certificate` is a CWT.
    pub certificate_is_cwt: bool,
    /// The certificate's serial number, or the CWT's `cti`.
    pub serial: Vec<u8>,
    /// The device's public key, SubjectPublicKeyInfo in DER, if it has one.
    pub public_key: Option<Vec<u8>>,
    /// Only the chip can decrypt it.
    pub backup: Vec<u8>,
    /// The version of the master key; 0 if the profile has no symmetric key.
    pub master_key_version: u32,
    /// The session that made it.
    pub session: SessionId,
    /// Seconds since the Unix epoch.
    pub published: u64,
}

impl DeviceRecord {
    /// Most bytes of an encoded record: an entry of the log has at most 65,535 (C2SP tlog-tiles).
    pub const MAX_LEN: usize = 65_535;

    /// Whether it says the same of the same device; a repeated publication may have another time.
    pub fn is_same_but_for_its_time(&self, other: &Self) -> bool {
        *self == Self { published: self.published, ..other.clone() }
    }

    /// The record as deterministic CBOR (RFC 8949 §4.2.1): the bytes that are stored, hashed and served.
    pub fn to_bytes(&self) -> Result<Vec<u8>, RecordError> {
        FORM.write(vec![
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

    /// The record as JSON, for programs: bytes in hex, times in RFC 3339.
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

    /// The certificate in PEM; a CWT has no such form.
    pub fn certificate_pem(&self) -> Option<String> {
        if self.certificate_is_cwt {
            return None;
        }
        der::pem::encode_string("CERTIFICATE", der::pem::LineEnding::LF, &self.certificate).ok()
    }

    /// When it was published, RFC 3339.
    pub fn published_text(&self) -> String {
        let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(self.published));
        // Beyond the year 9999 there is no RFC 3339 form.
        let time = time.filter(|_| self.published < 253_402_300_800);
        time.map_or_else(
            || format!("{} s after 1970", self.published),
            |time| humantime::format_rfc3339_seconds(time).to_string(),
        )
    }

    /// Reads what [`Self::to_bytes`] wrote; anything else is refused, other encodings of the same values included.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut fields = FORM.read(bytes)?;
        let record = Self {
            chip: ChipId::from_bytes(&fields.bytes(2)?).map_err(|e| FORM.error(e))?,
            identity: fields.text(3)?.parse().map_err(|e: NameError| FORM.error(e))?,
            profile: fields.text(4)?.parse().map_err(|e: NameError| FORM.error(e))?,
            certificate: fields.bytes(5)?,
            certificate_is_cwt: fields.next(6)?.into_bool().map_err(|_| fields.wrong(6))?,
            serial: fields.bytes(7)?,
            public_key: match fields.next(8)? {
                Value::Null => None,
                other => Some(other.into_bytes().map_err(|_| fields.wrong(8))?),
            },
            backup: fields.bytes(9)?,
            master_key_version: u32::try_from(fields.integer(10)?).map_err(|_| fields.wrong(10))?,
            session: SessionId::from_bytes(&fields.bytes(11)?).map_err(|e| FORM.error(e))?,
            published: fields.integer(12)?,
        };
        FORM.must_be_written_so(&record.to_bytes()?, bytes)?;
        Ok(record)
    }
}
