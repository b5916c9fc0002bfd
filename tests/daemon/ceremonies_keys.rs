//! Ceremonies through `sppctl`: certificates, check values, backups, shares and restoring to another token.

use std::process::Output;
use std::time::Duration;

use spp::hsm::{Derivation, Hsm, HsmConfig, KeyManifest, SigningUse};
use spp_format::certificate::{IssuerCertificate, verify_csr_pem};
use spp_format::keys::SignatureAlgorithm;
use spp_format::secret::SecretBytes;

use spp_testkit::ceremony::CeremonyFile;
use spp_testkit::site::Site;

const RUN: &str = "ceremony run more.toml --hsm hsm.toml --out keys --officer o-1 --officer o-2";
const RESTORE: &str = "ceremony run restore.toml --hsm hsm-b.toml --out keys-b --so-pin-file hsm/so.pin";

fn write(site: &Site, file: &str, text: &str) {
    std::fs::write(site.path(file), text).unwrap();
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn assert_refused(site: &Site, words: &str, why: &str) {
    let output = site.try_sppctl(words);
    assert!(!output.status.success() && stderr(&output).contains(why), "{}", stderr(&output));
}

fn root_and_issuer() -> CeremonyFile {
    CeremonyFile::new().issued_key("devices", "p256", "root", "Devices CA").root_key("root", "p384", "Root")
}

#[test]
fn daemon_signs_with_issued_key_but_never_with_root() {
    let mut site = Site::new();
    write(&site, "more.toml", root_and_issuer().text());
    site.sppctl(RUN);
    let chain = String::from_utf8(site.read("keys/devices-ca.pem")).unwrap();
    let issuer = IssuerCertificate::from_pem(&chain, SignatureAlgorithm::EcdsaP256Sha256).unwrap();
    assert_eq!(issuer.chain().len(), 2);
    let verified = site.openssl("verify -x509_strict -CAfile keys/root-ca.pem keys/devices-ca.pem");
    assert!(verified.contains("devices-ca.pem: OK"), "{verified}");
    // A root of an earlier ceremony can issue too.
    let third = CeremonyFile::new().issued_key("devices-b", "p256", "root", "Devices CA");
    write(&site, "more.toml", third.text());
    site.sppctl(RUN);
    for profile in std::fs::read_dir(site.path("profiles")).unwrap() {
        let path = profile.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"manufacturer\"", "\"devices-b\"")).unwrap();
    }
    site.start();
    assert!(site.stop().success());
    for profile in std::fs::read_dir(site.path("profiles")).unwrap() {
        let path = profile.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"devices-b\"", "\"root\"")).unwrap();
    }
    let check = site.run("sppd", "--config sppd.toml --check");
    assert!(
        !check.status.success() && stderr(&check).contains("signing key root is not in the key manifest"),
        "{check:?}"
    );
}

#[test]
fn import_accepts_only_matching_key_and_root() {
    let site = Site::new();
    write(&site, "more.toml", CeremonyFile::new().signing_key("devices", "p256", "csr", "Devices CA").text());
    site.sppctl(RUN);
    let key = verify_csr_pem(&site.read("keys/devices.csr.pem")).unwrap();
    write(&site, "leaf.cnf", "basicConstraints=critical,CA:FALSE\n");
    for root in ["root", "other"] {
        site.openssl(&format!(
            "req -x509 -newkey rsa:3072 -nodes -keyout {root}.key -out {root}.pem -subj /CN={root} -days 30"
        ));
    }
    let sign = "x509 -req -in keys/devices.csr.pem -CA root.pem -CAkey root.key";
    site.openssl(&format!("{sign} -copy_extensions copyall -days 30 -out right.pem"));
    site.openssl(&format!("{sign} -extfile leaf.cnf -days 30 -out leaf.pem"));
    site.openssl(&format!("{sign} -copy_extensions copyall -days -1 -out ended.pem"));
    let authority = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\nsubjectKeyIdentifier=hash\n";
    write(&site, "authority.cnf", authority);
    site.openssl(
        "req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout stranger.key -out stranger.csr -subj /CN=stranger",
    );
    let stranger = sign.replace("keys/devices.csr.pem", "stranger.csr");
    site.openssl(&format!("{stranger} -extfile authority.cnf -days 30 -out stranger.pem"));
    let import = |file: &str, root: &str| {
        let text = format!("[[import_certificate]]\nkey = \"devices\"\nfile = \"{file}\"\nroot = \"{root}\"\n");
        write(&site, "more.toml", &text);
    };
    for (file, root, why) in [
        ("leaf.pem", "root.pem", "not a CA (basicConstraints)"),
        ("right.pem", "other.pem", "expected CN=root"),
        ("root.pem", "root.pem", "expected the key's certificate first"),
        ("ended.pem", "root.pem", "expired at"),
        ("stranger.pem", "root.pem", "the certificate's public key is not the token's key"),
        ("keys/manufacturer-ca.pem", "root.pem", "the chain continues with"),
    ] {
        import(file, root);
        assert_refused(&site, RUN, why);
        assert!(!site.path("keys/devices-ca.pem").exists());
    }
    import("right.pem", "root.pem");
    site.sppctl("ceremony plan more.toml --hsm hsm.toml --out keys");
    site.sppctl(RUN);
    let chain = String::from_utf8(site.read("keys/devices-ca.pem")).unwrap();
    let issuer = IssuerCertificate::from_pem(&chain, SignatureAlgorithm::EcdsaP256Sha256).unwrap();
    assert_eq!((issuer.public_key(), issuer.chain().len()), (&key, 2));
    assert_refused(&site, RUN, "file exists and is never overwritten");
    let text = site.sppctl("ceremony verify keys/transcript-3.txt --log keys/log-1.vkey");
    assert!(text.contains("certificate imported at") && text.contains("devices-ca.pem"), "{text}");
}

