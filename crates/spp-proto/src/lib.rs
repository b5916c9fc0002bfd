//! The messages, clients and service traits generated from `proto/spp/v1`, without a transport.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, reason = "generated from proto/")]

use std::fmt;

tonic::include_proto!("spp.v1");

/// The compiled descriptors, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/spp_descriptor.bin"));

/// Without the package: it has the device's private keys.
impl fmt::Debug for AssembleResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AssembleResponse")
            .field("session_id", &self.session_id)
            .field("identity", &self.identity)
            .field("delivery", &self.delivery)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for assemble_response::Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, package) = match self {
            Self::DataPackage(package) => ("DataPackage", package),
            Self::SealedPackage(package) => ("SealedPackage", package),
        };
        write!(f, "{name}({} bytes)", package.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_of_a_delivery_does_not_show_the_package() {
        let delivery = Some(assemble_response::Delivery::DataPackage(vec![222; 3]));
        let response = AssembleResponse { identity: "serial:A".to_owned(), delivery, ..AssembleResponse::default() };
        let text = format!("{response:?}");
        assert!(text.contains("serial:A") && text.contains("DataPackage(3 bytes)"), "{text}");
        assert!(!text.contains("222"), "{text}");
    }
}
