//! The HSM: the only room with cryptoki.
//!
//! The process that faces the network holds an [`Hsm`]: an async handle with few verbs. Behind it stands a worker
//! process ([`worker`]), which loads the vendor's module, holds the PIN and serves requests over a socket pair with one
//! session per thread. The supervisor starts it, checks every key before anything is served, and replaces it when it
//! hangs, crashes or has done its share; calls wait for the new one within their deadline.
//!
//! No plaintext private key crosses the PKCS#11 boundary: a transport key made in the HSM at each start wraps device keys
//! on their way to this process. Where a module cannot wrap a kind of key its profile says so, and the key is made in
//! the worker from the HSM's random numbers.
#![expect(clippy::disallowed_types, reason = "this is the room of PKCS#11")]

mod attributes;
mod background;
mod backup;
mod batches;
mod connection;
mod durable;
mod failure;
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
mod statistics;
mod status;
mod supervisor;
#[cfg(test)]
pub(crate) mod tests;
mod token;
mod token_file_backup;
mod transport;
mod wire;
pub mod worker;

pub use attributes::{KeyRole, Provenance};
pub use background::{KeepIn, OwnObjects};
pub use backup::{BACKUP_KEY_LEN, Restorable, SEALED_LEN, backup_check_value, is_sealed};
pub use failure::{FailureClass, HsmError};
pub use handle::{DeliveredPair, DeviceKeyOrder, DeviceKeys, HeldKeyOrder, HeldKeys, Hsm, PairOrder};
pub use inventory::{Inventory, MechanismReport, SlotReport, TokenReport};
pub use kdf::{Derivation, Prf};
pub use key_manifest::{BackupKey, CheckpointKey, DestroyedKey, KeyManifest, MasterKey, SigningKey, SigningUse};
pub use members::{HsmId, Hsms};
pub use module::{KdfRoute, ModuleProfile, OaepHash, WrapMechanism};
pub use objects::{Ceremony, CreatedKey};
pub use pin::PinSource;
pub use pin_agent::PinAgent;
pub use pin_attempts::PinAttempts;
pub use self_test::{Finding, Needs, SelfTestReport, examine};
pub use statistics::{CallStatistic, LATENCY_BOUNDS_US};
pub use status::{HsmStatus, MemberStatus};
pub use supervisor::{HsmConfig, SupervisorPacing};
pub use token::{TokenIdentity, initialise_token};
pub use token_file_backup::TokenFileBackup;
