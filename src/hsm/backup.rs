//! Backs up ceremony keys, wrapped under a backup key at generation, and restores them to another token.
//!
//! A key that is not extractable cannot be wrapped. Therefore a key with a backup is generated as an extractable session object,
//! which no other process can see, is wrapped, and is copied to the token as a key that is not extractable. Then the session
//! object is destroyed. The backup key on the token can only wrap: reading a backup requires the officers' shares.

use std::collections::BTreeMap;

use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrapPadded as _};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, KeyType as CkKeyType, ObjectClass, ObjectHandle};
use spp_format::keys::{KeyType, PublicKey};
use spp_format::names::KeyName;
use spp_format::secret::SecretBytes;
use zeroize::Zeroizing;

use super::attributes::{KeyRole, Provenance, pair_generation};
use super::failure::{Failure, FailureContext as _, HsmError};
use super::failure_class::FailureClass;
use super::kdf::Prf;
use super::key_manifest::BackupKey;
use super::module::{ModuleProfile, WrapMechanism};
use super::objects::{Ceremony, CreatedKey, NewKeyParts, master_generation, public_template, to_hsm_error};
use super::operations::TokenOperations;
use super::token::find_one;
use super::wire::WirePublicKey;

/// Length of a backup key in bytes: AES-256.
pub const BACKUP_KEY_LEN: u32 = 32;
/// Length of its check value in bytes.
const CHECK_LEN: usize = 8;
/// The input of the check value.
const CHECK_INPUT: [u8; 32] = [0; 32];
/// Length of the digest in a seal, SHA-384. No backed-up key has this length, so a seal and a backup cannot be confused.
pub const SEALED_LEN: usize = 48;

/// The type of a wrapped key, which the token needs to unwrap it.
#[derive(Debug, Clone)]
pub enum Restorable {
    /// A key pair that signs.
    Signing(PublicKey),
    /// A master key.
    Master(Prf),
}

/// The check value of a backup key held by this process: the first 8 bytes of the result of wrapping 32 zero bytes (RFC 5649).
pub fn backup_check_value(key: &SecretBytes) -> Result<Vec<u8>, HsmError> {
    let mut wrapped = [0; 40];
    // Exposed for one use as a key; the library wipes the cipher's copy.
    let kek = AesKek::new(&AES_256, key.expose()).map_err(|_| unusable())?;
    let wrapped = kek.wrap_with_padding(&CHECK_INPUT, &mut wrapped).map_err(|_| unusable())?;
    Ok(wrapped[..CHECK_LEN].to_vec())
}

/// Whether a seal contains this digest. The seal is unwrapped in this process.
pub fn is_sealed(key: &SecretBytes, seal: &[u8], digest: &[u8; SEALED_LEN]) -> bool {
    let unwrapped = unwrap_here(key, seal);
    unwrapped.is_ok_and(|sealed| aws_lc_rs::constant_time::verify_slices_are_equal(&sealed, digest).is_ok())
}

fn unusable() -> HsmError {
    HsmError::InvalidAnswer("backup key: expected exactly 32 bytes".to_owned())
}

impl ModuleProfile {
    /// Checks that this module can create and restore backups.
    pub fn check_backup_support(&self) -> Result<(), HsmError> {
        if self.wrap == WrapMechanism::AesKeyWrapPad {
            return Ok(());
        }
        let message = "the module lacks AES-KWP (RFC 5649), which backups require; use the vendor's backup function";
        Err(HsmError::Refused(message.to_owned()))
    }
}

impl Ceremony {
    /// Secret random bytes from the HSM.
    pub fn random_secret(&self, len: u32) -> Result<SecretBytes, HsmError> {
        self.random(len).map(SecretBytes::new)
    }

