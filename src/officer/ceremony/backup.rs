//! Creates backup keys with their shares, and writes key backups under them.

use std::collections::BTreeSet;
use std::path::PathBuf;

use spp_format::file_format::Faults;
use spp_format::keys::{KeyType, sha256};
use spp_format::names::{KeyName, OfficerName};
use spp_format::secret::SecretBytes;

use super::backup_file::{BackedUpKey, BackupFile};
use super::shares;
use super::step::{CeremonyRun, PlannedStep, PreflightContext, Step};
use crate::hsm::{BACKUP_KEY_LEN, BackupKey, Ceremony, CreatedKey, KeyManifest, backup_check_value};
use crate::officer::OfficerError;
use crate::officer::files::{write_new, write_new_private};

/// `[[backup_wrapping_key]]`.
pub(super) struct NewBackupKey {
    pub(super) name: KeyName,
    pub(super) threshold: u8,
    /// Officers; each gets one share.
    pub(super) officers: Vec<OfficerName>,
}

impl NewBackupKey {
    /// Checks the section of the ceremony file.
    pub(super) fn check(&self, shares: u8, place: &str, faults: &mut Faults) {
        if !(2..=shares).contains(&self.threshold) {
            faults.add(format!("{place}: threshold"), format!("must be from 2 to {shares} (the number of shares)"));
        }
        if usize::from(shares) != self.officers.len() {
            let problem = format!("{shares} shares for {} officers; name one officer per share", self.officers.len());
            faults.add(format!("{place}: officers"), problem);
        }
        let files: BTreeSet<_> = self.files().into_iter().collect();
        if files.len() != self.officers.len() {
            faults.add(format!("{place}: officers"), "contains an officer twice");
        }
    }
}

impl Step for NewBackupKey {
    fn created_key(&self) -> Option<&KeyName> {
        Some(&self.name)
    }

    fn files(&self) -> Vec<PathBuf> {
        self.officers.iter().map(|officer| shares::file_name(&self.name, officer)).collect()
    }

    fn describe(&self, _: Option<&KeyManifest>) -> PlannedStep {
        PlannedStep {
            act: "make",
            name: self.name.clone(),
            kind: "aes-256".to_owned(),
            what: format!("wraps backups; read with {} of {} shares", self.threshold, self.officers.len()),
            files: self.files(),
            needs_approval: false,
        }
    }

    fn preflight(&self, context: &PreflightContext<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        faults.note(format!("key {}", self.name), context.module.check_backup_support());
        Ok(())
    }

    /// Writes the shares and reads them back before the key is created on the token, so that every backup key can be recovered.
    fn execute(&self, run: &mut CeremonyRun<'_>) -> Result<(), OfficerError> {
        let token = run.token;
        let bytes = token.random_secret(BACKUP_KEY_LEN)?;
        let check_value = backup_check_value(&bytes)?;
        let shares = shares::split(token, &bytes, &self.entry(Vec::new(), &check_value), &self.officers)?;
        let mut written = Vec::new();
        let made = self
            .write_shares(run, &shares, &check_value, &mut written)
            .and_then(|()| self.create_on_token(token, &bytes, &check_value));
        drop(bytes);
        let (key, entry) = match made {
            Ok(made) => made,
            Err(e) => {
                // The key does not exist, so remove its shares. If a file cannot be removed, the next ceremony reports it.
                written.iter().for_each(|path| drop(std::fs::remove_file(path)));
                return Err(e);
            }
        };
        run.manifest.backup.push(entry);
        let report = run.report.add("made", &key, format!("check value {}", hex::encode(&check_value)));
        report.details.push(format!("wraps backups; read with {} of {} shares", self.threshold, shares.len()));
        report.details.extend(shares.iter().map(|share| format!("share {} is for {}", share.number, share.officer)));
        run.report.files.extend(written);
        run.save()
    }
}

impl NewBackupKey {
    fn write_shares(
        &self,
        run: &CeremonyRun<'_>,
        shares: &[shares::Share],
        check_value: &[u8],
        written: &mut Vec<PathBuf>,
    ) -> Result<(), OfficerError> {
        for share in shares {
            let path = run.out.join(shares::file_name(&self.name, &share.officer));
            // Exposed to be written to a file with mode 0600.
            write_new_private(&path, share.to_text().expose())?;
            written.push(path);
        }
        let entry = self.entry(Vec::new(), check_value);
        let threshold = usize::from(self.threshold);
        for subset in [&written[..threshold], &written[written.len() - threshold..]] {
            shares::combine(&entry, subset)?;
        }
        Ok(())
    }

