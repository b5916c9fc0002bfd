//! Key ceremonies: runs the steps of a ceremony file on the token, verifies each result and writes a transcript.

mod backup;
mod backup_file;
#[cfg(test)]
mod backup_tests;
mod check;
mod destroy;
mod file;
mod import;
mod log;
mod master;
mod parse_context;
mod proof;
mod restore;
mod shares;
mod signing;
mod signing_file;
mod step;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

pub use step::PlannedStep;
use step::{CeremonyRun, PreflightContext, Step};

use spp_format::certificate::CertificateSerial;
use spp_format::file_format::Faults;
use spp_format::keys::PublicKey;
use spp_format::names::OfficerName;

use super::OfficerError;
use super::files::{make_directory, must_be_new};
use super::permit::Permit;
use super::transcript::{Approval, Transcript, TranscriptInput};
use crate::hsm::{Ceremony, CreatedKey, KeyManifest, ModuleProfile, TokenIdentity};

/// A validated ceremony file.
pub struct CeremonyPlan {
    /// Label of the token to initialise first.
    token: Option<String>,
    /// Steps in execution order.
    steps: Vec<Box<dyn Step>>,
    file: PathBuf,
    /// SHA-256 of the file, for the transcript and the approval.
    file_hash: [u8; 32],
}

impl CeremonyPlan {
    /// Label of the token that the ceremony initialises, if any.
    pub fn token_label(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// SHA-256 of the file. An approval is bound to it.
    pub const fn file_sha256(&self) -> &[u8; 32] {
        &self.file_hash
    }

    /// Reasons why the ceremony needs the approval of a second officer; empty if it needs none. Without the directory of
    /// keys.toml, only reasons that follow from the file.
    pub fn needs_approval(&self, out: Option<&Path>) -> Result<Vec<&'static str>, OfficerError> {
        Ok(self.approval_reasons(load_manifest(out)?.as_ref()))
    }

    fn approval_reasons(&self, manifest: Option<&KeyManifest>) -> Vec<&'static str> {
        let reasons: BTreeSet<_> = self.steps.iter().filter_map(|step| step.needs_approval(manifest)).collect();
        reasons.into_iter().collect()
    }

    /// Whether the ceremony can need an approval, depending on the token: restoring a key needs one if the token already has
    /// keys.
    pub fn may_need_approval(&self) -> bool {
        self.steps.iter().any(|step| step.may_need_approval())
    }

    /// Executes all steps on the token and writes the manifest, certificates, backups and the transcript to `out`.
    ///
    /// All steps are checked before the first one runs. An existing manifest of the same token is extended. The manifest is
    /// replaced after each key, when the certificate and backup of the key are written: a crash leaves at most one key without a
    /// manifest entry, and the next ceremony reports that its name is taken. If a step fails, its key is destroyed, and the
    /// transcript lists the steps before it.
    pub fn run(
        &self,
        token: &Ceremony,
        out: &Path,
        officers: &[OfficerName],
        permit: Option<Permit>,
    ) -> Result<CeremonyOutcome, OfficerError> {
        let previous = load_or_create_manifest(&out.join("keys.toml"), token.token())?;
        let approval = self.approval(permit, &previous)?;
        self.preflight(token, out)?;
        make_directory(out)?;
        let input = TranscriptInput { file: &self.file, file_hash: &self.file_hash, officers, approval };
        let report = Transcript::begin(input, token);
        let mut run = CeremonyRun { token, out, manifest: previous.clone(), report };
        let step_error = self.steps.iter().find_map(|step| step.execute(&mut run).err());
        let CeremonyRun { manifest, mut report, .. } = run;
        report.failed = step_error.as_ref().map(ToString::to_string);
        report.files.extend(Some(out.join("keys.toml")).filter(|path| path.exists()));
        // Sign with the previous log key, because its public key is already distributed, unless this ceremony destroyed it.
        let signer = previous.log.iter().find(|key| manifest.log_key(&key.name).is_some()).or(manifest.log.first());
        let written = report.write(out, token, signer);
        CeremonyOutcome { signed: matches!(written, Ok(true)), transcript: report }
            .or_failure(step_error, written.err())
    }

    fn approval(&self, permit: Option<Permit>, manifest: &KeyManifest) -> Result<Option<Approval>, OfficerError> {
        let reasons = self.approval_reasons(Some(manifest));
        let file = self.file.display().to_string();
        match permit {
            Some(permit) if *permit.file_sha256() != self.file_hash => Err(OfficerError::ApprovalMismatch { file }),
            None if !reasons.is_empty() => Err(OfficerError::NeedsApproval { actions: reasons.join(" and "), file }),
            permit => Ok(permit.map(Permit::into_approval)),
        }
    }

    /// Describes what a run would do, in more detail with the directory of keys.toml.
    pub fn steps(&self, out: Option<&Path>) -> Result<Vec<PlannedStep>, OfficerError> {
        let manifest = load_manifest(out)?;
        Ok(self.steps.iter().map(|step| step.describe(manifest.as_ref())).collect())
    }

    /// Checks that every step can succeed: names and files are free, required keys are on the token. Changes nothing.
    pub fn preflight(&self, token: &Ceremony, out: &Path) -> Result<(), OfficerError> {
        let manifest = load_or_create_manifest(&out.join("keys.toml"), token.token())?;
        self.run_preflight(
            &PreflightContext { module: token.profile(), token: Some(token), manifest: &manifest, steps: &self.steps },
            out,
        )
    }

    /// Checks everything that can be checked before the token is initialised: files are free, backups and shares are valid,
    /// referenced keys exist.
    pub fn preflight_uninitialised(&self, module: &ModuleProfile, out: &Path) -> Result<(), OfficerError> {
        let token = TokenIdentity { label: self.token.clone().unwrap_or_default(), serial: String::new() };
        let manifest = load_or_create_manifest(&out.join("keys.toml"), &token)?;
        self.run_preflight(&PreflightContext { module, token: None, manifest: &manifest, steps: &self.steps }, out)
    }

    fn run_preflight(&self, context: &PreflightContext<'_>, out: &Path) -> Result<(), OfficerError> {
        let (manifest, mut faults) = (context.manifest, Faults::default());
        for name in self.steps.iter().filter_map(|step| step.created_key()) {
            if !context.token.map_or(Ok(true), |token| token.is_free(name))? {
                faults.add("token", format!("already has an object named {name}; objects are never overwritten"));
            } else if manifest.used_names().any(|(used, _)| used == name) {
                faults.add("keys.toml", format!("name {name} was already used; names are never reused"));
            }
        }
        for path in self.steps.iter().flat_map(|step| step.files()) {
            faults.note("files", must_be_new(&out.join(path)));
        }
        for step in &self.steps {
            step.preflight(context, &mut faults)?;
        }
        faults.into_result(Some(())).map_err(OfficerError::Faults)
    }
}

