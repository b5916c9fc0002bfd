//! Serialises the calls per chip, so that a repeated order waits for the first one instead of racing it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use spp_format::names::ChipId;
use tokio::sync::OwnedMutexGuard;

use super::ProvisionError;

/// How long a call waits for another call for the same chip.
const LOCK_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Default)]
pub(super) struct ChipLocks(Arc<Mutex<HashMap<ChipId, Arc<tokio::sync::Mutex<()>>>>>);

/// Holds the lock of a chip until it is dropped.
pub(super) struct ChipGuard {
    locks: Arc<Mutex<HashMap<ChipId, Arc<tokio::sync::Mutex<()>>>>>,
    chip: ChipId,
    guard: Option<OwnedMutexGuard<()>>,
}

impl ChipLocks {
    pub(super) async fn lock(&self, chip: &ChipId) -> Result<ChipGuard, ProvisionError> {
        let mutex = Arc::clone(self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(chip.clone()).or_default());
        let mut held = ChipGuard { locks: Arc::clone(&self.0), chip: chip.clone(), guard: None };
        let guard = tokio::time::timeout(LOCK_TIMEOUT, mutex.lock_owned()).await;
        held.guard = Some(guard.map_err(|_| ProvisionError::ChipBusy(chip.clone()))?);
        Ok(held)
    }
}

impl Drop for ChipGuard {
    fn drop(&mut self) {
        self.guard.take();
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        // Only the map holds a reference: no call holds or awaits the lock.
        if locks.get(&self.chip).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            locks.remove(&self.chip);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn chip_lock_excludes_second_caller_and_is_removed() {
        let locks = ChipLocks::default();
        let chip = ChipId::from_bytes(&[1; 8]).unwrap();
        let first = locks.lock(&chip).await.unwrap();
        let second = tokio::time::timeout(Duration::from_millis(20), locks.lock(&chip)).await;
        assert!(second.is_err(), "the second caller must wait");
        drop(second);
        drop(first);
        locks.lock(&chip).await.unwrap();
        assert!(locks.0.lock().unwrap().is_empty());
    }
}
