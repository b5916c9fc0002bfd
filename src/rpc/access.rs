//! The service `Access`.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, async_trait};

use super::call_gate::{AuditedCall, CallGate};
use super::{access_messages, callers};
use crate::access::{self, AccessControl, AccessError};
use crate::audit::{Auditor, Entry, Outcome};
use crate::certificate::Caller;
use crate::keys::sha256;
use crate::proto;
use crate::proto::access_server::Access;
use crate::provisioning::{ProvisionError, Provisioner};

/// Parts of the audit log that may wait for a slow reader.
const CHUNKS: usize = 4;

pub(super) struct AccessService {
    pub(super) desk: Arc<AccessControl>,
    pub(super) provisioner: Arc<Provisioner>,
    pub(super) auditor: Arc<Auditor>,
    pub(super) door: CallGate,
}

/// What an officer signed is on record, whole, before it counts; and then how it stands.
async fn on_record(
    auditor: &Auditor,
    begun: Entry,
    work: impl Future<Output = Result<access::ApprovalRequest, AccessError>>,
) -> Result<access::ApprovalRequest, ProvisionError> {
    auditor.record(begun.clone()).await?;
    let done = work.await.map_err(ProvisionError::from);
    let ended = match &done {
        Ok(request) => begun.ended(Outcome::Done).with("state", request.state.name()),
        Err(error) => begun.ended(Outcome::Refused(error.to_string())),
    };
    auditor.record(ended.without(access_messages::SIGNED)).await?;
    done
}

#[async_trait]
impl Access for AccessService {
    async fn renew_certificate(
        &self,
        request: Request<proto::RenewCertificateRequest>,
    ) -> Result<Response<proto::RenewCertificateResponse>, Status> {
        let (present, desk) = (callers::certificate(&request)?, Arc::clone(&self.desk));
        let act = AuditedCall::new("Access.RenewCertificate", "certificate.renew", &present.caller).announced().tell(
            |made: &proto::RenewCertificateResponse| access_messages::told_of_certificate(made.certificate.as_ref()),
        );
        let work = async move {
            let made = desk.renew(&present, &request.get_ref().csr).await?;
            Ok(proto::RenewCertificateResponse { certificate: Some(access_messages::certificate(made)) })
        };
        self.door.act(act, work).await
    }

    async fn enroll_caller(
        &self,
        request: Request<proto::EnrollCallerRequest>,
    ) -> Result<Response<proto::EnrollCallerResponse>, Status> {
        let (officer, desk) = (callers::officer(&request)?, Arc::clone(&self.desk));
        let asked = request.get_ref();
        let act = AuditedCall::new("Access.EnrollCaller", "caller.enroll", &Caller::Officer(officer.clone()))
            .with("csr_sha256", hex::encode(sha256(&asked.csr)))
            .with("role", &asked.role)
            .with("name", &asked.name)
            .announced()
            .tell(|made: &proto::EnrollCallerResponse| access_messages::told_of_certificate(made.certificate.as_ref()));
        let work = async move {
            let (caller, days) = access_messages::enrolment(request.get_ref())?;
            let made = desk.enroll(caller, &request.get_ref().csr, days, &officer).await?;
            Ok(proto::EnrollCallerResponse { certificate: Some(access_messages::certificate(made)) })
        };
        self.door.act(act, work).await
    }

    async fn list_callers(
        &self,
        request: Request<proto::ListCallersRequest>,
    ) -> Result<Response<proto::ListCallersResponse>, Status> {
        let caller = callers::any(&request)?.to_string();
        let (desk, provisioner) = (Arc::clone(&self.desk), Arc::clone(&self.provisioner));
        let work = async move { access_messages::callers(&desk, &provisioner).await };
        self.door.call("Access.ListCallers", caller, work).await
    }

    async fn request_approval(
        &self,
        request: Request<proto::RequestApprovalRequest>,
    ) -> Result<Response<proto::RequestApprovalResponse>, Status> {
        let (officer, certificate) = (callers::officer(&request)?, callers::certificate_der(&request)?);
        let (desk, auditor, caller) =
            (Arc::clone(&self.desk), Arc::clone(&self.auditor), Caller::Officer(officer.clone()));
        let by = caller.to_string();
        let work = async move {
            let ready =
                desk.prepare_request(access_messages::asked(officer, certificate, request.into_inner())?).await?;
            let entry = access_messages::entry_of_statement(
                &caller,
                "approval.request",
                ready.id,
                &ready.act,
                &ready.requested,
            );
            let filed = on_record(&auditor, entry, desk.file(ready)).await?;
            Ok(proto::RequestApprovalResponse { approval: Some(access_messages::approval(filed, desk.now())) })
        };
        self.door.call("Access.RequestApproval", by, work).await
    }

    async fn list_approvals(
        &self,
        request: Request<proto::ListApprovalsRequest>,
    ) -> Result<Response<proto::ListApprovalsResponse>, Status> {
        let (caller, desk) = (callers::any(&request)?.to_string(), Arc::clone(&self.desk));
        let work = async move {
            let (requests, rules, now) = (desk.requests().await?, desk.rules().await?, desk.now());
            Ok(proto::ListApprovalsResponse {
                approvals: requests.into_iter().map(|request| access_messages::listed(request, now)).collect(),
                rules: Some(access_messages::rules(&rules)),
                node: desk.node().to_owned(),
            })
        };
        self.door.call("Access.ListApprovals", caller, work).await
    }

