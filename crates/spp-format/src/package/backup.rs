//! Backup package: the data package encrypted under the chip key (`backup-package` in `proto/data-package.cddl`).
//!
//! COSE_Encrypt0 (RFC 9052 §5.2) with A256GCM. The device encrypts and decrypts it. The SPP has no chip key; it checks
//! everything that is visible without the key before it publishes the backup permanently.

use coset::{
    Algorithm, CoseEncrypt0, CoseEncrypt0Builder, EncryptionContext, HeaderBuilder, ProtectedHeader,
    TaggedCborSerializable as _, enc_structure_data, iana,
};

use super::clear::Haystack;
use super::{MAX_BACKUP_LEN, data, gcm};
use crate::cbor::Writer;
use crate::keys::sha256;
use crate::names::ChipId;
use crate::secret::{Secret, SecretBytes};

/// Number of bytes of the package's key area that must not occur in clear.
const KEY_AREA_PROBE: usize = 64;

/// Why a backup package was rejected or failed to decrypt. Never contains secret values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackupError {
    /// Larger than the profile or [`MAX_BACKUP_LEN`] allows.
    #[error("backup package too large: {bytes} bytes, at most {max} are allowed")]
    TooLarge {
        /// The actual size.
        bytes: usize,
        /// The allowed size.
        max: usize,
    },
    /// A field is missing or invalid.
    #[error("backup package, {field}: {problem}")]
    Field {
        /// The field as named in `proto/data-package.cddl`.
        field: &'static str,
        /// Description of the problem.
        problem: String,
    },
    /// The backup contains a device key in clear.
    #[error("backup package contains a device key in clear ({form}); the device must encrypt it")]
    SecretInClear {
        /// The encoding in which the key was found.
        form: &'static str,
    },
    /// The backup contains the data package in clear.
    #[error("backup package contains the data package in clear; the device must encrypt it")]
    PackageInClear,
    /// Encrypted by another chip or for another certificate, or modified.
    #[error("backup package does not decrypt with this chip's key and this certificate; fetch the record of this chip")]
    DoesNotOpen,
    /// The cryptographic provider failed unexpectedly.
    #[error("the cryptographic provider failed to encrypt the backup package; retry")]
    Provider,
}

/// The backup format and size that a profile accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackupRules {
    /// The format.
    pub format: BackupFormat,
    /// Maximum size in bytes; [`MAX_BACKUP_LEN`] always applies as well.
    pub max_bytes: usize,
}

/// Formats of backup packages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupFormat {
    /// `backup-package` of `proto/data-package.cddl`.
    Cose,
    /// The chip's own format. Only its size and the absence of secrets in clear can be checked.
    Opaque,
}

/// An initialization vector for exactly one backup: encryption consumes it.
pub struct BackupIv([u8; gcm::IV_LEN]);

impl BackupIv {
    /// Generates a random IV. A chip creates a handful of backups in its lifetime, far below the 2^32 of NIST SP 800-38D §8.3.
    ///
    /// # Errors
    /// If the provider's random number generator fails.
    pub fn random() -> Result<Self, BackupError> {
        let mut bytes = [0; gcm::IV_LEN];
        aws_lc_rs::rand::fill(&mut bytes).map_err(|_| BackupError::Provider)?;
        Ok(Self(bytes))
    }

    /// For test vectors only: reusing an IV breaks the key.
    #[doc(hidden)]
    pub const fn fixed_for_test_vectors_only(bytes: [u8; gcm::IV_LEN]) -> Self {
        Self(bytes)
    }
}

/// Encrypts a data package under the chip key, inside the device. The backup is bound to the chip and the certificate.
///
/// # Errors
/// If the provider fails.
pub fn make_backup(
    package: &SecretBytes,
    chip_key: &Secret<[u8; 32]>,
    chip: &ChipId,
    certificate: &[u8],
    iv: BackupIv,
) -> Result<Vec<u8>, BackupError> {
    let aad = enc_structure(chip, certificate)?;
    let ciphertext = gcm::encrypt(chip_key, iv.0, &aad, package).ok_or(BackupError::Provider)?;
    encode_envelope(chip, iv.0.to_vec(), ciphertext)
}

