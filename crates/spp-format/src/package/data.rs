//! Data package: the certificate and keys that the device stores (`data-package` in `proto/data-package.cddl`).

use std::fmt;

use super::symmetric_key::SymmetricKey;
use super::{MAX_PACKAGE_LEN, PackageError, cose_key, package_error};
use crate::cbor::{MapReader, Reader, Writer};
use crate::keys::DevicePrivateKey;
use crate::names::{ChipId, DeviceIdentity, ProfileName, SessionId};
use crate::secret::SecretBytes;

const VERSION: i64 = 1;
const MAX_ISSUERS: usize = 4;
const MAX_SYMMETRIC_KEYS: usize = 8;
/// The first map key whose value contains device keys.
const FIRST_SECRET_KEY: i64 = 9;

/// The content of one device's package: certificate and keys. Equal values encode to equal bytes.
pub struct DataPackage {
    /// The chip.
    pub chip: ChipId,
    /// The identity bound to the chip.
    pub identity: DeviceIdentity,
    /// The profile.
    pub profile: ProfileName,
    /// The session that assembled it.
    pub session: SessionId,
    /// The device certificate with its chain.
    pub certificate: CertificateChain,
    /// The key pair; `None` if the device generated its own, or has a CWT.
    pub key_pair: Option<DevicePrivateKey>,
    /// Derived keys, at most 8; the first one confirms the delivery if there is no key pair.
    pub symmetric_keys: Vec<SymmetricKey>,
    /// The version of the master key from which they are derived, counted from 1; 0 if there are none.
    pub master_key_version: u32,
}

/// The device certificate, X.509 or CWT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertificateChain {
    /// X.509 in DER.
    X509 {
        /// The device's own certificate.
        device: Vec<u8>,
        /// Its issuers in chain order, at most 4.
        issuers: Vec<Vec<u8>>,
    },
    /// A CWT (RFC 8392) in a tagged COSE_Sign1.
    Cwt(Vec<u8>),
}

impl CertificateChain {
    /// The device's own certificate: DER, or the bytes of the CWT.
    pub fn device_certificate(&self) -> &[u8] {
        match self {
            Self::X509 { device, .. } => device,
            Self::Cwt(bytes) => bytes,
        }
    }

    /// Whether the certificate is a CWT.
    pub const fn is_cwt(&self) -> bool {
        matches!(self, Self::Cwt(_))
    }
}

impl DataPackage {
    /// Encodes the package in deterministic CBOR (RFC 8949 §4.2.1), at most [`MAX_PACKAGE_LEN`] bytes.
    ///
    /// # Errors
    /// If the fields are inconsistent or the package is too large.
    pub fn encode(&self) -> Result<SecretBytes, PackageError> {
        self.check()?;
        let mut out = Writer::with_limit(MAX_PACKAGE_LEN);
        let optional = usize::from(self.key_pair.is_some()) + usize::from(!self.symmetric_keys.is_empty());
        out.map(7 + optional);
        out.int(1).int(VERSION);
        out.int(2).bytes(self.session.as_bytes());
        out.int(3).bytes(self.chip.as_bytes());
        out.int(4).text(&self.identity.to_string());
        out.int(5).text(self.profile.as_str());
        out.int(6).int(self.master_key_version.into());
        write_certificate(&mut out, &self.certificate);
        if let Some(pair) = &self.key_pair {
            cose_key::write_pair(out.int(FIRST_SECRET_KEY), pair)?;
        }
        if !self.symmetric_keys.is_empty() {
            out.int(10).array(self.symmetric_keys.len());
            self.symmetric_keys.iter().for_each(|key| cose_key::write_symmetric(&mut out, key));
        }
        out.finish().ok_or(TOO_LARGE)
    }

    /// Decodes exactly the form that [`Self::encode`] writes: rejects unknown keys, other encodings and trailing bytes.
    ///
    /// # Errors
    /// The error names the invalid field. A private key that does not match its public key is rejected.
    pub fn decode(bytes: &[u8]) -> Result<Self, PackageError> {
        if bytes.len() > MAX_PACKAGE_LEN {
            return Err(TOO_LARGE);
        }
        let mut reader = Reader::new(bytes);
        let mut map = reader.map().map_err(package_error("package"))?;
        let package = Self::decode_fields(&mut map)?;
        map.end().map_err(package_error("package"))?;
        reader.end().map_err(package_error("package"))?;
        package.check()?;
        Ok(package)
    }

