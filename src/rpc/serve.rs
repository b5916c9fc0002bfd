//! The three listeners: stations and officers with mutual TLS, the public one without a client certificate, which speaks HTTP,
//! too (`web`); and the drain.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tower::filter::FilterLayer;

use super::door::Door;
use super::line::LineService;
use super::officer::{NodeInfo, OfficerService};
use super::production::ProductionService;
use super::recovery::RecoveryService;
use super::{health, roles};
use crate::audit::AuditLog;
use crate::config::{Listen, TlsConfig};
use crate::proto::DESCRIPTORS;
use crate::proto::line_server::LineServer;
use crate::proto::officer_server::OfficerServer;
use crate::proto::production_server::ProductionServer;
use crate::proto::recovery_server::RecoveryServer;
use crate::provisioning::Provisioner;
use crate::web::Public;

/// Most octets of a request: a backup, a confirmation, and what is around them.
const MAX_REQUEST: usize = 64 * 1024;
/// Calls at once on one connection; a station needs one per device it works on.
const MAX_STREAMS: u32 = 256;
/// No call takes longer; the rooms inside have shorter limits of their own.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// How long a drain waits for calls in flight.
const DRAIN: Duration = Duration::from_secs(30);

/// Why serving could not begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address is taken or not ours.
    #[error("listening on {address} for {whom}: {cause}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// For whom.
        whom: &'static str,
        /// Why not.
        cause: std::io::Error,
    },
    /// TLS or a connection's transport.
    #[error("serving {whom}: {cause}")]
    Transport {
        /// Whom.
        whom: &'static str,
        /// Why not.
        cause: String,
    },
}

/// Listeners that are bound; nothing is accepted yet.
pub struct Listening {
    line: TcpListener,
    officer: TcpListener,
    public: TcpListener,
}

impl Listening {
    /// Binds all three.
    pub async fn bind(listen: &Listen) -> Result<Self, ServeError> {
        let bind = async |address: SocketAddr, whom| {
            TcpListener::bind(address).await.map_err(|cause| ServeError::Bind { address, whom, cause })
        };
        Ok(Self {
            line: bind(listen.line, "stations").await?,
            officer: bind(listen.officer, "officers").await?,
            public: bind(listen.public, "the public").await?,
        })
    }

    /// Serves until `stop` is true, then drains: nothing new is accepted, calls in flight are finished.
    pub async fn serve(
        self,
        tls: &TlsConfig,
        public: Public,
        provisioner: &Arc<Provisioner>,
        audit: &Arc<AuditLog>,
        node: NodeInfo,
        stop: watch::Receiver<bool>,
    ) -> Result<(), ServeError> {
        let (reporter, health) = tonic_health::server::health_reporter();
        let reporting = tokio::spawn(health::report(reporter, Arc::clone(provisioner)));
        let line = LineServer::new(LineService { provisioner: Arc::clone(provisioner), door: Door::line() })
            .max_decoding_message_size(MAX_REQUEST);
        let (for_officers, audit) = (Arc::clone(provisioner), Arc::clone(audit));
        let door = Door::officer();
        let production =
            ProductionService { provisioner: Arc::clone(provisioner), door: door.clone(), audit: Arc::clone(&audit) };
        let production = ProductionServer::new(production).max_decoding_message_size(MAX_REQUEST);
        let officer = OfficerService { provisioner: for_officers, node, door, audit };
        let officer = OfficerServer::new(officer).max_decoding_message_size(MAX_REQUEST);
        let recovery =
            RecoveryServer::new(RecoveryService { provisioner: Arc::clone(provisioner), door: Door::public() })
                .max_decoding_message_size(MAX_REQUEST);

        let mutual = server_tls(tls)?.client_ca_root(Certificate::from_pem(&tls.client_ca));
        let door = || FilterLayer::new(roles::admit::<tonic::body::Body>);
        let stations = builder("stations", mutual.clone())?.layer(door()).add_service(line);
        let officers = builder("officers", mutual)?.layer(door()).add_service(officer).add_service(production);
        // gRPC beside HTTP: the public listener speaks both.
        let grpc = Routes::new(recovery).add_service(health.clone()).add_service(reflection("the public")?);
        let public_tls = tls.public_config(&[b"h2", b"http/1.1"]);
        let public_tls = public_tls.map_err(|cause| ServeError::Transport { whom: "the public", cause })?;
        let (stopped, grpc) = (stop.clone(), grpc.prepare().into_axum_router());

        let mut serving = JoinSet::new();
        serving.spawn(async move {
            public.serve(self.public, public_tls, grpc, stopped).await;
            Ok(())
        });
        for (whom, router, listener) in [("stations", stations, self.line), ("officers", officers, self.officer)] {
            let reflection = reflection(whom)?;
            let router = router.add_service(health.clone()).add_service(reflection);
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            let stopped = wait_for(stop.clone());
            serving.spawn(async move {
                let served = router.serve_with_incoming_shutdown(incoming, stopped).await;
                served.map_err(|e| ServeError::Transport { whom, cause: with_sources(&e) })
            });
        }
        let ended = end(&mut serving, stop).await;
        reporting.abort();
        ended
    }
}

fn builder(whom: &'static str, tls: ServerTlsConfig) -> Result<Server, ServeError> {
    Server::builder()
        .timeout(CALL_LIMIT)
        .max_concurrent_streams(MAX_STREAMS)
        .concurrency_limit_per_connection(MAX_STREAMS as usize)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .tls_config(tls)
        .map_err(|e| ServeError::Transport { whom, cause: with_sources(&e) })
}

fn server_tls(tls: &TlsConfig) -> Result<ServerTlsConfig, ServeError> {
    // Exposed to the TLS library, which keeps its own form of it.
    let identity = Identity::from_pem(&tls.identity.certificate, tls.identity.key.expose());
    Ok(ServerTlsConfig::new().identity(identity).timeout(Duration::from_secs(10)))
}

fn reflection(
    whom: &'static str,
) -> Result<
    tonic_reflection::server::v1::ServerReflectionServer<impl tonic_reflection::server::v1::ServerReflection>,
    ServeError,
> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|e| ServeError::Transport { whom, cause: e.to_string() })
}

async fn wait_for(mut stop: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is a stop as well.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Waits for the stop, then for the drain, at most so long. A listener that ends by itself ends them all.
async fn end(serving: &mut JoinSet<Result<(), ServeError>>, stop: watch::Receiver<bool>) -> Result<(), ServeError> {
    let failed = |e: tokio::task::JoinError| ServeError::Transport { whom: "a listener", cause: e.to_string() };
    tokio::select! {
        Some(ended) = serving.join_next() => return ended.map_err(failed)?,
        () = wait_for(stop) => {}
    }
    let drained = tokio::time::timeout(DRAIN, async {
        while let Some(ended) = serving.join_next().await {
            ended.map_err(failed)??;
        }
        Ok(())
    });
    drained.await.unwrap_or_else(|_| {
        tracing::warn!(after = ?DRAIN, "calls were still in flight at the end of the drain; they can be repeated");
        Ok(())
    })
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
