//! The tests of the whole system in one program, because linking one program is faster than linking many.
//!
//! Shared code is in the crate `spp-testkit`; its documentation explains how to write a test. Cargo builds `sppd` and
//! `sppctl` together with this program, but not `spp-line` and its example, which are of another package: `cargo test
//! --workspace --no-run` builds them.
#![allow(missing_docs, unreachable_pub, reason = "test names describe the tests")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "test helpers may panic")]
#![expect(clippy::disallowed_types, reason = "tests are gRPC clients and inspect statuses")]

mod daemon;
mod hsm;
mod hsm_conformance;
mod parsers;
mod provisioning;
mod vectors;
mod wycheproof;
