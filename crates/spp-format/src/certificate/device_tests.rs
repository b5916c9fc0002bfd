//! Device certificates from the request to verification.

use proptest::prelude::*;

use super::testing::{
    ALGORITHMS, NOW, PHONE, SampleRequest, SoftwareKey, authority_of, openssl, profile, symmetric_profile,
};
use super::{
    CertificateError, IssuedCertificate, IssuerCertificate, certificate_pem, prepare, verify_device_certificate,
};
use crate::keys::SignatureAlgorithm;
use crate::names::{ChipId, DeviceIdentity};

const P256: SignatureAlgorithm = SignatureAlgorithm::EcdsaP256Sha256;

fn issue(sample: &SampleRequest) -> IssuedCertificate {
    let to_sign = prepare(&sample.request()).unwrap().lint().unwrap().into_to_sign();
    let signature = sample.manufacturer.sign(to_sign.to_be_signed());
    IssuedCertificate::assemble(&to_sign, &sample.issuer, &signature).unwrap()
}

#[test]
fn certificate_of_every_algorithm_verifies() {
    for algorithm in ALGORITHMS {
        let sample = SampleRequest::new(algorithm, PHONE);
        let issued = issue(&sample);
        let key = sample.manufacturer.public();
        let verified = verify_device_certificate(issued.as_bytes(), false, key, &sample.chip).unwrap();
        assert_eq!(verified.identity(), Some(&sample.identity));
        assert_eq!(verified.public_key(), sample.request().public_key);
        assert_eq!((verified.not_before(), verified.not_after()), (NOW, None));
        assert_eq!(verified.serial(), sample.request().serial.as_bytes());
        assert_eq!(verified.hardware_type(), sample.profile.hardware_type());

        let (ca, leaf) = (authority_of(&sample.manufacturer), certificate_pem(issued.as_bytes()).unwrap());
        let line = ["verify", "-x509_strict", "-CAfile", "ca.pem", "device.pem"];
        let text = openssl(&line, &[("ca.pem", &ca), ("device.pem", &leaf)]);
        assert!(text.contains("device.pem: OK"), "{algorithm:?}: {text}");
    }
}

