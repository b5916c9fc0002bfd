//! What is asked of the desk, between messages and values.

use std::sync::Arc;

use tokio::sync::mpsc;
use tonic::Status;

use super::call_gate::AuditedCall;
use super::messages::timestamp;
use super::status::status_of;
use crate::access::{
    self, AccessControl, ApprovalRules, Asked, Enrolled, IdentityRange, LoadedRange, MAX_REASON_LEN, RequestId,
    RequestState, SignedStatement, StationUse, Verdict,
};
use crate::audit::{AuditLog, Entry, Outcome};
use crate::certificate::Caller;
use crate::names::{DeviceIdentity, OfficerName, ProfileName};
use crate::proto;
use crate::provisioning::{ProvisionError, Provisioner};

/// Longest content of a request.
const MAX_ACT_LEN: usize = 40 * 1024;
/// Most keys of one ceremony that are told one by one.
const MAX_ACTS: usize = 64;

pub(super) fn request_id(field: &'static str, bytes: &[u8]) -> Result<RequestId, ProvisionError> {
    let bytes = bytes.try_into().map_err(|_| ProvisionError::invalid(field, "it must have 8 bytes"))?;
    Ok(RequestId::from_bytes(bytes))
}

pub(super) fn asked(
    officer: OfficerName,
    certificate: Vec<u8>,
    request: proto::RequestApprovalRequest,
) -> Result<Asked, ProvisionError> {
    let id = request_id("id", &request.id)?;
    if request.act.len() > MAX_ACT_LEN {
        return Err(ProvisionError::invalid("act", format!("at most {MAX_ACT_LEN} bytes are read")));
    }
    let act = access::ProtectedAction::from_json(&request.act).map_err(|e| ProvisionError::invalid("act", e))?;
    let expires = request.expires.map(|time| u64::try_from(time.seconds).unwrap_or_default());
    let expires = expires.ok_or_else(|| ProvisionError::invalid("expires", "it is missing"))?;
    Ok(Asked { officer, certificate, id, act, expires, signature: request.signature })
}

pub(super) fn decision(request: &proto::DecideApprovalRequest) -> Result<(RequestId, Verdict), ProvisionError> {
    let id = request_id("id", &request.id)?;
    let length = request.reason.chars().count();
    let printable = !request.reason.chars().any(char::is_control);
    match (request.approve, length) {
        (true, 0) => Ok((id, Verdict::Approve)),
        (true, _) => Err(ProvisionError::invalid("reason", "an approval has none")),
        (false, 1..=MAX_REASON_LEN) if printable => Ok((id, Verdict::Reject(request.reason.clone()))),
        (false, _) => Err(ProvisionError::invalid("reason", format!("1 to {MAX_REASON_LEN} printable characters"))),
    }
}

pub(super) fn approval(request: access::ApprovalRequest, now: u64) -> proto::Approval {
    let state = request.standing(now).to_owned();
    let (rejected, reason) = match request.state {
        RequestState::Rejected { by, reason } => (Some(officer_signature(by)), reason),
        RequestState::Void(reason) => (None, reason),
        _ => (None, String::new()),
    };
    proto::Approval {
        id: request.id.to_string(),
        act: request.act.to_json(),
        description: request.act.to_string(),
        state,
        expires: Some(timestamp(request.expires)),
        needed: request.needed.into(),
        requested: Some(officer_signature(request.requested)),
        approvals: request.approvals.into_iter().map(officer_signature).collect(),
        rejected,
        reason,
    }
}

/// A request among others: what came of one that is not open any more, without what was signed. A list of all of that would outgrow an
/// answer, and with it keep officers from those that wait for them.
pub(super) fn listed(request: access::ApprovalRequest, now: u64) -> proto::Approval {
    let is_open = matches!(request.standing(now), "pending" | "approved");
    let listed = approval(request, now);
    if is_open {
        return listed;
    }
    let bare = |signed: proto::OfficerSignature| proto::OfficerSignature {
        statement: String::new(),
        signature: Vec::new(),
        certificate: Vec::new(),
        ..signed
    };
    proto::Approval {
        act: String::new(),
        requested: listed.requested.map(bare),
        approvals: listed.approvals.into_iter().map(bare).collect(),
        rejected: listed.rejected.map(bare),
        ..listed
    }
}

