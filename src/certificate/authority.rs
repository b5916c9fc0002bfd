//! Certificates of the signing keys themselves, and requests for them. Their keys sign elsewhere.

use der::asn1::{OctetString, SetOfVec};
use der::pem::LineEnding;
use der::{Decode, Encode};
use spki::SubjectPublicKeyInfoOwned;
use x509_cert::attr::Attribute;
use x509_cert::ext::pkix::{AuthorityKeyIdentifier, BasicConstraints, KeyUsage, KeyUsages, SubjectKeyIdentifier};
use x509_cert::ext::{Extension, Extensions};
use x509_cert::name::Name;
use x509_cert::request::{CertReqInfo, ExtensionReq, Version};

use super::name::SubjectName;
use super::prepare::CertificateSerial;
use super::tbs::{self, TbsFields};
use super::{CertificateError, IssuerCertificate, signed};
use crate::keys::{PublicKey, SignatureAlgorithm, TlsKey};

/// A self-signed authority: the manufacturer's key, or the one that issues access certificates.
#[derive(Debug)]
pub struct AuthorityCertificate<'a> {
    /// Its name.
    pub subject: &'a SubjectName,
    /// Its public key.
    pub public_key: &'a PublicKey,
    /// How it signs itself.
    pub algorithm: SignatureAlgorithm,
    /// The certificate's number.
    pub serial: CertificateSerial,
    /// Seconds since the Unix epoch.
    pub not_before: u64,
    /// Seconds since the Unix epoch; `None` for no expiry, as the devices' certificates (RFC 5280 §4.1.2.5).
    pub not_after: Option<u64>,
}

/// Authorities under one of the keys of a token: the keys that issue.
const ISSUING: u8 = 0;
/// Authorities under a root: the keys that issue, and those that they issue for.
const ROOT: u8 = 1;

/// A self-signed CA certificate: path length 0, keyCertSign and cRLSign.
pub fn authority_certificate(wanted: &AuthorityCertificate<'_>) -> Result<UnsignedDocument, CertificateError> {
    self_signed(wanted, ISSUING)
}

/// The same with path length 1: a root, under which the keys that issue have their certificates.
pub fn root_certificate(wanted: &AuthorityCertificate<'_>) -> Result<UnsignedDocument, CertificateError> {
    self_signed(wanted, ROOT)
}

/// A CA certificate with path length 0 that another authority signs, with its own algorithm. It ends with the issuer's at the latest.
pub fn subordinate_certificate(
    wanted: &AuthorityCertificate<'_>,
    issuer: &IssuerCertificate,
) -> Result<UnsignedDocument, CertificateError> {
    let mut extensions = authority_extensions(ISSUING)?;
    extensions.extend(key_identifiers(wanted.public_key, issuer.key_identifier())?);
    let not_after = wanted.not_after.unwrap_or(tbs::NO_EXPIRY).min(issuer.not_after()?);
    let to_be_signed = tbs::encode(TbsFields {
        serial: wanted.serial,
        algorithm: issuer.algorithm(),
        issuer: issuer.subject().clone(),
        not_before: wanted.not_before,
        not_after: ordered(wanted.not_before, not_after)?,
        subject: wanted.subject.to_name(None)?,
        public_key: wanted.public_key,
        extensions,
    })?;
    Ok(UnsignedDocument::new("CERTIFICATE", to_be_signed, issuer.algorithm(), issuer.public_key()))
}

fn self_signed(wanted: &AuthorityCertificate<'_>, below: u8) -> Result<UnsignedDocument, CertificateError> {
    must_fit(wanted.public_key, wanted.algorithm)?;
    let mut extensions = authority_extensions(below)?;
    extensions.extend(key_identifiers(wanted.public_key, &tbs::key_identifier(wanted.public_key))?);
    let subject = wanted.subject.to_name(None)?;
    let to_be_signed = tbs::encode(TbsFields {
        serial: wanted.serial,
        algorithm: wanted.algorithm,
        issuer: subject.clone(),
        not_before: wanted.not_before,
        not_after: ordered(wanted.not_before, wanted.not_after.unwrap_or(tbs::NO_EXPIRY))?,
        subject,
        public_key: wanted.public_key,
        extensions,
    })?;
    Ok(UnsignedDocument::new("CERTIFICATE", to_be_signed, wanted.algorithm, wanted.public_key))
}

