//! The daemon's configuration, `sppd.toml`, with everything it names: profiles, key register, certificates, PIN file.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::approvals::ApprovalsShape;
use super::audit::{AuditConfig, AuditShape};
use super::hsm::HsmShapes;
use super::key_pool::{self, KeyPoolShape};
use super::public::PublicConfig;
use super::registry::{self, RegistryConfig, RegistryShape};
use super::settings::Settings;
use super::stations::{StationShape, Stations};
use super::store::{self, StoreConfig, StoreShape};
use super::tls::{self, TlsConfig, TlsShape};
use super::{Faults, read_toml};
use crate::access::{AccessAuthority, ApprovalRules};
use crate::certificate::{IssuerCertificate, Profile};
use crate::hsm::{Hsms, KeyManifest, SigningKey, SigningUse};
use crate::keypool::PoolRules;
use crate::keys::{SignatureAlgorithm, sha256};
use crate::names::{KeyName, ProfileName};

/// Everything the daemon needs to start, valid by construction.
pub struct DaemonConfig {
    /// The node's name, for status and logs.
    pub node: String,
    /// Where it listens.
    pub listen: Listen,
    /// Its TLS identity, and who may be a client.
    pub tls: TlsConfig,
    /// The HSM, or several.
    pub hsms: Hsms,
    /// The stores.
    pub store: StoreConfig,
    /// The log of the public database.
    pub registry: RegistryConfig,
    /// How the public is served.
    pub public: PublicConfig,
    /// Which key pairs are made in advance.
    pub key_pool: PoolRules,
    /// After so long an unfinished session's key pair is destroyed.
    pub session_lifetime: Duration,
    /// What products get.
    pub profiles: BTreeMap<ProfileName, Profile>,
    /// The certificates of the manufacturer's signing keys, by the profile that uses them.
    pub issuers: BTreeMap<ProfileName, IssuerCertificate>,
    /// The certificates of all keys of the register that sign devices, as far as they are there: a session may be one of a key that no
    /// profile names any more.
    pub signers: BTreeMap<KeyName, IssuerCertificate>,
    /// What stations may do.
    pub stations: Stations,
    /// How many officers must approve what.
    pub approvals: ApprovalRules,
    /// The key that signs access certificates, if there is one.
    pub authority: Option<AccessAuthority>,
    /// How it logs.
    pub log: LogConfig,
    /// Where it records what officers do.
    pub audit: AuditConfig,
    /// SHA-256 of the file, which tells in the audit log what was in force.
    pub fingerprint: [u8; 32],
    pub(super) settings: Settings,
}

/// The listeners.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// Stations, mutual TLS.
    pub line: SocketAddr,
    /// Officers, mutual TLS.
    pub officer: SocketAddr,
    /// Anybody, TLS.
    pub public: SocketAddr,
    /// Metrics, plain HTTP, on this machine alone; none if absent.
    pub metrics: Option<SocketAddr>,
}

