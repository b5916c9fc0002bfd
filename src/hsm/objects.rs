//! Making token objects in a ceremony: names must be free, attributes are read back, the check values computed.

use std::collections::BTreeMap;
use std::time::SystemTime;

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, ObjectHandle};
use cryptoki::session::Session;

use super::attributes::{KeyRole, Provenance, audit};
use super::failure::{Doing as _, Failure, FailureClass, HsmError, learn};
use super::kdf::{Derivation, Prf};
use super::module::ModuleProfile;
use super::operations::{Shared, TokenOperations};
use super::pin::PinSource;
use super::token::{Token, TokenIdentity, find_one};
use super::wire::{KeyOnToken, WirePublicKey};
use crate::keys::{KeyKind, PublicKey, SignatureAlgorithm, ecdsa_der_from_fixed};
use crate::names::KeyName;

/// Bytes of a CKA_ID.
const ID_LEN: u32 = 16;

/// A token opened for a ceremony, in the officer's own process: the daemon is not involved.
pub struct Ceremony {
    pub(super) token: Token,
    pub(super) profile: ModuleProfile,
    initialised: bool,
}

/// A key that was made and read back.
#[derive(Debug, Clone)]
pub struct CreatedKey {
    /// `CKA_LABEL`.
    pub name: KeyName,
    /// `CKA_ID`, random.
    pub id: Vec<u8>,
    /// The public half of a signing key.
    pub public: Option<PublicKey>,
    /// How it came onto the token.
    pub provenance: Provenance,
    /// The key wrapped under its backup key (RFC 5649), if it has one.
    pub wrapped: Option<Vec<u8>>,
    /// The attributes as the token shows them, for the transcript.
    pub attributes: BTreeMap<String, String>,
}

impl Ceremony {
    /// Loads the module and logs in. The process must have the module's environment ([`ModuleProfile::enter_environment`]).
    pub fn open(profile: &ModuleProfile, token: &TokenIdentity, pin: &PinSource) -> Result<Self, HsmError> {
        let looked = profile.look_after_files();
        looked.map_err(|e| HsmError::Wrong(format!("looking after the files of {}: {e}", profile.name)))?;
        learn(profile.failures.clone());
        let token = Token::open(profile, token, pin).map_err(refused)?;
        Ok(Self { token, profile: profile.clone(), initialised: false })
    }

    /// Initialises a free token with a label, and opens it. Refuses a label that exists.
    pub fn initialise(
        profile: &ModuleProfile,
        label: &str,
        so_pin: &PinSource,
        user_pin: &PinSource,
    ) -> Result<Self, HsmError> {
        learn(profile.failures.clone());
        let token = Token::initialise(profile, label, so_pin, user_pin).map_err(refused)?;
        Ok(Self { token, profile: profile.clone(), initialised: true })
    }

    /// Whether this is the ceremony that has initialised the token.
    pub const fn was_initialised(&self) -> bool {
        self.initialised
    }

    /// What is known of the module.
    pub const fn profile(&self) -> &ModuleProfile {
        &self.profile
    }

    /// The token's names.
    pub const fn token(&self) -> &TokenIdentity {
        self.token.identity()
    }

    /// The module's description of itself.
    pub fn module(&self) -> &str {
        self.token.description()
    }

    /// Whether a name is not yet used by any object.
    pub fn is_free(&self, name: &KeyName) -> Result<bool, HsmError> {
        self.has_none(Attribute::Label(name.as_str().as_bytes().to_vec()), || format!("looking whether {name} is free"))
    }

    /// Whether a CKA_ID is not yet used by any object.
    pub fn is_free_id(&self, id: &[u8]) -> Result<bool, HsmError> {
        self.has_none(Attribute::Id(id.to_vec()), || format!("looking whether the CKA_ID {} is free", hex::encode(id)))
    }

    fn has_none(&self, attribute: Attribute, doing: impl FnOnce() -> String) -> Result<bool, HsmError> {
        let session = self.token.session().map_err(refused)?;
        Ok(session.find_objects(&[attribute]).doing(doing).map_err(refused)?.is_empty())
    }

    /// Makes a signing pair that can do nothing but sign.
    pub fn create_signing_key(&self, name: &KeyName, kind: KeyKind) -> Result<CreatedKey, HsmError> {
        let role = KeyRole::Signing(kind);
        self.create(name, role, |verbs, id| {
            let private = role.template(name, id, &self.profile);
            verbs.create_token_pair(kind, &public_template(name, id), &private).map(Made::pair)
        })
    }

    /// Makes a master key that can do nothing but authenticate, which is what the derivation uses.
    pub fn create_master_key(&self, name: &KeyName, prf: Prf) -> Result<CreatedKey, HsmError> {
        self.create_secret(name, KeyRole::master(prf, self.profile.kdf), &master_generation(prf))
    }