    /// Imports a backup key to the token, for wrapping only.
    pub fn create_backup_key(&self, name: &KeyName, key: &SecretBytes) -> Result<CreatedKey, HsmError> {
        self.create(name, KeyRole::Backup, |operations, id| {
            let mut template = KeyRole::Backup.template(name, id, &self.profile);
            template.extend([Attribute::Class(ObjectClass::SECRET_KEY), Attribute::KeyType(CkKeyType::AES)]);
            // Exposed for the import. cryptoki does not wipe the attribute; the process ends with the ceremony.
            template.push(Attribute::Value(key.expose().clone()));
            operations.session().create_object(&template).context(|| format!("importing {name}"))?;
            Ok(NewKeyParts { provenance: Provenance::Imported, ..NewKeyParts::default() })
        })
    }

    /// The check value of a backup key on the token.
    pub fn check_value_of_backup_key(&self, key: &BackupKey) -> Result<Vec<u8>, HsmError> {
        let mut wrapped = self.wrap_bytes(key, &CHECK_INPUT)?;
        wrapped.truncate(CHECK_LEN);
        Ok(wrapped)
    }

    /// Binds a digest to a backup key. AES-KWP authenticates: a seal that [`is_sealed`] accepts cannot be created without the
    /// key.
    pub fn seal(&self, under: &BackupKey, digest: &[u8; SEALED_LEN]) -> Result<Vec<u8>, HsmError> {
        self.wrap_bytes(under, digest)
    }

    /// Wraps bytes that are not secret under a backup key of the token.
    fn wrap_bytes(&self, key: &BackupKey, bytes: &[u8]) -> Result<Vec<u8>, HsmError> {
        let run = |operations: &mut TokenOperations| -> Result<Vec<u8>, Failure> {
            let kek = find_one(operations.session(), ObjectClass::SECRET_KEY, &key.name, &key.id)?;
            let object = operations.session_secret(CkKeyType::GENERIC_SECRET, bytes)?;
            let wrapped = operations.wrap_under(kek, object);
            operations.destroy_session_object(object)?;
            wrapped
        };
        run(&mut self.operations(BTreeMap::new())?).map_err(to_hsm_error)
    }

    /// Generates a signing pair and its backup under the given backup key.
    pub fn create_signing_key_with_backup(
        &self,
        name: &KeyName,
        kind: KeyType,
        under: &BackupKey,
    ) -> Result<CreatedKey, HsmError> {
        self.create(name, KeyRole::Signing(kind), |operations, id| {
            let kek = find_one(operations.session(), ObjectClass::SECRET_KEY, &under.name, &under.id)?;
            match self.profile.unwrappable.contains(&kind) {
                true => self.make_seed(operations, (name, id), kind, kek),
                false => self.make_pair(operations, (name, id), kind, kek),
            }
        })
    }

    /// Generates a master key and its backup under the given backup key.
    pub fn create_master_key_with_backup(
        &self,
        name: &KeyName,
        prf: Prf,
        under: &BackupKey,
    ) -> Result<CreatedKey, HsmError> {
        let role = KeyRole::master(prf, self.profile.kdf);
        self.create(name, role, |operations, id| {
            let kek = find_one(operations.session(), ObjectClass::SECRET_KEY, &under.name, &under.id)?;
            let mut template = session_template(role.template(name, id, &self.profile), Attribute::Extractable(true));
            template.push(Attribute::ValueLen(32.into()));
            let made = operations.session().generate_key(&master_generation(prf), &template);
            let made = made.context(|| format!("generating {name}"))?;
            let wrapped = Self::wrap_and_copy(operations, name, made, kek);
            operations.destroy_session_object(made)?;
            Ok(NewKeyParts { public: None, provenance: Provenance::BackedUp, wrapped: Some(wrapped?) })
        })
    }

    fn make_pair(
        &self,
        operations: &TokenOperations,
        (name, id): (&KeyName, &[u8]),
        kind: KeyType,
        kek: ObjectHandle,
    ) -> Result<NewKeyParts, Failure> {
        let role = KeyRole::Signing(kind);
        let (mechanism, mut public) = pair_generation(kind);
        public.extend(public_template(name, id));
        let private = session_template(role.template(name, id, &self.profile), Attribute::Extractable(true));
        let pair = operations.session().generate_key_pair(&mechanism, &public, &private);
        let (public, private) = pair.context(|| format!("generating {name}"))?;
        let wrapped = Self::wrap_and_copy(operations, name, private, kek);
        operations.destroy_session_object(private)?;
        let public = Some(operations.public_key(kind, public)?);
        Ok(NewKeyParts { public, provenance: Provenance::BackedUp, wrapped: Some(wrapped?) })
    }

