//! Station: provisions devices, many in parallel, and shows and recovers them later.
//!
//! The reference for authors of real stations, with simulated devices ([`spp_device::SimulatedFab`]). Start with
//! `device_flow`, the provisioning of one device. `orders` defines the devices, `pipeline` provisions many in parallel, `retry`
//! decides which calls to retry, `journal` lists completed devices, `run_log` and `report` write the results. `connection`
//! connects to the daemon; `public_database` fetches records; `recover`, `show` and `devices` are commands for single devices;
//! `cli` is the command line.
//!
//! Trust: a station sees the packages that it forwards unless they are sealed to the chip, and holds no other secret than its
//! own TLS key. It makes no decisions: the daemon admits orders, the device verifies.

#![expect(clippy::disallowed_types, reason = "the station is a gRPC client: it reads statuses")]

mod cli;
mod connection;
mod csr;
mod device_flow;
mod devices;
mod error;
mod journal;
mod orders;
mod pipeline;
mod provision;
mod public_database;
mod recover;
mod report;
mod retry;
mod run_log;
mod show;
#[cfg(test)]
mod tests;

pub use cli::{Arguments, run};
pub use error::LineError;
pub use retry::CallFailure;