#[test]
fn certificate_names_read_by_openssl() {
    let text = PHONE.to_owned() + "[subject]\ncountry = \"FI\"\norganization = \"A, B\"\n";
    let leaf = certificate_pem(issue(&SampleRequest::new(P256, &text)).as_bytes()).unwrap();
    let line = ["x509", "-in", "device.pem", "-noout", "-text", "-nameopt", "RFC2253"];
    let text = openssl(&line, &[("device.pem", &leaf)]);
    for expected in [
        "Subject: serialNumber=490154203237518,O=A\\, B,C=FI",
        "Not After : Dec 31 23:59:59 9999 GMT",
        // RFC 7254: spare digit 0 instead of check digit 8.
        "URI:urn:gsma:imei:49015420-323751-0",
        "X509v3 Key Usage: critical",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert!(!text.contains("Subject Key Identifier") && !text.contains("Extended Key Usage"));
}

#[test]
fn optional_extensions_of_profile_present() {
    let text = PHONE.to_owned()
        + "[certificate]\nsubject_key_identifier = true\nvalidity_days = 10\nextended_key_usages = [\"1.3.6.1.5.5.7.3.2\"]\n\
           crl_distribution_points = [\"http://pki.example/a.crl\"]\n\
           authority_info_access = { ca_issuers = [\"http://pki.example/ca\"], ocsp = [\"http://ocsp.example/\"] }\n";
    let sample = SampleRequest::new(P256, &text);
    let issued = issue(&sample);
    let verified =
        verify_device_certificate(issued.as_bytes(), false, sample.manufacturer.public(), &sample.chip).unwrap();
    assert_eq!(verified.not_after(), Some(NOW + 864_000));
    let leaf = certificate_pem(issued.as_bytes()).unwrap();
    let text = openssl(&["x509", "-in", "device.pem", "-noout", "-text"], &[("device.pem", &leaf)]);
    for expected in [
        "Subject Key Identifier",
        "TLS Web Client Authentication",
        "URI:http://pki.example/a.crl",
        "CA Issuers - URI:http://pki.example/ca",
        "OCSP - URI:http://ocsp.example/",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn cwt_of_every_algorithm_verified_by_device() {
    for algorithm in ALGORITHMS {
        let sample = SampleRequest::new(algorithm, &symmetric_profile());
        let issued = issue(&sample);
        assert!(issued.is_cwt());
        assert_eq!(issued.as_bytes()[0], 0xd2, "tag 18");
        let key = sample.manufacturer.public();
        let verified = verify_device_certificate(issued.as_bytes(), true, key, &sample.chip).unwrap();
        assert_eq!(verified.identity(), Some(&sample.identity));
        assert_eq!(verified.public_key(), None);
        assert_eq!((verified.not_before(), verified.not_after()), (NOW, None));
        assert_eq!(verified.serial(), sample.request().serial.as_bytes());
        assert_eq!(verified.hardware_type(), sample.profile.hardware_type());
        assert!(verify_device_certificate(issued.as_bytes(), false, key, &sample.chip).is_err());
    }
}

#[test]
fn rsa_certificate_has_key_encipherment() {
    let text = PHONE.replace("\"p256\"", "\"rsa-2048\"") + "[certificate]\nkey_encipherment = true\n";
    let mut sample = SampleRequest::new(P256, &text);
    sample.device = Some(SoftwareKey::new(SignatureAlgorithm::RsaPkcs1Sha256));
    let leaf = certificate_pem(issue(&sample).as_bytes()).unwrap();
    let text = openssl(&["x509", "-in", "device.pem", "-noout", "-text"], &[("device.pem", &leaf)]);
    assert!(text.contains("Digital Signature, Key Encipherment"), "{text}");
}

#[test]
fn cwt_expires_after_validity_days() {
    let sample = SampleRequest::new(P256, &(symmetric_profile() + "[certificate]\nvalidity_days = 1\n"));
    let issued = issue(&sample);
    let verified =
        verify_device_certificate(issued.as_bytes(), true, sample.manufacturer.public(), &sample.chip).unwrap();
    assert_eq!(verified.not_after(), Some(NOW + 86_400));
}

#[test]
fn equal_requests_give_equal_bytes() {
    for text in [PHONE.to_owned(), symmetric_profile()] {
        let sample = SampleRequest::new(P256, &text);
        let once = || prepare(&sample.request()).unwrap().lint().unwrap().into_to_sign();
        assert_eq!(once(), once());
    }
}

#[test]
fn certificate_with_two_algorithms_rejected() {
    let sample = SampleRequest::new(SignatureAlgorithm::RsaPkcs1Sha256, PHONE);
    let to_sign = prepare(&sample.request()).unwrap().lint().unwrap().into_to_sign();
    let to_sign = super::CertificateToSign::new(
        to_sign.issuer().clone(),
        SignatureAlgorithm::RsaPssSha256,
        false,
        to_sign.serial().to_vec(),
        to_sign.to_be_signed().to_vec(),
    );
    let pss = sample.manufacturer.sign_with(to_sign.algorithm(), to_sign.to_be_signed());
    let rejected = IssuedCertificate::assemble(&to_sign, &sample.issuer, &pss);
    assert!(matches!(rejected, Err(CertificateError::Refused(_))));
}

#[test]
fn assemble_with_wrong_signature_fails() {
    for text in [PHONE.to_owned(), symmetric_profile()] {
        let sample = SampleRequest::new(P256, &text);
        let to_sign = prepare(&sample.request()).unwrap().lint().unwrap().into_to_sign();
        let foreign = SoftwareKey::p256().sign(to_sign.to_be_signed());
        assert!(matches!(
            IssuedCertificate::assemble(&to_sign, &sample.issuer, &foreign),
            Err(CertificateError::Key { .. })
        ));
        assert!(IssuedCertificate::assemble(&to_sign, &sample.issuer, b"").is_err());
    }
}

#[test]
fn certificate_of_other_chip_or_manufacturer_rejected() {
    for text in [PHONE.to_owned(), symmetric_profile()] {
        let sample = SampleRequest::new(P256, &text);
        let issued = issue(&sample);
        let verify = |key: &SoftwareKey, chip: &ChipId| {
            verify_device_certificate(issued.as_bytes(), issued.is_cwt(), key.public(), chip)
        };
        assert!(verify(&sample.manufacturer, &sample.chip).is_ok());
        assert!(verify(&SoftwareKey::p256(), &sample.chip).is_err());
        let other = ChipId::from_bytes(&[0xc6; 16]).unwrap();
        assert!(matches!(verify(&sample.manufacturer, &other), Err(CertificateError::Refused(_))));
    }
}

#[test]
fn request_not_matching_profile_rejected() {
    let mut sample = SampleRequest::new(P256, PHONE);
    sample.device = Some(SoftwareKey::new(SignatureAlgorithm::Ed25519));
    assert!(matches!(prepare(&sample.request()), Err(CertificateError::Request(_))), "wrong key type");
    sample.device = None;
    assert!(matches!(prepare(&sample.request()), Err(CertificateError::Request(_))), "no key");
    let mut sample = SampleRequest::new(P256, &symmetric_profile());
    sample.device = Some(SoftwareKey::p256());
    assert!(matches!(prepare(&sample.request()), Err(CertificateError::Request(_))), "unexpected key");
    let serial_only = PHONE.replace("\"imei\", \"meid\", \"eui48\", \"eui64\", ", "");
    assert!(matches!(prepare(&SampleRequest::new(P256, &serial_only).request()), Err(CertificateError::Request(_))));
    let rsa = format!("signature = \"rsa-pss-sha256\"\n{PHONE}");
    assert!(matches!(
        prepare(&SampleRequest::new(P256, &rsa).request()),
        Err(CertificateError::AlgorithmMismatch { .. })
    ));
}

#[test]
fn profile_selects_pss_for_rsa_issuer() {
    let mut sample = SampleRequest::new(SignatureAlgorithm::RsaPkcs1Sha256, PHONE);
    sample.profile = profile(&format!("signature = \"rsa-pss-sha256\"\n{PHONE}"));
    let linted = prepare(&sample.request()).unwrap().lint().unwrap();
    assert_eq!(linted.algorithm(), SignatureAlgorithm::RsaPssSha256);
}

#[test]
fn issuer_must_be_a_ca() {
    let sample = SampleRequest::new(P256, PHONE);
    let leaf = certificate_pem(issue(&sample).as_bytes()).unwrap();
    assert!(matches!(IssuerCertificate::from_pem(&leaf, P256), Err(CertificateError::Issuer(_))));
    let ca = authority_of(&sample.manufacturer);
    assert!(matches!(
        IssuerCertificate::from_pem(&ca, SignatureAlgorithm::Ed25519),
        Err(CertificateError::AlgorithmMismatch { .. })
    ));
    assert!(matches!(IssuerCertificate::from_pem("", P256), Err(CertificateError::Pem(_))));
    // Same name, other key: the chain does not verify.
    let other_ca = authority_of(&SoftwareKey::p256());
    assert!(matches!(IssuerCertificate::from_pem(&(ca + &other_ca), P256), Err(CertificateError::Issuer(_))));
}

#[test]
fn damaged_certificate_rejected_without_panic() {
    for text in [PHONE.to_owned(), symmetric_profile()] {
        let sample = SampleRequest::new(SignatureAlgorithm::Ed25519, &text);
        let issued = issue(&sample);
        let verify = |bytes: &[u8]| {
            verify_device_certificate(bytes, issued.is_cwt(), sample.manufacturer.public(), &sample.chip)
        };
        for length in 0..issued.as_bytes().len() {
            assert!(verify(&issued.as_bytes()[..length]).is_err());
        }
        for bit in 0..issued.as_bytes().len() * 8 {
            let mut flipped = issued.as_bytes().to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(verify(&flipped).is_err(), "bit {bit}");
        }
        assert!(verify(&[issued.as_bytes(), &[0]].concat()).is_err(), "trailing bytes");
    }
}

fn any_identity() -> impl Strategy<Value = DeviceIdentity> {
    prop_oneof![
        "[0-9]{14}".prop_map(|first| {
            let check = crate::names::Imei::check_digit(&first).unwrap();
            format!("imei:{first}{check}")
        }),
        "meid:[a-f][0-9a-f]{13}",
        "eui48:[0-9a-f]{12}",
        "eui64:[0-9a-f]{16}",
        "serial:[A-Za-z0-9 '()+,./:=?-]{1,64}",
    ]
    .prop_map(|text| text.parse().unwrap())
}

proptest! {
    #![proptest_config(spp_test_support::random::cases(64, 3200))]

    #[test]
    fn certificate_accepted_only_for_its_chip_and_identity(
        identity in any_identity(),
        other in any_identity(),
        chip in proptest::collection::vec(any::<u8>(), 8..=64),
        other_chip in proptest::collection::vec(any::<u8>(), 8..=64),
        random in any::<[u8; 20]>(),
        not_before in 0u64..4_000_000_000,
        cwt in any::<bool>(),
    ) {
        let text = if cwt { symmetric_profile() } else { PHONE.to_owned() };
        let mut sample = SampleRequest::new(P256, &text);
        (sample.identity, sample.chip) = (identity, ChipId::from_bytes(&chip).unwrap());
        let mut request = sample.request();
        (request.serial, request.not_before) = (super::CertificateSerial::from_random(random), not_before);
        let to_sign = prepare(&request).unwrap().lint().unwrap().into_to_sign();
        let signature = sample.manufacturer.sign(to_sign.to_be_signed());
        let issued = IssuedCertificate::assemble(&to_sign, &sample.issuer, &signature).unwrap();
        let verify = |chip: &ChipId| {
            verify_device_certificate(issued.as_bytes(), cwt, sample.manufacturer.public(), chip)
        };
        let verified = verify(&sample.chip).unwrap();
        prop_assert!(verified.binds_identity(&sample.identity));
        prop_assert_eq!(verified.identity_value(), sample.identity.value());
        prop_assert_eq!(verified.serial(), to_sign.serial());
        if other.value() != sample.identity.value() {
            prop_assert!(!verified.binds_identity(&other));
        }
        let other_chip = ChipId::from_bytes(&other_chip).unwrap();
        prop_assert_eq!(verify(&other_chip).is_ok(), other_chip == sample.chip);
    }

    #[test]
    fn arbitrary_bytes_rejected_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), cwt in any::<bool>()) {
        let sample = &*SHARED;
        prop_assert!(verify_device_certificate(&bytes, cwt, sample.manufacturer.public(), &sample.chip).is_err());
        prop_assert!(super::parse_caller_certificate(&bytes).is_err());
        prop_assert!(super::verify_csr(&bytes).is_err());
    }
}

static SHARED: std::sync::LazyLock<SampleRequest> = std::sync::LazyLock::new(|| SampleRequest::new(P256, PHONE));