    pub(super) fn create_secret(
        &self,
        name: &KeyName,
        role: KeyRole,
        mechanism: &Mechanism<'_>,
    ) -> Result<CreatedKey, HsmError> {
        self.create(name, role, |verbs, id| {
            let mut template = role.template(name, id, &self.profile);
            template.push(Attribute::ValueLen(32.into()));
            verbs.session().generate_key(mechanism, &template).doing(|| format!("generating {name}"))?;
            Ok(Made::default())
        })
    }

    /// A key with a new CKA_ID.
    pub(super) fn create(
        &self,
        name: &KeyName,
        role: KeyRole,
        make: impl FnOnce(&mut TokenOperations, &[u8]) -> Result<Made, Failure>,
    ) -> Result<CreatedKey, HsmError> {
        let id = self.random(ID_LEN)?;
        self.create_with_id(name, &id, role, make)
    }

    /// Names free → make → find exactly one → audit → sync.
    pub(super) fn create_with_id(
        &self,
        name: &KeyName,
        id: &[u8],
        role: KeyRole,
        make: impl FnOnce(&mut TokenOperations, &[u8]) -> Result<Made, Failure>,
    ) -> Result<CreatedKey, HsmError> {
        if !self.is_free(name)? {
            let message = format!("the token has an object named {name} already; nothing is ever overwritten");
            return Err(HsmError::Refused(message));
        }
        // Some modules and tools know a key by its CKA_ID alone.
        if !self.is_free_id(id)? {
            let message =
                format!("the token has an object with the CKA_ID {} already; {name} was not made", hex::encode(id));
            return Err(HsmError::Refused(message));
        }
        let begun = SystemTime::now();
        let mut verbs = self.verbs(BTreeMap::new())?;
        let Made { public, provenance, wrapped } = make(&mut verbs, id).map_err(refused)?;
        let object = find_one(verbs.session(), role.class(), name, id).map_err(refused)?;
        audit(verbs.session(), object, name, role, provenance).map_err(refused)?;
        let attributes = shown_attributes(&verbs, object).map_err(refused)?;
        verbs.sync_objects(begun).map_err(refused)?;
        let public = match (public, role) {
            (Some(public), KeyRole::Signing(kind)) => Some(public_key(kind, public)?),
            _ => None,
        };
        Ok(CreatedKey { name: name.clone(), id: id.to_vec(), public, provenance, wrapped, attributes })
    }

    /// The check value of a master key, 8 bytes.
    pub fn check_value(&self, name: &KeyName, id: &[u8], prf: Prf) -> Result<Vec<u8>, HsmError> {
        let check = Derivation::check_value(name.clone());
        let mut verbs = self.operations_for(name, id, KeyRole::master(prf, self.profile.kdf))?;
        verbs.derive(name, prf, &check.fixed_input(), check.length).map_err(refused)
    }

    /// Whether the key pair on the token is the one of this public half: a text that is no certificate is signed.
    pub fn proves(&self, name: &KeyName, id: &[u8], public: &PublicKey) -> Result<bool, HsmError> {
        let algorithm = SignatureAlgorithm::default_for(public.kind());
        let message = [b"spp/v1/key-check".as_slice(), &self.random(32)?].concat();
        let signature = self.sign(name, id, public.kind(), algorithm, &message)?;
        Ok(public.verify(algorithm, &message, &signature).is_ok())
    }

    /// Whether the token still has an object with this name and CKA_ID.
    pub fn has(&self, name: &KeyName, id: &[u8]) -> Result<bool, HsmError> {
        let session = self.token.session().map_err(refused)?;
        Ok(!named(&session, name, id).map_err(refused)?.is_empty())
    }

    /// Destroys every object with this name and CKA_ID, the halves of a pair say, and looks again: they must be gone. What is gone
    /// already is no error.
    pub fn destroy(&self, name: &KeyName, id: &[u8]) -> Result<(), HsmError> {
        let run = || -> Result<(), Failure> {
            let begun = SystemTime::now();
            let verbs =
                TokenOperations::new(self.token.session()?, Shared::alone(&self.profile, BTreeMap::new()), None);
            for object in named(verbs.session(), name, id)? {
                verbs.session().destroy_object(object).doing(|| format!("destroying {name}"))?;
            }
            if !named(verbs.session(), name, id)?.is_empty() {
                let message = format!("{name} is still there after C_DestroyObject");
                return Err(Failure::new(FailureClass::Rejected, message));
            }
            verbs.sync_objects(begun)
        };
        run().map_err(refused)
    }

    /// Signs with a key of the token: certificates of authorities and of access, in a ceremony or an enrolment. ECDSA as DER.
    pub fn sign(
        &self,
        name: &KeyName,
        id: &[u8],
        kind: KeyKind,
        algorithm: SignatureAlgorithm,
        message: &[u8],
    ) -> Result<Vec<u8>, HsmError> {
        let mut verbs = self.operations_for(name, id, KeyRole::Signing(kind))?;
        let raw = verbs.sign(name, algorithm, message).map_err(refused)?;
        to_x509_form(algorithm, raw)
    }

