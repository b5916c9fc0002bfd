//! What callers do, on its way to the log: acts before they are answered, refusals without letting anybody fill the disk.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{AuditError, AuditLog, Entry, Outcome};

/// Kinds of refusals that are told apart at once; those beyond are counted together.
const KINDS: usize = 1024;
/// The caller of refusals beyond.
const OTHERS: &str = "others";

/// Records what callers did and what they were refused.
pub struct Auditor {
    log: Arc<AuditLog>,
    /// The same caller refused the same for the same reason is one kind.
    refusals: Mutex<HashMap<Kind, Repeats>>,
    refused: Mutex<HashMap<&'static str, u64>>,
    lost: AtomicU64,
    checkpoint: Mutex<CheckpointStatus>,
}

/// Up to where the log's end is signed and published.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckpointStatus {
    /// So many entries are covered, as far as this life of the daemon knows.
    pub entries: u64,
    /// Why the last attempt failed, if it did.
    pub trouble: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Kind {
    caller: String,
    act: &'static str,
    reason: &'static str,
}

/// The first one is in the log; of those after it the last and their number.
#[derive(Default)]
struct Repeats {
    last: Option<Entry>,
    count: u64,
}

impl Auditor {
    /// Records into that log.
    pub fn new(log: Arc<AuditLog>) -> Self {
        let (refusals, refused, checkpoint) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { log, refusals, refused, lost: AtomicU64::new(0), checkpoint }
    }

    /// The log itself.
    pub const fn log(&self) -> &Arc<AuditLog> {
        &self.log
    }

    /// Whether what is about to be done can be recorded. While the disk refuses, nothing is begun; the first that is accepted again
    /// says so.
    pub async fn ready(&self) -> Result<(), AuditError> {
        if self.log.is_broken() {
            self.log.record(Entry::new("sppd", "audit.resumed", Outcome::Done)).await?;
        }
        Ok(())
    }

    /// Records an act. It must not be answered before this returns, and not at all if this fails.
    pub async fn record(&self, entry: Entry) -> Result<u64, AuditError> {
        self.log.record(entry).await
    }

    /// Records a refusal, which changed nothing: the first of its kind at once, those after it counted and told every now and then
    /// by [`Self::tell_repeats`]. `reason` is the stable word for programs.
    pub async fn refused(&self, entry: Entry, reason: &'static str) {
        self.count_refusal(reason);
        if let Some(first) = self.count(entry, reason) {
            self.record_or_count_as_lost(first).await;
        }
    }

    /// Counts a refusal that is recorded otherwise.
    pub fn count_refusal(&self, reason: &'static str) {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner).entry(reason).or_default() += 1;
    }

    /// The entry, if it is the first of its kind.
    fn count(&self, entry: Entry, reason: &'static str) -> Option<Entry> {
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kind = Kind { caller: entry.caller.clone(), act: entry.act, reason };
        let mut entry = entry;
        if refusals.len() >= KINDS && !refusals.contains_key(&kind) {
            OTHERS.clone_into(&mut kind.caller);
            entry = Entry { caller: OTHERS.to_owned(), ..entry };
        }
        match refusals.get_mut(&kind) {
            Some(repeats) => {
                repeats.count += 1;
                repeats.last = Some(entry);
                None
            }
            None => {
                refusals.insert(kind, Repeats::default());
                Some(entry)
            }
        }
    }

    /// Tells how often refusals were repeated since they were told last, and forgets those that were not.
    pub async fn tell_repeats(&self) {
        let repeated: Vec<_> = {
            let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            refusals.drain().filter_map(|(_, repeats)| repeats.last.map(|last| (last, repeats.count))).collect()
        };
        for (last, count) in repeated {
            self.record_or_count_as_lost(last.with("repeated", count)).await;
        }
    }

    /// Refusals by reason since the start.
    pub fn refusals(&self) -> Vec<(&'static str, u64)> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.iter().map(|(reason, count)| (*reason, *count)).collect()
    }

    /// Refusals that could not be recorded since the start.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Up to where the log's end is signed and published.
    pub fn checkpoint(&self) -> CheckpointStatus {
        self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn note_checkpoint(&self, entries: u64, trouble: Option<String>) {
        *self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner) = CheckpointStatus { entries, trouble };
    }

    async fn record_or_count_as_lost(&self, entry: Entry) {
        if let Err(error) = self.log.record(entry).await {
            self.lost.fetch_add(1, Ordering::Relaxed);
            tracing::error!(%error, "a refusal is not in the audit log");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Entries, Recorded};
    use super::*;

    async fn after(refusals: impl AsyncFnOnce(&Auditor)) -> (Vec<Recorded>, Auditor) {
        let place = spp_testkit::files::temp_dir();
        let dir = place.path().join("audit");
        AuditLog::create(&dir).unwrap();
        let auditor = Auditor::new(Arc::new(AuditLog::open(&dir, "node-1").unwrap()));
        refusals(&auditor).await;
        let mut entries = Entries::open(&dir).unwrap();
        let told = std::iter::from_fn(|| entries.next_entry().unwrap()).collect();
        (told, auditor)
    }

    fn refusal(caller: &str, chip: u32) -> Entry {
        Entry::new(caller, "line.assemble", Outcome::Refused("no".to_owned())).with("chip", chip)
    }

    #[tokio::test]
    async fn the_first_refusal_of_a_kind_is_told_at_once_and_the_others_with_their_number() {
        let (told, auditor) = after(async |auditor| {
            for chip in 0..100 {
                auditor.refused(refusal("station a", chip), "QUOTA").await;
            }
            auditor.refused(refusal("station a", 7), "INVALID").await;
            auditor.refused(refusal("station b", 8), "QUOTA").await;
            auditor.tell_repeats().await;
            auditor.tell_repeats().await;
            auditor.refused(refusal("station b", 9), "QUOTA").await;
        })
        .await;
        let chips: Vec<_> = told.iter().map(|entry| entry.details["chip"].as_str()).collect();
        assert_eq!(chips, ["0", "7", "8", "99", "9"]);
        assert_eq!(told[3].details["repeated"], "99");
        let mut refusals = auditor.refusals();
        refusals.sort_unstable();
        assert_eq!(refusals, [("INVALID", 1), ("QUOTA", 102)]);
    }

    #[tokio::test]
    async fn a_flood_of_callers_is_one_line_beyond_the_first_ones() {
        let (told, _) = after(async |auditor| {
            for n in 0..3 * KINDS as u32 {
                auditor.refused(refusal(&format!("nobody at {n}"), n), "NO_CALLER").await;
            }
            auditor.tell_repeats().await;
        })
        .await;
        assert_eq!(told.len(), KINDS + 2);
        assert_eq!((told[KINDS].caller.as_str(), told[KINDS + 1].caller.as_str()), (OTHERS, OTHERS));
        assert_eq!(told[KINDS + 1].details["repeated"], (2 * KINDS - 1).to_string());
    }
}
