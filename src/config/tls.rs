//! `[tls]` of `sppd.toml`: who the daemon is, and whose certificates its callers show.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::Deserialize;

use super::{Faults, open_private};
use crate::secret::SecretBytes;

/// Who the daemon is, and whose certificates its callers show: PEM files, read.
pub struct TlsConfig {
    /// Who it is to stations and officers.
    pub identity: ServerIdentity,
    /// The authority of stations' and officers' certificates.
    pub client_ca: Vec<u8>,
    /// Who it is to the public, if that is somebody else: browsers know other authorities than stations.
    pub public: Option<ServerIdentity>,
}

/// A certificate and its key.
pub struct ServerIdentity {
    /// The certificate chain.
    pub certificate: Vec<u8>,
    /// Its private key.
    pub key: SecretBytes,
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
    let identity = identity("tls", &shape.certificate, &shape.key, place, base, faults);
    let client_ca = read("tls.client_ca", &shape.client_ca, place, base, faults);
    let fits = client_ca.as_ref().map(|pem| check_authorities(pem));
    fits.map(|fits| faults.note(format!("{place}: tls"), fits));
    let given = public.map(|(certificate, key)| self::identity("public", certificate, key, place, base, faults));
    let public = match given {
        Some(identity) => Some(identity?),
        None => None,
    };
    Some(TlsConfig { identity: identity?, client_ca: client_ca?, public })
}

const HINT: &str = "make it with sppctl server enroll";

fn read(name: &str, path: &Path, place: &str, base: &Path, faults: &mut Faults) -> Option<Vec<u8>> {
    let path = base.join(path);
    let octets = std::fs::read(&path).map_err(|e| format!("{}: {e}; {HINT}", path.display()));
    faults.note(format!("{place}: {name}"), octets)
}

fn identity(
    section: &str,
    certificate: &Path,
    key: &Path,
    place: &str,
    base: &Path,
    faults: &mut Faults,
) -> Option<ServerIdentity> {
    let certificate = read(&format!("{section}.certificate"), certificate, place, base, faults);
    let at = format!("{place}: {section}.key");
    let opened = faults.note(&at, open_private(&base.join(key)).map_err(|e| format!("{e}; {HINT}")))?;
    let mut key = SecretBytes::new(Vec::with_capacity(8192));
    faults.note(&at, opened.take(8192).read_to_end(key.expose_mut()))?;
    let identity = ServerIdentity { certificate: certificate?, key };
    faults.note(format!("{place}: {section}"), identity.server_config().map(drop));
    Some(identity)
}

/// There is an authority for clients.
fn check_authorities(client_ca: &[u8]) -> Result<(), String> {
    let mut authorities = rustls::RootCertStore::empty();
    for authority in certificates("client_ca", client_ca)? {
        authorities.add(authority).map_err(|e| format!("client_ca: {e}"))?;
    }
    Ok(())
}

impl TlsConfig {
    /// What the public listener needs: no client certificates, with these protocols in the handshake.
    pub fn public_config(&self, protocols: &[&[u8]]) -> Result<rustls::ServerConfig, String> {
        let mut config = self.public.as_ref().unwrap_or(&self.identity).server_config()?;
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(config)
    }
}

impl ServerIdentity {
    /// The certificate and the key are a pair that TLS can use.
    fn server_config(&self) -> Result<rustls::ServerConfig, String> {
        let chain = certificates("certificate", &self.certificate)?;
        // Exposed to the TLS library, which looks whether it belongs to the certificate.
        let key = PrivateKeyDer::from_pem_slice(self.key.expose());
        let key = key.map_err(|_| "key is no private key in PEM".to_owned())?;
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|e| format!("certificate and key: {e}; make both anew with sppctl server enroll"))
    }
}

fn certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match read {
        Ok(chain) if chain.is_empty() => Err(format!("{what} has no BEGIN CERTIFICATE block")),
        read => read.map_err(|e| format!("{what} is no PEM: {e}")),
    }
}
