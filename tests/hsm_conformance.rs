//! The conformance suite for PKCS#11 modules: the self-test, a ceremony, and the handle with a real worker.
//!
//! The same suite runs on every available module, except for the functions that a module is known to lack.
//! `tests/modules/setup.sh` installs the modules; without them the tests fail with a hint.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use spp::hsm::{
    BatchName, Derivation, DeviceKeyRequest, Hsm, HsmConfig, HsmError, KeyManifest, KeyReloadRequest, ModuleProfile,
    PairSource, PairStorage, PinSource, StoreId, SupervisorPacing,
};
use spp_format::keys::{KeyType, SignatureAlgorithm};
use spp_testkit::ceremony::CeremonyFile;
use spp_testkit::process::{child_command, output, program};
use spp_testkit::random::scaled;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const USER_PIN: &str = "48291037";
const SO_PIN: &str = "11882299";

/// A module under test with its known gaps.
struct Module {
    profile: &'static str,
    /// The library, if it is not at a path of the profile.
    library: Option<&'static str>,
    make_token: fn(&TestToken),
    /// Key types that can sign.
    signing: &'static [KeyType],
    /// Key types of device pairs that can be generated.
    pairs: &'static [KeyType],
    /// The functions that the self-test must report as missing.
    missing: &'static [&'static str],
    /// The functions that fail occasionally.
    unreliable: &'static [&'static str],
}

const SOFTHSM: Module = Module {
    profile: "softhsm2",
    library: None,
    make_token: |token| {
        std::fs::create_dir(token.path("hsm/tokens")).unwrap();
        let tokens = token.path("hsm/tokens");
        let conf = format!("directories.tokendir = {}\nobjectstore.backend = file\n", tokens.display());
        std::fs::write(token.path("hsm/softhsm2.conf"), conf).unwrap();
        token.init_token();
    },
    signing: &[KeyType::P256, KeyType::P384, KeyType::Ed25519, KeyType::Rsa2048, KeyType::Rsa3072],
    pairs: &[KeyType::P256, KeyType::P384, KeyType::Ed25519, KeyType::Rsa2048],
    missing: &[],
    unreliable: &[],
};

const KRYOPTIC: Module = Module {
    profile: "kryoptic",
    library: Some("target/modules/libkryoptic_pkcs11.so"),
    make_token: |token| {
        let slot = format!(
            "[[slots]]\nslot = 1\ndbtype = \"sqlite\"\ndbargs = \"{}\"\n",
            token.path("hsm/token.sql").display()
        );
        std::fs::write(token.path("hsm/kryoptic.conf"), slot).unwrap();
        token.init_token();
    },
    signing: &[KeyType::P256, KeyType::P384, KeyType::Rsa2048, KeyType::Rsa3072],
    pairs: &[KeyType::P256, KeyType::P384, KeyType::Ed25519, KeyType::Rsa2048],
    missing: &["sign ed25519"],
    unreliable: &[],
};

const OPENCRYPTOKI: Module = Module {
    profile: "opencryptoki",
    library: None,
    make_token: |token| {
        // The machine has only one token: the script verifies that it is unused and resets it.
        let fresh = Path::new(ROOT).join("tests/modules/setup.sh");
        let fresh = Command::new(fresh).arg("--fresh-opencryptoki").output().unwrap();
        assert!(fresh.status.success(), "{}", String::from_utf8_lossy(&fresh.stderr));
        pkcsconf(&["-I", "-c", "3"], &format!("87654321\n{LABEL}\n"));
        pkcsconf(&["-P", "-c", "3", "-S", "87654321", "-n", SO_PIN], "");
        pkcsconf(&["-u", "-c", "3", "-S", SO_PIN, "-n", "73910284"], "");
        pkcsconf(&["-p", "-c", "3", "-U", "73910284", "-n", USER_PIN], "");
        assert!(token.path("hsm").exists());
    },
    signing: &[KeyType::Rsa2048, KeyType::Rsa3072],
    pairs: &[KeyType::Ed25519, KeyType::Rsa2048],
    missing: &["derive aes-cmac", "sign p256", "sign p384", "sign ed25519", "pair p256", "pair p384"],
    // A key whose encoding ends at an AES block boundary cannot be unwrapped again. The fault is detected and another pair
    // generated.
    unreliable: &["pair rsa-2048", "pair rsa-3072", "pair rsa-4096"],
};

const LABEL: &str = "spp-conformance";

fn pkcsconf(words: &[&str], typed: &str) {
    use std::io::Write as _;
    let mut command = Command::new("pkcsconf");
    command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("opencryptoki is not installed: run tests/modules/setup.sh");
    child.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "pkcsconf {words:?}: {out}{err}");
}

/// A test token in its directory.
struct TestToken {
    directory: tempfile::TempDir,
    module: Module,
}

