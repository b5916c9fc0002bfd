//! What one thread of the worker does with its session: the verbs, in PKCS#11.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use cryptoki::mechanism::eddsa::{EddsaParams, EddsaSignatureScheme};
use cryptoki::mechanism::kbkdf::{Endianness, KbkdfCounterFormat, KbkdfParams, PrfDataParam, PrfDataParamType};
use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource, PkcsPssParams};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use zeroize::Zeroizing;

use super::attributes::audit;
use super::failure::{Doing as _, Failure, FailureClass};
use super::kdf::{Prf, prf_inputs};
use super::module::{KdfRoute, ModuleProfile, OaepHash};
use super::token::find_one;
use super::wire::{Answer, KeyOnToken, Operation, TransportRsa, WireSecret};
use crate::keys::{BatchName, SignatureAlgorithm, TokenPair};
use crate::names::KeyName;

/// What all threads of a worker share.
pub(crate) struct Shared {
    pub(crate) keys: BTreeMap<KeyName, KeyOnToken>,
    pub(crate) module: ModuleProfile,
    /// Token objects are created and destroyed under the write half, looked up under the read half, where the module
    /// needs it: SoftHSM fails calls and leaves half-written objects behind otherwise.
    pub(crate) objects: Option<RwLock<()>>,
    /// The handles of pairs on the token; those of token objects are good in every session (PKCS#11 v2.40 §2.3.2).
    pub(crate) pairs: Mutex<HashMap<TokenPair, ObjectHandle>>,
    /// How many keys were destroyed. A module may give the handle of a key that is gone to another one (opencryptoki does), so that no
    /// session may trust what it looked up before.
    destroyed: AtomicU64,
}

impl Shared {
    /// For threads that work with the token at the same time.
    pub(super) fn new(module: ModuleProfile, keys: BTreeMap<KeyName, KeyOnToken>) -> Arc<Self> {
        let objects = module.exclusive_changes.then(|| RwLock::new(()));
        Arc::new(Self { keys, module, objects, pairs: Mutex::default(), destroyed: AtomicU64::new(0) })
    }

    /// For a process that has the token for itself and works with one session at a time.
    pub(super) fn alone(profile: &ModuleProfile, keys: BTreeMap<KeyName, KeyOnToken>) -> Arc<Self> {
        Arc::new(Self {
            keys,
            module: profile.clone(),
            objects: None,
            pairs: Mutex::default(),
            destroyed: AtomicU64::new(0),
        })
    }

