//! Lint tests: each test violates one rule and expects its finding.

use ciborium::Value;
use coset::CborSerializable;
use der::asn1::{Any, AnyRef, ObjectIdentifier, OctetString, Utf8StringRef};
use der::{Decode, Encode, Reader, SliceReader};
use x509_cert::attr::AttributeTypeAndValue;
use x509_cert::certificate::Version;
use x509_cert::ext::Extension;
use x509_cert::ext::pkix::name::{GeneralName, HardwareModuleName, OtherName};
use x509_cert::ext::pkix::{
    BasicConstraints, ExtendedKeyUsage, KeyUsage, KeyUsages, SubjectAltName, SubjectKeyIdentifier,
};
use x509_cert::name::{Name, RdnSequence, RelativeDistinguishedName};
use x509_cert::serial_number::SerialNumber;
use x509_cert::time::{Time, Validity};

use super::cwt::{CHIP_ID_CLAIM, SigStructure};
use super::name::{SERIAL_NUMBER, SubjectFields, SubjectName};
use super::prepare::PreparedCertificate;
use super::tbs::{self, TbsCertificate};
use super::testing::{PHONE, SampleRequest, SoftwareKey, serial, symmetric_profile};
use super::{algorithm, prepare};
use crate::keys::SignatureAlgorithm;

/// The rules that these bytes violate.
fn rules(sample: &SampleRequest, to_be_signed: Vec<u8>) -> Vec<&'static str> {
    match (PreparedCertificate { request: sample.request(), to_be_signed }).lint() {
        Ok(_) => Vec::new(),
        Err(findings) => findings.iter().map(|finding| finding.rule).collect(),
    }
}

/// Modifies a valid certificate and expects exactly these findings.
#[track_caller]
fn expect_findings(expected: &[&str], change: impl FnOnce(&mut TbsCertificate)) {
    expect_findings_in(PHONE, expected, change);
}

#[track_caller]
fn expect_findings_in(profile: &str, expected: &[&str], change: impl FnOnce(&mut TbsCertificate)) {
    let sample = SampleRequest::new(SignatureAlgorithm::EcdsaP256Sha256, profile);
    let valid = prepare(&sample.request()).unwrap().to_be_signed;
    assert_eq!(rules(&sample, valid.clone()), Vec::<&str>::new(), "before the change");
    let mut tbs = TbsCertificate::from_der(&valid).unwrap();
    change(&mut tbs);
    assert_eq!(rules(&sample, tbs.to_der().unwrap()), expected);
}

/// Like [`expect_findings`], for modifications that the structure cannot express: replaces elements of the TBSCertificate.
#[track_caller]
fn expect_findings_in_der(expected: &[&str], change: impl FnOnce(&mut Vec<Any>)) {
    let sample = SampleRequest::new(SignatureAlgorithm::EcdsaP256Sha256, PHONE);
    let valid = prepare(&sample.request()).unwrap().to_be_signed;
    let mut reader = SliceReader::new(&valid).unwrap();
    let mut parts = reader
        .sequence(|inner| {
            let mut parts: Vec<Any> = Vec::new();
            while !inner.is_finished() {
                parts.push(inner.decode()?);
            }
            Ok::<_, der::Error>(parts)
        })
        .unwrap();
    change(&mut parts);
    assert_eq!(rules(&sample, parts.to_der().unwrap()), expected);
}

fn extensions(tbs: &mut TbsCertificate) -> &mut Vec<Extension> {
    tbs.extensions.as_mut().unwrap()
}

/// Positions of the extensions as `prepare` encodes them.
const AUTHORITY_KEY_IDENTIFIER: usize = 0;
const KEY_USAGE: usize = 1;
const ALTERNATIVE_NAMES: usize = 2;

fn alternative_names(tbs: &mut TbsCertificate, change: impl FnOnce(&mut Vec<GeneralName>)) {
    let extension = &mut extensions(tbs)[ALTERNATIVE_NAMES];
    let mut names = SubjectAltName::from_der(extension.extn_value.as_bytes()).unwrap().0;
    change(&mut names);
    *extension = tbs::extension(false, &SubjectAltName(names)).unwrap();
}

fn module(hardware: &str, chip: &[u8]) -> GeneralName {
    let name = HardwareModuleName {
        hw_type: ObjectIdentifier::new(hardware).unwrap(),
        hw_serial_num: OctetString::new(chip).unwrap(),
    };
    GeneralName::OtherName(OtherName::try_from(&name).unwrap())
}

