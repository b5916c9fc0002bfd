//! The stories of `provisioning/` with everything that can break on the way broken: each write of the stores in both ways,
//! the HSM, the clock, and the disks put back to an older state. After each the whole state is looked at.
//!
//! A processing point runs in the test's process, over real stores and a real token; only the stores' doors are ours.
#![allow(missing_docs, unreachable_pub, reason = "tests are named by what must be true")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests, and what they share")]

mod breaking;
mod device;
mod expiry;
mod hsm;
mod model;
mod point;
mod pool;
mod pool_breaks;
mod pool_life;
mod remanence;
mod reports;
mod rollback;
mod rules;
#[allow(dead_code, reason = "shared with the tests of the daemon, which use the rest")]
#[path = "../daemon/site.rs"]
mod site;
mod writes;
