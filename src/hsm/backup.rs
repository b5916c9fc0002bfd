//! Backups of ceremony keys: wrapped under a backup key while they are made, unwrapped from there onto another token.
//!
//! A key that cannot leave the token cannot be wrapped either. So a key with a backup is made as an extractable session object,
//! which no other process can see, is wrapped, and is copied to the token as one that cannot be extracted; then the session
//! object is destroyed. The backup key itself is on the token for wrapping alone: reading a backup needs the officers' shares.

use std::collections::BTreeMap;

use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrapPadded as _};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, KeyType, ObjectClass, ObjectHandle};
use zeroize::Zeroizing;

use super::attributes::{KeyRole, Provenance, pair_generation};
use super::failure::{Doing as _, Failure, FailureClass, HsmError};
use super::kdf::Prf;
use super::key_manifest::BackupKey;
use super::module::{ModuleProfile, WrapMechanism};
use super::objects::{Ceremony, CreatedKey, Made, master_generation, public_template, refused};
use super::operations::TokenOperations;
use super::token::find_one;
use super::wire::WirePublicKey;
use crate::keys::{KeyKind, PublicKey};
use crate::names::KeyName;
use crate::secret::SecretBytes;

/// Bytes of a backup key: AES-256.
pub const BACKUP_KEY_LEN: u32 = 32;
/// Bytes of its check value.
const CHECK_LEN: usize = 8;
/// What the check value is made of.
const CHECKED: [u8; 32] = [0; 32];
/// Bytes of what a seal is made of, SHA-384: no key that is backed up has so many, so that neither passes for the other.
pub const SEALED_LEN: usize = 48;

/// What a wrapped key is, as far as the token must be told.
#[derive(Debug, Clone)]
pub enum Restorable {
    /// A key pair that signs.
    Signing(PublicKey),
    /// A master key.
    Master(Prf),
}

/// The check value of a backup key that is in this process: the first 8 bytes of what RFC 5649 makes of 32 zero bytes under it.
pub fn backup_check_value(key: &SecretBytes) -> Result<Vec<u8>, HsmError> {
    let mut wrapped = [0; 40];
    // Exposed to be used as a key once; the cipher's own copy is wiped by its library.
    let kek = AesKek::new(&AES_256, key.expose()).map_err(|_| unusable())?;
    let wrapped = kek.wrap_with_padding(&CHECKED, &mut wrapped).map_err(|_| unusable())?;
    Ok(wrapped[..CHECK_LEN].to_vec())
}

/// Whether a seal is that of this digest: it is unwrapped with the key in this process.
pub fn is_sealed(key: &SecretBytes, seal: &[u8], digest: &[u8; SEALED_LEN]) -> bool {
    let unwrapped = unwrap_here(key, seal);
    unwrapped.is_ok_and(|sealed| aws_lc_rs::constant_time::verify_slices_are_equal(&sealed, digest).is_ok())
}

fn unusable() -> HsmError {
    HsmError::Wrong("a backup key has exactly 32 bytes".to_owned())
}

impl ModuleProfile {
    /// Whether this module can make and restore backups; the reason if not.
    pub fn can_back_up(&self) -> Result<(), HsmError> {
        if self.wrap == WrapMechanism::AesKeyWrapPad {
            return Ok(());
        }
        let message =
            "backups are wrapped with AES-KWP (RFC 5649), which this module has not; use its own means of backup";
        Err(HsmError::Refused(message.to_owned()))
    }
}

impl Ceremony {
    /// Random bytes of the HSM that are secret.
    pub fn random_secret(&self, len: u32) -> Result<SecretBytes, HsmError> {
        self.random(len).map(SecretBytes::new)
    }

    /// Puts a backup key on the token, for wrapping alone.
    pub fn create_backup_key(&self, name: &KeyName, key: &SecretBytes) -> Result<CreatedKey, HsmError> {
        self.create(name, KeyRole::Backup, |verbs, id| {
            let mut template = KeyRole::Backup.template(name, id, &self.profile);
            template.extend([Attribute::Class(ObjectClass::SECRET_KEY), Attribute::KeyType(KeyType::AES)]);
            // Exposed to be imported; cryptoki's attribute is not wiped, the process ends with the ceremony.
            template.push(Attribute::Value(key.expose().clone()));
            verbs.session().create_object(&template).doing(|| format!("importing {name}"))?;
            Ok(Made { provenance: Provenance::Imported, ..Made::default() })
        })
    }

    /// The check value of a backup key on the token.
    pub fn check_value_of_backup_key(&self, key: &BackupKey) -> Result<Vec<u8>, HsmError> {
        let mut wrapped = self.wrap_bytes(key, &CHECKED)?;
        wrapped.truncate(CHECK_LEN);
        Ok(wrapped)
    }

    /// Binds a digest to a backup key. AES-KWP authenticates: without the key nobody makes a seal that [`is_sealed`] takes.
    pub fn seal(&self, under: &BackupKey, digest: &[u8; SEALED_LEN]) -> Result<Vec<u8>, HsmError> {
        self.wrap_bytes(under, digest)
    }

