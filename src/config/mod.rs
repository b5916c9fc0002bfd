//! Files people write: the file's shape and the validated value are two types, and every fault is reported at once.

mod audit;
mod daemon;
mod faults;
mod files;
mod key_pool;
mod stations;
mod toml_file;

pub use audit::AuditConfig;
pub use daemon::{DaemonConfig, HsmAccess, Listen, LogConfig, LogFormat, StoreConfig, TlsConfig};
pub use faults::{Fault, Faults};
pub use files::{PrivateFileError, open_private};
pub use stations::{NotPermitted, Stations};
pub(crate) use toml_file::read_toml;
