//! Test support: what the tests of this workspace share, and how a test is written.
//!
//! | to … | use |
//! |---|---|
//! | have a token, keys, certificates, stores and a daemon in one directory | [`site::Site`] |
//! | provision simulated devices over gRPC | [`floor::Floor`] and the functions beside it |
//! | keep a line busy while something breaks, and check that nothing was lost | [`load`] |
//! | make the PKCS#11 module fail | [`Site::use_faulty_module`](site::Site::use_faulty_module), then [`Site::fail`](site::Site::fail) |
//! | run the provisioner in the test's own process, with stores that fail | [`point::House`], [`point::Point`], [`point::breaking`] |
//! | have pools of key pairs, second officers, a foreign certificate authority, metrics | [`pools`], [`officers`], [`authority`], [`metrics`] |
//! | write a ceremony file | [`ceremony::CeremonyFile`] |
//! | wait for something | [`wait::eventually`]; never a fixed sleep |
//! | draw at random, and scale a long run | [`random::Random`], [`random::cases`], [`random::scaled`] |
//! | start and signal processes | [`process`] |
//! | use a TCP port | [`ports::free_port`] |
//!
//! # Policy
//!
//! - Tests run in any order, several at once, each in a process of its own (cargo-nextest), and also as threads of one process
//!   (`cargo test`). Nothing is shared but the template of a site, which is copied.
//! - A test waits for conditions. An upper limit is no assertion: a slow machine fails nothing. Where the fault would be that
//!   something happens, [`wait::never`] looks for a while.
//! - Whatever happens to a test, its processes end with it: [`process`] says how.
//! - `SPP_SEED=N` repeats what a test drew at random; every test that draws prints its seed. `SPP_SOAK=1` selects full sizes.
//!   What a property test once failed on is in `proptest-regressions/`, is committed, and is tried first.
//! - The HSM is real (SoftHSM). A test without it fails with the command that installs it; none is skipped.
//!
//! # For unit tests of `spp`
//!
//! The package `spp` depends on this crate for its tests, and this crate on the library `spp`. In unit tests the library is
//! compiled a second time, so its types are others than those that this crate names: unit tests use [`wait`], [`random`],
//! [`process`], [`files`] and [`ports`], which name none.
#![allow(clippy::unwrap_used, clippy::panic, clippy::missing_panics_doc, reason = "test support fails by a panic")]
#![expect(clippy::disallowed_types, reason = "tests are gRPC clients: they read statuses")]
#![allow(clippy::new_without_default, reason = "making a site is an act, and no default value")]
#![allow(missing_docs, reason = "the fields and methods of sites, devices and loads are named by what they are")]

pub mod authority;
pub mod ceremony;
pub mod files;
pub mod floor;
pub mod load;
pub mod metrics;
pub mod officers;
pub mod point;
pub mod pools;
pub mod ports;
pub mod process;
pub mod random;
pub mod site;
pub mod template;
pub mod tls;
pub mod wait;
