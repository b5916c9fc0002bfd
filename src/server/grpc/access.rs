//! The `Access` service: certificates, approvals, revocations, identities and the audit log.

use std::sync::Arc;

use spp_format::certificate::Caller;
use spp_format::keys::sha256;
use spp_proto as proto;
use spp_proto::access_server::Access;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, async_trait};

use super::call_gate::{AuditedCall, CallGate};
use super::{access_messages, callers};
use crate::access::{self, AccessControl, AccessError};
use crate::audit::{Auditor, Entry, Outcome};
use crate::provisioning::Provisioner;
use crate::server::call_error::CallError;

/// Number of audit-log chunks to buffer for a slow reader.
const CHUNK_BUFFER: usize = 4;

pub(super) struct AccessService {
    pub(super) access_control: Arc<AccessControl>,
    pub(super) provisioner: Arc<Provisioner>,
    pub(super) auditor: Arc<Auditor>,
    pub(super) gate: CallGate,
}

/// Records an officer's complete signed statement before it takes effect, and then the outcome.
async fn record_statement(
    auditor: &Auditor,
    begun: Entry,
    work: impl Future<Output = Result<access::ApprovalRequest, AccessError>>,
) -> Result<access::ApprovalRequest, CallError> {
    auditor.record(begun.clone()).await?;
    let result = work.await.map_err(CallError::from);
    let ended = match &result {
        Ok(request) => begun.ended(Outcome::Done).with("state", request.state.name()),
        Err(error) => begun.ended(Outcome::Refused(error.to_string())),
    };
    auditor.record(ended.without(access_messages::STATEMENT_FIELDS)).await?;
    result
}

#[async_trait]
impl Access for AccessService {
    async fn renew_certificate(
        &self,
        request: Request<proto::RenewCertificateRequest>,
    ) -> Result<Response<proto::RenewCertificateResponse>, Status> {
        let (present, access_control) = (callers::certificate(&request)?, Arc::clone(&self.access_control));
        let audited = AuditedCall::new("Access.RenewCertificate", "certificate.renew", &present.caller)
            .record_start()
            .audit_fields(|issued: &proto::RenewCertificateResponse| {
                access_messages::certificate_audit_fields(issued.certificate.as_ref())
            });
        let work = async move {
            let issued = access_control.renew(&present, &request.get_ref().csr).await?;
            Ok(proto::RenewCertificateResponse { certificate: Some(access_messages::certificate(issued)) })
        };
        self.gate.call_audited(audited, work).await
    }

    async fn enroll_caller(
        &self,
        request: Request<proto::EnrollCallerRequest>,
    ) -> Result<Response<proto::EnrollCallerResponse>, Status> {
        let (officer, access_control) = (callers::officer(&request)?, Arc::clone(&self.access_control));
        let message = request.get_ref();
        let audited = AuditedCall::new("Access.EnrollCaller", "caller.enroll", &Caller::Officer(officer.clone()))
            .with("csr_sha256", hex::encode(sha256(&message.csr)))
            .with("role", &message.role)
            .with("name", &message.name)
            .record_start()
            .audit_fields(|issued: &proto::EnrollCallerResponse| {
                access_messages::certificate_audit_fields(issued.certificate.as_ref())
            });
        let work = async move {
            let (caller, days) = access_messages::enrolment(request.get_ref())?;
            let issued = access_control.enroll(caller, &request.get_ref().csr, days, &officer).await?;
            Ok(proto::EnrollCallerResponse { certificate: Some(access_messages::certificate(issued)) })
        };
        self.gate.call_audited(audited, work).await
    }

    async fn list_callers(
        &self,
        request: Request<proto::ListCallersRequest>,
    ) -> Result<Response<proto::ListCallersResponse>, Status> {
        let caller = callers::any(&request)?.to_string();
        let (access_control, provisioner) = (Arc::clone(&self.access_control), Arc::clone(&self.provisioner));
        let work = async move { access_messages::callers(&access_control, &provisioner).await };
        self.gate.call("Access.ListCallers", caller, work).await
    }

    async fn request_approval(
        &self,
        request: Request<proto::RequestApprovalRequest>,
    ) -> Result<Response<proto::RequestApprovalResponse>, Status> {
        let (officer, certificate) = (callers::officer(&request)?, callers::certificate_der(&request)?);
        let (access_control, auditor, caller) =
            (Arc::clone(&self.access_control), Arc::clone(&self.auditor), Caller::Officer(officer.clone()));
        let by = caller.to_string();
        let work = async move {
            let ready = access_control
                .prepare_request(access_messages::submission(officer, certificate, request.into_inner())?)
                .await?;
            let entry = access_messages::statement_entry(
                &caller,
                "approval.request",
                ready.id,
                &ready.action,
                &ready.requested,
            );
            let filed = record_statement(&auditor, entry, access_control.file(ready)).await?;
            Ok(proto::RequestApprovalResponse {
                approval: Some(access_messages::approval(filed, access_control.now())),
            })
        };
        self.gate.call("Access.RequestApproval", by, work).await
    }

    async fn list_approvals(
        &self,
        request: Request<proto::ListApprovalsRequest>,
    ) -> Result<Response<proto::ListApprovalsResponse>, Status> {
        let (caller, access_control) = (callers::any(&request)?.to_string(), Arc::clone(&self.access_control));
        let work = async move {
            let (requests, rules, now) =
                (access_control.requests().await?, access_control.rules().await?, access_control.now());
            Ok(proto::ListApprovalsResponse {
                approvals: requests.into_iter().map(|request| access_messages::listed(request, now)).collect(),
                rules: Some(access_messages::rules(&rules)),
                node: access_control.node().to_owned(),
            })
        };
        self.gate.call("Access.ListApprovals", caller, work).await
    }

