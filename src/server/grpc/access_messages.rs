//! Converts between the messages of the `Access` service and the types of `access`.

use std::sync::Arc;

use spp_format::approval::{ApprovalRules, MAX_REASON_LEN, RequestId, SignedStatement, Verdict};
use spp_format::certificate::Caller;
use spp_format::names::{DeviceIdentity, OfficerName, ProfileName};
use spp_proto as proto;
use tokio::sync::mpsc;
use tonic::Status;

use super::call_gate::AuditedCall;
use super::messages::timestamp;
use super::status::status_of;
use crate::access::{
    self, AccessControl, Enrolled, IdentityRange, LoadedRange, RequestState, StationUse, SubmittedRequest,
};
use crate::audit::{AuditLog, Entry, Outcome};
use crate::provisioning::Provisioner;
use crate::server::call_error::CallError;

/// Maximum length of an approval request's action, in bytes of JSON.
const MAX_ACTION_LEN: usize = 40 * 1024;
/// Maximum number of actions that are recorded for one ceremony.
const MAX_ACTIONS: usize = 64;

pub(super) fn request_id(field: &'static str, bytes: &[u8]) -> Result<RequestId, CallError> {
    let bytes = bytes.try_into().map_err(|_| CallError::invalid(field, "must have 8 bytes"))?;
    Ok(RequestId::from_bytes(bytes))
}

pub(super) fn submission(
    officer: OfficerName,
    certificate: Vec<u8>,
    request: proto::RequestApprovalRequest,
) -> Result<SubmittedRequest, CallError> {
    let id = request_id("id", &request.id)?;
    if request.action.len() > MAX_ACTION_LEN {
        return Err(CallError::invalid(
            "action",
            format!("has {} bytes, at most {MAX_ACTION_LEN} are allowed", request.action.len()),
        ));
    }
    let action = spp_format::approval::ProtectedAction::from_json(&request.action)
        .map_err(|e| CallError::invalid("action", e))?;
    let expires = request.expires.map(|time| u64::try_from(time.seconds).unwrap_or_default());
    let expires = expires.ok_or_else(|| CallError::invalid("expires", "missing"))?;
    Ok(SubmittedRequest { officer, certificate, id, action, expires, signature: request.signature })
}

pub(super) fn decision(request: &proto::DecideApprovalRequest) -> Result<(RequestId, Verdict), CallError> {
    let id = request_id("id", &request.id)?;
    let length = request.reason.chars().count();
    let printable = !request.reason.chars().any(char::is_control);
    match (request.approve, length) {
        (true, 0) => Ok((id, Verdict::Approve)),
        (true, _) => Err(CallError::invalid("reason", "must be empty for an approval")),
        (false, 1..=MAX_REASON_LEN) if printable => Ok((id, Verdict::Reject(request.reason.clone()))),
        (false, _) => {
            Err(CallError::invalid("reason", format!("must have 1 to {MAX_REASON_LEN} printable characters")))
        }
    }
}

pub(super) fn approval(request: access::ApprovalRequest, now: u64) -> proto::Approval {
    let state = request.effective_state(now).to_owned();
    let (rejected, reason) = match request.state {
        RequestState::Rejected { by, reason } => (Some(officer_signature(by)), reason),
        RequestState::Void(reason) => (None, reason),
        _ => (None, String::new()),
    };
    proto::Approval {
        id: request.id.to_string(),
        action: request.action.to_json(),
        description: request.action.to_string(),
        state,
        expires: Some(timestamp(request.expires)),
        needed: request.needed.into(),
        requested: Some(officer_signature(request.requested)),
        approvals: request.approvals.into_iter().map(officer_signature).collect(),
        rejected,
        reason,
    }
}

/// Converts a request for a list. Closed requests omit the signed statements: a list with all of them would exceed the maximum
/// message size, and officers could no longer see the open requests.
pub(super) fn listed(request: access::ApprovalRequest, now: u64) -> proto::Approval {
    let is_open = matches!(request.effective_state(now), "pending" | "approved");
    let listed = approval(request, now);
    if is_open {
        return listed;
    }
    let unsigned = |signed: proto::OfficerSignature| proto::OfficerSignature {
        statement: String::new(),
        signature: Vec::new(),
        certificate: Vec::new(),
        ..signed
    };
    proto::Approval {
        action: String::new(),
        requested: listed.requested.map(unsigned),
        approvals: listed.approvals.into_iter().map(unsigned).collect(),
        rejected: listed.rejected.map(unsigned),
        ..listed
    }
}

