//! A key ceremony: one strict file says what is made on the token; what was made is read back and written down.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::files::{make_directory, must_be_new, replace, write_new};
use super::transcript::{Subject, Transcript};
use super::{OfficerError, now};
use crate::certificate::{
    AuthorityCertificate, CertificateSerial, SubjectFields, SubjectName, UnsignedDocument, authority_certificate,
    authority_request,
};
use crate::config::{Faults, read_toml};
use crate::hsm::{
    Ceremony, CheckpointKey, CreatedKey, KeyRegister, MasterKey, Prf, SigningKey, SigningUse, TokenIdentity,
};
use crate::keys::{KeyKind, PublicKey, SignatureAlgorithm, sha256};
use crate::names::{KeyName, OfficerName};
use crate::tlog::{LogKey, Origin};

/// What a ceremony will make, validated.
pub struct CeremonyPlan {
    signing: Vec<PlannedSigning>,
    log: Vec<PlannedLog>,
    master: Vec<PlannedMaster>,
    file: PathBuf,
    /// SHA-256 of the file, for the transcript.
    file_hash: [u8; 32],
}

struct PlannedSigning {
    name: KeyName,
    use_: SigningUse,
    kind: KeyKind,
    algorithm: SignatureAlgorithm,
    subject: SubjectName,
    certificate: CertificateRoute,
}

struct PlannedLog {
    name: KeyName,
    origin: Origin,
}

struct PlannedMaster {
    name: KeyName,
    version: u32,
    prf: Prf,
}

