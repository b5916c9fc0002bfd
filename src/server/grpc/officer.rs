//! The `Officer` service. [`super::roles`] defines which roles may call each method.

use std::sync::Arc;

use spp_format::certificate::Caller;
use spp_proto as proto;
use spp_proto::officer_server::Officer;
use tonic::{Request, Response, Status, async_trait};

use super::call_gate::CallGate;
use super::health::{MissingDependency, line_unavailable_reason, missing_dependencies};
use super::{callers, messages, pool};
use crate::access::AccessControl;
use crate::audit::Auditor;
use crate::hsm::{CallStatistic, MemberStatus};
use crate::provisioning::Provisioner;
use crate::server::call_error::CallError;
use crate::server::reload::{Reloaded, Reloader};
use crate::store::{RegistryStatus, WitnessStatus};

/// Identifies the daemon in its status.
#[derive(Debug, Clone)]
pub struct NodeInfo {
    /// The node's name.
    pub name: String,
    /// Seconds since the Unix epoch.
    pub started: u64,
}

/// The parts of the daemon that officers inspect and control, besides provisioning.
#[derive(Clone)]
pub struct OfficerContext {
    /// The daemon's name and start time.
    pub node: NodeInfo,
    /// The audit log. State-changing calls are recorded; status queries are not.
    pub auditor: Arc<Auditor>,
    /// Approvals, callers and identity ranges.
    pub access_control: Arc<AccessControl>,
    /// Reloads the daemon's configuration.
    pub reloader: Arc<Reloader>,
}

pub(super) struct OfficerService {
    pub(super) provisioner: Arc<Provisioner>,
    pub(super) context: OfficerContext,
    pub(super) gate: CallGate,
}

#[async_trait]
impl Officer for OfficerService {
    async fn get_status(
        &self,
        request: Request<proto::GetStatusRequest>,
    ) -> Result<Response<proto::GetStatusResponse>, Status> {
        let caller = callers::any(&request)?.to_string();
        let (provisioner, context) = (Arc::clone(&self.provisioner), self.context.clone());
        self.gate.call("Officer.GetStatus", caller, async move { status(&provisioner, context).await }).await
    }

    async fn get_pool_status(
        &self,
        request: Request<proto::GetPoolStatusRequest>,
    ) -> Result<Response<proto::GetPoolStatusResponse>, Status> {
        let caller = callers::any(&request)?.to_string();
        let keys = Arc::clone(self.provisioner.pool());
        self.gate.call("Officer.GetPoolStatus", caller, async move { Ok(pool::status(keys.status().await?)) }).await
    }

    type FillPoolStream = pool::ProgressStream<proto::FillPoolResponse>;

    async fn fill_pool(
        &self,
        request: Request<proto::FillPoolRequest>,
    ) -> Result<Response<Self::FillPoolStream>, Status> {
        let officer = callers::officer(&request)?;
        let (keys, audit) = (Arc::clone(self.provisioner.pool()), Arc::clone(self.context.auditor.log()));
        let caller = Caller::Officer(officer.clone());
        let work = pool::fill(keys, audit, officer, request.into_inner());
        self.gate.call_self_audited("Officer.FillPool", &caller, work).await
    }

    type ShredPoolStream = pool::ProgressStream<proto::ShredPoolResponse>;

    async fn shred_pool(
        &self,
        request: Request<proto::ShredPoolRequest>,
    ) -> Result<Response<Self::ShredPoolStream>, Status> {
        let officer = callers::officer(&request)?;
        let (keys, audit) = (Arc::clone(self.provisioner.pool()), Arc::clone(self.context.auditor.log()));
        let caller = Caller::Officer(officer.clone());
        let work = pool::shred(keys, audit, officer, request.into_inner());
        self.gate.call_self_audited("Officer.ShredPool", &caller, work).await
    }

