//! Accepts connections for all listeners, with a connection limit and a TLS handshake timeout, until shutdown.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::config::TlsConfig;

/// Pause after a failed accept, for example when the process has no file descriptor left.
const ACCEPT_RETRY_PAUSE: Duration = Duration::from_secs(1);

/// The current TLS configurations of all listeners. A reload replaces them; existing connections keep theirs.
#[derive(Clone)]
pub struct ActiveTls {
    /// For stations and officers: mutual TLS.
    pub(crate) mutual: Tls,
    /// For the public listener.
    pub(crate) public: Tls,
}

impl ActiveTls {
    /// Creates the TLS configurations of a daemon configuration.
    pub fn new(config: &TlsConfig) -> Self {
        let tls = |config: &Arc<ServerConfig>| Tls(Arc::new(ArcSwap::new(Arc::clone(config))));
        Self { mutual: tls(&config.mutual), public: tls(&config.public) }
    }

    /// Replaces the TLS configurations. Session tickets of earlier configurations are not accepted any more.
    pub fn replace(&self, config: &TlsConfig) {
        self.mutual.0.store(Arc::clone(&config.mutual));
        self.public.0.store(Arc::clone(&config.public));
    }
}

/// The current TLS configuration of one listener.
#[derive(Clone)]
pub(crate) struct Tls(Arc<ArcSwap<ServerConfig>>);

impl Tls {
    /// Performs the handshake; `None` if it fails or exceeds `limit`.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        limit: Duration,
    ) -> Option<TlsStream<TcpStream>> {
        let acceptor = TlsAcceptor::from(self.0.load_full());
        match tokio::time::timeout(limit, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => return Some(stream),
            Ok(Err(error)) => tracing::debug!(%error, %peer, "TLS handshake failed"),
            Err(_) => tracing::debug!(%peer, "TLS handshake timed out"),
        }
        None
    }
}

/// Waits for a free slot, then for the next connection. Further connections wait in the system's backlog.
pub(crate) async fn next(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> (Option<OwnedSemaphorePermit>, TcpStream, SocketAddr) {
    // The semaphore is never closed, so `ok()` is always `Some`.
    let slot = Arc::clone(slots).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let _ = stream.set_nodelay(true);
                return (slot, stream, peer);
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_RETRY_PAUSE).await;
            }
        }
    }
}

/// Resolves when `stop` is true.
pub(crate) async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that the sender was dropped, which is a shutdown as well.
    let _ = stop.wait_for(|stop| *stop).await;
}
