//! Loads single sections of `sppd.toml` for tools. The rest of the file need not be valid.

use std::path::{Path, PathBuf};

use spp_format::certificate::IssuerCertificate;
use spp_format::file_format::Faults;
use spp_format::keys::PublicKey;
use spp_format::tlog::LogKey;

use super::audit::AuditConfig;
use super::hsm::HsmAccess;
use super::registry;
use super::shape::{base_of, read_shape};
use super::store::{self, StoreConfig};
use crate::hsm::{DestroyedKey, KeyManifest, SigningUse};
use crate::store::StoreOptions;

impl AuditConfig {
    /// Loads `[audit]` of `sppd.toml`, to create and verify the log.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        let (place, mut faults) = (path.display().to_string(), Faults::default());
        let shape = read_shape(path, &place, &mut faults);
        let audit = shape.map(|shape| shape.audit.check(&shape.node.name, &place, base_of(path), &mut faults));
        faults.into_result(audit)
    }
}

impl StoreConfig {
    /// Loads `[store]` of `sppd.toml`, to create the stores. Neither the HSM nor the PIN is needed.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        let place = path.display().to_string();
        let mut faults = Faults::default();
        let shape = read_shape(path, &place, &mut faults);
        let store = shape.map(|shape| store::check(&shape.store, &place, base_of(path), &mut faults));
        faults.into_result(store)
    }
}

/// For each HSM, its name and the path of the file that records a refused PIN.
pub fn pin_refusals(path: &Path) -> Result<Vec<(String, PathBuf)>, Faults> {
    let place = path.display().to_string();
    let mut faults = Faults::default();
    let refusals = read_shape(path, &place, &mut faults).map(|shape| {
        let store = store::check(&shape.store, &place, base_of(path), &mut faults);
        shape.hsm.pin_refusals(&place, |name| store.pin_refused(name), &mut faults)
    });
    faults.into_result(refusals)
}

impl HsmAccess {
    /// Loads `[hsm]` of `sppd.toml`; of several, the one with this name, or the first. An officer's PIN file replaces the PIN
    /// source of the daemon, which may be a credential that only the daemon can read.
    pub fn load(path: &Path, name: Option<&str>, pin_file: Option<PathBuf>) -> Result<Self, Faults> {
        let place = path.display().to_string();
        let mut faults = Faults::default();
        let shape = read_shape(path, &place, &mut faults);
        let access = shape.and_then(|shape| shape.hsm.access(&place, base_of(path), name, pin_file, &mut faults));
        faults.into_result(access)
    }
}

/// The settings that a tool needs to read the public database. Neither the HSM nor the PIN is needed.
pub struct RegistryAccess {
    /// Directory of the public database.
    pub directory: PathBuf,
    /// Disk options.
    pub options: StoreOptions,
    /// The key that verifies checkpoints.
    pub key: LogKey,
    /// PEM files with the certificates of the keys that sign device certificates.
    pub issuers: Vec<PathBuf>,
    /// The keys that certify callers.
    pub callers: Vec<PublicKey>,
}

impl RegistryAccess {
    /// Loads the settings from `sppd.toml`.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        let place = path.display().to_string();
        let mut faults = Faults::default();
        let access = read_shape(path, &place, &mut faults).and_then(|shape| {
            let base = base_of(path);
            let store = store::check(&shape.store, &place, base, &mut faults);
            let keys = faults.merge(KeyManifest::load(&shape.hsm.keys(base)))?;
            let key = registry::check(shape.registry, &place, base, &keys, &mut faults)?.key.key;
            let device_keys = keys.signing.iter().filter(|key| key.use_ == SigningUse::Device);
            let mut issuers: Vec<_> = device_keys.map(|key| key.certificate.clone()).collect();
            let mut callers = keys.access_keys();
            for (path, public_key) in destroyed_key_certificates(&keys, shape.hsm.keys(base).parent().unwrap_or(base)) {
                issuers.push(path);
                callers.push(public_key);
            }
            Some(Self { directory: store.public, options: store.public_options, key, issuers, callers })
        });
        faults.into_result(access)
    }
}

/// The certificates of destroyed keys that still exist beside the key manifest. They verify what those keys signed.
fn destroyed_key_certificates(keys: &KeyManifest, dir: &Path) -> Vec<(PathBuf, PublicKey)> {
    let certificate = |key: &DestroyedKey| {
        let path = dir.join(format!("{}-ca.pem", key.name));
        let certificate =
            IssuerCertificate::from_pem_with_default_algorithm(&std::fs::read_to_string(&path).ok()?).ok()?;
        let public_key = certificate.public_key().clone();
        // Skip a file of this name that belongs to another key.
        (public_key.fingerprint_text() == key.fingerprint).then_some((path, public_key))
    };
    keys.destroyed.iter().filter_map(certificate).collect()
}
