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

mod attempts;
mod attributes;
mod background;
mod backup;
mod batches;
mod ckr;
mod connection;
mod doctor;
mod durable;
mod failure;
mod guard;
mod handle;
mod kdf;
pub mod keeper;
mod members;
mod module;
mod objects;
mod pairs;
mod pin;
mod register;
mod register_file;
mod statistics;
mod status;
mod supervisor;
mod survey;
#[cfg(test)]
pub(crate) mod tests;
mod token;
mod transport;
mod verbs;
mod wire;
pub mod worker;

pub use attempts::PinAttempts;
pub use attributes::{KeyRole, Provenance};
pub use background::{KeepIn, OwnObjects};
pub use backup::{BACKUP_KEY_LEN, Restorable, SEALED_LEN, backup_check_value, is_sealed};
pub use doctor::{Examination, Finding, Needs, examine};
pub use failure::{FailureClass, HsmError};
pub use guard::GuardedFile;
pub use handle::{DeliveredPair, DeviceKeyOrder, DeviceKeys, HeldKeyOrder, HeldKeys, Hsm, PairOrder};
pub use kdf::{Derivation, Prf};
pub use keeper::PinKeeper;
pub use members::{HsmMember, Hsms};
pub use module::{KdfRoute, ModuleProfile, OaepHash, WrapMechanism};
pub use objects::{Ceremony, CreatedKey};
pub use pin::PinSource;
pub use register::{BackupKey, CheckpointKey, DestroyedKey, KeyRegister, MasterKey, SigningKey, SigningUse};
pub use statistics::{CallStatistic, LATENCY_BOUNDS_US};
pub use status::{HsmStatus, MemberStatus};
pub use supervisor::{HsmConfig, SupervisorPacing};
pub use survey::{MechanismReport, SlotReport, Survey, TokenReport};
pub use token::{TokenIdentity, initialise_token};
