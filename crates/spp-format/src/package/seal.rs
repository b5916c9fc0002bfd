//! Sealed delivery: encrypts the data package to one chip (`sealed-package` in `proto/data-package.cddl`).
//!
//! COSE_Encrypt (RFC 9052 §5.1), A256GCM content, one recipient with ECDH-ES+A256KW (RFC 9053 §6.4). The envelope is public and
//! is encoded by `coset`; the package is encrypted and decrypted in place in a buffer that is wiped.

use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrap as _};
use ciborium::Value;
use coset::{
    Algorithm, AsCborValue as _, CborSerializable as _, CoseEncrypt, CoseEncryptBuilder, CoseKdfContextBuilder,
    CoseKey, CoseKeyBuilder, CoseRecipient, CoseRecipientBuilder, EncryptionContext, Header, HeaderBuilder, KeyType,
    Label, ProtectedHeader, SuppPubInfo, TaggedCborSerializable as _, enc_structure_data, iana,
};

use super::transport::{TransportCurve, TransportPrivateKey, TransportPublicKey};
use super::{MAX_PACKAGE_LEN, MAX_SEALED_LEN, PackageError, field_error, gcm};
use crate::cbor::Writer;
use crate::names::{ChipId, SessionId};
use crate::secret::{Secret, SecretBytes};

/// The recipient header parameter of the sender's ephemeral public key, RFC 9053 Table 20.
const EPHEMERAL_KEY: i64 = -1;
/// Length of a wrapped content key in bytes (RFC 3394).
const WRAPPED_LEN: usize = 40;

/// Seals a package to a chip's transport key, bound to the session and the chip. Every call returns different bytes.
///
/// # Errors
/// If the package is too large, or the provider fails.
pub fn seal(
    package: &SecretBytes,
    transport_key: &TransportPublicKey,
    session: &SessionId,
    chip: &ChipId,
) -> Result<Vec<u8>, PackageError> {
    // Exposed to read its length.
    if package.expose().len() > MAX_PACKAGE_LEN {
        return Err(PackageError::TooLarge { what: "data package", max: MAX_PACKAGE_LEN });
    }
    let content_key = Secret::new(random::<32>()?);
    let recipient = recipient(&content_key, transport_key, chip)?;

    let protected = HeaderBuilder::new().algorithm(iana::Algorithm::A256GCM).build();
    let aad = enc_structure(protected_of(&protected), session, chip)?;
    let iv = random::<{ gcm::IV_LEN }>()?;
    let ciphertext =
        gcm::encrypt(&content_key, iv, &aad, package).ok_or(PackageError::Provider("encrypting the package"))?;
    CoseEncryptBuilder::new()
        .protected(protected)
        .unprotected(HeaderBuilder::new().iv(iv.to_vec()).build())
        .ciphertext(ciphertext)
        .add_recipient(recipient)
        .build()
        .to_tagged_vec()
        .map_err(shape("envelope"))
}

/// Opens a sealed package inside the chip.
///
/// # Errors
/// If the package is malformed (the error names the field) or does not decrypt with this key for this session and chip.
pub fn open(
    sealed: &[u8],
    transport_key: &TransportPrivateKey,
    session: &SessionId,
    chip: &ChipId,
) -> Result<SecretBytes, PackageError> {
    if sealed.len() > MAX_SEALED_LEN {
        return Err(PackageError::TooLarge { what: STRUCTURE, max: MAX_SEALED_LEN });
    }
    let envelope = CoseEncrypt::from_tagged_slice(sealed).map_err(shape("envelope"))?;
    expect_algorithm(&envelope.protected.header, iana::Algorithm::A256GCM, "content algorithm")?;
    expect_no_headers(&Header { iv: Vec::new(), ..envelope.unprotected.clone() }, "unprotected header")?;
    let iv = envelope.unprotected.iv.as_slice().try_into().map_err(|_| shape("IV")("not 12 bytes"))?;
    let ciphertext = envelope.ciphertext.as_deref().ok_or_else(|| shape("ciphertext")("missing"))?;
    let [recipient] = envelope.recipients.as_slice() else {
        return Err(shape("recipients")("expected exactly one"));
    };

    let content_key = content_key(recipient, transport_key)?;
    let aad = enc_structure(envelope.protected.clone(), session, chip)?;
    gcm::decrypt(&content_key, iv, &aad, ciphertext).ok_or(PackageError::DoesNotOpen)
}

