//! Records callers' actions and refusals in the audit log.
//!
//! Actions are recorded before they are answered. Repeated refusals are aggregated, so that a caller cannot fill the disk.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{AuditError, AuditLog, Entry, Outcome};

/// Maximum number of refusal kinds that are counted separately. Further kinds are counted under [`OTHER_CALLERS`].
const MAX_REFUSAL_KINDS: usize = 1024;
/// The caller name of refusals beyond [`MAX_REFUSAL_KINDS`].
const OTHER_CALLERS: &str = "others";

/// Records actions and refusals in the audit log.
pub struct Auditor {
    log: Arc<AuditLog>,
    /// Aggregated refusals by caller, action and reason.
    refusals: Mutex<HashMap<RefusalKind, RepeatedRefusals>>,
    refused: Mutex<HashMap<&'static str, u64>>,
    lost: AtomicU64,
    checkpoint: Mutex<CheckpointStatus>,
}

/// The state of the last checkpoint of the log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckpointStatus {
    /// Number of entries covered by checkpoints since the daemon started.
    pub entries: u64,
    /// The error of the last attempt, if it failed.
    pub last_error: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct RefusalKind {
    caller: String,
    action: &'static str,
    reason: &'static str,
}

/// The refusals of one kind after the first, which is in the log: the last one and their number.
#[derive(Default)]
struct RepeatedRefusals {
    last: Option<Entry>,
    count: u64,
}

impl Auditor {
    /// Creates an auditor that writes to this log.
    pub fn new(log: Arc<AuditLog>) -> Self {
        let (refusals, refused, checkpoint) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { log, refusals, refused, lost: AtomicU64::new(0), checkpoint }
    }

    /// The audit log.
    pub const fn log(&self) -> &Arc<AuditLog> {
        &self.log
    }

    /// Checks that an entry can be written, before an action begins. After a failed write it writes an `audit.resumed` entry;
    /// no action begins until that succeeds.
    pub async fn ready(&self) -> Result<(), AuditError> {
        if self.log.is_broken() {
            self.log.record(Entry::new("sppd", "audit.resumed", Outcome::Done)).await?;
        }
        Ok(())
    }

    /// Records an action. The caller must not answer before this returns, and must refuse the action if this fails.
    pub async fn record(&self, entry: Entry) -> Result<u64, AuditError> {
        self.log.record(entry).await
    }

    /// Records a refusal, which changed nothing. The first of its kind is recorded at once; the following ones are counted and
    /// recorded by [`Self::record_repeats`]. `reason` is the stable reason code of the API.
    pub async fn refused(&self, entry: Entry, reason: &'static str) {
        self.count_refusal(reason);
        if let Some(first) = self.count(entry, reason) {
            self.record_or_count_loss(first).await;
        }
    }

    /// Counts a refusal that is recorded elsewhere.
    pub fn count_refusal(&self, reason: &'static str) {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner).entry(reason).or_default() += 1;
    }

    /// Counts a refusal; returns the entry if it is the first of its kind.
    fn count(&self, entry: Entry, reason: &'static str) -> Option<Entry> {
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kind = RefusalKind { caller: entry.caller.clone(), action: entry.action, reason };
        let mut entry = entry;
        if refusals.len() >= MAX_REFUSAL_KINDS && !refusals.contains_key(&kind) {
            OTHER_CALLERS.clone_into(&mut kind.caller);
            entry = Entry { caller: OTHER_CALLERS.to_owned(), ..entry };
        }
        match refusals.get_mut(&kind) {
            Some(repeats) => {
                repeats.count += 1;
                repeats.last = Some(entry);
                None
            }
            None => {
                refusals.insert(kind, RepeatedRefusals::default());
                Some(entry)
            }
        }
    }