/// Decrypts a backup inside the device that created it.
///
/// # Errors
/// If the backup is malformed (the error names the field) or does not decrypt with this key and this certificate.
pub fn open_backup(
    backup: &[u8],
    chip_key: &Secret<[u8; 32]>,
    chip: &ChipId,
    certificate: &[u8],
) -> Result<SecretBytes, BackupError> {
    let parts = BackupParts::parse(backup, MAX_BACKUP_LEN, chip)?;
    let aad = enc_structure(chip, certificate)?;
    gcm::decrypt(chip_key, parts.iv, &aad, &parts.ciphertext).ok_or(BackupError::DoesNotOpen)
}

/// A backup that may be published: it passed every check that is possible without the chip key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupPackage {
    bytes: Vec<u8>,
}

impl BackupPackage {
    /// Accepts the backup that the session's device returned: correct form and size, the right chip, no secret in clear.
    /// `package` is the delivered package; `secrets` are its keys, see [`super::DataPackage::secrets`].
    ///
    /// # Errors
    /// The error names the rejected part and the reason; the station may retry with another backup.
    pub fn accept(
        bytes: &[u8],
        rules: &BackupRules,
        chip: &ChipId,
        package: &SecretBytes,
        secrets: &[&SecretBytes],
    ) -> Result<Self, BackupError> {
        let max = rules.max_bytes.min(MAX_BACKUP_LEN);
        match rules.format {
            BackupFormat::Cose => {
                let parts = BackupParts::parse(bytes, max, chip)?;
                // Exposed to read its length.
                let expected = package.expose().len() + gcm::TAG_LEN;
                if parts.ciphertext.len() != expected {
                    let found = parts.ciphertext.len();
                    let problem = format!("{found} bytes, expected {expected} for the delivered package");
                    return Err(BackupError::Field { field: "ciphertext", problem });
                }
            }
            BackupFormat::Opaque => check_size(bytes, max)?,
        }
        check_no_clear_secrets(bytes, package, secrets)?;
        Ok(Self { bytes: bytes.to_vec() })
    }

