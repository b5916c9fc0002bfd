//! Access to the HSM through PKCS#11: the only module that uses cryptoki.
//!
//! The process that faces the network holds an [`Hsm`], an async handle with few operations. A worker process
//! ([`worker`]) loads the vendor's module, logs in with the PIN and serves requests over a socket pair, with one session per
//! thread. The supervisor starts the worker, checks every key before the worker serves, and replaces a worker that
//! hangs, crashes or reaches its operation limit. Calls wait for the new worker within their deadline.
//!
//! No plaintext private key crosses the PKCS#11 boundary: device keys leave the HSM wrapped under a transport key that the
//! HSM generates at each start. If a module cannot wrap a key type, its profile says so, and the worker generates the key
//! from the HSM's random numbers. Until it is erased, a private key is stored as a [`StoredKey`]: wrapped under a batch key
//! of the HSM, or a token object.
#![expect(clippy::disallowed_types, reason = "only this module may use PKCS#11")]

mod attributes;
mod background;
mod backup;
mod batches;
mod connection;
mod durable;
mod failure;
mod failure_class;
mod handle;
mod inventory;
mod kdf;
mod key_manifest;
mod key_manifest_file;
mod members;
mod module;
mod objects;
mod operations;
mod pairs;
mod pin;
pub mod pin_agent;
mod pin_attempts;
mod return_codes;
mod self_test;
mod signing;
mod statistics;
mod status;
mod stored_key;
mod supervisor;
#[cfg(test)]
pub(crate) mod tests;
mod token;
mod token_file_backup;
mod transport;
mod wire;
pub mod worker;
mod worker_state;

pub use attributes::{KeyRole, Provenance};
pub use background::{DaemonObjects, PairStorage};
pub use backup::{BACKUP_KEY_LEN, Restorable, SEALED_LEN, backup_check_value, is_sealed};
pub use failure::HsmError;
pub use failure_class::FailureClass;
pub use handle::{DeliveredPair, DeviceKeyRequest, DeviceKeys, Hsm, KeyReloadRequest, PairSource, ReloadedKeys};
pub use inventory::{Inventory, MechanismReport, SlotReport, TokenReport};
pub use kdf::{Derivation, Prf};
pub use key_manifest::{BackupKey, CheckpointKey, DestroyedKey, KeyManifest, MasterKey, SigningKey, SigningUse};
pub use members::{HsmId, Hsms};
pub use module::{KdfRoute, ModuleProfile, OaepHash, WrapMechanism};
pub use objects::{Ceremony, CreatedKey};
pub use pin::PinSource;
pub use pin_agent::PinAgent;
pub use pin_attempts::PinAttempts;
pub use self_test::{Finding, HsmRequirements, SelfTestReport, run_self_test};
pub(crate) use signing::{AccessSigner, CheckpointSigner};
pub use statistics::{CallStatistic, LATENCY_BOUNDS_US};
pub use status::{HsmStatus, MemberStatus};
pub use stored_key::{BatchName, StoreId, StoredKey, TokenPair, WrappedKey, batch_key_id};
pub use supervisor::{HsmConfig, SupervisorPacing};
pub use token::{TokenIdentity, initialise_token};
pub use token_file_backup::TokenFileBackup;