    fn wrap_and_copy(
        operations: &TokenOperations,
        name: &KeyName,
        made: ObjectHandle,
        kek: ObjectHandle,
    ) -> Result<Vec<u8>, Failure> {
        let wrapped = operations.wrap_under(kek, made)?;
        // CKA_COPYABLE is unchanged, because SoftHSM accepts no other value for a copy. This is safe: a copy of a key that is not
        // extractable is not extractable either.
        let template = [Attribute::Token(true), Attribute::Extractable(false), Attribute::Modifiable(false)];
        operations.session().copy_object(made, &template).context(|| format!("copying {name} to the token"))?;
        Ok(wrapped)
    }

    /// Generates a pair of a key type that the module cannot wrap: in this process from the HSM's random numbers. The seed is
    /// wrapped.
    fn make_seed(
        &self,
        operations: &TokenOperations,
        (name, id): (&KeyName, &[u8]),
        kind: KeyType,
        kek: ObjectHandle,
    ) -> Result<NewKeyParts, Failure> {
        let (public, seed) = operations.seed_outside(kind)?;
        let object = operations.session_secret(CkKeyType::GENERIC_SECRET, &seed)?;
        let wrapped = operations.wrap_under(kek, object);
        operations.destroy_session_object(object)?;
        self.import_seed_pair(operations, (name, id), kind, &seed)?;
        let WirePublicKey::Ed25519(point) = &public else {
            return Err(Failure::new(FailureClass::Rejected, "only ed25519 pairs can be generated from a seed"));
        };
        create_public(operations, (name, id), kind, byte_string(point)?)?;
        Ok(NewKeyParts { public: Some(public), provenance: Provenance::Imported, wrapped: Some(wrapped?) })
    }

    fn import_seed_pair(
        &self,
        operations: &TokenOperations,
        (name, id): (&KeyName, &[u8]),
        kind: KeyType,
        seed: &[u8],
    ) -> Result<(), Failure> {
        let mut private = KeyRole::Signing(kind).template(name, id, &self.profile);
        private.extend([Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::KeyType(CkKeyType::EC_EDWARDS)]);
        private.extend(pair_generation(kind).1);
        // cryptoki does not wipe the attribute; the process ends with the ceremony.
        private.push(Attribute::Value(seed.to_vec()));
        operations.session().create_object(&private).map(drop).context(|| format!("importing {name} to the token"))
    }

    /// Unwraps a key onto the token as a key that is not extractable. The caller must verify that it is the right key.
    pub fn restore(
        &self,
        name: &KeyName,
        id: &[u8],
        what: &Restorable,
        wrapped: &[u8],
        key: &SecretBytes,
    ) -> Result<CreatedKey, HsmError> {
        let role = match what {
            Restorable::Signing(public) => KeyRole::Signing(public.kind()),
            Restorable::Master(prf) => KeyRole::master(*prf, self.profile.kdf),
        };
        let restored = self.create_with_id(name, id, role, |operations, id| {
            match what {
                Restorable::Signing(public) if self.profile.unwrappable.contains(&public.kind()) => {
                    let seed = unwrap_here(key, wrapped)?;
                    self.import_seed_pair(operations, (name, id), public.kind(), &seed)?;
                }
                _ => self.unwrap_inside(operations, (name, id), role, wrapped, key)?,
            }
            if let Restorable::Signing(public) = what {
                create_public(operations, (name, id), public.kind(), public_part(public)?)?;
            }
            Ok(NewKeyParts { provenance: Provenance::Imported, ..NewKeyParts::default() })
        });
        let public = match what {
            Restorable::Signing(public) => Some(public.clone()),
            Restorable::Master(_) => None,
        };
        restored.map(|restored| CreatedKey { public, ..restored })
    }