    /// The bytes to publish.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes to publish.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// The fields of a COSE backup that are visible without the chip key.
struct BackupParts {
    iv: [u8; gcm::IV_LEN],
    ciphertext: Vec<u8>,
}

impl BackupParts {
    fn parse(bytes: &[u8], max: usize, chip: &ChipId) -> Result<Self, BackupError> {
        check_size(bytes, max)?;
        let cose = CoseEncrypt0::from_tagged_slice(bytes).map_err(field("COSE_Encrypt0"))?;
        let protected = &cose.protected.header;
        if protected.alg != Some(Algorithm::Assigned(iana::Algorithm::A256GCM)) {
            return Err(field("algorithm (1)")("the protected header does not contain 3 (A256GCM)"));
        }
        if protected.key_id != chip.as_bytes() {
            let kid: String = hex::encode(&protected.key_id).chars().take(2 * ChipId::MAX_LEN).collect();
            return Err(field("kid (4)")(format!("chip \"{kid}\", expected {chip}")));
        }
        let iv = cose.unprotected.iv.as_slice().try_into().map_err(|_| field("IV (5)")("not 12 bytes"))?;
        let ciphertext = cose.ciphertext.ok_or_else(|| field("ciphertext")("missing"))?;
        // Re-encoding must yield the same bytes, which excludes other headers and non-deterministic encodings.
        if encode_envelope(chip, cose.unprotected.iv, ciphertext.clone())? != bytes {
            return Err(field("COSE_Encrypt0")("unexpected headers or non-deterministic encoding"));
        }
        Ok(Self { iv, ciphertext })
    }
}

fn check_size(bytes: &[u8], max: usize) -> Result<(), BackupError> {
    if bytes.len() > max {
        return Err(BackupError::TooLarge { bytes: bytes.len(), max });
    }
    if bytes.is_empty() {
        return Err(field("content")("empty"));
    }
    Ok(())
}

fn check_no_clear_secrets(bytes: &[u8], package: &SecretBytes, secrets: &[&SecretBytes]) -> Result<(), BackupError> {
    let haystack = Haystack::new(bytes);
    if let Some(form) = secrets.iter().find_map(|secret| haystack.find(secret)) {
        return Err(BackupError::SecretInClear { form });
    }
    // Exposed to search for it.
    let keys = data::key_area(package.expose()).unwrap_or_default();
    let probe = &keys[..keys.len().min(KEY_AREA_PROBE)];
    if !probe.is_empty() && memchr::memmem::find(bytes, probe).is_some() {
        return Err(BackupError::PackageInClear);
    }
    Ok(())
}

/// Encodes a backup in its only allowed form.
fn encode_envelope(chip: &ChipId, iv: Vec<u8>, ciphertext: Vec<u8>) -> Result<Vec<u8>, BackupError> {
    CoseEncrypt0Builder::new()
        .protected(protected(chip).header)
        .unprotected(HeaderBuilder::new().iv(iv).build())
        .ciphertext(ciphertext)
        .build()
        .to_tagged_vec()
        .map_err(field("COSE_Encrypt0"))
}

/// Encodes the `Enc_structure` (RFC 9052 §5.3) with chip and certificate as external data: a backup cannot be moved to another
/// chip or certificate.
fn enc_structure(chip: &ChipId, certificate: &[u8]) -> Result<Vec<u8>, BackupError> {
    let mut external = Writer::with_limit(128);
    external.array(4).text("spp-backup").int(1).bytes(chip.as_bytes()).bytes(&sha256(certificate));
    let external = external.finish_public().ok_or_else(|| field("external data")("too long"))?;
    Ok(enc_structure_data(EncryptionContext::CoseEncrypt0, protected(chip), &external))
}

fn protected(chip: &ChipId) -> ProtectedHeader {
    let header = HeaderBuilder::new().algorithm(iana::Algorithm::A256GCM).key_id(chip.as_bytes().to_vec()).build();
    ProtectedHeader { original_data: None, header }
}

fn field<E: std::fmt::Display>(field: &'static str) -> impl FnOnce(E) -> BackupError {
    move |problem| BackupError::Field { field, problem: problem.to_string() }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{self, chip, chip_key};
    use super::*;
    use crate::keys::KeyType;
    use proptest::prelude::*;

    const RULES: BackupRules = BackupRules { format: BackupFormat::Cose, max_bytes: 8192 };
    const OPAQUE: BackupRules = BackupRules { format: BackupFormat::Opaque, max_bytes: 8192 };

    fn backup_of(package: &SecretBytes) -> Vec<u8> {
        make_backup(package, &chip_key(7), &chip(1), b"certificate", BackupIv::random().unwrap()).unwrap()
    }

    fn decrypt(backup: &[u8], key: u8, chip_byte: u8, certificate: &[u8]) -> Result<Vec<u8>, BackupError> {
        open_backup(backup, &chip_key(key), &chip(chip_byte), certificate).map(|package| package.expose().clone())
    }

    /// Accepts bytes for the sample package with all its secrets.
    fn accepted(bytes: &[u8], rules: &BackupRules) -> Result<BackupPackage, BackupError> {
        let package = samples::package(Some(KeyType::P256));
        BackupPackage::accept(bytes, rules, &chip(1), &package.encode().unwrap(), &package.secrets())
    }

    #[test]
    fn backup_decrypts_only_with_its_chip_key_and_certificate() {
        let package = samples::package(Some(KeyType::Ed25519)).encode().unwrap();
        let backup = backup_of(&package);
        assert_eq!(decrypt(&backup, 7, 1, b"certificate").as_ref(), Ok(package.expose()));
        assert_eq!(decrypt(&backup, 8, 1, b"certificate"), Err(BackupError::DoesNotOpen));
        assert_eq!(decrypt(&backup, 7, 1, b"another"), Err(BackupError::DoesNotOpen));
        assert!(decrypt(&backup, 7, 2, b"certificate").unwrap_err().to_string().contains("kid (4)"));
    }

    #[test]
    fn altered_or_truncated_backup_rejected() {
        let backup = backup_of(&SecretBytes::new(vec![3; 50]));
        for index in 0..backup.len() {
            let mut altered = backup.clone();
            altered[index] ^= 1;
            assert!(decrypt(&altered, 7, 1, b"certificate").is_err(), "{index}");
            assert!(decrypt(&backup[..index], 7, 1, b"certificate").is_err(), "{index}");
        }
    }

    #[test]
    fn valid_backup_accepted_unchanged() {
        let package = samples::package(Some(KeyType::Rsa2048));
        let bytes = package.encode().unwrap();
        let backup = backup_of(&bytes);
        let accepted = BackupPackage::accept(&backup, &RULES, &chip(1), &bytes, &package.secrets()).unwrap();
        assert_eq!(accepted.as_bytes(), backup);
    }

    #[test]
    fn backup_of_wrong_size_rejected() {
        let package = samples::package(Some(KeyType::P256)).encode().unwrap();
        let backup = backup_of(&package);
        let small = BackupRules { max_bytes: backup.len() - 1, ..RULES };
        assert!(matches!(accepted(&backup, &small), Err(BackupError::TooLarge { .. })));
        let boundless = BackupRules { format: BackupFormat::Opaque, max_bytes: usize::MAX };
        assert!(accepted(&vec![0; MAX_BACKUP_LEN], &boundless).is_ok());
        assert!(matches!(accepted(&vec![0; MAX_BACKUP_LEN + 1], &boundless), Err(BackupError::TooLarge { .. })));
        assert!(accepted(&[], &OPAQUE).unwrap_err().to_string().contains("empty"));
        let shorter = backup_of(&SecretBytes::copy_of(&package.expose()[1..]));
        assert!(accepted(&shorter, &RULES).unwrap_err().to_string().contains("ciphertext"));
    }

    #[test]
    fn backup_in_other_encoding_rejected() {
        let package = samples::package(Some(KeyType::P256)).encode().unwrap();
        let backup = backup_of(&package);
        for (wrong, reason) in [
            (backup[1..].to_vec(), "COSE_Encrypt0"),
            ([&backup[..], &[0]].concat(), "COSE_Encrypt0"),
            ([&[0xd0, 0x98, 3], &backup[2..]].concat(), "deterministic"),
            ([&[0xd8, 0x10], &backup[1..]].concat(), "deterministic"),
        ] {
            assert!(accepted(&wrong, &RULES).unwrap_err().to_string().contains(reason), "{reason}");
        }
        let other = make_backup(&package, &chip_key(7), &chip(2), b"", BackupIv::random().unwrap()).unwrap();
        assert!(accepted(&other, &RULES).unwrap_err().to_string().contains(&chip(2).to_string()));
    }

    #[test]
    fn clear_secret_in_every_encoding_rejected() {
        let package = samples::package(Some(KeyType::P256));
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
                assert!(matches!(accepted, Err(BackupError::SecretInClear { .. })));
            }
        }
    }

    #[test]
    fn clear_package_without_secrets_rejected() {
        let bytes = samples::package(Some(KeyType::P256)).encode().unwrap();
        let accept = |rules| BackupPackage::accept(bytes.expose(), rules, &chip(1), &bytes, &[]);
        assert_eq!(accept(&OPAQUE).unwrap_err(), BackupError::PackageInClear);
        // The same in a valid envelope, as if the device skipped encryption.
        let plain = [bytes.expose().as_slice(), &[0; 16]].concat();
        let unencrypted = encode_envelope(&chip(1), vec![0; 12], plain).unwrap();
        let refused = BackupPackage::accept(&unencrypted, &RULES, &chip(1), &bytes, &[]).unwrap_err();
        assert_eq!(refused, BackupError::PackageInClear);
    }

    proptest! {
        #[test]
        fn parse_never_panics(bytes: Vec<u8>) {
            prop_assert!(decrypt(&bytes, 7, 1, b"").is_err());
            prop_assert!(accepted(&[&[0xd0, 0x83], bytes.as_slice()].concat(), &RULES).is_err());
        }
    }
}
