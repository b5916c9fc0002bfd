//! Inspects the certificates that listeners present in the TLS handshake.

use std::sync::Arc;

use der::{Decode as _, Encode as _};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::site::Site;

/// A TLS client that reads the daemon's certificate. It keeps session tickets for resumption.
pub struct TlsProbe(TlsConnector);

impl TlsProbe {
    /// Creates a client with the certificate in `directory`.
    pub fn with_certificate(site: &Site, directory: &str) -> Self {
        let file = |name: &str| site.read(&format!("{directory}/{name}"));
        let chain = vec![CertificateDer::from_pem_slice(&file("certificate.pem")).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(&file("key.pem")).unwrap();
        Self::new(builder(site).with_client_auth_cert(chain, key).unwrap())
    }

    /// Creates a client without a certificate.
    pub fn anonymous(site: &Site) -> Self {
        Self::new(builder(site).with_no_client_auth())
    }

    fn new(mut config: rustls::ClientConfig) -> Self {
        config.alpn_protocols = vec![b"h2".to_vec()];
        Self(TlsConnector::from(Arc::new(config)))
    }
}

fn builder(site: &Site) -> rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&site.read("keys/access-ca.pem")).unwrap()).unwrap();
    rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
}

/// The serial numbers of the certificates that these listeners present.
pub async fn presented_serials(listeners: &[(u16, &TlsProbe)]) -> Vec<Vec<u8>> {
    let mut serials = Vec::new();
    for (port, client) in listeners {
        let stream = TcpStream::connect(("127.0.0.1", *port)).await.unwrap();
        let stream = client.0.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap();
        let session = stream.get_ref().1;
        assert_eq!(session.alpn_protocol(), Some(&b"h2"[..]));
        let certificate = x509_cert::Certificate::from_der(&session.peer_certificates().unwrap()[0]).unwrap();
        serials.push(certificate.tbs_certificate().serial_number().to_der().unwrap());
    }
    serials
}
