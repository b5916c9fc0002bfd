//! The doctor: does an HSM do what the products need, does it keep what it promises, and how fast is it? It works with session
//! objects alone, but for one batch key, which it destroys again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, ObjectHandle};
use serde::Serialize;

use super::attributes::{KeyRole, Provenance, audit, pair_generation};
use super::failure::Failure;
use super::kdf::{Derivation, Prf};
use super::module::{KdfRoute, ModuleProfile, WrapMechanism};
use super::objects::{Ceremony, public_key, refused, to_x509_form};
use super::operations::{Shared, TokenOperations};
use super::transport::{TransportKey, TransportReceiver};
use super::wire::{Answer, KeyOnToken};
use super::{HsmError, PinSource, TokenIdentity};
use crate::keys::{BatchName, DevicePrivateKey, KeyKind, SignatureAlgorithm, StoreId};
use crate::names::KeyName;

/// Each verb is tried so often, or for so long, whichever ends first.
const TRIES: (usize, Duration) = (100, Duration::from_millis(400));

/// What the products need of an HSM.
#[derive(Debug, Clone, Default)]
pub struct Needs {
    /// Kinds of keys that sign certificates or checkpoints.
    pub signing: BTreeSet<KeyKind>,
    /// Kinds of device keys that are made.
    pub pairs: BTreeSet<KeyKind>,
    /// The pseudorandom functions of master keys.
    pub prfs: Vec<Prf>,
}

impl Needs {
    /// Everything that any profile could need.
    pub fn everything() -> Self {
        let kinds: BTreeSet<_> = KeyKind::ALL.into_iter().collect();
        Self { signing: kinds.clone(), pairs: kinds, prfs: vec![Prf::HmacSha256, Prf::AesCmac] }
    }
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct SelfTestReport {
    /// The module's description of itself.
    pub module: String,
    /// The token's label.
    pub token: String,
    /// Threads that work side by side, as the module's profile says.
    pub threads: usize,
    /// What was looked at, in order.
    pub findings: Vec<Finding>,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// `sign p256`, say.
    pub what: String,
    /// What it is needed for.
    pub needed_for: &'static str,
    /// How long one takes: the median, if it was measured and works.
    pub microseconds: Option<u64>,
    /// What is wrong, with what to do.
    pub trouble: Option<String>,
}

impl SelfTestReport {
    /// Whether everything that was looked at is as it must be.
    pub fn is_fit(&self) -> bool {
        self.findings.iter().all(|finding| finding.trouble.is_none())
    }

    /// How long one takes, if it works.
    pub fn took(&self, what: &str) -> Option<Duration> {
        let finding = self.findings.iter().find(|finding| finding.what == what && finding.trouble.is_none())?;
        finding.microseconds.map(Duration::from_micros)
    }
}

/// Looks at everything that is needed. The process must have the module's environment.
pub fn examine(
    profile: &ModuleProfile,
    token: &TokenIdentity,
    pin: &PinSource,
    needs: &Needs,
    progress: impl FnMut(&str),
) -> Result<SelfTestReport, HsmError> {
    let ceremony = Ceremony::open(profile, token, pin)?;
    let keys = BTreeMap::<KeyName, KeyOnToken>::new();
    let shared = Shared::alone(profile, keys);
    let session = ceremony.token.session().map_err(refused)?;
    let mut doctor = SelfTest {
        verbs: TokenOperations::new(session, shared, None),
        profile: profile.clone(),
        findings: Vec::new(),
        progress: Box::new(progress),
    };
    doctor.examine(needs);
    let findings = doctor.findings;
    let (module, token) = (ceremony.module().to_owned(), ceremony.token().label.clone());
    Ok(SelfTestReport { module, token, threads: profile.threads, findings })
}

struct SelfTest<'a> {
    verbs: TokenOperations,
    profile: ModuleProfile,
    findings: Vec<Finding>,
    progress: Box<dyn FnMut(&str) + 'a>,
}

