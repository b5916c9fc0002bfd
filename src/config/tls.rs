//! `[tls]` of `sppd.toml`: who the daemon is, and whose certificates its callers show.

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

use super::{Faults, open_private};
use crate::keys::sha256;
use crate::secret::SecretBytes;

/// Who the daemon is, and whose certificates its callers show, as the TLS library takes it: what is not usable is a fault of the
/// configuration.
pub struct TlsConfig {
    /// For stations and officers: both sides show certificates, and speak gRPC.
    pub mutual: Arc<ServerConfig>,
    /// For the public, who shows no certificate and speaks HTTP as well. Browsers know other authorities than stations, so that the
    /// daemon may be somebody else here.
    pub public: Arc<ServerConfig>,
    /// SHA-256 of the files that this was made of, by setting.
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
    let mut files = Files { place, base, read: BTreeMap::new() };
    let inner = files.identity("tls", &shape.certificate, &shape.key, faults);
    let client_ca = files.read("tls.client_ca", &shape.client_ca, faults);
    let clients = client_ca.and_then(|pem| faults.note(format!("{place}: tls"), clients_of(&pem)));
    let outer = match public {
        Some((certificate, key)) => files.identity("public", certificate, key, faults),
        None => inner.clone(),
    };
    let mutual = faults.note(format!("{place}: tls"), server_config(inner?, clients?, &[b"h2"]))?;
    let nobody = WebPkiClientVerifier::no_client_auth();
    let public = faults.note(format!("{place}: public"), server_config(outer?, nobody, &[b"h2", b"http/1.1"]))?;
    Some(TlsConfig { mutual, public, files: files.read })
}

const HINT: &str = "make it with sppctl server enroll";

/// The files of one configuration, and the hashes of those that were read.
struct Files<'a> {
    place: &'a str,
    base: &'a Path,
    read: BTreeMap<String, [u8; 32]>,
}

impl Files<'_> {
    fn read(&mut self, name: &str, path: &Path, faults: &mut Faults) -> Option<Vec<u8>> {
        let path = self.base.join(path);
        let bytes = std::fs::read(&path).map_err(|e| format!("{}: {e}; {HINT}", path.display()));
        let bytes = faults.note(format!("{}: {name}", self.place), bytes)?;
        self.read.insert(name.to_owned(), sha256(&bytes));
        Some(bytes)
    }

    /// A certificate and its key, which belong together.
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
        let at = format!("{place}: {name}");
        let opened = faults.note(&at, open_private(&self.base.join(key)).map_err(|e| format!("{e}; {HINT}")))?;
        let mut key = SecretBytes::new(Vec::with_capacity(8192));
        faults.note(&at, opened.take(8192).read_to_end(key.expose_mut()))?;
        // Exposed to be hashed: a reload tells whether it is another one.
        self.read.insert(name, sha256(key.expose()));
        faults.note(format!("{place}: {section}"), certified(&certificate?, &key))
    }
}

fn provider() -> CryptoProvider {
    rustls::crypto::aws_lc_rs::default_provider()
}

/// The certificate and the key are a pair that TLS can use.
fn certified(certificate: &[u8], key: &SecretBytes) -> Result<Arc<CertifiedKey>, String> {
    let chain = certificates("certificate", certificate)?;
    // Exposed to the TLS library, which keeps its own form of it and looks whether it belongs to the certificate.
    let key = PrivateKeyDer::from_pem_slice(key.expose());
    let key = key.map_err(|_| "key is no private key in PEM".to_owned())?;
    let certified = CertifiedKey::from_der(chain, key, &provider());
    certified.map(Arc::new).map_err(|e| format!("certificate and key: {e}; make both anew with sppctl server enroll"))
}

/// Lets in whoever has a certificate of these authorities.
fn clients_of(client_ca: &[u8]) -> Result<Arc<dyn ClientCertVerifier>, String> {
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

fn certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match read {
        Ok(chain) if chain.is_empty() => Err(format!("{what} has no BEGIN CERTIFICATE block")),
        read => read.map_err(|e| format!("{what} is no PEM: {e}")),
    }
}
