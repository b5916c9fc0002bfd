//! Each rule broken once, and found.

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
use super::testing::{Order, PHONE, SignWith, serial, symmetric_profile};
use super::{algorithm, prepare};
use crate::keys::SignatureAlgorithm;

/// The rules that these bytes break.
fn rules(order: &Order, to_be_signed: Vec<u8>) -> Vec<&'static str> {
    match (PreparedCertificate { request: order.request(), to_be_signed }).lint() {
        Ok(_) => Vec::new(),
        Err(findings) => findings.iter().map(|finding| finding.rule).collect(),
    }
}

/// Breaks a good certificate and looks whether exactly this is found.
#[track_caller]
fn broken(expected: &[&str], change: impl FnOnce(&mut TbsCertificate)) {
    broken_in(PHONE, expected, change);
}

#[track_caller]
fn broken_in(profile: &str, expected: &[&str], change: impl FnOnce(&mut TbsCertificate)) {
    let order = Order::new(SignatureAlgorithm::EcdsaP256Sha256, profile);
    let good = prepare(&order.request()).unwrap().to_be_signed;
    assert_eq!(rules(&order, good.clone()), Vec::<&str>::new(), "before the change");
    let mut tbs = TbsCertificate::from_der(&good).unwrap();
    change(&mut tbs);
    assert_eq!(rules(&order, tbs.to_der().unwrap()), expected);
}

/// The same for what the structure cannot express: elements of the TBSCertificate are exchanged as bytes.
#[track_caller]
fn broken_bytes(expected: &[&str], change: impl FnOnce(&mut Vec<Any>)) {
    let order = Order::new(SignatureAlgorithm::EcdsaP256Sha256, PHONE);
    let good = prepare(&order.request()).unwrap().to_be_signed;
    let mut reader = SliceReader::new(&good).unwrap();
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
    assert_eq!(rules(&order, parts.to_der().unwrap()), expected);
}

fn extensions(tbs: &mut TbsCertificate) -> &mut Vec<Extension> {
    tbs.extensions.as_mut().unwrap()
}

/// Positions as `prepare` writes them.
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
fn another_version_is_found() {
    broken(&["version"], |tbs| tbs.version = Version::V1);
    broken(&["version"], |tbs| tbs.version = Version::V2);
}

#[test]
fn a_bad_serial_number_is_found() {
    broken(&["serial-number", "serial-number"], |tbs| tbs.serial = SerialNumber::new(&[1; 15]).unwrap());
    broken(&["serial-number"], |tbs| tbs.serial = SerialNumber::new(serial(1).as_bytes()).unwrap());
    let of = |bytes: &[u8]| Any::new(der::Tag::Integer, bytes).unwrap();
    broken_bytes(&["serial-number", "serial-number"], |parts| parts[1] = of(&[0x80; 20]));
    broken_bytes(&["serial-number", "serial-number"], |parts| parts[1] = of(&[0x7f; 21]));
}

#[test]
fn another_algorithm_is_found() {
    for other in [SignatureAlgorithm::EcdsaP384Sha384, SignatureAlgorithm::RsaPssSha256, SignatureAlgorithm::Ed25519] {
        broken(&["algorithm"], |tbs| tbs.algorithm = algorithm::identifier(other).unwrap());
    }
}

#[test]
fn another_issuer_is_found() {
    broken(&["issuer"], |tbs| tbs.issuer = tbs.subject.clone());
}

fn name(fields: SubjectFields, serial_number: Option<&str>) -> Name {
    SubjectName::from_fields("subject", fields).unwrap().to_name(serial_number).unwrap()
}

#[test]
fn a_wrong_subject_is_found() {
    let imei = "490154203237518";
    broken(&["subject"], |tbs| tbs.subject = Name::default());
    broken(&["subject"], |tbs| tbs.subject = name(SubjectFields::default(), Some("490154203237519")));
    let fields = SubjectFields { organization: Some("Else".into()), ..SubjectFields::default() };
    broken(&["subject"], |tbs| tbs.subject = name(fields.clone(), Some(imei)));
    broken_in(&format!("{PHONE}[subject]\norganization = \"Here\"\n"), &["subject"], |tbs| {
        tbs.subject = name(fields.clone(), Some(imei));
    });
    broken(&["subject"], |tbs| {
        let mut rdns = RdnSequence::from(name(SubjectFields::default(), Some(imei)));
        let once = rdns.iter().next().unwrap().clone();
        rdns.push(once);
        tbs.subject = Name::hazmat_from_rdn_sequence(rdns);
    });
    broken(&["subject", "subject"], |tbs| {
        let value = Any::encode_from(&Utf8StringRef::new(imei).unwrap()).unwrap();
        let rdn =
            RelativeDistinguishedName::try_from(vec![AttributeTypeAndValue { oid: SERIAL_NUMBER, value }]).unwrap();
        tbs.subject = Name::hazmat_from_rdn_sequence(RdnSequence::from(vec![rdn]));
    });
}

