//! The end of a key.

use super::proof::id_of;
use super::{Act, Before, Holding, PlannedAct};
use crate::config::Faults;
use crate::hsm::{DestroyedKey, KeyManifest};
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
        let register = before.register;
        if register.log_key(&self.key).is_some() && register.log.iter().all(|key| before.destroys(&key.name)) {
            let message = "it is the only log key, without which the daemon does not start and no transcript is signed; make \
                           another one in a ceremony before, and change over to it";
            return Err(OfficerError::Other(message.to_owned()));
        }
        let other = |known_by: &str| {
            let message = format!("it is known by {known_by}, not by {}; nothing was destroyed", self.known_by);
            OfficerError::Other(message)
        };
        if let Some(gone) = before.register.destroyed.iter().find(|gone| gone.name == self.key) {
            // A ceremony that was cut short has written it down and done it, or not, or not with both halves: this one ends it and does
            // what was to come after it.
            return if gone.fingerprint == self.known_by { Ok(()) } else { Err(other(&gone.fingerprint)) };
        }
        let known_by = before.prove(&self.key)?;
        if known_by == self.known_by { Ok(()) } else { Err(other(&known_by)) }
    }
}

impl Act for DestroyKey {
    fn destroys(&self) -> Option<&KeyName> {
        Some(&self.key)
    }

    fn needs_approval(&self, _register: Option<&KeyManifest>) -> Option<&'static str> {
        Some("destroys keys")
    }

    fn planned(&self, _: Option<&KeyManifest>) -> PlannedAct {
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
        let was_there = holding.token.has(&self.key, &id)?;
        holding.token.destroy(&self.key, &id)?;
        let act = if was_there { "destroyed" } else { "was destroyed before" };
        holding.report.add_act(act, &self.key, &id, self.known_by.clone());
        Ok(())
    }
}

pub(super) fn move_to_destroyed(register: &mut KeyManifest, name: &KeyName, id: &[u8], fingerprint: &str) {
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
