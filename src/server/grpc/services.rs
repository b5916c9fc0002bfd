//! Assembles the gRPC services of each listener, with authorization and admission control.

use std::sync::Arc;
use std::time::Duration;

use spp_proto::DESCRIPTORS;
use spp_proto::access_server::AccessServer;
use spp_proto::line_server::LineServer;
use spp_proto::officer_server::OfficerServer;
use spp_proto::production_server::ProductionServer;
use spp_proto::recovery_server::RecoveryServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::codegen::http;
use tonic::service::Routes;
use tonic::transport::Server;
use tower::filter::FilterLayer;

use super::access::AccessService;
use super::call_gate::CallGate;
use super::health::HealthReports;
use super::line::LineService;
use super::mutual;
use super::officer::{OfficerContext, OfficerService};
use super::production::ProductionService;
use super::recovery::RecoveryService;
use super::roles::Authorizer;
use crate::provisioning::Provisioner;
use crate::server::connections::{Tls, stopped};

/// Maximum size of a request in bytes: a backup, a confirmation and their framing.
const MAX_REQUEST: usize = 64 * 1024;
/// Maximum number of concurrent calls per connection; a station needs one per device in progress.
const MAX_STREAMS: u32 = 256;
/// Time limit of a call. The layers below have shorter limits.
const CALL_LIMIT: Duration = Duration::from_secs(60);

/// The gRPC services of the three listeners. All of them serve health and reflection.
pub(in crate::server) struct Services {
    pub(in crate::server) stations: MutualServices,
    pub(in crate::server) officers: MutualServices,
    /// For the public listener, which authorizes no one and serves HTTP, too.
    pub(in crate::server) public: axum::Router,
    pub(in crate::server) health: HealthReports,
}

/// The services of a listener with mutual TLS.
pub(in crate::server) struct MutualServices {
    routes: Routes,
    authorizer: Authorizer,
}

impl Services {
    /// Creates the services.
    pub(in crate::server) fn new(
        provisioner: &Arc<Provisioner>,
        context: OfficerContext,
    ) -> Result<Self, tonic_reflection::server::Error> {
        let (reporter, health) = tonic_health::server::health_reporter();
        let auditor = &Arc::clone(&context.auditor);
        let (access_control, audit) = (Arc::clone(&context.access_control), Arc::clone(auditor.log()));
        let authorizer =
            Authorizer { revocations: Arc::clone(access_control.revocation_list()), auditor: Arc::clone(auditor) };
        let (line_gate, officer_gate) = (CallGate::line(auditor), CallGate::officer(auditor));

        let line = LineServer::new(LineService { provisioner: Arc::clone(provisioner), gate: line_gate.clone() })
            .max_decoding_message_size(MAX_REQUEST);
        let production = ProductionService { provisioner: Arc::clone(provisioner), gate: officer_gate.clone(), audit };
        let production = ProductionServer::new(production).max_decoding_message_size(MAX_REQUEST);
        let officer = OfficerService { provisioner: Arc::clone(provisioner), context, gate: officer_gate.clone() };
        let officer = OfficerServer::new(officer).max_decoding_message_size(MAX_REQUEST);
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

        let reflection = reflection()?;
        let with_health = |routes: Routes| routes.add_service(health.clone()).add_service(reflection.clone());
        let stations = with_health(Routes::new(line).add_service(access(line_gate)));
        let officers = with_health(Routes::new(officer).add_service(access(officer_gate)).add_service(production));
        Ok(Self {
            stations: MutualServices { routes: stations, authorizer: authorizer.clone() },
            officers: MutualServices { routes: officers, authorizer },
            public: with_health(Routes::new(recovery)).prepare().into_axum_router(),
            health: HealthReports { reporter, provisioner: Arc::clone(provisioner) },
        })
    }
}

impl MutualServices {
    /// Serves until `stop` is true, then finishes the calls in flight.
    pub(in crate::server) async fn serve(
        self,
        listener: TcpListener,
        tls: Tls,
        stop: watch::Receiver<bool>,
    ) -> Result<(), tonic::transport::Error> {
        let Self { routes, authorizer } = self;
        let authorize = move |request: http::Request<tonic::body::Body>| authorizer.authorize(request);
        Server::builder()
            .timeout(CALL_LIMIT)
            .max_concurrent_streams(MAX_STREAMS)
            .concurrency_limit_per_connection(MAX_STREAMS as usize)
            .http2_keepalive_interval(Some(Duration::from_secs(30)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .layer(FilterLayer::new(authorize))
            .add_routes(routes)
            .serve_with_incoming_shutdown(mutual::connections(listener, tls), stopped(stop))
            .await
    }
}

fn reflection() -> Result<
    tonic_reflection::server::v1::ServerReflectionServer<impl tonic_reflection::server::v1::ServerReflection>,
    tonic_reflection::server::Error,
> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
}
