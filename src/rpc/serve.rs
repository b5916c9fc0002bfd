//! The three listeners and their drain: stations and officers with mutual TLS; the public listener without client certificates,
//! which also serves HTTP ([`crate::web`]).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::codegen::http;
use tonic::service::Routes;
use tonic::transport::Server;
use tower::filter::FilterLayer;

use super::access::AccessService;
use super::call_gate::CallGate;
use super::line::LineService;
use super::officer::{OfficerContext, OfficerService};
use super::production::ProductionService;
use super::recovery::RecoveryService;
use super::roles::Authorizer;
use super::{health, mutual};
use crate::config::Listen;
use crate::connections::{ActiveTls, stopped};
use crate::proto::DESCRIPTORS;
use crate::proto::access_server::AccessServer;
use crate::proto::line_server::LineServer;
use crate::proto::officer_server::OfficerServer;
use crate::proto::production_server::ProductionServer;
use crate::proto::recovery_server::RecoveryServer;
use crate::provisioning::Provisioner;
use crate::web::Public;

/// Maximum size of a request in bytes: a backup, a confirmation and their framing.
const MAX_REQUEST: usize = 64 * 1024;
/// Maximum number of concurrent calls per connection; a station needs one per device in progress.
const MAX_STREAMS: u32 = 256;
/// Time limit of a call. The layers below have shorter limits.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// Time limit of the drain.
const DRAIN: Duration = Duration::from_secs(30);

/// Why the gRPC listeners could not start, or stopped.
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
        let (reporter, health) = tonic_health::server::health_reporter();
        let health_task = tokio::spawn(health::report(reporter, Arc::clone(provisioner)));
        let auditor = &Arc::clone(&context.auditor);
        let line_gate = CallGate::line(auditor);
        let line = LineServer::new(LineService { provisioner: Arc::clone(provisioner), gate: line_gate.clone() })
            .max_decoding_message_size(MAX_REQUEST);
        let officer_gate = CallGate::officer(auditor);
        let (access_control, audit) = (Arc::clone(&context.access_control), Arc::clone(auditor.log()));
        let production = ProductionService { provisioner: Arc::clone(provisioner), gate: officer_gate.clone(), audit };
        let production = ProductionServer::new(production).max_decoding_message_size(MAX_REQUEST);
        let officer = OfficerService { provisioner: Arc::clone(provisioner), context, gate: officer_gate.clone() };
        let officer = OfficerServer::new(officer).max_decoding_message_size(MAX_REQUEST);
        let authorizer =
            Authorizer { revocations: Arc::clone(access_control.revocation_list()), auditor: Arc::clone(auditor) };
        // Each listener has its own gate, so that station renewals do not delay officers.
        let access = |gate| {
            let (access_control, provisioner, auditor) =
                (Arc::clone(&access_control), Arc::clone(provisioner), Arc::clone(auditor));
            AccessServer::new(AccessService { access_control, provisioner, auditor, gate })
                .max_decoding_message_size(MAX_REQUEST)
        };
        let recovery =
            RecoveryServer::new(RecoveryService { provisioner: Arc::clone(provisioner), gate: CallGate::public() })
                .max_decoding_message_size(MAX_REQUEST);

        let authorize = || {
            let authorizer = authorizer.clone();
            FilterLayer::new(move |request: http::Request<tonic::body::Body>| authorizer.authorize(request))
        };
        let stations = builder().layer(authorize()).add_service(line).add_service(access(line_gate));
        let officers =
            builder().layer(authorize()).add_service(officer).add_service(access(officer_gate)).add_service(production);
        // The public listener serves gRPC and HTTP.
        let grpc = Routes::new(recovery).add_service(health.clone()).add_service(reflection("the public")?);
        let grpc = grpc.prepare().into_axum_router();

        let mut listeners = JoinSet::new();
        let (public_tls, stop_public) = (tls.public.clone(), stop.clone());
        listeners.spawn(async move {
            public.serve(self.public, public_tls, grpc, stop_public).await;
            Ok(())
        });
        for (clients, router, listener) in [("stations", stations, self.line), ("officers", officers, self.officer)] {
            let reflection = reflection(clients)?;
            let router = router.add_service(health.clone()).add_service(reflection);
            let incoming = mutual::connections(listener, tls.mutual.clone());
            let stopped = stopped(stop.clone());
            listeners.spawn(async move {
                let served = router.serve_with_incoming_shutdown(incoming, stopped).await;
                served.map_err(|e| ServeError::Transport { clients, cause: with_sources(&e) })
            });
        }
        let ended = end(&mut listeners, stop).await;
        health_task.abort();
        ended
    }
}

fn builder() -> Server {
    Server::builder()
        .timeout(CALL_LIMIT)
        .max_concurrent_streams(MAX_STREAMS)
        .concurrency_limit_per_connection(MAX_STREAMS as usize)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
}

fn reflection(
    clients: &'static str,
) -> Result<
    tonic_reflection::server::v1::ServerReflectionServer<impl tonic_reflection::server::v1::ServerReflection>,
    ServeError,
> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|e| ServeError::Transport { clients, cause: e.to_string() })
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