#[test]
fn key_changes_without_second_officer_are_refused() {
    let site = Site::new();
    let before = site.read("keys/keys.toml");
    for text in [
        "[[rotate_master_key]]\nkey = \"master-1\"\nname = \"master-2\"\n",
        "[[rotate_signing_key]]\nkey = \"manufacturer\"\nname = \"manufacturer-2\"\nkind = \"p256\"\ncertificate = \"csr\"\n\
         subject = { common_name = \"CA\" }\n",
        "[[destroy]]\nkey = \"master-1\"\ncheck_value = \"00\"\n",
    ] {
        write(&site, "more.toml", text);
        assert_refused(
            &site,
            RUN,
            "needs the approval of a second officer: run sppctl approvals request ceremony more.toml",
        );
        let plan = site.sppctl("ceremony plan more.toml");
        assert!(plan.contains("must approve it; sppctl approvals request ceremony more.toml"), "{plan}");
    }
    write(&site, "more.toml", "[[rotate_master_key]]\nkey = \"master-1\"\nname = \"master-2\"\n");
    let plan = site.sppctl("ceremony plan more.toml --hsm hsm.toml --out keys");
    assert!(plan.contains("version 2, replaces master-1") && plan.contains("hmac-sha-256"), "{plan}");
    assert_eq!(site.read("keys/keys.toml"), before);
}

#[test]
fn wrong_check_value_ends_ceremony() {
    let site = Site::new();
    write(&site, "more.toml", CeremonyFile::new().check_value("master-1").check_value("manufacturer").text());
    site.sppctl(RUN);
    let manifest = KeyManifest::load(&site.path("keys/keys.toml")).unwrap();
    let value = hex::encode(&manifest.master[0].check_value);
    let text = site.sppctl("ceremony verify keys/transcript-2.txt --log keys/log-1.vkey");
    assert!(text.contains("checked at") && text.contains(&value), "{text}");
    site.edit("keys/keys.toml", &value, "0011223344556677");
    assert_refused(&site, RUN, "key master-1 on the token is not the one in keys.toml");
    write(&site, "more.toml", CeremonyFile::new().check_value("nobody").text());
    assert_refused(&site, RUN, "keys.toml has no key nobody");
}

