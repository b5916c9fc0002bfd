//! `[hsm]` of `sppd.toml`: access to the HSM. Several HSMs with the same keys are a list, `[[hsm]]`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use spp_format::file_format::Faults;

use crate::hsm::{HsmConfig, Hsms, KeyManifest, ModuleProfile, PinSource, SupervisorPacing};

/// `[hsm]` or `[[hsm]]`: one table, or a list of tables.
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

/// The name of a single HSM without `name`.
const DEFAULT_NAME: &str = "main";
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const QUEUE: usize = 1024;
/// Maximum number of HSMs.
const MAX_HSMS: usize = 16;

impl<'de> Deserialize<'de> for HsmShapes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneOrMany)
    }
}

struct OneOrMany;

impl<'de> Visitor<'de> for OneOrMany {
    type Value = HsmShapes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table [hsm], or a list of tables [[hsm]]")
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

/// A table with its name and location: `sppd.toml: hsm`, or `sppd.toml: hsm NAME`.
struct HsmTable<'a> {
    shape: &'a HsmShape,
    name: &'a str,
    place: String,
}

impl HsmShapes {
    fn tables<'a>(&'a self, file: &str, faults: &mut Faults) -> Vec<HsmTable<'a>> {
        let mut all = Vec::new();
        for (number, shape) in self.0.iter().enumerate() {
            let name = shape.name.as_deref().unwrap_or(DEFAULT_NAME);
            let place = if self.0.len() == 1 { format!("{file}: hsm") } else { format!("{file}: hsm {name}") };
            let is_allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            if !(1..=32).contains(&name.len()) || !name.chars().all(is_allowed) {
                faults.add(format!("{place}.name"), "must have 1 to 32 characters of a-z, 0-9 and -");
            }
            if self.0.len() > 1 && shape.name.is_none() {
                let problem = "is required in each of several [[hsm]], so that messages can name the HSM";
                faults.add(format!("{file}: hsm {}.name", number + 1), problem);
            }
            all.push(HsmTable { shape, name, place });
        }
        if all.is_empty() || all.len() > MAX_HSMS {
            faults.add(format!("{file}: hsm"), format!("must occur 1 to {MAX_HSMS} times"));
        }
        all
    }

    /// Path of the key manifest. All HSMs have the same keys, so the first HSM's manifest is used.
    pub(super) fn keys(&self, base: &Path) -> PathBuf {
        self.0.first().map(|first| base.join(&first.keys)).unwrap_or_default()
    }

    /// Validates all tables. Returns the key manifest, which other checks use even if the HSMs have faults, and the HSMs.
    pub(super) fn check(
        &self,
        file: &str,
        base: &Path,
        pin_refused: impl Fn(Option<&str>) -> PathBuf,
        faults: &mut Faults,
    ) -> (Option<KeyManifest>, Option<Hsms>) {
        let (mut members, mut limits, mut keys) = (Vec::new(), None, None);
        for (number, table) in self.tables(file, faults).into_iter().enumerate() {
            let refused = pin_refused((number > 0).then_some(table.name));
            let limits = match limits {
                None => *limits.insert(table.call_limits(faults)),
                Some(limits) => table.inherit_call_limits(limits, faults),
            };
            let manifest = faults.merge(KeyManifest::load(&base.join(&table.shape.keys)));
            if keys.is_none() {
                keys.clone_from(&manifest);
            }
            members.push(table.check(base, manifest, limits, refused, faults));
        }
        for (number, one) in self.0.iter().enumerate() {
            let is_same = |other: &HsmShape| {
                (&other.module, &other.directory, &other.keys) == (&one.module, &one.directory, &one.keys)
            };
            if self.0.iter().take(number).any(is_same) {
                let problem = "two [[hsm]] with the same module, directory and keys are one HSM; change or remove one";
                faults.add(format!("{file}: hsm"), problem);
            }
        }
        let members = members.into_iter().collect::<Option<Vec<_>>>();
        let hsms = members.and_then(|members| faults.note(format!("{file}: hsm"), Hsms::several(members)));
        (keys, hsms)
    }

    /// For each HSM, its name and the path of the file that records a refused PIN.
    pub(super) fn pin_refusals(
        &self,
        file: &str,
        pin_refused: impl Fn(Option<&str>) -> PathBuf,
        faults: &mut Faults,
    ) -> Vec<(String, PathBuf)> {
        let tables = self.tables(file, faults);
        let refusal = |(number, table): (usize, &HsmTable<'_>)| {
            (table.name.to_owned(), pin_refused((number > 0).then_some(table.name)))
        };
        tables.iter().enumerate().map(refusal).collect()
    }

    /// The access to the HSM of this name, or to the first one. `pin_file` replaces the source of the PIN.
    pub(super) fn access(
        mut self,
        file: &str,
        base: &Path,
        name: Option<&str>,
        pin_file: Option<PathBuf>,
        faults: &mut Faults,
    ) -> Option<HsmAccess> {
        if let Some(file) = pin_file.and_then(|file| faults.note("--pin-file", std::path::absolute(file))) {
            for one in &mut self.0 {
                (one.pin_file, one.pin_credential, one.pin) = (Some(file.clone()), None, None);
            }
        }
        let tables = self.tables(file, faults);
        let known = tables.iter().map(|table| table.name).collect::<Vec<_>>().join(", ");
        let is_selected = |table: &&HsmTable<'_>| name.is_none_or(|name| table.name == name);
        let selected = tables.iter().find(is_selected);
        let selected = selected.ok_or_else(|| format!("{file} has no HSM of this name; known: {known}"));
        let table = faults.note("--hsm", selected)?;
        let (module, pin) = table.module_and_pin(base, faults);
        Some(HsmAccess { module: module?, pin: pin?, keys: base.join(&table.shape.keys) })
    }
}

