//! Reads the audit checkpoints of a log. They prove that the newest entries of an audit log were not truncated.

use spp_format::record::{AuditCheckpoint, LogEntry};
use spp_format::tlog::{LogKey, SignedCheckpoint, TileId, TileKind, TlogError, Tree, bundle, leaf_hash};

use super::full_tiles::BUNDLE;
use super::source::{LogSource, SourceError, open_source};
use crate::audit::{PublishedCheckpoint, PublishedCheckpoints};

/// The audit checkpoints of a node in a signed log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditTrail {
    /// The log's newest checkpoint. An old copy of the log lacks the newest audit checkpoints; compare the tree size with one
    /// seen before.
    pub checkpoint: SignedCheckpoint,
    /// The audit checkpoints with their entry indexes, in log order. Their notes are not verified yet.
    pub checkpoints: Vec<(u64, AuditCheckpoint)>,
}

/// Why the audit checkpoints of a log could not be read.
#[derive(Debug, thiserror::Error)]
pub enum AuditTrailError {
    /// The log cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The log's checkpoint is invalid.
    #[error("checkpoint of {log}: {cause}")]
    Checkpoint {
        /// The log's name.
        log: String,
        /// Why it is invalid.
        cause: TlogError,
    },
    /// An entry is malformed, or the entries are not those of the signed tree.
    #[error(
        "{what} of {log} is damaged: {problem}; run sppctl registry verify for all findings, and try another mirror"
    )]
    Damaged {
        /// The damaged part.
        what: String,
        /// The log's name.
        log: String,
        /// Why it is invalid.
        problem: String,
    },
}

/// The audit checkpoints of a node in a log (a daemon's directory, a mirror or a web address), for verifying the audit log. The
/// result is empty only if the log has no checkpoint yet; any other missing part is an error.
pub fn published_checkpoints(place: &str, key: &LogKey, node: &str) -> Result<PublishedCheckpoints, String> {
    let mut source = open_source(place, key, None).map_err(|e| e.to_string())?;
    if let Err(SourceError::Missing(_)) = source.checkpoint() {
        return Ok(PublishedCheckpoints::default());
    }
    let trail = audit_checkpoints(&mut *source, key, node, &mut |_, _| {}).map_err(|e| e.to_string())?;
    let checkpoints =
        trail.checkpoints.into_iter().map(|(index, checkpoint)| PublishedCheckpoint { index, note: checkpoint.note });
    Ok(PublishedCheckpoints { size: trail.checkpoint.size(), checkpoints: checkpoints.collect() })
}

/// Reads every entry of a log and returns the audit checkpoints of a node. Verifies that the log's key has signed the checkpoint
/// and that the entries are those of its tree, so none can be omitted. Calls `progress` with the numbers of read and of all
/// entries.
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
    let (mut tree, mut checkpoints) = (Tree::default(), Vec::new());
    for number in 0..checkpoint.size().div_ceil(BUNDLE) {
        let id = TileId::in_tree(TileKind::Entries, number, checkpoint.size());
        let id = id.unwrap_or(TileId::full(TileKind::Entries, number));
        let bytes = source.tile(id)?;
        let entries =
            bundle::decode_exactly(&bytes, id.width().into()).map_err(|e| damaged(id.to_string(), e.to_string()))?;
        for (index, bytes) in (number * BUNDLE..).zip(entries) {
            tree.push(leaf_hash(bytes));
            if !LogEntry::is_audit(bytes) {
                continue;
            }
            let audited = AuditCheckpoint::from_bytes(bytes);
            let audited = audited.map_err(|e| damaged(format!("entry {index}"), e.to_string()))?;
            if audited.node == node {
                checkpoints.push((index, audited));
            }
        }
        progress(tree.size(), checkpoint.size());
    }
    match tree.root() == checkpoint.root() {
        true => Ok(AuditTrail { checkpoint, checkpoints }),
        false => {
            let problem = format!("the root does not match the {} entries", checkpoint.size());
            Err(damaged("tree".to_owned(), problem))
        }
    }
}
