//! The one table from errors to gRPC statuses: everything that a caller may learn of a failure is on this screen.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

use crate::access::{AccessError, Exceeded, Refused, RequestError};
use crate::hsm::HsmError;
use crate::keypool::PoolError;
use crate::keys::KeyKind;
use crate::provisioning::ProvisionError;
use crate::reload::ReloadError;
use crate::store::StoreError;

/// `google.rpc.ErrorInfo.domain` of every error.
const DOMAIN: &str = "spp";
/// When to try again where nothing better is known.
const SOON: Duration = Duration::from_millis(500);

/// When a call that the HSM refused may be tried again.
const HSM_PROBE: Duration = Duration::from_secs(1);

/// What a caller is told.
struct Told {
    code: Code,
    /// `google.rpc.ErrorInfo.reason`: stable, for programs.
    reason: &'static str,
    retry: Option<Duration>,
}

const fn told(code: Code, reason: &'static str) -> Told {
    Told { code, reason, retry: None }
}

const fn again(code: Code, reason: &'static str, retry: Duration) -> Told {
    Told { code, reason, retry: Some(retry) }
}

fn table(error: &ProvisionError) -> Told {
    use ProvisionError as E;
    match error {
        E::Invalid(_) => told(Code::InvalidArgument, "INVALID"),
        E::NotAccepted(_) => told(Code::FailedPrecondition, "NOT_ACCEPTED"),
        E::NotPermitted(_) => told(Code::PermissionDenied, "NOT_PERMITTED"),
        E::ChipTaken { .. } => told(Code::AlreadyExists, "CHIP_TAKEN"),
        E::IdentityTaken { .. } => told(Code::AlreadyExists, "IDENTITY_TAKEN"),
        E::AlreadyComplete { .. } => told(Code::AlreadyExists, "ALREADY_COMPLETE"),
        E::NoSession(_) => told(Code::NotFound, "NO_SESSION"),
        E::NoRecord => told(Code::NotFound, "NO_RECORD"),
        E::WrongState { .. } => told(Code::FailedPrecondition, "WRONG_STATE"),
        E::RolledBack(_) => told(Code::FailedPrecondition, "STATE_STORE_ROLLED_BACK"),
        E::Pool(PoolError::Empty { retry_after, .. }) => again(Code::ResourceExhausted, "POOL_EMPTY", *retry_after),
        E::Pool(PoolError::NoRoom { .. }) => again(Code::ResourceExhausted, "DISK_FULL", Duration::from_secs(10)),
        E::Pool(PoolError::TooMany { .. }) => told(Code::InvalidArgument, "INVALID"),
        E::Pool(PoolError::NoPool(_)) => told(Code::NotFound, "NO_POOL"),
        E::Pool(PoolError::RolledBack(_)) => told(Code::FailedPrecondition, "STATE_STORE_ROLLED_BACK"),
        E::Pool(PoolError::Hsm(_) | PoolError::Store(_)) => again(Code::Unavailable, "POOL_UNAVAILABLE", SOON),
        E::PairGone => again(Code::Aborted, "OVERTAKEN", SOON),
        E::ChipBusy(_) => again(Code::Aborted, "CHIP_BUSY", SOON),
        E::Overloaded(_) => again(Code::ResourceExhausted, "OVERLOADED", SOON),
        E::Hsm(error) => hsm(error),
        E::Store(error) => store(error),
        E::QuotaExceeded { exceeded: Exceeded::PerHour(_, after), .. } => {
            again(Code::ResourceExhausted, "QUOTA_PER_HOUR", Duration::from_secs(*after))
        }
        E::QuotaExceeded { exceeded: Exceeded::Total(_), .. } => told(Code::PermissionDenied, "QUOTA_TOTAL"),
        E::Access(error) => access(error),
        E::Identities(_) => again(Code::Aborted, "IDENTITIES_TAKEN", SOON),
        E::Unsigned(_) => again(Code::Unavailable, "CHECKPOINT_UNSIGNED", SOON),
        E::Reload(ReloadError::Refused(_)) => told(Code::FailedPrecondition, "CONFIGURATION_REFUSED"),
        E::Reload(ReloadError::Access(error)) => access(error),
        E::Reload(ReloadError::Audit(_)) | E::Audit(_) => again(Code::Unavailable, "AUDIT_LOG_UNAVAILABLE", SOON),
        E::Internal { .. } => told(Code::Internal, "FAULT"),
    }
}

