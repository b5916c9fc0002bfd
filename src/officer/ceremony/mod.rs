//! A key ceremony: one strict file says what is done on the token; what was done is read back and written down.

mod backup;
mod backup_file;
#[cfg(test)]
mod backup_tests;
mod destroy;
mod file;
mod import;
mod log;
mod master;
mod proof;
mod restore;
mod shares;
mod signing;
mod signing_file;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::OfficerError;
use super::files::{make_directory, must_be_new, replace};
use super::permit::Permit;
use super::transcript::{Approval, Subject, Transcript};
use crate::certificate::CertificateSerial;
use crate::config::Faults;
use crate::hsm::{Ceremony, CreatedKey, KeyManifest, ModuleProfile, TokenIdentity};
use crate::keys::PublicKey;
use crate::names::{KeyName, OfficerName};

/// What a ceremony will do, validated.
pub struct CeremonyPlan {
    /// The label of the token that it begins with.
    token: Option<String>,
    /// In the order in which they are done.
    acts: Vec<Box<dyn Act>>,
    file: PathBuf,
    /// SHA-256 of the file, for the transcript and the approval.
    file_hash: [u8; 32],
}

/// One act of a ceremony.
trait Act {
    /// The name that it gives to a new object of the token.
    fn gives(&self) -> Option<&KeyName> {
        None
    }

    /// Whether that key can issue the certificates of others as soon as it is there: a root with a certificate.
    fn gives_issuer(&self) -> bool {
        false
    }

    /// The key that is no more after it.
    fn destroys(&self) -> Option<&KeyName> {
        None
    }

    /// The new files, in the directory of the register.
    fn files(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// What it does to keys that are there, if one officer alone may not do that. Without a register: as far as it needs none to tell.
    fn needs_approval(&self, _register: Option<&KeyManifest>) -> Option<&'static str> {
        None
    }

    /// Whether it needs an approval on some token.
    fn may_need_approval(&self) -> bool {
        self.needs_approval(None).is_some()
    }

    /// What it would do, for a look at it before; more exactly with the register.
    fn planned(&self, register: Option<&KeyManifest>) -> PlannedAct;

    /// Notes everything that would be in its way. Nothing is changed.
    fn look(&self, before: &Before<'_>, faults: &mut Faults) -> Result<(), OfficerError>;

    /// Does it.
    fn hold(&self, holding: &mut Holding<'_>) -> Result<(), OfficerError>;
}

/// The site before a ceremony.
struct Before<'a> {
    module: &'a ModuleProfile,
    /// Absent as long as the ceremony has not initialised it.
    token: Option<&'a Ceremony>,
    register: &'a KeyManifest,
    acts: &'a [Box<dyn Act>],
}

impl Before<'_> {
    /// Whether the ceremony itself will make a key of that name before it is needed.
    fn makes(&self, name: &KeyName) -> bool {
        self.acts.iter().any(|act| act.gives() == Some(name))
    }

    /// Whether the ceremony itself will make a root of that name that can issue.
    fn makes_issuer(&self, name: &KeyName) -> bool {
        self.acts.iter().any(|act| act.gives() == Some(name) && act.gives_issuer())
    }

    fn destroys(&self, name: &KeyName) -> bool {
        self.acts.iter().any(|act| act.destroys() == Some(name))
    }

    /// Proves a key of the register and says what it is known by.
    fn prove(&self, name: &KeyName) -> Result<String, OfficerError> {
        self.token.map_or_else(|| Err(proof::not_there(name)), |token| proof::prove(token, self.register, name))
    }
}

/// A ceremony that is being held.
struct Holding<'a> {
    token: &'a Ceremony,
    out: &'a Path,
    register: KeyManifest,
    report: Transcript,
}

impl CeremonyPlan {
    /// The label of the token that the ceremony begins with, if it initialises one.
    pub fn token_label(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// The SHA-256 of the file: what an approval is given for.
    pub const fn file_sha256(&self) -> &[u8; 32] {
        &self.file_hash
    }

    /// What of it needs the approval of a second officer; empty if one may hold it alone. Without the directory of the register as far
    /// as the file alone tells.
    pub fn needs_approval(&self, out: Option<&Path>) -> Result<Vec<&'static str>, OfficerError> {
        Ok(self.needed(register_in(out)?.as_ref()))
    }

