//! The certificate of a device without a key pair: a CWT (RFC 8392) in COSE_Sign1 that binds identity and chip ID.
//!
//! The claims: `iss` is the issuer's common name, `sub` the identity in canonical form, `exp` is present if the profile limits
//! the validity, `iat`, `cti` is the serial number, and two private claims follow. RFC 9711 §4.2.1 registers `ueid` for a
//! hardware identifier, but it holds at most 33 bytes including a type byte; a chip ID of 64 bytes does not fit.

use ciborium::Value;
use coset::cwt::{ClaimName, ClaimsSet, Timestamp};
use coset::{CborSerializable, CoseSign1, HeaderBuilder, ProtectedHeader, TaggedCborSerializable};

use super::request::CertificateRequest;
use super::{CertificateError, algorithm};
use crate::keys::{PublicKey, SignatureAlgorithm, ecdsa_der_from_fixed, ecdsa_fixed_from_der};

/// The chip ID, a byte string. Private use: below -65536 (RFC 8392 §9.1).
pub(super) const CHIP_ID_CLAIM: i64 = -70_001;
/// The hardware type, a byte string tagged as an object identifier (RFC 9090 §2). Private use.
pub(super) const HARDWARE_TYPE_CLAIM: i64 = -70_002;
/// The tag of an object identifier in BER without tag and length, RFC 9090 §2.
pub(super) const OID_TAG: u64 = 111;
/// The context string of a COSE_Sign1 signature, RFC 9052 §4.4.
const CONTEXT: &str = "Signature1";

/// Builds the Sig_structure (RFC 9052 §4.4) with empty external_aad, in deterministic CBOR.
pub(super) fn to_be_signed(request: &CertificateRequest<'_>) -> Result<Vec<u8>, CertificateError> {
    let seconds =
        |unix: u64| i64::try_from(unix).map(Timestamp::WholeSeconds).map_err(|e| CertificateError::Cwt(e.to_string()));
    let hardware_type = Value::Bytes(request.profile.hardware_type().as_bytes().to_vec());
    let claims = ClaimsSet {
        issuer: Some(request.issuer.display_name()),
        subject: Some(request.identity.to_string()),
        expiration_time: request.not_after().map(seconds).transpose()?,
        issued_at: Some(seconds(request.not_before)?),
        cwt_id: Some(request.serial.as_bytes().to_vec()),
        // Ordered by encoding, as deterministic CBOR requires (RFC 8949 §4.2.1).
        rest: vec![
            (ClaimName::PrivateUse(CHIP_ID_CLAIM), Value::Bytes(request.chip.as_bytes().to_vec())),
            (ClaimName::PrivateUse(HARDWARE_TYPE_CLAIM), Value::Tag(OID_TAG, Box::new(hardware_type))),
        ],
        ..ClaimsSet::default()
    };
    let header = HeaderBuilder::new()
        .algorithm(algorithm::cose(request.algorithm()))
        .key_id(request.issuer.key_identifier().to_vec())
        .build();
    SigStructure { protected: header.to_vec().map_err(cwt_error)?, payload: claims.to_vec().map_err(cwt_error)? }
        .encode()
}

/// The two variable parts of a Sig_structure.
pub(super) struct SigStructure {
    /// The protected header, encoded.
    pub(super) protected: Vec<u8>,
    /// The claims, encoded.
    pub(super) payload: Vec<u8>,
}

impl SigStructure {
    fn encode(&self) -> Result<Vec<u8>, CertificateError> {
        let parts = vec![
            Value::Text(CONTEXT.to_owned()),
            Value::Bytes(self.protected.clone()),
            Value::Bytes(Vec::new()),
            Value::Bytes(self.payload.clone()),
        ];
        Value::Array(parts).to_vec().map_err(cwt_error)
    }

    /// Decodes the Sig_structure of a COSE_Sign1 with empty external_aad; a non-deterministic encoding is rejected.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, CertificateError> {
        let parts = Value::from_slice(bytes).map_err(cwt_error)?.into_array().unwrap_or_default();
        let Ok([Value::Text(context), Value::Bytes(protected), Value::Bytes(aad), Value::Bytes(payload)]) =
            <[Value; 4]>::try_from(parts)
        else {
            return Err(CertificateError::Cwt("not a Sig_structure of four parts".into()));
        };
        let read = Self { protected, payload };
        if context != CONTEXT || !aad.is_empty() || read.encode()? != bytes {
            return Err(CertificateError::Cwt("not a COSE_Sign1 Sig_structure with empty external_aad".into()));
        }
        Ok(read)
    }
}

/// Assembles a COSE_Sign1 (tag 18) from a Sig_structure and a signature; an ECDSA signature is given in DER.
pub(super) fn assemble(
    to_be_signed: &[u8],
    algorithm: SignatureAlgorithm,
    signature: &[u8],
    key: &PublicKey,
) -> Result<Vec<u8>, CertificateError> {
    let parts = SigStructure::decode(to_be_signed)?;
    let signature = if is_ecdsa(algorithm) {
        // RFC 9053 §2.1: r and s each have the length of the group order.
        ecdsa_fixed_from_der(signature, key.kind())
            .ok_or_else(|| CertificateError::refused("the signature is not an Ecdsa-Sig-Value of the issuer's curve"))?
    } else {
        signature.to_vec()
    };
    let protected = ProtectedHeader::from_cbor_bstr(Value::Bytes(parts.protected)).map_err(cwt_error)?;
    CoseSign1 { protected, payload: Some(parts.payload), signature, ..CoseSign1::default() }
        .to_tagged_vec()
        .map_err(cwt_error)
}

/// Verifies a COSE_Sign1 (tag 18) with this key and returns the signed bytes and the claims.
pub(super) fn verify(bytes: &[u8], key: &PublicKey) -> Result<(Vec<u8>, ClaimsSet), CertificateError> {
    let message = CoseSign1::from_tagged_slice(bytes).map_err(cwt_error)?;
    // RFC 9052 §3.1: a receiver must reject parameters in `crit` that it does not know; this code knows none.
    if !message.unprotected.is_empty() || !message.protected.header.crit.is_empty() {
        return Err(CertificateError::refused("unprotected or critical COSE headers are not allowed"));
    }
    let algorithm = algorithm::from_cose(message.protected.header.alg.as_ref())?;
    let to_be_signed = message.tbs_data(&[]);
    let signature = if is_ecdsa(algorithm) { der_signature(&message.signature, key)? } else { message.signature };
    key.verify(algorithm, &to_be_signed, &signature).map_err(CertificateError::key("verifying the signature"))?;
    let claims = ClaimsSet::from_slice(message.payload.as_deref().unwrap_or_default()).map_err(cwt_error)?;
    Ok((to_be_signed, claims))
}

fn der_signature(fixed: &[u8], key: &PublicKey) -> Result<Vec<u8>, CertificateError> {
    ecdsa_der_from_fixed(fixed)
        .filter(|der| ecdsa_fixed_from_der(der, key.kind()).as_deref() == Some(fixed))
        .ok_or_else(|| CertificateError::refused("the signature does not have the length of the curve"))
}

const fn is_ecdsa(algorithm: SignatureAlgorithm) -> bool {
    matches!(algorithm, SignatureAlgorithm::EcdsaP256Sha256 | SignatureAlgorithm::EcdsaP384Sha384)
}

pub(super) fn cwt_error(error: coset::CoseError) -> CertificateError {
    CertificateError::Cwt(error.to_string())
}