const fn hsm(error: &HsmError) -> Told {
    match error {
        HsmError::Unavailable { retry_after, .. } => again(Code::Unavailable, "HSM_UNAVAILABLE", *retry_after),
        HsmError::Busy { .. } => again(Code::ResourceExhausted, "HSM_BUSY", SOON),
        HsmError::Deadline(_) => again(Code::Unavailable, "HSM_SLOW", SOON),
        HsmError::Stopped(_) => again(Code::Unavailable, "HSM_NEEDS_OFFICER", Duration::from_secs(30)),
        // Nothing is wrong with the device: it may come again once somebody has looked at the HSM.
        HsmError::Refused(_) | HsmError::Wrong(_) => again(Code::Unavailable, "HSM_FAULT", HSM_PROBE),
        HsmError::Absent(_) => told(Code::Internal, "HSM_FAULT"),
    }
}

const fn store(error: &StoreError) -> Told {
    match error {
        StoreError::Full { .. } => again(Code::ResourceExhausted, "DISK_FULL", Duration::from_secs(10)),
        StoreError::Failed { .. } => again(Code::Unavailable, "STORE_UNAVAILABLE", SOON),
        StoreError::OtherState { .. } | StoreError::WrongBatch { .. } => again(Code::Aborted, "OVERTAKEN", SOON),
        StoreError::Damaged { .. } | StoreError::Directory(_) => told(Code::Internal, "STORE_FAULT"),
    }
}

const fn access(error: &AccessError) -> Told {
    match error {
        AccessError::Refused(Refused::Request(RequestError::Unknown(_))) => told(Code::NotFound, "NO_REQUEST"),
        AccessError::Refused(Refused::Request(RequestError::OwnRequest(_) | RequestError::OwnRevocation(_))) => {
            told(Code::PermissionDenied, "OWN_REQUEST")
        }
        AccessError::Refused(Refused::Request(RequestError::Revoked(_))) => told(Code::Unauthenticated, "REVOKED"),
        AccessError::Refused(Refused::Request(RequestError::Taken(_))) => told(Code::AlreadyExists, "REQUEST_TAKEN"),
        AccessError::Refused(Refused::Request(RequestError::TooMany(_))) => {
            told(Code::ResourceExhausted, "TOO_MANY_REQUESTS")
        }
        AccessError::Refused(Refused::Request(_)) => told(Code::FailedPrecondition, "REQUEST_STATE"),
        AccessError::Refused(Refused::Signature(_)) => told(Code::PermissionDenied, "BAD_SIGNATURE"),
        AccessError::Refused(Refused::Overlaps { .. }) => told(Code::AlreadyExists, "RANGE_OVERLAPS"),
        AccessError::Refused(Refused::Quota { .. }) => told(Code::ResourceExhausted, "QUOTA"),
        AccessError::Refused(Refused::PassedOver(_)) => again(Code::Aborted, "IDENTITIES_TAKEN", SOON),
        AccessError::Refused(Refused::NoIdentity { .. }) => told(Code::ResourceExhausted, "NO_IDENTITY_LEFT"),
        AccessError::Refused(Refused::NeedsApproval { .. }) => told(Code::FailedPrecondition, "NEEDS_APPROVAL"),
        AccessError::Refused(Refused::NoAuthority) => told(Code::FailedPrecondition, "NO_ACCESS_KEY"),
        AccessError::Refused(Refused::Unfit(_)) => told(Code::InvalidArgument, "INVALID"),
        AccessError::Store(error) => store(error),
        AccessError::Hsm(error) => hsm(error),
        AccessError::Certificate(_) => told(Code::Internal, "FAULT"),
    }
}

