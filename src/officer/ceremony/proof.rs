//! Whether a key on the token is the one of the register: it is made to work, and what comes of it is compared.

use super::{Act, Before, Holding, PlannedAct};
use crate::config::Faults;
use crate::hsm::{Ceremony, KeyManifest};
use crate::names::KeyName;
use crate::officer::OfficerError;

/// Proves a key of the register and says what it is known by.
pub(super) fn prove(token: &Ceremony, register: &KeyManifest, name: &KeyName) -> Result<String, OfficerError> {
    let known_by = register.known_by(name).ok_or_else(|| not_there(name))?;
    let pairs = register.signing.iter().map(|key| (&key.name, &key.id, &key.public_key));
    let mut pairs = pairs.chain(register.log.iter().map(|key| (&key.name, &key.id, &key.public_key)));
    let is_it = if let Some((name, id, public)) = pairs.find(|(pair, ..)| *pair == name) {
        token.proves(name, id, public)?
    } else if let Some(key) = register.master_key(name) {
        token.check_value(name, &key.id, key.prf)? == key.check_value
    } else if let Some(key) = register.backup_key(name) {
        token.check_value_of_backup_key(key)? == key.check_value
    } else {
        false
    };
    if is_it {
        return Ok(known_by);
    }
    Err(OfficerError::Other(format!(
        "the key {name} on the token is not the one of the register ({known_by}): the register is of another token, or the key was \
         replaced; nothing may go on with it"
    )))
}

pub(super) fn not_there(name: &KeyName) -> OfficerError {
    OfficerError::Other(format!("the register has no key {name}"))
}

/// The CKA_ID of a key of the register.
pub(super) fn id_of(register: &KeyManifest, name: &KeyName) -> Result<Vec<u8>, OfficerError> {
    let mut given = register.given().filter(|(given, _)| *given == name);
    given.next().map(|(_, id)| id.to_vec()).ok_or_else(|| not_there(name))
}

/// `[[check_value]]`.
pub(super) struct CheckKey {
    pub(super) key: KeyName,
}

impl Act for CheckKey {
    fn planned(&self, register: Option<&KeyManifest>) -> PlannedAct {
        PlannedAct {
            act: "check",
            name: self.key.clone(),
            kind: String::new(),
            what: register.and_then(|register| register.known_by(&self.key)).unwrap_or_default(),
            files: Vec::new(),
            needs_approval: false,
        }
    }

    fn look(&self, before: &Before<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        if !before.makes(&self.key) {
            faults.note(format!("check_value {}", self.key), before.prove(&self.key));
        }
        Ok(())
    }

    fn hold(&self, holding: &mut Holding<'_>) -> Result<(), OfficerError> {
        let known_by = prove(holding.token, &holding.register, &self.key)?;
        let id = id_of(&holding.register, &self.key)?;
        holding.report.add_act("checked", &self.key, &id, known_by);
        Ok(())
    }
}
