//! A key that signs the checkpoints of the public database.

use std::path::PathBuf;

use super::backup_file::What;
use super::{Act, Before, Holding, PlannedAct, backup, public_half};
use crate::config::Faults;
use crate::hsm::{CheckpointKey, KeyManifest};
use crate::keys::KeyKind;
use crate::names::KeyName;
use crate::officer::OfficerError;
use crate::officer::files::write_new;
use crate::tlog::{LogKey, Origin};

pub(super) struct NewLogKey {
    pub(super) name: KeyName,
    pub(super) origin: Origin,
    pub(super) backup: Option<KeyName>,
}

impl NewLogKey {
    /// The file with the public half, a vkey.
    pub(super) fn vkey(name: &KeyName) -> PathBuf {
        PathBuf::from(format!("{name}.vkey"))
    }
}

impl Act for NewLogKey {
    fn gives(&self) -> Option<&KeyName> {
        Some(&self.name)
    }

    fn files(&self) -> Vec<PathBuf> {
        let backup = self.backup.as_ref().map(|_| backup::file_name(&self.name));
        std::iter::once(Self::vkey(&self.name)).chain(backup).collect()
    }

    fn planned(&self, _: Option<&KeyManifest>) -> PlannedAct {
        PlannedAct {
            act: "make",
            name: self.name.clone(),
            kind: KeyKind::Ed25519.to_string(),
            what: format!("signs the checkpoints of {}{}", self.origin, backup::words(self.backup.as_ref())),
            files: self.files(),
            needs_approval: false,
        }
    }

    fn look(&self, before: &Before<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        backup::look(self.backup.as_ref(), before, faults);
        Ok(())
    }

    fn hold(&self, holding: &mut Holding<'_>) -> Result<(), OfficerError> {
        let under = backup::key_of(&holding.register, self.backup.as_ref())?;
        let key = backup::create_pair(holding.token, &self.name, KeyKind::Ed25519, under.as_ref())?;
        let public = public_half(&key)?;
        let log_key = LogKey::new(self.origin.clone(), public.clone());
        let log_key = log_key.map_err(|e| OfficerError::Other(e.to_string()))?;
        let (name, id, provenance) = (key.name.clone(), key.id.clone(), key.provenance);
        let entry = CheckpointKey { name, id, key: log_key.clone(), public_key: public, provenance };
        holding.finish(&key, |holding| {
            // What everybody verifies receipts and mirrors with.
            let path = holding.out.join(Self::vkey(&self.name));
            write_new(&path, format!("{log_key}\n").as_bytes())?;
            holding.report.add("made", &key, log_key.to_string());
            holding.report.files.push(path);
            backup::keep(holding, &key, under.as_ref(), What::log(&entry))?;
            holding.register.log.push(entry);
            Ok(())
        })
    }
}
