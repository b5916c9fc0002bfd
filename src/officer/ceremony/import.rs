//! The answer of an offline root to the request of a signing key.

use std::path::PathBuf;

use super::proof::prove;
use super::{Act, Before, Holding, PlannedAct};
use crate::certificate::check_answer;
use crate::config::Faults;
use crate::hsm::{KeyManifest, SigningKey, SigningUse};
use crate::names::KeyName;
use crate::officer::files::{must_be_new, write_new};
use crate::officer::{OfficerError, now};

/// `[[import_certificate]]`.
pub(super) struct ImportCertificate {
    pub(super) key: KeyName,
    pub(super) file: PathBuf,
    pub(super) root: PathBuf,
}

impl ImportCertificate {
    fn entry<'a>(&self, register: &'a KeyManifest) -> Result<&'a SigningKey, OfficerError> {
        let missing = || OfficerError::Other(format!("the register has no signing key {}", self.key));
        register.signing_key(&self.key).ok_or_else(missing)
    }

    /// The chain, once it is certain that it belongs to the key on the token, and that the root has issued it.
    fn checked(
        &self,
        register: &KeyManifest,
        prove: impl FnOnce(&KeyName) -> Result<String, OfficerError>,
    ) -> Result<String, OfficerError> {
        let key = self.entry(register)?;
        must_be_new(&key.certificate)?;
        let read = |path: &PathBuf| {
            std::fs::read_to_string(path).map_err(|e| OfficerError::Other(format!("{}: {e}", path.display())))
        };
        let (answer, root) = (read(&self.file)?, read(&self.root)?);
        let checked = check_answer(&answer, &root, &key.public_key, key.use_ == SigningUse::Root, now());
        let chain = checked.map_err(|e| OfficerError::Other(format!("{}: {e}", self.file.display())))?;
        prove(&self.key)?;
        Ok(chain)
    }
}

impl Act for ImportCertificate {
    fn planned(&self, register: Option<&KeyManifest>) -> PlannedAct {
        let key = register.and_then(|register| register.signing_key(&self.key));
        let file = key.and_then(|key| key.certificate.file_name()).map(PathBuf::from);
        PlannedAct {
            act: "certify",
            name: self.key.clone(),
            kind: key.map(|key| key.public_key.kind().to_string()).unwrap_or_default(),
            what: format!("its certificate is {}, under {}", self.file.display(), self.root.display()),
            files: file.into_iter().collect(),
            needs_approval: false,
        }
    }

    fn look(&self, before: &Before<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        faults.note(format!("import_certificate {}", self.key), self.checked(before.register, |key| before.prove(key)));
        Ok(())
    }

    fn hold(&self, holding: &mut Holding<'_>) -> Result<(), OfficerError> {
        let chain = self.checked(&holding.register, |key| prove(holding.token, &holding.register, key))?;
        let key = self.entry(&holding.register)?;
        let (id, path, known_by) = (key.id.clone(), key.certificate.clone(), key.public_key.known_by());
        write_new(&path, chain.as_bytes())?;
        let report = holding.report.add_act("certificate imported", &self.key, &id, known_by);
        report.details.push(format!("from {}, under {}", self.file.display(), self.root.display()));
        holding.report.files.push(path);
        Ok(())
    }
}
