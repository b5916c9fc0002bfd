//! The service `Line`. Role: station.

use std::sync::Arc;

use tonic::{Request, Response, Status, async_trait};

use super::door::Door;
use super::{callers, messages};
use crate::proto;
use crate::proto::line_server::Line;
use crate::provisioning::Provisioner;

pub(super) struct LineService {
    pub(super) provisioner: Arc<Provisioner>,
    pub(super) door: Door,
}

#[async_trait]
impl Line for LineService {
    async fn assemble(
        &self,
        request: Request<proto::AssembleRequest>,
    ) -> Result<Response<proto::AssembleResponse>, Status> {
        let station = callers::station(&request)?;
        let (provisioner, caller) = (Arc::clone(&self.provisioner), station.to_string());
        let work = async move {
            let order = messages::order(station, request.get_ref())?;
            provisioner.assemble(order).await.map(messages::assembled)
        };
        self.door.call("Line.Assemble", caller, work).await
    }

    async fn complete(
        &self,
        request: Request<proto::CompleteRequest>,
    ) -> Result<Response<proto::CompleteResponse>, Status> {
        let station = callers::station(&request)?;
        let (provisioner, caller) = (Arc::clone(&self.provisioner), station.to_string());
        let work = async move {
            let completion = messages::completion(station, request.into_inner())?;
            let receipt = provisioner.complete(completion).await?;
            Ok(proto::CompleteResponse { receipt: Some(messages::proven_receipt(&receipt)) })
        };
        self.door.call("Line.Complete", caller, work).await
    }

    async fn abort(&self, request: Request<proto::AbortRequest>) -> Result<Response<proto::AbortResponse>, Status> {
        let station = callers::station(&request)?;
        let (provisioner, caller) = (Arc::clone(&self.provisioner), station.to_string());
        let work = async move {
            let (session, reason) = messages::abort(request.get_ref())?;
            provisioner.abort(&station, session, reason).await?;
            Ok(proto::AbortResponse {})
        };
        self.door.call("Line.Abort", caller, work).await
    }

    async fn get_session(
        &self,
        request: Request<proto::GetSessionRequest>,
    ) -> Result<Response<proto::GetSessionResponse>, Status> {
        let station = callers::station(&request)?;
        let (provisioner, caller) = (Arc::clone(&self.provisioner), station.to_string());
        let work = async move {
            let which = messages::session_view(request.get_ref())?;
            provisioner.view(&station, &which).await.map(|session| messages::session(&session))
        };
        self.door.call("Line.GetSession", caller, work).await
    }
}