    /// The secrets that no message may contain in clear.
    pub fn secrets(&self) -> Vec<&SecretBytes> {
        let pair = self.key_pair.iter().flat_map(DevicePrivateKey::secrets);
        pair.chain(self.symmetric_keys.iter().map(SymmetricKey::key)).collect()
    }

    fn decode_fields(map: &mut MapReader<'_, '_>) -> Result<Self, PackageError> {
        if number(map, 1, "version (1)")? != VERSION {
            return Err(package_error("version (1)")("only version 1 is supported; update this software"));
        }
        let session = require(map, 2, "session (2)")?.reader.bytes().map_err(package_error("session (2)"))?;
        let chip = require(map, 3, "chip ID (3)")?.reader.bytes().map_err(package_error("chip ID (3)"))?;
        let identity = require(map, 4, "identity (4)")?.reader.text().map_err(package_error("identity (4)"))?;
        let profile = require(map, 5, "profile (5)")?.reader.text().map_err(package_error("profile (5)"))?;
        let version = number(map, 6, "master key version (6)")?;
        let parsed: DeviceIdentity = identity.parse().map_err(package_error("identity (4)"))?;
        if parsed.to_string() != identity {
            return Err(package_error("identity (4)")("not in canonical form"));
        }
        Ok(Self {
            session: SessionId::from_bytes(session).map_err(package_error("session (2)"))?,
            chip: ChipId::from_bytes(chip).map_err(package_error("chip ID (3)"))?,
            identity: parsed,
            profile: profile.parse().map_err(package_error("profile (5)"))?,
            master_key_version: u32::try_from(version).map_err(package_error("master key version (6)"))?,
            certificate: read_certificate(map)?,
            key_pair: if map.key(FIRST_SECRET_KEY).map_err(package_error("private key (9)"))? {
                Some(cose_key::read_pair(map.reader)?)
            } else {
                None
            },
            symmetric_keys: read_symmetric_keys(map)?,
        })
    }

    /// Checks the consistency of the fields, when encoding and when decoding.
    fn check(&self) -> Result<(), PackageError> {
        let keys = &self.symmetric_keys;
        if (self.master_key_version == 0) != keys.is_empty() {
            return Err(package_error("master key version (6)")(
                "must be 0 if and only if there are no symmetric keys",
            ));
        }
        if keys.len() > MAX_SYMMETRIC_KEYS {
            return Err(package_error("symmetric keys (10)")(format!("at most {MAX_SYMMETRIC_KEYS} are allowed")));
        }
        if keys.iter().enumerate().any(|(i, key)| keys[..i].iter().any(|other| other.purpose() == key.purpose())) {
            return Err(package_error("symmetric keys (10)")("two keys have the same purpose"));
        }
        match &self.certificate {
            CertificateChain::X509 { issuers, .. } if issuers.len() > MAX_ISSUERS => {
                Err(package_error("certificate chain (7)")(format!("at most {MAX_ISSUERS} issuers are allowed")))
            }
            CertificateChain::Cwt(_) if self.key_pair.is_some() || keys.is_empty() => {
                Err(package_error("CWT (8)")("a device with a CWT must have symmetric keys and no key pair"))
            }
            _ => Ok(()),
        }
    }
}

/// Formats everything except the keys.
impl fmt::Debug for DataPackage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataPackage")
            .field("chip", &self.chip)
            .field("identity", &self.identity)
            .field("profile", &self.profile)
            .field("session", &self.session)
            .field("public_key", &self.key_pair.as_ref().map(DevicePrivateKey::public))
            .field("purposes", &self.symmetric_keys.iter().map(SymmetricKey::purpose).collect::<Vec<_>>())
            .field("master_key_version", &self.master_key_version)
            .finish_non_exhaustive()
    }
}

/// The part of an encoded package that contains the keys; `None` if it has none or is invalid.
pub(super) fn key_area(package: &[u8]) -> Option<&[u8]> {
    let mut reader = Reader::new(package);
    let mut map = reader.map().ok()?;
    for key in 1..FIRST_SECRET_KEY {
        if map.key(key).ok()? {
            map.reader.skip().ok()?;
        }
    }
    let has_keys = map.key(FIRST_SECRET_KEY).ok()? || map.key(FIRST_SECRET_KEY + 1).ok()?;
    has_keys.then(|| map.reader.rest())
}

