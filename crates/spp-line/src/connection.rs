//! TLS connections to the daemon.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use spp_format::names::ChipId;
use spp_format::secret::SecretBytes;
use spp_proto::GetSessionRequest;
use spp_proto::get_session_request::Session;
use spp_proto::line_client::LineClient;
use tonic::Code;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri};

use super::LineError;
use super::retry::{RetryPolicy, tls_fault};

/// TLS credentials: trusted CA certificates and the station's own certificate and key.
pub(super) struct Tls {
    authority: Vec<u8>,
    /// Certificate chain and private key, both PEM.
    identity: Option<(Vec<u8>, SecretBytes)>,
}

impl Tls {
    /// Loads mutual TLS credentials: `certificate.pem`, `key.pem` and `ca.pem` of the directory that `sppctl station enroll`
    /// created.
    pub(super) fn mutual(directory: &Path) -> Result<Self, LineError> {
        let path = |name: &str| directory.join(name);
        let certificate = certificates(&path("certificate.pem"))?;
        let key = private_key(&path("key.pem"))?;
        Ok(Self { authority: certificates(&path("ca.pem"))?, identity: Some((certificate, key)) })
    }

    /// Loads TLS credentials without a client certificate, for the public listener.
    pub(super) fn public(authority: &Path) -> Result<Self, LineError> {
        Ok(Self { authority: certificates(authority)?, identity: None })
    }

    /// Configures the connection to a server.
    pub(super) fn endpoint(&self, server: &Uri) -> Result<Endpoint, LineError> {
        let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.authority));
        if let Some((certificate, key)) = &self.identity {
            // Exposed to the TLS client, which stores it for reconnects.
            config = config.identity(Identity::from_pem(certificate, key.expose()));
        }
        let invalid = |e: tonic::transport::Error| LineError::Connection {
            server: server.to_string(),
            cause: format!("the TLS files do not match: {}; enroll the station again", error_chain(&e)),
        };
        Ok(Endpoint::from(server.clone())
            .tls_config(config)
            .map_err(invalid)?
            .connect_timeout(Duration::from_secs(10))
            .tcp_nodelay(true)
            // Detect a daemon that disappears without closing the connection while calls are pending.
            .http2_keep_alive_interval(Duration::from_secs(15))
            .keep_alive_timeout(Duration::from_secs(10)))
    }
}

/// Opens `count` connections and waits for a daemon that is still starting. Each connection reconnects by itself later.
pub(super) async fn connect(
    endpoint: &Endpoint,
    count: usize,
    retry_policy: &RetryPolicy,
) -> Result<Vec<Channel>, LineError> {
    let start = tokio::time::Instant::now();
    let mut channels = Vec::with_capacity(count);
    while channels.len() < count {
        match endpoint.connect().await {
            Ok(channel) => channels.push(channel),
            Err(e) if tls_fault(&e).is_some() || start.elapsed() >= retry_policy.retry_for => {
                return Err(unreachable_server(endpoint, &e));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(250)).await,
        }
    }
    Ok(channels)
}

/// Checks that the server is a daemon that accepts this station, before the first device is started. Requests a session of a
/// nonexistent chip, because a TLS 1.3 server reports a rejected client certificate only with its first response.
pub(super) async fn verify_daemon(
    server: &Uri,
    channel: &Channel,
    retry_policy: &RetryPolicy,
) -> Result<(), LineError> {
    // A rejection can look like a broken connection; retrying for five seconds is enough to receive the TLS alert.
    let retry_policy = RetryPolicy { retry_for: retry_policy.retry_for.min(Duration::from_secs(5)), ..*retry_policy };
    let probe = GetSessionRequest { session: Some(Session::ChipId(vec![0; ChipId::MIN_LEN])) };
    let attempt = || {
        let (mut client, request) = (LineClient::new(channel.clone()), retry_policy.request(probe.clone()));
        async move { client.get_session(request).await }
    };
    let failure = match retry_policy.call("GetSession", &mut 0, attempt).await {
        Ok(_) => return Ok(()),
        Err(failure) if failure.code() == Code::NotFound => return Ok(()),
        Err(failure) => failure,
    };
    let hint = match failure.code() {
        Code::Unimplemented => "; check that this is the station listener",
        Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted => {
            "; run `sppctl status` to find the cause"
        }
        _ => "; check that the station's certificate is valid and enrolled at this daemon",
    };
    Err(LineError::Connection { server: server.to_string(), cause: format!("{}{hint}", failure.reason()) })
}

