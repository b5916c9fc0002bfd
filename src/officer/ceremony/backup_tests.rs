//! Backups that somebody has changed, on a real SoftHSM.

use std::path::PathBuf;

use spp_testkit::ceremony::CeremonyFile;

use super::backup_file::{BackupFile, What};
use super::tests::Office;
use crate::hsm::tests::{Place, in_module};
use crate::officer::{OfficerError, verify_transcript};

const FIRST: &str = r#"
[[backup_wrapping_key]]
name = "backup-1"
shares = 3
threshold = 2
officers = ["o-1", "o-2", "o-3"]
[[signing_key]]
name = "old"
kind = "p256"
certificate = "self-signed"
subject = { common_name = "Old" }
[[signing_key]]
name = "devices"
kind = "p256"
certificate = "self-signed"
subject = { common_name = "Devices" }
backup = "backup-1"
[[master_key]]
name = "master"
version = 3
prf = "aes-cmac"
backup = "backup-1"
"#;

pub(super) fn restore(key: &str) -> String {
    let shares = "\"keys/backup-1-o-1.share\", \"keys/backup-1-o-3.share\"";
    format!("[[restore]]\nfile = \"keys/{key}.backup\"\nshares = [{shares}]\n")
}

struct Archive<'a> {
    office: Office<'a>,
}

impl<'a> Archive<'a> {
    /// Two keys with a backup, and the token without them.
    fn new(place: &'a Place) -> Self {
        let archive = Self { office: Office::begun_with(place, FIRST) };
        for key in ["devices", "master"] {
            archive.forget(key);
        }
        archive
    }

    fn forget(&self, key: &str) {
        let register = self.office.register();
        let (name, id) = register.given().find(|(name, _)| name.as_str() == key).unwrap();
        self.office.token.destroy(name, id).unwrap();
    }

    fn path(&self, key: &str) -> PathBuf {
        self.office.out().join(format!("keys/{key}.backup"))
    }

    fn refused(&self, key: &str, why: &str) {
        let plan = self.office.plan(&restore(key));
        let look = plan.look(&self.office.token, &self.office.out().join("keys-b")).unwrap_err().to_string();
        assert!(look.contains(why), "{look}");
        let error = self.office.hold_into("keys-b", &restore(key), false).err().unwrap().to_string();
        assert!(error.contains(why), "{error}");
        assert!(!self.office.out().join("keys-b/keys.toml").exists());
    }
}

#[test]
fn a_backup_of_which_anything_was_changed_is_refused() {
    in_module(|place| {
        let archive = Archive::new(place);
        let other = std::fs::read_to_string(archive.office.out().join("keys/old-ca.pem")).unwrap();
        for (key, from, to) in [
            ("master", "version = 3", "version = 4"),
            ("master", "name = \"master\"", "name = \"master-b\""),
            ("master", "prf = \"aes-cmac\"", "prf = \"aes-cmac\"\nreplaces = \"old\""),
            ("master", "prf = \"aes-cmac\"", "prf = \"hmac-sha-256\""),
            ("master", "id = \"", "id = \"00"),
            ("master", "wrapped = \"", "wrapped = \"00"),
            ("master", "seal = \"", "seal = \"00"),
            ("master", "shares = 3", "shares = 4"),
            ("devices", "use = \"device\"", "use = \"root\""),
            ("devices", "use = \"device\"", "use = \"device\"\nreplaces = \"old\""),
        ] {
            let right = std::fs::read_to_string(archive.path(key)).unwrap();
            assert!(right.contains(from), "{from}: {right}");
            std::fs::write(archive.path(key), right.replacen(from, to, 1)).unwrap();
            archive.refused(key, "its seal does not fit");
            std::fs::write(archive.path(key), right).unwrap();
        }
        for certificate in [Some(other), None] {
            let mut file = BackupFile::load(&archive.path("devices")).unwrap();
            let right = std::fs::read(archive.path("devices")).unwrap();
            let What::Signing { certificate: now, .. } = &mut file.what else { panic!("a pair") };
            *now = certificate;
            std::fs::write(archive.path("devices"), file.to_toml().unwrap()).unwrap();
            archive.refused("devices", "its seal does not fit");
            std::fs::write(archive.path("devices"), right).unwrap();
        }
        archive.office.hold_into("keys-b", &[restore("devices"), restore("master")].concat(), false).unwrap();
    });
}

#[test]
fn a_key_that_comes_to_others_needs_an_approval() {
    in_module(|place| {
        let archive = Archive::new(place);
        let plan = archive.office.plan(&restore("devices"));
        assert!(plan.may_need_approval() && plan.needs_approval(None).unwrap().is_empty());
        // A new register: of a new token, say.
        archive.office.hold_into("keys-b", &restore("master"), false).unwrap();
        let alone = archive.office.hold_into("keys-b", &restore("devices"), false);
        assert!(matches!(alone, Err(OfficerError::NeedsApproval { .. })));
        let planned = plan.acts(Some(&archive.office.out().join("keys-b"))).unwrap();
        assert!(planned[0].needs_approval);
        archive.office.hold_into("keys-b", &restore("devices"), true).unwrap();
    });
}

