//! Parses request messages, reporting all field violations at once, and converts results to messages.

use prost_types::Timestamp;
use spp_format::certificate::verify_csr;
use spp_format::names::{ChipId, DeviceIdentity, NameError, SessionId, StationName};
use spp_format::package::{MAX_BACKUP_LEN, MAX_CONFIRMATION_LEN, TransportCurve, TransportPublicKey};
use spp_format::record::{Publication, PublishedRecord};
use spp_format::tlog::SignedCheckpoint;
use spp_proto as proto;

use crate::provisioning::{AssembleRequest, Assembled, Completion, Delivery, FieldViolation, Receipt, SessionView};
use crate::server::call_error::CallError;
use crate::store::{Session, SessionState, StateName};

/// Maximum length of an identity in canonical form, in bytes.
const MAX_IDENTITY_LEN: usize = 96;
/// Maximum length of an abort's reason, in characters.
pub(super) const MAX_REASON_LEN: usize = 200;

/// Collects field violations; returns the parsed value only if there are none.
#[derive(Default)]
pub(super) struct Violations(Vec<FieldViolation>);

impl Violations {
    pub(super) fn keep<T, E: std::fmt::Display>(&mut self, field: &'static str, parsed: Result<T, E>) -> Option<T> {
        parsed.map_err(|problem| self.0.push(FieldViolation::new(field, problem))).ok()
    }

    pub(super) fn check(&mut self, field: &'static str, holds: bool, problem: impl std::fmt::Display) {
        if !holds {
            self.0.push(FieldViolation::new(field, problem));
        }
    }

    pub(super) fn end<T>(self, value: Option<T>) -> Result<T, CallError> {
        match value {
            Some(value) if self.0.is_empty() => Ok(value),
            _ => Err(CallError::Invalid(self.0)),
        }
    }
}

pub(super) fn order(station: StationName, request: &proto::AssembleRequest) -> Result<AssembleRequest, CallError> {
    let mut violations = Violations::default();
    let chip = violations.keep("chip_id", ChipId::from_bytes(&request.chip_id));
    let identity = match request.allocate_identity {
        true => {
            violations.check("identity", request.identity.is_empty(), "must be empty if allocate_identity is set");
            Some(None)
        }
        false => violations.keep("identity", identity(&request.identity)).map(Some),
    };
    let profile = violations.keep("profile", request.profile.parse());
    let own_key = match request.csr.as_slice() {
        [] => None,
        der => violations.keep("csr", verify_csr(der)),
    };
    let transport_key = match &request.transport_key {
        None => None,
        Some(key) => violations.keep("transport_key", transport_key(key)),
    };
    let order = || {
        Some(AssembleRequest { station, chip: chip?, identity: identity?, profile: profile?, own_key, transport_key })
    };
    let order = order();
    violations.end(order)
}

/// Parses an identity. Checks the length first, so that an error never echoes a long input.
pub(super) fn identity(text: &str) -> Result<DeviceIdentity, NameError> {
    if text.len() > MAX_IDENTITY_LEN {
        return Err(NameError::new(format!("at most {MAX_IDENTITY_LEN} characters are allowed")));
    }
    text.parse()
}

