//! Sample packages of every type, for tests.
#![allow(clippy::unwrap_used, reason = "test support fails by a panic")]

use aws_lc_rs::encoding::AsDer as _;
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
};
#[cfg(test)]
use proptest::prelude::*;

use super::{CertificateChain, DataPackage, SymmetricKey};
use crate::keys::{DevicePrivateKey, KeyType, PrivateParts, PublicKey};
use crate::names::{ChipId, SessionId};
use crate::secret::{Secret, SecretBytes};

/// A key type of each family.
pub const KINDS: [KeyType; 4] = [KeyType::P256, KeyType::P384, KeyType::Ed25519, KeyType::Rsa2048];

/// A chip ID.
pub fn chip(byte: u8) -> ChipId {
    ChipId::from_bytes(&[byte; 16]).unwrap()
}

/// A session ID.
pub fn session(byte: u8) -> SessionId {
    SessionId::from_bytes(&[byte; 16]).unwrap()
}

/// A chip key.
pub fn chip_key(byte: u8) -> Secret<[u8; 32]> {
    Secret::new([byte; 32])
}

/// A symmetric key of 32 bytes.
pub fn symmetric_key(purpose: &str, byte: u8) -> SymmetricKey {
    SymmetricKey::new(purpose, SecretBytes::copy_of(&[byte; 32])).unwrap()
}

/// Generates a key pair.
pub fn pair(kind: KeyType) -> DevicePrivateKey {
    let unwrapped =
        |public, pkcs8: &[u8]| DevicePrivateKey::from_unwrapped(public, &SecretBytes::copy_of(pkcs8)).unwrap();
    match kind {
        KeyType::P256 | KeyType::P384 => {
            let p256 = kind == KeyType::P256;
            let algorithm = if p256 { &ECDSA_P256_SHA256_ASN1_SIGNING } else { &ECDSA_P384_SHA384_ASN1_SIGNING };
            let pair = EcdsaKeyPair::generate(algorithm).unwrap();
            let public = PublicKey::from_ec_point(kind, pair.public_key().as_ref()).unwrap();
            unwrapped(public, pair.to_pkcs8v1().unwrap().as_ref())
        }
        KeyType::Ed25519 => {
            let pair = Ed25519KeyPair::generate().unwrap();
            let seed = aws_lc_rs::encoding::AsBigEndian::as_be_bytes(&pair.seed().unwrap()).unwrap();
            let public = PublicKey::from_ed25519(pair.public_key().as_ref()).unwrap();
            let parts = PrivateParts::Ed25519(SecretBytes::copy_of(seed.as_ref()));
            DevicePrivateKey::from_parts(public, parts).unwrap()
        }
        _ => {
            let pair = rsa::KeyPair::generate(rsa::KeySize::Rsa2048).unwrap();
            let spki = pair.public_key().as_der().unwrap();
            unwrapped(PublicKey::from_spki_der(spki.as_ref()).unwrap(), pair.as_der().unwrap().as_ref())
        }
    }
}

/// A package with a key pair and two symmetric keys, or with a CWT and no key pair.
pub fn package(kind: Option<KeyType>) -> DataPackage {
    DataPackage {
        chip: chip(1),
        identity: "imei:490154203237518".parse().unwrap(),
        profile: "tracker".parse().unwrap(),
        session: session(2),
        certificate: match kind {
            Some(_) => CertificateChain::X509 { device: vec![0x30; 400], issuers: vec![vec![0x31; 300]] },
            None => CertificateChain::Cwt(vec![0xd2; 200]),
        },
        key_pair: kind.map(pair),
        symmetric_keys: vec![symmetric_key("channel", 0xa1), symmetric_key("update", 0xb2)],
        master_key_version: 3,
    }
}

/// Generates arbitrary packages without RSA keys, whose generation is slow.
#[cfg(test)]
pub(crate) fn any_package() -> impl Strategy<Value = DataPackage> {
    let kind =
        prop_oneof![Just(None), Just(Some(KeyType::P256)), Just(Some(KeyType::P384)), Just(Some(KeyType::Ed25519))];
    let names =
        (prop::collection::vec(any::<u8>(), 8..=64), any::<[u8; 16]>(), "[0-9A-Za-z -]{1,64}", "[a-z][a-z0-9-]{0,30}");
    let bytes = || prop::collection::vec(any::<u8>(), 0..600);
    let issuers = prop::collection::vec(bytes(), 0..=4);
    let keys = prop::collection::vec(prop::collection::vec(any::<u8>(), 16..=64), 0..=8);
    (kind, names, bytes(), issuers, keys, 1..=u32::MAX).prop_map(|(kind, names, device, issuers, keys, version)| {
        let purposes = (1..).map(|n| format!("purpose-{n}"));
        let keys = if kind.is_none() && keys.is_empty() { vec![vec![9; 32]] } else { keys };
        DataPackage {
            chip: ChipId::from_bytes(&names.0).unwrap(),
            session: SessionId::from_bytes(&names.1).unwrap(),
            identity: format!("serial:{}", names.2).parse().unwrap(),
            profile: names.3.parse().unwrap(),
            certificate: match kind {
                Some(_) => CertificateChain::X509 { device, issuers },
                None => CertificateChain::Cwt(device),
            },
            key_pair: kind.map(pair),
            master_key_version: if keys.is_empty() { 0 } else { version },
            symmetric_keys: keys
                .into_iter()
                .zip(purposes)
                .map(|(key, purpose)| SymmetricKey::new(&purpose, SecretBytes::new(key)).unwrap())
                .collect(),
        }
    })
}
