//! Proves that a key on the token is the one in keys.toml, by using it and comparing the result.

use spp_format::names::KeyName;

use crate::hsm::{Ceremony, KeyManifest};
use crate::officer::OfficerError;

/// Proves that the token holds this key of the manifest and returns its fingerprint or check value.
pub(super) fn prove(token: &Ceremony, manifest: &KeyManifest, name: &KeyName) -> Result<String, OfficerError> {
    let fingerprint = manifest.fingerprint_text(name).ok_or_else(|| unknown_key(name))?;
    let pairs = manifest.signing.iter().map(|key| (&key.name, &key.id, &key.public_key));
    let mut pairs = pairs.chain(manifest.log.iter().map(|key| (&key.name, &key.id, &key.public_key)));
    let matches = if let Some((name, id, public)) = pairs.find(|(pair, ..)| *pair == name) {
        token.proves_possession(name, id, public)?
    } else if let Some(key) = manifest.master_key(name) {
        token.check_value(name, &key.id, key.prf)? == key.check_value
    } else if let Some(key) = manifest.backup_key(name) {
        token.check_value_of_backup_key(key)? == key.check_value
    } else {
        false
    };
    if matches {
        return Ok(fingerprint);
    }
    Err(OfficerError::Other(format!(
        "key {name} on the token is not the one in keys.toml ({fingerprint}): keys.toml belongs to another token, or the key was \
         replaced; do not continue with this token"
    )))
}

pub(super) fn unknown_key(name: &KeyName) -> OfficerError {
    OfficerError::Other(format!("keys.toml has no key {name}"))
}

/// The CKA_ID of a key in the manifest.
pub(super) fn cka_id(manifest: &KeyManifest, name: &KeyName) -> Result<Vec<u8>, OfficerError> {
    let mut given = manifest.used_names().filter(|(given, _)| *given == name);
    given.next().map(|(_, id)| id.to_vec()).ok_or_else(|| unknown_key(name))
}
