//! The profile of a PKCS#11 module (`hsm-config/*.toml`): path, mechanisms and quirks as data, so that the code contains no
//! vendor specifics.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use spp_format::file_format::{Faults, read_toml};
use spp_format::keys::KeyType;

use super::failure_class::FailureClass;
use super::token_file_backup::TokenFileBackup;

/// The validated profile of a PKCS#11 module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleProfile {
    /// The module's display name.
    pub name: String,
    /// The shared library.
    pub library: PathBuf,
    /// Number of threads for line calls, each with its own session.
    pub threads: usize,
    /// Number of additional threads for background work: filling pools, rewrapping batches.
    pub background_threads: usize,
    /// The nice value of the background threads: 19, the lowest priority, by default; 0 leaves the priority unchanged.
    pub background_nice: u8,
    /// Whether the token's label and serial number cannot be read. The module must then have only one token, identified by its
    /// keys.
    pub one_nameless_token: bool,
    /// The key derivation route.
    pub kdf: KdfRoute,
    /// The mechanism that wraps private keys.
    pub wrap: WrapMechanism,
    /// Whether C_UnwrapKey always makes keys extractable and refuses CKA_EXTRACTABLE in its template.
    pub unwraps_extractable: bool,
    /// Whether the module has CKM_RSA_PKCS but not CKM_SHA256_RSA_PKCS: then the worker computes the hash.
    pub rsa_without_hash: bool,
    /// The hash of RSA-OAEP when the transport key leaves the HSM.
    pub oaep_hash: OaepHash,
    /// Key types whose private keys the module cannot wrap.
    pub unwrappable: Vec<KeyType>,
    /// Whether the module lacks CKA_COPYABLE (new in PKCS#11 v2.40).
    pub no_copyable: bool,
    /// Whether creating and destroying token objects must exclude lookups.
    pub exclusive_changes: bool,
    /// Environment of the worker process, set before the module is loaded.
    pub environment: BTreeMap<String, String>,
    /// A directory to sync after token objects change, because the module does not sync it.
    pub sync_directory: Option<PathBuf>,
    /// Maximum number of key pairs stored as token objects; 0 if none.
    pub token_pairs: u64,
    /// A file to back up, because the module rewrites it in place, for example at each login, and a kill would destroy it.
    pub guarded_file: Option<TokenFileBackup>,
    /// Return values whose failure class differs from the standard's, by name.
    pub failures: BTreeMap<String, FailureClass>,
    /// A session idle for this long is used once, so that the module closes neither the session nor the login.
    pub keep_alive: std::time::Duration,
    /// The worker is replaced after this number of operations; 0 = never.
    pub recycle_after_operations: u64,
    /// A worker that has not answered a call for this long is killed.
    pub hang_after: std::time::Duration,
}

/// The mechanism that wraps key pairs in this module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WrapMechanism {
    /// CKM_AES_KEY_WRAP_PAD (0x210A), where the module implements it as RFC 5649.
    AesKeyWrapPad,
    /// CKM_AES_GCM with a random 12-byte IV before the ciphertext and a 16-byte tag after it.
    AesGcm,
    /// CKM_AES_CBC_PAD with a random IV before the ciphertext, for modules without an authenticated mechanism. Tampering with a
    /// pair is detected only by comparison with its public key.
    AesCbcPad,
}

