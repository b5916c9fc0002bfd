//! Tests whether an HSM supports what the products require, whether it enforces key attributes, and how fast it is.
//!
//! The test uses session objects only, except for one batch key, which it destroys again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, ObjectHandle};
use serde::Serialize;
use spp_format::keys::{DevicePrivateKey, KeyType, SignatureAlgorithm};
use spp_format::names::KeyName;

use super::attributes::{KeyRole, Provenance, audit, pair_generation};
use super::failure::Failure;
use super::kdf::{Derivation, Prf};
use super::module::{KdfRoute, ModuleProfile, WrapMechanism};
use super::objects::{Ceremony, public_key, to_hsm_error, to_x509_form};
use super::operations::{Shared, TokenOperations};
use super::transport::{TransportKey, TransportReceiver};
use super::wire::{Answer, KeyOnToken};
use super::{BatchName, HsmError, PinSource, StoreId, TokenIdentity};

/// Each operation is measured this number of times or for this long, whichever ends first.
const SAMPLES: (usize, Duration) = (100, Duration::from_millis(400));

/// The HSM functions that the products require.
#[derive(Debug, Clone, Default)]
pub struct HsmRequirements {
    /// Key types that sign certificates or checkpoints.
    pub signing: BTreeSet<KeyType>,
    /// Types of device key pairs.
    pub pairs: BTreeSet<KeyType>,
    /// The pseudorandom functions of master keys.
    pub prfs: Vec<Prf>,
}

impl HsmRequirements {
    /// Everything that a profile can require.
    pub fn everything() -> Self {
        let kinds: BTreeSet<_> = KeyType::ALL.into_iter().collect();
        Self { signing: kinds.clone(), pairs: kinds, prfs: vec![Prf::HmacSha256, Prf::AesCmac] }
    }
}

/// The result of a self-test.
#[derive(Debug, Clone, Serialize)]
pub struct SelfTestReport {
    /// The module's description of itself.
    pub module: String,
    /// The token's label.
    pub token: String,
    /// Number of threads in the module's profile.
    pub threads: usize,
    /// The findings, in order of the tests.
    pub findings: Vec<Finding>,
}

/// The result of one test.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// The tested function, for example `sign p256`.
    pub what: String,
    /// The purpose for which the product needs it.
    pub needed_for: &'static str,
    /// The median duration, if it was measured and works.
    pub microseconds: Option<u64>,
    /// The problem, with the recommended action.
    pub error: Option<String>,
}

impl SelfTestReport {
    /// Whether every test passed.
    pub fn passed(&self) -> bool {
        self.findings.iter().all(|finding| finding.error.is_none())
    }

    /// The median duration of a function, if it works.
    pub fn took(&self, what: &str) -> Option<Duration> {
        let finding = self.findings.iter().find(|finding| finding.what == what && finding.error.is_none())?;
        finding.microseconds.map(Duration::from_micros)
    }
}

/// Tests everything that is required. The process must have the module's environment.
pub fn run_self_test(
    profile: &ModuleProfile,
    token: &TokenIdentity,
    pin: &PinSource,
    requirements: &HsmRequirements,
    progress: impl FnMut(&str),
) -> Result<SelfTestReport, HsmError> {
    let ceremony = Ceremony::open(profile, token, pin)?;
    let keys = BTreeMap::<KeyName, KeyOnToken>::new();
    let shared = Shared::single_threaded(profile, keys);
    let session = ceremony.token.session().map_err(to_hsm_error)?;
    let mut test = SelfTest {
        operations: TokenOperations::new(session, shared, None),
        profile: profile.clone(),
        findings: Vec::new(),
        progress: Box::new(progress),
    };
    test.run(requirements);
    let findings = test.findings;
    let (module, token) = (ceremony.module().to_owned(), ceremony.token().label.clone());
    Ok(SelfTestReport { module, token, threads: profile.threads, findings })
}

struct SelfTest<'a> {
    operations: TokenOperations,
    profile: ModuleProfile,
    findings: Vec<Finding>,
    progress: Box<dyn FnMut(&str) + 'a>,
}