/// Wraps the content key to the transport key.
fn recipient(
    content_key: &Secret<[u8; 32]>,
    transport_key: &TransportPublicKey,
    chip: &ChipId,
) -> Result<CoseRecipient, PackageError> {
    let failed = |_| PackageError::Provider("wrapping the content key");
    let protected = HeaderBuilder::new().algorithm(iana::Algorithm::ECDH_ES_A256KW).build();
    let ephemeral = TransportPrivateKey::generate(transport_key.curve())?;
    let kek = ephemeral
        .derive_with(transport_key, &kdf_context(protected_of(&protected))?)
        .ok_or(PackageError::TransportKey("key agreement failed"))?;

    let mut wrapped = [0; WRAPPED_LEN];
    // Both exposed to the provider, which wraps one with the other.
    let wrapper = AesKek::new(&AES_256, kek.expose()).map_err(failed)?;
    let length = wrapper.wrap(content_key.expose(), &mut wrapped).map_err(failed)?.len();
    let ephemeral = cose_public(&ephemeral.public()?).to_cbor_value().map_err(shape("ephemeral key"))?;
    let unprotected = HeaderBuilder::new().key_id(chip.as_bytes().to_vec()).value(EPHEMERAL_KEY, ephemeral).build();
    Ok(CoseRecipientBuilder::new()
        .protected(protected)
        .unprotected(unprotected)
        .ciphertext(wrapped[..length].to_vec())
        .build())
}

/// Unwraps the content key; inverse of [`recipient`].
fn content_key(
    recipient: &CoseRecipient,
    transport_key: &TransportPrivateKey,
) -> Result<Secret<[u8; 32]>, PackageError> {
    expect_algorithm(&recipient.protected.header, iana::Algorithm::ECDH_ES_A256KW, "recipient algorithm")?;
    let ephemeral = match recipient.unprotected.rest.as_slice() {
        [(Label::Int(EPHEMERAL_KEY), key)] => read_cose_public(key.clone(), transport_key.curve())?,
        _ => return Err(shape("recipient")("expected the ephemeral key (-1) and at most a kid")),
    };
    // The kid is a hint (RFC 9052 §3.1). Other headers might have to be part of the KDF context (RFC 9053 §5.2).
    let other_headers = Header { key_id: Vec::new(), rest: Vec::new(), ..recipient.unprotected.clone() };
    expect_no_headers(&other_headers, "recipient")?;
    let wrapped = recipient.ciphertext.as_deref().filter(|wrapped| wrapped.len() == WRAPPED_LEN);
    let wrapped = wrapped.ok_or_else(|| shape("recipient")("the wrapped key is not 40 bytes long"))?;

    let kek = transport_key
        .derive_with(&ephemeral, &kdf_context(recipient.protected.clone())?)
        .ok_or_else(|| shape("ephemeral key")("key agreement failed"))?;
    let mut key = Secret::new([0; 32]);
    // Exposed to unwrap and to copy the key. The provider requires 8 bytes more than the unwrapped key.
    let mut buffer = Secret::new([0; WRAPPED_LEN]);
    let unwrapped = AesKek::new(&AES_256, kek.expose())
        .and_then(|wrapper| wrapper.unwrap(wrapped, buffer.expose_mut()))
        .map_err(|_| PackageError::DoesNotOpen)?;
    key.expose_mut().copy_from_slice(&unwrapped[..32]);
    Ok(key)
}

/// Encodes the `COSE_KDF_Context` (RFC 9053 §5.2): A256KW, 256 bits, no party information.
fn kdf_context(recipient_protected: ProtectedHeader) -> Result<Vec<u8>, PackageError> {
    CoseKdfContextBuilder::new()
        .algorithm(iana::Algorithm::A256KW)
        .supp_pub_info(SuppPubInfo { key_data_length: 256, protected: recipient_protected, other: None })
        .build()
        .to_vec()
        .map_err(shape("KDF context"))
}