/// The hash of RSA-OAEP and of its MGF1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OaepHash {
    /// SHA-1: collisions do not matter in OAEP (RFC 8017 §7.1), and some modules support nothing else.
    #[serde(rename = "sha-1")]
    Sha1,
    /// SHA-256.
    #[serde(rename = "sha-256")]
    Sha256,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shape {
    name: String,
    library: Vec<PathBuf>,
    sessions: SessionsShape,
    kdf: KdfShape,
    wrap: WrapShape,
    #[serde(default)]
    sign: SignShape,
    #[serde(default)]
    one_nameless_token: bool,
    #[serde(default)]
    objects: ObjectsShape,
    #[serde(default)]
    environment: BTreeMap<String, String>,
    #[serde(default)]
    failures: BTreeMap<String, FailureClass>,
    #[serde(default)]
    worker: WorkerShape,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SessionsShape {
    threads: ThreadsShape,
    #[serde(default = "one_thread")]
    background_threads: ThreadsShape,
    #[serde(default = "lowest_priority")]
    background_nice: u8,
    #[serde(default = "default_keep_alive", with = "humantime_serde")]
    keep_alive: std::time::Duration,
}

const fn default_keep_alive() -> std::time::Duration {
    std::time::Duration::from_secs(15)
}

const fn lowest_priority() -> u8 {
    19
}

const fn one_thread() -> ThreadsShape {
    ThreadsShape::Number(1)
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ThreadsShape {
    Number(usize),
    Word(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KdfShape {
    route: KdfRoute,
}

/// The implementation of the KDF (SP 800-108r1 §4.1). Both routes give the same bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum KdfRoute {
    /// The worker computes the counter mode, with C_Sign of the master key as the PRF.
    #[serde(rename = "prf")]
    Prf,
    /// CKM_SP800_108_COUNTER_KDF (PKCS#11 v3.0 §6.41).
    #[serde(rename = "sp800-108-counter")]
    Sp800108Counter,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrapShape {
    mechanism: WrapMechanism,
    #[serde(default)]
    unwraps_extractable: bool,
    oaep_hash: OaepHash,
    #[serde(default)]
    unwrappable: Vec<KeyType>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct SignShape {
    rsa_without_hash: bool,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct ObjectsShape {
    exclusive_changes: bool,
    no_copyable: bool,
    sync_directory: Option<String>,
    token_pairs: u64,
    guarded_file: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WorkerShape {
    recycle_after_operations: u64,
    #[serde(with = "humantime_serde")]
    hang_after: std::time::Duration,
}

impl Default for WorkerShape {
    fn default() -> Self {
        Self { recycle_after_operations: 0, hang_after: std::time::Duration::from_secs(30) }
    }
}

impl ModuleProfile {
    /// Reads the file and replaces `{directory}` in its environment and paths with `directory`.
    pub fn load(path: &Path, directory: &Path) -> Result<Self, Faults> {
        let place = path.display().to_string();
        let mut faults = Faults::default();
        let text = faults.note(&place, std::fs::read_to_string(path)).unwrap_or_default();
        let shape: Option<Shape> = if faults.is_empty() { read_toml(&place, &text, &mut faults) } else { None };
        let profile = shape.map(|shape| Self::check(shape, &place, directory, &mut faults));
        faults.into_result(profile)
    }

    /// Backs up or restores the files that the module rewrites in place. Called before the module is loaded.
    pub(super) fn restore_files(&self) -> std::io::Result<()> {
        self.guarded_file.as_ref().map_or(Ok(()), TokenFileBackup::restore)
    }

    /// Ensures that this process has the module's environment; if not, executes the program again with it. Only for an officer's
    /// tool, at its start; the daemon sets the environment of its worker instead.
    pub fn enter_environment(&self) -> std::io::Result<()> {
        use std::os::unix::process::CommandExt as _;
        if self.environment.iter().all(|(name, value)| std::env::var(name).as_deref() == Ok(value)) {
            return Ok(());
        }
        Err(std::process::Command::new("/proc/self/exe")
            .args(std::env::args_os().skip(1))
            .envs(&self.environment)
            .exec())
    }

    fn check(shape: Shape, place: &str, directory: &Path, faults: &mut Faults) -> Self {
        let expand = |text: String| text.replace("{directory}", &directory.display().to_string());
        let library = shape.library.iter().find(|path| path.exists()).cloned();
        if library.is_none() {
            let searched: Vec<_> = shape.library.iter().map(|p| p.display().to_string()).collect();
            faults.add(
                format!("{place}: library"),
                format!(
                    "{} is not installed: none of {} exists. For SoftHSM run: softhsm-setup/setup.sh --install-only",
                    shape.name,
                    searched.join(", ")
                ),
            );
        }
        let mut threads = |name: &str, shape: ThreadsShape| match shape {
            ThreadsShape::Number(n) if (1..=256).contains(&n) => n,
            ThreadsShape::Word(word) if word == "cores" => std::thread::available_parallelism().map_or(1, usize::from),
            _ => {
                faults.add(format!("{place}: sessions.{name}"), "must be \"cores\" or a number from 1 to 256");
                1
            }
        };
        let (background_threads, threads) = (
            threads("background_threads", shape.sessions.background_threads),
            threads("threads", shape.sessions.threads),
        );
        if shape.sessions.background_nice > 19 {
            faults.add(format!("{place}: sessions.background_nice"), "must be from 0 to 19");
        }
        if !(1..=3600).contains(&shape.sessions.keep_alive.as_secs()) {
            faults.add(format!("{place}: sessions.keep_alive"), "must be from 1 second to 1 hour");
        }
        for name in shape.failures.keys().filter(|name| !name.starts_with("CKR_")) {
            let problem = "must be CKR_ and the name of the standard, or a vendor's number as CKR_0x80000001";
            faults.add(format!("{place}: failures.{name}"), problem);
        }
        let guarded_file = shape.objects.guarded_file.map(expand).and_then(|pattern| {
            let problem = "must be a directory, /*/ and a file name, for example {directory}/tokens/*/token.object";
            faults.note(format!("{place}: objects.guarded_file"), TokenFileBackup::parse(&pattern).ok_or(problem))
        });
        Self {
            name: shape.name,
            library: library.unwrap_or_default(),
            threads,
            background_threads,
            background_nice: shape.sessions.background_nice,
            one_nameless_token: shape.one_nameless_token,
            kdf: shape.kdf.route,
            wrap: shape.wrap.mechanism,
            unwraps_extractable: shape.wrap.unwraps_extractable,
            rsa_without_hash: shape.sign.rsa_without_hash,
            oaep_hash: shape.wrap.oaep_hash,
            unwrappable: shape.wrap.unwrappable,
            exclusive_changes: shape.objects.exclusive_changes,
            no_copyable: shape.objects.no_copyable,
            environment: shape.environment.into_iter().map(|(k, v)| (k, expand(v))).collect(),
            guarded_file,
            sync_directory: shape.objects.sync_directory.map(|text| PathBuf::from(expand(text))),
            token_pairs: shape.objects.token_pairs,
            failures: shape.failures,
            keep_alive: shape.sessions.keep_alive,
            recycle_after_operations: shape.worker.recycle_after_operations,
            hang_after: shape.worker.hang_after,
        }
    }
}
