//! The data package: what the device stores (`data-package` in `proto/data-package.cddl`).

use std::fmt;

use super::cbor::{MapReader, Reader, Writer};
use super::{MAX_PACKAGE_LEN, PackageError, cose_key, field_error};
use crate::keys::DevicePrivateKey;
use crate::names::{ChipId, DeviceIdentity, KeyName, ProfileName, SessionId};
use crate::secret::SecretBytes;

const VERSION: i64 = 1;
const MAX_ISSUERS: usize = 4;
const MAX_SYMMETRIC_KEYS: usize = 8;
/// The first key of the map under which there are keys of the device.
const FIRST_SECRET_KEY: i64 = 9;

/// What one device gets: its certificate and its keys. The same values always give the same bytes.
pub struct DataPackage {
    /// The chip it is for.
    pub chip: ChipId,
    /// The identity bound to the chip.
    pub identity: DeviceIdentity,
    /// What the product gets.
    pub profile: ProfileName,
    /// The session that made it.
    pub session: SessionId,
    /// Proof of the binding.
    pub certificate: CertificateChain,
    /// The key pair; none if the device made its own, or has a CWT.
    pub key_pair: Option<DevicePrivateKey>,
    /// Derived keys, at most 8; the first confirms the delivery where there is no pair.
    pub symmetric_keys: Vec<SymmetricKey>,
    /// The version of the master key they are derived from, counted from 1; 0 if there are none.
    pub master_key_version: u32,
}

/// The device certificate in one of its two forms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertificateChain {
    /// X.509 in DER.
    X509 {
        /// The device's own certificate.
        device: Vec<u8>,
        /// Its issuers, the nearest first, at most 4.
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

    /// Whether it is a CWT.
    pub const fn is_cwt(&self) -> bool {
        matches!(self, Self::Cwt(_))
    }
}

/// A key that manufacturer and device share, and what it is for.
pub struct SymmetricKey {
    purpose: KeyName,
    key: SecretBytes,
}

impl SymmetricKey {
    /// A purpose is written as a key's name; a key has 16 to 64 bytes.
    pub fn new(purpose: &str, key: SecretBytes) -> Result<Self, PackageError> {
        let field = "symmetric keys (10)";
        let purpose = purpose.parse().map_err(at(field))?;
        // Exposed for its length.
        if !(16..=64).contains(&key.expose().len()) {
            return Err(at(field)("a symmetric key has 16 to 64 bytes"));
        }
        Ok(Self { purpose, key })
    }

    /// What it is for; unique within a package.
    pub fn purpose(&self) -> &str {
        self.purpose.as_str()
    }

    /// The key.
    pub const fn key(&self) -> &SecretBytes {
        &self.key
    }
}

impl DataPackage {
    /// The package in deterministic CBOR (RFC 8949 §4.2.1), at most [`MAX_PACKAGE_LEN`] bytes.
    ///
    /// # Errors
    /// If the parts do not fit together, or the package is too large.
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

    /// Reads what [`Self::encode`] wrote and nothing else: no unknown keys, no other encoding, nothing behind it.
    ///
    /// # Errors
    /// Names the field that is wrong. A private key that does not belong to its public key is refused.
    pub fn decode(bytes: &[u8]) -> Result<Self, PackageError> {
        if bytes.len() > MAX_PACKAGE_LEN {
            return Err(TOO_LARGE);
        }
        let mut reader = Reader::new(bytes);
        let mut map = reader.map().map_err(at("package"))?;
        let package = Self::read(&mut map)?;
        map.end().map_err(at("package"))?;
        reader.end().map_err(at("package"))?;
        package.check()?;
        Ok(package)
    }

    /// The secrets that must be in no message in clear.
    pub fn secrets(&self) -> Vec<&SecretBytes> {
        let pair = self.key_pair.iter().flat_map(DevicePrivateKey::secrets);
        pair.chain(self.symmetric_keys.iter().map(SymmetricKey::key)).collect()
    }

    fn read(map: &mut MapReader<'_, '_>) -> Result<Self, PackageError> {
        if number(map, 1, "version (1)")? != VERSION {
            return Err(at("version (1)")("only version 1 is known; update the reader"));
        }
        let session = require(map, 2, "session (2)")?.reader.bytes().map_err(at("session (2)"))?;
        let chip = require(map, 3, "chip ID (3)")?.reader.bytes().map_err(at("chip ID (3)"))?;
        let identity = require(map, 4, "identity (4)")?.reader.text().map_err(at("identity (4)"))?;
        let profile = require(map, 5, "profile (5)")?.reader.text().map_err(at("profile (5)"))?;
        let version = number(map, 6, "master key version (6)")?;
        let parsed: DeviceIdentity = identity.parse().map_err(at("identity (4)"))?;
        if parsed.to_string() != identity {
            return Err(at("identity (4)")("not in its canonical form"));
        }
        Ok(Self {
            session: SessionId::from_bytes(session).map_err(at("session (2)"))?,
            chip: ChipId::from_bytes(chip).map_err(at("chip ID (3)"))?,
            identity: parsed,
            profile: profile.parse().map_err(at("profile (5)"))?,
            master_key_version: u32::try_from(version).map_err(at("master key version (6)"))?,
            certificate: read_certificate(map)?,
            key_pair: if map.key(FIRST_SECRET_KEY).map_err(at("private key (9)"))? {
                Some(cose_key::read_pair(map.reader)?)
            } else {
                None
            },
            symmetric_keys: read_symmetric_keys(map)?,
        })
    }

