//! The backup package: the data package under the chip key (`backup-package` in `proto/data-package.cddl`).
//!
//! COSE_Encrypt0 (RFC 9052 §5.2) with A256GCM. Made and opened in the device; the processing point, which has no chip
//! key, checks everything that can be seen from outside before it publishes it for ever.

use coset::{
    Algorithm, CoseEncrypt0, CoseEncrypt0Builder, EncryptionContext, HeaderBuilder, ProtectedHeader,
    TaggedCborSerializable as _, enc_structure_data, iana,
};

use super::cbor::Writer;
use super::{MAX_BACKUP_LEN, clear, data, gcm};
use crate::keys::sha256;
use crate::names::ChipId;
use crate::secret::{Secret, SecretBytes};

/// Bytes of the package's key area that must not be found in clear.
const KEY_AREA_PROBE: usize = 64;

/// Why bytes are not accepted as a backup package, or do not open. Never says what a secret is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackupRefused {
    /// More bytes than the profile, or any profile, allows.
    #[error("the backup package has {bytes} bytes, at most {max} are allowed")]
    TooLarge {
        /// How many it has.
        bytes: usize,
        /// How many are allowed.
        max: usize,
    },
    /// A part is missing or wrong.
    #[error("backup package, {field}: {problem}")]
    Field {
        /// The part, in the words of `proto/data-package.cddl`.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A key of the device stands in the backup.
    #[error("backup package: a key of the device is in it in clear ({form}); the device must encrypt it")]
    SecretInClear {
        /// How it is written there.
        form: &'static str,
    },
    /// The package itself stands in the backup.
    #[error("backup package: the data package is in it in clear; the device must encrypt it")]
    PackageInClear,
    /// It was made by another chip, or for another certificate, or it was altered.
    #[error(
        "the backup package does not open with this chip's key and this certificate; look for the record of this chip"
    )]
    DoesNotOpen,
    /// The cryptographic provider failed where it never should.
    #[error("encrypting the backup package failed in the cryptographic provider; try again")]
    Provider,
}

/// What a profile accepts as a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackupRules {
    /// The format.
    pub format: BackupFormat,
    /// Most bytes; never more than [`MAX_BACKUP_LEN`].
    pub max_bytes: usize,
}

/// The formats of backup packages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupFormat {
    /// `backup-package` of `proto/data-package.cddl`.
    Cose,
    /// The silicon's own. Only its size and the absence of secrets in clear can be checked.
    Opaque,
}

/// An initialization vector: used up by one backup, and no second one can be made of it.
pub struct BackupIv([u8; gcm::IV_LEN]);

impl BackupIv {
    /// A random one. A chip makes a handful of backups in its life, far from the 2^32 of NIST SP 800-38D §8.3.
    ///
    /// # Errors
    /// If the provider has no random numbers.
    pub fn random() -> Result<Self, BackupRefused> {
        let mut bytes = [0; gcm::IV_LEN];
        aws_lc_rs::rand::fill(&mut bytes).map_err(|_| BackupRefused::Provider)?;
        Ok(Self(bytes))
    }

    /// For the test vectors only: a key that sees an IV twice is lost.
    #[doc(hidden)]
    pub const fn fixed_for_test_vectors_only(bytes: [u8; gcm::IV_LEN]) -> Self {
        Self(bytes)
    }
}

/// Encrypts a data package under the chip key, in the device. Bound to the chip and to the certificate.
///
/// # Errors
/// If the provider fails.
pub fn make_backup(
    package: &SecretBytes,
    chip_key: &Secret<[u8; 32]>,
    chip: &ChipId,
    certificate: &[u8],
    iv: BackupIv,
) -> Result<Vec<u8>, BackupRefused> {
    let aad = authenticated(chip, certificate)?;
    let ciphertext = gcm::encrypt(chip_key, iv.0, &aad, package).ok_or(BackupRefused::Provider)?;
    envelope(chip, iv.0.to_vec(), ciphertext)
}