#[test]
fn ceremony_file_faults_are_reported_together() {
    let site = Site::new();
    let text = "colour = 1\n[[backup_wrapping_key]]\nname = \"b\"\nshares = 3\nthreshold = 4\nofficers = [\"o-1\", \"o-2\"]\n\
                [[signing_key]]\nname = \"a\"\nkind = \"p256\"\ncertificate = \"issued\"\nsubject = { common_name = \"A\" }\n\
                backup = \"a\"\n[[signing_key]]\nname = \"c\"\nuse = \"root\"\nkind = \"p256\"\ncertificate = \"csr\"\n\
                subject = { common_name = \"C\" }\n[[signing_key]]\nname = \"d\"\nkind = \"p256\"\ncertificate = \"issued\"\n\
                issuer = \"c\"\nsignature = \"ecdsa-p256-sha256\"\nsubject = { common_name = \"D\" }\n\
                [[destroy]]\nkey = \"x\"\n[[rotate_master_key]]\nkey = \"m\"\nname = \"a\"\n";
    write(&site, "more.toml", text);
    let output = site.try_sppctl("ceremony plan more.toml");
    for fault in [
        "unknown field `colour`",
        "threshold: must be from 2 to 3",
        "officers: 3 shares for 2 officers",
        "signing_key a: issuer: must name the root",
        "a: backup: must name a [[backup_wrapping_key]]",
        "d: issuer: c has no certificate until its offline root has issued it",
        "signing_key d: signature: has no effect",
        "destroy x: give the key's fingerprint",
    ] {
        assert!(stderr(&output).contains(fault), "{fault}: {}", stderr(&output));
    }
}

/// A site whose first ceremony backs up every key with five shares, and the configuration of a second token.
fn site_with_backups() -> Site {
    let site = Site::new();
    std::fs::remove_dir_all(site.path("keys")).unwrap();
    let ceremony = String::from_utf8(site.read("ceremony.toml")).unwrap();
    let wrapping = "[token]\nlabel = \"spp-a\"\n[[backup_wrapping_key]]\nname = \"backup-1\"\nshares = 5\nthreshold = 3\n\
                    officers = [\"o-1\", \"o-2\", \"o-3\", \"night/o-4\", \"o-5\"]\n";
    let with_backup = ceremony.replace("\nname = ", "\nbackup = \"backup-1\"\nname = ");
    write(&site, "ceremony.toml", &format!("{wrapping}{with_backup}"));
    for (file, label) in [("hsm-a.toml", "spp-a"), ("hsm-b.toml", "spp-b")] {
        let text = String::from_utf8(site.read("hsm.toml")).unwrap();
        write(&site, file, &text.replace("spp-demo", label));
    }
    site.sppctl("ceremony run ceremony.toml --hsm hsm-a.toml --out keys --so-pin-file hsm/so.pin --officer o-1");
    site
}

/// Writes a ceremony that restores all keys of the first token to a new token with these shares.
fn write_restore(site: &Site, shares: &[&str]) {
    let shares: Vec<_> = shares.iter().map(|officer| format!("\"keys/backup-1-{officer}.share\"")).collect();
    let shares = shares.join(", ");
    let restore = |key: &str| format!("[[restore]]\nfile = \"keys/{key}.backup\"\nshares = [{shares}]\n");
    let all: String = ["manufacturer", "access", "log-1", "master-1"].map(restore).concat();
    write(site, "restore.toml", &format!("[token]\nlabel = \"spp-b\"\n{all}"));
}

fn config(site: &Site, keys: &str) -> HsmConfig {
    HsmConfig { keys: KeyManifest::load(&site.path(keys)).unwrap(), ..site.hsm_config() }
}

async fn device_key(hsm: &Hsm) -> SecretBytes {
    let identity = "serial:1".parse().unwrap();
    let derivation = Derivation::device_key("master-1".parse().unwrap(), "channel", &identity, 32);
    hsm.derive(vec![derivation]).await.unwrap().remove(0)
}