/// Parses the server address of an option.
pub(super) fn parse_server(text: &str) -> Result<Uri, String> {
    let example = "expected https://HOST:PORT, for example https://localhost:7443";
    let uri: Uri = text.parse().map_err(|e| format!("{e}; {example}"))?;
    let is_base = uri.path() == "/" && uri.query().is_none() && uri.port_u16().is_some();
    match (uri.scheme_str(), uri.host()) {
        (Some("https"), Some(_)) if is_base => Ok(uri),
        (Some("http"), _) => Err(format!("TLS is required; {example}")),
        _ => Err(example.to_owned()),
    }
}

fn unreachable_server(endpoint: &Endpoint, error: &tonic::transport::Error) -> LineError {
    let hint = match tls_fault(error) {
        Some(rustls::Error::InvalidCertificate(_)) => {
            "; check that the CA certificate issued the server's certificate and that it names this host"
        }
        Some(_) => "; check that the station's certificate is valid and enrolled at this daemon",
        None => "; check that sppd is running at this address",
    };
    LineError::Connection { server: endpoint.uri().to_string(), cause: format!("{}{hint}", error_chain(error)) }
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let cause_text = inner.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        cause = inner.source();
    }
    text
}

/// Reads a PEM file with at least one certificate. Returns the text, which the TLS client expects.
fn certificates(path: &Path) -> Result<Vec<u8>, LineError> {
    let text = std::fs::read(path).map_err(unreadable(path))?;
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match parsed {
        Ok(certificates) if !certificates.is_empty() => Ok(text),
        Ok(_) => Err(LineError::content(path, "contains no certificate (PEM)")),
        Err(e) => Err(LineError::content(path, format!("not PEM: {e}"))),
    }
}

fn private_key(path: &Path) -> Result<SecretBytes, LineError> {
    let text = SecretBytes::new(std::fs::read(path).map_err(unreadable(path))?);
    // Exposed to parse it; the parsed key's type wipes itself.
    match PrivateKeyDer::from_pem_slice(text.expose()) {
        Ok(_) => Ok(text),
        Err(_) => Err(LineError::content(path, "contains no private key (PEM)")),
    }
}

fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> LineError {
    let path: PathBuf = path.to_owned();
    move |source| match source.kind() {
        std::io::ErrorKind::NotFound => LineError::content(
            &path,
            "file not found; create the TLS files with `sppctl station enroll NAME --out DIR`",
        ),
        _ => LineError::File { operation: "reading", path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_server_accepts_only_https_host_and_port() {
        assert!(parse_server("https://localhost:7443").is_ok());
        assert!(parse_server("https://[::1]:7443/").is_ok());
        for wrong in
            ["localhost:7443", "http://localhost:7443", "https://", "https://h:1/path", "", "https://h:x", "https://h"]
        {
            let error = parse_server(wrong).unwrap_err();
            assert!(error.contains("https://localhost:7443"), "{wrong}: {error}");
        }
    }

    #[test]
    fn missing_or_invalid_tls_files_named_in_error() {
        let directory = spp_test_support::files::temp_dir();
        let load_error = |directory: &Path| Tls::mutual(directory).map(|_| ()).unwrap_err().to_string();
        let missing = load_error(directory.path());
        assert!(missing.contains("certificate.pem") && missing.contains("sppctl station enroll"), "{missing}");
        std::fs::write(directory.path().join("certificate.pem"), "nothing").unwrap();
        assert!(load_error(directory.path()).contains("no certificate"));
    }

    #[tokio::test]
    async fn unreachable_daemon_reported_with_hint() {
        let endpoint = Endpoint::from_static("http://127.0.0.1:9");
        let retry_policy = RetryPolicy { deadline: Duration::from_secs(1), retry_for: Duration::ZERO };
        let error = connect(&endpoint, 1, &retry_policy).await.unwrap_err();
        assert!(error.to_string().contains("check that sppd is running"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}
