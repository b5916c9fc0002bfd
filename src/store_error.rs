//! The failures of a store.

use spp_format::names::SessionId;

use crate::state_name::StateName;

/// Why a store operation failed. Earlier acknowledged writes remain durable.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Free disk space is below the limit for the operation; nothing was written. New devices require the configured floor,
    /// all other writes a small fixed minimum.
    #[error("{store}: disk full: {free} bytes free, {floor} bytes required; free disk space")]
    Full {
        /// Which store.
        store: &'static str,
        /// Free bytes now.
        free: u64,
        /// Required free bytes.
        floor: u64,
    },
    /// The engine failed or is being reopened. The outcome of a write in progress is unknown.
    #[error("{store}: {operation} failed: {cause}")]
    Failed {
        /// Which store.
        store: &'static str,
        /// The failed operation.
        operation: &'static str,
        /// The engine's error message.
        cause: String,
    },
    /// A stored value cannot be decoded: it is corrupt, or a newer version wrote it.
    #[error("{store}: cannot read {what}: {cause}")]
    Damaged {
        /// Which store.
        store: &'static str,
        /// The value.
        what: String,
        /// Why it cannot be read.
        cause: String,
    },
    /// The store directory is missing (the daemon never creates one), or exists already (`sppctl init` never overwrites one).
    #[error("{0}")]
    Directory(String),
    /// The batch's state does not allow the step, usually because a concurrent step came first.
    #[error("batch {batch} {problem}")]
    WrongBatch {
        /// The batch.
        batch: u64,
        /// Why the step is not allowed.
        problem: String,
    },
    /// The session's state does not allow the step, usually because a concurrent call came first.
    #[error("session {session} is in state {found:?}; the step requires {needed:?}")]
    WrongState {
        /// The session.
        session: SessionId,
        /// Its current state.
        found: StateName,
        /// The required state.
        needed: StateName,
    },
}
