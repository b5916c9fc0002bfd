//! Creates and destroys token objects in a ceremony: checks that names are unused, reads attributes back, computes check values.

use std::collections::BTreeMap;
use std::time::SystemTime;

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, ObjectHandle};
use cryptoki::session::Session;
use spp_format::keys::{KeyType, PublicKey, SignatureAlgorithm, ecdsa_der_from_fixed};
use spp_format::names::KeyName;

use super::attributes::{KeyRole, Provenance, audit};
use super::failure::{Failure, FailureContext as _, HsmError, set_failure_overrides};
use super::failure_class::FailureClass;
use super::kdf::{Derivation, Prf};
use super::module::ModuleProfile;
use super::operations::{Shared, TokenOperations};
use super::pin::PinSource;
use super::token::{Token, TokenIdentity, find_one};
use super::wire::{KeyOnToken, WirePublicKey};

/// Length of a CKA_ID in bytes.
const ID_LEN: u32 = 16;

/// A token opened for a ceremony in the officer's own process, without the daemon.
pub struct Ceremony {
    pub(super) token: Token,
    pub(super) profile: ModuleProfile,
    initialised: bool,
}

/// A new key, as read back from the token.
#[derive(Debug, Clone)]
pub struct CreatedKey {
    /// `CKA_LABEL`.
    pub name: KeyName,
    /// `CKA_ID`, random.
    pub id: Vec<u8>,
    /// The public key of a signing key.
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
        let restored = profile.restore_files();
        restored.map_err(|e| {
            HsmError::InvalidAnswer(format!("backing up or restoring the files of {}: {e}", profile.name))
        })?;
        set_failure_overrides(profile.failures.clone());
        let token = Token::open(profile, token, pin).map_err(to_hsm_error)?;
        Ok(Self { token, profile: profile.clone(), initialised: false })
    }

    /// Initialises an uninitialised token with a label and opens it. Refuses a label that exists.
    pub fn initialise(
        profile: &ModuleProfile,
        label: &str,
        so_pin: &PinSource,
        user_pin: &PinSource,
    ) -> Result<Self, HsmError> {
        set_failure_overrides(profile.failures.clone());
        let token = Token::initialise(profile, label, so_pin, user_pin).map_err(to_hsm_error)?;
        Ok(Self { token, profile: profile.clone(), initialised: true })
    }

    /// Whether this ceremony has initialised the token.
    pub const fn was_initialised(&self) -> bool {
        self.initialised
    }

    /// The module's profile.
    pub const fn profile(&self) -> &ModuleProfile {
        &self.profile
    }

    /// The token's label and serial number.
    pub const fn token(&self) -> &TokenIdentity {
        self.token.identity()
    }

    /// The module's description of itself.
    pub fn module(&self) -> &str {
        self.token.description()
    }

    /// Whether no object uses this name.
    pub fn is_free(&self, name: &KeyName) -> Result<bool, HsmError> {
        self.has_none(Attribute::Label(name.as_str().as_bytes().to_vec()), || {
            format!("checking whether {name} is unused")
        })
    }

    /// Whether no object uses this CKA_ID.
    pub fn is_free_id(&self, id: &[u8]) -> Result<bool, HsmError> {
        self.has_none(Attribute::Id(id.to_vec()), || {
            format!("checking whether the CKA_ID {} is unused", hex::encode(id))
        })
    }

    fn has_none(&self, attribute: Attribute, context: impl FnOnce() -> String) -> Result<bool, HsmError> {
        let session = self.token.session().map_err(to_hsm_error)?;
        Ok(session.find_objects(&[attribute]).context(context).map_err(to_hsm_error)?.is_empty())
    }

    /// Generates a signing pair that can only sign.
    pub fn create_signing_key(&self, name: &KeyName, kind: KeyType) -> Result<CreatedKey, HsmError> {
        let role = KeyRole::Signing(kind);
        self.create(name, role, |operations, id| {
            let private = role.template(name, id, &self.profile);
            operations.create_token_pair(kind, &public_template(name, id), &private).map(NewKeyParts::pair)
        })
    }

    /// Generates a master key that can only serve the derivation route of the profile.
    pub fn create_master_key(&self, name: &KeyName, prf: Prf) -> Result<CreatedKey, HsmError> {
        self.create_secret(name, KeyRole::master(prf, self.profile.kdf), &master_generation(prf))
    }

    pub(super) fn create_secret(
        &self,
        name: &KeyName,
        role: KeyRole,
        mechanism: &Mechanism<'_>,
    ) -> Result<CreatedKey, HsmError> {
        self.create(name, role, |operations, id| {
            let mut template = role.template(name, id, &self.profile);
            template.push(Attribute::ValueLen(32.into()));
            operations.session().generate_key(mechanism, &template).context(|| format!("generating {name}"))?;
            Ok(NewKeyParts::default())
        })
    }

    /// Creates a key with a new random CKA_ID.
    pub(super) fn create(
        &self,
        name: &KeyName,
        role: KeyRole,
        make: impl FnOnce(&mut TokenOperations, &[u8]) -> Result<NewKeyParts, Failure>,
    ) -> Result<CreatedKey, HsmError> {
        let id = self.random(ID_LEN)?;
        self.create_with_id(name, &id, role, make)
    }

    /// Creates a key: names unused → create → find exactly one object → audit → sync.
    pub(super) fn create_with_id(
        &self,
        name: &KeyName,
        id: &[u8],
        role: KeyRole,
        make: impl FnOnce(&mut TokenOperations, &[u8]) -> Result<NewKeyParts, Failure>,
    ) -> Result<CreatedKey, HsmError> {
        if !self.is_free(name)? {
            let message = format!("the token already has an object named {name}; objects are never overwritten");
            return Err(HsmError::Refused(message));
        }
        // Some modules and tools identify a key by its CKA_ID alone.
        if !self.is_free_id(id)? {
            let message =
                format!("the token already has an object with CKA_ID {}; {name} was not created", hex::encode(id));
            return Err(HsmError::Refused(message));
        }
        let started_at = SystemTime::now();
        let mut operations = self.operations(BTreeMap::new())?;
        let NewKeyParts { public, provenance, wrapped } = make(&mut operations, id).map_err(to_hsm_error)?;
        let object = find_one(operations.session(), role.class(), name, id).map_err(to_hsm_error)?;
        audit(operations.session(), object, name, role, provenance).map_err(to_hsm_error)?;
        let attributes = shown_attributes(&operations, object).map_err(to_hsm_error)?;
        operations.sync_objects(started_at).map_err(to_hsm_error)?;
        let public = match (public, role) {
            (Some(public), KeyRole::Signing(kind)) => Some(public_key(kind, public)?),
            _ => None,
        };
        Ok(CreatedKey { name: name.clone(), id: id.to_vec(), public, provenance, wrapped, attributes })
    }

    /// The check value of a master key, 8 bytes.
    pub fn check_value(&self, name: &KeyName, id: &[u8], prf: Prf) -> Result<Vec<u8>, HsmError> {
        let check = Derivation::check_value(name.clone());
        let mut operations = self.operations_for(name, id, KeyRole::master(prf, self.profile.kdf))?;
        operations.derive(name, prf, &check.fixed_input(), check.length).map_err(to_hsm_error)
    }

    /// Whether the key pair on the token belongs to this public key. The signed message cannot be a certificate.
    pub fn proves_possession(&self, name: &KeyName, id: &[u8], public: &PublicKey) -> Result<bool, HsmError> {
        let algorithm = SignatureAlgorithm::default_for(public.kind());
        let message = [b"spp/v1/key-check".as_slice(), &self.random(32)?].concat();
        let signature = self.sign(name, id, public.kind(), algorithm, &message)?;
        Ok(public.verify(algorithm, &message, &signature).is_ok())
    }

    /// Whether the token has an object with this name and CKA_ID.
    pub fn has(&self, name: &KeyName, id: &[u8]) -> Result<bool, HsmError> {
        let session = self.token.session().map_err(to_hsm_error)?;
        Ok(!named(&session, name, id).map_err(to_hsm_error)?.is_empty())
    }

    /// Destroys every object with this name and CKA_ID, for example both halves of a pair, and verifies that they no longer
    /// exist. Missing objects are not an error.
    pub fn destroy(&self, name: &KeyName, id: &[u8]) -> Result<(), HsmError> {
        let run = || -> Result<(), Failure> {
            let started_at = SystemTime::now();
            let operations = TokenOperations::new(
                self.token.session()?,
                Shared::single_threaded(&self.profile, BTreeMap::new()),
                None,
            );
            for object in named(operations.session(), name, id)? {
                operations.session().destroy_object(object).context(|| format!("destroying {name}"))?;
            }
            if !named(operations.session(), name, id)?.is_empty() {
                let message = format!("{name} still exists after C_DestroyObject");
                return Err(Failure::new(FailureClass::Rejected, message));
            }
            operations.sync_objects(started_at)
        };
        run().map_err(to_hsm_error)
    }

    /// Signs any bytes with a key of the token; ECDSA signatures are DER. Other modules sign with a function of
    /// [`signing`](super::signing).
    pub(super) fn sign(
        &self,
        name: &KeyName,
        id: &[u8],
        kind: KeyType,
        algorithm: SignatureAlgorithm,
        message: &[u8],
    ) -> Result<Vec<u8>, HsmError> {
        let mut operations = self.operations_for(name, id, KeyRole::Signing(kind))?;
        let raw = operations.sign(name, algorithm, message).map_err(to_hsm_error)?;
        to_x509_form(algorithm, raw)
    }

    /// Random bytes from the HSM.
    pub fn random(&self, len: u32) -> Result<Vec<u8>, HsmError> {
        self.operations(BTreeMap::new())?.random(len).map_err(to_hsm_error)
    }

    fn operations_for(&self, name: &KeyName, id: &[u8], role: KeyRole) -> Result<TokenOperations, HsmError> {
        self.operations(BTreeMap::from([(
            name.clone(),
            KeyOnToken { id: id.to_vec(), role, provenance: Provenance::Made },
        )]))
    }

    pub(super) fn operations(&self, keys: BTreeMap<KeyName, KeyOnToken>) -> Result<TokenOperations, HsmError> {
        let shared = Shared::single_threaded(&self.profile, keys);
        Ok(TokenOperations::new(self.token.session().map_err(to_hsm_error)?, shared, None))
    }
}

