//! CA certificates of the signing keys, and certificate requests (PKCS#10). They are signed elsewhere: by the HSM, or by the
//! TLS key of an access request.

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
use super::request::CertificateSerial;
use super::tbs::{self, TbsFields};
use super::{CertificateError, IssuerCertificate, signed};
use crate::keys::{PublicKey, SignatureAlgorithm, TlsKey};

/// The content of a CA certificate: for a manufacturer key or for the access CA.
#[derive(Debug)]
pub struct AuthorityCertificate<'a> {
    /// The subject.
    pub subject: &'a SubjectName,
    /// The subject's public key.
    pub public_key: &'a PublicKey,
    /// The key's signature algorithm.
    pub algorithm: SignatureAlgorithm,
    /// The serial number.
    pub serial: CertificateSerial,
    /// Seconds since the Unix epoch.
    pub not_before: u64,
    /// Seconds since the Unix epoch; `None` for no expiry, as in device certificates (RFC 5280 §4.1.2.5).
    pub not_after: Option<u64>,
}

/// Path length of an issuing CA: it has no subordinate CAs.
const ISSUING_PATH_LEN: u8 = 0;
/// Path length of a root CA: issuing CAs may follow.
const ROOT_PATH_LEN: u8 = 1;

/// Builds a self-signed issuing CA certificate: path length 0, keyCertSign and cRLSign.
pub fn authority_certificate(template: &AuthorityCertificate<'_>) -> Result<UnsignedDocument, CertificateError> {
    self_signed(template, ISSUING_PATH_LEN)
}

/// Builds a self-signed root CA certificate: path length 1, so that issuing CAs can be subordinate to it.
pub fn root_certificate(template: &AuthorityCertificate<'_>) -> Result<UnsignedDocument, CertificateError> {
    self_signed(template, ROOT_PATH_LEN)
}

/// Builds an issuing CA certificate (path length 0) that `issuer` signs with its own algorithm. It expires no later than the
/// issuer.
pub fn subordinate_certificate(
    template: &AuthorityCertificate<'_>,
    issuer: &IssuerCertificate,
) -> Result<UnsignedDocument, CertificateError> {
    let mut extensions = authority_extensions(ISSUING_PATH_LEN)?;
    extensions.extend(key_identifiers(template.public_key, issuer.key_identifier())?);
    let not_after = template.not_after.unwrap_or(tbs::NO_EXPIRY).min(issuer.not_after()?);
    let to_be_signed = tbs::encode(TbsFields {
        serial: template.serial,
        algorithm: issuer.algorithm(),
        issuer: issuer.subject().clone(),
        not_before: template.not_before,
        not_after: check_validity_order(template.not_before, not_after)?,
        subject: template.subject.to_name(None)?,
        public_key: template.public_key,
        extensions,
    })?;
    Ok(UnsignedDocument::new("CERTIFICATE", to_be_signed, issuer.algorithm(), issuer.public_key()))
}

fn self_signed(template: &AuthorityCertificate<'_>, path_len: u8) -> Result<UnsignedDocument, CertificateError> {
    check_algorithm(template.public_key, template.algorithm)?;
    let mut extensions = authority_extensions(path_len)?;
    extensions.extend(key_identifiers(template.public_key, &tbs::key_identifier(template.public_key))?);
    let subject = template.subject.to_name(None)?;
    let to_be_signed = tbs::encode(TbsFields {
        serial: template.serial,
        algorithm: template.algorithm,
        issuer: subject.clone(),
        not_before: template.not_before,
        not_after: check_validity_order(template.not_before, template.not_after.unwrap_or(tbs::NO_EXPIRY))?,
        subject,
        public_key: template.public_key,
        extensions,
    })?;
    Ok(UnsignedDocument::new("CERTIFICATE", to_be_signed, template.algorithm, template.public_key))
}

/// Builds a PKCS#10 request (RFC 2986) for an issuing CA certificate from an offline root.
pub fn authority_request(
    subject: &SubjectName,
    public_key: &PublicKey,
    algorithm: SignatureAlgorithm,
) -> Result<UnsignedDocument, CertificateError> {
    request_of(subject, public_key, algorithm, ISSUING_PATH_LEN)
}

/// Builds a PKCS#10 request for a root of this token that another root signs: path length 1.
pub fn root_request(
    subject: &SubjectName,
    public_key: &PublicKey,
    algorithm: SignatureAlgorithm,
) -> Result<UnsignedDocument, CertificateError> {
    request_of(subject, public_key, algorithm, ROOT_PATH_LEN)
}

