//! All tests that see the system from outside, in one program: linking one is quicker than linking many.
//!
//! What they share is in the crate `spp-testkit`; its documentation says how a test is written.
#![allow(missing_docs, unreachable_pub, reason = "tests are named by what must be true")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helpers are part of the test")]
#![expect(clippy::disallowed_types, reason = "tests are gRPC clients: they read statuses")]

mod daemon;
mod hsm;
mod hsm_conformance;
mod parsers;
mod provisioning;
mod vectors;
mod wycheproof;