/// What cannot go wrong: names that are written here.
fn name(text: &str) -> KeyName {
    text.parse().unwrap_or_else(|_| BatchName { store: StoreId::from_random([0; 8]), number: 0 }.key())
}

impl SelfTest<'_> {
    fn examine(&mut self, needs: &Needs) {
        self.measure("random", "session identifiers, certificate serial numbers", |verbs| verbs.random(32).map(drop));
        for prf in &needs.prfs {
            self.derivation(*prf);
        }
        for kind in &needs.signing {
            self.signing(*kind);
        }
        let transport = self.transport();
        self.wrapping();
        if let Some(transport) = transport {
            for kind in &needs.pairs {
                self.pairs(*kind, &transport);
            }
        }
        self.batch_keys();
    }

    /// Tries a verb once; if that works, again and again.
    fn measure(
        &mut self,
        what: &str,
        needed_for: &'static str,
        mut verb: impl FnMut(&mut TokenOperations) -> Result<(), Failure>,
    ) -> bool {
        (self.progress)(what);
        let mut took = Vec::new();
        let begun = Instant::now();
        let mut trouble = None;
        while took.len() < TRIES.0 && (took.is_empty() || begun.elapsed() < TRIES.1) {
            let one = Instant::now();
            match verb(&mut self.verbs) {
                Ok(()) => took.push(one.elapsed()),
                Err(failure) => {
                    trouble = Some(failure.message);
                    break;
                }
            }
        }
        took.sort_unstable();
        let median = took.get(took.len() / 2).map(|median| u64::try_from(median.as_micros()).unwrap_or(u64::MAX));
        let works = trouble.is_none();
        self.findings.push(Finding {
            what: what.to_owned(),
            needed_for,
            microseconds: median.filter(|_| works),
            trouble,
        });
        works
    }

    /// Notes whether something that must be so is so.
    fn expect(&mut self, what: String, needed_for: &'static str, trouble: Result<(), String>) {
        self.findings.push(Finding { what, needed_for, microseconds: None, trouble: trouble.err() });
    }

    /// A session key with a role, as the ceremony would make it on the token.
    fn session_key(&mut self, of: &KeyName, role: KeyRole, mechanism: &Mechanism<'_>) -> Result<ObjectHandle, Failure> {
        use super::failure::Doing as _;
        let mut template = role.template(of, b"spp-doctor", &self.profile);
        template[0] = Attribute::Token(false);
        template.push(Attribute::ValueLen(32.into()));
        let made = self.verbs.session().generate_key(mechanism, &template);
        let object = made.doing(|| format!("generating a {of}"))?;
        self.verbs.handles.insert(of.clone(), object);
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
            Err(failure) => return self.expect(format!("derive {text}"), FOR, Err(failure.message)),
        };
        let derivation =
            Derivation { master_key: key.clone(), label: "spp/v1/check".into(), context: vec![7; 20], length: 32 };
        let fixed = derivation.fixed_input();
        let works = self.measure(&format!("derive {text}"), FOR, |verbs| verbs.derive(&key, prf, &fixed, 32).map(drop));
        if works && self.profile.kdf == KdfRoute::Sp800108Counter {
            let compared = self.compare_routes(prf, &mechanism, &fixed);
            self.expect(format!("derive {text}: the module's KDF gives the bytes of its MAC"), FOR, compared);
        }
        self.promises(text, object, role);
    }

    /// One key that may do both, so that the two routes can be compared.
    fn compare_routes(&mut self, prf: Prf, mechanism: &Mechanism<'_>, fixed: &[u8]) -> Result<(), String> {
        let key = name("master-of-both-routes");
        let template = [
            Attribute::Token(false),
            Attribute::Sensitive(true),
            Attribute::Sign(true),
            Attribute::Derive(true),
            Attribute::ValueLen(32.into()),
        ];
        let both = self.verbs.session().generate_key(mechanism, &template);
        let both = both.map_err(|e| Failure::of("generating a key that signs and derives", &e).message)?;
        let mut by_mac = self.profile.clone();
        by_mac.kdf = KdfRoute::Prf;
        let shared = std::mem::replace(&mut self.verbs.shared, Shared::alone(&by_mac, BTreeMap::new()));
        self.verbs.handles.insert(key.clone(), both);
        // 50 bytes are more than one block of either function, and end within one.
        let mac = self.verbs.derive(&key, prf, fixed, 50);
        self.verbs.shared = shared;
        let native = self.verbs.derive(&key, prf, fixed, 50);
        match (mac, native) {
            (Ok(mac), Ok(native)) if mac == native => Ok(()),
            (Ok(_), Ok(_)) => {
                Err("it gives others: it is not SP 800-108 with a 32-bit counter first; set kdf.route = \"prf\""
                    .to_owned())
            }
            (Err(failure), _) | (_, Err(failure)) => Err(failure.message),
        }
    }

    /// Are attributes honoured?
    fn promises(&mut self, text: &str, object: ObjectHandle, role: KeyRole) {
        const FOR: &str = "keys that cannot leave the HSM";
        let session = self.verbs.session();
        let audited = audit(session, object, &name(text), role, Provenance::Made).map_err(|failure| failure.message);
        let shown = session.get_attributes(object, &[AttributeType::Value]);
        let hidden = match shown {
            Ok(shown) if shown.iter().any(|a| matches!(a, Attribute::Value(v) if !v.is_empty())) => {
                Err("the module shows the value of a sensitive key: do not use it".to_owned())
            }
            _ => Ok(()),
        };
        let changed = session.update_attributes(object, &[Attribute::Extractable(true)]);
        let extractable = session.get_attributes(object, &[AttributeType::Extractable]);
        let fixed = match (changed, extractable) {
            (_, Ok(now)) if now.contains(&Attribute::Extractable(true)) => {
                Err("the module made a key extractable that was not: do not use it".to_owned())
            }
            _ => Ok(()),
        };
        self.expect(format!("attributes of a {text} key are kept and shown"), FOR, audited);
        self.expect(format!("a sensitive {text} key cannot be read"), FOR, hidden);
        self.expect(format!("a {text} key stays unextractable"), FOR, fixed);
    }

    fn signing(&mut self, kind: KeyKind) {
        use super::failure::Doing as _;
        const FOR: &str = "certificates, checkpoints of the log";
        let (mechanism, mut public) = pair_generation(kind);
        public.extend([Attribute::Token(false), Attribute::Verify(true)]);
        let key = name(&format!("signer-{kind}"));
        let mut private = KeyRole::Signing(kind).template(&key, b"spp-doctor", &self.profile);
        private[0] = Attribute::Token(false);
        let made = self.verbs.session().generate_key_pair(&mechanism, &public, &private);
        let made = made.doing(|| format!("generating a {kind} pair"));
        let shown = made.and_then(|(public, private)| {
            let shown = self.verbs.public_key(kind, public)?;
            self.verbs.handles.insert(key.clone(), private);
            Ok(shown)
        });
        let shown = shown
            .map_err(|failure| failure.message)
            .and_then(|shown| public_key(kind, shown).map_err(|e| e.to_string()));
        let shown = match shown {
            Ok(shown) => shown,
            Err(trouble) => return self.expect(format!("sign {kind}"), FOR, Err(trouble)),
        };
        let algorithm = SignatureAlgorithm::default_for(kind);
        self.measure(&format!("sign {kind}"), FOR, |verbs| {
            let wrong = |e: String| Failure::new(super::FailureClass::Rejected, e);
            let signature = to_x509_form(algorithm, verbs.sign(&key, algorithm, b"spp/v1/key-check doctor")?);
            let signature = signature.map_err(|e| wrong(e.to_string()))?;
            let verified = shown.verify(algorithm, b"spp/v1/key-check doctor", &signature);
            verified.map_err(|_| wrong("the signature does not verify: do not use this module".to_owned()))
        });
    }

    fn transport(&mut self) -> Option<TransportKey> {
        const FOR: &str = "the way of device keys from the HSM";
        let (hash, wrap) = (self.profile.oaep_hash, self.profile.wrap);
        let made = TransportReceiver::generate().map_err(|e| e.to_string()).and_then(|receiver| {
            let (_, wrapped) = self.verbs.make_transport_key(&receiver.public_copy()).map_err(|f| f.message)?;
            receiver.open(hash, wrap, &wrapped).map_err(|e| e.to_string())
        });
        let what = format!("hand out the transport key (RSA-OAEP, {hash:?})");
        match made {
            Ok(key) => {
                self.expect(what, FOR, Ok(()));
                Some(key)
            }
            Err(trouble) => {
                self.expect(what, FOR, Err(trouble));
                None
            }
        }
    }

    /// A wrapping key for what follows, and what it must not do.
    fn wrapping(&mut self) {
        const FOR: &str = "key pairs that wait for their device";
        let mechanism = match self.profile.wrap {
            WrapMechanism::AesKeyWrapPad => "AES key wrap with padding (RFC 5649)",
            WrapMechanism::AesGcm => "AES-GCM",
            WrapMechanism::AesCbcPad => "AES-CBC with padding",
        };
        let wrapping = match self.session_key(&name("wrapping"), KeyRole::Wrapping, &Mechanism::AesKeyGen) {
            Ok(object) => object,
            Err(failure) => return self.expect(format!("wrap: {mechanism}"), FOR, Err(failure.message)),
        };
        let fixed = match self.verbs.wrap_under(wrapping, wrapping) {
            Ok(_) => Err("the module wraps keys that are not extractable: do not use it".to_owned()),
            Err(_) => Ok(()),
        };
        self.expect("an unextractable key is not wrapped".to_owned(), FOR, fixed);
        let signs = self.verbs.session().sign(&Mechanism::AesCMac, wrapping, b"x");
        let signs = signs.map_or(Ok(()), |_| Err("the module signs with a key that may only wrap".to_owned()));
        self.expect("a key does nothing but what it is for".to_owned(), FOR, signs);
    }

    fn pairs(&mut self, kind: KeyKind, transport: &TransportKey) {
        const FOR: &str = "the devices' key pairs";
        let wrapping = name("wrapping");
        if !self.verbs.handles.contains_key(&wrapping) {
            return self.expect(format!("pair {kind}"), FOR, Err("there is no wrapping key".to_owned()));
        }
        let wrong = |e: String| Failure::new(super::FailureClass::Rejected, e);
        let checked = |verbs: &mut TokenOperations| -> Result<Vec<u8>, Failure> {
            let Answer::Pair { public, kept, delivered } = verbs.generate_pair(kind, &wrapping)? else {
                return Err(wrong("no pair".to_owned()));
            };
            let public = public_key(kind, public).map_err(|e| wrong(e.to_string()))?;
            let plain = transport.unwrap(&delivered).map_err(|e| wrong(e.to_string()))?;
            DevicePrivateKey::from_unwrapped(public, &plain).map_err(|e| wrong(e.to_string()))?;
            Ok(kept)
        };
        let mut kept = None;
        let works = self.measure(&format!("pair {kind}"), FOR, |verbs| {
            kept = Some(checked(verbs)?);
            Ok(())
        });
        if let Some(kept) = kept.filter(|_| works) {
            self.measure(&format!("rewrap {kind}"), "pairs made in advance, deliveries that are repeated", |verbs| {
                verbs.rewrap(kind, &wrapping, &kept).map(drop)
            });
        }
    }

    fn batch_keys(&mut self) {
        const FOR: &str = "shredding";
        let store = self.verbs.random(8).ok().and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; 8]);
        let key = BatchName { store: StoreId::from_random(store), number: 0 }.key();
        self.measure("make and destroy a key on the token", FOR, |verbs| {
            verbs.create_batch_key(&key)?;
            verbs.destroy_batch_key(&key)
        });
        self.verbs.handles = HashMap::new();
    }
}