fn request_of(
    subject: &SubjectName,
    public_key: &PublicKey,
    algorithm: SignatureAlgorithm,
    path_len: u8,
) -> Result<UnsignedDocument, CertificateError> {
    check_algorithm(public_key, algorithm)?;
    let (subject, mut extensions) = (subject.to_name(None)?, authority_extensions(path_len)?);
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

/// Builds a PKCS#10 request for an access certificate. Its subject is empty: the officer, not the request, decides the name.
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

/// A certificate or request to be signed.
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

    /// The signature algorithm.
    pub const fn algorithm(&self) -> SignatureAlgorithm {
        self.algorithm
    }

    /// Attaches the signature (ECDSA in DER) and verifies it with the signer's public key.
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
    /// The DER encoding.
    pub fn as_der(&self) -> &[u8] {
        &self.der
    }

    /// The PEM encoding (RFC 7468) with a final newline, so that PEM files can be concatenated.
    pub fn to_pem(&self) -> Result<String, CertificateError> {
        pem(self.label, &self.der)
    }
}

/// Encodes a certificate as PEM (RFC 7468 §5).
pub fn certificate_pem(der: &[u8]) -> Result<String, CertificateError> {
    pem("CERTIFICATE", der)
}

fn pem(label: &'static str, der: &[u8]) -> Result<String, CertificateError> {
    der::pem::encode_string(label, LineEnding::LF, der).map_err(|e| CertificateError::Pem(e.to_string()))
}

/// `CA:TRUE` with a path length, and keyCertSign with cRLSign; both critical (RFC 5280 §4.2.1.9, §4.2.1.3).
fn authority_extensions(path_len: u8) -> Result<Extensions, CertificateError> {
    Ok(vec![
        tbs::extension(true, &BasicConstraints { ca: true, path_len_constraint: Some(path_len) })?,
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

/// Returns `not_after` if it is later than `not_before` and representable.
pub(super) fn check_validity_order(not_before: u64, not_after: u64) -> Result<u64, CertificateError> {
    if not_before < not_after && not_after <= tbs::NO_EXPIRY {
        return Ok(not_after);
    }
    Err(CertificateError::Request("notAfter must be later than notBefore and before the year 10000".into()))
}

fn check_algorithm(key: &PublicKey, algorithm: SignatureAlgorithm) -> Result<(), CertificateError> {
    let kind = key.kind();
    if algorithm.fits(kind) { Ok(()) } else { Err(CertificateError::AlgorithmMismatch { kind, algorithm }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::testing::{ALGORITHMS, NOW, SoftwareKey, authority_of, openssl, serial};
    use crate::certificate::{IssuerCertificate, verify_csr};

    #[test]
    fn openssl_accepts_ca_under_root_of_other_key_type() {
        let (root, key) = (SoftwareKey::new(SignatureAlgorithm::EcdsaP384Sha384), SoftwareKey::p256());
        let [above, subject] = ["Root", "Manufacturer"].map(|name| SubjectName::with_common_name(name).unwrap());
        let wanted = |subject, key: &SoftwareKey, not_after| {
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
    fn self_signed_ca_of_every_algorithm_accepted_by_openssl() {
        for algorithm in ALGORITHMS {
            let key = SoftwareKey::new(algorithm);
            let pem = authority_of(&key);
            let text = openssl(&["verify", "-x509_strict", "-CAfile", "ca.pem", "ca.pem"], &[("ca.pem", &pem)]);
            assert!(text.contains("ca.pem: OK"), "{algorithm:?}: {text}");
            assert_eq!(IssuerCertificate::from_pem(&pem, algorithm).unwrap().public_key(), key.public());
        }
    }

    #[test]
    fn ca_request_signed_by_its_key_verifies() {
        let key = SoftwareKey::p256();
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
    fn ca_request_signed_by_offline_root_yields_issuer() {
        let key = SoftwareKey::p256();
        let subject = SubjectName::with_common_name("Manufacturer").unwrap();
        let unsigned = authority_request(&subject, key.public(), key.algorithm()).unwrap();
        let signature = key.sign(unsigned.to_be_signed());
        let request = unsigned.assemble(&signature).unwrap().to_pem().unwrap();
        let directory = spp_test_support::files::temp_dir();
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
        assert!(IssuerCertificate::from_pem(&format!("{root}{sub}"), key.algorithm()).is_err(), "wrong order");
    }

    #[test]
    fn assemble_with_signature_of_other_key_fails() {
        let (key, other) = (SoftwareKey::p256(), SoftwareKey::p256());
        let subject = SubjectName::with_common_name("Manufacturer").unwrap();
        let unsigned = authority_request(&subject, key.public(), key.algorithm()).unwrap();
        let signature = other.sign(unsigned.to_be_signed());
        assert!(unsigned.assemble(&signature).is_err());
    }

    #[test]
    fn ca_certificate_with_empty_validity_rejected() {
        let key = SoftwareKey::p256();
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
