//! A test certificate authority, which issues certificates that sppctl refuses to issue.

use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use spp_format::certificate::{
    AccessCertificate, AccessName, AuthorityCertificate, Caller, CertificateSerial, IssuerCertificate, SubjectName,
    UnsignedDocument, access_certificate, authority_certificate,
};
use spp_format::keys::{PublicKey, SignatureAlgorithm, TlsKey};
use tonic::transport::Identity;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::files::write_private;
use crate::site::Site;

const P256: SignatureAlgorithm = SignatureAlgorithm::EcdsaP256Sha256;

/// An authority for access certificates, with its key in this process.
pub struct Authority {
    pub pem: String,
    key_pem: String,
    pair: EcdsaKeyPair,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let (public, pair, key_pem) = key_pair();
        let unsigned = authority_certificate(&AuthorityCertificate {
            subject: &SubjectName::with_common_name(name).unwrap(),
            public_key: &public,
            algorithm: P256,
            serial: CertificateSerial::from_random([1; 20]),
            not_before: now() - 3600,
            not_after: Some(now() + 3600),
        });
        let pem = signed(unsigned.unwrap(), &pair);
        Self { pem, key_pem, pair }
    }

    /// Creates a TLS identity with this name, valid since one hour ago.
    pub fn identity(&self, name: &AccessName, not_after: u64) -> Identity {
        let (public, _, key_pem) = key_pair();
        let issuer = IssuerCertificate::from_pem(&self.pem, P256).unwrap();
        let unsigned = access_certificate(&AccessCertificate {
            name,
            public_key: &public,
            issuer: &issuer,
            serial: CertificateSerial::from_random([2; 20]),
            not_before: now() - 3600,
            not_after,
        });
        Identity::from_pem(signed(unsigned.unwrap(), &self.pair), key_pem)
    }

    /// Creates a TLS identity with any subjectAltName, using openssl.
    pub fn identity_with(&self, site: &Site, names: &str) -> Identity {
        let path = |name: &str| site.path(name).display().to_string();
        std::fs::write(site.path("ca.pem"), &self.pem).unwrap();
        write_private(&site.path("ca.key"), &self.key_pem);
        let extensions = format!("extendedKeyUsage=clientAuth\nkeyUsage=critical,digitalSignature\n{names}\n");
        std::fs::write(site.path("ext.cnf"), extensions).unwrap();
        site.openssl(
            "req -new -batch -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x -keyout c.key -out c.csr",
        );
        site.openssl(&format!(
            "x509 -req -in c.csr -CA {} -CAkey ca.key -set_serial 77 -days 1 -extfile ext.cnf -out c.pem",
            path("ca.pem")
        ));
        Identity::from_pem(site.read("c.pem"), site.read("c.key"))
    }
}

pub fn key_pair() -> (PublicKey, EcdsaKeyPair, String) {
    let key = TlsKey::generate().unwrap();
    let pem = String::from_utf8(key.pem().expose().clone()).unwrap();
    let (_, der) = der::pem::decode_vec(pem.as_bytes()).unwrap();
    (key.public().clone(), EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &der).unwrap(), pem)
}

pub fn signed(unsigned: UnsignedDocument, pair: &EcdsaKeyPair) -> String {
    let signature = pair.sign(&SystemRandom::new(), unsigned.to_be_signed()).unwrap();
    unsigned.assemble(signature.as_ref()).unwrap().to_pem().unwrap()
}

pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

pub fn station(name: &str) -> AccessName {
    AccessName::Client(Caller::Station(name.parse().unwrap()))
}

/// Whether the TLS handshake failed, so that the daemon did not answer.
pub fn refused_by_tls(answer: &Result<(), Status>) -> bool {
    matches!(answer, Err(status) if status.get_error_details().error_info().is_none()
        && matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal))
}
