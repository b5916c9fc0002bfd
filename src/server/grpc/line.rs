//! The `Line` service. Role: station.

use std::sync::Arc;

use spp_format::certificate::Caller;
use spp_proto as proto;
use spp_proto::line_server::Line;
use tonic::{Request, Response, Status, async_trait};

use super::call_gate::{AuditedCall, CallGate};
use super::{callers, messages};
use crate::provisioning::Provisioner;

pub(super) struct LineService {
    pub(super) provisioner: Arc<Provisioner>,
    pub(super) gate: CallGate,
}

#[async_trait]
impl Line for LineService {
    async fn assemble(
        &self,
        request: Request<proto::AssembleRequest>,
    ) -> Result<Response<proto::AssembleResponse>, Status> {
        let station = callers::station(&request)?;
        let (provisioner, message) = (Arc::clone(&self.provisioner), request.get_ref());
        let audited = AuditedCall::new("Line.Assemble", "line.assemble", &Caller::Station(station.clone()))
            .with("chip", hex::encode(&message.chip_id))
            .with("identity", &message.identity)
            .with("profile", &message.profile)
            .audit_fields(|assembled: &proto::AssembleResponse| vec![("session", hex::encode(&assembled.session_id))]);
        let work = async move {
            let order = messages::order(station, request.get_ref())?;
            Ok(messages::assembled(provisioner.assemble(order).await?))
        };
        self.gate.call_audited(audited, work).await
    }

    async fn complete(
        &self,
        request: Request<proto::CompleteRequest>,
    ) -> Result<Response<proto::CompleteResponse>, Status> {
        let station = callers::station(&request)?;
        let provisioner = Arc::clone(&self.provisioner);
        let audited = AuditedCall::new("Line.Complete", "line.complete", &Caller::Station(station.clone()))
            .with("session", hex::encode(&request.get_ref().session_id))
            .audit_fields(messages::completion_audit_fields);
        let work = async move {
            let completion = messages::completion(station, request.into_inner())?;
            let receipt = provisioner.complete(completion).await?;
            Ok(proto::CompleteResponse { receipt: Some(messages::proven_receipt(&receipt)) })
        };
        self.gate.call_audited(audited, work).await
    }

    async fn abort(&self, request: Request<proto::AbortRequest>) -> Result<Response<proto::AbortResponse>, Status> {
        let station = callers::station(&request)?;
        let (provisioner, message) = (Arc::clone(&self.provisioner), request.get_ref());
        let audited = AuditedCall::new("Line.Abort", "line.abort", &Caller::Station(station.clone()))
            .with("session", hex::encode(&message.session_id))
            .with("reason", &message.reason);
        let work = async move {
            let (session, reason) = messages::abort(request.get_ref())?;
            provisioner.abort(&station, session, reason).await?;
            Ok(proto::AbortResponse {})
        };
        self.gate.call_audited(audited, work).await
    }

    async fn get_session(
        &self,
        request: Request<proto::GetSessionRequest>,
    ) -> Result<Response<proto::GetSessionResponse>, Status> {
        let station = callers::station(&request)?;
        let (provisioner, caller) = (Arc::clone(&self.provisioner), Caller::Station(station.clone()).to_string());
        let work = async move {
            let view = messages::session_view(request.get_ref())?;
            Ok(messages::session(&provisioner.view(&station, &view).await?))
        };
        self.gate.call("Line.GetSession", caller, work).await
    }
}
