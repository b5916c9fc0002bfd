//! The service `Recovery`. No role: what it tells is public.

use std::sync::Arc;

use tonic::{Request, Response, Status, async_trait};

use super::door::Door;
use super::messages;
use crate::proto;
use crate::proto::recovery_server::Recovery;
use crate::provisioning::Provisioner;

pub(super) struct RecoveryService {
    pub(super) provisioner: Arc<Provisioner>,
    pub(super) door: Door,
}

#[async_trait]
impl Recovery for RecoveryService {
    async fn get_record(
        &self,
        request: Request<proto::GetRecordRequest>,
    ) -> Result<Response<proto::GetRecordResponse>, Status> {
        let provisioner = Arc::clone(&self.provisioner);
        let caller = request.remote_addr().map_or_else(String::new, |address| address.ip().to_string());
        let work = async move {
            let chip = messages::chip_id(&request.get_ref().chip_id)?;
            let (record, octets, publication) = provisioner.recover(&chip).await?;
            Ok(messages::record(record, octets, &publication))
        };
        self.door.call("Recovery.GetRecord", caller, work).await
    }
}
