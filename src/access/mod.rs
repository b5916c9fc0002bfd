//! Access control: enrolment and revocation of callers, approvals by several officers, station quotas, identity ranges.
//!
//! The types of this module define the state transitions of requests, quotas and ranges. The state store commits each
//! transition in one transaction. [`AccessControl`] is the service that the RPCs use. What officers sign, and the protected
//! actions, are in [`spp_format::approval`]; the certificates of callers are in [`spp_format::certificate`].

mod control;
mod quota;
mod range;
mod request;
mod revocation_list;
mod store;

use serde::{Deserialize, Serialize};
use spp_format::approval::{ApprovalRules, RequestId};
use spp_format::certificate::{Caller, CertificateError};
use spp_format::names::{DeviceIdentity, ProfileName, StationName};

pub use control::{AccessAuthority, AccessControl, Decision, Enrolled, SubmittedRequest};
pub use quota::{AppliedQuota, Exceeded, NeedsApproval, Usage};
pub use range::IdentityRange;
pub use request::{ApprovalRequest, RequestError, RequestState};
pub use revocation_list::RevocationList;
pub use store::{AccessReader, AccessStore};
pub(crate) use store::{MAX_OPEN_REQUESTS, MAX_OWN_REQUESTS, MAX_RANGES, MAX_REQUESTS};

#[cfg(test)]
pub(crate) use request::tests::{request, signed};

use crate::hsm::HsmError;
use crate::store_error::StoreError;

/// The revocation of a caller's certificates up to a point in time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// The revoked caller.
    pub caller: Caller,
    /// Certificates that begin at or before this time are refused; seconds since the Unix epoch.
    pub at: u64,
    /// The reason.
    pub reason: String,
    /// The approval request that revoked the caller.
    pub request: RequestId,
}

/// A certificate that the daemon issued to a caller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuedAccess {
    /// The certificate's subject.
    pub caller: Caller,
    /// The serial number.
    pub serial: Vec<u8>,
    /// Seconds since the Unix epoch.
    pub not_before: u64,
    /// Seconds since the Unix epoch.
    pub not_after: u64,
    /// The officer who enrolled the caller, or the caller itself after a renewal.
    pub by: String,
}

/// A station's quota and usage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StationUse {
    /// The station.
    pub station: StationName,
    /// The station's quota.
    pub quota: AppliedQuota,
    /// The devices that the station has begun.
    pub usage: Usage,
}

/// A range of identities that an officer loaded, and how much of it is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedRange {
    /// Sequence number, from 1.
    pub number: u64,
    /// The profile that uses the identities.
    pub profile: ProfileName,
    /// The identities.
    pub range: IdentityRange,
    /// Number of identities assigned or skipped, from the first on.
    pub used: u64,
    /// The officer who loaded the range.
    pub by: String,
    /// Time of loading; seconds since the Unix epoch.
    pub at: u64,
}

/// The rules in force, and the configured rules that they were derived from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedRules {
    /// The rules of the configuration then.
    pub configured: ApprovalRules,
    /// The rules in force.
    pub in_force: ApprovalRules,
}

impl AppliedRules {
    /// Applies configured rules. The first ones take effect as they are. Later changes need an approval, even stricter ones,
    /// because those could lock all officers out.
    pub fn apply(known: Option<Self>, configured: ApprovalRules) -> Result<Self, NeedsApproval> {
        match known {
            None => Ok(Self { configured, in_force: configured }),
            Some(known) if known.configured == configured => Ok(known),
            Some(known) if known.in_force == configured => Ok(Self { configured, in_force: configured }),
            Some(_) => Err(NeedsApproval),
        }
    }
}

/// A refused access operation. It has changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// An approval request, or a decision on one.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The signature of a request or a decision does not verify.
    #[error("invalid signature: {0}")]
    Signature(String),
    /// The range overlaps a loaded one.
    #[error("the range overlaps range {number}, which is loaded already ({first} to {last})")]
    Overlaps {
        /// Number of the loaded range.
        number: u64,
        /// First identity of the loaded range.
        first: Box<DeviceIdentity>,
        /// Last identity of the loaded range.
        last: Box<DeviceIdentity>,
    },
    /// The station's quota is exhausted.
    #[error("station {station} {exceeded}")]
    Quota {
        /// The station.
        station: StationName,
        /// The exceeded limit.
        exceeded: Exceeded,
    },
    /// One call skips a limited number of identities that are in use, and all of these are.
    #[error("{0} identities of the range are in use already; repeat the command to continue after them")]
    TooManyInUse(usize),
    /// No unused identity is left.
    #[error(
        "no unused identity of profile {profile} is left that station {station} may assign; ask an officer to load more \
         (sppctl identities load)"
    )]
    NoIdentity {
        /// The profile.
        profile: ProfileName,
        /// The calling station.
        station: StationName,
    },
    /// Enrolling an officer or a revoked caller needs an approval.
    #[error(
        "enrolling the {caller} for this key needs the approval of another officer: run sppctl approvals request enroll {} {} \
         --csr FILE, then enrol with the same CSR and days", .caller.role(), .caller.name()
    )]
    NeedsApproval {
        /// The caller to enrol.
        caller: Caller,
    },
    /// The daemon has no key that signs access certificates.
    #[error("the key manifest has no access key; run a ceremony with [access_ca]")]
    NoAuthority,
    /// The station, profile or content of the request is not valid.
    #[error("{0}")]
    Unfit(String),
}

/// A failed access operation.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The operation is refused.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The state store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The HSM failed.
    #[error(transparent)]
    Hsm(#[from] HsmError),
    /// A certificate could not be encoded.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
}

impl From<RequestError> for AccessError {
    fn from(error: RequestError) -> Self {
        Self::Refused(Refused::Request(error))
    }
}