/// A key name of this module. The names are constants, so parsing succeeds.
fn name(text: &str) -> KeyName {
    text.parse().unwrap_or_else(|_| BatchName { store: StoreId::from_random([0; 8]), number: 0 }.key())
}

impl SelfTest<'_> {
    fn run(&mut self, requirements: &HsmRequirements) {
        self.measure("random", "session identifiers, certificate serial numbers", |operations| {
            operations.random(32).map(drop)
        });
        for prf in &requirements.prfs {
            self.derivation(*prf);
        }
        for kind in &requirements.signing {
            self.signing(*kind);
        }
        let transport = self.transport();
        self.wrapping();
        if let Some(transport) = transport {
            for kind in &requirements.pairs {
                self.pairs(*kind, &transport);
            }
        }
        self.batch_keys();
    }

    /// Tries an operation once and, if it works, repeats it to measure its duration.
    fn measure(
        &mut self,
        what: &str,
        needed_for: &'static str,
        mut operation: impl FnMut(&mut TokenOperations) -> Result<(), Failure>,
    ) -> bool {
        (self.progress)(what);
        let mut took = Vec::new();
        let started = Instant::now();
        let mut error = None;
        while took.len() < SAMPLES.0 && (took.is_empty() || started.elapsed() < SAMPLES.1) {
            let sample_started = Instant::now();
            match operation(&mut self.operations) {
                Ok(()) => took.push(sample_started.elapsed()),
                Err(failure) => {
                    error = Some(failure.message);
                    break;
                }
            }
        }
        took.sort_unstable();
        let median = took.get(took.len() / 2).map(|median| u64::try_from(median.as_micros()).unwrap_or(u64::MAX));
        let works = error.is_none();
        self.findings.push(Finding {
            what: what.to_owned(),
            needed_for,
            microseconds: median.filter(|_| works),
            error,
        });
        works
    }

    /// Records the result of a check.
    fn record(&mut self, what: String, needed_for: &'static str, error: Result<(), String>) {
        self.findings.push(Finding { what, needed_for, microseconds: None, error: error.err() });
    }

    /// Generates a session key with a role and the attributes that a ceremony uses on the token.
    fn session_key(
        &mut self,
        name: &KeyName,
        role: KeyRole,
        mechanism: &Mechanism<'_>,
    ) -> Result<ObjectHandle, Failure> {
        use super::failure::FailureContext as _;
        let mut template = role.template(name, b"spp-self-test", &self.profile);
        template[0] = Attribute::Token(false);
        template.push(Attribute::ValueLen(32.into()));
        let made = self.operations.session().generate_key(mechanism, &template);
        let object = made.context(|| format!("generating a {name}"))?;
        self.operations.handles.insert(name.clone(), object);
        Ok(object)
    }

    fn derivation(&mut self, prf: Prf) {
        const FOR: &str = "the devices' symmetric keys";
        let (text, mechanism) = match prf {
            Prf::HmacSha256 => ("hmac-sha-256", Mechanism::GenericSecretKeyGen),
            Prf::AesCmac => ("aes-cmac", Mechanism::AesKeyGen),
        };
        let key = name(&format!("master-{text}"));
        let role = KeyRole::master(prf, self.profile.kdf);
        let object = match self.session_key(&key, role, &mechanism) {
            Ok(object) => object,
            Err(failure) => return self.record(format!("derive {text}"), FOR, Err(failure.message)),
        };
        let derivation =
            Derivation { master_key: key.clone(), label: "spp/v1/check".into(), context: vec![7; 20], length: 32 };
        let fixed = derivation.fixed_input();
        let works = self
            .measure(&format!("derive {text}"), FOR, |operations| operations.derive(&key, prf, &fixed, 32).map(drop));
        if works && self.profile.kdf == KdfRoute::Sp800108Counter {
            let compared = self.compare_routes(prf, &mechanism, &fixed);
            self.record(format!("derive {text}: the module's KDF gives the bytes of its MAC"), FOR, compared);
        }
        self.attributes(text, object, role);
    }

    /// Compares the two derivation routes with one key that is allowed to use both.
    fn compare_routes(&mut self, prf: Prf, mechanism: &Mechanism<'_>, fixed: &[u8]) -> Result<(), String> {
        let key = name("master-of-both-routes");
        let template = [
            Attribute::Token(false),
            Attribute::Sensitive(true),
            Attribute::Sign(true),
            Attribute::Derive(true),
            Attribute::ValueLen(32.into()),
        ];
        let both = self.operations.session().generate_key(mechanism, &template);
        let both = both.map_err(|e| Failure::of("generating a key that signs and derives", &e).message)?;
        let mut by_mac = self.profile.clone();
        by_mac.kdf = KdfRoute::Prf;
        let shared = std::mem::replace(&mut self.operations.shared, Shared::single_threaded(&by_mac, BTreeMap::new()));
        self.operations.handles.insert(key.clone(), both);
        // 50 bytes need more than one block of either function, and end within a block.
        let mac = self.operations.derive(&key, prf, fixed, 50);
        self.operations.shared = shared;
        let native = self.operations.derive(&key, prf, fixed, 50);
        match (mac, native) {
            (Ok(mac), Ok(native)) if mac == native => Ok(()),
            (Ok(_), Ok(_)) => Err(
                "the bytes differ: the KDF is not SP 800-108 with a leading 32-bit counter; set kdf.route = \"prf\""
                    .to_owned(),
            ),
            (Err(failure), _) | (_, Err(failure)) => Err(failure.message),
        }
    }

    /// Tests whether the module enforces key attributes.
    fn attributes(&mut self, text: &str, object: ObjectHandle, role: KeyRole) {
        const FOR: &str = "keys that cannot leave the HSM";
        let session = self.operations.session();
        let audited = audit(session, object, &name(text), role, Provenance::Made).map_err(|failure| failure.message);
        let shown = session.get_attributes(object, &[AttributeType::Value]);
        let hidden = match shown {
            Ok(shown) if shown.iter().any(|a| matches!(a, Attribute::Value(v) if !v.is_empty())) => {
                Err("the module returns the value of a sensitive key: do not use this module".to_owned())
            }
            _ => Ok(()),
        };
        let changed = session.update_attributes(object, &[Attribute::Extractable(true)]);
        let extractable = session.get_attributes(object, &[AttributeType::Extractable]);
        let fixed = match (changed, extractable) {
            (_, Ok(now)) if now.contains(&Attribute::Extractable(true)) => {
                Err("the module made an unextractable key extractable: do not use this module".to_owned())
            }
            _ => Ok(()),
        };
        self.record(format!("attributes of a {text} key are set and readable"), FOR, audited);
        self.record(format!("a sensitive {text} key cannot be read"), FOR, hidden);
        self.record(format!("a {text} key stays unextractable"), FOR, fixed);
    }

    fn signing(&mut self, kind: KeyType) {
        use super::failure::FailureContext as _;
        const FOR: &str = "certificates, log checkpoints";
        let (mechanism, mut public) = pair_generation(kind);
        public.extend([Attribute::Token(false), Attribute::Verify(true)]);
        let key = name(&format!("signer-{kind}"));
        let mut private = KeyRole::Signing(kind).template(&key, b"spp-self-test", &self.profile);
        private[0] = Attribute::Token(false);
        let made = self.operations.session().generate_key_pair(&mechanism, &public, &private);
        let made = made.context(|| format!("generating a {kind} pair"));
        let shown = made.and_then(|(public, private)| {
            let shown = self.operations.public_key(kind, public)?;
            self.operations.handles.insert(key.clone(), private);
            Ok(shown)
        });
        let shown = shown
            .map_err(|failure| failure.message)
            .and_then(|shown| public_key(kind, shown).map_err(|e| e.to_string()));
        let shown = match shown {
            Ok(shown) => shown,
            Err(error) => return self.record(format!("sign {kind}"), FOR, Err(error)),
        };
        let algorithm = SignatureAlgorithm::default_for(kind);
        self.measure(&format!("sign {kind}"), FOR, |operations| {
            let wrong = |e: String| Failure::new(super::FailureClass::Rejected, e);
            let signature = to_x509_form(algorithm, operations.sign(&key, algorithm, b"spp/v1/key-check self-test")?);
            let signature = signature.map_err(|e| wrong(e.to_string()))?;
            let verified = shown.verify(algorithm, b"spp/v1/key-check self-test", &signature);
            verified.map_err(|_| wrong("the signature does not verify: do not use this module".to_owned()))
        });
    }

    fn transport(&mut self) -> Option<TransportKey> {
        const FOR: &str = "delivery of device keys from the HSM";
        let (hash, wrap) = (self.profile.oaep_hash, self.profile.wrap);
        let made = TransportReceiver::generate().map_err(|e| e.to_string()).and_then(|receiver| {
            let (_, wrapped) = self.operations.make_transport_key(&receiver.public_copy()).map_err(|f| f.message)?;
            receiver.open(hash, wrap, &wrapped).map_err(|e| e.to_string())
        });
        let what = format!("wrap the transport key (RSA-OAEP, {hash:?})");
        match made {
            Ok(key) => {
                self.record(what, FOR, Ok(()));
                Some(key)
            }
            Err(error) => {
                self.record(what, FOR, Err(error));
                None
            }
        }
    }

    /// Generates the wrapping key for the later tests, and tests the operations that it must refuse.
    fn wrapping(&mut self) {
        const FOR: &str = "pregenerated key pairs";
        let mechanism = match self.profile.wrap {
            WrapMechanism::AesKeyWrapPad => "AES key wrap with padding (RFC 5649)",
            WrapMechanism::AesGcm => "AES-GCM",
            WrapMechanism::AesCbcPad => "AES-CBC with padding",
        };
        let wrapping = match self.session_key(&name("wrapping"), KeyRole::Wrapping, &Mechanism::AesKeyGen) {
            Ok(object) => object,
            Err(failure) => return self.record(format!("wrap: {mechanism}"), FOR, Err(failure.message)),
        };
        let fixed = match self.operations.wrap_under(wrapping, wrapping) {
            Ok(_) => Err("the module wraps keys that are not extractable: do not use this module".to_owned()),
            Err(_) => Ok(()),
        };
        self.record("an unextractable key cannot be wrapped".to_owned(), FOR, fixed);
        let signs = self.operations.session().sign(&Mechanism::AesCMac, wrapping, b"x");
        let signs = signs.map_or(Ok(()), |_| Err("the module signs with a key that may only wrap".to_owned()));
        self.record("a key serves only its own usage".to_owned(), FOR, signs);
    }

    fn pairs(&mut self, kind: KeyType, transport: &TransportKey) {
        const FOR: &str = "device key pairs";
        let wrapping = name("wrapping");
        if !self.operations.handles.contains_key(&wrapping) {
            return self.record(format!("pair {kind}"), FOR, Err("no wrapping key could be generated".to_owned()));
        }
        let wrong = |e: String| Failure::new(super::FailureClass::Rejected, e);
        let checked = |operations: &mut TokenOperations| -> Result<Vec<u8>, Failure> {
            let Answer::Pair { public, stored, delivered } = operations.generate_pair(kind, &wrapping)? else {
                return Err(wrong("the answer is not a pair".to_owned()));
            };
            let public = public_key(kind, public).map_err(|e| wrong(e.to_string()))?;
            let plain = transport.unwrap(&delivered).map_err(|e| wrong(e.to_string()))?;
            DevicePrivateKey::from_unwrapped(public, &plain).map_err(|e| wrong(e.to_string()))?;
            Ok(stored)
        };
        let mut stored = None;
        let works = self.measure(&format!("pair {kind}"), FOR, |operations| {
            stored = Some(checked(operations)?);
            Ok(())
        });
        if let Some(stored) = stored.filter(|_| works) {
            self.measure(&format!("rewrap {kind}"), "pregenerated pairs, repeated deliveries", |operations| {
                operations.rewrap(kind, &wrapping, &stored).map(drop)
            });
        }
    }

    fn batch_keys(&mut self) {
        const FOR: &str = "shredding batches";
        let store = self.operations.random(8).ok().and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; 8]);
        let key = BatchName { store: StoreId::from_random(store), number: 0 }.key();
        self.measure("create and destroy a token key", FOR, |operations| {
            operations.create_batch_key(&key)?;
            operations.destroy_batch_key(&key)
        });
        self.operations.handles = HashMap::new();
    }
}