/// How a signing key comes by its certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum CertificateRoute {
    SelfSigned,
    Csr,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shape {
    #[serde(default)]
    signing_key: Vec<SigningShape>,
    #[serde(default)]
    log_key: Vec<LogShape>,
    #[serde(default)]
    master_key: Vec<MasterShape>,
    access_ca: Option<AccessShape>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SigningShape {
    name: KeyName,
    kind: KeyKind,
    signature: Option<SignatureAlgorithm>,
    certificate: CertificateRoute,
    subject: SubjectFields,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LogShape {
    name: KeyName,
    origin: Origin,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MasterShape {
    name: KeyName,
    version: u32,
    prf: Prf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AccessShape {
    name: KeyName,
    #[serde(default = "default_access_kind")]
    kind: KeyKind,
    subject: SubjectFields,
}

const fn default_access_kind() -> KeyKind {
    KeyKind::P256
}

impl CeremonyPlan {
    /// Reads a ceremony file; unknown keys are refused, every fault is reported at once.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        let place = path.display().to_string();
        let mut faults = Faults::default();
        let text = faults.note(&place, std::fs::read_to_string(path)).unwrap_or_default();
        let shape: Option<Shape> = if faults.is_empty() { read_toml(&place, &text, &mut faults) } else { None };
        let plan = shape.map(|shape| Self::check(shape, &text, path, &mut faults));
        faults.ok_or_all(plan)
    }

    fn check(shape: Shape, text: &str, path: &Path, faults: &mut Faults) -> Self {
        let place = &path.display().to_string();
        let mut signing = Vec::new();
        for key in shape.signing_key {
            let at = format!("{place}: signing_key {}", key.name);
            let algorithm = key.signature.unwrap_or(SignatureAlgorithm::default_for(key.kind));
            if !algorithm.fits(key.kind) {
                faults.add(format!("{at}: signature"), format!("a {} key cannot sign with it", key.kind));
            }
            let (name, kind, certificate) = (key.name, key.kind, key.certificate);
            if let Some(subject) = faults.keep(SubjectName::from_fields(&format!("{at}: subject"), key.subject)) {
                let use_ = SigningUse::Device;
                signing.push(PlannedSigning { name, use_, kind, algorithm, subject, certificate });
            }
        }
        if let Some(key) = shape.access_ca {
            let at = format!("{place}: access_ca: subject");
            let (name, kind, use_) = (key.name, key.kind, SigningUse::Access);
            let (algorithm, certificate) = (SignatureAlgorithm::default_for(kind), CertificateRoute::SelfSigned);
            if let Some(subject) = faults.keep(SubjectName::from_fields(&at, key.subject)) {
                signing.push(PlannedSigning { name, use_, kind, algorithm, subject, certificate });
            }
        }
        let log = shape.log_key.into_iter().map(|key| PlannedLog { name: key.name, origin: key.origin }).collect();
        let master: Vec<_> = shape
            .master_key
            .into_iter()
            .map(|key| PlannedMaster { name: key.name, version: key.version, prf: key.prf })
            .collect();
        for key in master.iter().filter(|key| key.version == 0) {
            faults.add(format!("{place}: master_key {}: version", key.name), "versions are counted from 1");
        }
        let plan = Self { signing, log, master, file: path.to_owned(), file_hash: sha256(text.as_bytes()) };
        let mut seen = std::collections::BTreeSet::new();
        for name in plan.names() {
            if !seen.insert(name.clone()) {
                faults.add(place.as_str(), format!("the name {name} is there twice"));
            }
        }
        if seen.is_empty() && faults.is_empty() {
            faults
                .add(place.as_str(), "makes no key; add a [[signing_key]], [[log_key]], [[master_key]] or [access_ca]");
        }
        plan
    }

    fn names(&self) -> impl Iterator<Item = &KeyName> {
        let signing = self.signing.iter().map(|key| &key.name);
        let log = self.log.iter().map(|key| &key.name);
        signing.chain(log).chain(self.master.iter().map(|key| &key.name))
    }

    /// Makes everything on the token and writes the register, certificates and the transcript into `out`.
    ///
    /// All names are looked at before anything is made. A register that is there already is added to, if it is of the same token.
    /// It is replaced after each key: a ceremony that is cut short leaves at most the key that it was making unwritten, and the
    /// next one says that its name is taken.
    pub fn run(&self, token: &Ceremony, out: &Path, officers: &[OfficerName]) -> Result<Held, OfficerError> {
        let register_path = out.join("keys.toml");
        self.refuse_what_exists(token, out)?;
        make_directory(out)?;
        let mut register = register_to_add_to(&register_path, token.token())?;
        let subject = Subject { file: &self.file, file_hash: &self.file_hash, officers };
        let mut report = Transcript::begin(&subject, token);
        for plan in &self.signing {
            let key = token.create_signing_key(&plan.name, plan.kind)?;
            let public =
                key.public.clone().ok_or_else(|| OfficerError::Other(format!("{} has no public key", key.name)))?;
            let certificate = plan.certificate_path();
            register.signing.push(SigningKey {
                name: key.name.clone(),
                id: key.id.clone(),
                use_: plan.use_,
                public_key: public.clone(),
                certificate,
            });
            write_register(&register, &register_path)?;
            let written = plan.certify(token, &key, &public, out)?;
            report.add(&key, Some(format!("sha256:{}", hex::encode(public.fingerprint()))), Some(written));
        }
        for plan in &self.log {
            let key = token.create_signing_key(&plan.name, KeyKind::Ed25519)?;
            let public =
                key.public.clone().ok_or_else(|| OfficerError::Other(format!("{} has no public key", key.name)))?;
            let checked = LogKey::new(plan.origin.clone(), public.clone());
            let log_key = checked.map_err(|e| OfficerError::Other(e.to_string()))?;
            let (name, id) = (key.name.clone(), key.id.clone());
            register.log.push(CheckpointKey { name, id, key: log_key.clone(), public_key: public });
            write_register(&register, &register_path)?;
            // What everybody verifies receipts and mirrors with.
            let path = out.join(plan.file_name());
            write_new(&path, format!("{log_key}\n").as_bytes())?;
            report.add(&key, Some(log_key.to_string()), Some(path));
        }
        for plan in &self.master {
            let key = token.create_master_key(&plan.name, plan.prf)?;
            let check_value = token.check_value(&key, plan.prf)?;
            report.add(&key, Some(format!("check value {}", hex::encode(&check_value))), None);
            let (name, id) = (key.name, key.id);
            register.master.push(MasterKey { name, id, version: plan.version, prf: plan.prf, check_value });
            write_register(&register, &register_path)?;
        }
        report.files.push(register_path);
        let signed = report.write(out, token, register.log.first())?;
        Ok(Held { transcript: report, signed })
    }

    /// What a run would make, for a look at it before.
    pub fn keys(&self) -> Vec<PlannedKey> {
        let signing = self.signing.iter().map(|key| {
            let what = match key.use_ {
                SigningUse::Device => "signs device certificates",
                SigningUse::Access => "signs TLS certificates",
            };
            let kind = key.kind.to_string();
            PlannedKey { name: key.name.clone(), kind, what: what.to_owned(), file: Some(key.file_name()) }
        });
        let log = self.log.iter().map(|key| {
            let what = format!("signs the checkpoints of {}", key.origin);
            let kind = KeyKind::Ed25519.to_string();
            PlannedKey { name: key.name.clone(), kind, what, file: Some(key.file_name()) }
        });
        let master = self.master.iter().map(|key| {
            let what = format!("device keys are derived from it, version {}", key.version);
            PlannedKey { name: key.name.clone(), kind: key.prf.to_string(), what, file: None }
        });
        signing.chain(log).chain(master).collect()
    }

    /// Whether a run could make everything: names on the token and files are free. Nothing is changed.
    pub fn refuse_what_exists(&self, token: &Ceremony, out: &Path) -> Result<(), OfficerError> {
        let mut faults = Faults::default();
        for name in self.names() {
            if !token.is_free(name)? {
                faults.add("token", format!("has an object named {name} already; nothing is ever overwritten"));
            }
        }
        let signing = self.signing.iter().map(|key| out.join(key.file_name()));
        let files = signing.chain(self.log.iter().map(|key| out.join(key.file_name())));
        for path in files {
            if let Err(e) = must_be_new(&path) {
                faults.add("files", e);
            }
        }
        faults.ok_or_all(Some(())).map_err(OfficerError::Faults)
    }
}

impl PlannedLog {
    /// The file with the public half, a vkey.
    fn file_name(&self) -> PathBuf {
        PathBuf::from(format!("{}.vkey", self.name))
    }
}

impl PlannedSigning {
    /// Where the certificate is, or will be once the offline root has answered.
    fn certificate_path(&self) -> PathBuf {
        PathBuf::from(format!("{}-ca.pem", self.name))
    }

    /// The file that the ceremony writes.
    fn file_name(&self) -> PathBuf {
        match self.certificate {
            CertificateRoute::SelfSigned => self.certificate_path(),
            CertificateRoute::Csr => PathBuf::from(format!("{}.csr.pem", self.name)),
        }
    }

    fn certify(
        &self,
        token: &Ceremony,
        key: &CreatedKey,
        public: &PublicKey,
        out: &Path,
    ) -> Result<PathBuf, OfficerError> {
        let document: UnsignedDocument = match self.certificate {
            CertificateRoute::Csr => authority_request(&self.subject, public, self.algorithm)?,
            CertificateRoute::SelfSigned => authority_certificate(&AuthorityCertificate {
                subject: &self.subject,
                public_key: public,
                algorithm: self.algorithm,
                serial: random_serial(token)?,
                not_before: now(),
                not_after: None,
            })?,
        };
        let signature = token.sign(&key.name, &key.id, self.kind, self.algorithm, document.to_be_signed())?;
        let path = out.join(self.file_name());
        write_new(&path, document.assemble(&signature)?.to_pem()?.as_bytes())?;
        Ok(path)
    }
}

/// The register of an earlier ceremony on this token, or an empty one.
fn register_to_add_to(path: &Path, token: &TokenIdentity) -> Result<KeyRegister, OfficerError> {
    if !path.exists() {
        let token = token.clone();
        return Ok(KeyRegister { token, signing: Vec::new(), log: Vec::new(), master: Vec::new() });
    }
    let register = KeyRegister::load(path)?;
    if register.token != *token {
        let (path, label, serial) = (path.display(), &register.token.label, &register.token.serial);
        return Err(OfficerError::Other(format!("{path} is of the token {label} ({serial}); give another --out")));
    }
    Ok(register)
}

/// A certificate serial number from the HSM's random numbers.
pub(super) fn random_serial(token: &Ceremony) -> Result<CertificateSerial, OfficerError> {
    let random = token.random(20)?;
    let random = random.try_into().map_err(|_| OfficerError::Other("the HSM gave too few random octets".to_owned()))?;
    Ok(CertificateSerial::from_random(random))
}

fn write_register(register: &KeyRegister, path: &Path) -> Result<(), OfficerError> {
    let text = register.to_toml().map_err(|e| OfficerError::Other(e.to_string()))?;
    Ok(replace(path, text.as_bytes())?)
}

/// A key that a ceremony would make.
#[derive(Debug, Serialize)]
pub struct PlannedKey {
    /// Its name.
    pub name: KeyName,
    /// Its kind, or its pseudorandom function.
    pub kind: String,
    /// What it is for.
    pub what: String,
    /// The file that is written for it.
    pub file: Option<PathBuf>,
}

/// A ceremony that was held.
pub struct Held {
    /// What it made.
    pub transcript: Transcript,
    /// Whether the transcript's text is signed; a token without a log's key signs none.
    pub signed: bool,
}
