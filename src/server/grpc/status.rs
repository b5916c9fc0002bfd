//! Maps errors to gRPC statuses. This module alone decides what a caller may learn about a failure.

use std::collections::HashMap;
use std::time::Duration;

use spp_format::keys::KeyType;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

use crate::access::{AccessError, Exceeded, Refused, RequestError};
use crate::hsm::HsmError;
use crate::keypool::PoolError;
use crate::provisioning::ProvisionError;
use crate::server::call_error::CallError;
use crate::server::reload::ReloadError;
use crate::store::StoreError;

/// `google.rpc.ErrorInfo.domain` of every error.
const DOMAIN: &str = "spp";
/// Retry delay if no better one is known.
const DEFAULT_RETRY: Duration = Duration::from_millis(500);

/// Retry delay after the HSM rejected a call.
const HSM_RETRY: Duration = Duration::from_secs(1);

/// The part of an error that a caller sees.
struct WireError {
    code: Code,
    /// `google.rpc.ErrorInfo.reason`: stable, for programs.
    reason: &'static str,
    retry: Option<Duration>,
}

const fn permanent(code: Code, reason: &'static str) -> WireError {
    WireError { code, reason, retry: None }
}

const fn retryable(code: Code, reason: &'static str, retry: Duration) -> WireError {
    WireError { code, reason, retry: Some(retry) }
}

fn table(error: &CallError) -> WireError {
    match error {
        CallError::Invalid(_) => permanent(Code::InvalidArgument, "INVALID"),
        CallError::Overloaded(_) => retryable(Code::ResourceExhausted, "OVERLOADED", DEFAULT_RETRY),
        CallError::Ended(_) => permanent(Code::Internal, "INTERNAL"),
        CallError::Provision(error) => provision(error),
        CallError::Access(error) => access(error),
        CallError::Pool(error) => pool(error),
        CallError::Audit(_) => retryable(Code::Unavailable, "AUDIT_LOG_UNAVAILABLE", DEFAULT_RETRY),
        CallError::Reload(error) => reload(error),
        CallError::Hsm(error) => hsm(error),
        CallError::Store(error) => store(error),
    }
}

fn provision(error: &ProvisionError) -> WireError {
    use ProvisionError as E;
    match error {
        E::Invalid(_) => permanent(Code::InvalidArgument, "INVALID"),
        E::NotAccepted(_) => permanent(Code::FailedPrecondition, "NOT_ACCEPTED"),
        E::NotPermitted(_) => permanent(Code::PermissionDenied, "NOT_PERMITTED"),
        E::ChipTaken { .. } => permanent(Code::AlreadyExists, "CHIP_TAKEN"),
        E::IdentityTaken { .. } => permanent(Code::AlreadyExists, "IDENTITY_TAKEN"),
        E::SubjectTaken { .. } => permanent(Code::AlreadyExists, "SUBJECT_TAKEN"),
        E::PublicKeyTaken(_) => permanent(Code::AlreadyExists, "PUBLIC_KEY_TAKEN"),
        E::AlreadyComplete { .. } => permanent(Code::AlreadyExists, "ALREADY_COMPLETE"),
        E::NoSession(_) => permanent(Code::NotFound, "NO_SESSION"),
        E::NoRecord => permanent(Code::NotFound, "NO_RECORD"),
        E::WrongState { .. } => permanent(Code::FailedPrecondition, "WRONG_STATE"),
        E::RolledBack(_) => permanent(Code::FailedPrecondition, "STATE_STORE_ROLLED_BACK"),
        E::Pool(error) => pool(error),
        E::PairUnavailable => retryable(Code::Aborted, "CONCURRENT_UPDATE", DEFAULT_RETRY),
        E::ChipBusy(_) => retryable(Code::Aborted, "CHIP_BUSY", DEFAULT_RETRY),
        E::Hsm(error) => hsm(error),
        E::Store(error) => store(error),
        E::QuotaExceeded { exceeded, .. } => quota(exceeded),
        E::TooManyOpen { .. } => retryable(Code::ResourceExhausted, "OPEN_SESSIONS", Duration::from_secs(10)),
        E::Access(error) => access(error),
        E::Identities(_) => retryable(Code::Aborted, "IDENTITIES_TAKEN", DEFAULT_RETRY),
        E::Unsigned(_) => retryable(Code::Unavailable, "CHECKPOINT_UNSIGNED", DEFAULT_RETRY),
        E::Internal { .. } => permanent(Code::Internal, "INTERNAL"),
    }
}

