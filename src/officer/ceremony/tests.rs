//! Rotation, destruction, issuing and approvals of ceremonies, on SoftHSM.

use std::path::Path;

use spp_format::certificate::IssuerCertificate;
use spp_testkit::ceremony::CeremonyFile;

use super::{CeremonyOutcome, CeremonyPlan};
use crate::hsm::tests::{TestToken, in_module};
use crate::hsm::{Ceremony, KeyManifest};
use crate::officer::permit::Permit;
use crate::officer::{OfficerError, verify_transcript};

pub(super) const FIRST: &str = r#"
[[signing_key]]
name = "devices"
kind = "p256"
certificate = "self-signed"
subject = { common_name = "Devices" }
[[log_key]]
name = "log"
origin = "spp.example/test"
[[master_key]]
name = "master"
version = 3
prf = "aes-cmac"
"#;

const ROTATION: &str = r#"
[[rotate_signing_key]]
key = "devices"
name = "devices-2"
kind = "p384"
certificate = "self-signed"
subject = { common_name = "Devices 2" }
[[rotate_master_key]]
key = "master"
name = "master-2"
"#;

pub(super) struct CeremonySite<'a> {
    test_token: &'a TestToken,
    pub(super) token: Ceremony,
}

impl<'a> CeremonySite<'a> {
    fn new(test_token: &'a TestToken) -> Self {
        Self::with_first_ceremony(test_token, FIRST)
    }

    pub(super) fn with_first_ceremony(test_token: &'a TestToken, first: &str) -> Self {
        let site = Self { test_token, token: test_token.open() };
        site.run(first, false).unwrap();
        site
    }

    pub(super) fn out(&self) -> &Path {
        &self.test_token.directory
    }

    pub(super) fn plan(&self, text: &str) -> CeremonyPlan {
        let file = self.out().join("ceremony.toml");
        std::fs::write(&file, text).unwrap();
        CeremonyPlan::load(&file).unwrap()
    }

    pub(super) fn run(&self, text: &str, approved: bool) -> Result<CeremonyOutcome, OfficerError> {
        self.run_into("keys", text, approved)
    }

    pub(super) fn run_into(&self, out: &str, text: &str, approved: bool) -> Result<CeremonyOutcome, OfficerError> {
        let plan = self.plan(text);
        let permit = || Permit::approved_by_o2(*plan.file_sha256());
        plan.run(&self.token, &self.out().join(out), &["o-1".parse().unwrap()], approved.then(permit))
    }

    pub(super) fn manifest(&self) -> KeyManifest {
        KeyManifest::load(&self.out().join("keys/keys.toml")).unwrap()
    }

    pub(super) fn fingerprint_text(&self, key: &str) -> String {
        self.manifest().fingerprint_text(&key.parse().unwrap()).unwrap()
    }

