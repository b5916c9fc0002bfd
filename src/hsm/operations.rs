//! The HSM operations as PKCS#11 calls, performed by a worker thread in its session.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use cryptoki::mechanism::eddsa::{EddsaParams, EddsaSignatureScheme};
use cryptoki::mechanism::kbkdf::{Endianness, KbkdfCounterFormat, KbkdfParams, PrfDataParam, PrfDataParamType};
use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource, PkcsPssParams};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType as CkKeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use spp_format::keys::SignatureAlgorithm;
use spp_format::names::KeyName;
use zeroize::Zeroizing;

use super::attributes::audit;
use super::failure::{Failure, FailureContext as _};
use super::failure_class::FailureClass;
use super::kdf::{Prf, prf_inputs};
use super::module::{KdfRoute, ModuleProfile, OaepHash};
use super::token::find_one;
use super::wire::{Answer, KeyOnToken, Operation, TransportRsa, WireSecret};
use super::{BatchName, TokenPair};

/// State shared by all threads of a worker.
pub(crate) struct Shared {
    pub(crate) keys: BTreeMap<KeyName, KeyOnToken>,
    pub(crate) module: ModuleProfile,
    /// Write-locked to create or destroy token objects, read-locked to look them up. `None` unless the module requires it:
    /// SoftHSM otherwise fails calls and leaves half-written objects behind.
    pub(crate) objects: Option<RwLock<()>>,
    /// The handles of pairs on the token. Handles of token objects are valid in every session (PKCS#11 v2.40 §2.3.2).
    pub(crate) pairs: Mutex<HashMap<TokenPair, ObjectHandle>>,
    /// Number of keys destroyed. A module may reuse the handle of a destroyed key (opencryptoki does), so every session must then
    /// discard its cached handles.
    destroyed: AtomicU64,
}

impl Shared {
    /// State for concurrent threads.
    pub(super) fn new(module: ModuleProfile, keys: BTreeMap<KeyName, KeyOnToken>) -> Arc<Self> {
        let objects = module.exclusive_changes.then(|| RwLock::new(()));
        Arc::new(Self { keys, module, objects, pairs: Mutex::default(), destroyed: AtomicU64::new(0) })
    }

    /// State for a process that uses the token exclusively, one session at a time.
    pub(super) fn single_threaded(profile: &ModuleProfile, keys: BTreeMap<KeyName, KeyOnToken>) -> Arc<Self> {
        Arc::new(Self {
            keys,
            module: profile.clone(),
            objects: None,
            pairs: Mutex::default(),
            destroyed: AtomicU64::new(0),
        })
    }

