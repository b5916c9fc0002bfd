//! Creates and rotates master keys, from which device keys are derived.

use std::path::PathBuf;

use spp_format::file_format::Faults;
use spp_format::names::KeyName;

use super::backup;
use super::backup_file::BackedUpKey;
use super::step::{CeremonyRun, PlannedStep, PreflightContext, Step};
use crate::hsm::{KeyManifest, MasterKey, Prf};
use crate::officer::OfficerError;

pub(super) struct NewMasterKey {
    pub(super) name: KeyName,
    pub(super) lineage: Lineage,
    pub(super) backup: Option<KeyName>,
}

/// How the version and the pseudorandom function of a new key are chosen.
pub(super) enum Lineage {
    /// The key starts a new sequence of versions.
    New { version: u32, prf: Prf },
    /// The key replaces this one: same function, next version.
    Replaces(KeyName),
}

impl NewMasterKey {
    fn replaces(&self) -> Option<&KeyName> {
        match &self.lineage {
            Lineage::New { .. } => None,
            Lineage::Replaces(replaced) => Some(replaced),
        }
    }

    /// Version and function of the key; an error if it cannot replace the older key.
    fn version_and_prf(&self, manifest: &KeyManifest) -> Result<(u32, Prf), String> {
        let replaced = match &self.lineage {
            Lineage::New { version, prf } => return Ok((*version, *prf)),
            Lineage::Replaces(replaced) => replaced,
        };
        let key = manifest.master_key(replaced).ok_or_else(|| format!("keys.toml has no master key {replaced}"))?;
        if let Some(successor) = manifest.master.iter().find(|key| key.replaces.as_ref() == Some(replaced)) {
            return Err(format!("{replaced} was already replaced by {}; rotate that key instead", successor.name));
        }
        let version =
            manifest.next_version(replaced).ok_or_else(|| format!("{replaced} has the highest possible version"))?;
        Ok((version, key.prf))
    }
}

impl Step for NewMasterKey {
    fn created_key(&self) -> Option<&KeyName> {
        Some(&self.name)
    }

    fn files(&self) -> Vec<PathBuf> {
        self.backup.as_ref().map(|_| backup::file_name(&self.name)).into_iter().collect()
    }

    fn needs_approval(&self, _manifest: Option<&KeyManifest>) -> Option<&'static str> {
        self.replaces().map(|_| "rotates keys")
    }

    fn describe(&self, manifest: Option<&KeyManifest>) -> PlannedStep {
        let known = match (&self.lineage, manifest) {
            (Lineage::New { version, prf }, _) => Some((*version, *prf)),
            (Lineage::Replaces(_), manifest) => manifest.and_then(|manifest| self.version_and_prf(manifest).ok()),
        };
        let version = known.map_or("the next version".to_owned(), |(version, _)| format!("version {version}"));
        let replaces = self.replaces().map(|replaced| format!(", replaces {replaced}")).unwrap_or_default();
        let backup = backup::describe_backup(self.backup.as_ref());
        PlannedStep {
            act: "make",
            name: self.name.clone(),
            kind: known.map_or("as before".to_owned(), |(_, prf)| prf.to_string()),
            what: format!("device keys are derived from it, {version}{replaces}{backup}"),
            files: self.files(),
            needs_approval: self.needs_approval(manifest).is_some(),
        }
    }

    fn preflight(&self, context: &PreflightContext<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        backup::check_backup_key(self.backup.as_ref(), context, faults);
        faults.note(format!("key {}", self.name), self.version_and_prf(context.manifest));
        Ok(())
    }

    fn execute(&self, run: &mut CeremonyRun<'_>) -> Result<(), OfficerError> {
        let (version, prf) = self.version_and_prf(&run.manifest).map_err(OfficerError::Other)?;
        let backup_key = backup::load_backup_key(&run.manifest, self.backup.as_ref())?;
        let key = match &backup_key {
            Some(backup_key) => run.token.create_master_key_with_backup(&self.name, prf, backup_key)?,
            None => run.token.create_master_key(&self.name, prf)?,
        };
        run.finish(&key, |run| {
            let check_value = run.token.check_value(&key.name, &key.id, prf)?;
            let (name, id, provenance) = (key.name.clone(), key.id.clone(), key.provenance);
            let replaces = self.replaces().cloned();
            let report = run.report.add("made", &key, format!("check value {}", hex::encode(&check_value)));
            report.details.push(format!("{prf}, version {version}"));
            report.details.extend(replaces.as_ref().map(|replaced| format!("replaces {replaced}")));
            let entry = MasterKey { name, id, version, prf, check_value, replaces, provenance };
            backup::write_backup(run, &key, backup_key.as_ref(), BackedUpKey::master(&entry))?;
            run.manifest.master.push(entry);
            Ok(())
        })
    }
}
