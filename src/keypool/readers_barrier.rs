//! Who is in the middle of something with a batch.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How often it is looked whether everybody has finished.
const LOOK: Duration = Duration::from_millis(2);

/// Those who use a batch's key or have a pair in hand. Nobody ever waits to become one.
#[derive(Default)]
pub(super) struct ReadersBarrier(Mutex<Arc<()>>);

/// One of them, as long as it lives.
pub struct ReaderGuard {
    _shift: Arc<()>,
}

impl ReadersBarrier {
    /// Becomes one.
    pub(super) fn join(&self) -> ReaderGuard {
        ReaderGuard { _shift: Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner)) }
    }

    /// Waits until everybody who is one now has finished. Who comes later sees what was changed before this was called, and
    /// is not waited for. One caller at a time, else the later one would not wait for those of the earlier one.
    pub(super) async fn let_finish(&self) {
        let old = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        while Arc::strong_count(&old) > 1 {
            tokio::time::sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn those_who_were_there_are_waited_for_and_those_who_come_later_are_not() {
        let users = ReadersBarrier::default();
        let first = users.join();
        let mut waiting = Box::pin(users.let_finish());
        assert!(tokio::time::timeout(Duration::from_millis(30), &mut waiting).await.is_err());
        let _later = users.join();
        drop(first);
        waiting.await;
    }
}