    /// Held while token objects are made or destroyed.
    pub(super) fn changing(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        self.objects.as_ref().map(|lock| lock.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn destroyed(&self) -> u64 {
        self.destroyed.load(Ordering::SeqCst)
    }

    /// From now on every session looks its keys up again; before a key is destroyed, and after.
    pub(super) fn forget_handles(&self) {
        self.destroyed.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn pairs(&self) -> MutexGuard<'_, HashMap<TokenPair, ObjectHandle>> {
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while token objects are looked up.
    pub(super) fn looking(&self) -> Option<RwLockReadGuard<'_, ()>> {
        self.objects.as_ref().map(|lock| lock.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What RFC 8017 §9.2 puts before a SHA-256 digest.
const SHA256_DIGEST_INFO: &[u8] =
    &[0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20];

/// One session with the handles it has looked up.
pub(crate) struct TokenOperations {
    pub(super) session: Session,
    pub(super) shared: Arc<Shared>,
    pub(super) handles: HashMap<KeyName, ObjectHandle>,
    /// How many keys had been destroyed when they were looked up.
    destroyed: u64,
    /// The AES key under which device keys leave the HSM; a session object of the anchor session.
    transport_key: Option<ObjectHandle>,
}

impl TokenOperations {
    pub(crate) fn new(session: Session, shared: Arc<Shared>, transport_key: Option<ObjectHandle>) -> Self {
        let destroyed = shared.destroyed();
        Self { session, shared, handles: HashMap::new(), destroyed, transport_key }
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
            audit(&self.session, object, name, key.role, key.provenance)?;
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
            Operation::DeliverPair { kind, pair } => self.deliver_pair(kind, &pair).map(Answer::Rewrapped),
            Operation::MakePairs { kind, keep, at_most, within_ms } => {
                self.make_pairs(kind, &keep, at_most, Duration::from_millis(within_ms.into())).map(Answer::Made)
            }
            Operation::Move { from, to, blobs } => self.move_keys(&from, &to, &blobs).map(Answer::Moved),
            Operation::CreateBatchKey { key } => self.create_batch_key(&key).map(|()| Answer::Created),
            Operation::DestroyBatchKey { key } => self.destroy_batch_key(&key).map(|()| Answer::Destroyed),
            Operation::DestroyPair { kind, pair } => self.destroy_pair(kind, &pair).map(|()| Answer::Destroyed),
            Operation::ListOwn => self.list_own(),
            Operation::Destroy { key } => self.destroy(&key).map(|()| Answer::Destroyed),
        }
    }

    /// Uses the session.
    pub(crate) fn keep_alive(&mut self) -> Result<(), Failure> {
        self.random(1).map(drop)
    }

    pub(crate) fn random(&self, len: u32) -> Result<Vec<u8>, Failure> {
        self.session.generate_random_vec(len).doing(|| "drawing random bytes".to_owned())
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
            SignatureAlgorithm::RsaPkcs1Sha256 if self.shared.module.rsa_without_hash => {
                sign(Mechanism::RsaPkcs, &[SHA256_DIGEST_INFO, digest(&SHA256, message).as_ref()].concat())
            }
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
        if self.shared.module.kdf == KdfRoute::Sp800108Counter {
            let derive = || self.derive_inside(object, key, prf, fixed_input, len);
            return the_same_twice(key, len, derive).map(|mut derived| std::mem::take(&mut *derived));
        }
        let mechanism = match prf {
            Prf::HmacSha256 => Mechanism::Sha256Hmac,
            Prf::AesCmac => Mechanism::AesCMac,
        };
        let mut derived = Zeroizing::new(Vec::with_capacity(len + prf.output_len()));
        for input in prf_inputs(prf, fixed_input, len) {
            let block = || {
                let block = self.session.sign(&mechanism, object, &input).doing(|| format!("deriving from {key}"));
                block.map(Zeroizing::new)
            };
            derived.extend_from_slice(&the_same_twice(key, prf.output_len(), block)?);
        }
        derived.truncate(len);
        Ok(std::mem::take(&mut *derived))
    }

    /// SP 800-108r1 §4.1 by the module itself; the derived key is a session object for as long as it takes to read it.
    fn derive_inside(
        &self,
        object: ObjectHandle,
        key: &KeyName,
        prf: Prf,
        fixed_input: &[u8],
        len: usize,
    ) -> Result<Zeroizing<Vec<u8>>, Failure> {
        const COUNTER_BITS: NonZeroUsize = NonZeroUsize::new(32).unwrap();
        let prf = match prf {
            Prf::HmacSha256 => MechanismType::SHA256_HMAC,
            Prf::AesCmac => MechanismType::AES_CMAC,
        };
        let counter = KbkdfCounterFormat::new(Endianness::Big, COUNTER_BITS);
        let input = [
            PrfDataParam::new(PrfDataParamType::IterationVariable(Some(&counter))),
            PrfDataParam::new(PrfDataParamType::ByteArray(fixed_input)),
        ];
        let mechanism = Mechanism::KbkdfCounter(KbkdfParams::new(prf, &input, None));
        let template = [
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(KeyType::GENERIC_SECRET),
            Attribute::Token(false),
            Attribute::Sensitive(false),
            Attribute::Extractable(true),
            Attribute::ValueLen((len as u64).into()),
        ];
        let doing = || format!("deriving from {key}");
        let derived = self.session.derive_key(&mechanism, object, &template).doing(doing)?;
        // cryptoki's own buffer is not wiped: a copy of this key stays in the worker's heap until it is reused.
        let shown = self.session.get_attributes(derived, &[AttributeType::Value]).doing(doing);
        let shown = shown.map(|shown| match shown.into_iter().next() {
            Some(Attribute::Value(value)) => Some(Zeroizing::new(value)),
            _ => None,
        });
        self.forget(derived)?;
        let hidden = || Failure::new(FailureClass::Rejected, format!("{}: the module does not show the key", doing()));
        shown?.ok_or_else(hidden)
    }

    /// Destroys a token object and looks again: it must be gone.
    fn destroy(&mut self, name: &KeyName) -> Result<(), Failure> {
        let object = self.key(name)?;
        self.handles.remove(name);
        let shared = Arc::clone(&self.shared);
        let _alone = shared.changing();
        shared.forget_handles();
        let destroyed = self.session.destroy_object(object).doing(|| format!("destroying {name}"));
        shared.forget_handles();
        destroyed?;
        let template = [Attribute::Label(name.as_str().as_bytes().to_vec())];
        let left = self.session.find_objects(&template).doing(|| format!("looking whether {name} is gone"))?;
        if left.contains(&object) {
            return Err(Failure::new(FailureClass::Transient, format!("{name} is still there after C_DestroyObject")));
        }
        Ok(())
    }

    /// Makes the transport key and hands it out, once, under the RSA key of the process that asked.
    pub(crate) fn make_transport_key(&mut self, rsa: &TransportRsa) -> Result<(ObjectHandle, Vec<u8>), Failure> {
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
        let (hash, mgf) = match self.shared.module.oaep_hash {
            OaepHash::Sha1 => (MechanismType::SHA1, PkcsMgfType::MGF1_SHA1),
            OaepHash::Sha256 => (MechanismType::SHA256, PkcsMgfType::MGF1_SHA256),
        };
        let oaep = Mechanism::RsaPkcsOaep(PkcsOaepParams::new(hash, mgf, PkcsOaepSource::empty()));
        let wrapped = self.session.wrap_key(&oaep, receiver, key).doing(|| "handing out the transport key".to_owned());
        self.forget(receiver)?;
        self.transport_key = Some(key);
        Ok((key, wrapped?))
    }

    pub(crate) const fn session(&self) -> &Session {
        &self.session
    }

    pub(super) fn transport(&self) -> Result<ObjectHandle, Failure> {
        self.transport_key.ok_or_else(|| Failure::new(FailureClass::Rejected, "there is no transport key here"))
    }

    pub(super) fn forget(&self, object: ObjectHandle) -> Result<(), Failure> {
        self.session.destroy_object(object).doing(|| "destroying a session object".to_owned())
    }

    /// The handle of a key of the register, or of a batch key; looked up once per session.
    pub(super) fn key(&mut self, name: &KeyName) -> Result<ObjectHandle, Failure> {
        let destroyed = self.shared.destroyed();
        if destroyed != std::mem::replace(&mut self.destroyed, destroyed) {
            self.handles.clear();
        }
        if let Some(object) = self.handles.get(name) {
            return Ok(*object);
        }
        if BatchName::of_key(name).is_some() {
            return self.batch_key(name);
        }
        let key = self.shared.keys.get(name).ok_or_else(|| {
            Failure::new(FailureClass::Rejected, format!("the key {name} is not in the register of keys"))
        })?;
        let _shared = self.shared.looking();
        let object = find_one(&self.session, key.role.class(), name, &key.id)?;
        self.handles.insert(name.clone(), object);
        Ok(object)
    }
}

/// Asks twice: nobody could ever tell a wrong key from the right one, and its device would have it for life.
fn the_same_twice(
    key: &KeyName,
    len: usize,
    ask: impl Fn() -> Result<Zeroizing<Vec<u8>>, Failure>,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let (first, second) = (ask()?, ask()?);
    if first == second && first.len() == len {
        return Ok(first);
    }
    let message = format!("deriving from {key}: the HSM gave two different answers to the same question");
    Err(Failure::new(FailureClass::ModuleLost, message))
}