    pub(super) fn assert_refused(&self, text: &str, why: &str) {
        let error = self.run(text, true).err().unwrap().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn permit_for_another_file_is_refused() {
    in_module(|test_token| {
        let site = CeremonySite::new(test_token);
        assert!(matches!(site.run(ROTATION, false), Err(OfficerError::NeedsApproval { .. })));
        let plan = site.plan(ROTATION);
        let other_permit = Permit::approved_by_o2([7; 32]);
        let run = plan.run(&site.token, &site.out().join("keys"), &[], Some(other_permit));
        assert!(matches!(run, Err(OfficerError::ApprovalMismatch { .. })));
        assert_eq!(site.manifest().master.len(), 1);
    });
}

#[test]
fn rotated_key_replaces_old_key_and_keeps_it() {
    in_module(|test_token| {
        let site = CeremonySite::new(test_token);
        let outcome = site.run(ROTATION, true).unwrap();
        let approval = outcome.transcript.approval.unwrap();
        assert_eq!((approval.request.as_str(), approval.approved_by[0].as_str()), ("r-7", "o-2"));
        let text = std::fs::read_to_string(site.out().join("keys/transcript-2.txt")).unwrap();
        assert!(
            outcome.signed
                && text.contains("approved    request r-7 of o-1, by o-2")
                && text.contains("replaces master")
        );
        let manifest = site.manifest();
        let [old, new] = manifest.master.as_slice() else { panic!("{manifest:?}") };
        assert_eq!((old.version, new.version, old.prf == new.prf), (3, 4, true));
        assert_eq!(new.replaces.as_ref(), Some(&old.name));
        assert_ne!(old.check_value, new.check_value);
        let [old, new] = manifest.signing.as_slice() else { panic!("{manifest:?}") };
        assert_eq!((new.use_, new.replaces.as_ref()), (old.use_, Some(&old.name)));
        assert_eq!(manifest.current(old.use_).unwrap().name, new.name);
        site.run("[[check_value]]\nkey = \"master\"\n[[check_value]]\nkey = \"devices\"\n", false).unwrap();

        site.assert_refused(
            &ROTATION.replace("-2", "-3"),
            "devices was already replaced by devices-2; rotate that key instead",
        );
        let again = "[[rotate_master_key]]\nkey = \"master-2\"\nname = \"master-3\"\n";
        // The version of a destroyed key is not reused.
        site.run(again, true).unwrap();
        let value = site.fingerprint_text("master-3");
        site.run(&format!("[[destroy]]\nkey = \"master-3\"\ncheck_value = \"{value}\"\n"), true).unwrap();
        site.run(&again.replace("-3", "-4"), true).unwrap();
        assert_eq!(site.manifest().master_key(&"master-4".parse().unwrap()).unwrap().version, 6);
    });
}

#[test]
fn destroy_removes_named_key_and_reserves_its_name() {
    in_module(|test_token| {
        let site = CeremonySite::new(test_token);
        let (signing, id) = (site.fingerprint_text("devices"), site.manifest().signing[0].id.clone());
        let destroy =
            |fingerprint_text: &str| format!("[[destroy]]\nkey = \"devices\"\nfingerprint = \"{fingerprint_text}\"\n");
        site.assert_refused(&destroy(&site.fingerprint_text("log")), "nothing was destroyed");
        site.assert_refused("[[destroy]]\nkey = \"none\"\ncheck_value = \"00\"\n", "keys.toml has no key none");
        let name = "devices".parse().unwrap();
        assert!(site.token.has(&name, &id).unwrap());
        site.run(&destroy(&signing), true).unwrap();
        assert!(!site.token.has(&name, &id).unwrap() && site.token.is_free(&name).unwrap());
        let manifest = site.manifest();
        assert!(manifest.signing.is_empty());
        assert_eq!((&manifest.destroyed[0].name, &manifest.destroyed[0].fingerprint), (&name, &signing));
        site.assert_refused(
            &destroy(&manifest.fingerprint_text(&"log".parse().unwrap()).unwrap()),
            "nothing was destroyed",
        );
        // An interrupted ceremony already destroyed the first of two keys.
        let value = site.fingerprint_text("master");
        let both = format!("{}[[destroy]]\nkey = \"master\"\ncheck_value = \"{value}\"\n", destroy(&signing));
        let acts: Vec<_> = site.run(&both, true).unwrap().transcript.keys.iter().map(|key| key.act).collect();
        assert_eq!(acts, ["was destroyed before", "destroyed"]);
        let text = FIRST.split("[[log_key]]").next().unwrap();
        std::fs::remove_file(site.out().join("keys/devices-ca.pem")).unwrap();
        site.assert_refused(text, "name devices was already used; names are never reused");
    });
}

#[test]
fn interrupted_destroy_is_completed_by_second_run() {
    in_module(|test_token| {
        let site = CeremonySite::new(test_token);
        let value = site.fingerprint_text("master");
        let before = std::fs::read(site.out().join("keys/keys.toml")).unwrap();
        let mut manifest = site.manifest();
        let key = manifest.master.remove(0);
        super::destroy::mark_destroyed(&mut manifest, &key.name, &key.id, &value);
        std::fs::write(site.out().join("keys/keys.toml"), manifest.to_toml().unwrap()).unwrap();
        assert_ne!(before, std::fs::read(site.out().join("keys/keys.toml")).unwrap());
        site.run(&format!("[[destroy]]\nkey = \"master\"\ncheck_value = \"{value}\"\n"), true).unwrap();
        assert!(!site.token.has(&key.name, &key.id).unwrap());
        assert_eq!(site.manifest().destroyed.len(), 1);
    });
}

#[test]
fn destroy_of_missing_key_is_refused() {
    in_module(|test_token| {
        let site = CeremonySite::new(test_token);
        let (value, key) = (site.fingerprint_text("master"), site.manifest().master[0].clone());
        site.token.destroy(&key.name, &key.id).unwrap();
        let destroy = format!("[[destroy]]\nkey = \"master\"\ncheck_value = \"{value}\"\n");
        site.assert_refused(&destroy, "is not on the token");
        assert_eq!(site.manifest().master.len(), 1);
    });
}

#[test]
fn only_log_key_is_not_destroyed_and_previous_key_signs() {
    in_module(|test_token| {
        let site = CeremonySite::new(test_token);
        let log = |name: &str| CeremonyFile::new().log_key(name, "spp.example/test").text().to_owned();
        let destroy =
            |name: &str| format!("[[destroy]]\nkey = \"{name}\"\nfingerprint = \"{}\"\n", site.fingerprint_text(name));
        site.assert_refused(&destroy("log"), "it is the only log key");
        site.assert_refused(&[log("log-2"), destroy("log")].concat(), "it is the only log key");
        let (first, transcript) =
            (site.manifest().log[0].key.clone(), |n: u8| site.out().join(format!("keys/transcript-{n}.txt")));
        site.run(&log("log-2"), false).unwrap();
        verify_transcript(&transcript(2), &first).unwrap();
        site.assert_refused(&[destroy("log"), destroy("log-2")].concat(), "it is the only log key");
        assert!(site.run(&destroy("log"), true).unwrap().signed);
        verify_transcript(&transcript(3), &site.manifest().log[0].key).unwrap();
    });
}

#[test]
fn issuer_must_be_root_with_certificate() {
    in_module(|test_token| {
        let site = CeremonySite::new(test_token);
        let issued = |issuer: &str| CeremonyFile::new().issued_key("below", "p256", issuer, "Below").text().to_owned();
        let root = CeremonyFile::new().root_key("root", "rsa-2048", "Root").with_text("signature", "rsa-pss-sha256");
        let root = root.text();
        let faults = |text: &str| {
            let file = site.out().join("faults.toml");
            std::fs::write(&file, text).unwrap();
            CeremonyPlan::load(&file).err().unwrap().to_string()
        };
        let csr = faults(&[root.replace("self-signed", "csr"), issued("root")].concat());
        assert!(csr.contains("root has no certificate until its offline root has issued it"), "{csr}");
        let chosen = faults(&format!("{}signature = \"ecdsa-p256-sha256\"\n{root}", issued("root")));
        assert!(chosen.contains("below: signature: has no effect"), "{chosen}");
        site.assert_refused(&issued("devices"), "keys.toml has no signing key devices with use = \"root\"");
        let master = CeremonyFile::new().master_key("other", 1, "aes-cmac");
        site.assert_refused(
            &[issued("other").as_str(), master.text()].concat(),
            "keys.toml has no signing key other with use = \"root\"",
        );
        site.run(root, false).unwrap();
        site.run(&issued("root"), false).unwrap();
        let pem = std::fs::read_to_string(site.out().join("keys/below-ca.pem")).unwrap();
        let issuer = IssuerCertificate::from_pem_with_default_algorithm(&pem).unwrap();
        // id-RSASSA-PSS, RFC 4055 §3.1. The subject key is not RSA, so the OID can only be the signature algorithm.
        let pss = hex::decode("06092a864886f70d01010a").unwrap();
        assert!(issuer.as_der().windows(pss.len()).any(|bytes| bytes == pss));
    });
}
