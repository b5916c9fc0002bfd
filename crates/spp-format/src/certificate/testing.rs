//! Test helpers of the certificate module: software keys of every algorithm, a CA, requests, and the openssl command.

use std::process::Command;

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair};

use super::{
    AuthorityCertificate, CertificateRequest, CertificateSerial, IssuerCertificate, Profile, SubjectName,
    authority_certificate, authority_request,
};
use crate::keys::{KeyType, PublicKey, SignatureAlgorithm};
use crate::names::{ChipId, DeviceIdentity};

pub(super) const ALGORITHMS: [SignatureAlgorithm; 5] = [
    SignatureAlgorithm::EcdsaP256Sha256,
    SignatureAlgorithm::EcdsaP384Sha384,
    SignatureAlgorithm::RsaPkcs1Sha256,
    SignatureAlgorithm::RsaPssSha256,
    SignatureAlgorithm::Ed25519,
];

/// 2026-01-01T00:00:00Z.
pub(super) const NOW: u64 = 1_767_225_600;

pub(super) const PHONE: &str = r#"
identities = ["imei", "meid", "eui48", "eui64", "serial"]
hardware_type = "1.3.6.1.4.1.32473.1.7"
issuer = "manufacturer"
key_pair.source = "generate"
key_pair.kind = "p256"
"#;

pub(super) fn profile(text: &str) -> Profile {
    Profile::from_toml("phone".parse().unwrap(), "phone.toml", text).unwrap()
}

pub(super) fn serial(first: u8) -> CertificateSerial {
    CertificateSerial::from_random([first; 20])
}

/// A software key pair with its signature algorithm.
pub(super) struct SoftwareKey {
    pair: Pair,
    public: PublicKey,
    algorithm: SignatureAlgorithm,
}

enum Pair {
    Ec(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
    Rsa(aws_lc_rs::rsa::KeyPair),
}

impl SoftwareKey {
    pub(super) fn p256() -> Self {
        Self::new(SignatureAlgorithm::EcdsaP256Sha256)
    }

    pub(super) fn new(algorithm: SignatureAlgorithm) -> Self {
        let ec = |kind, signing| {
            let pair = EcdsaKeyPair::generate(signing).unwrap();
            let public = PublicKey::from_ec_point(kind, pair.public_key().as_ref()).unwrap();
            (Pair::Ec(pair), public)
        };
        let (pair, public) = match algorithm {
            SignatureAlgorithm::EcdsaP256Sha256 => ec(KeyType::P256, &signature::ECDSA_P256_SHA256_ASN1_SIGNING),
            SignatureAlgorithm::EcdsaP384Sha384 => ec(KeyType::P384, &signature::ECDSA_P384_SHA384_ASN1_SIGNING),
            SignatureAlgorithm::Ed25519 => {
                let pair = Ed25519KeyPair::generate().unwrap();
                let public = PublicKey::from_ed25519(pair.public_key().as_ref()).unwrap();
                (Pair::Ed25519(pair), public)
            }
            SignatureAlgorithm::RsaPkcs1Sha256 | SignatureAlgorithm::RsaPssSha256 => {
                let pair = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
                let spki = pair.public_key().as_der().unwrap();
                let public = PublicKey::from_spki_der(spki.as_ref()).unwrap();
                (Pair::Rsa(pair), public)
            }
        };
        Self { pair, public, algorithm }
    }

    pub(super) const fn public(&self) -> &PublicKey {
        &self.public
    }

    pub(super) const fn algorithm(&self) -> SignatureAlgorithm {
        self.algorithm
    }

    pub(super) fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.sign_with(self.algorithm, message)
    }

    pub(super) fn sign_with(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Vec<u8> {
        let rng = aws_lc_rs::rand::SystemRandom::new();
        match &self.pair {
            Pair::Ec(pair) => pair.sign(&rng, message).unwrap().as_ref().to_vec(),
            Pair::Ed25519(pair) => pair.sign(message).as_ref().to_vec(),
            Pair::Rsa(pair) => {
                let encoding: &'static dyn signature::RsaEncoding = match algorithm {
                    SignatureAlgorithm::RsaPssSha256 => &signature::RSA_PSS_SHA256,
                    _ => &signature::RSA_PKCS1_SHA256,
                };
                let mut signature_bytes = vec![0; pair.public_modulus_len()];
                pair.sign(encoding, &rng, message, &mut signature_bytes).unwrap();
                signature_bytes
            }
        }
    }
}

/// A self-signed CA certificate without expiry, in PEM.
pub(super) fn authority_of(key: &SoftwareKey) -> String {
    let subject = SubjectName::with_common_name("Manufacturer").unwrap();
    let unsigned = authority_certificate(&AuthorityCertificate {
        subject: &subject,
        public_key: key.public(),
        algorithm: key.algorithm(),
        serial: serial(7),
        not_before: NOW - 86_400,
        not_after: None,
    })
    .unwrap();
    let signature = key.sign(unsigned.to_be_signed());
    unsigned.assemble(&signature).unwrap().to_pem().unwrap()
}

/// A PKCS#10 request signed by its own key.
pub(super) fn request_of(key: &SoftwareKey) -> Vec<u8> {
    let subject = SubjectName::with_common_name("device").unwrap();
    let unsigned = authority_request(&subject, key.public(), key.algorithm()).unwrap();
    let signature = key.sign(unsigned.to_be_signed());
    unsigned.assemble(&signature).unwrap().as_der().to_vec()
}

/// Owns everything that a certificate request borrows.
pub(super) struct SampleRequest {
    pub(super) manufacturer: SoftwareKey,
    pub(super) issuer: IssuerCertificate,
    pub(super) profile: Profile,
    pub(super) chip: ChipId,
    pub(super) identity: DeviceIdentity,
    pub(super) device: Option<SoftwareKey>,
}

impl SampleRequest {
    pub(super) fn new(algorithm: SignatureAlgorithm, profile_text: &str) -> Self {
        let manufacturer = SoftwareKey::new(algorithm);
        let issuer = IssuerCertificate::from_pem(&authority_of(&manufacturer), algorithm).unwrap();
        let profile = profile(profile_text);
        let device = (!profile.is_cwt()).then(SoftwareKey::p256);
        let chip = ChipId::from_bytes(&[0xc5; 16]).unwrap();
        Self { manufacturer, issuer, profile, chip, identity: "imei:490154203237518".parse().unwrap(), device }
    }

    pub(super) fn request(&self) -> CertificateRequest<'_> {
        CertificateRequest {
            profile: &self.profile,
            issuer: &self.issuer,
            chip: &self.chip,
            identity: &self.identity,
            public_key: self.device.as_ref().map(SoftwareKey::public),
            serial: serial(0xff),
            not_before: NOW,
        }
    }
}

/// The profile of a device without a key pair.
pub(super) fn symmetric_profile() -> String {
    let text = PHONE.replace("\"generate\"", "\"none\"").replace("key_pair.kind = \"p256\"\n", "");
    format!("{text}\n[[symmetric_key]]\npurpose = \"channel\"\nmaster_key = \"master\"\n")
}

/// Runs `openssl` in a directory with these files and returns its output.
pub(super) fn openssl(arguments: &[&str], files: &[(&str, &str)]) -> String {
    let directory = spp_test_support::files::temp_dir();
    for (name, text) in files {
        std::fs::write(directory.path().join(name), text).unwrap();
    }
    let output = Command::new("openssl").args(arguments).current_dir(directory.path()).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}
