//! What happens to the log without being asked: its end is signed and published, repeated refusals are told, and a clock that jumps.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::offline_events::take_in;
use super::{AuditError, Auditor, Checkpoint, Entry, LogHead, Outcome};
use crate::hsm::{CheckpointKey, Hsm};
use crate::keys::SignatureAlgorithm;
use crate::store::{AuditCheckpoint, PublishError, Registry};

/// How often it is looked what is due.
const LOOK: Duration = Duration::from_secs(1);
/// How often repeated refusals are told.
const TELL: Duration = Duration::from_secs(60);
/// A clock that is off by more than that between two looks has jumped.
const JUMP: Duration = Duration::from_secs(2);
/// How long the last checkpoint may take when the daemon stops.
const LAST: Duration = Duration::from_secs(5);

/// When a checkpoint is due.
#[derive(Debug, Clone, Copy)]
pub struct CheckpointRules {
    /// After so many entries.
    pub entries: u64,
    /// After so long, if there are any.
    pub every: Duration,
}

/// Looks after the log while the daemon runs.
pub struct AuditCheckpointer {
    auditor: Arc<Auditor>,
    hsm: Hsm,
    key: CheckpointKey,
    registry: Registry,
    rules: CheckpointRules,
}

/// Up to where the end is signed.
#[derive(Clone, Copy, Default)]
struct Covered {
    entries: u64,
    /// With no more entries than that, there is nothing new but the checkpoint's own one.
    quiet: u64,
}

impl AuditCheckpointer {
    /// For that log, key and public database.
    pub const fn new(
        auditor: Arc<Auditor>,
        hsm: Hsm,
        key: CheckpointKey,
        registry: Registry,
        rules: CheckpointRules,
    ) -> Self {
        Self { auditor, hsm, key, registry, rules }
    }

    /// Compares the log with the newest checkpoint that the public database has of it, before anything is added: a log that does not have
    /// the entry that it ends with was cut off, changed or put back from an older copy. It is not gone on with unless that very loss is
    /// accepted, which is recorded.
    pub async fn compare(&self, accepted_loss: Option<u64>) -> Result<(), String> {
        let log = self.auditor.log();
        let newest = self.registry.newest_audit(log.node()).await.map_err(|e| e.to_string())?;
        let Some((index, published)) = newest else { return Ok(()) };
        let known = Checkpoint::verified(&published.note, &self.key.key)?.head;
        let found = log.hash_of_line(known.entries).await.map_err(|e| e.to_string())?;
        if known.entries == 0 || found == Some(known.hash) {
            return Ok(());
        }
        let kept = log.head().await.map_err(|e| e.to_string())?.entries;
        if accepted_loss != Some(index) {
            return Err(format!(
                "the audit log has {kept} entries, and not entry {} as entry {index} of the public database knows it: it was cut off or \
                 changed, or is an old copy; put the newest one in its place, or accept the loss with accepted_loss = {index} in [audit]",
                known.entries - 1
            ));
        }
        let entry = Entry::new("sppd", "audit.loss", Outcome::Done)
            .with("index", index)
            .with("known", known.entries)
            .with("kept", kept);
        self.auditor.record(entry).await.map(drop).map_err(|e| e.to_string())
    }

    /// Takes in what officers did on the token by themselves, as they wrote it down beside the log.
    pub async fn import_offline_events(&self) -> Result<(), AuditError> {
        take_in(self.auditor.log()).await
    }