/// Decrypts a backup, in the device that made it.
///
/// # Errors
/// If it is no backup of this chip (naming what is wrong), or does not open with this key and this certificate.
pub fn open_backup(
    backup: &[u8],
    chip_key: &Secret<[u8; 32]>,
    chip: &ChipId,
    certificate: &[u8],
) -> Result<SecretBytes, BackupRefused> {
    let parts = Parts::read(backup, MAX_BACKUP_LEN, chip)?;
    let aad = authenticated(chip, certificate)?;
    gcm::decrypt(chip_key, parts.iv, &aad, &parts.ciphertext).ok_or(BackupRefused::DoesNotOpen)
}

/// A backup that may be published: everything that can be checked without the chip key was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupPackage {
    bytes: Vec<u8>,
}

impl BackupPackage {
    /// Accepts what a device of the session handed back: in shape and size, of the right chip, and without any secret in
    /// clear. `package` is what was delivered; `secrets` are the keys in it, see [`super::DataPackage::secrets`].
    ///
    /// # Errors
    /// Says which part is wrong and why; the station may try again with a better one.
    pub fn accept(
        bytes: &[u8],
        rules: &BackupRules,
        chip: &ChipId,
        package: &SecretBytes,
        secrets: &[&SecretBytes],
    ) -> Result<Self, BackupRefused> {
        let max = rules.max_bytes.min(MAX_BACKUP_LEN);
        match rules.format {
            BackupFormat::Cose => {
                let parts = Parts::read(bytes, max, chip)?;
                // Exposed for its length.
                let expected = package.expose().len() + gcm::TAG_LEN;
                if parts.ciphertext.len() != expected {
                    let found = parts.ciphertext.len();
                    let problem = format!("{found} bytes, the delivered package encrypts to {expected}");
                    return Err(BackupRefused::Field { field: "ciphertext", problem });
                }
            }
            BackupFormat::Opaque => check_size(bytes, max)?,
        }
        refuse_clear_secrets(bytes, package, secrets)?;
        Ok(Self { bytes: bytes.to_vec() })
    }