fn officer_signature(signed: SignedStatement) -> proto::OfficerSignature {
    let SignedStatement { officer, at, statement, signature, certificate } = signed;
    let at = Some(timestamp(at));
    proto::OfficerSignature { officer: officer.to_string(), received_at: at, statement, signature, certificate }
}

pub(super) fn rules(rules: &ApprovalRules) -> proto::ApprovalRules {
    proto::ApprovalRules {
        revoke: rules.revoke.into(),
        enroll: rules.enroll.into(),
        raise_quota: rules.raise_quota.into(),
        change_rules: rules.change_rules.into(),
        destroy: rules.destroy.into(),
        rotate: rules.rotate.into(),
        valid_for_seconds: rules.valid_for,
    }
}

/// The audit details from which an officer's signature can be verified later.
pub(super) const STATEMENT_FIELDS: &[&str] = &["statement", "signature", "certificate"];

/// Returns an audit entry with an officer's complete signed statement.
pub(super) fn statement_entry(
    caller: &Caller,
    name: &'static str,
    id: RequestId,
    action: &spp_format::approval::ProtectedAction,
    signed: &SignedStatement,
) -> Entry {
    let (signature, certificate) = (hex::encode(&signed.signature), hex::encode(&signed.certificate));
    let values = [signed.statement.as_str(), &signature, &certificate];
    let entry = Entry::new(caller, name, Outcome::Begun).with("request", id).with("act", action);
    STATEMENT_FIELDS.iter().zip(values).fold(entry, |entry, (name, value)| entry.with(name, value))
}

/// Sends the log up to its end, or until the receiver is dropped.
pub(super) async fn send_log(
    log: Arc<AuditLog>,
    mut offset: u64,
    mut bytes: Vec<u8>,
    sender: mpsc::Sender<Result<proto::ReadAuditLogResponse, Status>>,
) {
    while !bytes.is_empty() {
        offset += bytes.len() as u64;
        if sender.send(Ok(proto::ReadAuditLogResponse { data: bytes })).await.is_err() {
            return;
        }
        bytes = match log.read(offset).await {
            Ok(next) => next.unwrap_or_default(),
            Err(error) => {
                // Sending fails only if the receiver has been dropped.
                let _ = sender.send(Err(status_of(&error.into()))).await;
                return;
            }
        };
    }
}

pub(super) fn enrolment(request: &proto::EnrollCallerRequest) -> Result<(Caller, u32), CallError> {
    let role = request.role.parse().map_err(|e| CallError::invalid("role", e))?;
    let caller = Caller::new(role, &request.name).map_err(|e| CallError::invalid("name", e))?;
    match request.days {
        days @ 1..=3650 => Ok((caller, days)),
        days => Err(CallError::invalid("days", format!("must be 1 to 3650, not {days}"))),
    }
}

pub(super) fn certificate(enrolled: Enrolled) -> proto::AccessCertificate {
    proto::AccessCertificate {
        certificate_pem: enrolled.certificate,
        authority_pem: enrolled.authority,
        serial: enrolled.issued.serial,
        not_after: Some(timestamp(enrolled.issued.not_after)),
    }
}

pub(super) fn certificate_audit_fields(certificate: Option<&proto::AccessCertificate>) -> Vec<(&'static str, String)> {
    certificate.map(|certificate| ("serial", hex::encode(&certificate.serial))).into_iter().collect()
}

pub(super) async fn callers(
    access_control: &AccessControl,
    provisioner: &Provisioner,
) -> Result<proto::ListCallersResponse, CallError> {
    let (stations, certificates, revocations) =
        (access_control.stations().await?, access_control.certificates().await?, access_control.revocations().await?);
    let now = access_control.now();
    let certificates = certificates.into_iter().map(|known| proto::KnownCertificate {
        role: known.caller.role().to_string(),
        name: known.caller.name().to_owned(),
        serial: known.serial,
        not_before: Some(timestamp(known.not_before)),
        not_after: Some(timestamp(known.not_after)),
        requested_by: known.by,
    });
    let revocations = revocations.into_iter().map(|revoked| proto::Revocation {
        role: revoked.caller.role().to_string(),
        name: revoked.caller.name().to_owned(),
        revoked_at: Some(timestamp(revoked.at)),
        reason: revoked.reason,
        request: revoked.request.to_string(),
    });
    Ok(proto::ListCallersResponse {
        stations: stations.into_iter().map(|known| station_use(known, provisioner, now)).collect(),
        certificates: certificates.collect(),
        revocations: revocations.collect(),
    })
}