const fn quota(exceeded: &Exceeded) -> WireError {
    match exceeded {
        Exceeded::PerHour(_, after) => {
            retryable(Code::ResourceExhausted, "QUOTA_PER_HOUR", Duration::from_secs(*after))
        }
        Exceeded::Total(_) => permanent(Code::PermissionDenied, "QUOTA_TOTAL"),
    }
}

const fn pool(error: &PoolError) -> WireError {
    match error {
        PoolError::Empty { retry_after, .. } => retryable(Code::ResourceExhausted, "POOL_EMPTY", *retry_after),
        PoolError::DiskFull { .. } => retryable(Code::ResourceExhausted, "DISK_FULL", Duration::from_secs(10)),
        PoolError::TooMany { .. } => permanent(Code::InvalidArgument, "INVALID"),
        PoolError::NoPool(_) => permanent(Code::NotFound, "NO_POOL"),
        PoolError::RolledBack(_) => permanent(Code::FailedPrecondition, "STATE_STORE_ROLLED_BACK"),
        PoolError::Hsm(error) => hsm(error),
        PoolError::Store(error) => store(error),
    }
}

const fn reload(error: &ReloadError) -> WireError {
    match error {
        ReloadError::Refused(_) => permanent(Code::FailedPrecondition, "CONFIGURATION_REFUSED"),
        ReloadError::Access(error) => access(error),
        ReloadError::Audit(_) => retryable(Code::Unavailable, "AUDIT_LOG_UNAVAILABLE", DEFAULT_RETRY),
    }
}

const fn hsm(error: &HsmError) -> WireError {
    match error {
        HsmError::Unavailable { retry_after, .. } => retryable(Code::Unavailable, "HSM_UNAVAILABLE", *retry_after),
        HsmError::Busy { .. } => retryable(Code::ResourceExhausted, "HSM_BUSY", DEFAULT_RETRY),
        HsmError::Deadline(_) => retryable(Code::Unavailable, "HSM_TIMEOUT", DEFAULT_RETRY),
        HsmError::Stopped(_) => retryable(Code::Unavailable, "HSM_OFFICER_REQUIRED", Duration::from_secs(30)),
        // The device is not at fault: its station may retry once the HSM is repaired.
        HsmError::Refused(_) | HsmError::InvalidAnswer(_) => retryable(Code::Unavailable, "HSM_FAULT", HSM_RETRY),
        HsmError::Absent(_) => permanent(Code::Internal, "HSM_FAULT"),
    }
}

const fn store(error: &StoreError) -> WireError {
    match error {
        StoreError::Full { .. } => retryable(Code::ResourceExhausted, "DISK_FULL", Duration::from_secs(10)),
        StoreError::Failed { .. } => retryable(Code::Unavailable, "STORE_UNAVAILABLE", DEFAULT_RETRY),
        StoreError::WrongState { .. } | StoreError::WrongBatch { .. } => {
            retryable(Code::Aborted, "CONCURRENT_UPDATE", DEFAULT_RETRY)
        }
        StoreError::Damaged { .. } | StoreError::Directory(_) => permanent(Code::Internal, "STORE_FAULT"),
    }
}