/// A PKCS#10 request (RFC 2986) by which an offline root makes the key a subordinate CA.
pub fn authority_request(
    subject: &SubjectName,
    public_key: &PublicKey,
    algorithm: SignatureAlgorithm,
) -> Result<UnsignedDocument, CertificateError> {
    request_of(subject, public_key, algorithm, ISSUING)
}

/// The same for a root of this token that has another one above it: path length 1.
pub fn root_request(
    subject: &SubjectName,
    public_key: &PublicKey,
    algorithm: SignatureAlgorithm,
) -> Result<UnsignedDocument, CertificateError> {
    request_of(subject, public_key, algorithm, ROOT)
}

fn request_of(
    subject: &SubjectName,
    public_key: &PublicKey,
    algorithm: SignatureAlgorithm,
    below: u8,
) -> Result<UnsignedDocument, CertificateError> {
    must_fit(public_key, algorithm)?;
    let (subject, mut extensions) = (subject.to_name(None)?, authority_extensions(below)?);
    extensions.push(subject_key_identifier(public_key)?);
    let build = || {
        let mut attributes = SetOfVec::new();
        attributes.insert(Attribute::try_from(ExtensionReq(extensions))?)?;
        let public_key = SubjectPublicKeyInfoOwned::from_der(public_key.spki_der())?;
        CertReqInfo { version: Version::V1, subject, public_key, attributes }.to_der()
    };
    let to_be_signed = build().map_err(CertificateError::unwritable("certificate request"))?;
    Ok(UnsignedDocument::new("CERTIFICATE REQUEST", to_be_signed, algorithm, public_key))
}

/// A PKCS#10 request for an access certificate. It names nobody: who it is for is the officer's decision, not the request's.
pub fn access_request(key: &TlsKey) -> Result<UnsignedDocument, CertificateError> {
    let (public, algorithm) = (key.public(), key.algorithm());
    let build = || {
        let public_key = SubjectPublicKeyInfoOwned::from_der(public.spki_der())?;
        let (subject, attributes) = (Name::default(), SetOfVec::new());
        CertReqInfo { version: Version::V1, subject, public_key, attributes }.to_der()
    };
    let to_be_signed = build().map_err(CertificateError::unwritable("certificate request"))?;
    Ok(UnsignedDocument::new("CERTIFICATE REQUEST", to_be_signed, algorithm, public))
}

/// Bytes for a key elsewhere to sign, and what becomes of them then.
#[derive(Debug)]
pub struct UnsignedDocument {
    label: &'static str,
    to_be_signed: Vec<u8>,
    algorithm: SignatureAlgorithm,
    signer: PublicKey,
}

impl UnsignedDocument {
    pub(super) fn new(
        label: &'static str,
        to_be_signed: Vec<u8>,
        algorithm: SignatureAlgorithm,
        signer: &PublicKey,
    ) -> Self {
        Self { label, to_be_signed, algorithm, signer: signer.clone() }
    }

    /// The bytes to be signed.
    pub fn to_be_signed(&self) -> &[u8] {
        &self.to_be_signed
    }

    /// How they are to be signed.
    pub const fn algorithm(&self) -> SignatureAlgorithm {
        self.algorithm
    }

    /// Puts the signature (ECDSA in DER) to it and verifies it with the signer's public key.
    pub fn assemble(self, signature: &[u8]) -> Result<SignedDocument, CertificateError> {
        let der = signed::join(&self.to_be_signed, self.algorithm, signature)?;
        signed::split("signed document", &der)?.verify(&self.signer)?;
        Ok(SignedDocument { label: self.label, der })
    }
}

/// A certificate or request whose signature has been verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedDocument {
    label: &'static str,
    der: Vec<u8>,
}

impl SignedDocument {
    /// In DER.
    pub fn as_der(&self) -> &[u8] {
        &self.der
    }

    /// In PEM (RFC 7468) with a line end at its end, so that files can be put one behind the other.
    pub fn to_pem(&self) -> Result<String, CertificateError> {
        pem(self.label, &self.der)
    }
}

