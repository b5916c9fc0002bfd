//! Fault tests of provisioning: each store write fails in both modes, the HSM fails, the clock advances, and stores are restored
//! to older states. After each fault the test checks the whole state.
//!
//! The processing point runs in the test's process, over real stores and a real token. Only the fault-injecting wrappers of the
//! stores are test code.

mod expiry;
mod hsm;
mod model;
mod policy;
mod pool;
mod pool_breaks;
mod pool_life;
mod remanence;
mod reports;
mod rollback;
mod writes;
