//! Backups: the key that wraps them, its shares, and the file beside the register.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::backup_file::{BackupFile, What};
use super::{Act, Before, Holding, PlannedAct, shares};
use crate::config::Faults;
use crate::hsm::{BACKUP_KEY_LEN, BackupKey, Ceremony, CreatedKey, KeyManifest, backup_check_value};
use crate::keys::{KeyKind, sha256};
use crate::names::{KeyName, OfficerName};
use crate::officer::OfficerError;
use crate::officer::files::{write_new, write_new_private};
use crate::secret::SecretBytes;

/// `[[backup_wrapping_key]]`.
pub(super) struct NewBackupKey {
    pub(super) name: KeyName,
    pub(super) threshold: u8,
    /// Who gets a share each.
    pub(super) officers: Vec<OfficerName>,
}

impl NewBackupKey {
    /// What is wrong with it as the file says it.
    pub(super) fn check(&self, shares: u8, place: &str, faults: &mut Faults) {
        if !(2..=shares).contains(&self.threshold) {
            faults.add(format!("{place}: threshold"), format!("must be from 2 to {shares}, the number of shares"));
        }
        if usize::from(shares) != self.officers.len() {
            let problem = format!("there are {shares} shares and {} officers; name one for each", self.officers.len());
            faults.add(format!("{place}: officers"), problem);
        }
        let files: BTreeSet<_> = self.files().into_iter().collect();
        if files.len() != self.officers.len() {
            faults.add(format!("{place}: officers"), "one of them is there twice");
        }
    }
}

impl Act for NewBackupKey {
    fn gives(&self) -> Option<&KeyName> {
        Some(&self.name)
    }

    fn files(&self) -> Vec<PathBuf> {
        self.officers.iter().map(|officer| shares::file_name(&self.name, officer)).collect()
    }

    fn planned(&self, _: Option<&KeyManifest>) -> PlannedAct {
        PlannedAct {
            act: "make",
            name: self.name.clone(),
            kind: "aes-256".to_owned(),
            what: format!("wraps backups; read with {} of {} shares", self.threshold, self.officers.len()),
            files: self.files(),
            needs_approval: false,
        }
    }

    fn look(&self, before: &Before<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        faults.note(format!("key {}", self.name), before.module.can_back_up());
        Ok(())
    }

    /// The shares come first, read back from their files: a backup key that nobody can put together again would be none.
    fn hold(&self, holding: &mut Holding<'_>) -> Result<(), OfficerError> {
        let token = holding.token;
        let bytes = token.random_secret(BACKUP_KEY_LEN)?;
        let check_value = backup_check_value(&bytes)?;
        let given = shares::deal(token, &bytes, self, &check_value)?;
        let mut written = Vec::new();
        let made = self
            .give_out(holding, &given, &check_value, &mut written)
            .and_then(|()| self.put(token, &bytes, &check_value));
        drop(bytes);
        let (key, entry) = match made {
            Ok(made) => made,
            Err(e) => {
                // Shares of a key that is nowhere. One that stays is found by the next ceremony, which says so.
                written.iter().for_each(|path| drop(std::fs::remove_file(path)));
                return Err(e);
            }
        };
        holding.register.backup.push(entry);
        let report = holding.report.add("made", &key, format!("check value {}", hex::encode(&check_value)));
        report.details.push(format!("wraps backups; read with {} of {} shares", self.threshold, given.len()));
        report.details.extend(given.iter().map(|share| format!("share {} is for {}", share.number, share.officer)));
        holding.report.files.extend(written);
        holding.save()
    }
}

impl NewBackupKey {
    fn give_out(
        &self,
        holding: &Holding<'_>,
        given: &[shares::Share],
        check_value: &[u8],
        written: &mut Vec<PathBuf>,
    ) -> Result<(), OfficerError> {
        for share in given {
            let path = holding.out.join(shares::file_name(&self.name, &share.officer));
            // Exposed to be written where only its owner may read it.
            write_new_private(&path, share.to_text().expose())?;
            written.push(path);
        }
        let entry = self.entry(Vec::new(), check_value);
        let threshold = usize::from(self.threshold);
        for some in [&written[..threshold], &written[written.len() - threshold..]] {
            shares::combine(&entry, some)?;
        }
        Ok(())
    }