const fn access(error: &AccessError) -> WireError {
    match error {
        AccessError::Refused(Refused::Request(RequestError::Unknown(_))) => permanent(Code::NotFound, "NO_REQUEST"),
        AccessError::Refused(Refused::Request(RequestError::OwnRequest(_) | RequestError::OwnRevocation(_))) => {
            permanent(Code::PermissionDenied, "OWN_REQUEST")
        }
        AccessError::Refused(Refused::Request(RequestError::Revoked(_))) => permanent(Code::Unauthenticated, "REVOKED"),
        AccessError::Refused(Refused::Request(RequestError::Taken(_))) => {
            permanent(Code::AlreadyExists, "REQUEST_TAKEN")
        }
        AccessError::Refused(Refused::Request(RequestError::TooMany(_))) => {
            permanent(Code::ResourceExhausted, "TOO_MANY_REQUESTS")
        }
        AccessError::Refused(Refused::Request(_)) => permanent(Code::FailedPrecondition, "REQUEST_STATE"),
        AccessError::Refused(Refused::Signature(_)) => permanent(Code::PermissionDenied, "BAD_SIGNATURE"),
        AccessError::Refused(Refused::Overlaps { .. }) => permanent(Code::AlreadyExists, "RANGE_OVERLAPS"),
        AccessError::Refused(Refused::Quota { exceeded, .. }) => quota(exceeded),
        AccessError::Refused(Refused::TooManyInUse(_)) => retryable(Code::Aborted, "IDENTITIES_TAKEN", DEFAULT_RETRY),
        AccessError::Refused(Refused::NoIdentity { .. }) => permanent(Code::ResourceExhausted, "IDENTITIES_EXHAUSTED"),
        AccessError::Refused(Refused::NeedsApproval { .. }) => permanent(Code::FailedPrecondition, "APPROVAL_REQUIRED"),
        AccessError::Refused(Refused::NoAuthority) => permanent(Code::FailedPrecondition, "NO_ACCESS_KEY"),
        AccessError::Refused(Refused::Unfit(_)) => permanent(Code::InvalidArgument, "INVALID"),
        AccessError::Store(error) => store(error),
        AccessError::Hsm(error) => hsm(error),
        AccessError::Certificate(_) => permanent(Code::Internal, "INTERNAL"),
    }
}

/// Returns the status of an error: message, reason and details. Internal details go to the log only.
pub(super) fn status_of(error: &CallError) -> Status {
    let wire = table(error);
    let mut details = ErrorDetails::with_error_info(wire.reason, DOMAIN, HashMap::new());
    if wire.retry.is_some() {
        details.set_retry_info(wire.retry);
    }
    match error {
        CallError::Invalid(violations) | CallError::Provision(ProvisionError::NotAccepted(violations)) => {
            let violation = |v: &crate::provisioning::FieldViolation| FieldViolation::new(v.field, v.problem.as_str());
            details.set_bad_request(violations.iter().map(violation).collect::<Vec<_>>());
        }
        CallError::Provision(ProvisionError::ChipTaken { chip, .. } | ProvisionError::AlreadyComplete { chip, .. }) => {
            details.set_resource_info("chip", chip.to_string(), "", error.to_string());
        }
        CallError::Provision(ProvisionError::IdentityTaken { identity, .. }) => {
            details.set_resource_info("identity", identity.to_string(), "", error.to_string());
        }
        CallError::Pool(PoolError::Empty { kind, fill_rate, .. }) => {
            details.set_error_info(wire.reason, DOMAIN, pool_metadata(*kind, *fill_rate));
        }
        _ => {}
    }
    Status::with_error_details(wire.code, message(error, wire.code), details)
}

/// Returns the stable reason of an error, for programs.
pub(super) fn reason_of(error: &CallError) -> &'static str {
    table(error).reason
}

/// Whether the error is a refusal of the request rather than a failure of the daemon.
pub(super) fn is_refusal(error: &CallError) -> bool {
    !matches!(table(error).code, Code::Internal | Code::Unavailable | Code::Aborted)
}

/// Returns the empty pool's key type and fill rate, for programs.
fn pool_metadata(kind: KeyType, fill_rate: f64) -> HashMap<String, String> {
    let rate = format!("{fill_rate:.2}");
    [("key_type", kind.to_string()), ("fill_rate_per_second", rate)].map(|(k, v)| (k.to_owned(), v)).into()
}