    /// The bytes as they will be published.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes, to be published.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// What can be seen of a COSE backup without the chip key.
struct Parts {
    iv: [u8; gcm::IV_LEN],
    ciphertext: Vec<u8>,
}

impl Parts {
    fn read(bytes: &[u8], max: usize, chip: &ChipId) -> Result<Self, BackupRefused> {
        check_size(bytes, max)?;
        let cose = CoseEncrypt0::from_tagged_slice(bytes).map_err(field("COSE_Encrypt0"))?;
        let protected = &cose.protected.header;
        if protected.alg != Some(Algorithm::Assigned(iana::Algorithm::A256GCM)) {
            return Err(field("algorithm (1)")("the protected header does not say 3 (A256GCM)"));
        }
        if protected.key_id != chip.as_bytes() {
            let named: String = hex::encode(&protected.key_id).chars().take(2 * ChipId::MAX_LEN).collect();
            return Err(field("kid (4)")(format!("it names chip \"{named}\", this is chip {chip}")));
        }
        let iv = cose.unprotected.iv.as_slice().try_into().map_err(|_| field("IV (5)")("it has not 12 bytes"))?;
        let ciphertext = cose.ciphertext.ok_or_else(|| field("ciphertext")("it is missing"))?;
        // Written again by ourselves it must be the same: no other headers, no other encoding, no second form.
        if envelope(chip, cose.unprotected.iv, ciphertext.clone())? != bytes {
            return Err(field("COSE_Encrypt0")("it has other headers, or is not in the deterministic form"));
        }
        Ok(Self { iv, ciphertext })
    }
}

fn check_size(bytes: &[u8], max: usize) -> Result<(), BackupRefused> {
    if bytes.len() > max {
        return Err(BackupRefused::TooLarge { bytes: bytes.len(), max });
    }
    if bytes.is_empty() {
        return Err(field("all of it")("it is empty"));
    }
    Ok(())
}

fn refuse_clear_secrets(bytes: &[u8], package: &SecretBytes, secrets: &[&SecretBytes]) -> Result<(), BackupRefused> {
    if let Some(form) = secrets.iter().find_map(|secret| clear::find(secret, bytes)) {
        return Err(BackupRefused::SecretInClear { form });
    }
    // Exposed to be searched for.
    let keys = data::key_area(package.expose()).unwrap_or_default();
    let probe = &keys[..keys.len().min(KEY_AREA_PROBE)];
    if !probe.is_empty() && memchr::memmem::find(bytes, probe).is_some() {
        return Err(BackupRefused::PackageInClear);
    }
    Ok(())
}

/// The one form of a backup.
fn envelope(chip: &ChipId, iv: Vec<u8>, ciphertext: Vec<u8>) -> Result<Vec<u8>, BackupRefused> {
    CoseEncrypt0Builder::new()
        .protected(protected(chip).header)
        .unprotected(HeaderBuilder::new().iv(iv).build())
        .ciphertext(ciphertext)
        .build()
        .to_tagged_vec()
        .map_err(field("COSE_Encrypt0"))
}

/// `Enc_structure` of RFC 9052 §5.3, with chip and certificate as external data: a backup moves to neither another chip
/// nor another certificate.
fn authenticated(chip: &ChipId, certificate: &[u8]) -> Result<Vec<u8>, BackupRefused> {
    let mut external = Writer::with_limit(128);
    external.array(4).text("spp-backup").int(1).bytes(chip.as_bytes()).bytes(&sha256(certificate));
    let external = external.finish_public().ok_or_else(|| field("external data")("it is too long"))?;
    Ok(enc_structure_data(EncryptionContext::CoseEncrypt0, protected(chip), &external))
}

fn protected(chip: &ChipId) -> ProtectedHeader {
    let header = HeaderBuilder::new().algorithm(iana::Algorithm::A256GCM).key_id(chip.as_bytes().to_vec()).build();
    ProtectedHeader { original_data: None, header }
}

fn field<E: std::fmt::Display>(field: &'static str) -> impl FnOnce(E) -> BackupRefused {
    move |problem| BackupRefused::Field { field, problem: problem.to_string() }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{self, chip, chip_key};
    use super::*;
    use crate::keys::KeyKind;
    use proptest::prelude::*;

    const RULES: BackupRules = BackupRules { format: BackupFormat::Cose, max_bytes: 8192 };
    const OPAQUE: BackupRules = BackupRules { format: BackupFormat::Opaque, max_bytes: 8192 };

    fn backup_of(package: &SecretBytes) -> Vec<u8> {
        make_backup(package, &chip_key(7), &chip(1), b"certificate", BackupIv::random().unwrap()).unwrap()
    }

    fn opened(backup: &[u8], key: u8, of: u8, certificate: &[u8]) -> Result<Vec<u8>, BackupRefused> {
        open_backup(backup, &chip_key(key), &chip(of), certificate).map(|package| package.expose().clone())
    }

    /// Accepts bytes for the sample package with all its secrets.
    fn accepted(bytes: &[u8], rules: &BackupRules) -> Result<BackupPackage, BackupRefused> {
        let package = samples::package(Some(KeyKind::P256));
        BackupPackage::accept(bytes, rules, &chip(1), &package.encode().unwrap(), &package.secrets())
    }

    #[test]
    fn a_backup_opens_with_its_chip_key_and_certificate_only() {
        let package = samples::package(Some(KeyKind::Ed25519)).encode().unwrap();
        let backup = backup_of(&package);
        assert_eq!(opened(&backup, 7, 1, b"certificate").as_ref(), Ok(package.expose()));
        assert_eq!(opened(&backup, 8, 1, b"certificate"), Err(BackupRefused::DoesNotOpen));
        assert_eq!(opened(&backup, 7, 1, b"another"), Err(BackupRefused::DoesNotOpen));
        assert!(opened(&backup, 7, 2, b"certificate").unwrap_err().to_string().contains("kid (4)"));
    }

    #[test]
    fn no_altered_or_cut_backup_opens() {
        let backup = backup_of(&SecretBytes::new(vec![3; 50]));
        for at in 0..backup.len() {
            let mut altered = backup.clone();
            altered[at] ^= 1;
            assert!(opened(&altered, 7, 1, b"certificate").is_err(), "{at}");
            assert!(opened(&backup[..at], 7, 1, b"certificate").is_err(), "{at}");
        }
    }

    #[test]
    fn a_good_backup_is_accepted_as_it_is() {
        let package = samples::package(Some(KeyKind::Rsa2048));
        let bytes = package.encode().unwrap();
        let backup = backup_of(&bytes);
        let accepted = BackupPackage::accept(&backup, &RULES, &chip(1), &bytes, &package.secrets()).unwrap();
        assert_eq!(accepted.as_bytes(), backup);
    }

    #[test]
    fn a_backup_of_the_wrong_size_is_refused() {
        let package = samples::package(Some(KeyKind::P256)).encode().unwrap();
        let backup = backup_of(&package);
        let small = BackupRules { max_bytes: backup.len() - 1, ..RULES };
        assert!(matches!(accepted(&backup, &small), Err(BackupRefused::TooLarge { .. })));
        let boundless = BackupRules { format: BackupFormat::Opaque, max_bytes: usize::MAX };
        assert!(accepted(&vec![0; MAX_BACKUP_LEN], &boundless).is_ok());
        assert!(matches!(accepted(&vec![0; MAX_BACKUP_LEN + 1], &boundless), Err(BackupRefused::TooLarge { .. })));
        assert!(accepted(&[], &OPAQUE).unwrap_err().to_string().contains("empty"));
        let shorter = backup_of(&SecretBytes::copy_of(&package.expose()[1..]));
        assert!(accepted(&shorter, &RULES).unwrap_err().to_string().contains("ciphertext"));
    }

    #[test]
    fn a_backup_has_one_form_only() {
        let package = samples::package(Some(KeyKind::P256)).encode().unwrap();
        let backup = backup_of(&package);
        for (wrong, why) in [
            (backup[1..].to_vec(), "COSE_Encrypt0"),
            ([&backup[..], &[0]].concat(), "COSE_Encrypt0"),
            ([&[0xd0, 0x98, 3], &backup[2..]].concat(), "deterministic"),
            ([&[0xd8, 0x10], &backup[1..]].concat(), "deterministic"),
        ] {
            assert!(accepted(&wrong, &RULES).unwrap_err().to_string().contains(why), "{why}");
        }
        let other = make_backup(&package, &chip_key(7), &chip(2), b"", BackupIv::random().unwrap()).unwrap();
        assert!(accepted(&other, &RULES).unwrap_err().to_string().contains(&chip(2).to_string()));
    }

    #[test]
    fn a_secret_in_clear_is_found_in_every_form() {
        let package = samples::package(Some(KeyKind::P256));
        for secret in package.secrets() {
            let secret = secret.expose();
            for form in [
                secret.clone(),
                secret.iter().rev().copied().collect(),
                hex::encode(secret).into_bytes(),
                hex::encode_upper(secret).into_bytes(),
            ] {
                let leaking = [&[0x55; 33], form.as_slice(), &[0x55; 5]].concat();
                let accepted =
                    BackupPackage::accept(&leaking, &OPAQUE, &chip(1), &package.encode().unwrap(), &package.secrets());
                assert!(matches!(accepted, Err(BackupRefused::SecretInClear { .. })));
            }
        }
    }

    #[test]
    fn a_package_in_clear_is_found_even_without_its_secrets() {
        let bytes = samples::package(Some(KeyKind::P256)).encode().unwrap();
        let accept = |rules| BackupPackage::accept(bytes.expose(), rules, &chip(1), &bytes, &[]);
        assert_eq!(accept(&OPAQUE).unwrap_err(), BackupRefused::PackageInClear);
        // The same within the right envelope: a device that forgot to encrypt.
        let plain = [bytes.expose().as_slice(), &[0; 16]].concat();
        let forgot = envelope(&chip(1), vec![0; 12], plain).unwrap();
        let refused = BackupPackage::accept(&forgot, &RULES, &chip(1), &bytes, &[]).unwrap_err();
        assert_eq!(refused, BackupRefused::PackageInClear);
    }

    proptest! {
        #[test]
        fn reading_never_panics(bytes: Vec<u8>) {
            prop_assert!(opened(&bytes, 7, 1, b"").is_err());
            prop_assert!(accepted(&[&[0xd0, 0x83], bytes.as_slice()].concat(), &RULES).is_err());
        }
    }
}
