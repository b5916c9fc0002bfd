//! SoftHSM and aws-lc-rs implement the same AES-KWP (RFC 5649).

use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrapPadded as _};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, KeyType as CkKeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use spp_format::keys::{KeyType, PublicKey, SignatureAlgorithm, sha256};

use super::in_module;
use crate::hsm::objects::to_x509_form;

const KEK: [u8; 32] = *b"a key that both sides know by te";

fn import(session: &Session, key_type: CkKeyType, value: &[u8], uses: &[Attribute]) -> ObjectHandle {
    let mut template = vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(key_type),
        Attribute::Token(false),
        Attribute::Extractable(true),
        Attribute::Value(value.to_vec()),
    ];
    template.extend_from_slice(uses);
    session.create_object(&template).unwrap()
}

fn shared_key(session: &Session) -> ObjectHandle {
    import(session, CkKeyType::AES, &KEK, &[Attribute::Wrap(true), Attribute::Unwrap(true)])
}

fn kek() -> AesKek {
    AesKek::new(&AES_256, &KEK).unwrap()
}

fn provider_unwraps(blob: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0; blob.len()];
    let len = kek().unwrap_with_padding(blob, &mut out).ok()?.len();
    out.truncate(len);
    Some(out)
}

fn provider_wraps(plain: &[u8]) -> Vec<u8> {
    let mut out = vec![0; plain.len() + 16];
    let len = kek().wrap_with_padding(plain, &mut out).unwrap().len();
    out.truncate(len);
    out
}

#[test]
fn provider_unwraps_hsm_blob_and_refuses_bit_flips() {
    in_module(|token| {
        let ceremony = token.open();
        let session = ceremony.token.session().unwrap();
        let wrapping = shared_key(&session);
        for length in [8u8, 16, 24, 32, 48, 64] {
            let secret: Vec<u8> = (1..=length).collect();
            let object = import(&session, CkKeyType::GENERIC_SECRET, &secret, &[]);
            let blob = session.wrap_key(&Mechanism::AesKeyWrapPad, wrapping, object).unwrap();
            assert_eq!(blob, provider_wraps(&secret), "{length}: AES-KWP is deterministic");
            assert_eq!(provider_unwraps(&blob), Some(secret));
            for bit in 0..blob.len() * 8 {
                let mut damaged = blob.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(provider_unwraps(&damaged), None, "{length}: bit {bit}");
            }
        }
    });
}

#[test]
fn hsm_unwraps_provider_blob_and_refuses_bit_flips() {
    in_module(|token| {
        let ceremony = token.open();
        let session = ceremony.token.session().unwrap();
        let wrapping = shared_key(&session);
        let secret: Vec<u8> = (1..=32).collect();
        let blob = provider_wraps(&secret);
        let template = [
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(CkKeyType::GENERIC_SECRET),
            Attribute::Token(false),
            Attribute::Sensitive(false),
            Attribute::Extractable(true),
        ];
        let unwrap = |blob: &[u8]| session.unwrap_key(&Mechanism::AesKeyWrapPad, wrapping, blob, &template);
        let object = unwrap(&blob).unwrap();
        let value = session.get_attributes(object, &[AttributeType::Value]).unwrap();
        assert_eq!(value, [Attribute::Value(secret)]);
        for bit in 0..blob.len() * 8 {
            let mut damaged = blob.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(unwrap(&damaged).is_err(), "bit {bit}");
        }
    });
}

#[test]
fn imported_provider_pair_signs_in_hsm() {
    in_module(|token| {
        let ceremony = token.open();
        let session = ceremony.token.session().unwrap();
        let wrapping = shared_key(&session);
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap();
        let template = [
            Attribute::Class(ObjectClass::PRIVATE_KEY),
            Attribute::KeyType(CkKeyType::EC),
            Attribute::Token(false),
            Attribute::Sign(true),
        ];
        let blob = provider_wraps(pair.to_pkcs8v1().unwrap().as_ref());
        let object = session.unwrap_key(&Mechanism::AesKeyWrapPad, wrapping, &blob, &template).unwrap();
        let raw = session.sign(&Mechanism::Ecdsa, object, &sha256(b"message")).unwrap();
        let signature = to_x509_form(SignatureAlgorithm::EcdsaP256Sha256, raw).unwrap();
        let public = PublicKey::from_ec_point(KeyType::P256, pair.public_key().as_ref()).unwrap();
        assert_eq!(public.verify(SignatureAlgorithm::EcdsaP256Sha256, b"message", &signature), Ok(()));
    });
}
