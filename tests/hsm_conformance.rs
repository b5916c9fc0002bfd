//! The same suite on every PKCS#11 module that can be had: what the doctor finds, a ceremony, and the handle with a real worker. What
//! runs on one must run on each, but for what the module's profile says that it lacks.
//!
//! `tests/modules/setup.sh` makes the modules; without them the tests fail and say so.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use spp::hsm::{
    Derivation, DeviceKeyOrder, HeldKeyOrder, Hsm, HsmConfig, HsmError, KeepIn, KeyManifest, ModuleProfile, PairOrder,
    PinSource, SupervisorPacing,
};
use spp::keys::{BatchName, KeyKind, SignatureAlgorithm, StoreId};
use spp_testkit::ceremony::CeremonyFile;
use spp_testkit::process::{output, program, tethered};
use spp_testkit::random::scaled;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const USER_PIN: &str = "48291037";
const SO_PIN: &str = "11882299";

/// A module and what it is known to lack.
struct Module {
    profile: &'static str,
    /// Where it is instead of the places that its profile names.
    library: Option<&'static str>,
    make_token: fn(&Place),
    /// Kinds of keys that sign in it.
    signs: &'static [KeyKind],
    /// Kinds of device keys that can be made.
    pairs: &'static [KeyKind],
    /// What the doctor finds missing, all of it.
    lacks: &'static [&'static str],
    /// What works, and fails once in a while.
    fails_at_times: &'static [&'static str],
}

const SOFTHSM: Module = Module {
    profile: "softhsm2",
    library: None,
    make_token: |place| {
        std::fs::create_dir(place.path("hsm/tokens")).unwrap();
        let tokens = place.path("hsm/tokens");
        let conf = format!("directories.tokendir = {}\nobjectstore.backend = file\n", tokens.display());
        std::fs::write(place.path("hsm/softhsm2.conf"), conf).unwrap();
        place.init_token();
    },
    signs: &[KeyKind::P256, KeyKind::P384, KeyKind::Ed25519, KeyKind::Rsa2048, KeyKind::Rsa3072],
    pairs: &[KeyKind::P256, KeyKind::P384, KeyKind::Ed25519, KeyKind::Rsa2048],
    lacks: &[],
    fails_at_times: &[],
};

const KRYOPTIC: Module = Module {
    profile: "kryoptic",
    library: Some("target/modules/libkryoptic_pkcs11.so"),
    make_token: |place| {
        let slot = format!(
            "[[slots]]\nslot = 1\ndbtype = \"sqlite\"\ndbargs = \"{}\"\n",
            place.path("hsm/token.sql").display()
        );
        std::fs::write(place.path("hsm/kryoptic.conf"), slot).unwrap();
        place.init_token();
    },
    signs: &[KeyKind::P256, KeyKind::P384, KeyKind::Rsa2048, KeyKind::Rsa3072],
    pairs: &[KeyKind::P256, KeyKind::P384, KeyKind::Ed25519, KeyKind::Rsa2048],
    lacks: &["sign ed25519"],
    fails_at_times: &[],
};

