//! Backups and shares that were changed, and ceremonies that fail half-way, on SoftHSM.

use std::path::PathBuf;

use spp_testkit::ceremony::CeremonyFile;

use super::backup_file::{BackedUpKey, BackupFile};
use super::tests::CeremonySite;
use crate::hsm::tests::{TestToken, in_module};
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

struct BackupSite<'a> {
    site: CeremonySite<'a>,
}

impl<'a> BackupSite<'a> {
    /// Creates two keys with backups and destroys the keys on the token.
    fn new(test_token: &'a TestToken) -> Self {
        let backups = Self { site: CeremonySite::with_first_ceremony(test_token, FIRST) };
        for key in ["devices", "master"] {
            backups.destroy_on_token(key);
        }
        backups
    }

    fn destroy_on_token(&self, key: &str) {
        let manifest = self.site.manifest();
        let (name, id) = manifest.used_names().find(|(name, _)| name.as_str() == key).unwrap();
        self.site.token.destroy(name, id).unwrap();
    }

    fn path(&self, key: &str) -> PathBuf {
        self.site.out().join(format!("keys/{key}.backup"))
    }

    fn assert_refused(&self, key: &str, why: &str) {
        let plan = self.site.plan(&restore(key));
        let preflight = plan.preflight(&self.site.token, &self.site.out().join("keys-b")).unwrap_err().to_string();
        assert!(preflight.contains(why), "{preflight}");
        let error = self.site.run_into("keys-b", &restore(key), false).err().unwrap().to_string();
        assert!(error.contains(why), "{error}");
        assert!(!self.site.out().join("keys-b/keys.toml").exists());
    }
}

#[test]
fn changed_backup_is_refused() {
    in_module(|test_token| {
        let backups = BackupSite::new(test_token);
        let other = std::fs::read_to_string(backups.site.out().join("keys/old-ca.pem")).unwrap();
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
            let right = std::fs::read_to_string(backups.path(key)).unwrap();
            assert!(right.contains(from), "{from}: {right}");
            std::fs::write(backups.path(key), right.replacen(from, to, 1)).unwrap();
            backups.assert_refused(key, "invalid seal");
            std::fs::write(backups.path(key), right).unwrap();
        }
        for certificate in [Some(other), None] {
            let mut file = BackupFile::load(&backups.path("devices")).unwrap();
            let right = std::fs::read(backups.path("devices")).unwrap();
            let BackedUpKey::Signing { certificate: now, .. } = &mut file.content else { panic!("a pair") };
            *now = certificate;
            std::fs::write(backups.path("devices"), file.to_toml().unwrap()).unwrap();
            backups.assert_refused("devices", "invalid seal");
            std::fs::write(backups.path("devices"), right).unwrap();
        }
        backups.site.run_into("keys-b", &[restore("devices"), restore("master")].concat(), false).unwrap();
    });
}

#[test]
fn restore_to_token_with_keys_needs_approval() {
    in_module(|test_token| {
        let backups = BackupSite::new(test_token);
        let plan = backups.site.plan(&restore("devices"));
        assert!(plan.may_need_approval() && plan.needs_approval(None).unwrap().is_empty());
        // An empty manifest, as on a new token.
        backups.site.run_into("keys-b", &restore("master"), false).unwrap();
        let alone = backups.site.run_into("keys-b", &restore("devices"), false);
        assert!(matches!(alone, Err(OfficerError::NeedsApproval { .. })));
        let planned = plan.steps(Some(&backups.site.out().join("keys-b"))).unwrap();
        assert!(planned[0].needs_approval);
        backups.site.run_into("keys-b", &restore("devices"), true).unwrap();
    });
}

#[test]
fn share_with_open_mode_or_wrong_format_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    in_module(|test_token| {
        let backups = BackupSite::new(test_token);
        let share = backups.site.out().join("keys/backup-1-o-3.share");
        std::fs::set_permissions(&share, std::fs::Permissions::from_mode(0o640)).unwrap();
        backups.assert_refused("master", "is readable by other users (mode 0640)");
        std::fs::set_permissions(&share, std::fs::Permissions::from_mode(0o600)).unwrap();
        let right = std::fs::read_to_string(&share).unwrap();
        std::fs::write(&share, format!("{right}{}", "\n".repeat(4096))).unwrap();
        backups.assert_refused("master", "not a key share");
    });
}

