//! Barrier between readers of batches and the shredding of a batch: shredding waits for current readers, and readers never wait.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Interval between two checks for remaining readers.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Tracks callers that use a batch key or hold a lease. Entering never blocks.
#[derive(Default)]
pub(super) struct ReadersBarrier(Mutex<Arc<()>>);

/// Marks its holder as a reader until it is dropped.
pub struct ReaderGuard {
    _generation: Arc<()>,
}

impl ReadersBarrier {
    /// Enters as a reader.
    pub(super) fn enter(&self) -> ReaderGuard {
        ReaderGuard { _generation: Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner)) }
    }

    /// Waits until all current readers have finished. Later readers see changes made before this call, and are not waited for.
    /// Calls must be serialised: a second concurrent call would not wait for the readers of the first.
    pub(super) async fn wait_for_current(&self) {
        let old = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        while Arc::strong_count(&old) > 1 {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn barrier_waits_for_current_readers_only() {
        let barrier = ReadersBarrier::default();
        let first = barrier.enter();
        let mut waiting = Box::pin(barrier.wait_for_current());
        assert!(tokio::time::timeout(Duration::from_millis(30), &mut waiting).await.is_err());
        let _later = barrier.enter();
        drop(first);
        waiting.await;
    }
}