    /// What must hold between the parts, for writers and readers alike.
    fn check(&self) -> Result<(), PackageError> {
        let keys = &self.symmetric_keys;
        if (self.master_key_version == 0) != keys.is_empty() {
            return Err(at("master key version (6)")("it is 0 exactly when there are no symmetric keys"));
        }
        if keys.len() > MAX_SYMMETRIC_KEYS {
            return Err(at("symmetric keys (10)")(format!("at most {MAX_SYMMETRIC_KEYS} are allowed")));
        }
        if keys.iter().enumerate().any(|(i, key)| keys[..i].iter().any(|other| other.purpose == key.purpose)) {
            return Err(at("symmetric keys (10)")("two keys have the same purpose"));
        }
        match &self.certificate {
            CertificateChain::X509 { issuers, .. } if issuers.len() > MAX_ISSUERS => {
                Err(at("certificate chain (7)")(format!("at most {MAX_ISSUERS} issuers are allowed")))
            }
            CertificateChain::Cwt(_) if self.key_pair.is_some() || keys.is_empty() => {
                Err(at("CWT (8)")("a device with a CWT has symmetric keys and no key pair"))
            }
            _ => Ok(()),
        }
    }
}

/// Tells everything but the keys.
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

/// The part of an encoded package in which the keys are; `None` if it has none, or is no package.
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

/// An error constructor for a field of the package.
pub(super) fn at<E: std::fmt::Display>(field: &'static str) -> impl FnOnce(E) -> PackageError {
    field_error("data package", field)
}

const TOO_LARGE: PackageError = PackageError::TooLarge { what: "data package", max: MAX_PACKAGE_LEN };

/// `x5chain` as in RFC 9360 §2: one certificate is a byte string, several are an array of them.
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
    if !map.key(7).map_err(at(field))? {
        let bytes = require(map, 8, "CWT (8)")?.reader.bytes().map_err(at("CWT (8)"))?;
        return Ok(CertificateChain::Cwt(bytes.to_vec()));
    }
    if !map.reader.at_array() {
        let device = map.reader.bytes().map_err(at(field))?.to_vec();
        return Ok(CertificateChain::X509 { device, issuers: Vec::new() });
    }
    let count = map.reader.array().map_err(at(field))?;
    if !(2..=1 + MAX_ISSUERS as u64).contains(&count) {
        return Err(at(field)(format!("an array has 2 to {} certificates", 1 + MAX_ISSUERS)));
    }
    let device = map.reader.bytes().map_err(at(field))?.to_vec();
    let issuers = (1..count).map(|_| map.reader.bytes().map(<[u8]>::to_vec)).collect::<Result<_, _>>();
    Ok(CertificateChain::X509 { device, issuers: issuers.map_err(at(field))? })
}

fn read_symmetric_keys(map: &mut MapReader<'_, '_>) -> Result<Vec<SymmetricKey>, PackageError> {
    let field = "symmetric keys (10)";
    if !map.key(10).map_err(at(field))? {
        return Ok(Vec::new());
    }
    let count = map.reader.array().map_err(at(field))?;
    if !(1..=MAX_SYMMETRIC_KEYS as u64).contains(&count) {
        return Err(at(field)(format!("an array has 1 to {MAX_SYMMETRIC_KEYS} keys")));
    }
    (0..count).map(|_| cose_key::read_symmetric(map.reader)).collect()
}

fn number(map: &mut MapReader<'_, '_>, key: i64, field: &'static str) -> Result<i64, PackageError> {
    require(map, key, field)?.reader.int().map_err(at(field))
}

