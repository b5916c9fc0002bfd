//! Entries of the public database: device records and audit checkpoints, their keys, and their position in the log.

mod audit_checkpoint;
mod device_record;
mod entry;
mod fields;
mod publication;
mod unique;

pub use audit_checkpoint::AuditCheckpoint;
pub use device_record::DeviceRecord;
pub use entry::LogEntry;
pub use fields::RecordError;
pub use publication::{Publication, PublishedRecord, UniquenessConflict};
pub use unique::UniqueKey;
