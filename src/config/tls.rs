//! `[tls]` of `sppd.toml`: who the daemon is, and whose certificates its callers show.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::Deserialize;

use super::{Faults, open_private};
use crate::secret::SecretBytes;

/// PEM files, read.
pub struct TlsConfig {
    /// The daemon's certificate chain.
    pub certificate: Vec<u8>,
    /// Its private key.
    pub key: SecretBytes,
    /// The authority of stations' and officers' certificates.
    pub client_ca: Vec<u8>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TlsShape {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: PathBuf,
}

pub(super) fn check(shape: &TlsShape, place: &str, base: &Path, faults: &mut Faults) -> Option<TlsConfig> {
    let hint = "make it with sppctl server enroll";
    let read = |name: &str, path: &Path, faults: &mut Faults| {
        let at = format!("{place}: tls.{name}");
        let path = base.join(path);
        faults.note(at, std::fs::read(&path).map_err(|e| format!("{}: {e}; {hint}", path.display())))
    };
    let certificate = read("certificate", &shape.certificate, faults);
    let client_ca = read("client_ca", &shape.client_ca, faults);
    let mut key = SecretBytes::new(Vec::with_capacity(8192));
    let opened = open_private(&base.join(&shape.key)).map_err(|e| format!("{e}; {hint}"));
    let opened = faults.note(format!("{place}: tls.key"), opened)?;
    faults.note(format!("{place}: tls.key"), opened.take(8192).read_to_end(key.expose_mut()))?;
    let (certificate, client_ca) = (certificate?, client_ca?);
    faults.note(format!("{place}: tls"), check_tls_fits(&certificate, &key, &client_ca));
    Some(TlsConfig { certificate, key, client_ca })
}

impl TlsConfig {
    /// What a listener without client certificates needs, with these protocols in the handshake.
    pub fn server_config(&self, protocols: &[&[u8]]) -> Result<rustls::ServerConfig, String> {
        let mut config = server_config(&self.certificate, &self.key)?;
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(config)
    }
}

fn certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match read {
        Ok(chain) if chain.is_empty() => Err(format!("{what} has no BEGIN CERTIFICATE block")),
        read => read.map_err(|e| format!("{what} is no PEM: {e}")),
    }
}

fn server_config(certificate: &[u8], key: &SecretBytes) -> Result<rustls::ServerConfig, String> {
    let chain = certificates("certificate", certificate)?;
    // Exposed to the TLS library, which looks whether it belongs to the certificate.
    let key = PrivateKeyDer::from_pem_slice(key.expose()).map_err(|_| "key is no private key in PEM".to_owned())?;
    rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|e| format!("certificate and key: {e}; make both anew with sppctl server enroll"))
}

/// The certificate and the key are a pair that TLS can use, and there is an authority for clients.
fn check_tls_fits(certificate: &[u8], key: &SecretBytes, client_ca: &[u8]) -> Result<(), String> {
    let mut authorities = rustls::RootCertStore::empty();
    for authority in certificates("client_ca", client_ca)? {
        authorities.add(authority).map_err(|e| format!("client_ca: {e}"))?;
    }
    server_config(certificate, key).map(drop)
}
