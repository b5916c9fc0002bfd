//! The stories of `provisioning/` with everything that can break on the way broken: each write of the stores in both ways,
//! the HSM, the clock, and the disks put back to an older state. After each the whole state is looked at.
//!
//! A processing point runs in the test's process, over real stores and a real token; only the stores' doors are ours.

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
