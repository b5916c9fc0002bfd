//! A key of a backup, put onto this token.

use std::path::PathBuf;

use super::backup_file::{BackupFile, What};
use super::log::NewLogKey;
use super::proof::prove;
use super::signing::certificate_file;
use super::{Act, Before, Holding, PlannedAct, shares};
use crate::certificate::IssuerCertificate;
use crate::config::Faults;
use crate::hsm::{CheckpointKey, CreatedKey, KeyManifest, MasterKey, SigningKey, SigningUse, is_sealed};
use crate::names::KeyName;
use crate::officer::OfficerError;
use crate::officer::files::write_new;
use crate::secret::SecretBytes;

/// `[[restore]]`.
pub(super) struct RestoreKey {
    pub(super) backup: BackupFile,
    /// Where it was read.
    pub(super) file: PathBuf,
    /// The officers' files.
    pub(super) shares: Vec<PathBuf>,
}

impl RestoreKey {
    /// What anybody may read of the key: its certificate or its log's key. The file, and what is in it.
    fn public_file(&self) -> Option<(PathBuf, String)> {
        let name = &self.backup.name;
        match &self.backup.what {
            What::Signing { certificate, .. } => certificate.clone().map(|pem| (certificate_file(name), pem)),
            What::Log { key, .. } => Some((NewLogKey::vkey(name), format!("{key}\n"))),
            What::Master { .. } => None,
        }
    }

    /// The backup key of the officers' shares, once it is certain that the file is as the ceremony has written it that made the key.
    fn opened(&self) -> Result<SecretBytes, OfficerError> {
        let backup = &self.backup;
        let key = shares::combine(&backup.under, &self.shares)?;
        let wrong = |why: String| OfficerError::Other(format!("{}: {why}", self.file.display()));
        if !is_sealed(&key, &backup.seal, &backup.digest()?) {
            let message = "its seal does not fit: it is not as it was when the key was made; take another copy of it";
            return Err(wrong(message.to_owned()));
        }
        if let What::Signing { public_key, certificate: Some(pem), .. } = &backup.what {
            let certificate = IssuerCertificate::from_pem_alone(pem).map_err(|e| wrong(format!("certificate: {e}")))?;
            if certificate.public_key() != public_key {
                return Err(wrong("its certificate is of another key than the one that is backed up".to_owned()));
            }
        }
        Ok(key)
    }

    fn enter(&self, register: &mut KeyManifest, key: &CreatedKey, out: &std::path::Path) {
        let (name, id, provenance) = (key.name.clone(), key.id.clone(), key.provenance);
        match &self.backup.what {
            What::Signing { use_, public_key, replaces, .. } => {
                let certificate = out.join(certificate_file(&name));
                let (use_, public_key, replaces) = (*use_, public_key.clone(), replaces.clone());
                register.signing.push(SigningKey { name, id, use_, public_key, certificate, replaces, provenance });
            }
            What::Log { key, public_key } => {
                let (key, public_key) = (key.clone(), public_key.clone());
                register.log.push(CheckpointKey { name, id, key, public_key, provenance });
            }
            What::Master { version, prf, check_value, replaces } => {
                let (version, prf, check_value, replaces) = (*version, *prf, check_value.clone(), replaces.clone());
                register.master.push(MasterKey { name, id, version, prf, check_value, replaces, provenance });
            }
        }
    }
}

impl Act for RestoreKey {
    fn gives(&self) -> Option<&KeyName> {
        Some(&self.backup.name)
    }

    fn gives_issuer(&self) -> bool {
        matches!(self.backup.what, What::Signing { use_: SigningUse::Root, certificate: Some(_), .. })
    }

    /// A key that comes to others may take over their work, as in a rotation; a new token has none.
    fn needs_approval(&self, register: Option<&KeyManifest>) -> Option<&'static str> {
        register.filter(|register| register.given().next().is_some()).map(|_| "restores keys to others")
    }

    fn may_need_approval(&self) -> bool {
        true
    }

    fn files(&self) -> Vec<PathBuf> {
        self.public_file().map(|(file, _)| file).into_iter().collect()
    }

    fn planned(&self, register: Option<&KeyManifest>) -> PlannedAct {
        let (kind, what) = match &self.backup.what {
            What::Signing { public_key, .. } => (public_key.kind().to_string(), public_key.known_by()),
            What::Log { key, public_key } => (public_key.kind().to_string(), key.to_string()),
            What::Master { prf, version, check_value, .. } => {
                (prf.to_string(), format!("version {version}, check value {}", hex::encode(check_value)))
            }
        };
        let (under, given) = (&self.backup.under, self.shares.len());
        PlannedAct {
            act: "restore",
            name: self.backup.name.clone(),
            kind,
            what: format!("{what}; under {}, with {given} of {} shares", under.name, under.shares),
            files: self.files(),
            needs_approval: self.needs_approval(register).is_some(),
        }
    }

    fn look(&self, before: &Before<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        let at = format!("restore {}", self.backup.name);
        faults.note(at.as_str(), before.module.can_back_up());
        faults.note(at.as_str(), self.opened().map(drop));
        if before.register.given().any(|(_, id)| id == self.backup.id) {
            faults.add(at, "the register has its CKA_ID already");
        } else if !before.token.map_or(Ok(true), |token| token.is_free_id(&self.backup.id))? {
            faults.add(at, "an object of the token has its CKA_ID already; nothing is ever overwritten");
        }
        Ok(())
    }

    fn hold(&self, holding: &mut Holding<'_>) -> Result<(), OfficerError> {
        let backup = &self.backup;
        // Below, what could not be proved is destroyed: it must not be what was there before.
        if !holding.token.is_free(&backup.name)? {
            return Err(OfficerError::Other(format!("the token has an object named {} already", backup.name)));
        }
        let key = self.opened()?;
        let restorable = backup.what.restorable();
        let restored = holding.token.restore(&backup.name, &backup.id, &restorable, &backup.wrapped, &key);
        drop(key);
        let mut register = holding.register.clone();
        let known_by = restored.map_err(OfficerError::from).and_then(|restored| {
            self.enter(&mut register, &restored, holding.out);
            prove(holding.token, &register, &backup.name).map(|known_by| (restored, known_by))
        });
        let (restored, known_by) = match known_by {
            Ok(proved) => proved,
            Err(e) => {
                // What was not proved is not left behind under the key's name.
                holding.token.destroy(&backup.name, &backup.id)?;
                return Err(OfficerError::Other(format!("{}: {e}; nothing was restored", self.file.display())));
            }
        };
        holding.finish(&restored, |holding| {
            if let Some((file, text)) = self.public_file() {
                let path = holding.out.join(file);
                write_new(&path, text.as_bytes())?;
                holding.report.files.push(path);
            }
            let report = holding.report.add("restored", &restored, known_by);
            report.details.push(format!("from {}, under {}", self.file.display(), backup.under.name));
            holding.register = register;
            Ok(())
        })
    }
}
