//! `[hsm]` of `sppd.toml`: how the HSM is reached, or several with the same keys as a list, `[[hsm]]`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::daemon::{base_of, read_shape};
use super::{Faults, store};
use crate::hsm::{HsmConfig, Hsms, KeyManifest, ModuleProfile, PinSource, SupervisorPacing};

/// One table, or a list of them.
pub(super) struct HsmShapes(Vec<HsmShape>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HsmShape {
    name: Option<String>,
    module: PathBuf,
    #[serde(default)]
    directory: PathBuf,
    pin_file: Option<PathBuf>,
    pin_credential: Option<String>,
    pin: Option<String>,
    keys: PathBuf,
    #[serde(default, with = "humantime_serde")]
    call_timeout: Option<Duration>,
    queue: Option<usize>,
}

/// What the only HSM is called where nobody gave it a name.
const NAME: &str = "main";
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const QUEUE: usize = 1024;
/// More of them are no better.
const MOST: usize = 16;

impl<'de> Deserialize<'de> for HsmShapes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneOrMany)
    }
}

struct OneOrMany;

impl<'de> Visitor<'de> for OneOrMany {
    type Value = HsmShapes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table [hsm], or one [[hsm]] for each of several")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<HsmShapes, A::Error> {
        HsmShape::deserialize(MapAccessDeserializer::new(map)).map(|one| HsmShapes(vec![one]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<HsmShapes, A::Error> {
        let mut all = Vec::new();
        while let Some(one) = list.next_element()? {
            all.push(one);
        }
        Ok(HsmShapes(all))
    }
}

/// A table and where it is: `sppd.toml: hsm`, or `sppd.toml: hsm NAME`.
struct Placed<'a> {
    shape: &'a HsmShape,
    name: &'a str,
    at: String,
}

impl HsmShapes {
    fn placed<'a>(&'a self, place: &str, faults: &mut Faults) -> Vec<Placed<'a>> {
        let mut all = Vec::new();
        for (number, shape) in self.0.iter().enumerate() {
            let name = shape.name.as_deref().unwrap_or(NAME);
            let at = if self.0.len() == 1 { format!("{place}: hsm") } else { format!("{place}: hsm {name}") };
            let simple = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            if !(1..=32).contains(&name.len()) || !name.chars().all(simple) {
                faults.add(format!("{at}.name"), "must have 1 to 32 of a-z, 0-9 and -");
            }
            if self.0.len() > 1 && shape.name.is_none() {
                let problem = "must be there in each of several [[hsm]], so that messages can say which one is meant";
                faults.add(format!("{place}: hsm {}.name", number + 1), problem);
            }
            all.push(Placed { shape, name, at });
        }
        if all.is_empty() || all.len() > MOST {
            faults.add(format!("{place}: hsm"), format!("must be there 1 to {MOST} times"));
        }
        all
    }

    /// Where the register of keys is: every HSM's has the same keys.
    pub(super) fn keys(&self, base: &Path) -> PathBuf {
        self.0.first().map(|first| base.join(&first.keys)).unwrap_or_default()
    }

    /// The keys, which profiles and certificates are held against even if something else is wrong; and the HSMs.
    pub(super) fn check(
        &self,
        place: &str,
        base: &Path,
        pin_refused: impl Fn(Option<&str>) -> PathBuf,
        faults: &mut Faults,
    ) -> (Option<KeyManifest>, Option<Hsms>) {
        let (mut members, mut call, mut keys) = (Vec::new(), None, None);
        for (number, placed) in self.placed(place, faults).into_iter().enumerate() {
            let refused = pin_refused((number > 0).then_some(placed.name));
            let call = match call {
                None => *call.insert(placed.call(faults)),
                Some(call) => placed.same_call(call, faults),
            };
            let register = faults.keep(KeyManifest::load(&base.join(&placed.shape.keys)));
            if keys.is_none() {
                keys.clone_from(&register);
            }
            members.push(placed.check(base, register, call, refused, faults));
        }
        for (number, one) in self.0.iter().enumerate() {
            let same = |other: &HsmShape| {
                (&other.module, &other.directory, &other.keys) == (&one.module, &one.directory, &one.keys)
            };
            if self.0.iter().take(number).any(same) {
                let problem = "two [[hsm]] with the same module, directory and keys are one HSM; give each its own";
                faults.add(format!("{place}: hsm"), problem);
            }
        }
        let members = members.into_iter().collect::<Option<Vec<_>>>();
        let hsms = members.and_then(|members| faults.note(format!("{place}: hsm"), Hsms::several(members)));
        (keys, hsms)
    }
}

