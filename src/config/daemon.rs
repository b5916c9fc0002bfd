//! The daemon's configuration: `sppd.toml` and the files that it names (profiles, key manifest, certificates, PIN file).

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use spp_format::approval::ApprovalRules;
use spp_format::certificate::{IssuerCertificate, Profile, subjects_can_meet};
use spp_format::file_format::Faults;
use spp_format::keys::SignatureAlgorithm;
use spp_format::names::{KeyName, ProfileName};

use super::audit::AuditConfig;
use super::key_pool;
use super::listen::Listen;
use super::log::LogConfig;
use super::public::PublicConfig;
use super::registry::{self, RegistryConfig};
use super::settings::Settings;
use super::shape::{Shape, base_of, read_shape};
use super::stations::Stations;
use super::store::{self, StoreConfig};
use super::tls::{self, TlsConfig};
use crate::access::AccessAuthority;
use crate::hsm::{Hsms, KeyManifest, SigningKey, SigningUse};
use crate::keypool::PoolRules;

/// The complete, validated configuration of the daemon.
pub struct DaemonConfig {
    /// The node name, for status, logs and officers' statements.
    pub node: String,
    /// Listen addresses.
    pub listen: Listen,
    /// TLS certificates and client verification.
    pub tls: TlsConfig,
    /// One HSM, or several with the same keys.
    pub hsms: Hsms,
    /// The stores.
    pub store: StoreConfig,
    /// The log of the public database.
    pub registry: RegistryConfig,
    /// The public listener's pages and rate limits.
    pub public: PublicConfig,
    /// The pools of pregenerated key pairs.
    pub key_pool: PoolRules,
    /// Lifetime of a session. After it, the key pair of an unfinished session is destroyed.
    pub session_lifetime: Duration,
    /// The product profiles.
    pub profiles: BTreeMap<ProfileName, Profile>,
    /// The issuer certificate of each profile.
    pub issuers: BTreeMap<ProfileName, IssuerCertificate>,
    /// The available certificates of all device-signing keys in the key manifest. A session may use a key that no profile names
    /// any more.
    pub signers: BTreeMap<KeyName, IssuerCertificate>,
    /// The permissions of each station.
    pub stations: Stations,
    /// The number of officers who must approve each kind of action.
    pub approvals: ApprovalRules,
    /// The access CA, if the key manifest has one.
    pub authority: Option<AccessAuthority>,
    /// Log format and level.
    pub log: LogConfig,
    /// The audit log.
    pub audit: AuditConfig,
    /// SHA-256 of the file. The audit log contains it, to show which configuration was in force.
    pub fingerprint: [u8; 32],
    pub(super) settings: Settings,
}

impl DaemonConfig {
    /// Loads the file and all files that it names. Relative paths start at the file's directory. Reports all faults at once.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        let place = path.display().to_string();
        let mut faults = Faults::default();
        let shape = read_shape(path, &place, &mut faults);
        let config = shape.and_then(|shape| Self::check(shape, &place, base_of(path), &mut faults));
        faults.into_result(config)
    }

    /// Validates everything before it returns an error, so that one run reports all faults.
    fn check(shape: Shape, place: &str, base: &Path, faults: &mut Faults) -> Option<Self> {
        let store = store::check(&shape.store, place, base, faults);
        let tls = tls::check(&shape.tls, shape.public.own_identity(), place, base, faults);
        let (names, profiles) = load_profiles(&base.join(&shape.profiles), faults);
        check_subjects(&profiles, faults);
        let stations = Stations::check(shape.station, place, &names, faults);
        let name = &shape.node.name;
        if name.is_empty() || name.len() > 64 || name.chars().any(char::is_control) {
            faults.add(format!("{place}: node.name"), "must have 1 to 64 printable characters");
        }
        if let Err(e) = shape.log.level.parse::<tracing_subscriber::EnvFilter>() {
            let problem = format!("{e}; expected a tracing filter, for example info or spp=debug,info");
            faults.add(format!("{place}: log.level"), problem);
        }
        if shape.listen.metrics.is_some_and(|address| !address.ip().is_loopback()) {
            let problem = "must be a loopback address, for example 127.0.0.1:7446 or [::1]:7446, because it is plain HTTP; for \
                           remote access use a TLS proxy";
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
        let modules = hsms.iter().flat_map(|hsms| hsms.members()).map(|member| &member.module);
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

/// Loads every `NAME.toml` of the directory as the profile NAME. Returns the names of all profiles, because a profile with faults
/// is not an unknown one, and the valid profiles.
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
            && let Some(profile) = faults.merge(Profile::from_toml(name.clone(), &place, &text))
        {
            profiles.insert(name, profile);
        }
    }
    if profiles.is_empty() && faults.is_empty() {
        faults.add(place, "contains no profile; add one NAME.toml per product");
    }
    (names, profiles)
}

