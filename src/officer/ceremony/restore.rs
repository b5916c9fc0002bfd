//! Restores keys from backups to the token.

use std::path::PathBuf;

use spp_format::certificate::IssuerCertificate;
use spp_format::file_format::Faults;
use spp_format::names::KeyName;
use spp_format::secret::SecretBytes;

use super::backup_file::{BackedUpKey, BackupFile};
use super::log::NewLogKey;
use super::proof::prove;
use super::shares;
use super::signing::certificate_file;
use super::step::{CeremonyRun, PlannedStep, PreflightContext, Step};
use crate::hsm::{CheckpointKey, CreatedKey, KeyManifest, MasterKey, SigningKey, SigningUse, is_sealed};
use crate::officer::OfficerError;
use crate::officer::files::write_new;

/// `[[restore]]`.
pub(super) struct RestoreKey {
    pub(super) backup: BackupFile,
    /// Path of the backup file.
    pub(super) file: PathBuf,
    /// Share files of the officers.
    pub(super) shares: Vec<PathBuf>,
}

impl RestoreKey {
    /// Name and content of the key's public file: its certificate chain or its vkey.
    fn public_file(&self) -> Option<(PathBuf, String)> {
        let name = &self.backup.name;
        match &self.backup.content {
            BackedUpKey::Signing { certificate, .. } => certificate.clone().map(|pem| (certificate_file(name), pem)),
            BackedUpKey::Log { key, .. } => Some((NewLogKey::vkey(name), format!("{key}\n"))),
            BackedUpKey::Master { .. } => None,
        }
    }

    /// Recovers the backup key from the shares and verifies the seal of the backup file.
    fn backup_key(&self) -> Result<SecretBytes, OfficerError> {
        let backup = &self.backup;
        let key = shares::combine(&backup.backup_key, &self.shares)?;
        let invalid = |cause: String| OfficerError::Other(format!("{}: {cause}", self.file.display()));
        if !is_sealed(&key, &backup.seal, &backup.digest()?) {
            let message = "invalid seal: the backup file was changed; use another copy";
            return Err(invalid(message.to_owned()));
        }
        if let BackedUpKey::Signing { public_key, certificate: Some(pem), .. } = &backup.content {
            let certificate = IssuerCertificate::from_pem_with_default_algorithm(pem)
                .map_err(|e| invalid(format!("certificate: {e}")))?;
            if certificate.public_key() != public_key {
                return Err(invalid("the certificate belongs to another key than the backup".to_owned()));
            }
        }
        Ok(key)
    }

    fn enter(&self, manifest: &mut KeyManifest, key: &CreatedKey, out: &std::path::Path) {
        let (name, id, provenance) = (key.name.clone(), key.id.clone(), key.provenance);
        match &self.backup.content {
            BackedUpKey::Signing { use_, public_key, replaces, .. } => {
                let certificate = out.join(certificate_file(&name));
                let (use_, public_key, replaces) = (*use_, public_key.clone(), replaces.clone());
                manifest.signing.push(SigningKey { name, id, use_, public_key, certificate, replaces, provenance });
            }
            BackedUpKey::Log { key, public_key } => {
                let (key, public_key) = (key.clone(), public_key.clone());
                manifest.log.push(CheckpointKey { name, id, key, public_key, provenance });
            }
            BackedUpKey::Master { version, prf, check_value, replaces } => {
                let (version, prf, check_value, replaces) = (*version, *prf, check_value.clone(), replaces.clone());
                manifest.master.push(MasterKey { name, id, version, prf, check_value, replaces, provenance });
            }
        }
    }
}

impl Step for RestoreKey {
    fn created_key(&self) -> Option<&KeyName> {
        Some(&self.backup.name)
    }

    fn creates_issuer(&self) -> bool {
        matches!(self.backup.content, BackedUpKey::Signing { use_: SigningUse::Root, certificate: Some(_), .. })
    }

    /// A restored key may replace an existing one, as in a rotation. A new token has no keys to replace.
    fn needs_approval(&self, manifest: Option<&KeyManifest>) -> Option<&'static str> {
        manifest
            .filter(|manifest| manifest.used_names().next().is_some())
            .map(|_| "restores keys to a token that has keys")
    }

    fn may_need_approval(&self) -> bool {
        true
    }

    fn files(&self) -> Vec<PathBuf> {
        self.public_file().map(|(file, _)| file).into_iter().collect()
    }

    fn describe(&self, manifest: Option<&KeyManifest>) -> PlannedStep {
        let (kind, what) = match &self.backup.content {
            BackedUpKey::Signing { public_key, .. } => (public_key.kind().to_string(), public_key.fingerprint_text()),
            BackedUpKey::Log { key, public_key } => (public_key.kind().to_string(), key.to_string()),
            BackedUpKey::Master { prf, version, check_value, .. } => {
                (prf.to_string(), format!("version {version}, check value {}", hex::encode(check_value)))
            }
        };
        let (backup_key, given) = (&self.backup.backup_key, self.shares.len());
        PlannedStep {
            act: "restore",
            name: self.backup.name.clone(),
            kind,
            what: format!("{what}; under {}, with {given} of {} shares", backup_key.name, backup_key.shares),
            files: self.files(),
            needs_approval: self.needs_approval(manifest).is_some(),
        }
    }

    fn preflight(&self, context: &PreflightContext<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        let at = format!("restore {}", self.backup.name);
        faults.note(at.as_str(), context.module.check_backup_support());
        faults.note(at.as_str(), self.backup_key().map(drop));
        if context.manifest.used_names().any(|(_, id)| id == self.backup.id) {
            faults.add(at, "keys.toml already has a key with its CKA_ID");
        } else if !context.token.map_or(Ok(true), |token| token.is_free_id(&self.backup.id))? {
            faults.add(at, "the token already has an object with its CKA_ID; objects are never overwritten");
        }
        Ok(())
    }

    fn execute(&self, run: &mut CeremonyRun<'_>) -> Result<(), OfficerError> {
        let backup = &self.backup;
        // A key that fails the proof is destroyed below. Make sure that it cannot be an object that existed before.
        if !run.token.is_free(&backup.name)? {
            return Err(OfficerError::Other(format!("the token already has an object named {}", backup.name)));
        }
        let key = self.backup_key()?;
        let restorable = backup.content.restorable();
        let restored = run.token.restore(&backup.name, &backup.id, &restorable, &backup.wrapped, &key);
        drop(key);
        let mut manifest = run.manifest.clone();
        let fingerprint = restored.map_err(OfficerError::from).and_then(|restored| {
            self.enter(&mut manifest, &restored, run.out);
            prove(run.token, &manifest, &backup.name).map(|fingerprint| (restored, fingerprint))
        });
        let (restored, fingerprint) = match fingerprint {
            Ok(proved) => proved,
            Err(e) => {
                // Do not leave an unproved key under this name.
                run.token.destroy(&backup.name, &backup.id)?;
                return Err(OfficerError::Other(format!("{}: {e}; nothing was restored", self.file.display())));
            }
        };
        run.finish(&restored, |run| {
            if let Some((file, text)) = self.public_file() {
                let path = run.out.join(file);
                write_new(&path, text.as_bytes())?;
                run.report.files.push(path);
            }
            let report = run.report.add("restored", &restored, fingerprint);
            report.details.push(format!("from {}, under {}", self.file.display(), backup.backup_key.name));
            run.manifest = manifest;
            Ok(())
        })
    }
}
