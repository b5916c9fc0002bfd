//! The messages, clients and services of `proto/spp/v1`, and no transport: neither a connection nor a server.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, reason = "generated from proto/")]

tonic::include_proto!("spp.v1");
/// The compiled descriptors, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/spp_descriptor.bin"));