const TOO_LARGE: PackageError = PackageError::TooLarge { what: "data package", max: MAX_PACKAGE_LEN };

/// Encodes `x5chain` (RFC 9360 §2): one certificate is a byte string, several are an array.
fn write_certificate(out: &mut Writer, certificate: &CertificateChain) {
    match certificate {
        CertificateChain::X509 { device, issuers } if issuers.is_empty() => {
            out.int(7).bytes(device);
        }
        CertificateChain::X509 { device, issuers } => {
            out.int(7).array(1 + issuers.len()).bytes(device);
            issuers.iter().for_each(|issuer| {
                out.bytes(issuer);
            });
        }
        CertificateChain::Cwt(bytes) => {
            out.int(8).bytes(bytes);
        }
    }
}

fn read_certificate(map: &mut MapReader<'_, '_>) -> Result<CertificateChain, PackageError> {
    let field = "certificate chain (7)";
    if !map.key(7).map_err(package_error(field))? {
        let bytes = require(map, 8, "CWT (8)")?.reader.bytes().map_err(package_error("CWT (8)"))?;
        return Ok(CertificateChain::Cwt(bytes.to_vec()));
    }
    if !map.reader.next_is_array() {
        let device = map.reader.bytes().map_err(package_error(field))?.to_vec();
        return Ok(CertificateChain::X509 { device, issuers: Vec::new() });
    }
    let count = map.reader.array().map_err(package_error(field))?;
    if !(2..=1 + MAX_ISSUERS as u64).contains(&count) {
        return Err(package_error(field)(format!("expected 2 to {} certificates", 1 + MAX_ISSUERS)));
    }
    let device = map.reader.bytes().map_err(package_error(field))?.to_vec();
    let issuers = (1..count).map(|_| map.reader.bytes().map(<[u8]>::to_vec)).collect::<Result<_, _>>();
    Ok(CertificateChain::X509 { device, issuers: issuers.map_err(package_error(field))? })
}

fn read_symmetric_keys(map: &mut MapReader<'_, '_>) -> Result<Vec<SymmetricKey>, PackageError> {
    let field = "symmetric keys (10)";
    if !map.key(10).map_err(package_error(field))? {
        return Ok(Vec::new());
    }
    let count = map.reader.array().map_err(package_error(field))?;
    if !(1..=MAX_SYMMETRIC_KEYS as u64).contains(&count) {
        return Err(package_error(field)(format!("expected 1 to {MAX_SYMMETRIC_KEYS} keys")));
    }
    (0..count).map(|_| cose_key::read_symmetric(map.reader)).collect()
}

fn number(map: &mut MapReader<'_, '_>, key: i64, field: &'static str) -> Result<i64, PackageError> {
    require(map, key, field)?.reader.int().map_err(package_error(field))
}