    /// The lock for creating or destroying token objects.
    pub(super) fn change_lock(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        self.objects.as_ref().map(|lock| lock.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn destroyed(&self) -> u64 {
        self.destroyed.load(Ordering::SeqCst)
    }

    /// Makes every session look up its keys again. Called before and after a key is destroyed.
    pub(super) fn invalidate_handles(&self) {
        self.destroyed.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn pairs(&self) -> MutexGuard<'_, HashMap<TokenPair, ObjectHandle>> {
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock for looking up token objects.
    pub(super) fn lookup_lock(&self) -> Option<RwLockReadGuard<'_, ()>> {
        self.objects.as_ref().map(|lock| lock.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The DER prefix of DigestInfo for SHA-256 (RFC 8017 §9.2).
const SHA256_DIGEST_INFO: &[u8] =
    &[0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20];

/// A session with its cached object handles.
pub(crate) struct TokenOperations {
    pub(super) session: Session,
    pub(super) shared: Arc<Shared>,
    pub(super) handles: HashMap<KeyName, ObjectHandle>,
    /// Value of [`Shared::destroyed`] when the handles were looked up.
    destroyed: u64,
    /// The AES key under which device keys leave the HSM; it ends with the session that generated it.
    transport_key: Option<ObjectHandle>,
}

impl TokenOperations {
    pub(crate) fn new(session: Session, shared: Arc<Shared>, transport_key: Option<ObjectHandle>) -> Self {
        let destroyed = shared.destroyed();
        Self { session, shared, handles: HashMap::new(), destroyed, transport_key }
    }

    /// Continues with a new session and an empty handle cache.
    pub(crate) fn renewed(self, session: Session) -> Self {
        Self::new(session, self.shared, self.transport_key)
    }

    /// Finds and audits every key of the manifest, and checks that the transport key exists if one was generated.
    pub(crate) fn check_keys(&mut self) -> Result<(), Failure> {
        let shared = Arc::clone(&self.shared);
        for (name, key) in &shared.keys {
            let object = self.key(name)?;
            audit(&self.session, object, name, key.role, key.provenance)?;
        }
        let Some(transport) = self.transport_key else { return Ok(()) };
        match self.session.get_attributes(transport, &[AttributeType::Class]) {
            Ok(found) if !found.is_empty() => Ok(()),
            // The transport key ends with its session; only a new worker generates another.
            _ => Err(Failure::new(FailureClass::ModuleLost, "the transport key no longer exists")),
        }
    }

    /// Performs one operation.
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
            Operation::MakePairs { kind, target, at_most, within_ms } => {
                self.make_pairs(kind, &target, at_most, Duration::from_millis(within_ms.into())).map(Answer::Made)
            }
            Operation::Move { from, to, blobs } => self.move_keys(&from, &to, &blobs).map(Answer::Moved),
            Operation::CreateBatchKey { key } => self.create_batch_key(&key).map(|()| Answer::Created),
            Operation::DestroyBatchKey { key } => self.destroy_batch_key(&key).map(|()| Answer::Destroyed),
            Operation::DestroyPair { kind, pair } => self.destroy_pair(kind, &pair).map(|()| Answer::Destroyed),
            Operation::ListOwn => self.list_own(),
            Operation::Destroy { key } => self.destroy(&key).map(|()| Answer::Destroyed),
        }
    }

    /// Uses the session, so that the module does not close it as idle.
    pub(crate) fn keep_alive(&mut self) -> Result<(), Failure> {
        self.random(1).map(drop)
    }

    pub(crate) fn random(&self, len: u32) -> Result<Vec<u8>, Failure> {
        self.session.generate_random_vec(len).context(|| "generating random bytes".to_owned())
    }

    /// Signs. ECDSA signatures are `r || s`; the hash is computed here, because not every module has the hashing mechanism.
    pub(crate) fn sign(
        &mut self,
        key: &KeyName,
        algorithm: SignatureAlgorithm,
        message: &[u8],
    ) -> Result<Vec<u8>, Failure> {
        use aws_lc_rs::digest::{SHA256, SHA384, digest};
        let object = self.key(key)?;
        let sign = |mechanism: Mechanism<'_>, data: &[u8]| {
            self.session.sign(&mechanism, object, data).context(|| format!("signing with {key}"))
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

    /// Derives a key by SP 800-108r1 §4.1 with C_Sign as the PRF, truncated to `len`, or by the module's own KDF.
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
            return compute_twice(key, len, derive).map(|mut derived| std::mem::take(&mut *derived));
        }
        let mechanism = match prf {
            Prf::HmacSha256 => Mechanism::Sha256Hmac,
            Prf::AesCmac => Mechanism::AesCMac,
        };
        let mut derived = Zeroizing::new(Vec::with_capacity(len + prf.output_len()));
        for input in prf_inputs(prf, fixed_input, len) {
            let block = || {
                let block = self.session.sign(&mechanism, object, &input).context(|| format!("deriving from {key}"));
                block.map(Zeroizing::new)
            };
            derived.extend_from_slice(&compute_twice(key, prf.output_len(), block)?);
        }
        derived.truncate(len);
        Ok(std::mem::take(&mut *derived))
    }

    /// Derives a key with the module's SP 800-108r1 §4.1 KDF. The derived key is a session object until it is read.
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
            Attribute::KeyType(CkKeyType::GENERIC_SECRET),
            Attribute::Token(false),
            Attribute::Sensitive(false),
            Attribute::Extractable(true),
            Attribute::ValueLen((len as u64).into()),
        ];
        let context = || format!("deriving from {key}");
        let derived = self.session.derive_key(&mechanism, object, &template).context(context)?;
        // cryptoki does not wipe its buffer: a copy of this key remains on the worker's heap until the memory is reused.
        let value = self.session.get_attributes(derived, &[AttributeType::Value]).context(context);
        let value = value.map(|attributes| match attributes.into_iter().next() {
            Some(Attribute::Value(value)) => Some(Zeroizing::new(value)),
            _ => None,
        });
        self.destroy_session_object(derived)?;
        let hidden =
            || Failure::new(FailureClass::Rejected, format!("{}: the module does not return the key", context()));
        value?.ok_or_else(hidden)
    }