/// Loads the manifest of an earlier ceremony, if there is one.
fn load_manifest(out: Option<&Path>) -> Result<Option<KeyManifest>, OfficerError> {
    let path = out.map(|out| out.join("keys.toml")).filter(|path| path.exists());
    Ok(path.map(|path| KeyManifest::load(&path)).transpose()?)
}

/// Loads the manifest of an earlier ceremony on this token, or creates an empty one.
fn load_or_create_manifest(path: &Path, token: &TokenIdentity) -> Result<KeyManifest, OfficerError> {
    if !path.exists() {
        return Ok(KeyManifest::empty(token.clone()));
    }
    let manifest = KeyManifest::load(path)?;
    if manifest.token != *token {
        let (path, label, serial) = (path.display(), &manifest.token.label, &manifest.token.serial);
        return Err(OfficerError::Other(format!(
            "{path} belongs to token {label} ({serial}); use another --out directory"
        )));
    }
    Ok(manifest)
}

/// The public key of a new key pair.
fn public_key_of(key: &CreatedKey) -> Result<PublicKey, OfficerError> {
    key.public.clone().ok_or_else(|| OfficerError::Other(format!("{} has no public key", key.name)))
}

/// Generates a certificate serial number with the HSM's random generator.
pub(super) fn random_serial(token: &Ceremony) -> Result<CertificateSerial, OfficerError> {
    let random = token.random(20)?;
    let random =
        random.try_into().map_err(|_| OfficerError::Other("the HSM returned too few random bytes".to_owned()))?;
    Ok(CertificateSerial::from_random(random))
}

/// Result of a ceremony run, also of one that failed after some steps.
#[derive(Debug)]
pub struct CeremonyOutcome {
    /// Transcript of the completed steps.
    pub transcript: Transcript,
    /// Whether the transcript is signed; it is not if the token has no log key.
    pub signed: bool,
}

impl CeremonyOutcome {
    /// Returns `self` if neither a step nor the writing of the transcript failed.
    fn or_failure(self, step: Option<OfficerError>, writing: Option<OfficerError>) -> Result<Self, OfficerError> {
        let cause = match (step, writing) {
            (None, None) => return Ok(self),
            (Some(cause), None) => {
                let transcript = self.transcript.files.last().map(|path| path.display().to_string());
                format!("{cause}; transcript: {}", transcript.unwrap_or_default())
            }
            (None, Some(e)) => format!("all steps succeeded, but writing the transcript failed: {e}"),
            (Some(cause), Some(e)) => format!("{cause}; writing the transcript failed too: {e}"),
        };
        Err(OfficerError::Interrupted { cause, outcome: Box::new(self) })
    }
}
