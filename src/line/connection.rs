//! The way to the daemon: TLS by files, a few HTTP/2 connections.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tonic::Code;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri};

use super::LineError;
use super::retry::{Patience, tls_fault};
use crate::names::ChipId;
use crate::proto::GetSessionRequest;
use crate::proto::get_session_request::Session;
use crate::proto::line_client::LineClient;
use crate::secret::SecretBytes;

/// Whom the station trusts, and who it is itself.
pub(super) struct Tls {
    authority: Vec<u8>,
    /// Certificate chain and private key, both PEM.
    identity: Option<(Vec<u8>, SecretBytes)>,
}

impl Tls {
    /// Mutual TLS with `certificate.pem`, `key.pem` and `ca.pem` of the directory that `sppctl station enroll` made.
    pub(super) fn mutual(directory: &Path) -> Result<Self, LineError> {
        let at = |name: &str| directory.join(name);
        let certificate = certificates(&at("certificate.pem"))?;
        let key = private_key(&at("key.pem"))?;
        Ok(Self { authority: certificates(&at("ca.pem"))?, identity: Some((certificate, key)) })
    }

    /// TLS without a client certificate, for the public listener.
    pub(super) fn public(authority: &Path) -> Result<Self, LineError> {
        Ok(Self { authority: certificates(authority)?, identity: None })
    }

    /// How the server is reached.
    pub(super) fn endpoint(&self, server: &Uri) -> Result<Endpoint, LineError> {
        let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.authority));
        if let Some((certificate, key)) = &self.identity {
            // Exposed to the TLS client, which keeps it for as long as it connects.
            config = config.identity(Identity::from_pem(certificate, key.expose()));
        }
        let refused = |e: tonic::transport::Error| LineError::Connection {
            server: server.to_string(),
            cause: format!("the TLS files do not go together: {}; enroll the station again", causes(&e)),
        };
        Ok(Endpoint::from(server.clone())
            .tls_config(config)
            .map_err(refused)?
            .connect_timeout(Duration::from_secs(10))
            .tcp_nodelay(true)
            // A daemon that vanished without a word is noticed while calls wait for it.
            .http2_keep_alive_interval(Duration::from_secs(15))
            .keep_alive_timeout(Duration::from_secs(10)))
    }
}

/// Connects `count` times, waiting for a daemon that is still starting. Afterwards each connection heals by itself.
pub(super) async fn connect(endpoint: &Endpoint, count: usize, patience: &Patience) -> Result<Vec<Channel>, LineError> {
    let begun = tokio::time::Instant::now();
    let mut channels = Vec::with_capacity(count);
    while channels.len() < count {
        match endpoint.connect().await {
            Ok(channel) => channels.push(channel),
            Err(e) if tls_fault(&e).is_some() || begun.elapsed() >= patience.retry_for => {
                return Err(unreachable_server(endpoint, &e));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(250)).await,
        }
    }
    Ok(channels)
}

/// Makes sure that the other side is a daemon that serves this station, before a device is begun. Asks for a session that nobody
/// has: in TLS 1.3 a server tells what it thinks of a client's certificate with the first answer only.
pub(super) async fn greet(server: &Uri, channel: &Channel, patience: &Patience) -> Result<(), LineError> {
    // A connection that is cut off in the middle of a refusal looks like any other; five seconds are enough to see the refusal.
    let patience = Patience { retry_for: patience.retry_for.min(Duration::from_secs(5)), ..*patience };
    let nobody = GetSessionRequest { session: Some(Session::ChipId(vec![0; ChipId::MIN_LEN])) };
    let attempt = || {
        let (mut client, request) = (LineClient::new(channel.clone()), patience.request(nobody.clone()));
        async move { client.get_session(request).await }
    };
    let refused = match patience.call("GetSession", &mut 0, attempt).await {
        Ok(_) => return Ok(()),
        Err(refused) if refused.code() == Code::NotFound => return Ok(()),
        Err(refused) => refused,
    };
    let hint = match refused.code() {
        Code::Unimplemented => "; is this the listener for stations?",
        Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted => {
            "; `sppctl status` tells what is missing"
        }
        _ => "; is the station's certificate valid and enrolled here?",
    };
    Err(LineError::Connection { server: server.to_string(), cause: format!("{}{hint}", refused.reason()) })
}