const OPENCRYPTOKI: Module = Module {
    profile: "opencryptoki",
    library: None,
    make_token: |place| {
        // One token for the whole machine: the script sees to it that it is nobody's.
        let fresh = Path::new(ROOT).join("tests/modules/setup.sh");
        let fresh = Command::new(fresh).arg("--fresh-opencryptoki").output().unwrap();
        assert!(fresh.status.success(), "{}", String::from_utf8_lossy(&fresh.stderr));
        pkcsconf(&["-I", "-c", "3"], &format!("87654321\n{LABEL}\n"));
        pkcsconf(&["-P", "-c", "3", "-S", "87654321", "-n", SO_PIN], "");
        pkcsconf(&["-u", "-c", "3", "-S", SO_PIN, "-n", "73910284"], "");
        pkcsconf(&["-p", "-c", "3", "-U", "73910284", "-n", USER_PIN], "");
        assert!(place.path("hsm").exists());
    },
    signs: &[KeyKind::Rsa2048, KeyKind::Rsa3072],
    pairs: &[KeyKind::Ed25519, KeyKind::Rsa2048],
    lacks: &["derive aes-cmac", "sign p256", "sign p384", "sign ed25519", "pair p256", "pair p384"],
    // A key whose encoding ends with a block of AES comes back unreadable; it is noticed, and another one is made.
    fails_at_times: &["pair rsa-2048", "pair rsa-3072", "pair rsa-4096"],
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

/// A directory with a token in it.
struct Place {
    directory: tempfile::TempDir,
    module: Module,
}

impl Place {
    fn new(module: Module) -> Self {
        let place = Self { directory: spp_testkit::files::temp_dir(), module };
        std::fs::create_dir(place.path("hsm")).unwrap();
        let file = format!("{}.toml", place.module.profile);
        let mut profile = std::fs::read_to_string(Path::new(ROOT).join("hsm-config").join(&file)).unwrap();
        if let Some(library) = place.module.library {
            let library = Path::new(ROOT).join(library);
            assert!(library.exists(), "{} is missing: run tests/modules/setup.sh", library.display());
            profile = profile.replace("library = [", &format!("library = [\"{}\",", library.display()));
        }
        std::fs::write(place.path("module.toml"), profile).unwrap();
        for (name, pin) in [("user.pin", USER_PIN), ("so.pin", SO_PIN)] {
            std::fs::write(place.path(name), pin).unwrap();
            std::fs::set_permissions(place.path(name), std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        let hsm = format!(
            "module = \"module.toml\"\ndirectory = \"hsm\"\ntoken_label = \"{LABEL}\"\npin_file = \"user.pin\"\n"
        );
        std::fs::write(place.path("hsm.toml"), hsm).unwrap();
        (place.module.make_token)(&place);
        place
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
            let mut command = tethered(program("sppctl"));
            command.args(words.split_whitespace()).current_dir(self.directory.path());
            output(command)
        }
    }

    fn sppctl(&self, words: &str) -> String {
        let output = self.try_sppctl(words);
        assert!(output.status.success(), "sppctl {words}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// A key of every kind that signs, and master keys.
    fn ceremony(&self) -> KeyManifest {
        let mut file = CeremonyFile::new();
        for kind in self.module.signs {
            let kind = kind.to_string();
            file = file.signing_key(&format!("sign-{kind}"), &kind, "self-signed", &format!("CA {kind}"));
        }
        if self.module.signs.contains(&KeyKind::Ed25519) {
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
            .filter(|prf| !self.module.lacks.contains(&format!("derive {prf}").as_str()))
            .collect()
    }

    fn config(&self, keys: KeyManifest) -> HsmConfig {
        HsmConfig {
            name: "main".to_owned(),
            module: ModuleProfile::load(&self.path("module.toml"), &self.path("hsm")).unwrap(),
            pin: PinSource::File(self.path("user.pin")),
            pin_keeper: None,
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

/// Makes a pair, delivers it twice, moves it to another batch, and delivers it from there.
async fn pair_of(hsm: &Hsm, kind: KeyKind) {
    let order =
        DeviceKeyOrder { pair: Some(PairOrder::Make(kind, batch(1).key())), derivations: Vec::new(), random: 16 };
    let made = hsm.device_keys(&order).await.unwrap();
    assert_eq!(made.random.len(), 16);
    let pair = made.pair.unwrap();
    let algorithm = SignatureAlgorithm::default_for(kind);
    let signature = pair.private.sign(algorithm, b"works").unwrap();
    pair.private.public().verify(algorithm, b"works", &signature).unwrap();
    let public = pair.private.public().clone();
    let held = async |kept: spp::keys::StoredKey| {
        let order = HeldKeyOrder { pair: Some((public.clone(), kept)), derivations: Vec::new() };
        hsm.held_keys(&order).await.unwrap().pair.unwrap().secrets()[0].expose().clone()
    };
    let secret = pair.private.secrets()[0].expose().clone();
    assert_eq!(held(pair.kept.clone()).await, secret, "{kind}");
    let spp::keys::StoredKey::Wrapped(wrapped) = pair.kept else { panic!("{kind} is not wrapped") };
    let moved = hsm.move_keys(batch(1), batch(2), vec![(kind, wrapped.blob)]).await.unwrap().remove(0);
    let wrapped = spp::keys::WrappedKey { wrapping_key: batch(2).key(), blob: moved };
    assert_eq!(held(spp::keys::StoredKey::Wrapped(wrapped)).await, secret, "{kind} after its move");
}

async fn conforms(module: Module) {
    let place = Place::new(module);
    // The doctor: everything is measured, and what is missing is what is known to be.
    let skipped = scaled(" --skip rsa-3072 --skip rsa-4096", "");
    let examined = place.try_sppctl(&format!("hsm check --hsm hsm.toml --json{skipped}"));
    let told: serde_json::Value = serde_json::from_slice(&examined.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&examined.stderr)));
    let findings = told["examination"]["findings"].as_array().unwrap();
    let troubled = findings.iter().filter(|finding| !finding["trouble"].is_null());
    let found = troubled.map(|finding| finding["what"].as_str().unwrap());
    let found: BTreeSet<_> = found.filter(|what| !place.module.fails_at_times.contains(what)).collect();
    assert_eq!(found, place.module.lacks.iter().copied().collect(), "{told:#}");
    assert!(place.module.lacks.is_empty() || !examined.status.success());

    let keys = place.ceremony();
    assert_eq!(keys.signing.len(), place.module.signs.len());
    // It serves: every signing key has signed and fits its register, every master key has its check value.
    let hsm = Hsm::start(place.config(keys.clone()));
    hsm.ready(Duration::from_secs(60)).await.unwrap();
    for number in [1, 2] {
        hsm.create_batch_key(batch(number)).await.unwrap();
        hsm.create_batch_key(batch(number)).await.unwrap();
    }
    for kind in place.module.pairs {
        pair_of(&hsm, *kind).await;
    }
    let made =
        hsm.make_pairs(place.module.pairs[0], KeepIn::Wrapped(batch(1)), 3, Duration::from_secs(30)).await.unwrap();
    assert_eq!(made.len(), 3);
    let prfs = place.prfs();
    let before: Vec<_> = {
        let mut keys = Vec::new();
        for prf in &prfs {
            keys.push(derived(&hsm, prf, 1).await);
            assert_ne!(keys.last().unwrap(), &derived(&hsm, prf, 2).await);
        }
        keys
    };
    // What is destroyed is gone, and what was wrapped under it with it.
    hsm.destroy_batch_key(batch(2)).await.unwrap();
    hsm.destroy_batch_key(batch(2)).await.unwrap();
    let order = DeviceKeyOrder {
        pair: Some(PairOrder::Make(place.module.pairs[0], batch(2).key())),
        derivations: Vec::new(),
        random: 1,
    };
    let gone = hsm.device_keys(&order).await.err();
    assert!(matches!(gone, Some(HsmError::Absent(_))), "{gone:?}");
    assert!(hsm.own_objects().await.unwrap().keys.contains(&batch(1)));
    let statistics = hsm.status().members[0].calls.clone();
    assert!(statistics.iter().any(|one| one.verb == "generate_pair" && one.outcome == "ok" && one.count > 0));

    // Another worker, and the same keys come out of it. A loaded module may be in one process alone.
    drop(hsm);
    let hsm = Hsm::start(place.config(keys));
    hsm.ready(Duration::from_secs(60)).await.unwrap();
    for (prf, before) in prfs.iter().zip(before) {
        assert_eq!(derived(&hsm, prf, 1).await, before, "{prf}");
    }
    pair_of_one_batch(&hsm, place.module.pairs[0]).await;
    hsm.destroy_batch_key(batch(1)).await.unwrap();
}

/// After a restart, with a batch key that an earlier worker made.
async fn pair_of_one_batch(hsm: &Hsm, kind: KeyKind) {
    let order =
        DeviceKeyOrder { pair: Some(PairOrder::Make(kind, batch(1).key())), derivations: Vec::new(), random: 1 };
    hsm.device_keys(&order).await.unwrap().pair.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn softhsm() {
    conforms(SOFTHSM).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kryoptic_with_its_own_key_derivation() {
    conforms(KRYOPTIC).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn opencryptokis_software_token() {
    conforms(OPENCRYPTOKI).await;
}

/// Every profile that is shipped is read, whether or not its module is installed.
#[test]
fn every_modules_profile_is_valid() {
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
