//! Who may call, what two officers must agree on, and how much a station may make.
//!
//! The pure parts say what may become of a request, a quota, a range; the state store keeps them, each change in one
//! transaction; the [`AccessControl`] is what officers and callers come to.

mod action;
mod control;
mod quota;
mod range;
mod request;
mod revocation_list;
mod rules;
mod statement;

use serde::{Deserialize, Serialize};

pub use action::{MAX_CEREMONY_LEN, MAX_REASON_LEN, ProtectedAction, ProtectedActionKind};
pub use control::{AccessAuthority, AccessControl, Asked, Decision, Enrolled};
pub use quota::{Exceeded, NeedsApproval, Quota, SettledQuota, Usage};
pub use range::IdentityRange;
pub use request::{ApprovalRequest, RequestError, RequestId, RequestState};
pub use revocation_list::RevocationList;
pub use rules::ApprovalRules;
pub use statement::{ApprovalStatement, SignedStatement, Verdict, verify as verify_statement};

#[cfg(test)]
pub(crate) use request::tests::{request, signed};

use crate::certificate::{Caller, CertificateError};
use crate::hsm::HsmError;
use crate::names::{DeviceIdentity, ProfileName, StationName};
use crate::store::StoreError;

/// A caller whose certificates up to a moment are of no use any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// Who.
    pub caller: Caller,
    /// Certificates that begin at this moment or before are refused; seconds since the Unix epoch.
    pub at: u64,
    /// Why.
    pub reason: String,
    /// What it was requested as.
    pub request: RequestId,
}

/// A certificate that the daemon has made for a caller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuedAccess {
    /// For whom.
    pub caller: Caller,
    /// Its serial number.
    pub serial: Vec<u8>,
    /// Seconds since the Unix epoch.
    pub not_before: u64,
    /// Seconds since the Unix epoch.
    pub not_after: u64,
    /// Who asked for it: an officer, or the caller itself.
    pub by: String,
}

/// What a station may make and has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StationUse {
    /// Which one.
    pub station: StationName,
    /// Its quota.
    pub quota: SettledQuota,
    /// What it has begun.
    pub usage: Usage,
}

/// A range that an officer has loaded, and how far it is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedRange {
    /// Counted from 1.
    pub number: u64,
    /// For which product.
    pub profile: ProfileName,
    /// Which identities.
    pub range: IdentityRange,
    /// So many are given out or passed over, from the first on.
    pub used: u64,
    /// Who loaded it.
    pub by: String,
    /// Seconds since the Unix epoch.
    pub at: u64,
}

/// The rules in force, beside those that the configuration had when they were settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettledRules {
    /// What the configuration said.
    pub configured: ApprovalRules,
    /// What counts.
    pub in_force: ApprovalRules,
}

impl SettledRules {
    /// The first rules are those of the configuration; others take an approval, stricter ones, too: they could lock everybody out.
    pub fn settle(known: Option<Self>, configured: ApprovalRules) -> Result<Self, NeedsApproval> {
        match known {
            None => Ok(Self { configured, in_force: configured }),
            Some(known) if known.configured == configured => Ok(known),
            Some(known) if known.in_force == configured => Ok(Self { configured, in_force: configured }),
            Some(_) => Err(NeedsApproval),
        }
    }
}

/// Why something of this room was not done. Nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A request, or a decision on one.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The signature under a request or a decision.
    #[error("the signature is refused: {0}")]
    Signature(String),
    /// Another range has some of the identities.
    #[error("the range {first} to {last} is loaded already, as number {number}, and has some of these identities")]
    Overlaps {
        /// The other range.
        number: u64,
        /// Its first identity.
        first: Box<DeviceIdentity>,
        /// Its last one.
        last: Box<DeviceIdentity>,
    },
    /// The station has begun as many devices as it may.
    #[error("the station {station} {exceeded}")]
    Quota {
        /// Which one.
        station: StationName,
        /// Which limit.
        exceeded: Exceeded,
    },
    /// More identities than one call looks at are in use already.
    #[error("{0} identities of the range are in use already; repeat the call to go on behind them")]
    PassedOver(usize),
    /// No identity is left.
    #[error(
        "no identity of the profile {profile} is left that {station} may give out; an officer loads more with sppctl identities load"
    )]
    NoIdentity {
        /// The profile.
        profile: ProfileName,
        /// Who asks.
        station: StationName,
    },
    /// One officer alone does not let in an officer, or somebody who was revoked.
    #[error(
        "to enrol the {caller} for this key takes the approval of another officer: sppctl approvals request enroll {} {} --csr FILE; then \
         enrol with the same request and days", .caller.role(), .caller.name()
    )]
    NeedsApproval {
        /// Who is to be let in.
        caller: Caller,
    },
    /// The daemon has no key that signs access certificates.
    #[error("there is no access key in the register of keys; run a ceremony with [access_ca]")]
    NoAuthority,
    /// There is no such station, profile or request content.
    #[error("{0}")]
    Unfit(String),
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// It is refused.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The HSM.
    #[error(transparent)]
    Hsm(#[from] HsmError),
    /// A certificate could not be made.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
}

impl From<RequestError> for AccessError {
    fn from(error: RequestError) -> Self {
        Self::Refused(Refused::Request(error))
    }
}