fn station_use(known: StationUse, provisioner: &Provisioner, now: u64) -> proto::StationUse {
    let confinement = provisioner.policy().confinement(&known.station);
    let (profiles, identities) = confinement.clone().unwrap_or_default();
    proto::StationUse {
        station: known.station.to_string(),
        configured: confinement.is_some(),
        devices_per_hour: known.quota.in_force.devices_per_hour,
        devices_total: known.quota.in_force.devices_total,
        begun_in_last_hour: known.usage.in_last_hour(now),
        begun_total: known.usage.total(),
        profiles: profiles.iter().map(ToString::to_string).collect(),
        identities,
    }
}

pub(super) fn identities(
    request: &proto::LoadIdentitiesRequest,
    provisioner: &Provisioner,
) -> Result<(ProfileName, IdentityRange), CallError> {
    let profile = request.profile.parse().map_err(|e| CallError::invalid("profile", e))?;
    let first: DeviceIdentity = request.first.parse().map_err(|e| CallError::invalid("first", e))?;
    first.check_spaces().map_err(|e| CallError::invalid("first", e))?;
    if !provisioner.policy().takes(&profile, &first) {
        let problem = format!("no profile {profile} accepts {} identities", first.kind());
        return Err(CallError::invalid("profile", problem));
    }
    let range = match (request.count, request.last.as_str()) {
        (0, "") => return Err(CallError::invalid("count", "specify count or last")),
        (count, "") => IdentityRange::new(first, count).map_err(|e| CallError::invalid("count", e))?,
        (0, last) => {
            let last = last.parse().map_err(|e| CallError::invalid("last", e))?;
            IdentityRange::between(first, &last).map_err(|e| CallError::invalid("last", e))?
        }
        _ => return Err(CallError::invalid("last", "specify count or last, not both")),
    };
    Ok((profile, range))
}

pub(super) fn range(loaded: LoadedRange) -> proto::IdentityRange {
    proto::IdentityRange {
        number: loaded.number,
        profile: loaded.profile.to_string(),
        first: loaded.range.first().to_string(),
        last: loaded.range.last().to_string(),
        count: loaded.range.count(),
        used: loaded.used,
        loaded_by: loaded.by,
        loaded_at: Some(timestamp(loaded.at)),
    }
}

pub(super) fn range_audit_fields(range: Option<&proto::IdentityRange>) -> Vec<(&'static str, String)> {
    let fields = range.map(|range| [("range", range.number.to_string()), ("last", range.last.clone())]);
    fields.into_iter().flatten().collect()
}

/// Adds the audit details of a ceremony.
pub(super) fn ceremony<T>(audited: AuditedCall<T>, request: &proto::RecordCeremonyRequest) -> AuditedCall<T> {
    let audited = audited
        .with("file_sha256", hex::encode(&request.file_sha256))
        .with("transcript_sha256", hex::encode(&request.transcript_sha256))
        .with("request", hex::encode(&request.approval))
        .with("failure", &request.failure);
    let numbered = request.actions.iter().take(MAX_ACTIONS).enumerate();
    numbered.fold(audited, |audited, (n, act)| audited.with(&format!("act {:02}", n + 1), act))
}

pub(super) fn check_ceremony(request: &proto::RecordCeremonyRequest) -> Result<(), CallError> {
    for (field, bytes, lengths) in [
        ("file_sha256", &request.file_sha256, &[32][..]),
        ("transcript_sha256", &request.transcript_sha256, &[0, 32]),
        ("approval", &request.approval, &[0, 8]),
    ] {
        if !lengths.contains(&bytes.len()) {
            let lengths = lengths.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
            return Err(CallError::invalid(field, format!("must have {lengths} bytes, not {}", bytes.len())));
        }
    }
    let fits = request.actions.len() <= MAX_ACTIONS;
    if fits { Ok(()) } else { Err(CallError::invalid("actions", format!("at most {MAX_ACTIONS} are allowed"))) }
}
