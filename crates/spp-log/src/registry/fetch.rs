//! An HTTP client with limits on time and size, for mirrors, other daemons' logs and witnesses.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, http};

/// Timeout of a request to a mirror.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum attempts while a server answers that it is busy.
const MAX_ATTEMPTS: u32 = 8;
/// Maximum pause that is accepted from a server's `Retry-After`.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// An HTTP client.
#[derive(Clone)]
pub struct Fetcher(Agent);

/// Status and body of a response.
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// The body.
    pub body: Vec<u8>,
}

impl Fetcher {
    /// A client for mirrors. It follows redirects, and its timeout allows large files.
    pub fn for_mirrors(authority: Option<&Path>) -> Result<Self, String> {
        Self::new(authority, REQUEST_TIMEOUT, 5)
    }

    /// A client for witnesses. It follows no redirects.
    pub fn for_witnesses(authority: Option<&Path>, limit: Duration) -> Result<Self, String> {
        Self::new(authority, limit, 0)
    }

    /// A client that trusts the CA certificates in the PEM file `authority`, or those of the system if there is none.
    fn new(authority: Option<&Path>, limit: Duration, redirects: u32) -> Result<Self, String> {
        let roots = match authority {
            None => {
                let certificates = rustls_native_certs::load_native_certs().certs;
                RootCerts::Specific(Arc::new(
                    certificates.iter().map(|der| Certificate::from_der(der).to_owned()).collect(),
                ))
            }
            Some(path) => {
                let pem = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
                let certificates = parse_pem(&pem).filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                });
                let certificates: Vec<_> = certificates.collect();
                if certificates.is_empty() {
                    return Err(format!("{}: no PEM certificate found", path.display()));
                }
                RootCerts::Specific(Arc::new(certificates))
            }
        };
        let tls = TlsConfig::builder()
            .root_certs(roots)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .build();
        let config = Agent::config_builder()
            .timeout_global(Some(limit))
            .max_redirects(redirects)
            .tls_config(tls)
            .http_status_as_error(false)
            .user_agent(concat!("spp/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self(config.into()))
    }

    /// Sends a GET request and reads at most `max_bytes` bytes of the body. Retries if the server is busy (429, 503), after
    /// the pause in `Retry-After`.
    pub fn get(&self, url: &str, max_bytes: u64) -> Result<Response, String> {
        let mut attempt = 0;
        loop {
            let answer = self.0.get(url).call().map_err(|e| e.to_string())?;
            let busy = matches!(answer.status().as_u16(), 429 | 503);
            attempt += 1;
            if !busy || attempt >= MAX_ATTEMPTS {
                return read(answer, max_bytes);
            }
            let pause = answer.headers().get(http::header::RETRY_AFTER);
            let pause = pause.and_then(|value| value.to_str().ok()?.parse().ok()).map_or(1, |seconds: u64| seconds);
            std::thread::sleep(Duration::from_secs(pause.max(1)).min(MAX_PAUSE));
        }
    }

    /// Sends a POST request and reads at most `max_bytes` bytes of the response.
    pub fn post(&self, url: &str, body: &[u8], max_bytes: u64) -> Result<Response, String> {
        read(self.0.post(url).send(body).map_err(|e| e.to_string())?, max_bytes)
    }
}

fn read(mut answer: http::Response<Body>, max_bytes: u64) -> Result<Response, String> {
    let body = answer.body_mut().with_config().limit(max_bytes).read_to_vec().map_err(|e| e.to_string())?;
    Ok(Response { status: answer.status().as_u16(), body })
}
