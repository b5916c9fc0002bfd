//! What the state store keeps of callers and officers, and the trait of its engines.

use async_trait::async_trait;

use super::StoreError;
use crate::access::{
    AccessError, ApprovalRequest, ApprovalRules, IdentityRange, IssuedAccess, LoadedRange, Quota, RequestId,
    Revocation, SettledRules, SignedStatement, StationUse, Verdict,
};
use crate::certificate::Caller;
use crate::names::{ChipId, DeviceIdentity, ProfileName, StationName};

/// Most requests that may wait for a decision.
pub(super) const MAX_OPEN_REQUESTS: usize = 50;
/// Most of them that one officer has asked for.
pub(super) const MAX_OWN_REQUESTS: usize = 20;
/// So many requests are kept; older ones that are decided are in the audit log alone.
pub(super) const MAX_REQUESTS: usize = 300;
/// Most ranges of identities.
pub(super) const MAX_RANGES: usize = 1000;

/// The part of the state store that knows what officers have agreed on.
///
/// Trust: whoever controls it can put back an older state of it: a revocation undone, a quota raised, an identity given out again.
/// The audit log says what was in force.
/// Every write is on the disk, power loss included, before the call returns.
#[async_trait]
pub trait AccessStore: Send + Sync {
    /// Takes over what the configuration says of rules and quotas, as far as nobody's approval is needed ([`SettledRules::settle`],
    /// [`SettledQuota::settle`](crate::access::SettledQuota::settle)). Answers, in words, what needs one and so stays as it was;
    /// with `whole` nothing at all is taken over then.
    async fn settle(
        &self,
        rules: ApprovalRules,
        quotas: Vec<(StationName, Quota)>,
        whole: bool,
    ) -> Result<Vec<String>, StoreError>;

    /// The rules in force; none before the first settling.
    async fn rules(&self) -> Result<Option<SettledRules>, StoreError>;

    /// Stations that were ever settled, with their quotas and what they have begun.
    async fn stations(&self) -> Result<Vec<StationUse>, StoreError>;

    /// Puts in a request that is pending. The very same again is answered as it stands.
    async fn file_request(&self, request: ApprovalRequest) -> Result<ApprovalRequest, AccessError>;

    /// All requests that are kept, newest first.
    async fn requests(&self) -> Result<Vec<ApprovalRequest>, StoreError>;

    /// A request by its name.
    async fn request(&self, id: RequestId) -> Result<Option<ApprovalRequest>, StoreError>;

    /// Takes one officer's decision. The approval that completes an act does it in the same transaction, or makes a ceremony ready.
    async fn decide(
        &self,
        id: RequestId,
        verdict: Verdict,
        by: SignedStatement,
    ) -> Result<ApprovalRequest, AccessError>;

    /// A ceremony is about to be held: its approval is used up.
    async fn use_up(&self, id: RequestId, at: u64) -> Result<ApprovalRequest, AccessError>;

    /// All revocations, the newest of each caller.
    async fn revocations(&self) -> Result<Vec<Revocation>, StoreError>;

    /// Keeps the newest certificate of its caller.
    async fn note_certificate(&self, certificate: &IssuedAccess) -> Result<(), StoreError>;

    /// The newest certificate of each caller.
    async fn certificates(&self) -> Result<Vec<IssuedAccess>, StoreError>;

    /// Puts in identities for a product, none of which may be in another range.
    async fn load_range(
        &self,
        profile: ProfileName,
        range: IdentityRange,
        by: &Caller,
        at: u64,
    ) -> Result<LoadedRange, AccessError>;

    /// All ranges, in the order in which they were loaded.
    async fn ranges(&self) -> Result<Vec<LoadedRange>, StoreError>;

    /// The identity of a chip, given out to it alone and for ever: the first one that is left of the product's ranges and begins as one
    /// of `permitted` does. The same chip gets the same one again, unless it is `taken`, as the public database knows better:
    /// then the next. A station without room in its quota gets none for a chip that has none yet.
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