/// How the daemon logs.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// For people or for machines.
    pub format: LogFormat,
    /// A filter of tracing: `info`, `spp=debug,info`.
    pub level: String,
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// Text.
    Human,
    /// One JSON object per line.
    Json,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Human, level: "info".to_owned() }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Shape {
    profiles: PathBuf,
    node: NodeShape,
    listen: Listen,
    tls: TlsShape,
    pub(super) hsm: HsmShapes,
    pub(super) store: StoreShape,
    pub(super) registry: RegistryShape,
    #[serde(default)]
    public: PublicConfig,
    #[serde(default)]
    sessions: SessionsShape,
    #[serde(default)]
    keypool: KeyPoolShape,
    #[serde(default)]
    station: Vec<StationShape>,
    #[serde(default)]
    log: LogConfig,
    #[serde(default)]
    audit: AuditShape,
    #[serde(default)]
    approvals: ApprovalsShape,
    /// Of the text that this was read from.
    #[serde(skip)]
    fingerprint: [u8; 32],
    #[serde(skip)]
    settings: Settings,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeShape {
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SessionsShape {
    #[serde(with = "humantime_serde")]
    lifetime: Duration,
}

impl Default for SessionsShape {
    fn default() -> Self {
        Self { lifetime: Duration::from_secs(24 * 60 * 60) }
    }
}

impl DaemonConfig {
    /// Reads the file and all it names; paths in it are relative to its directory. Reports every fault at once.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        let place = path.display().to_string();
        let mut faults = Faults::default();
        let shape = read_shape(path, &place, &mut faults);
        let config = shape.and_then(|shape| Self::check(shape, &place, base_of(path), &mut faults));
        faults.ok_or_all(config)
    }

    /// Everything is looked at before anything is given up, so that one run tells all faults.
    fn check(shape: Shape, place: &str, base: &Path, faults: &mut Faults) -> Option<Self> {
        let store = store::check(&shape.store, place, base, faults);
        let tls = tls::check(&shape.tls, shape.public.own_identity(), place, base, faults);
        let (names, profiles) = load_profiles(&base.join(&shape.profiles), faults);
        let stations = Stations::check(shape.station, place, &names, faults);
        let name = &shape.node.name;
        if name.is_empty() || name.len() > 64 || name.chars().any(char::is_control) {
            faults.add(format!("{place}: node.name"), "must have 1 to 64 printable characters");
        }
        if let Err(e) = shape.log.level.parse::<tracing_subscriber::EnvFilter>() {
            faults.add(format!("{place}: log.level"), format!("{e}; write for example info or spp=debug,info"));
        }
        if shape.listen.metrics.is_some_and(|address| !address.ip().is_loopback()) {
            let problem = "must be an address of this machine alone, 127.0.0.1:7446 or [::1]:7446: it is plain HTTP; for others, \
                           put a proxy with TLS before it";
            faults.add(format!("{place}: listen.metrics"), problem);
        }
        let seconds = shape.sessions.lifetime.as_secs();
        if !(60..=365 * 24 * 60 * 60).contains(&seconds) {
            faults.add(format!("{place}: sessions.lifetime"), "must be from 1 minute to 1 year, for example \"24h\"");
        }
        let (keys, hsms) = shape.hsm.check(place, base, |name| store.pin_refused(name), faults);
        let authority = keys.as_ref().and_then(|keys| load_authority(keys, faults));
        let approvals = shape.approvals.check(place, faults);
        let audit = shape.audit.check(&shape.node.name, place, base, faults);
        let issuers = keys.as_ref().map(|keys| load_issuers(&profiles, keys, faults)).unwrap_or_default();
        let registry = keys.as_ref().and_then(|keys| registry::check(shape.registry, place, base, keys, faults));
        shape.public.check(place, faults);
        let modules = hsms.iter().flat_map(|hsms| hsms.members()).map(|hsm| &hsm.module);
        let key_pool = key_pool::check(shape.keypool, place, modules, &profiles, faults);
        Some(Self {
            node: shape.node.name,
            listen: shape.listen,
            tls: tls?,
            hsms: hsms?,
            store,
            registry: registry?,
            public: shape.public,
            key_pool,
            session_lifetime: shape.sessions.lifetime,
            profiles,
            issuers,
            signers: keys.as_ref().map(load_signers).unwrap_or_default(),
            stations,
            approvals,
            authority,
            log: shape.log,
            audit,
            fingerprint: shape.fingerprint,
            settings: shape.settings,
        })
    }
}

pub(super) fn read_shape(path: &Path, place: &str, faults: &mut Faults) -> Option<Shape> {
    let text = faults.note(place, std::fs::read_to_string(path))?;
    let shape: Shape = read_toml(place, &text, faults)?;
    Some(Shape { fingerprint: sha256(text.as_bytes()), settings: Settings::of(&text), ..shape })
}

/// Where relative paths of a file begin.
pub(super) fn base_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl AuditConfig {
    /// Reads `[audit]` of `sppd.toml`, for making and verifying the log.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        let (place, mut faults) = (path.display().to_string(), Faults::default());
        let shape = read_shape(path, &place, &mut faults);
        let audit = shape.map(|shape| shape.audit.check(&shape.node.name, &place, base_of(path), &mut faults));
        faults.ok_or_all(audit)
    }
}