impl HsmTable<'_> {
    /// The call timeout and queue length of the first HSM, which apply to all HSMs. Setting them again is a fault.
    fn inherit_call_limits(&self, limits: (Duration, usize), faults: &mut Faults) -> (Duration, usize) {
        let (shape, place) = (self.shape, &self.place);
        for (key, is_set) in [("call_timeout", shape.call_timeout.is_some()), ("queue", shape.queue.is_some())] {
            if is_set {
                faults.add(format!("{place}.{key}"), "applies to all HSMs; set it only in the first [[hsm]]");
            }
        }
        limits
    }

    /// The call timeout and the queue length.
    fn call_limits(&self, faults: &mut Faults) -> (Duration, usize) {
        let (shape, place) = (self.shape, &self.place);
        let (timeout, queue) = (shape.call_timeout.unwrap_or(CALL_TIMEOUT), shape.queue.unwrap_or(QUEUE));
        if !(1..=100_000).contains(&queue) {
            faults.add(format!("{place}.queue"), "must be from 1 to 100000");
        }
        if !(1..=600).contains(&timeout.as_secs()) {
            faults.add(format!("{place}.call_timeout"), "must be from 1 second to 10 minutes");
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
            let problem = format!("must be shorter than hang_after of the module file ({:?})", module.hang_after);
            faults.add(format!("{}.call_timeout", self.place), problem);
        }
        Some(HsmConfig {
            name: self.name.to_owned(),
            module: module?,
            pin: pin?,
            pin_agent: None,
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
        let module = faults.merge(ModuleProfile::load(&base.join(&shape.module), &directory));
        let place = format!("{}.pin_file", self.place);
        let pin = match (&shape.pin_file, &shape.pin_credential) {
            (Some(file), None) => std::path::absolute(base.join(file)).ok().map(PinSource::File),
            (None, Some(name)) => {
                let directory = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
                let hint = "systemd sets CREDENTIALS_DIRECTORY when the unit has LoadCredential=";
                faults.note(&place, directory.ok_or(hint)).map(|d| PinSource::Credential(d.join(name)))
            }
            (None, None) => match shape.pin.as_deref() {
                Some("prompt") => Some(PinSource::Prompt),
                Some("protected") => Some(PinSource::Protected),
                _ => {
                    faults.add(&place, "set pin_file, pin_credential, or pin = \"prompt\" or \"protected\"");
                    None
                }
            },
            _ => {
                faults.add(&place, "set exactly one of pin_file and pin_credential");
                None
            }
        };
        if shape.pin.is_some() && (shape.pin_file.is_some() || shape.pin_credential.is_some()) {
            faults.add(format!("{}.pin", self.place), "must not be combined with pin_file or pin_credential");
        }
        if let Some(Err(e)) = pin.as_ref().map(PinSource::check) {
            faults.add(&place, e);
        }
        (module, pin)
    }
}

/// The settings that an officer's tool needs to access an HSM. The rest of the configuration need not be valid yet.
pub struct HsmAccess {
    /// The PKCS#11 module.
    pub module: ModuleProfile,
    /// The source of the PIN.
    pub pin: PinSource,
    /// Path of the key manifest, which may not exist yet.
    pub keys: PathBuf,
}
