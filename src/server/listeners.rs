//! The three listeners and their drain: stations and officers with mutual TLS; the public listener without client certificates,
//! which also serves HTTP.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::connections::{ActiveTls, stopped};
use super::grpc::{OfficerContext, Services};
use super::http::Public;
use crate::config::Listen;
use crate::provisioning::Provisioner;

/// Time limit of the drain.
const DRAIN: Duration = Duration::from_secs(30);

/// Why the listeners could not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is in use or not local.
    #[error("cannot listen on {address} for {clients}: {cause}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The listener's clients.
        clients: &'static str,
        /// The operating system's error.
        cause: std::io::Error,
    },
    /// The transport of a listener failed.
    #[error("cannot serve {clients}: {cause}")]
    Transport {
        /// The listener's clients.
        clients: &'static str,
        /// The transport's error.
        cause: String,
    },
}

/// Bound listeners that do not accept connections yet.
pub struct Listening {
    line: TcpListener,
    officer: TcpListener,
    public: TcpListener,
}

impl Listening {
    /// Binds all three listeners.
    pub async fn bind(listen: &Listen) -> Result<Self, ServeError> {
        let bind = async |address: SocketAddr, clients| {
            TcpListener::bind(address).await.map_err(|cause| ServeError::Bind { address, clients, cause })
        };
        Ok(Self {
            line: bind(listen.line, "stations").await?,
            officer: bind(listen.officer, "officers").await?,
            public: bind(listen.public, "the public").await?,
        })
    }

    /// Serves until `stop` is true, then drains: accepts nothing new and finishes the calls in flight.
    pub async fn serve(
        self,
        tls: &ActiveTls,
        public: Public,
        provisioner: &Arc<Provisioner>,
        context: OfficerContext,
        stop: watch::Receiver<bool>,
    ) -> Result<(), ServeError> {
        let services = Services::new(provisioner, context).map_err(|e| transport("a listener", &e))?;
        let health_task = tokio::spawn(services.health.run());
        let mut listeners = JoinSet::new();
        let (public_tls, stop_public) = (tls.public.clone(), stop.clone());
        listeners.spawn(async move {
            public.serve(self.public, public_tls, services.public, stop_public).await;
            Ok(())
        });
        let mutual = [("stations", services.stations, self.line), ("officers", services.officers, self.officer)];
        for (clients, service, listener) in mutual {
            let (tls, stop) = (tls.mutual.clone(), stop.clone());
            listeners.spawn(async move {
                let served = service.serve(listener, tls, stop).await;
                served.map_err(|e| transport(clients, &e))
            });
        }
        let ended = end(&mut listeners, stop).await;
        health_task.abort();
        ended
    }
}

/// Waits for `stop`, then for the drain up to its time limit. If a listener ends by itself, serving ends.
async fn end(listeners: &mut JoinSet<Result<(), ServeError>>, stop: watch::Receiver<bool>) -> Result<(), ServeError> {
    let failed = |e: tokio::task::JoinError| ServeError::Transport { clients: "a listener", cause: e.to_string() };
    tokio::select! {
        Some(ended) = listeners.join_next() => return ended.map_err(failed)?,
        () = stopped(stop) => {}
    }
    let drained = tokio::time::timeout(DRAIN, async {
        while let Some(ended) = listeners.join_next().await {
            ended.map_err(failed)??;
        }
        Ok(())
    });
    drained.await.unwrap_or_else(|_| {
        tracing::warn!(after = ?DRAIN, "drain timed out with calls still in flight; clients can repeat them");
        Ok(())
    })
}

fn transport(clients: &'static str, error: &dyn std::error::Error) -> ServeError {
    ServeError::Transport { clients, cause: with_sources(error) }
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