impl TestToken {
    fn new(module: Module) -> Self {
        let token = Self { directory: spp_testkit::files::temp_dir(), module };
        std::fs::create_dir(token.path("hsm")).unwrap();
        let file = format!("{}.toml", token.module.profile);
        let mut profile = std::fs::read_to_string(Path::new(ROOT).join("hsm-config").join(&file)).unwrap();
        if let Some(library) = token.module.library {
            let library = Path::new(ROOT).join(library);
            assert!(library.exists(), "{} is missing: run tests/modules/setup.sh", library.display());
            profile = profile.replace("library = [", &format!("library = [\"{}\",", library.display()));
        }
        std::fs::write(token.path("module.toml"), profile).unwrap();
        for (name, pin) in [("user.pin", USER_PIN), ("so.pin", SO_PIN)] {
            std::fs::write(token.path(name), pin).unwrap();
            std::fs::set_permissions(token.path(name), std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        let hsm = format!(
            "module = \"module.toml\"\ndirectory = \"hsm\"\ntoken_label = \"{LABEL}\"\npin_file = \"user.pin\"\n"
        );
        std::fs::write(token.path("hsm.toml"), hsm).unwrap();
        (token.module.make_token)(&token);
        token
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.directory.path().join(relative)
    }

    fn init_token(&self) {
        self.sppctl(&format!(
            "token init --module module.toml --directory hsm --label {LABEL} --so-pin-file so.pin --pin-file user.pin"
        ));
    }

    fn try_sppctl(&self, words: &str) -> Output {
        {
            let mut command = child_command(program("sppctl"));
            command.args(words.split_whitespace()).current_dir(self.directory.path());
            output(command)
        }
    }

    fn sppctl(&self, words: &str) -> String {
        let output = self.try_sppctl(words);
        assert!(output.status.success(), "sppctl {words}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Creates a signing key of every supported type, and the master keys.
    fn ceremony(&self) -> KeyManifest {
        let mut file = CeremonyFile::new();
        for kind in self.module.signing {
            let kind = kind.to_string();
            file = file.signing_key(&format!("sign-{kind}"), &kind, "self-signed", &format!("CA {kind}"));
        }
        if self.module.signing.contains(&KeyType::Ed25519) {
            file = file.log_key("log-1", "spp.example/conformance");
        }
        for (version, prf) in (1..).zip(self.prfs()) {
            file = file.master_key(&format!("master-{prf}"), version, prf);
        }
        std::fs::write(self.path("ceremony.toml"), file.text()).unwrap();
        self.sppctl("ceremony run ceremony.toml --hsm hsm.toml --out keys");
        KeyManifest::load(&self.path("keys/keys.toml")).unwrap()
    }

    fn prfs(&self) -> Vec<&'static str> {
        ["hmac-sha-256", "aes-cmac"]
            .into_iter()
            .filter(|prf| !self.module.missing.contains(&format!("derive {prf}").as_str()))
            .collect()
    }

    fn config(&self, keys: KeyManifest) -> HsmConfig {
        HsmConfig {
            name: "main".to_owned(),
            module: ModuleProfile::load(&self.path("module.toml"), &self.path("hsm")).unwrap(),
            pin: PinSource::File(self.path("user.pin")),
            pin_agent: None,
            pin_refused: self.path("pin-refused.json"),
            keys,
            call_timeout: Duration::from_secs(20),
            queue: 256,
            worker_program: program("sppd"),
            pacing: SupervisorPacing::default(),
        }
    }
}

fn batch(number: u32) -> BatchName {
    BatchName { store: StoreId::from_random([9; 8]), number: number.into() }
}

fn derivation(prf: &str, number: usize) -> Derivation {
    let identity = format!("serial:{number}").parse().unwrap();
    Derivation::device_key(format!("master-{prf}").parse().unwrap(), "channel", &identity, 32)
}

async fn derived(hsm: &Hsm, prf: &str, number: usize) -> Vec<u8> {
    hsm.derive(vec![derivation(prf, number)]).await.unwrap().remove(0).expose().clone()
}

/// Generates a pair, delivers it twice, rewraps it to another batch key, and delivers it from there.
async fn check_pair(hsm: &Hsm, kind: KeyType) {
    let order = DeviceKeyRequest {
        pair: Some(PairSource::Generate(kind, batch(1).key())),
        derivations: Vec::new(),
        random: 16,
    };
    let made = hsm.device_keys(&order).await.unwrap();
    assert_eq!(made.random.len(), 16);
    let pair = made.pair.unwrap();
    let algorithm = SignatureAlgorithm::default_for(kind);
    let signature = pair.private.sign(algorithm, b"works").unwrap();
    pair.private.public().verify(algorithm, b"works", &signature).unwrap();
    let public = pair.private.public().clone();
    let reload = async |stored: spp::hsm::StoredKey| {
        let order = KeyReloadRequest { pair: Some((public.clone(), stored)), derivations: Vec::new() };
        hsm.reload_keys(&order).await.unwrap().pair.unwrap().secrets()[0].expose().clone()
    };
    let secret = pair.private.secrets()[0].expose().clone();
    assert_eq!(reload(pair.stored.clone()).await, secret, "{kind}");
    let spp::hsm::StoredKey::Wrapped(wrapped) = pair.stored else { panic!("{kind} is not wrapped") };
    let moved = hsm.move_keys(batch(1), batch(2), vec![(kind, wrapped.blob)]).await.unwrap().remove(0);
    let wrapped = spp::hsm::WrappedKey { wrapping_key: batch(2).key(), blob: moved };
    assert_eq!(reload(spp::hsm::StoredKey::Wrapped(wrapped)).await, secret, "{kind} after rewrapping");
}

async fn check_conformance(module: Module) {
    let token = TestToken::new(module);
    // The self-test: exactly the known functions are missing.
    let skipped = scaled(" --skip rsa-3072 --skip rsa-4096", "");
    let examined = token.try_sppctl(&format!("hsm check --hsm hsm.toml --json{skipped}"));
    let report: serde_json::Value = serde_json::from_slice(&examined.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&examined.stderr)));
    let findings = report["examination"]["findings"].as_array().unwrap();
    let failed = findings.iter().filter(|finding| !finding["error"].is_null());
    let found = failed.map(|finding| finding["what"].as_str().unwrap());
    let found: BTreeSet<_> = found.filter(|what| !token.module.unreliable.contains(what)).collect();
    assert_eq!(found, token.module.missing.iter().copied().collect(), "{report:#}");
    assert!(token.module.missing.is_empty() || !examined.status.success());

    let keys = token.ceremony();
    assert_eq!(keys.signing.len(), token.module.signing.len());
    // A ready HSM has passed the key check: signatures of all signing keys verify, and all check values match.
    let hsm = Hsm::start(token.config(keys.clone()));
    hsm.ready(Duration::from_secs(60)).await.unwrap();
    for number in [1, 2] {
        hsm.create_batch_key(batch(number)).await.unwrap();
        hsm.create_batch_key(batch(number)).await.unwrap();
    }
    for kind in token.module.pairs {
        check_pair(&hsm, *kind).await;
    }
    let made = hsm
        .make_pairs(token.module.pairs[0], PairStorage::Wrapped(batch(1)), 3, Duration::from_secs(30))
        .await
        .unwrap();
    assert_eq!(made.len(), 3);
    let prfs = token.prfs();
    let before: Vec<_> = {
        let mut keys = Vec::new();
        for prf in &prfs {
            keys.push(derived(&hsm, prf, 1).await);
            assert_ne!(keys.last().unwrap(), &derived(&hsm, prf, 2).await);
        }
        keys
    };
    // A destroyed batch key is absent, and with it everything wrapped under it.
    hsm.destroy_batch_key(batch(2)).await.unwrap();
    hsm.destroy_batch_key(batch(2)).await.unwrap();
    let order = DeviceKeyRequest {
        pair: Some(PairSource::Generate(token.module.pairs[0], batch(2).key())),
        derivations: Vec::new(),
        random: 1,
    };
    let error = hsm.device_keys(&order).await.err();
    assert!(matches!(error, Some(HsmError::Absent(_))), "{error:?}");
    assert!(hsm.daemon_objects().await.unwrap().keys.contains(&batch(1)));
    let statistics = hsm.status().members[0].calls.clone();
    assert!(statistics.iter().any(|one| one.operation == "generate_pair" && one.outcome == "ok" && one.count > 0));

    // Another worker derives the same keys. The first worker ends before it, because a module may allow one process only.
    drop(hsm);
    let hsm = Hsm::start(token.config(keys));
    hsm.ready(Duration::from_secs(60)).await.unwrap();
    for (prf, before) in prfs.iter().zip(before) {
        assert_eq!(derived(&hsm, prf, 1).await, before, "{prf}");
    }
    request_pair(&hsm, token.module.pairs[0]).await;
    hsm.destroy_batch_key(batch(1)).await.unwrap();
}

/// Requests a pair under a batch key that an earlier worker generated.
async fn request_pair(hsm: &Hsm, kind: KeyType) {
    let order =
        DeviceKeyRequest { pair: Some(PairSource::Generate(kind, batch(1).key())), derivations: Vec::new(), random: 1 };
    hsm.device_keys(&order).await.unwrap().pair.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn softhsm_conforms() {
    check_conformance(SOFTHSM).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kryoptic_with_native_kdf_conforms() {
    check_conformance(KRYOPTIC).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn opencryptoki_software_token_conforms() {
    check_conformance(OPENCRYPTOKI).await;
}

/// Every shipped profile is valid, whether or not its module is installed.
#[test]
fn shipped_module_profiles_are_valid() {
    let mut count = 0;
    for entry in std::fs::read_dir(Path::new(ROOT).join("hsm-config")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        count += 1;
        if let Err(faults) = ModuleProfile::load(&path, Path::new("/nowhere")) {
            let faults = faults.to_string();
            let lines: Vec<_> = faults.lines().filter(|line| !line.trim().is_empty()).collect();
            assert!(lines.len() == 1 && faults.contains("is not installed"), "{faults}");
        }
    }
    assert!(count >= 9, "{count}");
}
