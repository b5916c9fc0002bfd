//! The trait of the store of access control data, which storage engines implement, and its limits.

use async_trait::async_trait;
use spp_format::approval::{ApprovalRules, Quota, RequestId, SignedStatement, Verdict};
use spp_format::certificate::Caller;
use spp_format::names::{ChipId, DeviceIdentity, ProfileName, StationName};

use super::{
    AccessError, AppliedRules, ApprovalRequest, IdentityRange, IssuedAccess, LoadedRange, Revocation, StationUse,
};
use crate::store_error::StoreError;

/// Maximum open requests.
pub(crate) const MAX_OPEN_REQUESTS: usize = 50;
/// Maximum open requests of one officer.
pub(crate) const MAX_OWN_REQUESTS: usize = 20;
/// Maximum stored requests. Older decided requests remain only in the audit log.
pub(crate) const MAX_REQUESTS: usize = 300;
/// Maximum identity ranges.
pub(crate) const MAX_RANGES: usize = 1000;

/// Reads of the access control data.
#[async_trait]
pub trait AccessReader: Send + Sync {
    /// The rules in force; `None` before the first configuration is applied.
    async fn rules(&self) -> Result<Option<AppliedRules>, StoreError>;

    /// All stations with a quota, with their usage.
    async fn stations(&self) -> Result<Vec<StationUse>, StoreError>;

    /// All stored requests, newest first.
    async fn requests(&self) -> Result<Vec<ApprovalRequest>, StoreError>;

    /// A request by ID.
    async fn request(&self, id: RequestId) -> Result<Option<ApprovalRequest>, StoreError>;

    /// The newest revocation of each caller.
    async fn revocations(&self) -> Result<Vec<Revocation>, StoreError>;

    /// The newest certificate of each caller.
    async fn certificates(&self) -> Result<Vec<IssuedAccess>, StoreError>;

    /// All ranges, oldest first.
    async fn ranges(&self) -> Result<Vec<LoadedRange>, StoreError>;
}

/// The part of the state store that holds approvals, quotas, revocations and identity ranges.
///
/// Trust: an attacker who controls it can restore an older state: undo a revocation, raise a quota, allocate an identity again.
/// The audit log records what was in force.
/// Every write survives power loss once the call returns.
#[async_trait]
pub trait AccessStore: AccessReader {
    /// Applies the configured rules and quotas that need no approval ([`AppliedRules::apply`],
    /// [`AppliedQuota::apply`](super::AppliedQuota::apply)). Returns one message per setting that needs an approval and
    /// is therefore unchanged. With `all_or_nothing`, any such setting leaves everything unchanged.
    async fn apply(
        &self,
        rules: ApprovalRules,
        quotas: Vec<(StationName, Quota)>,
        all_or_nothing: bool,
    ) -> Result<Vec<String>, StoreError>;

    /// Files a pending request. Filing the same request again returns its current state.
    async fn file_request(&self, request: ApprovalRequest) -> Result<ApprovalRequest, AccessError>;

    /// Records one officer's decision. The last required approval executes the action in the same transaction; a ceremony becomes
    /// ready to be held.
    async fn decide(
        &self,
        id: RequestId,
        verdict: Verdict,
        by: SignedStatement,
    ) -> Result<ApprovalRequest, AccessError>;

    /// Consumes the approval of a ceremony that is about to be held.
    async fn consume_approval(&self, id: RequestId, at: u64) -> Result<ApprovalRequest, AccessError>;

    /// Stores a certificate as the newest of its caller.
    async fn record_certificate(&self, certificate: &IssuedAccess) -> Result<(), StoreError>;

    /// Adds an identity range for a profile. Ranges must not overlap.
    async fn load_range(
        &self,
        profile: ProfileName,
        range: IdentityRange,
        by: &Caller,
        at: u64,
    ) -> Result<LoadedRange, AccessError>;

    /// Permanently allocates an identity to a chip: the first unused one of the profile's ranges that starts with one of the
    /// `permitted` prefixes. The same chip gets the same identity again, unless it is `taken`: the public database has
    /// it for another chip, or its certificate subject belongs to another identity; then it gets the next one. A new allocation fails if the station's quota is exhausted.
    async fn allocate(
        &self,
        chip: &ChipId,
        profile: &ProfileName,
        station: &StationName,
        permitted: Vec<String>,
        taken: Option<DeviceIdentity>,
        at: u64,
    ) -> Result<DeviceIdentity, AccessError>;
}