impl Placed<'_> {
    /// Of the others: how long a call may take and how many may wait is said once, for all HSMs together.
    fn same_call(&self, call: (Duration, usize), faults: &mut Faults) -> (Duration, usize) {
        let (shape, at) = (self.shape, &self.at);
        for (key, there) in [("call_timeout", shape.call_timeout.is_some()), ("queue", shape.queue.is_some())] {
            if there {
                faults.add(format!("{at}.{key}"), "holds for all HSMs together; give it in the first [[hsm]] alone");
            }
        }
        call
    }

    /// How long a call may take and how many may wait.
    fn call(&self, faults: &mut Faults) -> (Duration, usize) {
        let (shape, at) = (self.shape, &self.at);
        let (timeout, queue) = (shape.call_timeout.unwrap_or(CALL_TIMEOUT), shape.queue.unwrap_or(QUEUE));
        if !(1..=100_000).contains(&queue) {
            faults.add(format!("{at}.queue"), "must be from 1 to 100000");
        }
        if !(1..=600).contains(&timeout.as_secs()) {
            faults.add(format!("{at}.call_timeout"), "must be from 1 second to 10 minutes");
        }
        (timeout, queue)
    }

    fn check(
        &self,
        base: &Path,
        keys: Option<KeyManifest>,
        (call_timeout, queue): (Duration, usize),
        pin_refused: PathBuf,
        faults: &mut Faults,
    ) -> Option<HsmConfig> {
        let (module, pin) = self.module_and_pin(base, faults);
        if let Some(module) = &module
            && module.hang_after <= call_timeout
        {
            let problem = format!("must be shorter than hang_after of the module's file ({:?})", module.hang_after);
            faults.add(format!("{}.call_timeout", self.at), problem);
        }
        Some(HsmConfig {
            name: self.name.to_owned(),
            module: module?,
            pin: pin?,
            pin_keeper: None,
            pin_refused,
            keys: keys?,
            call_timeout,
            queue,
            worker_program: PathBuf::from("/proc/self/exe"),
            pacing: SupervisorPacing::default(),
        })
    }

    fn module_and_pin(&self, base: &Path, faults: &mut Faults) -> (Option<ModuleProfile>, Option<PinSource>) {
        let shape = self.shape;
        let directory = base.join(&shape.directory);
        let directory = std::path::absolute(&directory).unwrap_or(directory);
        let module = faults.keep(ModuleProfile::load(&base.join(&shape.module), &directory));
        let at = format!("{}.pin_file", self.at);
        let pin = match (&shape.pin_file, &shape.pin_credential) {
            (Some(file), None) => std::path::absolute(base.join(file)).ok().map(PinSource::File),
            (None, Some(name)) => {
                let directory = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
                let hint = "systemd sets CREDENTIALS_DIRECTORY when the unit has LoadCredential=";
                faults.note(&at, directory.ok_or(hint)).map(|d| PinSource::Credential(d.join(name)))
            }
            (None, None) => match shape.pin.as_deref() {
                Some("prompt") => Some(PinSource::Prompt),
                Some("protected") => Some(PinSource::Protected),
                _ => {
                    faults.add(&at, "give pin_file, pin_credential, or pin = \"prompt\" or \"protected\"");
                    None
                }
            },
            _ => {
                faults.add(&at, "give exactly one of pin_file and pin_credential");
                None
            }
        };
        if shape.pin.is_some() && (shape.pin_file.is_some() || shape.pin_credential.is_some()) {
            faults.add(format!("{}.pin", self.at), "must not be there beside pin_file or pin_credential");
        }
        if let Some(Err(e)) = pin.as_ref().map(PinSource::check) {
            faults.add(&at, e);
        }
        (module, pin)
    }
}

/// Where it is remembered of each HSM that it refused the PIN, by name.
pub fn pin_refusals(path: &Path) -> Result<Vec<(String, PathBuf)>, Faults> {
    let place = path.display().to_string();
    let mut faults = Faults::default();
    let refusals = read_shape(path, &place, &mut faults).map(|shape| {
        let store = store::check(&shape.store, &place, base_of(path), &mut faults);
        let all = shape.hsm.placed(&place, &mut faults);
        let one = |(number, placed): (usize, &Placed<'_>)| {
            (placed.name.to_owned(), store.pin_refused((number > 0).then_some(placed.name)))
        };
        all.iter().enumerate().map(one).collect()
    });
    faults.ok_or_all(refusals)
}

/// The part of the configuration that an officer's tool needs to reach an HSM, without the rest being valid yet.
pub struct HsmAccess {
    /// The module.
    pub module: ModuleProfile,
    /// Where the PIN is.
    pub pin: PinSource,
    /// Where the register of keys is, or will be.
    pub keys: PathBuf,
}

impl HsmAccess {
    /// Reads `[hsm]` of `sppd.toml`, of several the one of that name, or the first. An officer's PIN file takes the place of the
    /// daemon's, which may be a credential that only the daemon is shown.
    pub fn load(path: &Path, name: Option<&str>, pin_file: Option<PathBuf>) -> Result<Self, Faults> {
        let place = path.display().to_string();
        let mut faults = Faults::default();
        let shape = read_shape(path, &place, &mut faults);
        let base = base_of(path);
        let access = shape.and_then(|mut shape| {
            if let Some(file) = pin_file.and_then(|file| faults.note("--pin-file", std::path::absolute(file))) {
                for one in &mut shape.hsm.0 {
                    (one.pin_file, one.pin_credential, one.pin) = (Some(file.clone()), None, None);
                }
            }
            let all = shape.hsm.placed(&place, &mut faults);
            let known = all.iter().map(|placed| placed.name).collect::<Vec<_>>().join(", ");
            let wanted = |placed: &&Placed<'_>| name.is_none_or(|name| placed.name == name);
            let found = all.iter().find(wanted).ok_or_else(|| format!("{place} has none of that name; it has {known}"));
            let placed = faults.note("--hsm", found)?;
            let (module, pin) = placed.module_and_pin(base, &mut faults);
            Some(Self { module: module?, pin: pin?, keys: base.join(&placed.shape.keys) })
        });
        faults.ok_or_all(access)
    }
}