#[test]
fn three_of_five_shares_restore_all_keys_for_the_daemon() {
    let mut site = site_with_backups();
    write_restore(&site, &["o-5", "night-o-4", "o-2"]);
    site.sppctl(RESTORE);
    let [first, second] =
        ["keys", "keys-b"].map(|out| KeyManifest::load(&site.path(&format!("{out}/keys.toml"))).unwrap());
    assert_eq!(first.master[0].check_value, second.master[0].check_value);
    assert_eq!(second.current(SigningUse::Device).unwrap().id, first.current(SigningUse::Device).unwrap().id);
    assert_eq!(site.read("keys/manufacturer-ca.pem"), site.read("keys-b/manufacturer-ca.pem"));
    let text = site.sppctl("ceremony verify keys-b/transcript.txt --log keys/log-1.vkey");
    assert!(text.contains("restored at") && text.contains("initialised in this ceremony"), "{text}");
    for transcript in ["keys/transcript.txt", "keys/transcript.json", "keys-b/transcript.txt", "keys-b/transcript.json"]
    {
        let text = String::from_utf8(site.read(transcript)).unwrap();
        let share = String::from_utf8(site.read("keys/backup-1-o-2.share")).unwrap();
        let secret = share.lines().find_map(|line| line.strip_prefix("share ")).unwrap();
        assert!(!text.contains(&secret[2..]), "{transcript} has a share");
    }

    // Start both as the daemon does, which audits every key; the derived device keys are equal.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let keys = ["keys/keys.toml", "keys-b/keys.toml"].map(|keys| {
        runtime.block_on(async {
            let hsm = Hsm::start(config(&site, keys));
            hsm.ready(Duration::from_secs(60)).await.unwrap();
            device_key(&hsm).await.expose().clone()
        })
    });
    assert_eq!(keys[0], keys[1]);
    site.edit("sppd.toml", "keys/keys.toml", "keys-b/keys.toml");
    site.edit("sppd.toml", "keys/access-ca.pem", "keys-b/access-ca.pem");
    for words in [
        "init --config sppd.toml",
        "server enroll --config sppd.toml --dns localhost --ip 127.0.0.1 --out tls/server",
        "station enroll line-1/a --config sppd.toml --out tls/line-1-a",
        "officer enroll o-1 --config sppd.toml --out tls/officer",
    ] {
        let _ = std::fs::remove_dir_all(site.path(words.rsplit("--out ").next().unwrap()));
        let _ = words.starts_with("init") || !site.sppctl(words).is_empty();
    }
    site.start();
    assert!(site.stop().success());
}

#[test]
fn insufficient_or_damaged_shares_restore_nothing() {
    let site = site_with_backups();
    // The shares of a second backup key are not interchangeable.
    write(
        &site,
        "more.toml",
        "[[backup_wrapping_key]]\nname = \"backup-2\"\nshares = 2\nthreshold = 2\nofficers = [\"o-1\", \"o-2\"]\n",
    );
    site.sppctl("ceremony run more.toml --hsm hsm-a.toml --out keys");
    let share = site.path("keys/backup-1-o-3.share");
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(std::fs::metadata(&share).unwrap().permissions().mode() & 0o777, 0o600);
    write_restore(&site, &["o-1", "o-2"]);
    assert_refused(&site, RESTORE, "backup-1 needs 3 of its 5 shares, 2 given");
    // A plan fails as well: the second token does not exist yet.
    let plan = "ceremony plan more.toml --hsm hsm-b.toml --out keys-b";
    assert_refused(&site, plan, "no token named spp-b");
    let restore = |shares: &[&str]| write_restore(&site, shares);
    restore(&["o-1", "o-2", "o-2"]);
    assert_refused(&site, RESTORE, "each share counts once");
    let right = std::fs::read_to_string(&share).unwrap();
    let bytes = right.lines().find_map(|line| line.strip_prefix("share ")).unwrap();
    let changed = if bytes.ends_with("00") { "01" } else { "00" };
    let wrong = format!("{}{changed}", &bytes[..bytes.len() - 2]);
    restore(&["o-1", "o-2", "o-3"]);
    std::fs::write(&share, right.replace(bytes, &wrong)).unwrap();
    assert_refused(&site, RESTORE, "backup-1-o-3.share: damaged share: wrong checksum");
    let body = right.replace(bytes, &wrong);
    let body = body.split_once("checksum ").unwrap().0;
    let sum = hex::encode(&spp_format::keys::sha256(body.as_bytes())[..8]);
    std::fs::write(&share, format!("{body}checksum {sum}\n")).unwrap();
    assert_refused(&site, RESTORE, "shares 1 (o-1), 2 (o-2), 3 (o-3) do not reproduce key backup-1");
    std::fs::copy(site.path("keys/backup-2-o-1.share"), &share).unwrap();
    assert_refused(&site, RESTORE, "share of another key; this backup needs shares of backup-1");
    assert!(!site.path("keys-b/keys.toml").exists());
    std::fs::write(&share, &right).unwrap();
    // A changed backup is refused.
    let backup = site.read("keys/master-1.backup");
    let text = String::from_utf8(backup.clone()).unwrap();
    let wrapped = text.lines().find_map(|line| line.strip_prefix("wrapped = \"")).unwrap();
    write(
        &site,
        "keys/master-1.backup",
        &text.replace(&wrapped[..8], if wrapped.starts_with("0000") { "11111111" } else { "00000000" }),
    );
    assert_refused(&site, RESTORE, "master-1.backup: invalid seal");
    assert_refused(&site, plan, "no token named spp-b");
    std::fs::write(site.path("keys/master-1.backup"), backup).unwrap();
    site.sppctl(RESTORE);
}
