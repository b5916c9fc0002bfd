//! Maps each batch to the HSM that owns it: a batch's key, or its pairs, are on one token only.

use std::collections::BTreeSet;

use super::{KeyPool, PoolError};
use crate::hsm::{BatchName, Hsm, HsmId, StoreId};
use crate::store::{Batch, KeyStorage};

/// A snapshot of batch ownership.
pub(super) struct BatchOwners<'a> {
    hsm: &'a Hsm,
    store: StoreId,
    ready_members: BTreeSet<HsmId>,
    /// The only configured HSM, which owns every batch; `None` if there are several.
    single_hsm: Option<HsmId>,
    /// Whether every token has been compared with the store. Only then does a missing owner mean that no token has the batch.
    is_complete: bool,
}

impl BatchOwners<'_> {
    pub(super) fn name(&self, number: u64) -> BatchName {
        BatchName { store: self.store, number }
    }

    /// The owner of a batch. There is at most one, unless a token was cloned after batches were created.
    pub(super) fn owner_of(&self, number: u64) -> Option<HsmId> {
        self.hsm.batch_owners(self.name(number)).first().copied().or(self.single_hsm)
    }

    /// Whether the owner of the batch is ready. A single HSM counts as available: a call to it returns its own error.
    pub(super) fn is_available(&self, number: u64) -> bool {
        let owners = self.hsm.batch_owners(self.name(number));
        match self.single_hsm {
            Some(_) => true,
            None if owners.is_empty() => self.is_complete,
            None => owners.is_subset(&self.ready_members),
        }
    }

    /// Whether `member` maintains the batch: its owner does, or the first ready HSM if no token has the batch.
    pub(super) fn is_maintained_by(&self, member: HsmId, number: u64) -> bool {
        match self.owner_of(number) {
            Some(owner) => owner == member,
            None => self.is_complete && self.ready_members.first() == Some(&member),
        }
    }

    /// Whether an empty batch of on-token pairs has no owner yet, so that any HSM may take it.
    pub(super) fn can_be_claimed(&self, batch: &Batch) -> bool {
        let has_no_owner = self.is_complete && self.owner_of(batch.number).is_none();
        has_no_owner && batch.storage == KeyStorage::Hsm && batch.has_no_pairs()
    }
}

impl KeyPool {
    pub(super) async fn batch_owners(&self) -> Result<BatchOwners<'_>, PoolError> {
        let (store, _) = self.store.origin().await?;
        let is_complete = self.hsm.members().all(|member| self.reconcile_state().compared_members.contains(&member));
        let ready_members = self.hsm.ready_members().into_iter().collect();
        Ok(BatchOwners { hsm: &self.hsm, store, ready_members, single_hsm: self.single_hsm(), is_complete })
    }

    fn single_hsm(&self) -> Option<HsmId> {
        let mut all = self.hsm.members();
        all.next().filter(|_| all.next().is_none())
    }

    /// The HSMs that may receive new batches, least loaded first. A single HSM is listed even if it is not ready, so that calls
    /// to it return the reason.
    pub(super) fn in_service(&self) -> Vec<HsmId> {
        let mut members = self.single_hsm().map_or_else(|| self.hsm.ready_members(), |member| vec![member]);
        let reconcile_state = self.reconcile_state();
        members.retain(|member| reconcile_state.compared_members.contains(member));
        members
    }
}