    /// Records how often each refusal was repeated since the last call, and resets the counters.
    pub async fn record_repeats(&self) {
        let repeated: Vec<_> = {
            let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            refusals.drain().filter_map(|(_, repeats)| repeats.last.map(|last| (last, repeats.count))).collect()
        };
        for (last, count) in repeated {
            self.record_or_count_loss(last.with("repeated", count)).await;
        }
    }

    /// Number of refusals since the start, by reason.
    pub fn refusals(&self) -> Vec<(&'static str, u64)> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.iter().map(|(reason, count)| (*reason, *count)).collect()
    }

    /// Number of refusals since the start that could not be recorded.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// The state of the last checkpoint.
    pub fn checkpoint(&self) -> CheckpointStatus {
        self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_checkpoint_status(&self, entries: u64, last_error: Option<String>) {
        *self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner) = CheckpointStatus { entries, last_error };
    }

    async fn record_or_count_loss(&self, entry: Entry) {
        if let Err(error) = self.log.record(entry).await {
            self.lost.fetch_add(1, Ordering::Relaxed);
            tracing::error!(%error, "audit log: refusal not recorded");
        }
    }
}

#[cfg(test)]
mod tests {
    use spp_log::audit::{Entries, RecordedEntry};

    use super::*;

    /// Runs `refusals` and returns the entries of the log.
    async fn entries_after(refusals: impl AsyncFnOnce(&Auditor)) -> (Vec<RecordedEntry>, Auditor) {
        let temp = spp_testkit::files::temp_dir();
        let dir = temp.path().join("audit");
        AuditLog::create(&dir).unwrap();
        let auditor = Auditor::new(Arc::new(AuditLog::open(&dir, "node-1").unwrap()));
        refusals(&auditor).await;
        let mut reader = Entries::open(&dir).unwrap();
        let entries = std::iter::from_fn(|| reader.next_entry().unwrap()).collect();
        (entries, auditor)
    }

    fn refusal(caller: &str, chip: u32) -> Entry {
        Entry::new(caller, "line.assemble", Outcome::Refused("no".to_owned())).with("chip", chip)
    }

    #[tokio::test]
    async fn repeated_refusals_are_recorded_with_their_count() {
        let (entries, auditor) = entries_after(async |auditor| {
            for chip in 0..100 {
                auditor.refused(refusal("station a", chip), "QUOTA").await;
            }
            auditor.refused(refusal("station a", 7), "INVALID").await;
            auditor.refused(refusal("station b", 8), "QUOTA").await;
            auditor.record_repeats().await;
            auditor.record_repeats().await;
            auditor.refused(refusal("station b", 9), "QUOTA").await;
        })
        .await;
        let chips: Vec<_> = entries.iter().map(|entry| entry.details["chip"].as_str()).collect();
        assert_eq!(chips, ["0", "7", "8", "99", "9"]);
        assert_eq!(entries[3].details["repeated"], "99");
        let mut refusals = auditor.refusals();
        refusals.sort_unstable();
        assert_eq!(refusals, [("INVALID", 1), ("QUOTA", 102)]);
    }

    #[tokio::test]
    async fn refusals_beyond_the_kind_limit_share_one_entry() {
        let (entries, _) = entries_after(async |auditor| {
            for n in 0..3 * MAX_REFUSAL_KINDS as u32 {
                auditor.refused(refusal(&format!("unauthenticated ({n})"), n), "UNAUTHENTICATED_CALLER").await;
            }
            auditor.record_repeats().await;
        })
        .await;
        assert_eq!(entries.len(), MAX_REFUSAL_KINDS + 2);
        let others = entries[MAX_REFUSAL_KINDS..].iter().map(|entry| entry.caller.as_str()).collect::<Vec<_>>();
        assert_eq!(others, [OTHER_CALLERS, OTHER_CALLERS]);
        assert_eq!(entries[MAX_REFUSAL_KINDS + 1].details["repeated"], (2 * MAX_REFUSAL_KINDS - 1).to_string());
    }
}