    /// Destroys a token object and verifies by a lookup that it no longer exists.
    fn destroy(&mut self, name: &KeyName) -> Result<(), Failure> {
        let object = self.key(name)?;
        self.handles.remove(name);
        let shared = Arc::clone(&self.shared);
        let _lock = shared.change_lock();
        shared.invalidate_handles();
        let destroyed = self.session.destroy_object(object).context(|| format!("destroying {name}"));
        shared.invalidate_handles();
        destroyed?;
        let template = [Attribute::Label(name.as_str().as_bytes().to_vec())];
        let remaining =
            self.session.find_objects(&template).context(|| format!("verifying the destruction of {name}"))?;
        if remaining.contains(&object) {
            return Err(Failure::new(FailureClass::Transient, format!("{name} still exists after C_DestroyObject")));
        }
        Ok(())
    }

    /// Generates the transport key and exports it once, wrapped under the RSA public key of the requesting process.
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
            .context(|| "generating the transport key".to_owned())?;
        let public = [
            Attribute::Class(ObjectClass::PUBLIC_KEY),
            Attribute::KeyType(CkKeyType::RSA),
            Attribute::Token(false),
            Attribute::Wrap(true),
            Attribute::Modulus(rsa.modulus.clone()),
            Attribute::PublicExponent(rsa.exponent.clone()),
        ];
        let receiver =
            self.session.create_object(&public).context(|| "importing the transport public key".to_owned())?;
        let (hash, mgf) = match self.shared.module.oaep_hash {
            OaepHash::Sha1 => (MechanismType::SHA1, PkcsMgfType::MGF1_SHA1),
            OaepHash::Sha256 => (MechanismType::SHA256, PkcsMgfType::MGF1_SHA256),
        };
        let oaep = Mechanism::RsaPkcsOaep(PkcsOaepParams::new(hash, mgf, PkcsOaepSource::empty()));
        let wrapped = self.session.wrap_key(&oaep, receiver, key).context(|| "wrapping the transport key".to_owned());
        self.destroy_session_object(receiver)?;
        self.transport_key = Some(key);
        Ok((key, wrapped?))
    }

    pub(crate) const fn session(&self) -> &Session {
        &self.session
    }

    pub(super) fn transport(&self) -> Result<ObjectHandle, Failure> {
        self.transport_key.ok_or_else(|| Failure::new(FailureClass::Rejected, "this process has no transport key"))
    }

    pub(super) fn destroy_session_object(&self, object: ObjectHandle) -> Result<(), Failure> {
        self.session.destroy_object(object).context(|| "destroying a session object".to_owned())
    }

    /// The handle of a key of the manifest or of a batch key, looked up once per session.
    pub(super) fn key(&mut self, name: &KeyName) -> Result<ObjectHandle, Failure> {
        let destroyed = self.shared.destroyed();
        if destroyed != std::mem::replace(&mut self.destroyed, destroyed) {
            self.handles.clear();
        }
        if let Some(object) = self.handles.get(name) {
            return Ok(*object);
        }
        if BatchName::from_key_name(name).is_some() {
            return self.batch_key(name);
        }
        let key = self.shared.keys.get(name).ok_or_else(|| {
            Failure::new(FailureClass::Rejected, format!("the key {name} is not in the key manifest"))
        })?;
        let _lock = self.shared.lookup_lock();
        let object = find_one(&self.session, key.role.class(), name, &key.id)?;
        self.handles.insert(name.clone(), object);
        Ok(object)
    }
}

/// Computes a key twice and compares the results: a wrong key cannot be detected later, and its device would keep it for life.
fn compute_twice(
    key: &KeyName,
    len: usize,
    compute: impl Fn() -> Result<Zeroizing<Vec<u8>>, Failure>,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let (first, second) = (compute()?, compute()?);
    if first == second && first.len() == len {
        return Ok(first);
    }
    let message = format!("deriving from {key}: two computations gave different results");
    Err(Failure::new(FailureClass::ModuleLost, message))
}