/// Loads the access CA: the newest access key of the key manifest whose certificate exists.
fn load_authority(keys: &KeyManifest, faults: &mut Faults) -> Option<AccessAuthority> {
    let mut access_keys = keys.signing.iter().rev().filter(|key| key.use_ == SigningUse::Access);
    let newest = access_keys.clone().next();
    let key = access_keys.find(|key| key.certificate.exists()).or(newest)?;
    let place = format!("access key {}", key.name);
    let hint = "for a key with a CSR, import the certificate of the offline root in a ceremony";
    let pem = std::fs::read_to_string(&key.certificate);
    let pem = faults.note(&place, pem.map_err(|e| format!("{}: {e}; {hint}", key.certificate.display())))?;
    let algorithm = SignatureAlgorithm::default_for(key.public_key.kind());
    let issuer = faults.note(&place, IssuerCertificate::from_pem(&pem, algorithm))?;
    if issuer.public_key() != &key.public_key {
        faults.add(&place, format!("{} is not the certificate of this key", key.certificate.display()));
        return None;
    }
    Some(AccessAuthority { key: key.name.clone(), issuer, pem })
}

/// Profiles of one issuer must not be able to give one subject to two devices: the second one would be refused on the line.
fn check_subjects(profiles: &BTreeMap<ProfileName, Profile>, faults: &mut Faults) {
    let all: Vec<_> = profiles.values().collect();
    for (index, one) in all.iter().enumerate() {
        for other in all[index + 1..].iter().filter(|other| subjects_can_meet(one, other)) {
            let problem = format!(
                "a serial number of one and another identity of profile {} would have the same certificate subject: give the two \
                 profiles different attributes in [subject]",
                one.name()
            );
            faults.add(format!("profile {}: subject", other.name()), problem);
        }
    }
}

/// Loads the issuer certificate of each profile. Every key that a profile names must be in the key manifest.
fn load_issuers(
    profiles: &BTreeMap<ProfileName, Profile>,
    keys: &KeyManifest,
    faults: &mut Faults,
) -> BTreeMap<ProfileName, IssuerCertificate> {
    let mut issuers = BTreeMap::new();
    for (name, profile) in profiles {
        let place = format!("profile {name}");
        for spec in profile.symmetric_keys() {
            if keys.master_key(&spec.master_key).is_none() {
                let problem = format!("master key {} is not in the key manifest", spec.master_key);
                faults.add(format!("{place}: symmetric_key.master_key"), problem);
            }
        }
        let Some(key) = keys.signing_key(profile.issuer()).filter(|key| key.use_ == SigningUse::Device) else {
            let problem = format!("signing key {} is not in the key manifest", profile.issuer());
            faults.add(format!("{place}: issuer"), problem);
            continue;
        };
        let algorithm = profile.signature().unwrap_or(SignatureAlgorithm::default_for(key.public_key.kind()));
        let hint = "for a key with a CSR, store the certificate of the offline root there";
        let pem = std::fs::read_to_string(&key.certificate);
        let pem = pem.map_err(|e| format!("{}: {e}; {hint}", key.certificate.display()));
        let Some(pem) = faults.note(format!("{place}: issuer"), pem) else { continue };
        let issuer = faults.note(format!("{place}: issuer"), IssuerCertificate::from_pem(&pem, algorithm));
        if let Some(issuer) = issuer {
            if issuer.public_key() != &key.public_key {
                let problem = format!("{} is not the certificate of key {}", key.certificate.display(), key.name);
                faults.add(format!("{place}: issuer"), problem);
            }
            issuers.insert(name.clone(), issuer);
        }
    }
    issuers
}

/// Loads the certificates of all device-signing keys. Skips missing and invalid certificates: they are faults only if a profile
/// names their key.
fn load_signers(keys: &KeyManifest) -> BTreeMap<KeyName, IssuerCertificate> {
    let device_keys = keys.signing.iter().filter(|key| key.use_ == SigningUse::Device);
    let certificate = |key: &SigningKey| {
        let pem = std::fs::read_to_string(&key.certificate).ok()?;
        let algorithm = SignatureAlgorithm::default_for(key.public_key.kind());
        let issuer = IssuerCertificate::from_pem(&pem, algorithm).ok()?;
        (issuer.public_key() == &key.public_key).then(|| (key.name.clone(), issuer))
    };
    device_keys.filter_map(certificate).collect()
}
