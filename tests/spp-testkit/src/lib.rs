//! Test support for the whole system, and the policy for writing tests.
//!
//! | to … | use |
//! |---|---|
//! | have a token, keys, certificates, stores and a daemon in one directory | [`site::Site`] |
//! | provision simulated devices over gRPC | [`devices::TestFab`] and the functions of [`devices`] |
//! | keep a line under load while a fault occurs, and check that no device was lost | [`load`] |
//! | make the PKCS#11 module fail | [`Site::use_faulty_module`](site::Site::use_faulty_module), then [`Site::fail`](site::Site::fail) |
//! | run the provisioner in the test's own process, with stores that fail | [`point::TestBed`], [`point::Point`], [`point::faulty_stores`] |
//! | have pools of key pairs, second officers, a foreign certificate authority, metrics | [`pools`], [`officers`], [`authority`], [`metrics`] |
//! | write a ceremony file | [`ceremony::CeremonyFile`] |
//! | wait for something | [`wait::eventually`]; never a fixed sleep |
//! | draw random values, and scale a long run | [`random::Random`], [`random::cases`], [`random::scaled`] |
//! | start and signal processes | [`process`] |
//! | use a TCP port | [`ports::free_port`] |
//!
//! # Policy
//!
//! - Tests run in any order and concurrently, each in its own process (cargo-nextest), or as threads of one process
//!   (`cargo test`). They share only the template of a site, which each test copies.
//! - A test waits for conditions. An upper time limit is not an assertion: a slow machine must not fail a test. If the fault
//!   would be that something happens, [`wait::never`] observes for a while.
//! - The processes of a test end with the test, even if the test is killed: see [`process`].
//! - `SPP_SEED=N` repeats the random values of a test; every test that draws random values prints its seed. `SPP_SOAK=1` selects
//!   full sizes. Past failures of property tests are in `proptest-regressions/` of their crate, are committed, and are tried first.
//! - The HSM is real (SoftHSM). Without it a test fails with the installation command; no test is skipped.
//!
//! # For unit tests
//!
//! [`wait`], [`random`], [`process`], [`files`] and [`ports`] are the crate `spp-test-support`, re-exported. The crates that
//! `spp` depends on use that crate: this one would build `spp` for their tests.
//!
//! The package `spp` depends on this crate for its tests, and this crate depends on the library `spp`. Unit tests compile
//! the library a second time, so its types differ from those that this crate names. Unit tests of `spp` therefore use only
//! these modules and [`ceremony`], which name no `spp` types.
#![allow(clippy::unwrap_used, clippy::panic, clippy::missing_panics_doc, reason = "test support fails by a panic")]
#![expect(clippy::disallowed_types, reason = "tests are gRPC clients: they read statuses")]
#![allow(clippy::new_without_default, reason = "creating a site has side effects")]
#![allow(missing_docs, reason = "the names of fields and methods of sites, devices and loads are self-explanatory")]

pub mod authority;
pub mod ceremony;
pub mod devices;
pub mod load;
pub mod metrics;
pub mod officers;
pub mod point;
pub mod pools;
pub mod site;
pub mod template;
pub mod tls;

pub use spp_test_support::{files, ports, process, random, wait};
