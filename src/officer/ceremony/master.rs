//! Keys from which device keys are derived: new ones, and those that take over the work of older ones.

use std::path::PathBuf;

use super::backup_file::What;
use super::{Act, Before, Holding, PlannedAct, backup};
use crate::config::Faults;
use crate::hsm::{KeyManifest, MasterKey, Prf};
use crate::names::KeyName;
use crate::officer::OfficerError;

pub(super) struct NewMasterKey {
    pub(super) name: KeyName,
    pub(super) line: Line,
    pub(super) backup: Option<KeyName>,
}

/// Which versions came before.
pub(super) enum Line {
    /// A line begins, with that version.
    Begins { version: u32, prf: Prf },
    /// It goes on from that key: the same function, the next version.
    GoesOn(KeyName),
}

impl NewMasterKey {
    fn replaces(&self) -> Option<&KeyName> {
        match &self.line {
            Line::Begins { .. } => None,
            Line::GoesOn(older) => Some(older),
        }
    }

    /// The key's version and function; the reason if it cannot take over that work.
    fn line_in(&self, register: &KeyManifest) -> Result<(u32, Prf), String> {
        let older = match &self.line {
            Line::Begins { version, prf } => return Ok((*version, *prf)),
            Line::GoesOn(older) => older,
        };
        let key = register.master_key(older).ok_or_else(|| format!("the register has no master key {older}"))?;
        if let Some(newer) = register.master.iter().find(|key| key.replaces.as_ref() == Some(older)) {
            return Err(format!("{older} was replaced by {} already; rotate that one", newer.name));
        }
        let version = register.next_version(older).ok_or_else(|| format!("{older} has the last version there is"))?;
        Ok((version, key.prf))
    }
}

impl Act for NewMasterKey {
    fn gives(&self) -> Option<&KeyName> {
        Some(&self.name)
    }

    fn files(&self) -> Vec<PathBuf> {
        self.backup.as_ref().map(|_| backup::file_name(&self.name)).into_iter().collect()
    }

    fn needs_approval(&self, _register: Option<&KeyManifest>) -> Option<&'static str> {
        self.replaces().map(|_| "rotates keys")
    }

    fn planned(&self, register: Option<&KeyManifest>) -> PlannedAct {
        let known = match (&self.line, register) {
            (Line::Begins { version, prf }, _) => Some((*version, *prf)),
            (Line::GoesOn(_), register) => register.and_then(|register| self.line_in(register).ok()),
        };
        let version = known.map_or("the next version".to_owned(), |(version, _)| format!("version {version}"));
        let replaces = self.replaces().map(|older| format!(", replaces {older}")).unwrap_or_default();
        let backup = backup::words(self.backup.as_ref());
        PlannedAct {
            act: "make",
            name: self.name.clone(),
            kind: known.map_or("as before".to_owned(), |(_, prf)| prf.to_string()),
            what: format!("device keys are derived from it, {version}{replaces}{backup}"),
            files: self.files(),
            needs_approval: self.needs_approval(register).is_some(),
        }
    }

    fn look(&self, before: &Before<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        backup::look(self.backup.as_ref(), before, faults);
        faults.note(format!("key {}", self.name), self.line_in(before.register));
        Ok(())
    }

    fn hold(&self, holding: &mut Holding<'_>) -> Result<(), OfficerError> {
        let (version, prf) = self.line_in(&holding.register).map_err(OfficerError::Other)?;
        let under = backup::key_of(&holding.register, self.backup.as_ref())?;
        let key = match &under {
            Some(under) => holding.token.create_master_key_with_backup(&self.name, prf, under)?,
            None => holding.token.create_master_key(&self.name, prf)?,
        };
        holding.finish(&key, |holding| {
            let check_value = holding.token.check_value(&key.name, &key.id, prf)?;
            let (name, id, provenance) = (key.name.clone(), key.id.clone(), key.provenance);
            let replaces = self.replaces().cloned();
            let report = holding.report.add("made", &key, format!("check value {}", hex::encode(&check_value)));
            report.details.push(format!("{prf}, version {version}"));
            report.details.extend(replaces.as_ref().map(|older| format!("replaces {older}")));
            let entry = MasterKey { name, id, version, prf, check_value, replaces, provenance };
            backup::keep(holding, &key, under.as_ref(), What::master(&entry))?;
            holding.register.master.push(entry);
            Ok(())
        })
    }
}
