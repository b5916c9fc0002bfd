//! Converts between messages and values of the `Production` service.

use std::collections::BTreeMap;
use std::ops::Range;

use prost_types::Timestamp;
use spp_format::certificate::describe;
use spp_format::names::SessionId;
use spp_format::record::PublishedRecord;
use spp_proto as proto;

use super::messages::{
    MAX_REASON_LEN, Violations, certificate_format, chip_id, identity, publication, receipt, state, timestamp,
};
use crate::provisioning::{
    DeviceReport, DeviceView, KeyPairLocation, ProductionBy, ProductionOf, SessionFilter, SessionPage,
};
use crate::server::call_error::CallError;
use crate::store::{ProductionCounts, SECONDS_PER_HOUR, Session, SessionCursor, SessionState, StateName};

/// Maximum number of hours in one answer.
const MAX_HOURS: u64 = 366 * 24;
/// Default number of sessions per page.
const DEFAULT_PAGE_SIZE: usize = 100;
/// Maximum number of sessions per page.
const MAX_PAGE_SIZE: usize = 1000;

pub(super) fn hours_and_rows(request: &proto::GetProductionRequest) -> Result<(Range<u64>, ProductionBy), CallError> {
    let mut violations = Violations::default();
    let from = violations.keep("from", hour(request.from.as_ref()));
    let to = violations.keep("to", hour(request.to.as_ref()));
    if let (Some(from), Some(to)) = (from, to) {
        violations.check("to", from < to, "must be after from");
        let in_range = to.saturating_sub(from) <= MAX_HOURS;
        violations.check("to", in_range, "must be at most 366 days after from; split the request");
    }
    let by = violations.keep(
        "by",
        match request.by() {
            proto::ProductionBy::Station => Ok(ProductionBy::Station),
            proto::ProductionBy::Profile => Ok(ProductionBy::Profile),
            proto::ProductionBy::Hour => Ok(ProductionBy::Hour),
            proto::ProductionBy::Unspecified => {
                Err(format!("unsupported value {}: expected STATION (1), PROFILE (2) or HOUR (3)", request.by))
            }
        },
    );
    let query = || Some((from?..to?, by?));
    let query = query();
    violations.end(query)
}

fn hour(time: Option<&Timestamp>) -> Result<u64, String> {
    let time = time.ok_or("missing")?;
    let seconds = u64::try_from(time.seconds).map_err(|_| "must not be before 1970")?;
    if time.nanos != 0 || !seconds.is_multiple_of(SECONDS_PER_HOUR) {
        return Err("must be a full hour: production is counted per hour".to_owned());
    }
    Ok(seconds / SECONDS_PER_HOUR)
}

pub(super) fn production(rows: BTreeMap<ProductionOf, ProductionCounts>) -> proto::GetProductionResponse {
    let mut total = ProductionCounts::default();
    rows.values().for_each(|counts| total.add(*counts));
    let rows = rows.into_iter().map(|(of, counts)| {
        use proto::production_row::Of;
        let of = match of {
            ProductionOf::Station(station) => Of::Station(station.to_string()),
            ProductionOf::Profile(profile) => Of::Profile(profile.to_string()),
            ProductionOf::Hour(hour) => Of::Hour(timestamp(hour * SECONDS_PER_HOUR)),
        };
        proto::ProductionRow { of: Some(of), counts: Some(production_counts(counts)) }
    });
    proto::GetProductionResponse { rows: rows.collect(), total: Some(production_counts(total)) }
}

const fn production_counts(counts: ProductionCounts) -> proto::ProductionCounts {
    let ProductionCounts { begun, completed, aborted } = counts;
    proto::ProductionCounts { begun, completed, aborted }
}

pub(super) fn device_view(request: proto::GetDeviceRequest) -> Result<DeviceView, CallError> {
    use proto::get_device_request::Device;
    match request.device {
        Some(Device::ChipId(chip)) => chip_id(&chip).map(DeviceView::Chip),
        Some(Device::Identity(text)) => {
            identity(&text).map(DeviceView::Identity).map_err(|e| CallError::invalid("identity", e))
        }
        None => Err(CallError::invalid("device", "specify chip_id or identity")),
    }
}

pub(super) fn device(report: &DeviceReport) -> proto::GetDeviceResponse {
    let events = report.timeline().into_iter().map(|event| proto::DeviceEvent {
        time: Some(timestamp(event.at)),
        session_id: event.session.id.as_bytes().to_vec(),
        description: event.description,
    });
    let key_pair = match report.key_pair {
        None => proto::KeyPair::Unspecified,
        Some(KeyPairLocation::None) => proto::KeyPair::None,
        Some(KeyPairLocation::Device) => proto::KeyPair::OfDevice,
        Some(KeyPairLocation::Wrapped) => proto::KeyPair::Wrapped,
        Some(KeyPairLocation::Token) => proto::KeyPair::OnToken,
        Some(KeyPairLocation::Erased) => proto::KeyPair::Erased,
    };
    proto::GetDeviceResponse {
        chip_id: report.chip.as_bytes().to_vec(),
        sessions: report.sessions.iter().map(session).collect(),
        key_pair: key_pair.into(),
        published: report.record.as_ref().map(published),
        certificate: certificate(report),
        timeline: events.collect(),
    }
}

