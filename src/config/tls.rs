//! `[tls]` of `sppd.toml`: the daemon's certificates and the CA of client certificates.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::Deserialize;
use spp_format::file_format::{Faults, open_private};
use spp_format::keys::sha256;
use spp_format::secret::SecretBytes;

/// The TLS configurations of the listeners. They are built while the configuration is loaded, so that unusable certificates and
/// keys are reported as faults.
pub struct TlsConfig {
    /// For stations and officers: mutual TLS, gRPC.
    pub mutual: Arc<ServerConfig>,
    /// For the public: no client certificate, gRPC and HTTP. The certificate may differ, because browsers and stations trust
    /// different CAs.
    pub public: Arc<ServerConfig>,
    /// SHA-256 of each file, by setting.
    pub(super) files: BTreeMap<String, [u8; 32]>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TlsShape {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: PathBuf,
}

pub(super) fn check(
    shape: &TlsShape,
    public: Option<(&PathBuf, &PathBuf)>,
    place: &str,
    base: &Path,
    faults: &mut Faults,
) -> Option<TlsConfig> {
    let mut files = Files { place, base, hashes: BTreeMap::new() };
    let mutual_identity = files.identity("tls", &shape.certificate, &shape.key, faults);
    let client_ca = files.read("tls.client_ca", &shape.client_ca, faults);
    let clients = client_ca.and_then(|pem| faults.note(format!("{place}: tls"), client_verifier(&pem)));
    let public_identity = match public {
        Some((certificate, key)) => files.identity("public", certificate, key, faults),
        None => mutual_identity.clone(),
    };
    let mutual = faults.note(format!("{place}: tls"), server_config(mutual_identity?, clients?, &[b"h2"]))?;
    let no_clients = WebPkiClientVerifier::no_client_auth();
    let public = server_config(public_identity?, no_clients, &[b"h2", b"http/1.1"]);
    let public = faults.note(format!("{place}: public"), public)?;
    Some(TlsConfig { mutual, public, files: files.hashes })
}

const HINT: &str = "create it with sppctl server enroll";

/// Reads the files of one configuration and records their hashes.
struct Files<'a> {
    place: &'a str,
    base: &'a Path,
    hashes: BTreeMap<String, [u8; 32]>,
}

impl Files<'_> {
    fn read(&mut self, name: &str, path: &Path, faults: &mut Faults) -> Option<Vec<u8>> {
        let path = self.base.join(path);
        let bytes = std::fs::read(&path).map_err(|e| format!("{}: {e}; {HINT}", path.display()));
        let bytes = faults.note(format!("{}: {name}", self.place), bytes)?;
        self.hashes.insert(name.to_owned(), sha256(&bytes));
        Some(bytes)
    }

    /// Reads a certificate and its key, and checks that they match.
    fn identity(
        &mut self,
        section: &str,
        certificate: &Path,
        key: &Path,
        faults: &mut Faults,
    ) -> Option<Arc<CertifiedKey>> {
        let place = self.place;
        let certificate = self.read(&format!("{section}.certificate"), certificate, faults);
        let name = format!("{section}.key");
        let key_place = format!("{place}: {name}");
        let opened = faults.note(&key_place, open_private(&self.base.join(key)).map_err(|e| format!("{e}; {HINT}")))?;
        let mut key = SecretBytes::new(Vec::with_capacity(8192));
        faults.note(&key_place, opened.take(8192).read_to_end(key.expose_mut()))?;
        // Exposed for hashing: a reload uses the hash to detect a new key.
        self.hashes.insert(name, sha256(key.expose()));
        faults.note(format!("{place}: {section}"), certified_key(&certificate?, &key))
    }
}

fn provider() -> CryptoProvider {
    rustls::crypto::aws_lc_rs::default_provider()
}

/// Checks that the certificate and the key are a pair that TLS can use.
fn certified_key(certificate: &[u8], key: &SecretBytes) -> Result<Arc<CertifiedKey>, String> {
    let chain = certificates("certificate", certificate)?;
    // Exposed to the TLS library, which stores its own copy and checks that it matches the certificate.
    let key = PrivateKeyDer::from_pem_slice(key.expose());
    let key = key.map_err(|_| "key is not a private key in PEM".to_owned())?;
    let certified_key = CertifiedKey::from_der(chain, key, &provider());
    certified_key
        .map(Arc::new)
        .map_err(|e| format!("certificate and key: {e}; create a new pair with sppctl server enroll"))
}

/// A verifier that accepts client certificates of these CAs.
fn client_verifier(client_ca: &[u8]) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let mut authorities = RootCertStore::empty();
    for authority in certificates("client_ca", client_ca)? {
        authorities.add(authority).map_err(|e| format!("client_ca: {e}"))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(authorities), Arc::new(provider()));
    verifier.build().map_err(|e| format!("client_ca: {e}"))
}

fn server_config(
    identity: Arc<CertifiedKey>,
    clients: Arc<dyn ClientCertVerifier>,
    protocols: &[&[u8]],
) -> Result<Arc<ServerConfig>, String> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_client_cert_verifier(clients)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity)));
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(Arc::new(config))
}

fn certificates(setting: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match parsed {
        Ok(chain) if chain.is_empty() => Err(format!("{setting} has no BEGIN CERTIFICATE block")),
        parsed => parsed.map_err(|e| format!("{setting} is not PEM: {e}")),
    }
}
