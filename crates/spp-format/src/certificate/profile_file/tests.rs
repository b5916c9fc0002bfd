use super::*;
use crate::certificate::testing::{PHONE, profile};

fn faults(text: &str) -> Vec<String> {
    let Err(faults) = Profile::from_toml("p".parse().unwrap(), "p.toml", text) else { return Vec::new() };
    faults.iter().map(|fault| fault.place.clone()).collect()
}

#[test]
fn minimal_profile_has_safe_defaults() {
    let phone = profile(PHONE);
    assert_eq!(*phone.key_pair(), KeyPairRule::Generate { kind: KeyType::P256 });
    assert_eq!(*phone.certificate(), CertificateTemplate::default());
    assert_eq!(phone.backup(), BackupRules { format: BackupFormat::Cose, max_bytes: 32_768 });
    assert_eq!(phone.sealing(), Sealing::Optional);
    assert!(phone.confirmation_required() && !phone.is_cwt());
}

#[test]
fn documented_example_is_valid() {
    let source = include_str!("../profile_file.rs");
    let example = source.split("```toml").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let text: Vec<_> = example.lines().map(|line| line.trim().trim_start_matches("///")).collect();
    assert_eq!(faults(&text.join("\n")), Vec::<String>::new());
}

#[test]
fn all_faults_reported_with_place() {
    let text = r#"
        identities = ["imei", "imsi", "imei"]
        hardware_type = "phone"
        issuer = "Upper Case"
        signature = "md5"
        [subject]
        country = "finland"
        [certificate]
        validity_days = 0
        extended_key_usages = ["x"]
        crl_distribution_points = ["ftp://x"]
        authority_info_access = { ocsp = ["http://"] }
        [key_pair]
        source = "generate"
        kind = "rsa-1024"
        accepted = ["p256"]
        [[symmetric_key]]
        purpose = "Channel"
        length = 20
        master_key = "m"
        [[symmetric_key]]
        purpose = "Channel"
        master_key = "n"
        [delivery]
        sealed = "maybe"
        [backup]
        format = "zip"
        max_bytes = 40000
    "#;
    let expected = [
        "identities",
        "identities",
        "hardware_type",
        "issuer",
        "signature",
        "subject.country",
        "key_pair.accepted",
        "key_pair.kind",
        "symmetric_key[0].purpose",
        "symmetric_key[0].length",
        "symmetric_key[1].purpose",
        "symmetric_key[1].purpose",
        "symmetric_key[1].master_key",
        "certificate.validity_days",
        "certificate.extended_key_usages",
        "certificate.crl_distribution_points",
        "certificate.authority_info_access.ocsp",
        "delivery.sealed",
        "backup.format",
        "backup.max_bytes",
    ];
    assert_eq!(faults(text), expected.map(|key| format!("p.toml: {key}")));
}

#[test]
fn unknown_keys_rejected() {
    assert_eq!(faults(&format!("{PHONE}\nkindd = 1")), ["p.toml"]);
}

#[test]
fn profile_without_any_key_rejected() {
    let none = PHONE.replace("\"generate\"\nkey_pair.kind = \"p256\"", "\"none\"");
    assert_eq!(faults(&none), ["p.toml: key_pair.source"]);
    let symmetric = format!("{none}\n[[symmetric_key]]\npurpose = \"channel\"\nmaster_key = \"m\"");
    assert!(profile(&symmetric).is_cwt());
    assert_eq!(faults(&format!("{symmetric}\n[certificate]\nsubject_key_identifier = true")), ["p.toml: certificate"]);
}

#[test]
fn csr_profile_is_valid_and_key_encipherment_requires_rsa() {
    let csr = PHONE.replace("\"generate\"\nkey_pair.kind = \"p256\"", "\"csr\"");
    assert!(profile(&csr).key_pair().accepts(KeyType::Ed25519));
    let encipher = format!("{csr}\n[certificate]\nkey_encipherment = true");
    assert_eq!(faults(&encipher), ["p.toml: certificate.key_encipherment"]);
    let rsa = encipher.replace("\"csr\"", "\"csr\"\nkey_pair.accepted = [\"rsa-2048\"]");
    assert!(faults(&rsa).is_empty());
}

#[test]
fn key_purposes_not_for_devices_rejected() {
    let with = |oid: &str| faults(&format!("{PHONE}\n[certificate]\nextended_key_usages = [\"{oid}\"]"));
    assert!(with("1.3.6.1.5.5.7.3.2").is_empty(), "id-kp-clientAuth");
    for forbidden in ["1.3.6.1.5.5.7.3.9", "2.5.29.37.0"] {
        assert_eq!(with(forbidden), ["p.toml: certificate.extended_key_usages"], "{forbidden}");
    }
}