/// Encodes the `Enc_structure` (RFC 9052 §5.3) with session and chip as external data.
fn enc_structure(protected: ProtectedHeader, session: &SessionId, chip: &ChipId) -> Result<Vec<u8>, PackageError> {
    let mut external = Writer::with_limit(128);
    external.array(4).text("spp-package").int(1).bytes(session.as_bytes()).bytes(chip.as_bytes());
    let external = external.finish_public().ok_or_else(|| shape("external data")("too long"))?;
    Ok(enc_structure_data(EncryptionContext::CoseEncrypt, protected, &external))
}

/// Encodes a transport public key as COSE_Key (RFC 9053 §7.1.1 and §7.2).
fn cose_public(key: &TransportPublicKey) -> CoseKey {
    match key.curve() {
        TransportCurve::P256 => {
            let (x, y) = key.as_bytes()[1..].split_at(32);
            CoseKeyBuilder::new_ec2_pub_key(iana::EllipticCurve::P_256, x.to_vec(), y.to_vec()).build()
        }
        TransportCurve::X25519 => CoseKeyBuilder::new_okp_key()
            .param(iana::OkpKeyParameter::Crv as i64, Value::from(iana::EllipticCurve::X25519 as i64))
            .param(iana::OkpKeyParameter::X as i64, Value::Bytes(key.as_bytes().to_vec()))
            .build(),
    }
}

fn read_cose_public(key: Value, curve: TransportCurve) -> Result<TransportPublicKey, PackageError> {
    let key = CoseKey::from_cbor_value(key).map_err(shape("ephemeral key"))?;
    let invalid = || shape("ephemeral key")("not an uncompressed key on the curve of the chip's transport key");
    let (kty, crv) = match curve {
        TransportCurve::P256 => (iana::KeyType::EC2, iana::EllipticCurve::P_256),
        TransportCurve::X25519 => (iana::KeyType::OKP, iana::EllipticCurve::X25519),
    };
    let parameter = |expected: i64| key.params.iter().find(|(label, _)| *label == Label::Int(expected)).map(|(_, v)| v);
    let coordinate = |label| parameter(label).and_then(Value::as_bytes).ok_or_else(invalid);
    if key.kty != KeyType::Assigned(kty) || parameter(-1) != Some(&Value::from(crv as i64)) {
        return Err(invalid());
    }
    let bytes = match curve {
        TransportCurve::P256 => [&[4], coordinate(-2)?.as_slice(), coordinate(-3)?.as_slice()].concat(),
        TransportCurve::X25519 => coordinate(-2)?.clone(),
    };
    TransportPublicKey::new(curve, &bytes).map_err(|_| invalid())
}

fn expect_algorithm(header: &Header, expected: iana::Algorithm, field: &'static str) -> Result<(), PackageError> {
    if header.alg != Some(Algorithm::Assigned(expected)) {
        return Err(shape(field)(format!("expected {} in the protected header", expected as i64)));
    }
    expect_no_headers(&Header { alg: None, ..header.clone() }, field)
}

fn expect_no_headers(rest: &Header, field: &'static str) -> Result<(), PackageError> {
    if rest.is_empty() { Ok(()) } else { Err(shape(field)("unsupported headers")) }
}

fn protected_of(header: &Header) -> ProtectedHeader {
    ProtectedHeader { original_data: None, header: header.clone() }
}

fn random<const N: usize>() -> Result<[u8; N], PackageError> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| PackageError::Provider("generating random numbers"))?;
    Ok(bytes)
}

const STRUCTURE: &str = "sealed package";

fn shape<E: std::fmt::Display>(field: &'static str) -> impl FnOnce(E) -> PackageError {
    field_error(STRUCTURE, field)
}

#[cfg(test)]
mod tests {
    use super::super::samples::{chip, session};
    use super::*;
    use proptest::prelude::*;

    const CURVES: [TransportCurve; 2] = [TransportCurve::P256, TransportCurve::X25519];

