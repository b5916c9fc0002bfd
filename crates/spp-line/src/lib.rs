//! Station: provisions devices, many in parallel, and shows and recovers them later.
//!
//! [`StationClient`] is the client library for authors of stations; the rest of this crate is the program `spp-line`, a reference
//! station with simulated devices ([`spp_device::SimulatedFab`]).
//!
//! # A station that provisions one device
//!
//! Two calls, with the device's part in between. The complete program is `examples/provision_device.rs`: start a daemon with
//! `make dev`, and run it in another terminal.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use spp_line::proto::{AssembleRequest, CompleteRequest};
//! use spp_line::{RetryPolicy, StationClient};
//!
//! /// What the device answers: its backup and its key confirmation.
//! fn install_on_device(response: &spp_line::proto::AssembleResponse) -> (Vec<u8>, Vec<u8>) {
//! # let _ = response;
//! # (Vec::new(), Vec::new())
//! # /*
//!     …
//! # */
//! }
//!
//! # async fn station(chip_id: Vec<u8>) -> Result<(), Box<dyn std::error::Error>> {
//! let station =
//!     StationClient::connect("https://spp.example:7443", Path::new("tls/line-1-a"), RetryPolicy::default()).await?;
//! let order = AssembleRequest {
//!     chip_id,
//!     identity: "imei:490154203237518".to_owned(),
//!     profile: "phone".to_owned(),
//!     ..AssembleRequest::default()
//! };
//! let assembled = station.assemble(order).await?;
//! let (backup_package, key_confirmation) = install_on_device(&assembled);
//! let completion = CompleteRequest { session_id: assembled.session_id, backup_package, key_confirmation };
//! let receipt = station.complete(completion).await?.receipt.ok_or("no receipt")?;
//! println!("record {} of the public database", receipt.record_index);
//! # Ok(())
//! # }
//! ```
//!
//! # The program
//!
//! Start with `device_flow`, the provisioning of one device. `orders` defines the devices, `pipeline` provisions many in
//! parallel, `retry` decides which calls to retry, `journal` lists completed devices, `run_log` and `report` write the
//! results. `connection` connects to the daemon; `public_database` fetches records; `recover`, `show` and `devices` are
//! commands for single devices; `cli` is the command line.
//!
//! Trust: a station sees the packages that it forwards unless they are sealed to the chip, and holds no other secret than its
//! own TLS key. It makes no decisions: the daemon admits orders, the device verifies.

#![expect(clippy::disallowed_types, reason = "the station is a gRPC client: it reads statuses")]

mod cli;
mod client;
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
pub use client::StationClient;
pub use error::LineError;
pub use retry::{CallFailure, RetryPolicy};
pub use spp_proto as proto;
pub use tonic::Code;
