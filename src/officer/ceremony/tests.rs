//! What one officer alone may not do, on a real SoftHSM.

use std::path::Path;

use spp_testkit::ceremony::CeremonyFile;

use super::{CeremonyPlan, Held};
use crate::certificate::IssuerCertificate;
use crate::hsm::tests::{Place, in_module};
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

pub(super) struct Office<'a> {
    place: &'a Place,
    pub(super) token: Ceremony,
}

impl<'a> Office<'a> {
    fn new(place: &'a Place) -> Self {
        Self::begun_with(place, FIRST)
    }

    pub(super) fn begun_with(place: &'a Place, first: &str) -> Self {
        let office = Self { place, token: place.open() };
        office.hold(first, false).unwrap();
        office
    }

    pub(super) fn out(&self) -> &Path {
        &self.place.directory
    }

    pub(super) fn plan(&self, text: &str) -> CeremonyPlan {
        let file = self.out().join("ceremony.toml");
        std::fs::write(&file, text).unwrap();
        CeremonyPlan::load(&file).unwrap()
    }

    pub(super) fn hold(&self, text: &str, approved: bool) -> Result<Held, OfficerError> {
        self.hold_into("keys", text, approved)
    }

    pub(super) fn hold_into(&self, out: &str, text: &str, approved: bool) -> Result<Held, OfficerError> {
        let plan = self.plan(text);
        let permit = || Permit::of_o_2(*plan.file_sha256());
        plan.run(&self.token, &self.out().join(out), &["o-1".parse().unwrap()], approved.then(permit))
    }

    pub(super) fn register(&self) -> KeyManifest {
        KeyManifest::load(&self.out().join("keys/keys.toml")).unwrap()
    }

    pub(super) fn known_by(&self, key: &str) -> String {
        self.register().known_by(&key.parse().unwrap()).unwrap()
    }

