//! Asking a web server, within limits: for mirrors, for the log of another daemon, and for witnesses.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, http};

/// No request takes longer.
const LIMIT: Duration = Duration::from_secs(30);
/// How often a server that has too much to do is asked again.
const ATTEMPTS: u32 = 8;
/// Longest pause that a server may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// An HTTP client.
#[derive(Clone)]
pub(super) struct Fetcher(Agent);

/// What a server answered.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

impl Fetcher {
    /// A client for mirrors: it follows redirections, and waits as long as a large file may take.
    pub(super) fn of_mirrors(authority: Option<&Path>) -> Result<Self, String> {
        Self::new(authority, LIMIT, 5)
    }

    /// A client for somebody who is asked again and again and must not lead anywhere else.
    pub(super) fn of_witnesses(authority: Option<&Path>, limit: Duration) -> Result<Self, String> {
        Self::new(authority, limit, 0)
    }

    /// A client that trusts the CA certificates in that PEM file, or else those that the system trusts.
    fn new(authority: Option<&Path>, limit: Duration, redirects: u32) -> Result<Self, String> {
        let roots = match authority {
            None => {
                let known = rustls_native_certs::load_native_certs().certs;
                RootCerts::Specific(Arc::new(
                    known.iter().map(|known| Certificate::from_der(known).to_owned()).collect(),
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
                    return Err(format!("{}: there is no certificate (PEM) in it", path.display()));
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

    /// GET; at most so many bytes are read. A server that says it has too much to do is asked again after the pause it wants.
    pub(super) fn get(&self, url: &str, most: u64) -> Result<Answer, String> {
        let mut attempt = 0;
        loop {
            let answer = self.0.get(url).call().map_err(|e| e.to_string())?;
            let busy = matches!(answer.status().as_u16(), 429 | 503);
            attempt += 1;
            if !busy || attempt >= ATTEMPTS {
                return read(answer, most);
            }
            let pause = answer.headers().get(http::header::RETRY_AFTER);
            let pause = pause.and_then(|value| value.to_str().ok()?.parse().ok()).map_or(1, |seconds: u64| seconds);
            std::thread::sleep(Duration::from_secs(pause.max(1)).min(LONGEST_PAUSE));
        }
    }

    /// POST.
    pub(super) fn post(&self, url: &str, body: &[u8], most: u64) -> Result<Answer, String> {
        read(self.0.post(url).send(body).map_err(|e| e.to_string())?, most)
    }
}

fn read(mut answer: http::Response<Body>, most: u64) -> Result<Answer, String> {
    let body = answer.body_mut().with_config().limit(most).read_to_vec().map_err(|e| e.to_string())?;
    Ok(Answer { status: answer.status().as_u16(), body })
}
