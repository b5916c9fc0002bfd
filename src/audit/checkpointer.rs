//! Background audit work: checkpoints, aggregated refusals, offline events and clock steps.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use spp_format::audit::{Checkpoint, LogHead};
use spp_format::record::AuditCheckpoint;
use tokio::sync::watch;

use super::offline_events::import_pending;
use super::{AuditError, Auditor, Entry, Outcome};
use crate::hsm::{CheckpointKey, CheckpointSigner, Hsm};
use crate::store::{PublishError, Registry};

/// How often the checkpointer checks for due work.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How often repeated refusals are recorded.
const REPEATS_INTERVAL: Duration = Duration::from_secs(60);
/// Maximum deviation of the wall clock from the monotonic clock between two polls. A larger one is recorded as a clock step.
const MAX_CLOCK_STEP: Duration = Duration::from_secs(2);
/// Timeout of the last checkpoint when the daemon stops.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The rules that decide when a checkpoint is due.
#[derive(Debug, Clone, Copy)]
pub struct CheckpointRules {
    /// Number of new entries after which a checkpoint is due.
    pub entries: u64,
    /// Time after which a checkpoint is due, if there are new entries.
    pub every: Duration,
}

/// Signs and publishes checkpoints of the audit log, and does the other periodic audit work.
pub struct AuditCheckpointer {
    auditor: Arc<Auditor>,
    signer: CheckpointSigner,
    registry: Registry,
    rules: CheckpointRules,
}

/// The part of the log that checkpoints cover.
#[derive(Clone, Copy, Default)]
struct Covered {
    entries: u64,
    /// Number of entries including the checkpoint's own entry. No checkpoint is due while the log has no more entries.
    idle_entries: u64,
}

impl AuditCheckpointer {
    /// Creates a checkpointer for this log, key and public database.
    pub fn new(
        auditor: Arc<Auditor>,
        hsm: &Hsm,
        key: CheckpointKey,
        registry: Registry,
        rules: CheckpointRules,
    ) -> Self {
        Self { auditor, signer: hsm.checkpoint_signer(key), registry, rules }
    }

    /// Compares the log with its newest published checkpoint, before an entry is added. A log without the last entry of that
    /// checkpoint was truncated, changed or restored from an old copy. This fails unless the configuration accepts exactly this
    /// loss, which is then recorded.
    pub async fn compare(&self, accepted_loss: Option<u64>) -> Result<(), String> {
        let log = self.auditor.log();
        let newest = self.registry.newest_audit(log.node()).await.map_err(|e| e.to_string())?;
        let Some((index, published)) = newest else { return Ok(()) };
        let signed = Checkpoint::verified(&published.note, self.signer.key())?.head;
        let hash = log.hash_of_line(signed.entries).await.map_err(|e| e.to_string())?;
        if signed.entries == 0 || hash == Some(signed.hash) {
            return Ok(());
        }
        let present = log.head().await.map_err(|e| e.to_string())?.entries;
        if accepted_loss != Some(index) {
            return Err(format!(
                "the audit log has {present} entries and does not match the checkpoint of {} entries in entry {index} of the \
                 public database: it was truncated or changed, or is an old \
                 copy; restore the newest copy, or accept the loss with \
                 accepted_loss = {index} in [audit]",
                signed.entries
            ));
        }
        let entry = Entry::new("sppd", "audit.loss", Outcome::Done)
            .with("index", index)
            .with("known", signed.entries)
            .with("kept", present);
        self.auditor.record(entry).await.map(drop).map_err(|e| e.to_string())
    }

    /// Imports the offline events that officers' tools stored beside the log.
    pub async fn import_offline_events(&self) -> Result<(), AuditError> {
        import_pending(self.auditor.log()).await
    }

    /// Runs until `stop` is true.
    pub async fn run(&self, mut stop: watch::Receiver<bool>) {
        let (mut covered, mut signed_at, mut repeats_at) = (Covered::default(), Instant::now(), Instant::now());
        let mut clock = ClockReading::now();
        while !*stop.borrow() {
            tokio::select! {
                () = tokio::time::sleep(POLL_INTERVAL) => {}
                // An error means that the sender was dropped, which is also a stop.
                _ = stop.changed() => break,
            }
            let now = ClockReading::now();
            self.record_jump(clock, now).await;
            clock = now;
            if let Err(error) = self.import_offline_events().await {
                tracing::error!(%error, "audit log: offline events not imported; will retry");
            }
            if repeats_at.elapsed() >= REPEATS_INTERVAL {
                self.auditor.record_repeats().await;
                repeats_at = Instant::now();
            }
            if self.is_due(covered, signed_at.elapsed()).await {
                covered = self.checkpoint(covered).await;
                signed_at = Instant::now();
            }
        }
    }

