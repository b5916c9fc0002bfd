//! Creates log keys, which sign the checkpoints of the public database.

use std::path::PathBuf;

use spp_format::file_format::Faults;
use spp_format::keys::KeyType;
use spp_format::names::KeyName;
use spp_format::tlog::{LogKey, Origin};

use super::backup_file::BackedUpKey;
use super::step::{CeremonyRun, PlannedStep, PreflightContext, Step};
use super::{backup, public_key_of};
use crate::hsm::{CheckpointKey, KeyManifest};
use crate::officer::OfficerError;
use crate::officer::files::write_new;

pub(super) struct NewLogKey {
    pub(super) name: KeyName,
    pub(super) origin: Origin,
    pub(super) backup: Option<KeyName>,
}

impl NewLogKey {
    /// File name of the public key (vkey).
    pub(super) fn vkey(name: &KeyName) -> PathBuf {
        PathBuf::from(format!("{name}.vkey"))
    }
}

impl Step for NewLogKey {
    fn created_key(&self) -> Option<&KeyName> {
        Some(&self.name)
    }

    fn files(&self) -> Vec<PathBuf> {
        let backup = self.backup.as_ref().map(|_| backup::file_name(&self.name));
        std::iter::once(Self::vkey(&self.name)).chain(backup).collect()
    }

    fn describe(&self, _: Option<&KeyManifest>) -> PlannedStep {
        PlannedStep {
            act: "make",
            name: self.name.clone(),
            kind: KeyType::Ed25519.to_string(),
            what: format!("signs the checkpoints of {}{}", self.origin, backup::describe_backup(self.backup.as_ref())),
            files: self.files(),
            needs_approval: false,
        }
    }

    fn preflight(&self, context: &PreflightContext<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        backup::check_backup_key(self.backup.as_ref(), context, faults);
        Ok(())
    }

    fn execute(&self, run: &mut CeremonyRun<'_>) -> Result<(), OfficerError> {
        let backup_key = backup::load_backup_key(&run.manifest, self.backup.as_ref())?;
        let key = backup::create_pair(run.token, &self.name, KeyType::Ed25519, backup_key.as_ref())?;
        let public = public_key_of(&key)?;
        let log_key = LogKey::new(self.origin.clone(), public.clone());
        let log_key = log_key.map_err(|e| OfficerError::Other(e.to_string()))?;
        let (name, id, provenance) = (key.name.clone(), key.id.clone(), key.provenance);
        let entry = CheckpointKey { name, id, key: log_key.clone(), public_key: public, provenance };
        run.finish(&key, |run| {
            // Verifiers of receipts and mirrors need this file.
            let path = run.out.join(Self::vkey(&self.name));
            write_new(&path, format!("{log_key}\n").as_bytes())?;
            run.report.add("made", &key, log_key.to_string());
            run.report.files.push(path);
            backup::write_backup(run, &key, backup_key.as_ref(), BackedUpKey::log(&entry))?;
            run.manifest.log.push(entry);
            Ok(())
        })
    }
}
