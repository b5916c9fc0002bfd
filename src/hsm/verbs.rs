//! What one thread of the worker does with its session: the verbs, in PKCS#11.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use cryptoki::mechanism::eddsa::{EddsaParams, EddsaSignatureScheme};
use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource, PkcsPssParams};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use zeroize::Zeroizing;

use super::attributes::{audit, pair_generation};
use super::failure::{Doing as _, Failure, FailureClass};
use super::kdf::{Prf, prf_inputs};
use super::module::{OaepHash, WrapMechanism};
use super::token::find_one;
use super::wire::{Answer, KeyOnToken, Operation, TransportRsa, WirePublicKey, WireSecret};
use crate::keys::{KeyKind, SignatureAlgorithm};
use crate::names::KeyName;

/// What all threads of a worker share.
pub(crate) struct Shared {
    pub(crate) keys: BTreeMap<KeyName, KeyOnToken>,
    pub(crate) wrap: WrapMechanism,
    pub(crate) unwrappable: Vec<KeyKind>,
    /// Token objects are created and destroyed under the write half, looked up under the read half, where the module
    /// needs it: SoftHSM fails calls and leaves half-written objects behind otherwise.
    pub(crate) objects: Option<RwLock<()>>,
}

/// One session with the handles it has looked up.
pub(crate) struct Verbs {
    session: Session,
    shared: Arc<Shared>,
    handles: HashMap<KeyName, ObjectHandle>,
    /// The AES key under which device keys leave the HSM; a session object of the anchor session.
    transport_key: Option<ObjectHandle>,
}

impl Verbs {
    pub(crate) fn new(session: Session, shared: Arc<Shared>, transport_key: Option<ObjectHandle>) -> Self {
        Self { session, shared, handles: HashMap::new(), transport_key }
    }

    /// The same with a new session: nothing that was looked up before is trusted.
    pub(crate) fn renewed(self, session: Session) -> Self {
        Self::new(session, self.shared, self.transport_key)
    }

    /// Finds and audits every key of the register; the transport key, if one was made, must be there too.
    pub(crate) fn check_keys(&mut self) -> Result<(), Failure> {
        let shared = Arc::clone(&self.shared);
        for (name, key) in &shared.keys {
            let object = self.key(name)?;
            audit(&self.session, object, name, key.role)?;
        }
        let Some(transport) = self.transport_key else { return Ok(()) };
        match self.session.get_attributes(transport, &[AttributeType::Class]) {
            Ok(found) if !found.is_empty() => Ok(()),
            // A session object dies with its session, and only a new worker makes another.
            _ => Err(Failure::new(FailureClass::ModuleLost, "the transport key is gone")),
        }
    }

    /// Does one operation.
    pub(crate) fn perform(&mut self, operation: Operation) -> Result<Answer, Failure> {
        match operation {
            Operation::Random { len } => self.random(len).map(|bytes| Answer::Random(WireSecret::new(bytes))),
            Operation::Sign { key, algorithm, message } => self.sign(&key, algorithm, &message).map(Answer::Signature),
            Operation::Derive { key, prf, fixed_input, len } => {
                self.derive(&key, prf, &fixed_input, len as usize).map(|bytes| Answer::Derived(WireSecret::new(bytes)))
            }
            Operation::GeneratePair { kind, wrapping_key } => self.generate_pair(kind, &wrapping_key),
            Operation::Rewrap { kind, wrapping_key, blob } => {
                self.rewrap(kind, &wrapping_key, &blob).map(Answer::Rewrapped)
            }
            Operation::Destroy { key } => self.destroy(&key).map(|()| Answer::Destroyed),
        }
    }

    pub(crate) fn random(&self, len: u32) -> Result<Vec<u8>, Failure> {
        self.session.generate_random_vec(len).doing(|| "drawing random octets".to_owned())
    }

