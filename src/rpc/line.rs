//! The service `Line`. Role: station.

use std::sync::Arc;

use tonic::{Request, Response, Status, async_trait};

use super::call_gate::{AuditedCall, CallGate};
use super::{callers, messages};
use crate::certificate::Caller;
use crate::proto;
use crate::proto::line_server::Line;
use crate::provisioning::Provisioner;

pub(super) struct LineService {
    pub(super) provisioner: Arc<Provisioner>,
    pub(super) door: CallGate,
}

#[async_trait]
impl Line for LineService {
    async fn assemble(
        &self,
        request: Request<proto::AssembleRequest>,
    ) -> Result<Response<proto::AssembleResponse>, Status> {
        let station = callers::station(&request)?;
        let (provisioner, asked) = (Arc::clone(&self.provisioner), request.get_ref());
        let act = AuditedCall::new("Line.Assemble", "line.assemble", &Caller::Station(station.clone()))
            .with("chip", hex::encode(&asked.chip_id))
            .with("identity", &asked.identity)
            .with("profile", &asked.profile)
            .tell(|assembled: &proto::AssembleResponse| vec![("session", hex::encode(&assembled.session_id))]);
        let work = async move {
            let order = messages::order(station, request.get_ref())?;
            provisioner.assemble(order).await.map(messages::assembled)
        };
        self.door.act(act, work).await
    }

    async fn complete(
        &self,
        request: Request<proto::CompleteRequest>,
    ) -> Result<Response<proto::CompleteResponse>, Status> {
        let station = callers::station(&request)?;
        let provisioner = Arc::clone(&self.provisioner);
        let act = AuditedCall::new("Line.Complete", "line.complete", &Caller::Station(station.clone()))
            .with("session", hex::encode(&request.get_ref().session_id))
            .tell(messages::told_of_completion);
        let work = async move {
            let completion = messages::completion(station, request.into_inner())?;
            let receipt = provisioner.complete(completion).await?;
            Ok(proto::CompleteResponse { receipt: Some(messages::proven_receipt(&receipt)) })
        };
        self.door.act(act, work).await
    }

    async fn abort(&self, request: Request<proto::AbortRequest>) -> Result<Response<proto::AbortResponse>, Status> {
        let station = callers::station(&request)?;
        let (provisioner, asked) = (Arc::clone(&self.provisioner), request.get_ref());
        let act = AuditedCall::new("Line.Abort", "line.abort", &Caller::Station(station.clone()))
            .with("session", hex::encode(&asked.session_id))
            .with("reason", &asked.reason);
        let work = async move {
            let (session, reason) = messages::abort(request.get_ref())?;
            provisioner.abort(&station, session, reason).await?;
            Ok(proto::AbortResponse {})
        };
        self.door.act(act, work).await
    }

    async fn get_session(
        &self,
        request: Request<proto::GetSessionRequest>,
    ) -> Result<Response<proto::GetSessionResponse>, Status> {
        let station = callers::station(&request)?;
        let (provisioner, caller) = (Arc::clone(&self.provisioner), Caller::Station(station.clone()).to_string());
        let work = async move {
            let which = messages::session_view(request.get_ref())?;
            provisioner.view(&station, &which).await.map(|session| messages::session(&session))
        };
        self.door.call("Line.GetSession", caller, work).await
    }
}