/// Every `NAME.toml` of the directory is the profile NAME. The names of all, since a faulty one is no unknown one, and those
/// that are valid.
fn load_profiles(directory: &Path, faults: &mut Faults) -> (Vec<ProfileName>, BTreeMap<ProfileName, Profile>) {
    let place = directory.display().to_string();
    let (mut names, mut profiles) = (Vec::new(), BTreeMap::new());
    let entries = faults.note(&place, std::fs::read_dir(directory));
    for entry in entries.into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let place = path.display().to_string();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let name = faults.note(&place, stem.parse::<ProfileName>());
        let text = faults.note(&place, std::fs::read_to_string(&path));
        names.extend(name.clone());
        if let (Some(name), Some(text)) = (name, text)
            && let Some(profile) = faults.keep(Profile::from_toml(name.clone(), &place, &text))
        {
            profiles.insert(name, profile);
        }
    }
    if profiles.is_empty() && faults.is_empty() {
        faults.add(place, "has no profile; write one NAME.toml per product");
    }
    (names, profiles)
}

/// The key that signs access certificates: the newest of the register that has its certificate.
fn load_authority(keys: &KeyManifest, faults: &mut Faults) -> Option<AccessAuthority> {
    let mut of_access = keys.signing.iter().rev().filter(|key| key.use_ == SigningUse::Access);
    let newest = of_access.clone().next();
    let key = of_access.find(|key| key.certificate.exists()).or(newest)?;
    let at = format!("access key {}", key.name);
    let hint = "for a key with a CSR, import the offline root's answer in a ceremony";
    let pem = std::fs::read_to_string(&key.certificate);
    let pem = faults.note(&at, pem.map_err(|e| format!("{}: {e}; {hint}", key.certificate.display())))?;
    let algorithm = SignatureAlgorithm::default_for(key.public_key.kind());
    let issuer = faults.note(&at, IssuerCertificate::from_pem(&pem, algorithm))?;
    if issuer.public_key() != &key.public_key {
        faults.add(&at, format!("{} is not the certificate of this key", key.certificate.display()));
        return None;
    }
    Some(AccessAuthority { key: key.name.clone(), issuer, pem })
}

/// The issuers' certificates; every key that a profile names must be in the register.
fn load_issuers(
    profiles: &BTreeMap<ProfileName, Profile>,
    keys: &KeyManifest,
    faults: &mut Faults,
) -> BTreeMap<ProfileName, IssuerCertificate> {
    let mut issuers = BTreeMap::new();
    for (name, profile) in profiles {
        let at = format!("profile {name}");
        for spec in profile.symmetric_keys() {
            if keys.master_key(&spec.master_key).is_none() {
                let problem = format!("the master key {} is not in the register of keys", spec.master_key);
                faults.add(format!("{at}: symmetric_key.master_key"), problem);
            }
        }
        let Some(key) = keys.signing_key(profile.issuer()).filter(|key| key.use_ == SigningUse::Device) else {
            let problem = format!("the signing key {} is not in the register of keys", profile.issuer());
            faults.add(format!("{at}: issuer"), problem);
            continue;
        };
        let algorithm = profile.signature().unwrap_or(SignatureAlgorithm::default_for(key.public_key.kind()));
        let hint = "for a key with a CSR, put the offline root's answer there";
        let pem = std::fs::read_to_string(&key.certificate);
        let pem = pem.map_err(|e| format!("{}: {e}; {hint}", key.certificate.display()));
        let Some(pem) = faults.note(format!("{at}: issuer"), pem) else { continue };
        let issuer = faults.note(format!("{at}: issuer"), IssuerCertificate::from_pem(&pem, algorithm));
        if let Some(issuer) = issuer {
            if issuer.public_key() != &key.public_key {
                let problem = format!("{} is not the certificate of the key {}", key.certificate.display(), key.name);
                faults.add(format!("{at}: issuer"), problem);
            }
            issuers.insert(name.clone(), issuer);
        }
    }
    issuers
}

/// A certificate that is not there, or is wrong, is a fault only where a profile names its key.
fn load_signers(keys: &KeyManifest) -> BTreeMap<KeyName, IssuerCertificate> {
    let of_devices = keys.signing.iter().filter(|key| key.use_ == SigningUse::Device);
    let certificate = |key: &SigningKey| {
        let pem = std::fs::read_to_string(&key.certificate).ok()?;
        let algorithm = SignatureAlgorithm::default_for(key.public_key.kind());
        let issuer = IssuerCertificate::from_pem(&pem, algorithm).ok()?;
        (issuer.public_key() == &key.public_key).then(|| (key.name.clone(), issuer))
    };
    of_devices.filter_map(certificate).collect()
}
