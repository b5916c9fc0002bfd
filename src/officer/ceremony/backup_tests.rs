//! Backups that somebody has changed, on a real SoftHSM.

use std::path::PathBuf;

use super::backup_file::{BackupFile, What};
use super::tests::Office;
use crate::hsm::tests::{Place, in_module};

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
