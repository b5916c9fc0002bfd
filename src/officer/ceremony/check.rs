//! Checks a key on the token against keys.toml.

use spp_format::file_format::Faults;
use spp_format::names::KeyName;

use super::proof::{cka_id, prove};
use super::step::{CeremonyRun, PlannedStep, PreflightContext, Step};
use crate::hsm::KeyManifest;
use crate::officer::OfficerError;

/// `[[check_value]]`.
pub(super) struct CheckKey {
    pub(super) key: KeyName,
}

impl Step for CheckKey {
    fn describe(&self, manifest: Option<&KeyManifest>) -> PlannedStep {
        PlannedStep {
            act: "check",
            name: self.key.clone(),
            kind: String::new(),
            what: manifest.and_then(|manifest| manifest.fingerprint_text(&self.key)).unwrap_or_default(),
            files: Vec::new(),
            needs_approval: false,
        }
    }

    fn preflight(&self, context: &PreflightContext<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        if !context.creates(&self.key) {
            faults.note(format!("check_value {}", self.key), context.prove(&self.key));
        }
        Ok(())
    }

    fn execute(&self, run: &mut CeremonyRun<'_>) -> Result<(), OfficerError> {
        let fingerprint = prove(run.token, &run.manifest, &self.key)?;
        let id = cka_id(&run.manifest, &self.key)?;
        run.report.add_step("checked", &self.key, &id, fingerprint);
        Ok(())
    }
}
