//! Tests of `hsm` with a real SoftHSM. Each test has its own token and process.
//!
//! The module reads SOFTHSM2_CONF when it is loaded, and can be loaded only once per process. Therefore [`in_module`] starts the
//! test program again for a single test: first to create the token, then to run the test.

mod audit;
mod batches;
mod ceremonies;
mod derivation;
mod login;
mod pairs;
mod wrapping;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, ObjectHandle};
use cryptoki::session::Session;
use spp_format::names::KeyName;

use super::operations::{Shared, TokenOperations};
use super::transport::{TransportKey, TransportReceiver};
use super::wire::KeyOnToken;
use super::{
    Ceremony, CreatedKey, HsmError, KeyRole, ModuleProfile, PinSource, Provenance, TokenIdentity, initialise_token,
};

const USER_PIN: &str = "482910375566";
const SO_PIN: &str = "118822993344";
const LABEL: &str = "spp-test";
/// Environment variables that select the child's stage, creating the token or running the test. The value is the token's
/// directory.
const MAKE_TOKEN: &str = "SPP_TEST_MAKE_TOKEN";
const WORK: &str = "SPP_TEST_WORK";

/// Runs `work` in a process that has loaded the module with a new token.
pub(crate) fn in_module<Work: FnOnce(&TestToken)>(work: Work) {
    if let Some(directory) = std::env::var_os(MAKE_TOKEN) {
        let token = TestToken::new(PathBuf::from(directory));
        initialise_token(&token.profile, LABEL, &token.pin_file("so.pin", SO_PIN), &token.pin()).unwrap();
        token.mark_finished(MAKE_TOKEN);
    } else if let Some(directory) = std::env::var_os(WORK) {
        let token = TestToken::new(PathBuf::from(directory));
        work(&token);
        token.mark_finished(WORK);
    } else {
        let directory = spp_testkit::files::temp_dir();
        let token = TestToken::new(directory.path().to_owned());
        token.write_module_configuration();
        // The type name is `crate::hsm::tests::module::test::{{closure}}`, because the test passes a closure from its body.
        let name = std::any::type_name::<Work>();
        let name = name.split_once("::").unwrap().1.strip_suffix("::{{closure}}").unwrap();
        token.rerun(name, MAKE_TOKEN);
        token.rerun(name, WORK);
    }
}

/// A test token in its directory.
pub(crate) struct TestToken {
    pub(crate) directory: PathBuf,
    profile: ModuleProfile,
}

impl TestToken {
    /// Panics with the installation command if SoftHSM is missing.
    fn new(directory: PathBuf) -> Self {
        let profile = concat!(env!("CARGO_MANIFEST_DIR"), "/hsm-config/softhsm2.toml");
        let profile = ModuleProfile::load(Path::new(profile), &directory).unwrap_or_else(|faults| panic!("{faults}"));
        Self { directory, profile }
    }

    fn write_module_configuration(&self) {
        let tokens = self.directory.join("tokens");
        std::fs::create_dir(&tokens).unwrap();
        let text = format!("directories.tokendir = {}\nobjectstore.backend = file\n", tokens.display());
        std::fs::write(self.directory.join("softhsm2.conf"), text).unwrap();
    }

    fn rerun(&self, test: &str, stage: &str) {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .envs(&self.profile.environment)
            .env(stage, &self.directory)
            .output()
            .unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{stage}: {}\n{out}\n{err}", output.status);
        // A child that finds no test of this name also succeeds.
        assert!(self.directory.join(stage).exists(), "{stage}: {test} did not run\n{out}\n{err}");
    }

    fn mark_finished(&self, stage: &str) {
        std::fs::write(self.directory.join(stage), "").unwrap();
    }

    fn pin_file(&self, name: &str, pin: &str) -> PinSource {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.directory.join(name);
        std::fs::write(&path, pin).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        PinSource::File(path)
    }

    fn pin(&self) -> PinSource {
        self.pin_file("user.pin", USER_PIN)
    }

    fn identity(&self) -> TokenIdentity {
        TokenIdentity { label: LABEL.to_owned(), serial: String::new() }
    }

    /// Opens the token. Possible once per process.
    pub(crate) fn open(&self) -> Ceremony {
        Ceremony::open(&self.profile, &self.identity(), &self.pin()).unwrap()
    }

    /// A worker thread's session that expects these keys.
    fn operations(&self, ceremony: &Ceremony, keys: KeyMap, transport_key: Option<ObjectHandle>) -> TokenOperations {
        let shared = Shared::single_threaded(&self.profile, keys);
        TokenOperations::new(ceremony.token.session().unwrap(), shared, transport_key)
    }

    /// A worker thread's session with a transport key, created as by the worker and the handle.
    fn operations_with_transport(&self, ceremony: &Ceremony, keys: KeyMap) -> (TokenOperations, TransportKey) {
        let mut operations = self.operations(ceremony, keys, None);
        let receiver = TransportReceiver::generate().unwrap();
        let (_, wrapped) = operations.make_transport_key(&receiver.public_copy()).unwrap();
        (operations, receiver.open(self.profile.oaep_hash, self.profile.wrap, &wrapped).unwrap())
    }
}

/// Creates a wrapping key with a test-specific name.
fn create_wrapping_key(ceremony: &Ceremony, name: &KeyName) -> Result<CreatedKey, HsmError> {
    ceremony.create_secret(name, KeyRole::Wrapping, &Mechanism::AesKeyGen)
}

type KeyMap = BTreeMap<KeyName, KeyOnToken>;

fn key_map<'a>(keys: impl IntoIterator<Item = (&'a CreatedKey, KeyRole)>) -> KeyMap {
    keys.into_iter()
        .map(|(key, role)| (key.name.clone(), KeyOnToken { id: key.id.clone(), role, provenance: Provenance::Made }))
        .collect()
}

fn name(text: &str) -> KeyName {
    text.parse().unwrap()
}

/// Number of session objects of this process, and number of token objects.
fn object_counts(session: &Session) -> (usize, usize) {
    let count = |token| session.find_objects(&[Attribute::Token(token)]).unwrap().len();
    (count(false), count(true))
}