    fn open_bytes(
        sealed: &[u8],
        key: &TransportPrivateKey,
        session_byte: u8,
        chip_byte: u8,
    ) -> Result<Vec<u8>, PackageError> {
        open(sealed, key, &session(session_byte), &chip(chip_byte)).map(|package| package.expose().clone())
    }

    #[test]
    fn sealed_package_opens_only_for_its_chip_and_session() {
        for curve in CURVES {
            let key = TransportPrivateKey::generate(curve).unwrap();
            let package = SecretBytes::copy_of(b"the package");
            let sealed = seal(&package, &key.public().unwrap(), &session(1), &chip(2)).unwrap();
            assert_eq!(open_bytes(&sealed, &key, 1, 2), Ok(b"the package".to_vec()));
            assert_eq!(open_bytes(&sealed, &key, 9, 2), Err(PackageError::DoesNotOpen));
            assert_eq!(open_bytes(&sealed, &key, 1, 9), Err(PackageError::DoesNotOpen));
            let other = TransportPrivateKey::generate(curve).unwrap();
            assert_eq!(open_bytes(&sealed, &other, 1, 2), Err(PackageError::DoesNotOpen));
            let again = seal(&package, &key.public().unwrap(), &session(1), &chip(2)).unwrap();
            assert_ne!(sealed, again);
        }
    }

    #[test]
    fn altered_or_truncated_envelope_rejected() {
        for curve in CURVES {
            let key = TransportPrivateKey::generate(curve).unwrap();
            let sealed = seal(&SecretBytes::copy_of(&[5; 40]), &key.public().unwrap(), &session(1), &chip(2)).unwrap();
            let kid = memchr::memmem::find(&sealed, chip(2).as_bytes()).unwrap();
            for index in 0..sealed.len() {
                let mut altered = sealed.clone();
                altered[index] ^= 1;
                // The kid is a hint: the external data binds session and chip.
                if !(kid..kid + 16).contains(&index) {
                    assert!(open_bytes(&altered, &key, 1, 2).is_err(), "{curve:?} {index}");
                }
                assert!(open_bytes(&sealed[..index], &key, 1, 2).is_err());
            }
            assert!(open_bytes(&[&sealed[..], &[0]].concat(), &key, 1, 2).is_err());
        }
    }

    #[test]
    fn package_over_max_size_not_sealed() {
        let key = TransportPrivateKey::generate(TransportCurve::P256).unwrap();
        let seal_zeros = |length| {
            let longest = ChipId::from_bytes(&[1; 64]).unwrap();
            seal(&SecretBytes::new(vec![0; length]), &key.public().unwrap(), &session(1), &longest)
        };
        assert!(seal_zeros(MAX_PACKAGE_LEN).unwrap().len() <= MAX_SEALED_LEN);
        assert!(matches!(seal_zeros(MAX_PACKAGE_LEN + 1), Err(PackageError::TooLarge { .. })));
        assert!(matches!(open_bytes(&[0; MAX_SEALED_LEN + 1], &key, 1, 1), Err(PackageError::TooLarge { .. })));
    }

    /// RFC 9053 §5.2: [-5, [null, null, null], [null, null, null], [256, protected]].
    #[test]
    fn kdf_context_matches_rfc_9053() {
        let protected = HeaderBuilder::new().algorithm(iana::Algorithm::ECDH_ES_A256KW).build();
        let context = kdf_context(protected_of(&protected)).unwrap();
        assert_eq!(hex::encode(context), "842483f6f6f683f6f6f68219010044a101381e");
    }

    proptest! {
        #[test]
        fn open_never_panics(bytes: Vec<u8>) {
            let key = TransportPrivateKey::generate(TransportCurve::X25519).unwrap();
            prop_assert!(open_bytes(&bytes, &key, 1, 2).is_err());
            prop_assert!(open_bytes(&[&[0xd8, 0x60, 0x84], &bytes[..]].concat(), &key, 1, 2).is_err());
        }

        #[test]
        fn deep_nesting_rejected(depth in 1usize..MAX_SEALED_LEN) {
            let key = TransportPrivateKey::generate(TransportCurve::X25519).unwrap();
            prop_assert!(open_bytes(&vec![0x81; depth], &key, 1, 2).is_err());
        }
    }
}
