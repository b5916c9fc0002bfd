//! Imports the certificate that an offline root issued for a signing key.

use std::path::PathBuf;

use spp_format::certificate::verify_issued_chain;
use spp_format::file_format::Faults;
use spp_format::names::KeyName;

use super::proof::prove;
use super::step::{CeremonyRun, PlannedStep, PreflightContext, Step};
use crate::hsm::{KeyManifest, SigningKey, SigningUse};
use crate::officer::files::{must_be_new, write_new};
use crate::officer::{OfficerError, now};

/// `[[import_certificate]]`.
pub(super) struct ImportCertificate {
    pub(super) key: KeyName,
    pub(super) file: PathBuf,
    pub(super) root: PathBuf,
}

impl ImportCertificate {
    fn entry<'a>(&self, manifest: &'a KeyManifest) -> Result<&'a SigningKey, OfficerError> {
        let missing = || OfficerError::Other(format!("keys.toml has no signing key {}", self.key));
        manifest.signing_key(&self.key).ok_or_else(missing)
    }

    /// Verifies that the certificate belongs to the key on the token and that the root issued it, and returns the chain.
    fn verified_chain(
        &self,
        manifest: &KeyManifest,
        prove: impl FnOnce(&KeyName) -> Result<String, OfficerError>,
    ) -> Result<String, OfficerError> {
        let key = self.entry(manifest)?;
        must_be_new(&key.certificate)?;
        let read = |path: &PathBuf| {
            std::fs::read_to_string(path).map_err(|e| OfficerError::Other(format!("{}: {e}", path.display())))
        };
        let (answer, root) = (read(&self.file)?, read(&self.root)?);
        let verified = verify_issued_chain(&answer, &root, &key.public_key, key.use_ == SigningUse::Root, now());
        let chain = verified.map_err(|e| OfficerError::Other(format!("{}: {e}", self.file.display())))?;
        prove(&self.key)?;
        Ok(chain)
    }
}

impl Step for ImportCertificate {
    fn describe(&self, manifest: Option<&KeyManifest>) -> PlannedStep {
        let key = manifest.and_then(|manifest| manifest.signing_key(&self.key));
        let file = key.and_then(|key| key.certificate.file_name()).map(PathBuf::from);
        PlannedStep {
            act: "certify",
            name: self.key.clone(),
            kind: key.map(|key| key.public_key.kind().to_string()).unwrap_or_default(),
            what: format!("certificate {}, issued by {}", self.file.display(), self.root.display()),
            files: file.into_iter().collect(),
            needs_approval: false,
        }
    }

    fn preflight(&self, context: &PreflightContext<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        faults.note(
            format!("import_certificate {}", self.key),
            self.verified_chain(context.manifest, |key| context.prove(key)),
        );
        Ok(())
    }

    fn execute(&self, run: &mut CeremonyRun<'_>) -> Result<(), OfficerError> {
        let chain = self.verified_chain(&run.manifest, |key| prove(run.token, &run.manifest, key))?;
        let key = self.entry(&run.manifest)?;
        let (id, path, fingerprint) = (key.id.clone(), key.certificate.clone(), key.public_key.fingerprint_text());
        write_new(&path, chain.as_bytes())?;
        let report = run.report.add_step("certificate imported", &self.key, &id, fingerprint);
        report.details.push(format!("from {}, under {}", self.file.display(), self.root.display()));
        run.report.files.push(path);
        Ok(())
    }
}
