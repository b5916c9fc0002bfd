//! Connections as every listener takes them: accepted one by one, TLS within a time and with the certificate of the moment, until the stop.

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

/// How long it waits after the system gave no connection, as when the process has no file descriptor left.
const PAUSE: Duration = Duration::from_secs(1);

/// The TLS of all listeners, which a reload exchanges. A connection goes on with what it was made with.
#[derive(Clone)]
pub struct TlsInForce {
    /// Stations' and officers'.
    pub(crate) mutual: Tls,
    /// The public's.
    pub(crate) public: Tls,
}

impl TlsInForce {
    /// As the configuration says.
    pub fn new(config: &TlsConfig) -> Self {
        let tls = |config: &Arc<ServerConfig>| Tls(Arc::new(ArcSwap::new(Arc::clone(config))));
        Self { mutual: tls(&config.mutual), public: tls(&config.public) }
    }

    /// From now on as this configuration says. What a client kept of earlier sessions opens none of these.
    pub fn exchange(&self, config: &TlsConfig) {
        self.mutual.0.store(Arc::clone(&config.mutual));
        self.public.0.store(Arc::clone(&config.public));
    }
}

/// The TLS of a listener.
#[derive(Clone)]
pub(crate) struct Tls(Arc<ArcSwap<ServerConfig>>);

impl Tls {
    /// The handshake; none if it fails or takes longer.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        limit: Duration,
    ) -> Option<TlsStream<TcpStream>> {
        let acceptor = TlsAcceptor::from(self.0.load_full());
        match tokio::time::timeout(limit, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => return Some(stream),
            Ok(Err(error)) => tracing::debug!(%error, %peer, "no TLS"),
            Err(_) => tracing::debug!(%peer, "TLS took too long"),
        }
        None
    }
}

/// The next connection, once there is a place for it. More wait with the system.
pub(crate) async fn next(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (Option<OwnedSemaphorePermit>, TcpStream, SocketAddr) {
    // It is never closed, so there always is a place in the end.
    let place = Arc::clone(places).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let _ = stream.set_nodelay(true);
                return (place, stream, peer);
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Resolves when `stop` is true.
pub(crate) async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is a stop as well.
    let _ = stop.wait_for(|stop| *stop).await;
}
