//! The three listeners: stations and officers with mutual TLS, the public one without a client certificate, which speaks HTTP,
//! too (`web`); and the drain.

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
use super::officer::{House, OfficerService};
use super::production::ProductionService;
use super::recovery::RecoveryService;
use super::roles::Guard;
use super::{health, mutual};
use crate::config::Listen;
use crate::connections::{TlsInForce, stopped};
use crate::proto::DESCRIPTORS;
use crate::proto::access_server::AccessServer;
use crate::proto::line_server::LineServer;
use crate::proto::officer_server::OfficerServer;
use crate::proto::production_server::ProductionServer;
use crate::proto::recovery_server::RecoveryServer;
use crate::provisioning::Provisioner;
use crate::web::Public;

/// Most bytes of a request: a backup, a confirmation, and what is around them.
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
        tls: &TlsInForce,
        public: Public,
        provisioner: &Arc<Provisioner>,
        house: House,
        stop: watch::Receiver<bool>,
    ) -> Result<(), ServeError> {
        let (reporter, health) = tonic_health::server::health_reporter();
        let reporting = tokio::spawn(health::report(reporter, Arc::clone(provisioner)));
        let auditor = &Arc::clone(&house.auditor);
        let of_line = CallGate::line(auditor);
        let line = LineServer::new(LineService { provisioner: Arc::clone(provisioner), door: of_line.clone() })
            .max_decoding_message_size(MAX_REQUEST);
        let door = CallGate::officer(auditor);
        let (desk, audit) = (Arc::clone(&house.desk), Arc::clone(auditor.log()));
        let production = ProductionService { provisioner: Arc::clone(provisioner), door: door.clone(), audit };
        let production = ProductionServer::new(production).max_decoding_message_size(MAX_REQUEST);
        let officer = OfficerService { provisioner: Arc::clone(provisioner), house, door: door.clone() };
        let officer = OfficerServer::new(officer).max_decoding_message_size(MAX_REQUEST);
        let guard = Guard { standing: Arc::clone(desk.standing()), auditor: Arc::clone(auditor) };
        // A door of its own for each listener: renewals of stations hold up no officer.
        let access = |door| {
            let (desk, provisioner, auditor) = (Arc::clone(&desk), Arc::clone(provisioner), Arc::clone(auditor));
            AccessServer::new(AccessService { desk, provisioner, auditor, door }).max_decoding_message_size(MAX_REQUEST)
        };
        let recovery =
            RecoveryServer::new(RecoveryService { provisioner: Arc::clone(provisioner), door: CallGate::public() })
                .max_decoding_message_size(MAX_REQUEST);

        let guarded = || {
            let guard = guard.clone();
            FilterLayer::new(move |request: http::Request<tonic::body::Body>| guard.admit(request))
        };
        let stations = builder().layer(guarded()).add_service(line).add_service(access(of_line));
        let officers =
            builder().layer(guarded()).add_service(officer).add_service(access(door)).add_service(production);
        // gRPC beside HTTP: the public listener speaks both.
        let grpc = Routes::new(recovery).add_service(health.clone()).add_service(reflection("the public")?);
        let grpc = grpc.prepare().into_axum_router();

        let mut serving = JoinSet::new();
        let (public_tls, stop_public) = (tls.public.clone(), stop.clone());
        serving.spawn(async move {
            public.serve(self.public, public_tls, grpc, stop_public).await;
            Ok(())
        });
        for (whom, router, listener) in [("stations", stations, self.line), ("officers", officers, self.officer)] {
            let reflection = reflection(whom)?;
            let router = router.add_service(health.clone()).add_service(reflection);
            let incoming = mutual::connections(listener, tls.mutual.clone());
            let stopped = stopped(stop.clone());
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

fn builder() -> Server {
    Server::builder()
        .timeout(CALL_LIMIT)
        .max_concurrent_streams(MAX_STREAMS)
        .concurrency_limit_per_connection(MAX_STREAMS as usize)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
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

/// Waits for the stop, then for the drain, at most so long. A listener that ends by itself ends them all.
async fn end(serving: &mut JoinSet<Result<(), ServeError>>, stop: watch::Receiver<bool>) -> Result<(), ServeError> {
    let failed = |e: tokio::task::JoinError| ServeError::Transport { whom: "a listener", cause: e.to_string() };
    tokio::select! {
        Some(ended) = serving.join_next() => return ended.map_err(failed)?,
        () = stopped(stop) => {}
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