/// A certificate in PEM (RFC 7468 §5).
pub fn certificate_pem(der: &[u8]) -> Result<String, CertificateError> {
    pem("CERTIFICATE", der)
}

fn pem(label: &'static str, der: &[u8]) -> Result<String, CertificateError> {
    der::pem::encode_string(label, LineEnding::LF, der).map_err(|e| CertificateError::Pem(e.to_string()))
}

/// `CA:TRUE` with its path length and keyCertSign with cRLSign, both critical (RFC 5280 §4.2.1.9, §4.2.1.3).
fn authority_extensions(below: u8) -> Result<Extensions, CertificateError> {
    Ok(vec![
        tbs::extension(true, &BasicConstraints { ca: true, path_len_constraint: Some(below) })?,
        tbs::extension(true, &KeyUsage(KeyUsages::KeyCertSign | KeyUsages::CRLSign))?,
    ])
}

/// subjectKeyIdentifier and authorityKeyIdentifier.
pub(super) fn key_identifiers(key: &PublicKey, issuer: &[u8]) -> Result<Extensions, CertificateError> {
    let bytes = OctetString::new(issuer).map_err(CertificateError::unwritable("key identifier"))?;
    let authority = AuthorityKeyIdentifier { key_identifier: Some(bytes), ..AuthorityKeyIdentifier::default() };
    Ok(vec![subject_key_identifier(key)?, tbs::extension(false, &authority)?])
}

fn subject_key_identifier(key: &PublicKey) -> Result<Extension, CertificateError> {
    let bytes = OctetString::new(tbs::key_identifier(key)).map_err(CertificateError::unwritable("key identifier"))?;
    tbs::extension(false, &SubjectKeyIdentifier(bytes))
}

/// The end of a validity that has a beginning before it.
pub(super) fn ordered(not_before: u64, not_after: u64) -> Result<u64, CertificateError> {
    if not_before < not_after && not_after <= tbs::NO_EXPIRY {
        return Ok(not_after);
    }
    Err(CertificateError::Request("notAfter must be later than notBefore and before the year 10000".into()))
}

