//! What a station does: brings devices from bare chip to receipt, many at a time, and shows and recovers them later.
//!
//! The reference for authors of real stations, over simulated devices ([`crate::device::SimulatedFab`]). To read first: `way`, one
//! device's story. Around it: `orders` says who gets what, `pipeline` works on many at a time, `retry` says what is
//! tried again, `journal` what need not be done again, `book` and `report` what came of it. `connection` is the way to the
//! daemon; `recover`, `show` and `devices` are the commands for one device; `cli` is what people type.
//!
//! Trust: a station sees the packages that pass through it unless they are sealed to the chip, and holds no other secret
//! than its own TLS key. It decides nothing: the daemon admits, the device verifies.

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