    fn needed(&self, register: Option<&KeyManifest>) -> Vec<&'static str> {
        let needed: BTreeSet<_> = self.acts.iter().filter_map(|act| act.needs_approval(register)).collect();
        needed.into_iter().collect()
    }

    /// Whether it needs an approval on some token: restoring a key does where there are keys already.
    pub fn may_need_approval(&self) -> bool {
        self.acts.iter().any(|act| act.may_need_approval())
    }

    /// Does everything on the token and writes the register, certificates and the transcript into `out`.
    ///
    /// All of it is looked at before anything is done. A register that is there already is added to, if it is of the same token.
    /// It is replaced after each key, when the key's certificate and backup are written: a ceremony that is cut short leaves at most the
    /// key that it was making unwritten, and the next one says that its name is taken. One that fails takes that key away again, and
    /// has a transcript of what it did before.
    pub fn run(
        &self,
        token: &Ceremony,
        out: &Path,
        officers: &[OfficerName],
        permit: Option<Permit>,
    ) -> Result<Held, OfficerError> {
        let before = register_to_add_to(&out.join("keys.toml"), token.token())?;
        let approval = self.approval(permit, &before)?;
        self.look(token, out)?;
        make_directory(out)?;
        let subject = Subject { file: &self.file, file_hash: &self.file_hash, officers, approval };
        let report = Transcript::begin(subject, token);
        let mut holding = Holding { token, out, register: before.clone(), report };
        let failed = self.acts.iter().find_map(|act| act.hold(&mut holding).err());
        let Holding { register, mut report, .. } = holding;
        report.failed = failed.as_ref().map(ToString::to_string);
        report.files.extend(Some(out.join("keys.toml")).filter(|path| path.exists()));
        // The log key of before, whose public half others have already, unless it has just been destroyed.
        let signer = before.log.iter().find(|key| register.log_key(&key.name).is_some()).or(register.log.first());
        let written = report.write(out, token, signer);
        Held { signed: matches!(written, Ok(true)), transcript: report }.unless(failed, written.err())
    }

    fn approval(&self, permit: Option<Permit>, register: &KeyManifest) -> Result<Option<Approval>, OfficerError> {
        let needed = self.needed(Some(register));
        let file = self.file.display().to_string();
        match permit {
            Some(permit) if *permit.file_sha256() != self.file_hash => Err(OfficerError::ApprovalOfAnother { file }),
            None if !needed.is_empty() => Err(OfficerError::NeedsApproval { acts: needed.join(" and "), file }),
            permit => Ok(permit.map(Permit::into_approval)),
        }
    }

    /// What a run would do, for a look at it before. With the directory of its register more exactly.
    pub fn acts(&self, out: Option<&Path>) -> Result<Vec<PlannedAct>, OfficerError> {
        let register = register_in(out)?;
        Ok(self.acts.iter().map(|act| act.planned(register.as_ref())).collect())
    }

    /// Whether a run could do everything: names and files are free, keys that it works on are there. Nothing is changed.
    pub fn look(&self, token: &Ceremony, out: &Path) -> Result<(), OfficerError> {
        let register = register_to_add_to(&out.join("keys.toml"), token.token())?;
        self.look_from(
            &Before { module: token.profile(), token: Some(token), register: &register, acts: &self.acts },
            out,
        )
    }

    /// The same before the ceremony initialises its token, which then is not initialised for nothing: files are free, backups and
    /// shares fit, names lead to something.
    pub fn look_ahead(&self, module: &ModuleProfile, out: &Path) -> Result<(), OfficerError> {
        let token = TokenIdentity { label: self.token.clone().unwrap_or_default(), serial: String::new() };
        let register = register_to_add_to(&out.join("keys.toml"), &token)?;
        self.look_from(&Before { module, token: None, register: &register, acts: &self.acts }, out)
    }

    fn look_from(&self, before: &Before<'_>, out: &Path) -> Result<(), OfficerError> {
        let (register, mut faults) = (before.register, Faults::default());
        for name in self.acts.iter().filter_map(|act| act.gives()) {
            if !before.token.map_or(Ok(true), |token| token.is_free(name))? {
                faults.add("token", format!("has an object named {name} already; nothing is ever overwritten"));
            } else if register.given().any(|(given, _)| given == name) {
                faults.add("register", format!("the name {name} was given already; a name is never used again"));
            }
        }
        for path in self.acts.iter().flat_map(|act| act.files()) {
            faults.note("files", must_be_new(&out.join(path)));
        }
        for act in &self.acts {
            act.look(before, &mut faults)?;
        }
        faults.ok_or_all(Some(())).map_err(OfficerError::Faults)
    }
}