    async fn get_approval(
        &self,
        request: Request<proto::GetApprovalRequest>,
    ) -> Result<Response<proto::GetApprovalResponse>, Status> {
        let (caller, access_control) = (callers::any(&request)?.to_string(), Arc::clone(&self.access_control));
        let work = async move {
            let request =
                access_control.request_by_id(access_messages::request_id("id", &request.get_ref().id)?).await?;
            Ok(proto::GetApprovalResponse { approval: Some(access_messages::approval(request, access_control.now())) })
        };
        self.gate.call("Access.GetApproval", caller, work).await
    }

    async fn decide_approval(
        &self,
        request: Request<proto::DecideApprovalRequest>,
    ) -> Result<Response<proto::DecideApprovalResponse>, Status> {
        let (officer, certificate) = (callers::officer(&request)?, callers::certificate_der(&request)?);
        let (access_control, auditor, caller) =
            (Arc::clone(&self.access_control), Arc::clone(&self.auditor), Caller::Officer(officer.clone()));
        let by = caller.to_string();
        let work = async move {
            let message = request.into_inner();
            let (id, verdict) = access_messages::decision(&message)?;
            let ready = access_control.prepare_decision(officer, &certificate, id, verdict, &message.signature).await?;
            let action = if message.approve { "approval.approve" } else { "approval.reject" };
            let entry = access_messages::statement_entry(&caller, action, id, &ready.action, &ready.signed);
            let decided =
                record_statement(&auditor, entry.with("reason", message.reason), access_control.decide(ready)).await?;
            Ok(proto::DecideApprovalResponse {
                approval: Some(access_messages::approval(decided, access_control.now())),
            })
        };
        self.gate.call("Access.DecideApproval", by, work).await
    }

    async fn use_approval(
        &self,
        request: Request<proto::UseApprovalRequest>,
    ) -> Result<Response<proto::UseApprovalResponse>, Status> {
        let (officer, access_control, message) =
            (callers::officer(&request)?, Arc::clone(&self.access_control), request.get_ref());
        let audited = AuditedCall::new("Access.UseApproval", "ceremony.begin", &Caller::Officer(officer.clone()))
            .with("request", hex::encode(&message.id))
            .with("file_sha256", hex::encode(&message.file_sha256))
            .record_start();
        let work = async move {
            let id = access_messages::request_id("id", &request.get_ref().id)?;
            let used = access_control.consume_approval(&officer, id, &request.get_ref().file_sha256).await?;
            Ok(proto::UseApprovalResponse { approval: Some(access_messages::approval(used, access_control.now())) })
        };
        self.gate.call_audited(audited, work).await
    }

    async fn record_ceremony(
        &self,
        request: Request<proto::RecordCeremonyRequest>,
    ) -> Result<Response<proto::RecordCeremonyResponse>, Status> {
        let officer = Caller::Officer(callers::officer(&request)?);
        let audited = access_messages::ceremony(
            AuditedCall::new("Access.RecordCeremony", "ceremony.end", &officer),
            request.get_ref(),
        );
        let work = async move {
            access_messages::check_ceremony(request.get_ref())?;
            Ok(proto::RecordCeremonyResponse {})
        };
        self.gate.call_audited(audited, work).await
    }

    type ReadAuditLogStream = ReceiverStream<Result<proto::ReadAuditLogResponse, Status>>;

    async fn read_audit_log(
        &self,
        request: Request<proto::ReadAuditLogRequest>,
    ) -> Result<Response<Self::ReadAuditLogStream>, Status> {
        let (caller, log) = (callers::any(&request)?.to_string(), Arc::clone(self.auditor.log()));
        let work = async move {
            let offset = request.get_ref().offset;
            let first = log.read(offset).await?.ok_or_else(|| {
                CallError::invalid(
                    "offset",
                    format!("offset {offset} is beyond the end of the log: it is another log, or was truncated"),
                )
            })?;
            let (sender, receiver) = mpsc::channel(CHUNK_BUFFER);
            tokio::spawn(access_messages::send_log(log, offset, first, sender));
            Ok(ReceiverStream::new(receiver))
        };
        self.gate.call("Access.ReadAuditLog", caller, work).await
    }

    async fn load_identities(
        &self,
        request: Request<proto::LoadIdentitiesRequest>,
    ) -> Result<Response<proto::LoadIdentitiesResponse>, Status> {
        let officer = Caller::Officer(callers::officer(&request)?);
        let (access_control, provisioner, message) =
            (Arc::clone(&self.access_control), Arc::clone(&self.provisioner), request.get_ref());
        let audited = AuditedCall::new("Access.LoadIdentities", "identities.load", &officer)
            .with("profile", &message.profile)
            .with("first", &message.first)
            .record_start()
            .audit_fields(|loaded: &proto::LoadIdentitiesResponse| {
                access_messages::range_audit_fields(loaded.range.as_ref())
            });
        let work = async move {
            let (profile, range) = access_messages::identities(request.get_ref(), &provisioner)?;
            let loaded = access_control.load_range(profile, range, &officer).await?;
            Ok(proto::LoadIdentitiesResponse { range: Some(access_messages::range(loaded)) })
        };
        self.gate.call_audited(audited, work).await
    }

    async fn list_identities(
        &self,
        request: Request<proto::ListIdentitiesRequest>,
    ) -> Result<Response<proto::ListIdentitiesResponse>, Status> {
        let (caller, access_control) = (callers::any(&request)?.to_string(), Arc::clone(&self.access_control));
        let work = async move {
            let ranges = access_control.ranges().await?.into_iter().map(access_messages::range).collect();
            Ok(proto::ListIdentitiesResponse { ranges })
        };
        self.gate.call("Access.ListIdentities", caller, work).await
    }
}
