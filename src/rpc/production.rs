//! The service `Production`, beside `Officer`. Who may call what of it is in the table of the roles.

use std::sync::Arc;

use tonic::{Request, Response, Status, async_trait};

use super::call_gate::CallGate;
use super::pool::outcome;
use super::{callers, reports};
use crate::audit::{AuditLog, Entry, Outcome};
use crate::certificate::Caller;
use crate::names::{OfficerName, SessionId};
use crate::proto;
use crate::proto::production_server::Production;
use crate::provisioning::{ProvisionError, Provisioner};
use crate::store::Session;

pub(super) struct ProductionService {
    pub(super) provisioner: Arc<Provisioner>,
    /// The officers' own: all of them together are let in so many at once.
    pub(super) door: CallGate,
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
            provisioner.production(hours, by).await.map(reports::production)
        };
        self.door.call("Production.GetProduction", caller, work).await
    }

    async fn get_device(
        &self,
        request: Request<proto::GetDeviceRequest>,
    ) -> Result<Response<proto::GetDeviceResponse>, Status> {
        let (provisioner, caller) = (Arc::clone(&self.provisioner), callers::any(&request)?.to_string());
        let work = async move {
            let which = reports::which_device(request.into_inner())?;
            provisioner.device(which).await.map(|report| reports::device(&report))
        };
        self.door.call("Production.GetDevice", caller, work).await
    }

    async fn list_sessions(
        &self,
        request: Request<proto::ListSessionsRequest>,
    ) -> Result<Response<proto::ListSessionsResponse>, Status> {
        let (provisioner, caller) = (Arc::clone(&self.provisioner), callers::any(&request)?.to_string());
        let work = async move {
            let (filter, after, limit) = reports::which_sessions(request.get_ref())?;
            provisioner.sessions(&filter, after, limit).await.map(|page| reports::sessions(&page))
        };
        self.door.call("Production.ListSessions", caller, work).await
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
            let given_up = abort(&provisioner, &audit, &officer, session, reason).await?;
            Ok(proto::AbortSessionResponse { session: Some(reports::session(&given_up)) })
        };
        self.door.call_on_record("Production.AbortSession", &caller, work).await
    }
}

/// Gives a session up, on record.
async fn abort(
    provisioner: &Provisioner,
    audit: &AuditLog,
    officer: &OfficerName,
    session: SessionId,
    reason: String,
) -> Result<Session, ProvisionError> {
    let entry = Entry::new(format!("officer {officer}"), "session.abort", Outcome::Begun);
    let mut entry = entry.with("session", session).with("reason", &reason);
    // So that the device's history is found by its chip, too.
    if let Some(known) = provisioner.journal().session(&session).await? {
        entry = entry.with("chip", &known.chip).with("identity", &known.identity).with("station", &known.station);
    }
    audit.record(entry.clone()).await?;
    let given_up = provisioner.abort_any(session, reason).await;
    audit.record(entry.ended(outcome(&given_up))).await?;
    given_up
}