    /// Makes the last checkpoint before the daemon stops.
    pub async fn close(&self) {
        self.auditor.record_repeats().await;
        if tokio::time::timeout(CLOSE_TIMEOUT, self.checkpoint(Covered::default())).await.is_err() {
            tracing::warn!(
                "audit checkpoint failed at shutdown: the HSM or the public database did not answer in time"
            );
        }
    }

    async fn is_due(&self, covered: Covered, since: Duration) -> bool {
        let Ok(head) = self.auditor.log().head().await else { return false };
        let has_new = head.entries > covered.idle_entries;
        has_new && (since >= self.rules.every || head.entries - covered.entries >= self.rules.entries)
    }

    /// Signs and publishes a checkpoint, then records it. After a failure the next due checkpoint covers the same entries.
    async fn checkpoint(&self, before: Covered) -> Covered {
        let log = self.auditor.log();
        let Ok(head) = log.head().await else { return before };
        match self.sign_and_publish(head).await {
            Ok(recorded) => {
                self.auditor.set_checkpoint_status(head.entries, None);
                let idle_entries = if recorded == head.entries { recorded + 1 } else { head.entries };
                Covered { entries: head.entries, idle_entries }
            }
            Err(error) => {
                tracing::warn!(%error, "audit checkpoint not published; will retry");
                self.auditor.set_checkpoint_status(before.entries, Some(error));
                before
            }
        }
    }

    async fn sign_and_publish(&self, head: LogHead) -> Result<u64, String> {
        let node = self.auditor.log().node().to_owned();
        let text = Checkpoint { node: node.clone(), head }.text().map_err(|e| e.to_string())?;
        let signature = self.signer.sign_text(&text).await;
        let note = text.signed(self.signer.key(), &signature.map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
        let recorded = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (entries, bytes) = (head.entries, note.clone().into_bytes());
        let published = self.registry.append_audit(&AuditCheckpoint { node, entries, note: bytes, recorded }).await;
        let index = published.map_err(|e: PublishError| e.to_string())?.index;
        let entry = Entry::new("sppd", "audit.checkpoint", Outcome::Done)
            .with("entries", entries)
            .with("index", index)
            .with("note", note);
        self.auditor.record(entry).await.map_err(|e| e.to_string())
    }

    async fn record_jump(&self, before: ClockReading, now: ClockReading) {
        let Some(seconds) = before.clock_step(now) else { return };
        tracing::warn!(seconds, "clock step detected");
        let entry = Entry::new("sppd", "clock.jump", Outcome::Done).with("seconds", format!("{seconds:+}"));
        if let Err(error) = self.auditor.record(entry).await {
            tracing::error!(%error, "audit log: clock step not recorded");
        }
    }
}

/// A simultaneous reading of the wall clock and the monotonic clock.
#[derive(Clone, Copy)]
struct ClockReading {
    wall: SystemTime,
    monotonic: Instant,
}

impl ClockReading {
    fn now() -> Self {
        Self { wall: SystemTime::now(), monotonic: Instant::now() }
    }

    /// The step of the wall clock since this reading, in seconds; `None` if it is within [`MAX_CLOCK_STEP`].
    fn clock_step(self, now: Self) -> Option<i64> {
        let expected = self.wall + now.monotonic.duration_since(self.monotonic);
        let seconds = |step: Duration| i64::try_from(step.as_secs()).unwrap_or(i64::MAX);
        match now.wall.duration_since(expected) {
            Ok(ahead) if ahead > MAX_CLOCK_STEP => Some(seconds(ahead)),
            Err(behind) if behind.duration() > MAX_CLOCK_STEP => Some(-seconds(behind.duration())),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_step_beyond_tolerance_is_detected() {
        let before = ClockReading::now();
        let monotonic = before.monotonic + Duration::from_secs(1);
        let step_to = |wall| before.clock_step(ClockReading { wall, monotonic });
        assert_eq!(step_to(before.wall + Duration::from_secs(1)), None);
        assert_eq!(step_to(before.wall + Duration::from_millis(2900)), None, "a slow poll is not a clock step");
        assert_eq!(step_to(before.wall + Duration::from_secs(3601)), Some(3600));
        assert_eq!(step_to(before.wall - Duration::from_secs(59)), Some(-60));
    }
}