/// The address of a server, as an option is given.
pub(super) fn parse_server(text: &str) -> Result<Uri, String> {
    let example = "write https://HOST:PORT, for example https://localhost:7443";
    let uri: Uri = text.parse().map_err(|e| format!("{e}; {example}"))?;
    let plain = uri.path() == "/" && uri.query().is_none() && uri.port_u16().is_some();
    match (uri.scheme_str(), uri.host()) {
        (Some("https"), Some(_)) if plain => Ok(uri),
        (Some("http"), _) => Err(format!("the daemon speaks TLS only; {example}")),
        _ => Err(example.to_owned()),
    }
}

fn unreachable_server(endpoint: &Endpoint, error: &tonic::transport::Error) -> LineError {
    let hint = match tls_fault(error) {
        Some(rustls::Error::InvalidCertificate(_)) => {
            "; is the CA certificate the one that signed the server's, and does that name this host?"
        }
        Some(_) => "; is the station's certificate valid and enrolled here?",
        None => "; does sppd run, and is this its address?",
    };
    LineError::Connection { server: endpoint.uri().to_string(), cause: format!("{}{hint}", causes(error)) }
}

fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = inner.source();
    }
    text
}

/// A PEM file with at least one certificate; the text, since that is what the TLS client takes.
fn certificates(path: &Path) -> Result<Vec<u8>, LineError> {
    let text = std::fs::read(path).map_err(unreadable(path))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(text),
        Ok(_) => Err(LineError::content(path, "there is no certificate (PEM) in it")),
        Err(e) => Err(LineError::content(path, format!("it is not PEM: {e}"))),
    }
}

fn private_key(path: &Path) -> Result<SecretBytes, LineError> {
    let text = SecretBytes::new(std::fs::read(path).map_err(unreadable(path))?);
    // Exposed to be parsed; what is parsed is wiped by its type.
    match PrivateKeyDer::from_pem_slice(text.expose()) {
        Ok(_) => Ok(text),
        Err(_) => Err(LineError::content(path, "there is no private key (PEM) in it")),
    }
}

fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> LineError {
    let path: PathBuf = path.to_owned();
    move |source| match source.kind() {
        std::io::ErrorKind::NotFound => LineError::content(
            &path,
            "there is no such file; `sppctl station enroll NAME --out DIR` makes the TLS files",
        ),
        _ => LineError::File { doing: "reading", path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_an_https_address() {
        assert!(parse_server("https://localhost:7443").is_ok());
        assert!(parse_server("https://[::1]:7443/").is_ok());
        for wrong in
            ["localhost:7443", "http://localhost:7443", "https://", "https://h:1/path", "", "https://h:x", "https://h"]
        {
            let refused = parse_server(wrong).unwrap_err();
            assert!(refused.contains("https://localhost:7443"), "{wrong}: {refused}");
        }
    }

    #[test]
    fn tls_files_that_are_missing_or_something_else_are_named() {
        let directory = spp_testkit::files::temp_dir();
        let refused = |directory: &Path| Tls::mutual(directory).map(|_| ()).unwrap_err().to_string();
        let missing = refused(directory.path());
        assert!(missing.contains("certificate.pem") && missing.contains("sppctl station enroll"), "{missing}");
        std::fs::write(directory.path().join("certificate.pem"), "nothing").unwrap();
        assert!(refused(directory.path()).contains("no certificate"));
    }

    #[tokio::test]
    async fn a_daemon_that_does_not_run_is_told_as_that() {
        let endpoint = Endpoint::from_static("http://127.0.0.1:9");
        let patience = Patience { deadline: Duration::from_secs(1), retry_for: Duration::ZERO };
        let refused = connect(&endpoint, 1, &patience).await.unwrap_err();
        assert!(refused.to_string().contains("does sppd run"), "{refused}");
        assert_eq!(refused.exit_code(), 2);
    }
}