    /// Puts it on the token. It must be what was given out, or no backup could ever be read.
    fn put(
        &self,
        token: &Ceremony,
        bytes: &SecretBytes,
        check: &[u8],
    ) -> Result<(CreatedKey, BackupKey), OfficerError> {
        let key = token.create_backup_key(&self.name, bytes)?;
        let entry = self.entry(key.id.clone(), check);
        match token.check_value_of_backup_key(&entry) {
            Ok(value) if value == check => Ok((key, entry)),
            wrong => {
                token.destroy(&key.name, &key.id)?;
                wrong?;
                Err(OfficerError::Other(format!("the token took {} over as another key", self.name)))
            }
        }
    }

    fn entry(&self, id: Vec<u8>, check_value: &[u8]) -> BackupKey {
        let shares = u8::try_from(self.officers.len()).unwrap_or(u8::MAX);
        let (name, check_value, threshold) = (self.name.clone(), check_value.to_vec(), self.threshold);
        BackupKey { name, id, check_value, shares, threshold }
    }
}

/// The file with a key's backup.
pub(super) fn file_name(key: &KeyName) -> PathBuf {
    PathBuf::from(format!("{key}.backup"))
}

/// For a plan.
pub(super) fn words(under: Option<&KeyName>) -> String {
    under.map(|under| format!(", with a backup under {under}")).unwrap_or_default()
}

/// Whether there is, or will be, such a backup key.
pub(super) fn look(under: Option<&KeyName>, before: &Before<'_>, faults: &mut Faults) {
    let Some(under) = under else { return };
    if !before.makes(under) && before.register.backup_key(under).is_none() {
        let problem = "the register has no such key; make one with [[backup_wrapping_key]]";
        faults.add(format!("backup {under}"), problem);
    }
}

pub(super) fn key_of(register: &KeyManifest, under: Option<&KeyName>) -> Result<Option<BackupKey>, OfficerError> {
    let found = |under| register.backup_key(under).cloned().ok_or_else(|| super::proof::not_there(under));
    under.map(found).transpose()
}

pub(super) fn create_pair(
    token: &Ceremony,
    name: &KeyName,
    kind: KeyKind,
    under: Option<&BackupKey>,
) -> Result<CreatedKey, OfficerError> {
    Ok(match under {
        Some(under) => token.create_signing_key_with_backup(name, kind, under)?,
        None => token.create_signing_key(name, kind)?,
    })
}

/// Writes the backup of a key that was made with one.
pub(super) fn keep(
    holding: &mut Holding<'_>,
    key: &CreatedKey,
    under: Option<&BackupKey>,
    what: What,
) -> Result<(), OfficerError> {
    let (Some(under), Some(wrapped)) = (under, &key.wrapped) else { return Ok(()) };
    let (name, id, wrapped) = (key.name.clone(), key.id.clone(), wrapped.clone());
    let mut file = BackupFile { name, id, wrapped, under: under.clone(), what, seal: Vec::new() };
    file.seal = holding.token.seal(under, &file.digest()?)?;
    let text = file.to_toml()?;
    let path = holding.out.join(file_name(&key.name));
    write_new(&path, text.as_bytes())?;
    // So that whoever restores it can tell whether it is the file of this ceremony.
    let known_by = format!("sha256:{} of its file", hex::encode(sha256(text.as_bytes())));
    let report = holding.report.add_act("backed up", &key.name, &key.id, known_by);
    report.details.push(format!("under {}, read with {} of {} shares", under.name, under.threshold, under.shares));
    holding.report.files.push(path);
    Ok(())
}