#[test]
fn a_wrong_validity_is_found() {
    let time = |text: &str| text.parse::<Time>().unwrap();
    let (start, end) = (time("2026-01-01T00:00:00Z"), Time::INFINITY);
    broken(&["validity"], |tbs| tbs.validity = Validity::new(start, time("2030-01-01T00:00:00Z")));
    broken(&["validity"], |tbs| tbs.validity = Validity::new(time("2026-01-01T00:00:01Z"), end));
    broken(&["validity", "validity"], |tbs| tbs.validity = Validity::new(end, end));
    broken_bytes(&["validity"], |parts| {
        let general = Any::new(der::Tag::GeneralizedTime, &b"20260101000000Z"[..]).unwrap();
        let both =
            vec![general, Any::encode_from(&der::asn1::GeneralizedTime::from_date_time(end.to_date_time())).unwrap()];
        parts[4] = Any::encode_from(&both).unwrap();
    });
}

#[test]
fn another_public_key_is_found() {
    broken(&["public-key"], |tbs| {
        tbs.public_key = spki::SubjectPublicKeyInfoOwned::from_der(SignWith::p256().public().spki_der()).unwrap();
    });
}

#[test]
fn unique_identifiers_are_found() {
    broken_bytes(&["unique-id"], |parts| {
        let implicit = AnyRef::from_der(&[0x81, 2, 0, 1]).map(Any::from).unwrap();
        parts.insert(7, implicit);
    });
}