    /// ECDSA comes back as `r || s`; its hash is taken here, since not every module has the hashing mechanism.
    pub(crate) fn sign(
        &mut self,
        key: &KeyName,
        algorithm: SignatureAlgorithm,
        message: &[u8],
    ) -> Result<Vec<u8>, Failure> {
        use aws_lc_rs::digest::{SHA256, SHA384, digest};
        let object = self.key(key)?;
        let sign = |mechanism: Mechanism<'_>, data: &[u8]| {
            self.session.sign(&mechanism, object, data).doing(|| format!("signing with {key}"))
        };
        match algorithm {
            SignatureAlgorithm::EcdsaP256Sha256 => sign(Mechanism::Ecdsa, digest(&SHA256, message).as_ref()),
            SignatureAlgorithm::EcdsaP384Sha384 => sign(Mechanism::Ecdsa, digest(&SHA384, message).as_ref()),
            SignatureAlgorithm::RsaPkcs1Sha256 => sign(Mechanism::Sha256RsaPkcs, message),
            SignatureAlgorithm::RsaPssSha256 => {
                let parameters =
                    PkcsPssParams { hash_alg: MechanismType::SHA256, mgf: PkcsMgfType::MGF1_SHA256, s_len: 32.into() };
                sign(Mechanism::Sha256RsaPkcsPss(parameters), message)
            }
            SignatureAlgorithm::Ed25519 => {
                sign(Mechanism::Eddsa(EddsaParams::new(EddsaSignatureScheme::Ed25519)), message)
            }
        }
    }

    /// SP 800-108r1 §4.1 with C_Sign as the PRF; cut to `len`.
    pub(crate) fn derive(
        &mut self,
        key: &KeyName,
        prf: Prf,
        fixed_input: &[u8],
        len: usize,
    ) -> Result<Vec<u8>, Failure> {
        let object = self.key(key)?;
        let mechanism = match prf {
            Prf::HmacSha256 => Mechanism::Sha256Hmac,
            Prf::AesCmac => Mechanism::AesCMac,
        };
        let mut derived = Zeroizing::new(Vec::with_capacity(len + prf.output_len()));
        for input in prf_inputs(prf, fixed_input, len) {
            let block = self.session.sign(&mechanism, object, &input).doing(|| format!("deriving from {key}"))?;
            derived.extend_from_slice(&Zeroizing::new(block));
        }
        derived.truncate(len);
        Ok(std::mem::take(&mut *derived))
    }

    fn generate_pair(&mut self, kind: KeyKind, wrapping_key: &KeyName) -> Result<Answer, Failure> {
        if self.shared.unwrappable.contains(&kind) {
            return self.generate_outside(kind, wrapping_key);
        }
        let (mechanism, mut public_template) = pair_generation(kind);
        public_template.extend([Attribute::Token(false), Attribute::Verify(true)]);
        let private_template = [
            Attribute::Token(false),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(true),
            Attribute::Sign(true),
        ];
        let (public, private) = self
            .session
            .generate_key_pair(&mechanism, &public_template, &private_template)
            .doing(|| format!("generating a {kind} pair"))?;
        let answer = self
            .wrap_both(private, wrapping_key)
            .and_then(|(kept, delivered)| Ok(Answer::Pair { public: self.public_key(kind, public)?, kept, delivered }));
        self.forget(private)?;
        self.forget(public)?;
        answer
    }

    /// For kinds that the module cannot wrap: the seed is drawn in the HSM, the pair is made here, and the seed goes back in
    /// as a generic secret, to be wrapped.
    fn generate_outside(&mut self, kind: KeyKind, wrapping_key: &KeyName) -> Result<Answer, Failure> {
        if kind != KeyKind::Ed25519 {
            let message = format!("the module cannot wrap {kind} keys, and only ed25519 can be made outside it");
            return Err(Failure::new(FailureClass::Rejected, message));
        }
        let seed = Zeroizing::new(self.random(32)?);
        let pair = aws_lc_rs::signature::Ed25519KeyPair::from_seed_unchecked(&seed)
            .map_err(|e| Failure::new(FailureClass::Transient, format!("making an ed25519 pair: {e}")))?;
        let public = aws_lc_rs::signature::KeyPair::public_key(&pair).as_ref().to_vec();
        let mut template = secret_template(KeyType::GENERIC_SECRET);
        // cryptoki's attribute is not wiped: a copy of this seed stays in the worker's heap until it is reused.
        template.push(Attribute::Value(seed.to_vec()));
        let object = self.session.create_object(&template).doing(|| "importing an ed25519 seed".to_owned())?;
        let wrapped = self.wrap_both(object, wrapping_key);
        self.forget(object)?;
        let (kept, delivered) = wrapped?;
        Ok(Answer::Pair { public: WirePublicKey::Ed25519(public), kept, delivered })
    }

    fn wrap_both(&mut self, object: ObjectHandle, wrapping_key: &KeyName) -> Result<(Vec<u8>, Vec<u8>), Failure> {
        let keeping = self.key(wrapping_key)?;
        let kept = self.wrap_under(keeping, object)?;
        let delivered = self.wrap_under(self.transport()?, object)?;
        Ok((kept, delivered))
    }

    fn wrap_under(&self, wrapping: ObjectHandle, object: ObjectHandle) -> Result<Vec<u8>, Failure> {
        self.session.wrap_key(&self.wrap_mechanism(), wrapping, object).doing(|| "wrapping a key".to_owned())
    }

    fn rewrap(&mut self, kind: KeyKind, wrapping_key: &KeyName, blob: &[u8]) -> Result<Vec<u8>, Failure> {
        let keeping = self.key(wrapping_key)?;
        let transport = self.transport()?;
        let template = if self.shared.unwrappable.contains(&kind) {
            secret_template(KeyType::GENERIC_SECRET)
        } else {
            let key_type = match kind {
                KeyKind::P256 | KeyKind::P384 => KeyType::EC,
                KeyKind::Ed25519 => KeyType::EC_EDWARDS,
                KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096 => KeyType::RSA,
            };
            let mut template = secret_template(key_type);
            template[0] = Attribute::Class(ObjectClass::PRIVATE_KEY);
            template
        };
        let object = self
            .session
            .unwrap_key(&self.wrap_mechanism(), keeping, blob, &template)
            .doing(|| format!("unwrapping a {kind} key under {wrapping_key}"))?;
        let rewrapped = self.wrap_under(transport, object);
        self.forget(object)?;
        rewrapped
    }

    /// Destroys a token object and looks again: it must be gone.
    fn destroy(&mut self, name: &KeyName) -> Result<(), Failure> {
        let object = self.key(name)?;
        self.handles.remove(name);
        let shared = Arc::clone(&self.shared);
        let _alone = shared.objects.as_ref().map(|lock| lock.write().unwrap_or_else(PoisonError::into_inner));
        self.session.destroy_object(object).doing(|| format!("destroying {name}"))?;
        let template = [Attribute::Label(name.as_str().as_bytes().to_vec())];
        let left = self.session.find_objects(&template).doing(|| format!("looking whether {name} is gone"))?;
        if left.contains(&object) {
            return Err(Failure::new(FailureClass::Transient, format!("{name} is still there after C_DestroyObject")));
        }
        Ok(())
    }

    /// Makes the transport key and hands it out, once, under the RSA key of the process that asked.
    pub(crate) fn make_transport_key(
        &mut self,
        rsa: &TransportRsa,
        hash: OaepHash,
    ) -> Result<(ObjectHandle, Vec<u8>), Failure> {
        let template = [
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::Token(false),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(true),
            Attribute::Wrap(true),
            Attribute::Unwrap(false),
            Attribute::Encrypt(false),
            Attribute::Decrypt(false),
            Attribute::ValueLen(32.into()),
        ];
        let key = self
            .session
            .generate_key(&Mechanism::AesKeyGen, &template)
            .doing(|| "making a transport key".to_owned())?;
        let public = [
            Attribute::Class(ObjectClass::PUBLIC_KEY),
            Attribute::KeyType(KeyType::RSA),
            Attribute::Token(false),
            Attribute::Wrap(true),
            Attribute::Modulus(rsa.modulus.clone()),
            Attribute::PublicExponent(rsa.exponent.clone()),
        ];
        let receiver = self.session.create_object(&public).doing(|| "importing the transport public key".to_owned())?;
        let (hash, mgf) = match hash {
            OaepHash::Sha1 => (MechanismType::SHA1, PkcsMgfType::MGF1_SHA1),
            OaepHash::Sha256 => (MechanismType::SHA256, PkcsMgfType::MGF1_SHA256),
        };
        let oaep = Mechanism::RsaPkcsOaep(PkcsOaepParams::new(hash, mgf, PkcsOaepSource::empty()));
        let wrapped = self.session.wrap_key(&oaep, receiver, key).doing(|| "handing out the transport key".to_owned());
        self.forget(receiver)?;
        self.transport_key = Some(key);
        Ok((key, wrapped?))
    }

    fn public_key(&self, kind: KeyKind, object: ObjectHandle) -> Result<WirePublicKey, Failure> {
        let doing = || "reading a new public key".to_owned();
        let missing = || Failure::new(FailureClass::Rejected, "the module does not show a new public key");
        if kind.rsa_bits().is_some() {
            let wanted = [AttributeType::Modulus, AttributeType::PublicExponent];
            let found = self.session.get_attributes(object, &wanted).doing(doing)?;
            let (mut modulus, mut exponent) = (None, None);
            for attribute in found {
                match attribute {
                    Attribute::Modulus(bytes) => modulus = Some(bytes),
                    Attribute::PublicExponent(bytes) => exponent = Some(bytes),
                    _ => {}
                }
            }
            let (modulus, exponent) = modulus.zip(exponent).ok_or_else(missing)?;
            return Ok(WirePublicKey::Rsa { modulus, exponent });
        }
        let found = self.session.get_attributes(object, &[AttributeType::EcPoint]).doing(doing)?;
        let Some(Attribute::EcPoint(point)) = found.into_iter().next() else { return Err(missing()) };
        let point = raw_point(point);
        Ok(if kind == KeyKind::Ed25519 { WirePublicKey::Ed25519(point) } else { WirePublicKey::Ec(point) })
    }

    /// Makes a token object with a template; the caller has checked that its names are free.
    pub(crate) fn create_token_pair(
        &self,
        kind: KeyKind,
        public_template: &[Attribute],
        private_template: &[Attribute],
    ) -> Result<WirePublicKey, Failure> {
        let (mechanism, mut public) = pair_generation(kind);
        public.extend_from_slice(public_template);
        let (object, _) = self
            .session
            .generate_key_pair(&mechanism, &public, private_template)
            .doing(|| format!("generating a {kind} pair on the token"))?;
        self.public_key(kind, object)
    }

    pub(crate) const fn session(&self) -> &Session {
        &self.session
    }

    fn wrap_mechanism(&self) -> Mechanism<'static> {
        match self.shared.wrap {
            WrapMechanism::AesKeyWrapPad => Mechanism::AesKeyWrapPad,
        }
    }

    fn transport(&self) -> Result<ObjectHandle, Failure> {
        self.transport_key.ok_or_else(|| Failure::new(FailureClass::Rejected, "there is no transport key here"))
    }

    fn forget(&self, object: ObjectHandle) -> Result<(), Failure> {
        self.session.destroy_object(object).doing(|| "destroying a session object".to_owned())
    }

    /// The handle of a key of the register; looked up once per session.
    fn key(&mut self, name: &KeyName) -> Result<ObjectHandle, Failure> {
        if let Some(object) = self.handles.get(name) {
            return Ok(*object);
        }
        let key = self.shared.keys.get(name).ok_or_else(|| {
            Failure::new(FailureClass::Rejected, format!("the key {name} is not in the register of keys"))
        })?;
        let _shared = self.shared.objects.as_ref().map(|lock| lock.read().unwrap_or_else(PoisonError::into_inner));
        let object = find_one(&self.session, key.role.class(), name, &key.id)?;
        self.handles.insert(name.clone(), object);
        Ok(object)
    }
}

/// A session object's template for a secret that is only passing through.
fn secret_template(key_type: KeyType) -> Vec<Attribute> {
    vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(key_type),
        Attribute::Token(false),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(true),
    ]
}

/// CKA_EC_POINT is a DER OCTET STRING (PKCS#11 v2.40 §2.3.3); some modules give the point itself.
fn raw_point(point: Vec<u8>) -> Vec<u8> {
    use der::Decode as _;
    match <&der::asn1::OctetStringRef>::from_der(&point) {
        Ok(inner) => inner.as_bytes().to_vec(),
        Err(_) => point,
    }
}