/// Returns the message for the caller. Internal causes name files, tokens and keys, so they go to the log only.
fn message(error: &CallError, code: Code) -> String {
    let text = match error {
        CallError::Hsm(HsmError::Unavailable { .. }) => "HSM unavailable; retry later",
        CallError::Hsm(HsmError::Refused(_) | HsmError::InvalidAnswer(_)) => {
            "the HSM rejected the operation; the cause is in the daemon's log under this answer's x-request-id"
        }
        CallError::Hsm(HsmError::Stopped(_)) => "the HSM needs an officer; run sppctl status for the cause",
        CallError::Provision(ProvisionError::Unsigned(_)) => {
            "no checkpoint of the log is signed yet, or the HSM did not sign it; nothing has changed, retry"
        }
        CallError::Store(StoreError::Failed { .. }) => "store unavailable; retry later",
        _ if code == Code::Internal => {
            "internal error; the cause is in the daemon's log under this answer's x-request-id"
        }
        other => return other.to_string(),
    };
    text.to_owned()
}

/// Returns the status for an address that exceeds its request rate.
pub(crate) fn rate_limited(after: Duration) -> Status {
    let mut details = ErrorDetails::with_error_info("RATE_LIMITED", DOMAIN, HashMap::new());
    details.set_retry_info(Some(after));
    let message = "request rate exceeded for this address; retry later";
    Status::with_error_details(Code::ResourceExhausted, message, details)
}

/// Returns the status for a listener with `capacity` requests in progress.
pub(crate) fn overloaded(capacity: usize) -> Status {
    status_of(&CallError::Overloaded(capacity))
}

