//! The end of a key.

use super::proof::{id_of, prove};
use super::{Act, Before, Holding, PlannedAct};
use crate::config::Faults;
use crate::hsm::{DestroyedKey, KeyRegister};
use crate::names::KeyName;
use crate::officer::{OfficerError, now};

/// `[[destroy]]`.
pub(super) struct DestroyKey {
    pub(super) key: KeyName,
    /// What the key must be known by, so that the file can be of no other one.
    pub(super) known_by: String,
}

impl DestroyKey {
    fn must_be_the_one(&self, before: &Before<'_>) -> Result<(), OfficerError> {
        let other = |known_by: &str| {
            let message = format!("it is known by {known_by}, not by {}; nothing was destroyed", self.known_by);
            OfficerError::Other(message)
        };
        if let Some(gone) = before.register.destroyed.iter().find(|gone| gone.name == self.key) {
            // A ceremony that was cut short has written it down and not done it, or not with both halves: this one ends it.
            return match before.token.has(&gone.name, &gone.id)? {
                true if gone.fingerprint == self.known_by => Ok(()),
                true => Err(other(&gone.fingerprint)),
                false => Err(OfficerError::Other("it was destroyed already".to_owned())),
            };
        }
        let known_by = prove(before.token, before.register, &self.key)?;
        if known_by == self.known_by { Ok(()) } else { Err(other(&known_by)) }
    }
}

impl Act for DestroyKey {
    fn needs_approval(&self) -> Option<&'static str> {
        Some("destroys keys")
    }

    fn planned(&self, _: Option<&KeyRegister>) -> PlannedAct {
        PlannedAct {
            act: "destroy",
            name: self.key.clone(),
            kind: String::new(),
            what: format!("for good: {}", self.known_by),
            files: Vec::new(),
            needs_approval: true,
        }
    }

    fn look(&self, before: &Before<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        faults.note(format!("destroy {}", self.key), self.must_be_the_one(before));
        Ok(())
    }

    fn hold(&self, holding: &mut Holding<'_>) -> Result<(), OfficerError> {
        let id = id_of(&holding.register, &self.key)?;
        // Written first: a crash here leaves a key that nobody uses and that the same ceremony destroys when it is held again. The
        // other way round the daemon would miss a key of its register.
        move_to_destroyed(&mut holding.register, &self.key, &id, &self.known_by);
        holding.save()?;
        holding.token.destroy(&self.key, &id)?;
        holding.report.add_act("destroyed", &self.key, &id, self.known_by.clone());
        Ok(())
    }
}

pub(super) fn move_to_destroyed(register: &mut KeyRegister, name: &KeyName, id: &[u8], fingerprint: &str) {
    if register.destroyed.iter().any(|gone| gone.name == *name) {
        return;
    }
    let version = register.master_key(name).map(|key| key.version);
    let of_signing = register.signing_key(name).and_then(|key| key.replaces.clone());
    let replaces = of_signing.or_else(|| register.master_key(name).and_then(|key| key.replaces.clone()));
    register.signing.retain(|key| key.name != *name);
    register.log.retain(|key| key.name != *name);
    register.master.retain(|key| key.name != *name);
    register.backup.retain(|key| key.name != *name);
    let (name, id, fingerprint) = (name.clone(), id.to_vec(), fingerprint.to_owned());
    register.destroyed.push(DestroyedKey { name, id, fingerprint, time: now(), version, replaces });
}