fn must_fit(key: &PublicKey, algorithm: SignatureAlgorithm) -> Result<(), CertificateError> {
    let kind = key.kind();
    if algorithm.fits(kind) { Ok(()) } else { Err(CertificateError::AlgorithmMismatch { kind, algorithm }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::testing::{ALGORITHMS, NOW, SignWith, authority_of, openssl, serial};
    use crate::certificate::{IssuerCertificate, verify_csr};

    #[test]
    fn openssl_accepts_an_authority_under_a_root_of_another_kind() {
        let (root, key) = (SignWith::new(SignatureAlgorithm::EcdsaP384Sha384), SignWith::p256());
        let [above, subject] = ["Root", "Manufacturer"].map(|name| SubjectName::with_common_name(name).unwrap());
        let wanted = |subject, key: &SignWith, not_after| {
            let public_key = key.public().clone();
            (subject, public_key, key.algorithm(), not_after)
        };
        let made = |(subject, public_key, algorithm, not_after): (&_, PublicKey, _, _), issuer: Option<&_>| {
            let (public_key, serial) = (&public_key, serial(1));
            let wanted = AuthorityCertificate { subject, public_key, algorithm, serial, not_before: NOW, not_after };
            let unsigned = match issuer {
                Some(issuer) => subordinate_certificate(&wanted, issuer).unwrap(),
                None => root_certificate(&wanted).unwrap(),
            };
            let signature = root.sign(unsigned.to_be_signed());
            unsigned.assemble(&signature).unwrap().to_pem().unwrap()
        };
        let end = NOW + 1_000_000_000;
        let root_pem = made(wanted(&above, &root, Some(end)), None);
        let issuer = IssuerCertificate::from_pem(&root_pem, root.algorithm()).unwrap();
        let sub = made(wanted(&subject, &key, None), Some(&issuer));
        let chain = IssuerCertificate::from_pem(&format!("{sub}{root_pem}"), key.algorithm()).unwrap();
        assert_eq!((chain.public_key(), chain.chain().len(), chain.not_after().unwrap()), (key.public(), 2, end));
        let text = openssl(
            &["verify", "-x509_strict", "-CAfile", "root.pem", "sub.pem"],
            &[("root.pem", &root_pem), ("sub.pem", &sub)],
        );
        assert!(text.contains("sub.pem: OK"), "{text}");
    }

    #[test]
    fn openssl_accepts_a_self_signed_authority_of_every_algorithm() {
        for algorithm in ALGORITHMS {
            let key = SignWith::new(algorithm);
            let pem = authority_of(&key);
            let text = openssl(&["verify", "-x509_strict", "-CAfile", "ca.pem", "ca.pem"], &[("ca.pem", &pem)]);
            assert!(text.contains("ca.pem: OK"), "{algorithm:?}: {text}");
            assert_eq!(IssuerCertificate::from_pem(&pem, algorithm).unwrap().public_key(), key.public());
        }
    }

    #[test]
    fn a_request_for_an_offline_root_is_signed_by_its_key() {
        let key = SignWith::p256();
        let subject = SubjectName::with_common_name("Manufacturer").unwrap();
        let unsigned = authority_request(&subject, key.public(), key.algorithm()).unwrap();
        let signature = key.sign(unsigned.to_be_signed());
        let request = unsigned.assemble(&signature).unwrap();
        assert_eq!(verify_csr(request.as_der()).unwrap(), *key.public());
        let pem = request.to_pem().unwrap();
        let text = openssl(&["req", "-in", "r.pem", "-verify", "-noout", "-text"], &[("r.pem", &pem)]);
        assert!(text.contains("CA:TRUE, pathlen:0"), "{text}");
    }

    #[test]
    fn an_offline_root_makes_the_key_an_issuer() {
        let key = SignWith::p256();
        let subject = SubjectName::with_common_name("Manufacturer").unwrap();
        let unsigned = authority_request(&subject, key.public(), key.algorithm()).unwrap();
        let signature = key.sign(unsigned.to_be_signed());
        let request = unsigned.assemble(&signature).unwrap().to_pem().unwrap();
        let directory = spp_testkit::files::temp_dir();
        std::fs::write(directory.path().join("request.pem"), request).unwrap();
        for line in [
            "req -x509 -newkey rsa:3072 -nodes -keyout root.key -out root.pem -subj /CN=Root -days 3650",
            "x509 -req -in request.pem -CA root.pem -CAkey root.key -copy_extensions copyall -days 365 -out sub.pem",
        ] {
            let output = std::process::Command::new("openssl")
                .args(line.split(' '))
                .current_dir(directory.path())
                .output()
                .unwrap();
            assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        }
        let read = |name: &str| std::fs::read_to_string(directory.path().join(name)).unwrap();
        let (sub, root) = (read("sub.pem"), read("root.pem"));
        let issuer = IssuerCertificate::from_pem(&format!("{sub}{root}"), key.algorithm()).unwrap();
        assert_eq!((issuer.chain().len(), issuer.public_key()), (2, key.public()));
        assert_eq!(issuer.display_name(), "Manufacturer");
        assert!(IssuerCertificate::from_pem(&format!("{root}{sub}"), key.algorithm()).is_err(), "the wrong way round");
    }

    #[test]
    fn a_signature_by_another_key_makes_no_certificate() {
        let (key, other) = (SignWith::p256(), SignWith::p256());
        let subject = SubjectName::with_common_name("Manufacturer").unwrap();
        let unsigned = authority_request(&subject, key.public(), key.algorithm()).unwrap();
        let signature = other.sign(unsigned.to_be_signed());
        assert!(unsigned.assemble(&signature).is_err());
    }

    #[test]
    fn an_authority_ends_after_it_begins() {
        let key = SignWith::p256();
        let subject = SubjectName::with_common_name("Manufacturer").unwrap();
        let wanted = |not_after| AuthorityCertificate {
            subject: &subject,
            public_key: key.public(),
            algorithm: key.algorithm(),
            serial: serial(1),
            not_before: NOW,
            not_after,
        };
        assert!(authority_certificate(&wanted(Some(NOW))).is_err());
        assert!(authority_certificate(&wanted(Some(NOW + 1))).is_ok());
    }
}