const HARDWARE: &str = "1.3.6.1.4.1.32473.1.7";

#[test]
fn version_other_than_3_found() {
    expect_findings(&["version"], |tbs| tbs.version = Version::V1);
    expect_findings(&["version"], |tbs| tbs.version = Version::V2);
}

#[test]
fn invalid_serial_number_found() {
    expect_findings(&["serial-number", "serial-number"], |tbs| tbs.serial = SerialNumber::new(&[1; 15]).unwrap());
    expect_findings(&["serial-number"], |tbs| tbs.serial = SerialNumber::new(serial(1).as_bytes()).unwrap());
    let of = |bytes: &[u8]| Any::new(der::Tag::Integer, bytes).unwrap();
    expect_findings_in_der(&["serial-number", "serial-number"], |parts| parts[1] = of(&[0x80; 20]));
    expect_findings_in_der(&["serial-number", "serial-number"], |parts| parts[1] = of(&[0x7f; 21]));
}

#[test]
fn wrong_algorithm_found() {
    for other in [SignatureAlgorithm::EcdsaP384Sha384, SignatureAlgorithm::RsaPssSha256, SignatureAlgorithm::Ed25519] {
        expect_findings(&["algorithm"], |tbs| tbs.algorithm = algorithm::identifier(other).unwrap());
    }
}

#[test]
fn wrong_issuer_found() {
    expect_findings(&["issuer"], |tbs| tbs.issuer = tbs.subject.clone());
}

fn name(fields: SubjectFields, serial_number: Option<&str>) -> Name {
    SubjectName::from_fields("subject", fields).unwrap().to_name(serial_number).unwrap()
}

#[test]
fn wrong_subject_found() {
    let imei = "490154203237518";
    expect_findings(&["subject"], |tbs| tbs.subject = Name::default());
    expect_findings(&["subject"], |tbs| tbs.subject = name(SubjectFields::default(), Some("490154203237519")));
    let fields = SubjectFields { organization: Some("Else".into()), ..SubjectFields::default() };
    expect_findings(&["subject"], |tbs| tbs.subject = name(fields.clone(), Some(imei)));
    expect_findings_in(&format!("{PHONE}[subject]\norganization = \"Here\"\n"), &["subject"], |tbs| {
        tbs.subject = name(fields.clone(), Some(imei));
    });
    expect_findings(&["subject"], |tbs| {
        let mut rdns = RdnSequence::from(name(SubjectFields::default(), Some(imei)));
        let once = rdns.iter().next().unwrap().clone();
        rdns.push(once);
        tbs.subject = Name::hazmat_from_rdn_sequence(rdns);
    });
    expect_findings(&["subject", "subject"], |tbs| {
        let value = Any::encode_from(&Utf8StringRef::new(imei).unwrap()).unwrap();
        let rdn =
            RelativeDistinguishedName::try_from(vec![AttributeTypeAndValue { oid: SERIAL_NUMBER, value }]).unwrap();
        tbs.subject = Name::hazmat_from_rdn_sequence(RdnSequence::from(vec![rdn]));
    });
}

#[test]
fn wrong_validity_found() {
    let time = |text: &str| text.parse::<Time>().unwrap();
    let (start, end) = (time("2026-01-01T00:00:00Z"), Time::INFINITY);
    expect_findings(&["validity"], |tbs| tbs.validity = Validity::new(start, time("2030-01-01T00:00:00Z")));
    expect_findings(&["validity"], |tbs| tbs.validity = Validity::new(time("2026-01-01T00:00:01Z"), end));
    expect_findings(&["validity", "validity"], |tbs| tbs.validity = Validity::new(end, end));
    expect_findings_in_der(&["validity"], |parts| {
        let general = Any::new(der::Tag::GeneralizedTime, &b"20260101000000Z"[..]).unwrap();
        let both =
            vec![general, Any::encode_from(&der::asn1::GeneralizedTime::from_date_time(end.to_date_time())).unwrap()];
        parts[4] = Any::encode_from(&both).unwrap();
    });
}

#[test]
fn wrong_public_key_found() {
    expect_findings(&["public-key"], |tbs| {
        tbs.public_key = spki::SubjectPublicKeyInfoOwned::from_der(SoftwareKey::p256().public().spki_der()).unwrap();
    });
}