    async fn reload(&self, request: Request<proto::ReloadRequest>) -> Result<Response<proto::ReloadResponse>, Status> {
        let (reloader, caller) = (Arc::clone(&self.context.reloader), Caller::Officer(callers::officer(&request)?));
        let by = caller.to_string();
        let work = async move {
            let Reloaded { changes, fingerprint } = reloader.reload(&by).await?;
            Ok(proto::ReloadResponse { changes, configuration_sha256: fingerprint.to_vec() })
        };
        self.gate.call_self_audited("Officer.Reload", &caller, work).await
    }
}

async fn audit_status(auditor: &Auditor) -> Result<proto::AuditStatus, CallError> {
    let checkpoint = auditor.checkpoint();
    Ok(proto::AuditStatus {
        entries: auditor.log().head().await?.entries,
        covered: checkpoint.entries,
        checkpoint_error: checkpoint.last_error.unwrap_or_default(),
        writable: !auditor.log().is_broken(),
        lost_refusals: auditor.lost(),
    })
}

async fn status(provisioner: &Provisioner, context: OfficerContext) -> Result<proto::GetStatusResponse, CallError> {
    let node = context.node;
    let hsm = provisioner.hsm().status();
    let counts = provisioner.journal().counts().await?;
    let (free_bytes, free_bytes_floor) = provisioner.journal().disk_space()?;
    Ok(proto::GetStatusResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        node: node.name,
        started: Some(messages::timestamp(node.started)),
        ready: line_unavailable_reason(provisioner).is_none(),
        hsm: Some(proto::HsmStatus {
            ready: hsm.ready,
            error: hsm.error,
            calls_in_flight: hsm.calls_in_flight,
            queue: hsm.queue,
            members: hsm.members.into_iter().map(hsm_member).collect(),
        }),
        sessions: Some(proto::SessionCounts {
            reserved: counts.reserved,
            issued: counts.issued,
            published: counts.published,
            erased: counts.erased,
            aborted: counts.aborted,
        }),
        records: provisioner.registry().len().await?,
        audit: Some(audit_status(&context.auditor).await?),
        log: Some(log_status(provisioner.registry().status())),
        free_bytes,
        free_bytes_floor,
        services: missing_dependencies(provisioner).into_iter().map(service_status).collect(),
        profiles: provisioner.policy().profiles().map(ToString::to_string).collect(),
    })
}

fn log_status(status: RegistryStatus) -> proto::LogStatus {
    let witness = |witness: WitnessStatus| proto::WitnessStatus {
        name: witness.name,
        size: witness.size,
        error: witness.error.unwrap_or_default(),
    };
    proto::LogStatus {
        publish_error: status.publish_error.unwrap_or_default(),
        read_error: status.read_error.unwrap_or_default(),
        checkpoints: status.checkpoints,
        witnesses: status.witnesses.into_iter().map(witness).collect(),
    }
}

fn service_status((service, dependencies): (&str, Vec<MissingDependency>)) -> proto::ServiceStatus {
    let missing = dependencies
        .into_iter()
        .map(|missing| proto::MissingDependency { dependency: missing.dependency.to_owned(), reason: missing.reason });
    proto::ServiceStatus { service: service.to_owned(), missing: missing.collect() }
}

fn hsm_member(member: MemberStatus) -> proto::HsmMemberStatus {
    proto::HsmMemberStatus {
        calls: member.calls.iter().map(hsm_calls).collect(),
        name: member.name,
        ready: member.ready,
        error: member.error,
        module: member.module,
        token_label: member.token_label,
        token_serial: member.token_serial,
        worker_starts: member.worker_starts,
        calls_in_flight: member.calls_in_flight,
        calls_answered: member.calls_answered,
        background_calls_in_flight: member.background_calls_in_flight,
    }
}

fn hsm_calls(calls: &CallStatistic) -> proto::HsmCalls {
    let micros = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    proto::HsmCalls {
        operation: calls.operation.to_owned(),
        result: calls.outcome.to_owned(),
        count: calls.count,
        microseconds: micros(calls.took),
        median_microseconds: calls.median().map_or(0, micros),
    }
}