    fn unwrap_inside(
        &self,
        operations: &TokenOperations,
        (name, id): (&KeyName, &[u8]),
        role: KeyRole,
        wrapped: &[u8],
        key: &SecretBytes,
    ) -> Result<(), Failure> {
        let unwrapping = [
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(CkKeyType::AES),
            Attribute::Token(false),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
            Attribute::Unwrap(true),
            // Exposed for this import.
            Attribute::Value(key.expose().clone()),
        ];
        let kek = operations.session().create_object(&unwrapping).context(|| "importing the backup key".to_owned())?;
        let mut template = session_template(role.template(name, id, &self.profile), Attribute::Extractable(false));
        template.push(Attribute::Class(role.class()));
        template.extend(role.key_types().first().map(|key_type| Attribute::KeyType(*key_type)));
        let restored = operations.session().unwrap_key(&Mechanism::AesKeyWrapPad, kek, wrapped, &template);
        operations.destroy_session_object(kek)?;
        let restored = restored.context(|| format!("unwrapping {name}"))?;
        // A copy, because SoftHSM cannot make an unwrapped key unmodifiable.
        let token_template = [Attribute::Token(true), Attribute::Modifiable(false)];
        let copied = operations.session().copy_object(restored, &token_template);
        operations.destroy_session_object(restored)?;
        copied.map(drop).context(|| format!("copying {name} to the token"))
    }
}

/// Changes a template to that of a session object that can be copied, and wrapped if it is extractable.
fn session_template(mut template: Vec<Attribute>, extractable: Attribute) -> Vec<Attribute> {
    let token_only = [
        Attribute::Token(true),
        Attribute::Extractable(false),
        Attribute::Modifiable(false),
        Attribute::Copyable(false),
    ];
    template.retain(|attribute| !token_only.contains(attribute));
    template.extend([Attribute::Token(false), extractable]);
    template
}

/// Unwraps a key in this process, for key types that the module cannot unwrap.
fn unwrap_here(key: &SecretBytes, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let broken = |_| {
        Failure::new(FailureClass::Rejected, "cannot unwrap the backup: it was modified, or another key wrapped it")
    };
    let mut plain = Zeroizing::new(vec![0; wrapped.len()]);
    // Exposed for one use as a key.
    let kek = AesKek::new(&AES_256, key.expose()).map_err(broken)?;
    let len = kek.unwrap_with_padding(wrapped, &mut plain).map_err(broken)?.len();
    plain.truncate(len);
    Ok(plain)
}

fn create_public(
    operations: &TokenOperations,
    (name, id): (&KeyName, &[u8]),
    kind: KeyType,
    part: Vec<Attribute>,
) -> Result<(), Failure> {
    let key_type = match kind {
        KeyType::P256 | KeyType::P384 => CkKeyType::EC,
        KeyType::Ed25519 => CkKeyType::EC_EDWARDS,
        KeyType::Rsa2048 | KeyType::Rsa3072 | KeyType::Rsa4096 => CkKeyType::RSA,
    };
    let mut template = public_template(name, id);
    template.extend([Attribute::Class(ObjectClass::PUBLIC_KEY), Attribute::KeyType(key_type)]);
    if kind.rsa_bits().is_none() {
        template.extend(pair_generation(kind).1);
    }
    template.extend(part);
    operations
        .session()
        .create_object(&template)
        .map(drop)
        .context(|| format!("importing the public key of {name} to the token"))
}

fn public_part(public: &PublicKey) -> Result<Vec<Attribute>, Failure> {
    match public.rsa_components() {
        Some((modulus, exponent)) => Ok(vec![Attribute::Modulus(modulus), Attribute::PublicExponent(exponent)]),
        None => byte_string(public.key_bits()),
    }
}

/// Encodes CKA_EC_POINT, a DER OCTET STRING (PKCS#11 v2.40 §2.3.3).
fn byte_string(point: &[u8]) -> Result<Vec<Attribute>, Failure> {
    use der::Encode as _;
    let point = der::asn1::OctetStringRef::new(point).and_then(|point| point.to_der());
    let point = point.map_err(|e| Failure::new(FailureClass::Rejected, e.to_string()))?;
    Ok(vec![Attribute::EcPoint(point)])
}
