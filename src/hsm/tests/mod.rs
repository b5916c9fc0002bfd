//! This room on a real SoftHSM, each test with a token and a process of its own.
//!
//! The module reads SOFTHSM2_CONF when it is loaded, and may be loaded once in a process. So [`in_module`] starts the
//! test's own program again for this one test, first to make the token, then to do the work.

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

use super::operations::{Shared, TokenOperations};
use super::transport::{TransportKey, TransportReceiver};
use super::wire::KeyOnToken;
use super::{
    Ceremony, CreatedKey, HsmError, KeyRole, ModuleProfile, PinSource, Provenance, TokenIdentity, initialise_token,
};
use crate::names::KeyName;

const USER_PIN: &str = "482910375566";
const SO_PIN: &str = "118822993344";
const LABEL: &str = "spp-test";
/// Set for the child that makes the token, and for the one that does the work: the directory of the token.
const MAKE_TOKEN: &str = "SPP_TEST_MAKE_TOKEN";
const WORK: &str = "SPP_TEST_WORK";

/// Does the work in a process that has a module with a fresh token.
pub(crate) fn in_module<Work: FnOnce(&Place)>(work: Work) {
    if let Some(directory) = std::env::var_os(MAKE_TOKEN) {
        let place = Place::new(PathBuf::from(directory));
        initialise_token(&place.profile, LABEL, &place.pin_file("so.pin", SO_PIN), &place.pin()).unwrap();
        place.tell_end_of(MAKE_TOKEN);
    } else if let Some(directory) = std::env::var_os(WORK) {
        let place = Place::new(PathBuf::from(directory));
        work(&place);
        place.tell_end_of(WORK);
    } else {
        let directory = spp_testkit::files::temp_dir();
        let place = Place::new(directory.path().to_owned());
        place.write_module_configuration();
        // `crate::hsm::tests::room::test::{{closure}}`: the test calls this from its own body.
        let name = std::any::type_name::<Work>();
        let name = name.split_once("::").unwrap().1.strip_suffix("::{{closure}}").unwrap();
        place.run_again(name, MAKE_TOKEN);
        place.run_again(name, WORK);
    }
}

/// A token's directory.
pub(crate) struct Place {
    pub(crate) directory: PathBuf,
    profile: ModuleProfile,
}

impl Place {
    /// A missing SoftHSM ends here, with the command that installs it.
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

    fn run_again(&self, test: &str, stage: &str) {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .envs(&self.profile.environment)
            .env(stage, &self.directory)
            .output()
            .unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{stage}: {}\n{out}\n{err}", output.status);
        // A child that found no test of this name would succeed too.
        assert!(self.directory.join(stage).exists(), "{stage}: {test} did not run\n{out}\n{err}");
    }

    fn tell_end_of(&self, stage: &str) {
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

    fn token(&self) -> TokenIdentity {
        TokenIdentity { label: LABEL.to_owned(), serial: String::new() }
    }

    /// Once in a process.
    pub(crate) fn open(&self) -> Ceremony {
        Ceremony::open(&self.profile, &self.token(), &self.pin()).unwrap()
    }

    /// A worker thread's session with these keys in its register.
    fn verbs(&self, ceremony: &Ceremony, keys: Register, transport_key: Option<ObjectHandle>) -> TokenOperations {
        let shared = Shared::alone(&self.profile, keys);
        TokenOperations::new(ceremony.token.session().unwrap(), shared, transport_key)
    }

    /// The same with a transport key, as the worker and the handle make it together.
    fn operations_with_transport(&self, ceremony: &Ceremony, keys: Register) -> (TokenOperations, TransportKey) {
        let mut verbs = self.verbs(ceremony, keys, None);
        let receiver = TransportReceiver::generate().unwrap();
        let (_, wrapped) = verbs.make_transport_key(&receiver.public_copy()).unwrap();
        (verbs, receiver.open(self.profile.oaep_hash, self.profile.wrap, &wrapped).unwrap())
    }
}

/// A wrapping key with a name of the test's own.
fn create_wrapping_key(ceremony: &Ceremony, name: &KeyName) -> Result<CreatedKey, HsmError> {
    ceremony.create_secret(name, KeyRole::Wrapping, &Mechanism::AesKeyGen)
}

type Register = BTreeMap<KeyName, KeyOnToken>;

fn register<'a>(keys: impl IntoIterator<Item = (&'a CreatedKey, KeyRole)>) -> Register {
    keys.into_iter()
        .map(|(key, role)| (key.name.clone(), KeyOnToken { id: key.id.clone(), role, provenance: Provenance::Made }))
        .collect()
}

fn name(text: &str) -> KeyName {
    text.parse().unwrap()
}

/// Objects of all sessions of this process, and those of the token.
fn object_counts(session: &Session) -> (usize, usize) {
    let count = |token| session.find_objects(&[Attribute::Token(token)]).unwrap().len();
    (count(false), count(true))
}