fn require<'m, 'r, 'a>(
    map: &'m mut MapReader<'r, 'a>,
    key: i64,
    field: &'static str,
) -> Result<&'m mut MapReader<'r, 'a>, PackageError> {
    if map.key(key).map_err(at(field))? {
        Ok(map)
    } else {
        Err(at(field)("it is missing, or a key before it is unknown"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{self, KINDS};
    use super::*;
    use proptest::prelude::*;

    /// The bytes of a package, in the open for a test.
    fn encoded(package: &DataPackage) -> Vec<u8> {
        package.encode().unwrap().expose().clone()
    }

    fn refusal(bytes: &[u8]) -> String {
        DataPackage::decode(bytes).err().map(|e| e.to_string()).unwrap()
    }

    proptest! {
        #![proptest_config(spp_testkit::random::cases(64, 3200))]

        #[test]
        fn a_package_is_the_same_after_the_way_through_its_bytes(package in samples::any_package()) {
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
        fn a_package_is_well_formed_for_other_readers(package in samples::any_package()) {
            let value: ciborium::Value = ciborium::from_reader(encoded(&package).as_slice()).unwrap();
            let keys: Vec<_> = value.as_map().unwrap().iter().map(|(key, _)| key.clone()).collect();
            prop_assert_eq!(keys[..6].to_vec(), (1..=6).map(ciborium::Value::from).collect::<Vec<_>>());
        }

        #[test]
        fn decoding_never_panics(bytes: Vec<u8>, at in any::<prop::sample::Index>(), byte: u8) {
            let _ = DataPackage::decode(&bytes);
            let _ = key_area(&bytes);
            let mut altered = encoded(&samples::package(Some(crate::keys::KeyKind::P256)));
            let at = at.index(altered.len());
            altered[at] = byte;
            let _ = DataPackage::decode(&altered);
            let _ = DataPackage::decode(&altered[..at]);
        }
    }

    #[test]
    fn every_kind_of_key_pair_survives_its_bytes() {
        for kind in KINDS {
            let package = samples::package(Some(kind));
            let bytes = encoded(&package);
            let read = DataPackage::decode(&bytes).unwrap();
            assert_eq!(read.key_pair.as_ref().unwrap().public(), package.key_pair.as_ref().unwrap().public());
            assert_eq!(encoded(&read), bytes, "{kind}");
        }
    }

    #[test]
    fn a_cut_package_or_one_with_a_tail_is_refused() {
        let bytes = encoded(&samples::package(None));
        for end in 0..bytes.len() {
            assert!(DataPackage::decode(&bytes[..end]).is_err(), "{end}");
        }
        assert!(refusal(&[&bytes[..], &[0]].concat()).contains("1 bytes follow"));
        assert!(refusal(&vec![0; MAX_PACKAGE_LEN + 1]).contains("more than 16384"));
    }

    #[test]
    fn unknown_keys_and_versions_are_refused() {
        let bytes = encoded(&samples::package(None));
        let mut more = bytes.clone();
        more[0] += 1;
        assert!(refusal(&[&more[..], &[11, 0]].concat()).contains("key 11 is unknown"));
        let mut newer = bytes.clone();
        newer[2] = 2;
        assert!(refusal(&newer).contains("version (1): only version 1"));
    }

    #[test]
    fn a_private_key_of_another_pair_is_refused() {
        let one = samples::package(Some(crate::keys::KeyKind::P256));
        let mut bytes = encoded(&one);
        let crate::keys::PrivateParts::Ec(d) = one.key_pair.as_ref().unwrap().parts() else { unreachable!() };
        let at = bytes.windows(32).position(|window| window == d.expose().as_slice()).unwrap();
        bytes[at + 31] ^= 1;
        assert!(refusal(&bytes).contains("private key (9)"));
    }

    #[test]
    fn parts_that_do_not_fit_together_are_refused() {
        let refused = |change: fn(&mut DataPackage)| {
            let mut package = samples::package(None);
            change(&mut package);
            package.encode().err().map(|e| e.to_string()).unwrap()
        };
        assert!(refused(|p| p.master_key_version = 0).contains("master key version"));
        assert!(refused(|p| p.symmetric_keys.push(samples::symmetric_key("channel", 1))).contains("same purpose"));
        assert!(refused(|p| p.key_pair = Some(samples::pair(crate::keys::KeyKind::P256))).contains("CWT (8)"));
        assert!(refused(|p| p.certificate = CertificateChain::Cwt(vec![0; MAX_PACKAGE_LEN])).contains("more than"));
        assert!(SymmetricKey::new("short", SecretBytes::new(vec![0; 15])).is_err());
        assert!(SymmetricKey::new("No Name", SecretBytes::new(vec![0; 32])).is_err());
    }

    #[test]
    fn the_key_area_starts_with_the_first_key() {
        let package = encoded(&samples::package(Some(crate::keys::KeyKind::Ed25519)));
        assert!(key_area(&package).unwrap().starts_with(&[0xa4, 1, 1, 0x20, 6]));
        assert!(key_area(&encoded(&samples::package(None))).unwrap().starts_with(&[0x82, 0xa3, 1, 4]));
        let none = DataPackage {
            symmetric_keys: vec![],
            master_key_version: 0,
            ..samples::package(Some(crate::keys::KeyKind::P256))
        };
        assert_eq!(key_area(&encoded(&DataPackage { key_pair: None, ..none })), None);
    }
}