fn published(found: &PublishedRecord) -> proto::PublishedDevice {
    let record = &found.record;
    proto::PublishedDevice {
        receipt: Some(receipt(&found.publication)),
        session_id: record.session.as_bytes().to_vec(),
        identity: record.identity.to_string(),
        profile: record.profile.to_string(),
        certificate_format: certificate_format(record.certificate_is_cwt),
        master_key_version: record.master_key_version,
        backup_bytes: record.backup.len() as u64,
    }
}

/// Describes the certificate in the record or, before publication, the issued session's.
fn certificate(report: &DeviceReport) -> Vec<proto::CertificateStatement> {
    let signed = match (&report.record, report.sessions.first()) {
        (Some(found), _) => Some((&found.record.certificate, found.record.certificate_is_cwt)),
        (None, Some(Session { state: SessionState::Issued { certificate }, certificate: to_sign, .. })) => {
            Some((certificate, to_sign.is_cwt()))
        }
        _ => None,
    };
    let statement = |name: &str, value| proto::CertificateStatement { name: name.to_owned(), value };
    match signed.map(|(certificate, is_cwt)| describe(certificate, is_cwt)) {
        None => Vec::new(),
        Some(Ok(statements)) => statements.into_iter().map(|known| statement(known.name, known.value)).collect(),
        // An unreadable certificate does not hide the rest of the report.
        Some(Err(error)) => vec![statement("Unreadable", error.to_string())],
    }
}

pub(super) fn session(session: &Session) -> proto::SessionReport {
    let (aborted, reason) = match &session.state {
        SessionState::Aborted { at, reason } => (Some(timestamp(*at)), reason.clone()),
        _ => (None, String::new()),
    };
    proto::SessionReport {
        session_id: session.id.as_bytes().to_vec(),
        chip_id: session.chip.as_bytes().to_vec(),
        identity: session.identity.to_string(),
        profile: session.profile.to_string(),
        station: session.station.to_string(),
        state: state(session.state.name()).into(),
        created: Some(timestamp(session.created)),
        expires: Some(timestamp(session.expires)),
        aborted,
        reason,
        receipt: publication(session).map(receipt),
        certificate_serial: session.certificate.serial().to_vec(),
        master_key_version: session.master_key.as_ref().map_or(0, |master| master.version),
    }
}

pub(super) fn session_filter(
    request: &proto::ListSessionsRequest,
) -> Result<(SessionFilter, Option<SessionCursor>, usize), CallError> {
    let mut violations = Violations::default();
    let state = violations.keep("state", state_filter(request.state));
    let station = violations.keep("station", optional_name(&request.station));
    let profile = violations.keep("profile", optional_name(&request.profile));
    let older_than = violations.keep(
        "older_than",
        match &request.older_than {
            None => Ok(0),
            Some(time) => u64::try_from(time.seconds).map_err(|_| "must not be negative"),
        },
    );
    let size = usize::try_from(request.page_size).unwrap_or(usize::MAX);
    violations.check("page_size", size <= MAX_PAGE_SIZE, format!("at most {MAX_PAGE_SIZE} are allowed"));
    let after = violations.keep("page_token", parse_page_token(&request.page_token));
    let query = || {
        let filter = SessionFilter { state: state?, station: station?, profile: profile?, older_than: older_than? };
        Some((filter, after?, if size == 0 { DEFAULT_PAGE_SIZE } else { size }))
    };
    let query = query();
    violations.end(query)
}

/// Parses an optional name.
fn optional_name<T: std::str::FromStr>(text: &str) -> Result<Option<T>, T::Err> {
    if text.is_empty() { Ok(None) } else { text.parse().map(Some) }
}

fn state_filter(number: i32) -> Result<Option<StateName>, String> {
    let state = proto::SessionState::try_from(number).map_err(|_| format!("unknown state {number}"))?;
    Ok(match state {
        proto::SessionState::Unspecified => None,
        proto::SessionState::Reserved => Some(StateName::Reserved),
        proto::SessionState::Issued => Some(StateName::Issued),
        proto::SessionState::Published => Some(StateName::Published),
        proto::SessionState::Erased => Some(StateName::Erased),
        proto::SessionState::Aborted => Some(StateName::Aborted),
    })
}

pub(super) fn sessions(page: &SessionPage) -> proto::ListSessionsResponse {
    proto::ListSessionsResponse {
        sessions: page.sessions.iter().map(session).collect(),
        next_page_token: page.next.map(page_token).unwrap_or_default(),
    }
}

fn page_token(place: SessionCursor) -> Vec<u8> {
    [place.created.to_be_bytes().as_slice(), place.id.as_bytes()].concat()
}

/// Parses the output of [`page_token`].
fn parse_page_token(bytes: &[u8]) -> Result<Option<SessionCursor>, String> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let parts = bytes.split_first_chunk().and_then(|(created, id)| Some((created, SessionId::from_bytes(id).ok()?)));
    let (created, id) = parts.ok_or("invalid: use the token of an earlier answer, or none for the first page")?;
    Ok(Some(SessionCursor { created: u64::from_be_bytes(*created), id }))
}

pub(super) fn abort(request: proto::AbortSessionRequest) -> Result<(SessionId, String), CallError> {
    let mut violations = Violations::default();
    let session = violations.keep("session_id", SessionId::from_bytes(&request.session_id));
    let length = request.reason.chars().count();
    let is_valid = (1..=MAX_REASON_LEN).contains(&length) && !request.reason.trim().is_empty();
    violations.check("reason", is_valid, format!("must have 1 to {MAX_REASON_LEN} characters, not only spaces"));
    violations.end(session.map(|session| (session, request.reason)))
}
