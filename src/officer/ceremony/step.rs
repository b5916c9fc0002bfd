//! The steps of a ceremony, and the state that their checks and their execution use.

use std::path::{Path, PathBuf};

use serde::Serialize;
use spp_format::file_format::Faults;
use spp_format::names::KeyName;

use super::proof::{prove, unknown_key};
use crate::hsm::{Ceremony, CreatedKey, KeyManifest, ModuleProfile};
use crate::officer::OfficerError;
use crate::officer::files::replace;
use crate::officer::transcript::Transcript;

/// One step of a ceremony.
pub(super) trait Step {
    /// Name of the token object that the step creates.
    fn created_key(&self) -> Option<&KeyName> {
        None
    }

    /// Whether the created key can issue certificates at once: a root that has its own certificate.
    fn creates_issuer(&self) -> bool {
        false
    }

    /// Name of the key that the step destroys.
    fn destroyed_key(&self) -> Option<&KeyName> {
        None
    }

    /// Files that the step writes, relative to the directory of keys.toml.
    fn files(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Why the step needs the approval of a second officer. Without a manifest, only reasons that do not depend on it.
    fn needs_approval(&self, _manifest: Option<&KeyManifest>) -> Option<&'static str> {
        None
    }

    /// Whether the step can need an approval, depending on the manifest.
    fn may_need_approval(&self) -> bool {
        self.needs_approval(None).is_some()
    }

    /// Describes the step for a plan, in more detail with a manifest.
    fn describe(&self, manifest: Option<&KeyManifest>) -> PlannedStep;

    /// Reports everything that would make the step fail. Changes nothing.
    fn preflight(&self, context: &PreflightContext<'_>, faults: &mut Faults) -> Result<(), OfficerError>;

    /// Executes the step.
    fn execute(&self, run: &mut CeremonyRun<'_>) -> Result<(), OfficerError>;
}

/// Description of one step in a plan.
#[derive(Debug, Serialize)]
pub struct PlannedStep {
    /// Action, for example `make` or `destroy`.
    pub act: &'static str,
    /// Key name.
    pub name: KeyName,
    /// Key type or pseudorandom function, if known.
    pub kind: String,
    /// Purpose and further details.
    pub what: String,
    /// Files that the step writes.
    pub files: Vec<PathBuf>,
    /// Whether the step needs the approval of a second officer.
    pub needs_approval: bool,
}

/// State of the token and the manifest before a ceremony.
pub(super) struct PreflightContext<'a> {
    pub(super) module: &'a ModuleProfile,
    /// `None` if the ceremony still has to initialise the token.
    pub(super) token: Option<&'a Ceremony>,
    pub(super) manifest: &'a KeyManifest,
    pub(super) steps: &'a [Box<dyn Step>],
}

impl PreflightContext<'_> {
    /// Whether the ceremony creates a key with this name.
    pub(super) fn creates(&self, name: &KeyName) -> bool {
        self.steps.iter().any(|step| step.created_key() == Some(name))
    }

    /// Whether the ceremony creates a root with this name that can issue certificates.
    pub(super) fn creates_issuer(&self, name: &KeyName) -> bool {
        self.steps.iter().any(|step| step.created_key() == Some(name) && step.creates_issuer())
    }

    pub(super) fn destroys(&self, name: &KeyName) -> bool {
        self.steps.iter().any(|step| step.destroyed_key() == Some(name))
    }

    /// Proves that the token holds this key of the manifest and returns its fingerprint.
    pub(super) fn prove(&self, name: &KeyName) -> Result<String, OfficerError> {
        self.token.map_or_else(|| Err(unknown_key(name)), |token| prove(token, self.manifest, name))
    }
}

/// State of a running ceremony.
pub(super) struct CeremonyRun<'a> {
    pub(super) token: &'a Ceremony,
    pub(super) out: &'a Path,
    pub(super) manifest: KeyManifest,
    pub(super) report: Transcript,
}

impl CeremonyRun<'_> {
    /// Completes a new key: writes its files, then adds it to the manifest. The manifest is written last, so that every key in it
    /// is complete. On failure the unused key is destroyed and its name stays free.
    pub(super) fn finish(
        &mut self,
        key: &CreatedKey,
        enter: impl FnOnce(&mut Self) -> Result<(), OfficerError>,
    ) -> Result<(), OfficerError> {
        let (steps, files, manifest) = (self.report.keys.len(), self.report.files.len(), self.manifest.clone());
        let Err(cause) = enter(self) else { return self.save() };
        self.manifest = manifest;
        self.report.keys.truncate(steps);
        for file in self.report.files.drain(files..) {
            // If a file cannot be removed, the next ceremony reports it.
            let _ = std::fs::remove_file(file);
        }
        self.token.destroy(&key.name, &key.id).map_err(|e| {
            OfficerError::Other(format!(
                "{cause}; destroying the new key {} failed too, it is still on the token: {e}",
                key.name
            ))
        })?;
        Err(cause)
    }

    /// Replaces keys.toml.
    pub(super) fn save(&self) -> Result<(), OfficerError> {
        let text = self.manifest.to_toml().map_err(|e| OfficerError::Other(e.to_string()))?;
        Ok(replace(&self.out.join("keys.toml"), text.as_bytes())?)
    }
}
