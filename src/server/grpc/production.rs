//! The `Production` service. [`super::roles`] defines which roles may call each method.

use std::sync::Arc;

use spp_format::certificate::Caller;
use spp_format::names::{OfficerName, SessionId};
use spp_proto as proto;
use spp_proto::production_server::Production;
use tonic::{Request, Response, Status, async_trait};

use super::call_gate::CallGate;
use super::pool::outcome;
use super::{callers, reports};
use crate::audit::{AuditLog, Entry, Outcome};
use crate::provisioning::Provisioner;
use crate::server::call_error::CallError;
use crate::store::Session;

pub(super) struct ProductionService {
    pub(super) provisioner: Arc<Provisioner>,
    /// Shared with the other services of the officer listener.
    pub(super) gate: CallGate,
    pub(super) audit: Arc<AuditLog>,
}

#[async_trait]
impl Production for ProductionService {
    async fn get_production(
        &self,
        request: Request<proto::GetProductionRequest>,
    ) -> Result<Response<proto::GetProductionResponse>, Status> {
        let (provisioner, caller) = (Arc::clone(&self.provisioner), callers::any(&request)?.to_string());
        let work = async move {
            let (hours, by) = reports::hours_and_rows(request.get_ref())?;
            Ok(reports::production(provisioner.production(hours, by).await?))
        };
        self.gate.call("Production.GetProduction", caller, work).await
    }

    async fn get_device(
        &self,
        request: Request<proto::GetDeviceRequest>,
    ) -> Result<Response<proto::GetDeviceResponse>, Status> {
        let (provisioner, caller) = (Arc::clone(&self.provisioner), callers::any(&request)?.to_string());
        let work = async move {
            let view = reports::device_view(request.into_inner())?;
            Ok(reports::device(&provisioner.device(view).await?))
        };
        self.gate.call("Production.GetDevice", caller, work).await
    }

    async fn list_sessions(
        &self,
        request: Request<proto::ListSessionsRequest>,
    ) -> Result<Response<proto::ListSessionsResponse>, Status> {
        let (provisioner, caller) = (Arc::clone(&self.provisioner), callers::any(&request)?.to_string());
        let work = async move {
            let (filter, after, limit) = reports::session_filter(request.get_ref())?;
            Ok(reports::sessions(&provisioner.sessions(&filter, after, limit).await?))
        };
        self.gate.call("Production.ListSessions", caller, work).await
    }

    async fn abort_session(
        &self,
        request: Request<proto::AbortSessionRequest>,
    ) -> Result<Response<proto::AbortSessionResponse>, Status> {
        let officer = callers::officer(&request)?;
        let (provisioner, audit) = (Arc::clone(&self.provisioner), Arc::clone(&self.audit));
        let caller = Caller::Officer(officer.clone());
        let work = async move {
            let (session, reason) = reports::abort(request.into_inner())?;
            let aborted = abort(&provisioner, &audit, &officer, session, reason).await?;
            Ok(proto::AbortSessionResponse { session: Some(reports::session(&aborted)) })
        };
        self.gate.call_self_audited("Production.AbortSession", &caller, work).await
    }
}

/// Aborts a session and records it.
async fn abort(
    provisioner: &Provisioner,
    audit: &AuditLog,
    officer: &OfficerName,
    session: SessionId,
    reason: String,
) -> Result<Session, CallError> {
    let entry = Entry::new(format!("officer {officer}"), "session.abort", Outcome::Begun);
    let mut entry = entry.with("session", session).with("reason", &reason);
    // Also record the chip, so that an auditor finds the device's history by it.
    if let Some(known) = provisioner.journal().session(&session).await? {
        entry = entry.with("chip", &known.chip).with("identity", &known.identity).with("station", &known.station);
    }
    audit.record(entry.clone()).await?;
    let aborted = provisioner.abort_any(session, reason).await.map_err(CallError::from);
    audit.record(entry.ended(outcome(&aborted))).await?;
    aborted
}
