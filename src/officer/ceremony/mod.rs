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
use crate::hsm::{Ceremony, CreatedKey, KeyRegister, TokenIdentity};
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

    /// The new files, in the directory of the register.
    fn files(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// What it does to keys that are there, if one officer alone may not do that.
    fn needs_approval(&self) -> Option<&'static str> {
        None
    }

    /// What it would do, for a look at it before; more exactly with the register.
    fn planned(&self, register: Option<&KeyRegister>) -> PlannedAct;

    /// Notes everything that would be in its way. Nothing is changed.
    fn look(&self, before: &Before<'_>, faults: &mut Faults) -> Result<(), OfficerError>;

    /// Does it.
    fn hold(&self, holding: &mut Holding<'_>) -> Result<(), OfficerError>;
}

/// The site before a ceremony.
struct Before<'a> {
    token: &'a Ceremony,
    register: &'a KeyRegister,
    /// The names of the keys that the ceremony itself will make before they are needed.
    making: BTreeSet<&'a KeyName>,
}

impl Before<'_> {
    fn makes(&self, name: &KeyName) -> bool {
        self.making.contains(name)
    }
}

/// A ceremony that is being held.
struct Holding<'a> {
    token: &'a Ceremony,
    out: &'a Path,
    register: KeyRegister,
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

    /// What of it needs the approval of a second officer; empty if one may hold it alone.
    pub fn needs_approval(&self) -> Vec<&'static str> {
        let needed: BTreeSet<_> = self.acts.iter().filter_map(|act| act.needs_approval()).collect();
        needed.into_iter().collect()
    }

    /// Does everything on the token and writes the register, certificates and the transcript into `out`.
    ///
    /// All of it is looked at before anything is done. A register that is there already is added to, if it is of the same token.
    /// It is replaced after each key: a ceremony that is cut short leaves at most the key that it was making unwritten, and the
    /// next one says that its name is taken.
    pub fn run(
        &self,
        token: &Ceremony,
        out: &Path,
        officers: &[OfficerName],
        permit: Option<Permit>,
    ) -> Result<Held, OfficerError> {
        let approval = self.approval(permit)?;
        self.look(token, out)?;
        make_directory(out)?;
        let register = register_to_add_to(&out.join("keys.toml"), token.token())?;
        let subject = Subject { file: &self.file, file_hash: &self.file_hash, officers, approval };
        let mut holding = Holding { token, out, register, report: Transcript::begin(subject, token) };
        for act in &self.acts {
            act.hold(&mut holding)?;
        }
        let Holding { register, mut report, .. } = holding;
        report.files.push(out.join("keys.toml"));
        let signed = report.write(out, token, register.log.first())?;
        Ok(Held { transcript: report, signed })
    }

    fn approval(&self, permit: Option<Permit>) -> Result<Option<Approval>, OfficerError> {
        let needed = self.needs_approval();
        let file = self.file.display().to_string();
        match permit {
            Some(permit) if *permit.file_sha256() != self.file_hash => Err(OfficerError::ApprovalOfAnother { file }),
            None if !needed.is_empty() => Err(OfficerError::NeedsApproval { acts: needed.join(" and "), file }),
            permit => Ok(permit.map(Permit::into_parts).map(|(request, officers)| Approval { request, officers })),
        }
    }

    /// What a run would do, for a look at it before. With the directory of its register more exactly.
    pub fn acts(&self, out: Option<&Path>) -> Result<Vec<PlannedAct>, OfficerError> {
        let register = out.map(|out| out.join("keys.toml")).filter(|path| path.exists());
        let register = register.map(|path| KeyRegister::load(&path)).transpose()?;
        Ok(self.acts.iter().map(|act| act.planned(register.as_ref())).collect())
    }

    /// Whether a run could do everything: names and files are free, keys that it works on are there. Nothing is changed.
    pub fn look(&self, token: &Ceremony, out: &Path) -> Result<(), OfficerError> {
        let register = register_to_add_to(&out.join("keys.toml"), token.token())?;
        let mut faults = Faults::default();
        for name in self.acts.iter().filter_map(|act| act.gives()) {
            if !token.is_free(name)? {
                faults.add("token", format!("has an object named {name} already; nothing is ever overwritten"));
            } else if register.given().any(|(given, _)| given == name) {
                faults.add("register", format!("the name {name} was given already; a name is never used again"));
            }
        }
        for path in self.acts.iter().flat_map(|act| act.files()) {
            faults.note("files", must_be_new(&out.join(path)));
        }
        let making = self.acts.iter().filter_map(|act| act.gives()).collect();
        let before = Before { token, register: &register, making };
        for act in &self.acts {
            act.look(&before, &mut faults)?;
        }
        faults.ok_or_all(Some(())).map_err(OfficerError::Faults)
    }
}

impl Holding<'_> {
    /// Replaces the register's file.
    fn save(&self) -> Result<(), OfficerError> {
        let text = self.register.to_toml().map_err(|e| OfficerError::Other(e.to_string()))?;
        Ok(replace(&self.out.join("keys.toml"), text.as_bytes())?)
    }
}

/// The register of an earlier ceremony on this token, or an empty one.
fn register_to_add_to(path: &Path, token: &TokenIdentity) -> Result<KeyRegister, OfficerError> {
    if !path.exists() {
        return Ok(KeyRegister::empty(token.clone()));
    }
    let register = KeyRegister::load(path)?;
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
    let random = random.try_into().map_err(|_| OfficerError::Other("the HSM gave too few random octets".to_owned()))?;
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
pub struct Held {
    /// What it did.
    pub transcript: Transcript,
    /// Whether the transcript's text is signed; a token without a log's key signs none.
    pub signed: bool,
}