#[test]
fn a_share_that_others_may_read_or_that_is_none_is_not_read() {
    use std::os::unix::fs::PermissionsExt as _;
    in_module(|place| {
        let archive = Archive::new(place);
        let share = archive.office.out().join("keys/backup-1-o-3.share");
        std::fs::set_permissions(&share, std::fs::Permissions::from_mode(0o640)).unwrap();
        archive.refused("master", "may be read by others (mode 0640)");
        std::fs::set_permissions(&share, std::fs::Permissions::from_mode(0o600)).unwrap();
        let right = std::fs::read_to_string(&share).unwrap();
        std::fs::write(&share, format!("{right}{}", "\n".repeat(4096))).unwrap();
        archive.refused("master", "is no share of a key");
    });
}

#[test]
fn a_ceremony_that_fails_half_way_has_a_signed_transcript_of_what_it_did() {
    in_module(|place| {
        let archive = Archive::new(place);
        let office = &archive.office;
        office.hold(CeremonyFile::new().log_key("log", "spp.example/test").text(), false).unwrap();
        let mut file = BackupFile::load(&archive.path("master")).unwrap();
        (file.name, file.id) = ("master-b".parse().unwrap(), vec![9; 16]);
        *file.wrapped.last_mut().unwrap() ^= 1;
        file.seal = office.token.seal(&file.under, &file.digest().unwrap()).unwrap();
        std::fs::write(archive.path("master"), file.to_toml().unwrap()).unwrap();
        let other =
            "[[backup_wrapping_key]]\nname = \"backup-2\"\nshares = 2\nthreshold = 2\nofficers = [\"o-1\", \"o-2\"]\n";
        let error = office.hold(&format!("{other}{}", restore("master")), true).err().unwrap();
        let told = error.to_string();
        assert!(
            told.contains("nothing was restored")
                && told.ends_with("transcript-3.txt; done before that: made backup-2"),
            "{told}"
        );
        let OfficerError::CutShort { held, .. } = error else { panic!("{told}") };
        assert!(held.signed && held.transcript.failed.is_some());
        let log = office.register().log[0].key.clone();
        let verified = verify_transcript(&office.out().join("keys/transcript-3.txt"), &log).unwrap();
        assert!(
            verified.text.contains("\nfailed      ") && verified.text.contains("key backup-2"),
            "{}",
            verified.text
        );
        assert_eq!(verified.json_fits, Some(true));
        assert!(office.register().master_key(&"master-b".parse().unwrap()).is_none());
    });
}

/// Somebody has put something there of which a look before knows nothing.
fn block(path: &std::path::Path) {
    std::os::unix::fs::symlink("/nowhere", path).unwrap();
}

#[test]
fn the_register_knows_a_key_when_everything_of_it_is_written() {
    in_module(|place| {
        let archive = Archive::new(place);
        let office = &archive.office;
        let before = office.register();
        let keys = office.out().join("keys");
        let wrapping =
            "[[backup_wrapping_key]]\nname = \"backup-2\"\nshares = 2\nthreshold = 2\nofficers = [\"o-1\", \"o-2\"]\n";
        let signing = CeremonyFile::new().signing_key("more", "p256", "self-signed", "More");
        let signing = signing.with_text("backup", "backup-1");
        let log = CeremonyFile::new().log_key("log", "spp.example/test");
        for (text, key, last, first) in [
            (wrapping, "backup-2", "backup-2-o-2.share", "backup-2-o-1.share"),
            (signing.text(), "more", "more.backup", "more-ca.pem"),
            (log.text(), "log", "log.vkey", "log.vkey.none"),
        ] {
            block(&keys.join(last));
            let error = office.hold(text, false).err().unwrap().to_string();
            assert!(error.contains(last), "{error}");
            assert!(office.token.is_free(&key.parse().unwrap()).unwrap() && !keys.join(first).exists());
            assert_eq!(office.register(), before);
            std::fs::remove_file(keys.join(last)).unwrap();
        }
        for text in [wrapping, signing.text(), log.text()] {
            office.hold(text, false).unwrap();
        }
    });
}

#[test]
fn a_sealed_backup_with_the_certificate_of_another_key_is_refused() {
    in_module(|place| {
        let archive = Archive::new(place);
        let mut file = BackupFile::load(&archive.path("devices")).unwrap();
        let other = std::fs::read_to_string(archive.office.out().join("keys/old-ca.pem")).unwrap();
        let What::Signing { certificate, .. } = &mut file.what else { panic!("a pair") };
        *certificate = Some(other);
        file.seal = archive.office.token.seal(&file.under, &file.digest().unwrap()).unwrap();
        std::fs::write(archive.path("devices"), file.to_toml().unwrap()).unwrap();
        archive.refused("devices", "its certificate is of another key");
    });
}

#[test]
fn a_key_whose_cka_id_is_on_the_token_under_another_name_is_not_restored() {
    in_module(|place| {
        let archive = Archive::new(place);
        let file = BackupFile::load(&archive.path("master")).unwrap();
        let shares = ["o-1", "o-2"].map(|officer| archive.office.out().join(format!("keys/backup-1-{officer}.share")));
        let key = super::shares::combine(&file.under, &shares).unwrap();
        let (name, what) = ("squatter".parse().unwrap(), file.what.restorable());
        archive.office.token.restore(&name, &file.id, &what, &file.wrapped, &key).unwrap();
        let again = archive.office.token.restore(&file.name, &file.id, &what, &file.wrapped, &key);
        assert!(again.unwrap_err().to_string().contains("already; master was not made"));
        archive.refused("master", "has its CKA_ID already");
    });
}
