//! Which HSM keeps a batch: its key, or its pairs, are on one token alone.

use std::collections::BTreeSet;

use super::{KeyPool, PoolError};
use crate::hsm::{Hsm, HsmId};
use crate::keys::{BatchName, StoreId};
use crate::store::{Batch, KeyStorage};

/// Who keeps what at this moment.
pub(super) struct BatchOwners<'a> {
    hsm: &'a Hsm,
    store: StoreId,
    ready_members: BTreeSet<HsmId>,
    /// The one that keeps everything, where there is one alone.
    only: Option<HsmId>,
    /// Whether every token has been looked at: what is on record nowhere is nowhere.
    complete: bool,
}

impl BatchOwners<'_> {
    pub(super) fn name(&self, number: u64) -> BatchName {
        BatchName { store: self.store, number }
    }

    /// Who keeps the batch: one HSM, if no token was copied too late.
    pub(super) fn of(&self, number: u64) -> Option<HsmId> {
        self.hsm.keepers(self.name(number)).first().copied().or(self.only)
    }

    /// Whether whoever keeps the batch can be asked for it. Whoever waits for the only HSM says so itself.
    pub(super) fn are_at_hand(&self, number: u64) -> bool {
        let keepers = self.hsm.keepers(self.name(number));
        match self.only {
            Some(_) => true,
            None if keepers.is_empty() => self.complete,
            None => keepers.is_subset(&self.ready_members),
        }
    }

    /// Who looks after the batch: its keeper, or for one that is on no token whoever can.
    pub(super) fn looks_after(&self, member: HsmId, number: u64) -> bool {
        match self.of(number) {
            Some(keeper) => keeper == member,
            None => self.complete && self.ready_members.first() == Some(&member),
        }
    }

    /// Whether a batch of pairs on a token is on none yet.
    pub(super) fn may_be_given_to_any(&self, batch: &Batch) -> bool {
        let nowhere = self.complete && self.of(batch.number).is_none();
        nowhere && batch.keeping == KeyStorage::Hsm && batch.is_used_up()
    }
}

impl KeyPool {
    pub(super) async fn keepers(&self) -> Result<BatchOwners<'_>, PoolError> {
        let (store, _) = self.store.origin().await?;
        let complete = self.hsm.each().all(|member| self.notes().compared.contains(&member));
        let ready_members = self.hsm.ready_members().into_iter().collect();
        Ok(BatchOwners { hsm: &self.hsm, store, ready_members, only: self.only_hsm(), complete })
    }

    fn only_hsm(&self) -> Option<HsmId> {
        let mut all = self.hsm.each();
        all.next().filter(|_| all.next().is_none())
    }

    /// The HSMs that may be given new batches, who has least to do first. The only one, whether it is there or not: whoever asks it
    /// is told why it is not.
    pub(super) fn in_service(&self) -> Vec<HsmId> {
        let mut members = self.only_hsm().map_or_else(|| self.hsm.ready_members(), |only| vec![only]);
        let notes = self.notes();
        members.retain(|member| notes.compared.contains(member));
        members
    }
}