fn officer_signature(signed: SignedStatement) -> proto::OfficerSignature {
    let SignedStatement { officer, at, statement, signature, certificate } = signed;
    let at = Some(timestamp(at));
    proto::OfficerSignature { officer: officer.to_string(), at, statement, signature, certificate }
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

/// The details of an entry that an officer's signature is verified with ever after.
pub(super) const SIGNED: &[&str] = &["statement", "signature", "certificate"];

/// An entry with all that an officer has signed.
pub(super) fn entry_of_statement(
    caller: &Caller,
    name: &'static str,
    id: RequestId,
    act: &access::ProtectedAction,
    signed: &SignedStatement,
) -> Entry {
    let (signature, certificate) = (hex::encode(&signed.signature), hex::encode(&signed.certificate));
    let values = [signed.statement.as_str(), &signature, &certificate];
    let entry = Entry::new(caller, name, Outcome::Begun).with("request", id).with("act", act);
    SIGNED.iter().zip(values).fold(entry, |entry, (name, value)| entry.with(name, value))
}

/// Sends the log up to its end, or until nobody listens.
pub(super) async fn send_log(
    log: Arc<AuditLog>,
    mut offset: u64,
    mut bytes: Vec<u8>,
    sender: mpsc::Sender<Result<proto::ReadAuditLogResponse, Status>>,
) {
    while !bytes.is_empty() {
        offset += bytes.len() as u64;
        if sender.send(Ok(proto::ReadAuditLogResponse { bytes })).await.is_err() {
            return;
        }
        bytes = match log.read(offset).await {
            Ok(next) => next.unwrap_or_default(),
            Err(error) => {
                // Whoever listened no longer does.
                let _ = sender.send(Err(status_of(&error.into()))).await;
                return;
            }
        };
    }
}

pub(super) fn enrolment(request: &proto::EnrollCallerRequest) -> Result<(Caller, u32), ProvisionError> {
    let role = request.role.parse().map_err(|e| ProvisionError::invalid("role", e))?;
    let caller = Caller::new(role, &request.name).map_err(|e| ProvisionError::invalid("name", e))?;
    match request.days {
        days @ 1..=3650 => Ok((caller, days)),
        days => Err(ProvisionError::invalid("days", format!("{days} is not from 1 to 3650"))),
    }
}

pub(super) fn certificate(made: Enrolled) -> proto::AccessCertificate {
    proto::AccessCertificate {
        certificate_pem: made.certificate,
        authority_pem: made.authority,
        serial: made.issued.serial,
        not_after: Some(timestamp(made.issued.not_after)),
    }
}

pub(super) fn told_of_certificate(made: Option<&proto::AccessCertificate>) -> Vec<(&'static str, String)> {
    made.map(|made| ("serial", hex::encode(&made.serial))).into_iter().collect()
}

pub(super) async fn callers(
    desk: &AccessControl,
    provisioner: &Provisioner,
) -> Result<proto::ListCallersResponse, ProvisionError> {
    let (stations, certificates, revocations) =
        (desk.stations().await?, desk.certificates().await?, desk.revocations().await?);
    let now = desk.now();
    let certificates = certificates.into_iter().map(|known| proto::KnownCertificate {
        role: known.caller.role().to_string(),
        name: known.caller.name().to_owned(),
        serial: known.serial,
        not_before: Some(timestamp(known.not_before)),
        not_after: Some(timestamp(known.not_after)),
        by: known.by,
    });
    let revocations = revocations.into_iter().map(|revoked| proto::Revocation {
        role: revoked.caller.role().to_string(),
        name: revoked.caller.name().to_owned(),
        at: Some(timestamp(revoked.at)),
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
    let confinement = provisioner.rules().confinement(&known.station);
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
) -> Result<(ProfileName, IdentityRange), ProvisionError> {
    let profile = request.profile.parse().map_err(|e| ProvisionError::invalid("profile", e))?;
    let first: DeviceIdentity = request.first.parse().map_err(|e| ProvisionError::invalid("first", e))?;
    if !provisioner.rules().takes(&profile, &first) {
        let problem = format!("there is no profile {profile} that takes {} identities", first.kind());
        return Err(ProvisionError::invalid("profile", problem));
    }
    let range = match (request.count, request.last.as_str()) {
        (0, "") => return Err(ProvisionError::invalid("count", "give a count or the last identity")),
        (count, "") => IdentityRange::new(first, count).map_err(|e| ProvisionError::invalid("count", e))?,
        (0, last) => {
            let last = last.parse().map_err(|e| ProvisionError::invalid("last", e))?;
            IdentityRange::between(first, &last).map_err(|e| ProvisionError::invalid("last", e))?
        }
        _ => return Err(ProvisionError::invalid("last", "give a count or the last identity, not both")),
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
        by: loaded.by,
        at: Some(timestamp(loaded.at)),
    }
}

pub(super) fn told_of_range(range: Option<&proto::IdentityRange>) -> Vec<(&'static str, String)> {
    let told = range.map(|range| [("range", range.number.to_string()), ("last", range.last.clone())]);
    told.into_iter().flatten().collect()
}

/// What the audit log keeps of a ceremony.
pub(super) fn ceremony<T>(act: AuditedCall<T>, request: &proto::RecordCeremonyRequest) -> AuditedCall<T> {
    let act = act
        .with("file_sha256", hex::encode(&request.file_sha256))
        .with("transcript_sha256", hex::encode(&request.transcript_sha256))
        .with("request", hex::encode(&request.approval))
        .with("failure", &request.failure);
    let numbered = request.acts.iter().take(MAX_ACTS).enumerate();
    numbered.fold(act, |act, (n, done)| act.with(&format!("act {:02}", n + 1), done))
}

pub(super) fn check_ceremony(request: &proto::RecordCeremonyRequest) -> Result<(), ProvisionError> {
    for (field, bytes, lengths) in [
        ("file_sha256", &request.file_sha256, &[32][..]),
        ("transcript_sha256", &request.transcript_sha256, &[0, 32]),
        ("approval", &request.approval, &[0, 8]),
    ] {
        if !lengths.contains(&bytes.len()) {
            return Err(ProvisionError::invalid(field, format!("it has {} bytes", bytes.len())));
        }
    }
    let fits = request.acts.len() <= MAX_ACTS;
    if fits { Ok(()) } else { Err(ProvisionError::invalid("acts", format!("at most {MAX_ACTS} are recorded"))) }
}