    async fn get_approval(
        &self,
        request: Request<proto::GetApprovalRequest>,
    ) -> Result<Response<proto::GetApprovalResponse>, Status> {
        let (caller, desk) = (callers::any(&request)?.to_string(), Arc::clone(&self.desk));
        let work = async move {
            let found = desk.request_named(access_messages::request_id("id", &request.get_ref().id)?).await?;
            Ok(proto::GetApprovalResponse { approval: Some(access_messages::approval(found, desk.now())) })
        };
        self.door.call("Access.GetApproval", caller, work).await
    }

    async fn decide_approval(
        &self,
        request: Request<proto::DecideApprovalRequest>,
    ) -> Result<Response<proto::DecideApprovalResponse>, Status> {
        let (officer, certificate) = (callers::officer(&request)?, callers::certificate_der(&request)?);
        let (desk, auditor, caller) =
            (Arc::clone(&self.desk), Arc::clone(&self.auditor), Caller::Officer(officer.clone()));
        let by = caller.to_string();
        let work = async move {
            let asked = request.into_inner();
            let (id, verdict) = access_messages::decision(&asked)?;
            let ready = desk.prepare_decision(officer, &certificate, id, verdict, &asked.signature).await?;
            let act = if asked.approve { "approval.approve" } else { "approval.reject" };
            let entry = access_messages::entry_of_statement(&caller, act, id, &ready.act, &ready.signed);
            let decided = on_record(&auditor, entry.with("reason", asked.reason), desk.decide(ready)).await?;
            Ok(proto::DecideApprovalResponse { approval: Some(access_messages::approval(decided, desk.now())) })
        };
        self.door.call("Access.DecideApproval", by, work).await
    }

    async fn use_approval(
        &self,
        request: Request<proto::UseApprovalRequest>,
    ) -> Result<Response<proto::UseApprovalResponse>, Status> {
        let (officer, desk, asked) = (callers::officer(&request)?, Arc::clone(&self.desk), request.get_ref());
        let act = AuditedCall::new("Access.UseApproval", "ceremony.begin", &Caller::Officer(officer.clone()))
            .with("request", hex::encode(&asked.id))
            .with("file_sha256", hex::encode(&asked.file_sha256))
            .announced();
        let work = async move {
            let id = access_messages::request_id("id", &request.get_ref().id)?;
            let used = desk.use_up(&officer, id, &request.get_ref().file_sha256).await?;
            Ok(proto::UseApprovalResponse { approval: Some(access_messages::approval(used, desk.now())) })
        };
        self.door.act(act, work).await
    }

    async fn record_ceremony(
        &self,
        request: Request<proto::RecordCeremonyRequest>,
    ) -> Result<Response<proto::RecordCeremonyResponse>, Status> {
        let officer = Caller::Officer(callers::officer(&request)?);
        let act = access_messages::ceremony(
            AuditedCall::new("Access.RecordCeremony", "ceremony.end", &officer),
            request.get_ref(),
        );
        let work = async move {
            access_messages::check_ceremony(request.get_ref())?;
            Ok(proto::RecordCeremonyResponse {})
        };
        self.door.act(act, work).await
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
                ProvisionError::invalid(
                    "offset",
                    "the log does not have so many bytes: it is another log, or was cut off",
                )
            })?;
            let (sender, stream) = mpsc::channel(CHUNKS);
            tokio::spawn(access_messages::send_log(log, offset, first, sender));
            Ok(ReceiverStream::new(stream))
        };
        self.door.call("Access.ReadAuditLog", caller, work).await
    }

    async fn load_identities(
        &self,
        request: Request<proto::LoadIdentitiesRequest>,
    ) -> Result<Response<proto::LoadIdentitiesResponse>, Status> {
        let officer = Caller::Officer(callers::officer(&request)?);
        let (desk, provisioner, asked) = (Arc::clone(&self.desk), Arc::clone(&self.provisioner), request.get_ref());
        let act = AuditedCall::new("Access.LoadIdentities", "identities.load", &officer)
            .with("profile", &asked.profile)
            .with("first", &asked.first)
            .announced()
            .tell(|loaded: &proto::LoadIdentitiesResponse| access_messages::told_of_range(loaded.range.as_ref()));
        let work = async move {
            let (profile, range) = access_messages::identities(request.get_ref(), &provisioner)?;
            let loaded = desk.load_range(profile, range, &officer).await?;
            Ok(proto::LoadIdentitiesResponse { range: Some(access_messages::range(loaded)) })
        };
        self.door.act(act, work).await
    }

    async fn list_identities(
        &self,
        request: Request<proto::ListIdentitiesRequest>,
    ) -> Result<Response<proto::ListIdentitiesResponse>, Status> {
        let (caller, desk) = (callers::any(&request)?.to_string(), Arc::clone(&self.desk));
        let work = async move {
            let ranges = desk.ranges().await?.into_iter().map(access_messages::range).collect();
            Ok(proto::ListIdentitiesResponse { ranges })
        };
        self.door.call("Access.ListIdentities", caller, work).await
    }
}