    pub(super) fn refused(&self, text: &str, why: &str) {
        let error = self.hold(text, true).err().unwrap().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_permit_is_good_for_the_file_that_was_approved() {
    in_module(|place| {
        let office = Office::new(place);
        assert!(matches!(office.hold(ROTATION, false), Err(OfficerError::NeedsApproval { .. })));
        let plan = office.plan(ROTATION);
        let of_another = Permit::of_o_2([7; 32]);
        let run = plan.run(&office.token, &office.out().join("keys"), &[], Some(of_another));
        assert!(matches!(run, Err(OfficerError::ApprovalOfAnother { .. })));
        assert_eq!(office.register().master.len(), 1);
    });
}

#[test]
fn a_rotated_key_goes_on_with_the_work_of_the_old_one_which_stays() {
    in_module(|place| {
        let office = Office::new(place);
        let held = office.hold(ROTATION, true).unwrap();
        let approval = held.transcript.approval.unwrap();
        assert_eq!((approval.request.as_str(), approval.approved_by[0].as_str()), ("r-7", "o-2"));
        let text = std::fs::read_to_string(office.out().join("keys/transcript-2.txt")).unwrap();
        assert!(
            held.signed && text.contains("approved    request r-7 of o-1, by o-2") && text.contains("replaces master")
        );
        let register = office.register();
        let [old, new] = register.master.as_slice() else { panic!("{register:?}") };
        assert_eq!((old.version, new.version, old.prf == new.prf), (3, 4, true));
        assert_eq!(new.replaces.as_ref(), Some(&old.name));
        assert_ne!(old.check_value, new.check_value);
        let [old, new] = register.signing.as_slice() else { panic!("{register:?}") };
        assert_eq!((new.use_, new.replaces.as_ref()), (old.use_, Some(&old.name)));
        assert_eq!(register.current(old.use_).unwrap().name, new.name);
        office.hold("[[check_value]]\nkey = \"master\"\n[[check_value]]\nkey = \"devices\"\n", false).unwrap();

        office.refused(&ROTATION.replace("-2", "-3"), "was replaced by devices-2 already; rotate that one");
        let again = "[[rotate_master_key]]\nkey = \"master-2\"\nname = \"master-3\"\n";
        // A version that was destroyed is not given again.
        office.hold(again, true).unwrap();
        let value = office.known_by("master-3");
        office.hold(&format!("[[destroy]]\nkey = \"master-3\"\ncheck_value = \"{value}\"\n"), true).unwrap();
        office.hold(&again.replace("-3", "-4"), true).unwrap();
        assert_eq!(office.register().master_key(&"master-4".parse().unwrap()).unwrap().version, 6);
    });
}

#[test]
fn only_exactly_the_named_key_is_destroyed_and_its_name_is_never_given_again() {
    in_module(|place| {
        let office = Office::new(place);
        let (signing, id) = (office.known_by("devices"), office.register().signing[0].id.clone());
        let destroy = |known_by: &str| format!("[[destroy]]\nkey = \"devices\"\nfingerprint = \"{known_by}\"\n");
        office.refused(&destroy(&office.known_by("log")), "nothing was destroyed");
        office.refused("[[destroy]]\nkey = \"none\"\ncheck_value = \"00\"\n", "the register has no key none");
        let name = "devices".parse().unwrap();
        assert!(office.token.has(&name, &id).unwrap());
        office.hold(&destroy(&signing), true).unwrap();
        assert!(!office.token.has(&name, &id).unwrap() && office.token.is_free(&name).unwrap());
        let register = office.register();
        assert!(register.signing.is_empty());
        assert_eq!((&register.destroyed[0].name, &register.destroyed[0].fingerprint), (&name, &signing));
        office.refused(&destroy(&register.known_by(&"log".parse().unwrap()).unwrap()), "nothing was destroyed");
        // One of several that a ceremony which was cut short has done.
        let value = office.known_by("master");
        let both = format!("{}[[destroy]]\nkey = \"master\"\ncheck_value = \"{value}\"\n", destroy(&signing));
        let acts: Vec<_> = office.hold(&both, true).unwrap().transcript.keys.iter().map(|key| key.act).collect();
        assert_eq!(acts, ["was destroyed before", "destroyed"]);
        let text = FIRST.split("[[log_key]]").next().unwrap();
        std::fs::remove_file(office.out().join("keys/devices-ca.pem")).unwrap();
        office.refused(text, "the name devices was given already; a name is never used again");
    });
}

#[test]
fn a_destruction_that_was_cut_short_is_ended_by_the_same_ceremony() {
    in_module(|place| {
        let office = Office::new(place);
        let value = office.known_by("master");
        let before = std::fs::read(office.out().join("keys/keys.toml")).unwrap();
        let mut register = office.register();
        let key = register.master.remove(0);
        super::destroy::move_to_destroyed(&mut register, &key.name, &key.id, &value);
        std::fs::write(office.out().join("keys/keys.toml"), register.to_toml().unwrap()).unwrap();
        assert_ne!(before, std::fs::read(office.out().join("keys/keys.toml")).unwrap());
        office.hold(&format!("[[destroy]]\nkey = \"master\"\ncheck_value = \"{value}\"\n"), true).unwrap();
        assert!(!office.token.has(&key.name, &key.id).unwrap());
        assert_eq!(office.register().destroyed.len(), 1);
    });
}

#[test]
fn a_key_that_the_token_does_not_have_is_not_destroyed() {
    in_module(|place| {
        let office = Office::new(place);
        let (value, key) = (office.known_by("master"), office.register().master[0].clone());
        office.token.destroy(&key.name, &key.id).unwrap();
        let destroy = format!("[[destroy]]\nkey = \"master\"\ncheck_value = \"{value}\"\n");
        office.refused(&destroy, "is not on the token");
        assert_eq!(office.register().master.len(), 1);
    });
}

#[test]
fn the_only_log_key_is_not_destroyed_and_the_one_of_before_signs() {
    in_module(|place| {
        let office = Office::new(place);
        let log = |name: &str| CeremonyFile::new().log_key(name, "spp.example/test").text().to_owned();
        let destroy =
            |name: &str| format!("[[destroy]]\nkey = \"{name}\"\nfingerprint = \"{}\"\n", office.known_by(name));
        office.refused(&destroy("log"), "it is the only log key");
        office.refused(&[log("log-2"), destroy("log")].concat(), "it is the only log key");
        let (first, transcript) =
            (office.register().log[0].key.clone(), |n: u8| office.out().join(format!("keys/transcript-{n}.txt")));
        office.hold(&log("log-2"), false).unwrap();
        verify_transcript(&transcript(2), &first).unwrap();
        office.refused(&[destroy("log"), destroy("log-2")].concat(), "it is the only log key");
        assert!(office.hold(&destroy("log"), true).unwrap().signed);
        verify_transcript(&transcript(3), &office.register().log[0].key).unwrap();
    });
}

#[test]
fn an_issuer_is_a_root_that_has_its_certificate_and_signs_as_that_says() {
    in_module(|place| {
        let office = Office::new(place);
        let issued = |issuer: &str| CeremonyFile::new().issued_key("below", "p256", issuer, "Below").text().to_owned();
        let root = CeremonyFile::new().root_key("root", "rsa-2048", "Root").with_text("signature", "rsa-pss-sha256");
        let root = root.text();
        let faults = |text: &str| {
            let file = office.out().join("faults.toml");
            std::fs::write(&file, text).unwrap();
            CeremonyPlan::load(&file).err().unwrap().to_string()
        };
        let csr = faults(&[root.replace("self-signed", "csr"), issued("root")].concat());
        assert!(csr.contains("root has no certificate before the root above it has answered"), "{csr}");
        let chosen = faults(&format!("{}signature = \"ecdsa-p256-sha256\"\n{root}", issued("root")));
        assert!(chosen.contains("below: signature: has no effect"), "{chosen}");
        office.refused(&issued("devices"), "no signing key devices with use = \"root\"");
        let master = CeremonyFile::new().master_key("other", 1, "aes-cmac");
        office.refused(&[issued("other").as_str(), master.text()].concat(), "no signing key other with use = \"root\"");
        office.hold(root, false).unwrap();
        office.hold(&issued("root"), false).unwrap();
        let pem = std::fs::read_to_string(office.out().join("keys/below-ca.pem")).unwrap();
        let issuer = IssuerCertificate::from_pem_alone(&pem).unwrap();
        // id-RSASSA-PSS, RFC 4055 §3.1; the key in the certificate is none of RSA.
        let pss = hex::decode("06092a864886f70d01010a").unwrap();
        assert!(issuer.as_der().windows(pss.len()).any(|bytes| bytes == pss));
    });
}