    /// Looks after it until `stop` is true.
    pub async fn run(&self, mut stop: watch::Receiver<bool>) {
        let (mut covered, mut signed_at, mut told_at) = (Covered::default(), Instant::now(), Instant::now());
        let mut clock = Reading::now();
        while !*stop.borrow() {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                // An error means that the sender is gone, which is a stop as well.
                _ = stop.changed() => break,
            }
            let now = Reading::now();
            self.record_jump(clock, now).await;
            clock = now;
            if let Err(error) = self.import_offline_events().await {
                tracing::error!(%error, "what was done on the token is not in the audit log; it is tried again");
            }
            if told_at.elapsed() >= TELL {
                self.auditor.tell_repeats().await;
                told_at = Instant::now();
            }
            if self.is_due(covered, signed_at.elapsed()).await {
                covered = self.checkpoint(covered).await;
                signed_at = Instant::now();
            }
        }
    }

    /// The last checkpoint of this life, after its last entry.
    pub async fn close(&self) {
        self.auditor.tell_repeats().await;
        if tokio::time::timeout(LAST, self.checkpoint(Covered::default())).await.is_err() {
            tracing::warn!(
                "the end of the audit log is not signed: the HSM or the public database did not answer in time"
            );
        }
    }

    async fn is_due(&self, covered: Covered, since: Duration) -> bool {
        let Ok(head) = self.auditor.log().head().await else { return false };
        let new = head.entries > covered.quiet;
        new && (since >= self.rules.every || head.entries - covered.entries >= self.rules.entries)
    }

    /// Signs where the log ends, publishes that, and then records it. Whatever fails is tried again when the next one is due.
    async fn checkpoint(&self, before: Covered) -> Covered {
        let log = self.auditor.log();
        let Ok(head) = log.head().await else { return before };
        match self.sign_and_publish(head).await {
            Ok(recorded) => {
                self.auditor.note_checkpoint(head.entries, None);
                let quiet = if recorded == head.entries { recorded + 1 } else { head.entries };
                Covered { entries: head.entries, quiet }
            }
            Err(why) => {
                tracing::warn!(%why, "the end of the audit log is not signed and published; it is tried again");
                self.auditor.note_checkpoint(before.entries, Some(why));
                before
            }
        }
    }

    async fn sign_and_publish(&self, head: LogHead) -> Result<u64, String> {
        let node = self.auditor.log().node().to_owned();
        let text = Checkpoint { node: node.clone(), head }.text().map_err(|e| e.to_string())?;
        let signature = self.hsm.sign(&self.key.name, SignatureAlgorithm::Ed25519, text.to_be_signed()).await;
        let note = text.signed(&self.key.key, &signature.map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
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

    async fn record_jump(&self, before: Reading, now: Reading) {
        let Some(seconds) = before.jumped(now) else { return };
        tracing::warn!(seconds, "the clock has jumped");
        let entry = Entry::new("sppd", "clock.jump", Outcome::Done).with("seconds", format!("{seconds:+}"));
        if let Err(error) = self.auditor.record(entry).await {
            tracing::error!(%error, "a jump of the clock is not in the audit log");
        }
    }
}

/// What both clocks say: the one that people set, and the one that only goes on.
#[derive(Clone, Copy)]
struct Reading {
    wall: SystemTime,
    steady: Instant,
}

impl Reading {
    fn now() -> Self {
        Self { wall: SystemTime::now(), steady: Instant::now() }
    }

    /// By how many seconds the wall clock has jumped since, if it has.
    fn jumped(self, now: Self) -> Option<i64> {
        let expected = self.wall + now.steady.duration_since(self.steady);
        let seconds = |off: Duration| i64::try_from(off.as_secs()).unwrap_or(i64::MAX);
        match now.wall.duration_since(expected) {
            Ok(ahead) if ahead > JUMP => Some(seconds(ahead)),
            Err(behind) if behind.duration() > JUMP => Some(-seconds(behind.duration())),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_has_jumped_and_one_that_goes_on_has_not() {
        let before = Reading::now();
        let later = before.steady + Duration::from_secs(1);
        let at = |wall| before.jumped(Reading { wall, steady: later });
        assert_eq!(at(before.wall + Duration::from_secs(1)), None);
        assert_eq!(at(before.wall + Duration::from_millis(2900)), None, "a slow look is no jump");
        assert_eq!(at(before.wall + Duration::from_secs(3601)), Some(3600));
        assert_eq!(at(before.wall - Duration::from_secs(59)), Some(-60));
    }
}
