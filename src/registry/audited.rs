//! What a log says of an audit log: for whoever checks that nobody cut off its newest entries.

use super::files::BUNDLE;
use super::source::{LogSource, SourceError, open_source};
use crate::audit::{Published, PublishedTrail};
use crate::store::{AuditCheckpoint, LogEntry};
use crate::tlog::{LogKey, SignedCheckpoint, TileId, TileKind, TlogError, Tree, bundle, leaf_hash};

/// The audit checkpoints of a node, as the log's key has signed them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditTrail {
    /// The log's newest checkpoint. An old copy of the log lacks the newest audit checkpoints: whoever has seen a larger tree can tell.
    pub checkpoint: SignedCheckpoint,
    /// Each with its place in the log, in the log's order. Their notes are as they were recorded: nothing is believed of them yet.
    pub found: Vec<(u64, AuditCheckpoint)>,
}

/// Why the audit checkpoints of a log could not be had.
#[derive(Debug, thiserror::Error)]
pub enum AuditTrailError {
    /// The log cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The log's checkpoint is not what it must be.
    #[error("the checkpoint of {log}: {cause}")]
    Checkpoint {
        /// How the log is called.
        log: String,
        /// What is wrong.
        cause: TlogError,
    },
    /// An entry is not one, or not one of those that were signed.
    #[error("{what} of {log} is damaged: {problem}; see sppctl registry verify for all of it, and ask another mirror")]
    Damaged {
        /// Which part.
        what: String,
        /// How the log is called.
        log: String,
        /// What is wrong.
        problem: String,
    },
}

/// The audit checkpoints of a node in a log, the daemon's directory, a mirror or a web address, for those who verify the audit log. A
/// log that has no checkpoint at all yet has none of them, and nothing else excuses what is missing.
pub fn published_checkpoints(place: &str, key: &LogKey, node: &str) -> Result<PublishedTrail, String> {
    let mut source = open_source(place, key, None).map_err(|e| e.to_string())?;
    if let Err(SourceError::Missing(_)) = source.checkpoint() {
        return Ok(PublishedTrail::default());
    }
    let trail = audit_checkpoints(&mut *source, key, node, &mut |_, _| {}).map_err(|e| e.to_string())?;
    let found = trail.found.into_iter().map(|(index, checkpoint)| Published { index, note: checkpoint.note });
    Ok(PublishedTrail { size: trail.checkpoint.size(), found: found.collect() })
}

/// Reads every entry of a log, a daemon's directory or a mirror, and gives the audit checkpoints of a node. The log's checkpoint must be
/// signed by its key, and the entries must be those of its tree: none of them can have been left out. Tells now and again how many
/// entries of how many were read.
pub fn audit_checkpoints(
    source: &mut dyn LogSource,
    key: &LogKey,
    node: &str,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<AuditTrail, AuditTrailError> {
    let note = source.checkpoint()?;
    let checkpoint = SignedCheckpoint::verify(&note, key)
        .map_err(|cause| AuditTrailError::Checkpoint { log: source.name(), cause })?;
    let damaged = |what: String, problem: String| AuditTrailError::Damaged { what, log: source.name(), problem };
    let (mut tree, mut found) = (Tree::default(), Vec::new());
    for number in 0..checkpoint.size().div_ceil(BUNDLE) {
        let id = TileId::in_tree(TileKind::Entries, number, checkpoint.size());
        let id = id.unwrap_or(TileId::full(TileKind::Entries, number));
        let bytes = source.tile(id)?;
        let entries = bundle::exactly(&bytes, id.width().into()).map_err(|e| damaged(id.to_string(), e.to_string()))?;
        for (index, bytes) in (number * BUNDLE..).zip(entries) {
            tree.push(leaf_hash(bytes));
            if !LogEntry::is_audit(bytes) {
                continue;
            }
            let audited = AuditCheckpoint::from_bytes(bytes);
            let audited = audited.map_err(|e| damaged(format!("entry {index}"), e.to_string()))?;
            if audited.node == node {
                found.push((index, audited));
            }
        }
        progress(tree.size(), checkpoint.size());
    }
    match tree.root() == checkpoint.root() {
        true => Ok(AuditTrail { checkpoint, found }),
        false => {
            let problem = format!("its root is not that of the {} entries", checkpoint.size());
            Err(damaged("the tree".to_owned(), problem))
        }
    }
}
