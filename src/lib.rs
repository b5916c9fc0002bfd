//! The secure processing point: gives every device on an assembly line its identity and its keys.

/// The messages and services of `proto/spp/v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, reason = "generated from proto/")]
pub mod proto {
    tonic::include_proto!("spp.v1");
    /// The compiled descriptors, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/spp_descriptor.bin"));
}

pub mod certificate;
pub mod config;
pub mod device;
pub mod hsm;
pub mod keys;
pub mod line;
pub mod names;
pub mod officer;
pub mod package;
pub mod process;
pub mod provisioning;
pub mod rpc;
pub mod secret;
pub mod store;