/// The result of creating a key.
#[derive(Default)]
pub(super) struct NewKeyParts {
    pub(super) public: Option<WirePublicKey>,
    pub(super) provenance: Provenance,
    pub(super) wrapped: Option<Vec<u8>>,
}

impl NewKeyParts {
    fn pair(public: WirePublicKey) -> Self {
        Self { public: Some(public), ..Self::default() }
    }
}

/// The template of the public key of a signing pair on the token.
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
    session.find_objects(&template).context(|| format!("looking for {name}"))
}

fn shown_attributes(operations: &TokenOperations, object: ObjectHandle) -> Result<BTreeMap<String, String>, Failure> {
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
    let found =
        operations.session().get_attributes(object, &wanted).context(|| "reading attributes back".to_owned())?;
    let split = |attribute: Attribute| {
        let text = format!("{attribute:?}");
        let (name, value) = text.split_once('(').unwrap_or((&text, ""));
        (name.to_owned(), value.strip_suffix(')').unwrap_or(value).to_owned())
    };
    Ok(found.into_iter().map(split).collect())
}

pub(crate) fn public_key(kind: KeyType, public: WirePublicKey) -> Result<PublicKey, HsmError> {
    match public {
        WirePublicKey::Ec(point) => PublicKey::from_ec_point(kind, &point),
        WirePublicKey::Ed25519(raw) => PublicKey::from_ed25519(&raw),
        WirePublicKey::Rsa { modulus, exponent } => PublicKey::from_rsa(&modulus, &exponent),
    }
    .map_err(|e| HsmError::InvalidAnswer(e.to_string()))
}

/// Converts a signature to the form used in X.509: the HSM returns ECDSA as `r || s`, X.509 uses DER.
pub(crate) fn to_x509_form(algorithm: SignatureAlgorithm, raw: Vec<u8>) -> Result<Vec<u8>, HsmError> {
    match algorithm {
        SignatureAlgorithm::EcdsaP256Sha256 | SignatureAlgorithm::EcdsaP384Sha384 => ecdsa_der_from_fixed(&raw)
            .ok_or_else(|| {
                HsmError::InvalidAnswer(format!("ECDSA signature with invalid length of {} bytes", raw.len()))
            }),
        _ => Ok(raw),
    }
}

pub(super) fn to_hsm_error(failure: Failure) -> HsmError {
    match failure.class {
        FailureClass::Permanent => HsmError::Stopped(failure.message),
        _ => HsmError::Refused(failure.message),
    }
}