/// Returns the status for a caller that is not authenticated or has the wrong role.
pub(super) fn refusal(code: Code, reason: &'static str, message: String) -> Status {
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use spp_format::certificate::Caller;
    use spp_format::names::{DeviceIdentity, SessionId};
    use spp_format::record::UniquenessConflict;

    use super::*;
    use crate::audit::AuditError;
    use crate::provisioning::FieldViolation;
    use crate::state_name::StateName;

    const SECRET_PATH: &str = "/var/lib/spp/state";

    fn session() -> SessionId {
        SessionId::from_bytes(&[7; 16]).unwrap()
    }

    fn identity() -> DeviceIdentity {
        "imei:490154203237518".parse().unwrap()
    }

    fn failed_store() -> StoreError {
        StoreError::Failed { store: "state store", operation: "reading", cause: SECRET_PATH.to_owned() }
    }

    fn full_store() -> StoreError {
        StoreError::Full { store: "state store", free: 1, floor: 2 }
    }

    fn conflict() -> UniquenessConflict {
        UniquenessConflict { field: "public key", index: 3, session: Some(session()) }
    }

    fn request(error: RequestError) -> CallError {
        AccessError::from(error).into()
    }

    fn refused(error: Refused) -> CallError {
        AccessError::Refused(error).into()
    }

    fn unavailable() -> HsmError {
        HsmError::Unavailable { reason: SECRET_PATH.to_owned(), retry_after: Duration::from_secs(3) }
    }

    fn audit() -> AuditError {
        AuditError::InUse("audit".into())
    }

    /// Every kind of error: code, reason, retry delay in milliseconds.
    #[rustfmt::skip]
    fn error_rows() -> Vec<(CallError, Code, &'static str, Option<u64>)> {
        use Code::{Aborted, AlreadyExists, FailedPrecondition, Internal, InvalidArgument, NotFound, PermissionDenied};
        use Code::{ResourceExhausted, Unauthenticated, Unavailable};
        use ProvisionError as P;
        let (chip, id) = (spp_format::names::ChipId::from_bytes(&[1; 8]).unwrap(), [2; 8]);
        let (station, officer) = ("line-1/a".parse::<spp_format::names::StationName>().unwrap(), "o-1");
        let officer = || officer.parse::<spp_format::names::OfficerName>().unwrap();
        let number = || spp_format::approval::RequestId::from_bytes(id);
        let exceeded = |exceeded| P::QuotaExceeded { station: station.clone(), exceeded };
        let empty = PoolError::Empty {
            kind: KeyType::P256, fill_rate: 1.5, retry_after: Duration::from_secs(2), paused: false,
        };
        vec![
            (CallError::invalid("chip_id", "too short"), InvalidArgument, "INVALID", None),
            (P::invalid("profile", "unknown").into(), InvalidArgument, "INVALID", None),
            (PoolError::TooMany { kind: KeyType::P256, limit: 9 }.into(), InvalidArgument, "INVALID", None),
            (CallError::Overloaded(64), ResourceExhausted, "OVERLOADED", Some(500)),
            (CallError::Ended("panicked".into()), Internal, "INTERNAL", None),
            (P::not_accepted("backup_package", "short").into(), FailedPrecondition, "NOT_ACCEPTED", None),
            (P::from(crate::config::NotPermitted::Unknown(station.clone())).into(), PermissionDenied, "NOT_PERMITTED", None),
            (P::ChipTaken { chip: chip.clone(), identity: identity(), session: session() }.into(), AlreadyExists, "CHIP_TAKEN", None),
            (P::IdentityTaken { identity: identity(), chip: chip.clone(), session: session() }.into(), AlreadyExists, "IDENTITY_TAKEN", None),
            (P::SubjectTaken { identity: identity(), session: session() }.into(), AlreadyExists, "SUBJECT_TAKEN", None),
            (P::PublicKeyTaken(session()).into(), AlreadyExists, "PUBLIC_KEY_TAKEN", None),
            (P::AlreadyComplete { chip: chip.clone(), session: session() }.into(), AlreadyExists, "ALREADY_COMPLETE", None),
            (P::NoSession("x".into()).into(), NotFound, "NO_SESSION", None),
            (P::NoRecord.into(), NotFound, "NO_RECORD", None),
            (P::WrongState { session: session(), state: StateName::Aborted, hint: "" }.into(), FailedPrecondition, "WRONG_STATE", None),
            (P::RolledBack(conflict()).into(), FailedPrecondition, "STATE_STORE_ROLLED_BACK", None),
            (PoolError::RolledBack("x".into()).into(), FailedPrecondition, "STATE_STORE_ROLLED_BACK", None),
            (P::PairUnavailable.into(), Aborted, "CONCURRENT_UPDATE", Some(500)),
            (P::ChipBusy(chip).into(), Aborted, "CHIP_BUSY", Some(500)),
            (exceeded(Exceeded::PerHour(5, 40)).into(), ResourceExhausted, "QUOTA_PER_HOUR", Some(40_000)),
            (exceeded(Exceeded::Total(5)).into(), PermissionDenied, "QUOTA_TOTAL", None),
            (refused(Refused::Quota { station: station.clone(), exceeded: Exceeded::Total(5) }), PermissionDenied, "QUOTA_TOTAL", None),
            (P::TooManyOpen { station: station.clone(), limit: 9 }.into(), ResourceExhausted, "OPEN_SESSIONS", Some(10_000)),
            (P::Identities(100).into(), Aborted, "IDENTITIES_TAKEN", Some(500)),
            (P::Unsigned("x".into()).into(), Unavailable, "CHECKPOINT_UNSIGNED", Some(500)),
            (P::Internal { doing: "signing", cause: "x".into() }.into(), Internal, "INTERNAL", None),
            (P::from(empty).into(), ResourceExhausted, "POOL_EMPTY", Some(2000)),
            (PoolError::DiskFull { free: 1, floor: 2 }.into(), ResourceExhausted, "DISK_FULL", Some(10_000)),
            (PoolError::NoPool(KeyType::P256).into(), NotFound, "NO_POOL", None),
            (unavailable_in_pool(), Unavailable, "HSM_UNAVAILABLE", Some(3000)),
            (P::from(unavailable()).into(), Unavailable, "HSM_UNAVAILABLE", Some(3000)),
            (AccessError::from(HsmError::Busy { waiting: 5 }).into(), ResourceExhausted, "HSM_BUSY", Some(500)),
            (CallError::Hsm(HsmError::Deadline(Duration::from_secs(1))), Unavailable, "HSM_TIMEOUT", Some(500)),
            (CallError::Hsm(HsmError::Stopped("PIN".into())), Unavailable, "HSM_OFFICER_REQUIRED", Some(30_000)),
            (CallError::Hsm(HsmError::Refused("x".into())), Unavailable, "HSM_FAULT", Some(1000)),
            (CallError::Hsm(HsmError::InvalidAnswer("x".into())), Unavailable, "HSM_FAULT", Some(1000)),
            (CallError::Hsm(HsmError::Absent("x".into())), Internal, "HSM_FAULT", None),
            (P::from(full_store()).into(), ResourceExhausted, "DISK_FULL", Some(10_000)),
            (PoolError::from(failed_store()).into(), Unavailable, "STORE_UNAVAILABLE", Some(500)),
            (AccessError::from(failed_store()).into(), Unavailable, "STORE_UNAVAILABLE", Some(500)),
            (StoreError::WrongBatch { batch: 1, problem: "x".into() }.into(), Aborted, "CONCURRENT_UPDATE", Some(500)),
            (StoreError::WrongState { session: session(), found: StateName::Aborted, needed: StateName::Issued }.into(), Aborted, "CONCURRENT_UPDATE", Some(500)),
            (StoreError::Damaged { store: "state store", what: "x".into(), cause: "x".into() }.into(), Internal, "STORE_FAULT", None),
            (StoreError::Directory("x".into()).into(), Internal, "STORE_FAULT", None),
            (audit().into(), Unavailable, "AUDIT_LOG_UNAVAILABLE", Some(500)),
            (ReloadError::Audit(audit()).into(), Unavailable, "AUDIT_LOG_UNAVAILABLE", Some(500)),
            (ReloadError::Refused("x".into()).into(), FailedPrecondition, "CONFIGURATION_REFUSED", None),
            (ReloadError::Access(failed_store().into()).into(), Unavailable, "STORE_UNAVAILABLE", Some(500)),
            (request(RequestError::Unknown(number())), NotFound, "NO_REQUEST", None),
            (request(RequestError::OwnRequest(officer())), PermissionDenied, "OWN_REQUEST", None),
            (request(RequestError::OwnRevocation(officer())), PermissionDenied, "OWN_REQUEST", None),
            (request(RequestError::Revoked(officer())), Unauthenticated, "REVOKED", None),
            (request(RequestError::Taken(number())), AlreadyExists, "REQUEST_TAKEN", None),
            (request(RequestError::TooMany(9)), ResourceExhausted, "TOO_MANY_REQUESTS", None),
            (request(RequestError::Expired(number())), FailedPrecondition, "REQUEST_STATE", None),
            (request(RequestError::Decided { id: number(), state: "used".into() }), FailedPrecondition, "REQUEST_STATE", None),
            (request(RequestError::NotApproved(number(), 1)), FailedPrecondition, "REQUEST_STATE", None),
            (refused(Refused::Signature("x".into())), PermissionDenied, "BAD_SIGNATURE", None),
            (refused(Refused::Overlaps { number: 1, first: Box::new(identity()), last: Box::new(identity()) }), AlreadyExists, "RANGE_OVERLAPS", None),
            (refused(Refused::TooManyInUse(3)), Aborted, "IDENTITIES_TAKEN", Some(500)),
            (refused(Refused::NoIdentity { profile: "phone".parse().unwrap(), station }), ResourceExhausted, "IDENTITIES_EXHAUSTED", None),
            (refused(Refused::NeedsApproval { caller: Caller::Officer(officer()) }), FailedPrecondition, "APPROVAL_REQUIRED", None),
            (refused(Refused::NoAuthority), FailedPrecondition, "NO_ACCESS_KEY", None),
            (refused(Refused::Unfit("x".into())), InvalidArgument, "INVALID", None),
        ]
    }

    #[test]
    fn errors_have_documented_code_reason_and_retry_delay() {
        for (error, code, reason, retry) in error_rows() {
            let status = status_of(&error);
            let details = status.get_error_details();
            let (info, delay) =
                (details.error_info().unwrap(), details.retry_info().and_then(|retry| retry.retry_delay));
            let found = (status.code(), info.reason.as_str(), delay.map(|delay| delay.as_millis() as u64));
            assert_eq!(found, (code, reason, retry), "{error:?}");
            assert_eq!((info.domain.as_str(), reason_of(&error)), (DOMAIN, reason));
        }
    }

    #[test]
    fn documentation_lists_every_reason() {
        /// Reason, code and whether `RetryInfo` is sent, of the errors that are no [`CallError`].
        const OTHER_REASONS: [(&str, Code, bool); 3] = [
            ("RATE_LIMITED", Code::ResourceExhausted, true), // src/server/http/public.rs
            ("UNAUTHENTICATED_CALLER", Code::Unauthenticated, false), // src/server/grpc/callers.rs
            ("WRONG_ROLE", Code::PermissionDenied, false),   // src/server/grpc/roles.rs
        ];
        let mut sent = BTreeSet::new();
        let rows = error_rows().into_iter().map(|(_, code, reason, retry)| (reason, code, retry.is_some()));
        for (reason, code, retry) in rows.chain(OTHER_REASONS) {
            sent.insert(format!(
                "`{reason}` `{}` {}",
                format!("{code:?}").to_uppercase(),
                if retry { "yes" } else { "no" }
            ));
        }
        // A reason with several codes has one retry entry for each code, in the same order.
        let (_, table) = include_str!("../../../docs/errors.md").split_once("| reason | code |").unwrap();
        let mut documented = Vec::new();
        for row in table.lines().filter(|line| line.starts_with("| `")) {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let [_, reason, codes, retries, meaning, action, _] = cells[..] else { panic!("not five cells: {row}") };
            assert!(!meaning.is_empty() && !action.is_empty(), "{row}");
            assert_eq!(codes.split(", ").count(), retries.split(", ").count(), "{row}");
            for (code, retry) in codes.split(", ").zip(retries.split(", ")) {
                // `Code` prints as InvalidArgument what the document writes as INVALID_ARGUMENT.
                documented.push(format!("{reason} {} {retry}", code.replace('_', "")));
            }
        }
        // Equal lists: every row is sent, every reason has a row, and the table is sorted.
        assert_eq!(documented, sent.into_iter().collect::<Vec<_>>());
    }

    fn unavailable_in_pool() -> CallError {
        ProvisionError::from(PoolError::from(unavailable())).into()
    }

    #[test]
    fn causes_of_failures_are_not_shown_to_callers() {
        for error in [CallError::Hsm(unavailable()), failed_store().into(), unavailable_in_pool()] {
            let status = status_of(&error);
            assert!(error.to_string().contains(SECRET_PATH), "the log has the cause");
            assert!(!status.message().contains(SECRET_PATH), "{status:?}");
        }
        let internal: CallError = ProvisionError::Internal { doing: "signing", cause: SECRET_PATH.to_owned() }.into();
        assert!(status_of(&internal).message().contains("x-request-id"));
        // An officer who reloads is shown the cause.
        let reload: CallError = ReloadError::Access(failed_store().into()).into();
        assert!(status_of(&reload).message().contains(SECRET_PATH));
    }

    #[test]
    fn details_name_fields_and_pool() {
        let violations = vec![FieldViolation::new("chip_id", "too short"), FieldViolation::new("csr", "missing")];
        let details = status_of(&CallError::Invalid(violations)).get_error_details();
        let fields: Vec<_> =
            details.bad_request().unwrap().field_violations.iter().map(|violation| violation.field.clone()).collect();
        assert_eq!(fields, ["chip_id", "csr"]);
        let empty = PoolError::Empty {
            kind: KeyType::Ed25519,
            fill_rate: 1.5,
            retry_after: Duration::from_secs(2),
            paused: false,
        };
        let details = status_of(&ProvisionError::from(empty).into()).get_error_details();
        let metadata = &details.error_info().unwrap().metadata;
        assert_eq!(metadata["key_type"], KeyType::Ed25519.to_string());
        assert_eq!(metadata["fill_rate_per_second"], "1.50");
    }
}