fn transport_key(key: &proto::TransportKey) -> Result<TransportPublicKey, String> {
    let curve = match key.r#type() {
        proto::TransportKeyType::P256 => TransportCurve::P256,
        proto::TransportKeyType::X25519 => TransportCurve::X25519,
        proto::TransportKeyType::Unspecified => {
            return Err(format!("unsupported type {}: expected P256 (1) or X25519 (2)", key.r#type));
        }
    };
    TransportPublicKey::new(curve, &key.public_key).map_err(|e| e.to_string())
}

pub(super) fn completion(station: StationName, request: proto::CompleteRequest) -> Result<Completion, CallError> {
    let mut violations = Violations::default();
    let session = violations.keep("session_id", SessionId::from_bytes(&request.session_id));
    let (backup, confirmation) = (request.backup_package, request.key_confirmation);
    violations.check("backup_package", !backup.is_empty(), "must not be empty");
    let (len, max) = (backup.len(), MAX_BACKUP_LEN);
    violations.check("backup_package", len <= max, format!("has {len} bytes, at most {max} are allowed"));
    let (len, max) = (confirmation.len(), MAX_CONFIRMATION_LEN);
    violations.check("key_confirmation", len <= max, format!("has {len} bytes, at most {max} are allowed"));
    violations.end(session.map(|session| Completion { station, session, backup, confirmation }))
}

pub(super) fn abort(request: &proto::AbortRequest) -> Result<(SessionId, String), CallError> {
    let mut violations = Violations::default();
    let session = violations.keep("session_id", SessionId::from_bytes(&request.session_id));
    let length = request.reason.chars().count();
    violations.check("reason", length <= MAX_REASON_LEN, format!("at most {MAX_REASON_LEN} characters are allowed"));
    violations.end(session.map(|session| (session, request.reason.clone())))
}

pub(super) fn session_view(request: &proto::GetSessionRequest) -> Result<SessionView, CallError> {
    use proto::get_session_request::Session as Selector;
    match &request.session {
        Some(Selector::SessionId(id)) => {
            SessionId::from_bytes(id).map(SessionView::Id).map_err(|e| CallError::invalid("session_id", e))
        }
        Some(Selector::ChipId(chip)) => chip_id(chip).map(SessionView::Chip),
        None => Err(CallError::invalid("session", "specify session_id or chip_id")),
    }
}

pub(super) fn chip_id(bytes: &[u8]) -> Result<ChipId, CallError> {
    ChipId::from_bytes(bytes).map_err(|e| CallError::invalid("chip_id", e))
}

pub(super) fn assembled(assembled: Assembled) -> proto::AssembleResponse {
    use proto::assemble_response::Delivery as Message;
    let delivery = match assembled.delivery {
        // The mTLS channel carries the plain package to the station, which passes it to the device. prost owns the copy in the
        // message, so it cannot be wiped; sealed delivery avoids that copy.
        Delivery::Plain(package) => Message::DataPackage(package.expose().clone()),
        Delivery::Sealed(sealed) => Message::SealedPackage(sealed),
    };
    proto::AssembleResponse {
        session_id: assembled.session.as_bytes().to_vec(),
        certificate: assembled.certificate,
        certificate_format: certificate_format(assembled.certificate_is_cwt),
        delivery: Some(delivery),
        expires: Some(timestamp(assembled.expires)),
        identity: assembled.identity.to_string(),
    }
}

pub(super) fn receipt(publication: &Publication) -> proto::Receipt {
    proto::Receipt {
        record_index: publication.index,
        record_hash: publication.record_hash.to_vec(),
        published: Some(timestamp(publication.published)),
        tlog_proof: Vec::new(),
    }
}

pub(super) fn proven_receipt(proven: &Receipt) -> proto::Receipt {
    proto::Receipt { tlog_proof: proven.proof.to_bytes(), ..receipt(&proven.publication) }
}

/// Returns the audit details of a completion.
pub(super) fn completion_audit_fields(response: &proto::CompleteResponse) -> Vec<(&'static str, String)> {
    let receipt = response.receipt.as_ref();
    receipt.map(|receipt| ("record", receipt.record_index.to_string())).into_iter().collect()
}

/// The record whose proof is requested.
pub(super) enum ProofOf {
    /// The newest record of this chip.
    Chip(ChipId),
    /// The entry at this index.
    Index(u64),
}

pub(super) fn proof_request(request: &proto::GetProofRequest) -> Result<ProofOf, CallError> {
    use proto::get_proof_request::Record;
    match &request.record {
        Some(Record::ChipId(chip)) => chip_id(chip).map(ProofOf::Chip),
        Some(Record::RecordIndex(index)) => Ok(ProofOf::Index(*index)),
        None => Err(CallError::invalid("record", "specify chip_id or record_index")),
    }
}

pub(super) fn checkpoint(checkpoint: &SignedCheckpoint) -> proto::GetCheckpointResponse {
    proto::GetCheckpointResponse {
        checkpoint: checkpoint.note().to_vec(),
        size: checkpoint.size(),
        root_hash: checkpoint.root().to_vec(),
    }
}

pub(super) fn session(session: &Session) -> proto::GetSessionResponse {
    proto::GetSessionResponse {
        session_id: session.id.as_bytes().to_vec(),
        chip_id: session.chip.as_bytes().to_vec(),
        identity: session.identity.to_string(),
        profile: session.profile.to_string(),
        station: session.station.to_string(),
        state: state(session.state.name()).into(),
        created: Some(timestamp(session.created)),
        expires: Some(timestamp(session.expires)),
        receipt: publication(session).map(receipt),
    }
}

pub(super) const fn state(state: StateName) -> proto::SessionState {
    match state {
        StateName::Reserved => proto::SessionState::Reserved,
        StateName::Issued => proto::SessionState::Issued,
        StateName::Published => proto::SessionState::Published,
        StateName::Erased => proto::SessionState::Erased,
        StateName::Aborted => proto::SessionState::Aborted,
    }
}

/// Returns the publication of a session's record, if it is published.
pub(super) const fn publication(session: &Session) -> Option<&Publication> {
    match &session.state {
        SessionState::Published { publication } | SessionState::Erased { publication } => Some(publication),
        SessionState::Reserved | SessionState::Issued { .. } | SessionState::Aborted { .. } => None,
    }
}

pub(super) fn record(published: PublishedRecord) -> proto::GetRecordResponse {
    let PublishedRecord { record, bytes, publication } = published;
    proto::GetRecordResponse {
        receipt: Some(receipt(&publication)),
        record_bytes: bytes,
        record: Some(proto::DeviceRecord {
            chip_id: record.chip.as_bytes().to_vec(),
            identity: record.identity.to_string(),
            profile: record.profile.to_string(),
            certificate: record.certificate,
            certificate_format: certificate_format(record.certificate_is_cwt),
            backup_package: record.backup,
            master_key_version: record.master_key_version,
            session_id: record.session.as_bytes().to_vec(),
            published: Some(timestamp(record.published)),
        }),
    }
}

pub(super) fn certificate_format(is_cwt: bool) -> i32 {
    if is_cwt { proto::CertificateFormat::Cwt.into() } else { proto::CertificateFormat::X509.into() }
}

pub(super) fn timestamp(seconds: u64) -> Timestamp {
    Timestamp { seconds: i64::try_from(seconds).unwrap_or(i64::MAX), nanos: 0 }
}