fn require<'m, 'r, 'a>(
    map: &'m mut MapReader<'r, 'a>,
    key: i64,
    field: &'static str,
) -> Result<&'m mut MapReader<'r, 'a>, PackageError> {
    if map.key(key).map_err(package_error(field))? {
        Ok(map)
    } else {
        Err(package_error(field)("missing, or an earlier key is unknown"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{self, KINDS};
    use super::*;
    use proptest::prelude::*;

    /// The encoded bytes of a package, exposed for a test.
    fn encoded(package: &DataPackage) -> Vec<u8> {
        package.encode().unwrap().expose().clone()
    }

    fn rejection(bytes: &[u8]) -> String {
        DataPackage::decode(bytes).err().map(|e| e.to_string()).unwrap()
    }

    proptest! {
        #![proptest_config(spp_test_support::random::cases(64, 3200))]

        #[test]
        fn encoded_package_decodes_to_itself(package in samples::any_package()) {
            let bytes = encoded(&package);
            let read = DataPackage::decode(&bytes).unwrap();
            prop_assert_eq!(&read.chip, &package.chip);
            prop_assert_eq!(&read.identity, &package.identity);
            prop_assert_eq!(&read.profile, &package.profile);
            prop_assert_eq!(read.session, package.session);
            prop_assert_eq!(&read.certificate, &package.certificate);
            prop_assert_eq!(read.secrets().len(), package.secrets().len());
            prop_assert_eq!(encoded(&read), bytes);
        }

        #[test]
        fn encoded_package_is_valid_cbor(package in samples::any_package()) {
            let value: ciborium::Value = ciborium::from_reader(encoded(&package).as_slice()).unwrap();
            let keys: Vec<_> = value.as_map().unwrap().iter().map(|(key, _)| key.clone()).collect();
            prop_assert_eq!(keys[..6].to_vec(), (1..=6).map(ciborium::Value::from).collect::<Vec<_>>());
        }

        #[test]
        fn decoding_never_panics(bytes: Vec<u8>, index in any::<prop::sample::Index>(), byte: u8) {
            let _ = DataPackage::decode(&bytes);
            let _ = key_area(&bytes);
            let mut altered = encoded(&samples::package(Some(crate::keys::KeyType::P256)));
            let index = index.index(altered.len());
            altered[index] = byte;
            let _ = DataPackage::decode(&altered);
            let _ = DataPackage::decode(&altered[..index]);
        }
    }

    #[test]
    fn package_with_every_key_type_decodes_to_itself() {
        for kind in KINDS {
            let package = samples::package(Some(kind));
            let bytes = encoded(&package);
            let read = DataPackage::decode(&bytes).unwrap();
            assert_eq!(read.key_pair.as_ref().unwrap().public(), package.key_pair.as_ref().unwrap().public());
            assert_eq!(encoded(&read), bytes, "{kind}");
        }
    }

    #[test]
    fn truncated_or_extended_package_rejected() {
        let bytes = encoded(&samples::package(None));
        for end in 0..bytes.len() {
            assert!(DataPackage::decode(&bytes[..end]).is_err(), "{end}");
        }
        assert!(rejection(&[&bytes[..], &[0]].concat()).contains("1 trailing bytes"));
        assert!(rejection(&vec![0; MAX_PACKAGE_LEN + 1]).contains("more than 16384"));
    }

    #[test]
    fn unknown_keys_and_versions_rejected() {
        let bytes = encoded(&samples::package(None));
        let mut more = bytes.clone();
        more[0] += 1;
        assert!(rejection(&[&more[..], &[11, 0]].concat()).contains("key 11 is unknown"));
        let mut newer = bytes.clone();
        newer[2] = 2;
        assert!(rejection(&newer).contains("version (1): only version 1"));
    }

    #[test]
    fn mismatched_private_key_rejected() {
        let one = samples::package(Some(crate::keys::KeyType::P256));
        let mut bytes = encoded(&one);
        let crate::keys::PrivateParts::Ec(d) = one.key_pair.as_ref().unwrap().parts() else { unreachable!() };
        let start = bytes.windows(32).position(|window| window == d.expose().as_slice()).unwrap();
        bytes[start + 31] ^= 1;
        assert!(rejection(&bytes).contains("private key (9)"));
    }

    #[test]
    fn inconsistent_fields_rejected() {
        let rejection = |change: fn(&mut DataPackage)| {
            let mut package = samples::package(None);
            change(&mut package);
            package.encode().err().map(|e| e.to_string()).unwrap()
        };
        assert!(rejection(|p| p.master_key_version = 0).contains("master key version"));
        assert!(rejection(|p| p.symmetric_keys.push(samples::symmetric_key("channel", 1))).contains("same purpose"));
        assert!(rejection(|p| p.key_pair = Some(samples::pair(crate::keys::KeyType::P256))).contains("CWT (8)"));
        assert!(rejection(|p| p.certificate = CertificateChain::Cwt(vec![0; MAX_PACKAGE_LEN])).contains("more than"));
    }

    #[test]
    fn key_area_starts_with_first_key() {
        let package = encoded(&samples::package(Some(crate::keys::KeyType::Ed25519)));
        assert!(key_area(&package).unwrap().starts_with(&[0xa4, 1, 1, 0x20, 6]));
        assert!(key_area(&encoded(&samples::package(None))).unwrap().starts_with(&[0x82, 0xa3, 1, 4]));
        let none = DataPackage {
            symmetric_keys: vec![],
            master_key_version: 0,
            ..samples::package(Some(crate::keys::KeyType::P256))
        };
        assert_eq!(key_area(&encoded(&DataPackage { key_pair: None, ..none })), None);
    }
}