/// The status of an error: message, reason, and the details that fit. What is not the caller's business is only logged.
pub(super) fn status_of(error: &ProvisionError) -> Status {
    let told = table(error);
    let mut details = ErrorDetails::with_error_info(told.reason, DOMAIN, HashMap::new());
    if told.retry.is_some() {
        details.set_retry_info(told.retry);
    }
    match error {
        ProvisionError::Invalid(violations) | ProvisionError::NotAccepted(violations) => {
            let violation = |v: &crate::provisioning::FieldViolation| FieldViolation::new(v.field, v.problem.as_str());
            details.set_bad_request(violations.iter().map(violation).collect::<Vec<_>>());
        }
        ProvisionError::ChipTaken { chip, .. } | ProvisionError::AlreadyComplete { chip, .. } => {
            details.set_resource_info("chip", chip.to_string(), "", error.to_string());
        }
        ProvisionError::Pool(PoolError::Empty { kind, fill_rate, .. }) => {
            details.set_error_info(told.reason, DOMAIN, pool_metadata(*kind, *fill_rate));
        }
        ProvisionError::IdentityTaken { identity, .. } => {
            details.set_resource_info("identity", identity.to_string(), "", error.to_string());
        }
        _ => {}
    }
    Status::with_error_details(told.code, message(error, told.code), details)
}

/// The stable word for an error, for programs.
pub(super) fn reason_of(error: &ProvisionError) -> &'static str {
    table(error).reason
}

/// Whether the caller was refused, rather than that something here failed.
pub(super) fn is_refusal(error: &ProvisionError) -> bool {
    !matches!(table(error).code, Code::Internal | Code::Unavailable | Code::Aborted)
}

/// For programs: what is missing, and how fast it comes.
fn pool_metadata(kind: KeyKind, fill_rate: f64) -> HashMap<String, String> {
    let rate = format!("{fill_rate:.2}");
    [("key_kind", kind.to_string()), ("fill_rate_per_second", rate)].map(|(k, v)| (k.to_owned(), v)).into()
}

/// What went wrong inside is the log's and the officer's business: it names files, tokens and keys.
fn message(error: &ProvisionError, code: Code) -> String {
    let told = match error {
        ProvisionError::Hsm(HsmError::Unavailable { .. }) => "the HSM is not available now; try again",
        ProvisionError::Hsm(HsmError::Refused(_) | HsmError::Wrong(_)) => {
            "the HSM refused; the log of the processing point has the cause under the x-request-id of this answer"
        }
        ProvisionError::Hsm(HsmError::Stopped(_)) => "the HSM needs an officer; sppctl status tells why",
        ProvisionError::Unsigned(_) => "the HSM did not sign the log's checkpoint; nothing has changed, try again",
        ProvisionError::Store(StoreError::Failed { .. }) => "a store is not available now; try again",
        _ if code == Code::Internal => {
            "a fault of the processing point; its log has the cause under the x-request-id of this answer"
        }
        other => return other.to_string(),
    };
    told.to_owned()
}

/// An address asks too often.
pub(crate) fn too_fast(after: Duration) -> Status {
    let mut details = ErrorDetails::with_error_info("TOO_FAST", DOMAIN, HashMap::new());
    details.set_retry_info(Some(after));
    let message = "this address asks too often; try again later";
    Status::with_error_details(Code::ResourceExhausted, message, details)
}

/// So many requests of the public are being answered.
pub(crate) fn busy(places: usize) -> Status {
    status_of(&ProvisionError::Overloaded(places))
}

/// A refusal that has no error of an inner room: the caller has the wrong role, or none.
pub(super) fn refusal(code: Code, reason: &'static str, message: String) -> Status {
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new()))
}