#[test]
fn missing_double_and_unexpected_extensions_are_found() {
    broken(&["missing-extension", "missing-extension", "missing-extension"], |tbs| tbs.extensions = None);
    for position in 0..3 {
        broken(&["missing-extension"], |tbs| drop(extensions(tbs).remove(position)));
        broken(&["duplicate-extension"], |tbs| {
            let again = extensions(tbs)[position].clone();
            extensions(tbs).push(again);
        });
    }
    broken(&["unexpected-extension", "criticality"], |tbs| {
        let ca = BasicConstraints { ca: true, path_len_constraint: None };
        extensions(tbs).push(tbs::extension(true, &ca).unwrap());
    });
    broken(&["unexpected-extension", "extended-key-usage"], |tbs| {
        let usage = ExtendedKeyUsage(vec![ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.2")]);
        extensions(tbs).push(tbs::extension(false, &usage).unwrap());
    });
    for oid in ["2.5.29.31", "1.3.6.1.5.5.7.1.1"] {
        let order = Order::new(SignatureAlgorithm::EcdsaP256Sha256, PHONE);
        let mut tbs = TbsCertificate::from_der(&prepare(&order.request()).unwrap().to_be_signed).unwrap();
        let empty = OctetString::new([0x30, 0]).unwrap();
        let oid = ObjectIdentifier::new(oid).unwrap();
        extensions(&mut tbs).push(Extension { extn_id: oid, critical: false, extn_value: empty });
        assert_eq!(rules(&order, tbs.to_der().unwrap()), ["unexpected-extension"]);
    }
}

#[test]
fn wrong_criticality_is_found() {
    for position in 0..3 {
        broken(&["criticality"], |tbs| extensions(tbs)[position].critical ^= true);
    }
}

#[test]
fn wrong_key_identifiers_are_found() {
    broken(&["authority-key-identifier"], |tbs| {
        let extension = &mut extensions(tbs)[AUTHORITY_KEY_IDENTIFIER];
        let mut bytes = extension.extn_value.as_bytes().to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        extension.extn_value = OctetString::new(bytes).unwrap();
    });
    let own = || tbs::extension(false, &SubjectKeyIdentifier(OctetString::new([1; 20]).unwrap())).unwrap();
    broken(&["unexpected-extension", "subject-key-identifier"], |tbs| extensions(tbs).push(own()));
    let asked = format!("{PHONE}[certificate]\nsubject_key_identifier = true\n");
    broken_in(&asked, &["subject-key-identifier"], |tbs| extensions(tbs)[3] = own());
    broken_in(&asked, &["missing-extension"], |tbs| drop(extensions(tbs).remove(3)));
}

#[test]
fn wrong_key_usages_are_found() {
    let set = |usages| tbs::extension(true, &KeyUsage(usages)).unwrap();
    broken(&["key-usage"], |tbs| extensions(tbs)[KEY_USAGE] = set(KeyUsages::KeyAgreement.into()));
    broken(&["key-usage"], |tbs| {
        extensions(tbs)[KEY_USAGE] = set(KeyUsages::DigitalSignature | KeyUsages::KeyCertSign)
    });
    broken(&["key-usage", "key-usage", "key-usage"], |tbs| {
        extensions(tbs)[KEY_USAGE] = set(KeyUsages::DigitalSignature | KeyUsages::KeyEncipherment);
    });
}

#[test]
fn wrong_hardware_module_names_are_found() {
    let rule = "hardware-module-name";
    broken(&[rule], |tbs| alternative_names(tbs, |names| drop(names.remove(0))));
    broken(&[rule], |tbs| alternative_names(tbs, |names| names.push(module(HARDWARE, &[0xc5; 16]))));
    broken(&[rule], |tbs| alternative_names(tbs, |names| names[0] = module(HARDWARE, &[0xc6; 16])));
    broken(&[rule], |tbs| alternative_names(tbs, |names| names[0] = module("1.3.6.1.4.1.32473.1.8", &[0xc5; 16])));
}

#[test]
fn wrong_uris_are_found() {
    broken(&["imei-urn"], |tbs| alternative_names(tbs, |names| drop(names.remove(1))));
    for wrong in ["urn:gsma:imei:49015420-323751-8", "urn:gsma:imei:49015420-323752-0"] {
        broken(&["imei-urn"], |tbs| alternative_names(tbs, |names| names[1] = tbs::uri(wrong).unwrap()));
    }
    broken(&["imei-urn"], |tbs| alternative_names(tbs, |names| names.push(tbs::uri("spp://officer/x").unwrap())));
    broken(&["alternative-names"], |tbs| {
        alternative_names(tbs, |names| names.push(GeneralName::from(std::net::IpAddr::from([127, 0, 0, 1]))));
    });
}

#[test]
fn bytes_that_are_no_certificate_are_found() {
    let order = Order::new(SignatureAlgorithm::EcdsaP256Sha256, PHONE);
    assert_eq!(rules(&order, Vec::new()), ["structure"]);
    broken(&["structure"], |tbs| {
        extensions(tbs)[ALTERNATIVE_NAMES].extn_value = OctetString::new([0xff]).unwrap();
    });
}

/// Breaks a good CWT: the header, then the claims.
#[track_caller]
fn broken_cwt(expected: &[&str], change: impl FnOnce(&mut Vec<(Value, Value)>, &mut Vec<(Value, Value)>)) {
    let order = Order::new(SignatureAlgorithm::EcdsaP256Sha256, &symmetric_profile());
    let good = prepare(&order.request()).unwrap().to_be_signed;
    assert_eq!(rules(&order, good.clone()), Vec::<&str>::new());
    let parts = SigStructure::decode(&good).unwrap();
    let map = |bytes: &[u8]| Value::from_slice(bytes).unwrap().into_map().unwrap();
    let (mut header, mut claims) = (map(&parts.protected), map(&parts.payload));
    change(&mut header, &mut claims);
    let bytes = |map| Value::Bytes(Value::Map(map).to_vec().unwrap());
    let structure = vec![Value::from("Signature1"), bytes(header), Value::Bytes(vec![]), bytes(claims)];
    assert_eq!(rules(&order, Value::Array(structure).to_vec().unwrap()), expected);
}

#[test]
fn each_wrong_claim_is_found() {
    for (position, rule) in
        ["issuer", "subject", "validity", "serial-number", "chip-id", "hardware-type"].iter().enumerate()
    {
        broken_cwt(&[rule], |_, claims| claims[position].1 = Value::from("else"));
    }
    for (position, rule) in ["algorithm", "key-id"].iter().enumerate() {
        broken_cwt(&[rule], |header, _| header[position].1 = Value::from(-8));
    }
}

#[test]
fn other_claims_or_another_order_are_found() {
    broken_cwt(&["structure"], |_, claims| claims.swap(0, 1));
    broken_cwt(&["structure"], |_, claims| drop(claims.pop()));
    broken_cwt(&["structure"], |_, claims| claims.push((Value::from(CHIP_ID_CLAIM), Value::Bytes(vec![1; 8]))));
    broken_cwt(&["structure"], |_, claims| claims.insert(2, (Value::from(4), Value::from(1))));
    broken_cwt(&["structure"], |header, _| header.push((Value::from(5), Value::Bytes(vec![]))));
}

#[test]
fn a_cwt_for_a_profile_with_a_key_pair_is_found() {
    let mut order = Order::new(SignatureAlgorithm::EcdsaP256Sha256, &symmetric_profile());
    let good = prepare(&order.request()).unwrap().to_be_signed;
    order.profile = super::testing::profile(PHONE);
    assert_eq!(rules(&order, good), ["public-key"]);
}
