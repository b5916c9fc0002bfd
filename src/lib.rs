//! The secure processing point: gives every device on an assembly line its identity and its keys.
//!
//! [`provisioning::Provisioner::assemble`] and [`provisioning::Provisioner::complete`] are the two calls that a device
//! takes; start there. `docs/architecture.md` describes the path of a device, the layers of these modules, and where to look
//! for what; `make check` verifies the layers.

pub mod access;
pub mod audit;
pub mod clock;
pub mod config;
pub mod hsm;
pub mod keypool;
pub mod logging;
pub mod officer;
pub mod provisioning;
pub mod registry;
pub mod server;
mod state_name;
pub mod store;
mod store_error;