impl Holding<'_> {
    /// Ends the making of a key: its files are written and it is entered; the register comes last, so that it never has a key of which
    /// something is missing. If that fails the key goes again, of which nobody has had any use, and its name stays free.
    fn finish(
        &mut self,
        key: &CreatedKey,
        enter: impl FnOnce(&mut Self) -> Result<(), OfficerError>,
    ) -> Result<(), OfficerError> {
        let (acts, files, register) = (self.report.keys.len(), self.report.files.len(), self.register.clone());
        let Err(why) = enter(self) else { return self.save() };
        self.register = register;
        self.report.keys.truncate(acts);
        for file in self.report.files.drain(files..) {
            // One that stays is found by the next ceremony, which says so.
            let _ = std::fs::remove_file(file);
        }
        self.token
            .destroy(&key.name, &key.id)
            .map_err(|e| OfficerError::Other(format!("{why}; the new key {} is still on the token: {e}", key.name)))?;
        Err(why)
    }

    /// Replaces the register's file.
    fn save(&self) -> Result<(), OfficerError> {
        let text = self.register.to_toml().map_err(|e| OfficerError::Other(e.to_string()))?;
        Ok(replace(&self.out.join("keys.toml"), text.as_bytes())?)
    }
}

/// The register of an earlier ceremony, if there was one.
fn register_in(out: Option<&Path>) -> Result<Option<KeyManifest>, OfficerError> {
    let path = out.map(|out| out.join("keys.toml")).filter(|path| path.exists());
    Ok(path.map(|path| KeyManifest::load(&path)).transpose()?)
}

/// The register of an earlier ceremony on this token, or an empty one.
fn register_to_add_to(path: &Path, token: &TokenIdentity) -> Result<KeyManifest, OfficerError> {
    if !path.exists() {
        return Ok(KeyManifest::empty(token.clone()));
    }
    let register = KeyManifest::load(path)?;
    if register.token != *token {
        let (path, label, serial) = (path.display(), &register.token.label, &register.token.serial);
        return Err(OfficerError::Other(format!("{path} is of the token {label} ({serial}); give another --out")));
    }
    Ok(register)
}

/// The public half of a key that must have one.
fn public_half(key: &CreatedKey) -> Result<PublicKey, OfficerError> {
    key.public.clone().ok_or_else(|| OfficerError::Other(format!("{} has no public key", key.name)))
}

/// A certificate serial number from the HSM's random numbers.
pub(super) fn random_serial(token: &Ceremony) -> Result<CertificateSerial, OfficerError> {
    let random = token.random(20)?;
    let random = random.try_into().map_err(|_| OfficerError::Other("the HSM gave too few random bytes".to_owned()))?;
    Ok(CertificateSerial::from_random(random))
}

/// An act of a ceremony, before it is held.
#[derive(Debug, Serialize)]
pub struct PlannedAct {
    /// What would be done: `make`, `destroy` and so on.
    pub act: &'static str,
    /// To which key.
    pub name: KeyName,
    /// Its kind, or its pseudorandom function, as far as it is known.
    pub kind: String,
    /// What it is for, and what else there is to know.
    pub what: String,
    /// The files that are written for it.
    pub files: Vec<PathBuf>,
    /// Whether a second officer must approve it.
    pub needs_approval: bool,
}

/// A ceremony that was held.
#[derive(Debug)]
pub struct Held {
    /// What it did.
    pub transcript: Transcript,
    /// Whether the transcript's text is signed; a token without a log's key signs none.
    pub signed: bool,
}

impl Held {
    /// It, if nothing has failed: neither an act nor the writing of the transcript.
    fn unless(self, act: Option<OfficerError>, writing: Option<OfficerError>) -> Result<Self, OfficerError> {
        let why = match (act, writing) {
            (None, None) => return Ok(self),
            (Some(why), None) => {
                let transcript = self.transcript.files.last().map(|path| path.display().to_string());
                format!("{why}; its transcript is {}", transcript.unwrap_or_default())
            }
            (None, Some(e)) => format!("everything was done, and the transcript could not be written: {e}"),
            (Some(why), Some(e)) => format!("{why}; nor could the transcript be written: {e}"),
        };
        Err(OfficerError::CutShort { why, held: Box::new(self) })
    }
}