#[test]
fn failed_ceremony_writes_signed_transcript() {
    in_module(|test_token| {
        let backups = BackupSite::new(test_token);
        let site = &backups.site;
        site.run(CeremonyFile::new().log_key("log", "spp.example/test").text(), false).unwrap();
        let mut file = BackupFile::load(&backups.path("master")).unwrap();
        (file.name, file.id) = ("master-b".parse().unwrap(), vec![9; 16]);
        *file.wrapped.last_mut().unwrap() ^= 1;
        file.seal = site.token.seal(&file.backup_key, &file.digest().unwrap()).unwrap();
        std::fs::write(backups.path("master"), file.to_toml().unwrap()).unwrap();
        let other =
            "[[backup_wrapping_key]]\nname = \"backup-2\"\nshares = 2\nthreshold = 2\nofficers = [\"o-1\", \"o-2\"]\n";
        let error = site.run(&format!("{other}{}", restore("master")), true).err().unwrap();
        let message = error.to_string();
        assert!(
            message.contains("nothing was restored")
                && message.ends_with("transcript-3.txt; completed before: made backup-2"),
            "{message}"
        );
        let OfficerError::Interrupted { outcome, .. } = error else { panic!("{message}") };
        assert!(outcome.signed && outcome.transcript.failed.is_some());
        let log = site.manifest().log[0].key.clone();
        let verified = verify_transcript(&site.out().join("keys/transcript-3.txt"), &log).unwrap();
        assert!(
            verified.text.contains("\nfailed      ") && verified.text.contains("key backup-2"),
            "{}",
            verified.text
        );
        assert_eq!(verified.json_fits, Some(true));
        assert!(site.manifest().master_key(&"master-b".parse().unwrap()).is_none());
    });
}

/// Creates a dangling symlink: the preflight finds no file, but writing fails.
fn block(path: &std::path::Path) {
    std::os::unix::fs::symlink("/nowhere", path).unwrap();
}

#[test]
fn manifest_lists_key_only_after_its_files() {
    in_module(|test_token| {
        let backups = BackupSite::new(test_token);
        let site = &backups.site;
        let before = site.manifest();
        let keys = site.out().join("keys");
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
            let error = site.run(text, false).err().unwrap().to_string();
            assert!(error.contains(last), "{error}");
            assert!(site.token.is_free(&key.parse().unwrap()).unwrap() && !keys.join(first).exists());
            assert_eq!(site.manifest(), before);
            std::fs::remove_file(keys.join(last)).unwrap();
        }
        for text in [wrapping, signing.text(), log.text()] {
            site.run(text, false).unwrap();
        }
    });
}

#[test]
fn sealed_backup_with_foreign_certificate_is_refused() {
    in_module(|test_token| {
        let backups = BackupSite::new(test_token);
        let mut file = BackupFile::load(&backups.path("devices")).unwrap();
        let other = std::fs::read_to_string(backups.site.out().join("keys/old-ca.pem")).unwrap();
        let BackedUpKey::Signing { certificate, .. } = &mut file.content else { panic!("a pair") };
        *certificate = Some(other);
        file.seal = backups.site.token.seal(&file.backup_key, &file.digest().unwrap()).unwrap();
        std::fs::write(backups.path("devices"), file.to_toml().unwrap()).unwrap();
        backups.assert_refused("devices", "the certificate belongs to another key");
    });
}

#[test]
fn restore_with_existing_cka_id_is_refused() {
    in_module(|test_token| {
        let backups = BackupSite::new(test_token);
        let file = BackupFile::load(&backups.path("master")).unwrap();
        let shares = ["o-1", "o-2"].map(|officer| backups.site.out().join(format!("keys/backup-1-{officer}.share")));
        let key = super::shares::combine(&file.backup_key, &shares).unwrap();
        let (name, what) = ("other-name".parse().unwrap(), file.content.restorable());
        backups.site.token.restore(&name, &file.id, &what, &file.wrapped, &key).unwrap();
        let again = backups.site.token.restore(&file.name, &file.id, &what, &file.wrapped, &key);
        let error = again.unwrap_err().to_string();
        assert!(error.contains("already has an object") && error.contains("; master was not created"), "{error}");
        backups.assert_refused("master", "an object with its CKA_ID");
    });
}
