//! A linted certificate that is not signed yet, in the form that the journal stores.

use serde::{Deserialize, Serialize};

use crate::keys::SignatureAlgorithm;
use crate::names::KeyName;

/// A linted certificate that is not signed yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateToSign {
    /// The issuer's signing key.
    pub issuer: KeyName,
    /// The signature algorithm.
    pub algorithm: SignatureAlgorithm,
    /// Whether the bytes are a COSE Sig_structure of a CWT (RFC 9052 §4.4) rather than an X.509 TBSCertificate.
    pub is_cwt: bool,
    /// The certificate's serial number (or `cti`), unique among published records.
    pub serial: Vec<u8>,
    /// The bytes to be signed.
    pub to_be_signed: Vec<u8>,
}
