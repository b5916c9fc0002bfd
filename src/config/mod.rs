//! Configuration files: `sppd.toml` and the files that it names. The parsed shape of a file and its validated value are separate
//! types; all faults are reported at once ([`Faults`](spp_format::file_format::Faults)). Profile files are parsed in
//! [`spp_format::certificate`].

mod approvals;
mod audit;
mod changes;
mod daemon;
mod hsm;
mod key_pool;
mod listen;
mod log;
mod public;
mod registry;
mod sections;
mod settings;
mod shape;
mod stations;
mod store;
mod tls;

pub use audit::AuditConfig;
pub use daemon::DaemonConfig;
pub use hsm::HsmAccess;
pub use listen::Listen;
pub use log::{LogConfig, LogFormat};
pub use public::PublicConfig;
pub use registry::RegistryConfig;
pub use sections::{RegistryAccess, pin_refusals};
pub use stations::{NotPermitted, Stations};
pub use store::StoreConfig;
pub use tls::TlsConfig;
