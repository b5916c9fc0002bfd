//! Configuration files. The parsed shape of a file and its validated value are separate types; all faults are reported at once.

mod approvals;
mod audit;
mod changes;
mod daemon;
mod faults;
mod files;
mod hsm;
mod key_pool;
mod public;
mod registry;
mod settings;
mod stations;
mod store;
mod tls;
mod toml_file;

pub use audit::AuditConfig;
pub use daemon::{DaemonConfig, Listen, LogConfig, LogFormat};
pub use faults::{Fault, Faults};
pub use files::{PrivateFileError, open_private};
pub use hsm::{HsmAccess, pin_refusals};
pub use public::PublicConfig;
pub use registry::{RegistryAccess, RegistryConfig};
pub use stations::{NotPermitted, Stations};
pub use store::StoreConfig;
pub use tls::TlsConfig;
pub(crate) use toml_file::read_toml;
