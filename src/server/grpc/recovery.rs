//! The `Recovery` service. It needs no role, because it serves public data only.

use std::sync::Arc;

use spp_proto as proto;
use spp_proto::recovery_server::Recovery;
use tonic::{Request, Response, Status, async_trait};

use super::call_gate::CallGate;
use super::messages::{self, ProofOf};
use crate::provisioning::{ProvisionError, Provisioner};

pub(super) struct RecoveryService {
    pub(super) provisioner: Arc<Provisioner>,
    pub(super) gate: CallGate,
}

#[async_trait]
impl Recovery for RecoveryService {
    async fn get_record(
        &self,
        request: Request<proto::GetRecordRequest>,
    ) -> Result<Response<proto::GetRecordResponse>, Status> {
        let (provisioner, caller) = self.provisioner_and_caller(&request);
        let work = async move {
            let chip = messages::chip_id(&request.get_ref().chip_id)?;
            Ok(messages::record(provisioner.recover(&chip).await?))
        };
        self.gate.call("Recovery.GetRecord", caller, work).await
    }

    async fn get_proof(
        &self,
        request: Request<proto::GetProofRequest>,
    ) -> Result<Response<proto::GetProofResponse>, Status> {
        let (provisioner, caller) = self.provisioner_and_caller(&request);
        let work = async move {
            let index = match messages::proof_request(request.get_ref())? {
                ProofOf::Chip(chip) => provisioner.recover(&chip).await?.publication.index,
                ProofOf::Index(index) => index,
            };
            let tlog_proof = provisioner.prove(index).await?.to_bytes();
            Ok(proto::GetProofResponse { record_index: index, tlog_proof })
        };
        self.gate.call("Recovery.GetProof", caller, work).await
    }

    async fn get_checkpoint(
        &self,
        request: Request<proto::GetCheckpointRequest>,
    ) -> Result<Response<proto::GetCheckpointResponse>, Status> {
        let (provisioner, caller) = self.provisioner_and_caller(&request);
        let work = async move {
            let checkpoint = provisioner.registry().checkpoint().await?;
            let checkpoint = checkpoint.ok_or_else(|| ProvisionError::Unsigned("no checkpoint yet".to_owned()))?;
            Ok(messages::checkpoint(&checkpoint))
        };
        self.gate.call("Recovery.GetCheckpoint", caller, work).await
    }
}

impl RecoveryService {
    /// Returns the provisioner, and the caller's address for the log.
    fn provisioner_and_caller<T>(&self, request: &Request<T>) -> (Arc<Provisioner>, String) {
        let caller = request.remote_addr().map_or_else(String::new, |address| address.ip().to_string());
        (Arc::clone(&self.provisioner), caller)
    }
}