#[test]
fn unique_identifiers_found() {
    expect_findings_in_der(&["unique-id"], |parts| {
        let implicit = AnyRef::from_der(&[0x81, 2, 0, 1]).map(Any::from).unwrap();
        parts.insert(7, implicit);
    });
}

#[test]
fn missing_duplicate_and_unexpected_extensions_found() {
    expect_findings(&["missing-extension", "missing-extension", "missing-extension"], |tbs| tbs.extensions = None);
    for position in 0..3 {
        expect_findings(&["missing-extension"], |tbs| drop(extensions(tbs).remove(position)));
        expect_findings(&["duplicate-extension"], |tbs| {
            let again = extensions(tbs)[position].clone();
            extensions(tbs).push(again);
        });
    }
    expect_findings(&["unexpected-extension", "criticality"], |tbs| {
        let ca = BasicConstraints { ca: true, path_len_constraint: None };
        extensions(tbs).push(tbs::extension(true, &ca).unwrap());
    });
    expect_findings(&["unexpected-extension", "extended-key-usage"], |tbs| {
        let usage = ExtendedKeyUsage(vec![ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.2")]);
        extensions(tbs).push(tbs::extension(false, &usage).unwrap());
    });
    for oid in tbs::FORBIDDEN_KEY_PURPOSES {
        expect_findings(&["unexpected-extension", "extended-key-usage", "extended-key-usage"], |tbs| {
            extensions(tbs).push(tbs::extension(false, &ExtendedKeyUsage(vec![oid])).unwrap());
        });
    }
    for oid in ["2.5.29.31", "1.3.6.1.5.5.7.1.1"] {
        let sample = SampleRequest::new(SignatureAlgorithm::EcdsaP256Sha256, PHONE);
        let mut tbs = TbsCertificate::from_der(&prepare(&sample.request()).unwrap().to_be_signed).unwrap();
        let empty = OctetString::new([0x30, 0]).unwrap();
        let oid = ObjectIdentifier::new(oid).unwrap();
        extensions(&mut tbs).push(Extension { extn_id: oid, critical: false, extn_value: empty });
        assert_eq!(rules(&sample, tbs.to_der().unwrap()), ["unexpected-extension"]);
    }
}

#[test]
fn wrong_criticality_found() {
    for position in 0..3 {
        expect_findings(&["criticality"], |tbs| extensions(tbs)[position].critical ^= true);
    }
}

#[test]
fn wrong_key_identifiers_found() {
    expect_findings(&["authority-key-identifier"], |tbs| {
        let extension = &mut extensions(tbs)[AUTHORITY_KEY_IDENTIFIER];
        let mut bytes = extension.extn_value.as_bytes().to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        extension.extn_value = OctetString::new(bytes).unwrap();
    });
    let wrong_identifier = || tbs::extension(false, &SubjectKeyIdentifier(OctetString::new([1; 20]).unwrap())).unwrap();
    expect_findings(&["unexpected-extension", "subject-key-identifier"], |tbs| {
        extensions(tbs).push(wrong_identifier())
    });
    let profile = format!("{PHONE}[certificate]\nsubject_key_identifier = true\n");
    expect_findings_in(&profile, &["subject-key-identifier"], |tbs| extensions(tbs)[3] = wrong_identifier());
    expect_findings_in(&profile, &["missing-extension"], |tbs| drop(extensions(tbs).remove(3)));
}

#[test]
fn wrong_key_usages_found() {
    let set = |usages| tbs::extension(true, &KeyUsage(usages)).unwrap();
    expect_findings(&["key-usage"], |tbs| extensions(tbs)[KEY_USAGE] = set(KeyUsages::KeyAgreement.into()));
    expect_findings(&["key-usage"], |tbs| {
        extensions(tbs)[KEY_USAGE] = set(KeyUsages::DigitalSignature | KeyUsages::KeyCertSign)
    });
    expect_findings(&["key-usage", "key-usage", "key-usage"], |tbs| {
        extensions(tbs)[KEY_USAGE] = set(KeyUsages::DigitalSignature | KeyUsages::KeyEncipherment);
    });
}

#[test]
fn wrong_hardware_module_names_found() {
    let rule = "hardware-module-name";
    expect_findings(&[rule], |tbs| alternative_names(tbs, |names| drop(names.remove(0))));
    expect_findings(&[rule], |tbs| alternative_names(tbs, |names| names.push(module(HARDWARE, &[0xc5; 16]))));
    expect_findings(&[rule], |tbs| alternative_names(tbs, |names| names[0] = module(HARDWARE, &[0xc6; 16])));
    expect_findings(&[rule], |tbs| {
        alternative_names(tbs, |names| names[0] = module("1.3.6.1.4.1.32473.1.8", &[0xc5; 16]))
    });
}

#[test]
fn wrong_uris_found() {
    expect_findings(&["imei-urn"], |tbs| alternative_names(tbs, |names| drop(names.remove(1))));
    for wrong in ["urn:gsma:imei:49015420-323751-8", "urn:gsma:imei:49015420-323752-0"] {
        expect_findings(&["imei-urn"], |tbs| alternative_names(tbs, |names| names[1] = tbs::uri(wrong).unwrap()));
    }
    expect_findings(&["imei-urn"], |tbs| {
        alternative_names(tbs, |names| names.push(tbs::uri("spp://officer/x").unwrap()))
    });
    expect_findings(&["alternative-names"], |tbs| {
        alternative_names(tbs, |names| names.push(GeneralName::from(std::net::IpAddr::from([127, 0, 0, 1]))));
    });
}

#[test]
fn malformed_certificate_found() {
    let sample = SampleRequest::new(SignatureAlgorithm::EcdsaP256Sha256, PHONE);
    assert_eq!(rules(&sample, Vec::new()), ["structure"]);
    expect_findings(&["structure"], |tbs| {
        extensions(tbs)[ALTERNATIVE_NAMES].extn_value = OctetString::new([0xff]).unwrap();
    });
}

/// Modifies a valid CWT (its header and claims) and expects exactly these findings.
#[track_caller]
fn expect_cwt_findings(expected: &[&str], change: impl FnOnce(&mut Vec<(Value, Value)>, &mut Vec<(Value, Value)>)) {
    let sample = SampleRequest::new(SignatureAlgorithm::EcdsaP256Sha256, &symmetric_profile());
    let valid = prepare(&sample.request()).unwrap().to_be_signed;
    assert_eq!(rules(&sample, valid.clone()), Vec::<&str>::new());
    let parts = SigStructure::decode(&valid).unwrap();
    let map = |bytes: &[u8]| Value::from_slice(bytes).unwrap().into_map().unwrap();
    let (mut header, mut claims) = (map(&parts.protected), map(&parts.payload));
    change(&mut header, &mut claims);
    let bytes = |map| Value::Bytes(Value::Map(map).to_vec().unwrap());
    let structure = vec![Value::from("Signature1"), bytes(header), Value::Bytes(vec![]), bytes(claims)];
    assert_eq!(rules(&sample, Value::Array(structure).to_vec().unwrap()), expected);
}

#[test]
fn wrong_claims_and_headers_found() {
    for (position, rule) in
        ["issuer", "subject", "validity", "serial-number", "chip-id", "hardware-type"].iter().enumerate()
    {
        expect_cwt_findings(&[rule], |_, claims| claims[position].1 = Value::from("else"));
    }
    for (position, rule) in ["algorithm", "key-id"].iter().enumerate() {
        expect_cwt_findings(&[rule], |header, _| header[position].1 = Value::from(-8));
    }
}

#[test]
fn missing_additional_or_reordered_claims_found() {
    expect_cwt_findings(&["structure"], |_, claims| claims.swap(0, 1));
    expect_cwt_findings(&["structure"], |_, claims| drop(claims.pop()));
    expect_cwt_findings(&["structure"], |_, claims| {
        claims.push((Value::from(CHIP_ID_CLAIM), Value::Bytes(vec![1; 8])))
    });
    expect_cwt_findings(&["structure"], |_, claims| claims.insert(2, (Value::from(4), Value::from(1))));
    expect_cwt_findings(&["structure"], |header, _| header.push((Value::from(5), Value::Bytes(vec![]))));
}

#[test]
fn cwt_for_profile_with_key_pair_found() {
    let mut sample = SampleRequest::new(SignatureAlgorithm::EcdsaP256Sha256, &symmetric_profile());
    let valid = prepare(&sample.request()).unwrap().to_be_signed;
    sample.profile = super::testing::profile(PHONE);
    assert_eq!(rules(&sample, valid), ["public-key"]);
}