    /// Creates the key on the token and verifies that it has the check value of the shares. Otherwise no backup could be
    /// restored.
    fn create_on_token(
        &self,
        token: &Ceremony,
        bytes: &SecretBytes,
        check: &[u8],
    ) -> Result<(CreatedKey, BackupKey), OfficerError> {
        let key = token.create_backup_key(&self.name, bytes)?;
        let entry = self.entry(key.id.clone(), check);
        match token.check_value_of_backup_key(&entry) {
            Ok(value) if value == check => Ok((key, entry)),
            other => {
                token.destroy(&key.name, &key.id)?;
                other?;
                Err(OfficerError::Other(format!("key {} on the token differs from its shares", self.name)))
            }
        }
    }

    fn entry(&self, id: Vec<u8>, check_value: &[u8]) -> BackupKey {
        let shares = u8::try_from(self.officers.len()).unwrap_or(u8::MAX);
        let (name, check_value, threshold) = (self.name.clone(), check_value.to_vec(), self.threshold);
        BackupKey { name, id, check_value, shares, threshold }
    }
}

/// File name of a key's backup.
pub(super) fn file_name(key: &KeyName) -> PathBuf {
    PathBuf::from(format!("{key}.backup"))
}

/// Backup note in the description of a step.
pub(super) fn describe_backup(backup_key: Option<&KeyName>) -> String {
    backup_key.map(|backup_key| format!(", with a backup under {backup_key}")).unwrap_or_default()
}

/// Checks that the backup key exists or is created by the ceremony.
pub(super) fn check_backup_key(backup_key: Option<&KeyName>, context: &PreflightContext<'_>, faults: &mut Faults) {
    let Some(backup_key) = backup_key else { return };
    if !context.creates(backup_key) && context.manifest.backup_key(backup_key).is_none() {
        let problem = "not in keys.toml; create it with [[backup_wrapping_key]]";
        faults.add(format!("backup {backup_key}"), problem);
    }
}

pub(super) fn load_backup_key(
    manifest: &KeyManifest,
    backup_key: Option<&KeyName>,
) -> Result<Option<BackupKey>, OfficerError> {
    let found =
        |backup_key| manifest.backup_key(backup_key).cloned().ok_or_else(|| super::proof::unknown_key(backup_key));
    backup_key.map(found).transpose()
}

pub(super) fn create_pair(
    token: &Ceremony,
    name: &KeyName,
    kind: KeyType,
    backup_key: Option<&BackupKey>,
) -> Result<CreatedKey, OfficerError> {
    Ok(match backup_key {
        Some(backup_key) => token.create_signing_key_with_backup(name, kind, backup_key)?,
        None => token.create_signing_key(name, kind)?,
    })
}

/// Writes the backup file of a key, if the key has a backup.
pub(super) fn write_backup(
    run: &mut CeremonyRun<'_>,
    key: &CreatedKey,
    backup_key: Option<&BackupKey>,
    content: BackedUpKey,
) -> Result<(), OfficerError> {
    let (Some(backup_key), Some(wrapped)) = (backup_key, &key.wrapped) else { return Ok(()) };
    let (name, id, wrapped) = (key.name.clone(), key.id.clone(), wrapped.clone());
    let mut file = BackupFile { name, id, wrapped, backup_key: backup_key.clone(), content, seal: Vec::new() };
    file.seal = run.token.seal(backup_key, &file.digest()?)?;
    let text = file.to_toml()?;
    let path = run.out.join(file_name(&key.name));
    write_new(&path, text.as_bytes())?;
    // The hash in the transcript identifies the backup file of this ceremony.
    let fingerprint = format!("sha256:{} of its file", hex::encode(sha256(text.as_bytes())));
    let report = run.report.add_step("backed up", &key.name, &key.id, fingerprint);
    report
        .details
        .push(format!("under {}, read with {} of {} shares", backup_key.name, backup_key.threshold, backup_key.shares));
    run.report.files.push(path);
    Ok(())
}