    /// Bytes that are not secret, wrapped under a backup key of the token.
    fn wrap_bytes(&self, key: &BackupKey, bytes: &[u8]) -> Result<Vec<u8>, HsmError> {
        let run = |verbs: &mut TokenOperations| -> Result<Vec<u8>, Failure> {
            let kek = find_one(verbs.session(), ObjectClass::SECRET_KEY, &key.name, &key.id)?;
            let passing = verbs.session_secret(KeyType::GENERIC_SECRET, bytes)?;
            let wrapped = verbs.wrap_under(kek, passing);
            verbs.forget(passing)?;
            wrapped
        };
        run(&mut self.verbs(BTreeMap::new())?).map_err(refused)
    }

    /// Makes a signing pair, and its backup under that key.
    pub fn create_signing_key_with_backup(
        &self,
        name: &KeyName,
        kind: KeyKind,
        under: &BackupKey,
    ) -> Result<CreatedKey, HsmError> {
        self.create(name, KeyRole::Signing(kind), |verbs, id| {
            let kek = find_one(verbs.session(), ObjectClass::SECRET_KEY, &under.name, &under.id)?;
            match self.profile.unwrappable.contains(&kind) {
                true => self.make_seed(verbs, (name, id), kind, kek),
                false => self.make_pair(verbs, (name, id), kind, kek),
            }
        })
    }

    /// Makes a master key, and its backup under that key.
    pub fn create_master_key_with_backup(
        &self,
        name: &KeyName,
        prf: Prf,
        under: &BackupKey,
    ) -> Result<CreatedKey, HsmError> {
        let role = KeyRole::master(prf, self.profile.kdf);
        self.create(name, role, |verbs, id| {
            let kek = find_one(verbs.session(), ObjectClass::SECRET_KEY, &under.name, &under.id)?;
            let mut template = passing(role.template(name, id, &self.profile), Attribute::Extractable(true));
            template.push(Attribute::ValueLen(32.into()));
            let made = verbs.session().generate_key(&master_generation(prf), &template);
            let made = made.doing(|| format!("generating {name}"))?;
            let wrapped = Self::wrap_and_keep(verbs, name, made, kek);
            verbs.forget(made)?;
            Ok(Made { public: None, provenance: Provenance::BackedUp, wrapped: Some(wrapped?) })
        })
    }

    fn make_pair(
        &self,
        verbs: &TokenOperations,
        (name, id): (&KeyName, &[u8]),
        kind: KeyKind,
        kek: ObjectHandle,
    ) -> Result<Made, Failure> {
        let role = KeyRole::Signing(kind);
        let (mechanism, mut public) = pair_generation(kind);
        public.extend(public_template(name, id));
        let private = passing(role.template(name, id, &self.profile), Attribute::Extractable(true));
        let pair = verbs.session().generate_key_pair(&mechanism, &public, &private);
        let (public, private) = pair.doing(|| format!("generating {name}"))?;
        let wrapped = Self::wrap_and_keep(verbs, name, private, kek);
        verbs.forget(private)?;
        let public = Some(verbs.public_key(kind, public)?);
        Ok(Made { public, provenance: Provenance::BackedUp, wrapped: Some(wrapped?) })
    }

    fn wrap_and_keep(
        verbs: &TokenOperations,
        name: &KeyName,
        made: ObjectHandle,
        kek: ObjectHandle,
    ) -> Result<Vec<u8>, Failure> {
        let wrapped = verbs.wrap_under(kek, made)?;
        // CKA_COPYABLE stays as it was: SoftHSM takes no other value for a copy. What cannot be extracted has no copy that can.
        let kept = [Attribute::Token(true), Attribute::Extractable(false), Attribute::Modifiable(false)];
        verbs.session().copy_object(made, &kept).doing(|| format!("putting {name} on the token"))?;
        Ok(wrapped)
    }

    /// Of a kind that the module cannot wrap: the pair is made here of the HSM's random numbers, and its seed is wrapped.
    fn make_seed(
        &self,
        verbs: &TokenOperations,
        (name, id): (&KeyName, &[u8]),
        kind: KeyKind,
        kek: ObjectHandle,
    ) -> Result<Made, Failure> {
        let (public, seed) = verbs.seed_outside(kind)?;
        let passing = verbs.session_secret(KeyType::GENERIC_SECRET, &seed)?;
        let wrapped = verbs.wrap_under(kek, passing);
        verbs.forget(passing)?;
        self.import_seed_pair(verbs, (name, id), kind, &seed)?;
        let WirePublicKey::Ed25519(point) = &public else {
            return Err(Failure::new(FailureClass::Rejected, "a seed makes ed25519 pairs alone"));
        };
        create_public(verbs, (name, id), kind, byte_string(point)?)?;
        Ok(Made { public: Some(public), provenance: Provenance::Imported, wrapped: Some(wrapped?) })
    }

