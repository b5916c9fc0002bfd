//! The signed checkpoints of an audit log.

mod checkpoint;

pub use checkpoint::{Checkpoint, LogHead};
