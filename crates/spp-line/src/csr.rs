//! The PKCS#10 request (RFC 2986) of a device that generated its own key pair.

use der::asn1::BitString;
use der::{Decode as _, Encode as _};
use spki::{AlgorithmIdentifierOwned, ObjectIdentifier, SubjectPublicKeyInfoOwned};
use spp_format::keys::{DevicePrivateKey, KeyError, SignatureAlgorithm};
use x509_cert::name::Name;
use x509_cert::request::{CertReq, CertReqInfo, Version};

/// `ecdsa-with-SHA256`, RFC 5758 §3.2.
const ECDSA_WITH_SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2");

/// Creates a request in DER for a P-256 key pair. Its subject is empty: the order defines the device, the request only proves
/// possession of the key.
pub(super) fn request(pair: &DevicePrivateKey) -> Result<Vec<u8>, KeyError> {
    let unencodable = |e: der::Error| KeyError::UnsupportedPublicKey(e.to_string());
    let info = CertReqInfo {
        version: Version::V1,
        subject: Name::default(),
        public_key: SubjectPublicKeyInfoOwned::from_der(pair.public().spki_der()).map_err(unencodable)?,
        attributes: Default::default(),
    };
    let signature = pair.sign(SignatureAlgorithm::EcdsaP256Sha256, &info.to_der().map_err(unencodable)?)?;
    let request = CertReq {
        info,
        algorithm: AlgorithmIdentifierOwned { oid: ECDSA_WITH_SHA256, parameters: None },
        signature: BitString::from_bytes(&signature).map_err(unencodable)?,
    };
    request.to_der().map_err(unencodable)
}

#[cfg(test)]
mod tests {
    use spp_format::certificate::verify_csr;
    use spp_format::keys::generate_p256;

    use super::*;

    #[test]
    fn request_passes_csr_verification() {
        let pair = generate_p256().unwrap();
        assert_eq!(verify_csr(&request(&pair).unwrap()).unwrap(), *pair.public());
    }
}