    fn import_seed_pair(
        &self,
        verbs: &TokenOperations,
        (name, id): (&KeyName, &[u8]),
        kind: KeyKind,
        seed: &[u8],
    ) -> Result<(), Failure> {
        let mut private = KeyRole::Signing(kind).template(name, id, &self.profile);
        private.extend([Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::KeyType(KeyType::EC_EDWARDS)]);
        private.extend(pair_generation(kind).1);
        // cryptoki's attribute is not wiped; the process ends with the ceremony.
        private.push(Attribute::Value(seed.to_vec()));
        verbs.session().create_object(&private).map(drop).doing(|| format!("putting {name} on the token"))
    }

    /// Unwraps a key onto the token, from which it cannot leave again. Whether it is the right one is for the caller to prove.
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
        let restored = self.create_with_id(name, id, role, |verbs, id| {
            match what {
                Restorable::Signing(public) if self.profile.unwrappable.contains(&public.kind()) => {
                    let seed = unwrap_here(key, wrapped)?;
                    self.import_seed_pair(verbs, (name, id), public.kind(), &seed)?;
                }
                _ => self.unwrap_inside(verbs, (name, id), role, wrapped, key)?,
            }
            if let Restorable::Signing(public) = what {
                create_public(verbs, (name, id), public.kind(), public_part(public)?)?;
            }
            Ok(Made { provenance: Provenance::Imported, ..Made::default() })
        });
        let public = match what {
            Restorable::Signing(public) => Some(public.clone()),
            Restorable::Master(_) => None,
        };
        restored.map(|restored| CreatedKey { public, ..restored })
    }

    fn unwrap_inside(
        &self,
        verbs: &TokenOperations,
        (name, id): (&KeyName, &[u8]),
        role: KeyRole,
        wrapped: &[u8],
        key: &SecretBytes,
    ) -> Result<(), Failure> {
        let unwrapping = [
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(KeyType::AES),
            Attribute::Token(false),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
            Attribute::Unwrap(true),
            // Exposed to be imported for this one act.
            Attribute::Value(key.expose().clone()),
        ];
        let kek = verbs.session().create_object(&unwrapping).doing(|| "importing the backup key".to_owned())?;
        let mut template = passing(role.template(name, id, &self.profile), Attribute::Extractable(false));
        template.push(Attribute::Class(role.class()));
        template.extend(role.key_types().first().map(|key_type| Attribute::KeyType(*key_type)));
        let restored = verbs.session().unwrap_key(&Mechanism::AesKeyWrapPad, kek, wrapped, &template);
        verbs.forget(kek)?;
        let restored = restored.doing(|| format!("unwrapping {name}"))?;
        // By a copy, since SoftHSM lets no unwrapped key be made unmodifiable.
        let kept = [Attribute::Token(true), Attribute::Modifiable(false)];
        let copied = verbs.session().copy_object(restored, &kept);
        verbs.forget(restored)?;
        copied.map(drop).doing(|| format!("putting {name} on the token"))
    }
}

/// The same key as a session object that can be copied, and wrapped if it is extractable.
fn passing(mut template: Vec<Attribute>, extractable: Attribute) -> Vec<Attribute> {
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

/// For a kind that the module cannot unwrap.
fn unwrap_here(key: &SecretBytes, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let broken = |_| Failure::new(FailureClass::Rejected, "the backup cannot be unwrapped: it was changed");
    let mut room = Zeroizing::new(vec![0; wrapped.len()]);
    // Exposed to be used as a key once.
    let kek = AesKek::new(&AES_256, key.expose()).map_err(broken)?;
    let len = kek.unwrap_with_padding(wrapped, &mut room).map_err(broken)?.len();
    room.truncate(len);
    Ok(room)
}

fn create_public(
    verbs: &TokenOperations,
    (name, id): (&KeyName, &[u8]),
    kind: KeyKind,
    part: Vec<Attribute>,
) -> Result<(), Failure> {
    let key_type = match kind {
        KeyKind::P256 | KeyKind::P384 => KeyType::EC,
        KeyKind::Ed25519 => KeyType::EC_EDWARDS,
        KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096 => KeyType::RSA,
    };
    let mut template = public_template(name, id);
    template.extend([Attribute::Class(ObjectClass::PUBLIC_KEY), Attribute::KeyType(key_type)]);
    if kind.rsa_bits().is_none() {
        template.extend(pair_generation(kind).1);
    }
    template.extend(part);
    verbs
        .session()
        .create_object(&template)
        .map(drop)
        .doing(|| format!("putting the public half of {name} on the token"))
}

fn public_part(public: &PublicKey) -> Result<Vec<Attribute>, Failure> {
    match public.rsa_components() {
        Some((modulus, exponent)) => Ok(vec![Attribute::Modulus(modulus), Attribute::PublicExponent(exponent)]),
        None => byte_string(public.key_bits()),
    }
}

/// CKA_EC_POINT is a DER OCTET STRING (PKCS#11 v2.40 §2.3.3).
fn byte_string(point: &[u8]) -> Result<Vec<Attribute>, Failure> {
    use der::Encode as _;
    let point = der::asn1::OctetStringRef::new(point).and_then(|point| point.to_der());
    let point = point.map_err(|e| Failure::new(FailureClass::Rejected, e.to_string()))?;
    Ok(vec![Attribute::EcPoint(point)])
}