    /// Random bytes of the HSM.
    pub fn random(&self, len: u32) -> Result<Vec<u8>, HsmError> {
        self.verbs(BTreeMap::new())?.random(len).map_err(refused)
    }

    fn operations_for(&self, name: &KeyName, id: &[u8], role: KeyRole) -> Result<TokenOperations, HsmError> {
        self.verbs(BTreeMap::from([(name.clone(), KeyOnToken { id: id.to_vec(), role, provenance: Provenance::Made })]))
    }

    pub(super) fn verbs(&self, keys: BTreeMap<KeyName, KeyOnToken>) -> Result<TokenOperations, HsmError> {
        let shared = Shared::alone(&self.profile, keys);
        Ok(TokenOperations::new(self.token.session().map_err(refused)?, shared, None))
    }
}

/// What came of making a key.
#[derive(Default)]
pub(super) struct Made {
    pub(super) public: Option<WirePublicKey>,
    pub(super) provenance: Provenance,
    pub(super) wrapped: Option<Vec<u8>>,
}

impl Made {
    fn pair(public: WirePublicKey) -> Self {
        Self { public: Some(public), ..Self::default() }
    }
}

/// The public half of a signing pair on the token.
pub(super) fn public_template(name: &KeyName, id: &[u8]) -> Vec<Attribute> {
    vec![
        Attribute::Token(true),
        Attribute::Private(false),
        Attribute::Verify(true),
        Attribute::Encrypt(false),
        Attribute::Wrap(false),
        Attribute::Modifiable(false),
        Attribute::Label(name.as_str().as_bytes().to_vec()),
        Attribute::Id(id.to_vec()),
    ]
}

pub(super) const fn master_generation(prf: Prf) -> Mechanism<'static> {
    match prf {
        Prf::HmacSha256 => Mechanism::GenericSecretKeyGen,
        Prf::AesCmac => Mechanism::AesKeyGen,
    }
}

fn named(session: &Session, name: &KeyName, id: &[u8]) -> Result<Vec<ObjectHandle>, Failure> {
    let template = [Attribute::Label(name.as_str().as_bytes().to_vec()), Attribute::Id(id.to_vec())];
    session.find_objects(&template).doing(|| format!("looking for {name}"))
}

fn shown_attributes(verbs: &TokenOperations, object: ObjectHandle) -> Result<BTreeMap<String, String>, Failure> {
    let wanted = [
        AttributeType::Class,
        AttributeType::KeyType,
        AttributeType::Token,
        AttributeType::Private,
        AttributeType::Sensitive,
        AttributeType::Extractable,
        AttributeType::AlwaysSensitive,
        AttributeType::NeverExtractable,
        AttributeType::Local,
        AttributeType::Modifiable,
        AttributeType::Copyable,
        AttributeType::Sign,
        AttributeType::Encrypt,
        AttributeType::Decrypt,
        AttributeType::Wrap,
        AttributeType::Unwrap,
        AttributeType::Derive,
    ];
    let found = verbs.session().get_attributes(object, &wanted).doing(|| "reading attributes back".to_owned())?;
    let split = |attribute: Attribute| {
        let text = format!("{attribute:?}");
        let (name, value) = text.split_once('(').unwrap_or((&text, ""));
        (name.to_owned(), value.strip_suffix(')').unwrap_or(value).to_owned())
    };
    Ok(found.into_iter().map(split).collect())
}

pub(crate) fn public_key(kind: KeyKind, public: WirePublicKey) -> Result<PublicKey, HsmError> {
    match public {
        WirePublicKey::Ec(point) => PublicKey::from_ec_point(kind, &point),
        WirePublicKey::Ed25519(raw) => PublicKey::from_ed25519(&raw),
        WirePublicKey::Rsa { modulus, exponent } => PublicKey::from_rsa(&modulus, &exponent),
    }
    .map_err(|e| HsmError::Wrong(e.to_string()))
}

/// ECDSA leaves the HSM as `r || s` and this room as DER.
pub(crate) fn to_x509_form(algorithm: SignatureAlgorithm, raw: Vec<u8>) -> Result<Vec<u8>, HsmError> {
    match algorithm {
        SignatureAlgorithm::EcdsaP256Sha256 | SignatureAlgorithm::EcdsaP384Sha384 => ecdsa_der_from_fixed(&raw)
            .ok_or_else(|| HsmError::Wrong(format!("an ECDSA signature of {} bytes", raw.len()))),
        _ => Ok(raw),
    }
}

pub(super) fn refused(failure: Failure) -> HsmError {
    match failure.class {
        FailureClass::Permanent => HsmError::Stopped(failure.message),
        _ => HsmError::Refused(failure.message),
    }
}
