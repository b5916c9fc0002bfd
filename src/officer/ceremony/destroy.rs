//! Destroys keys on the token.

use spp_format::file_format::Faults;
use spp_format::names::KeyName;

use super::proof::cka_id;
use super::step::{CeremonyRun, PlannedStep, PreflightContext, Step};
use crate::hsm::{DestroyedKey, KeyManifest};
use crate::officer::{OfficerError, now};

/// `[[destroy]]`.
pub(super) struct DestroyKey {
    pub(super) key: KeyName,
    /// Expected fingerprint or check value, so that the file identifies exactly one key.
    pub(super) fingerprint: String,
}

impl DestroyKey {
    fn check_target(&self, context: &PreflightContext<'_>) -> Result<(), OfficerError> {
        let manifest = context.manifest;
        if manifest.log_key(&self.key).is_some() && manifest.log.iter().all(|key| context.destroys(&key.name)) {
            let message = "it is the only log key; without one the daemon does not start and no transcript is signed: \
                           create another one in an earlier ceremony and switch to it";
            return Err(OfficerError::Other(message.to_owned()));
        }
        let mismatch = |fingerprint: &str| {
            let message = format!(
                "fingerprint mismatch: the key has {fingerprint}, the file names {}; nothing was destroyed",
                self.fingerprint
            );
            OfficerError::Other(message)
        };
        if let Some(destroyed) = context.manifest.destroyed.iter().find(|destroyed| destroyed.name == self.key) {
            // An interrupted ceremony recorded the destruction; the key may still be on the token, whole or in part. This run
            // completes the destruction and the steps after it.
            return if destroyed.fingerprint == self.fingerprint {
                Ok(())
            } else {
                Err(mismatch(&destroyed.fingerprint))
            };
        }
        let fingerprint = context.prove(&self.key)?;
        if fingerprint == self.fingerprint { Ok(()) } else { Err(mismatch(&fingerprint)) }
    }
}

impl Step for DestroyKey {
    fn destroyed_key(&self) -> Option<&KeyName> {
        Some(&self.key)
    }

    fn needs_approval(&self, _manifest: Option<&KeyManifest>) -> Option<&'static str> {
        Some("destroys keys")
    }

    fn describe(&self, _: Option<&KeyManifest>) -> PlannedStep {
        PlannedStep {
            act: "destroy",
            name: self.key.clone(),
            kind: String::new(),
            what: format!("irreversibly: {}", self.fingerprint),
            files: Vec::new(),
            needs_approval: true,
        }
    }

    fn preflight(&self, context: &PreflightContext<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        faults.note(format!("destroy {}", self.key), self.check_target(context));
        Ok(())
    }

    fn execute(&self, run: &mut CeremonyRun<'_>) -> Result<(), OfficerError> {
        let id = cka_id(&run.manifest, &self.key)?;
        // Record the destruction first: a crash here leaves an unused key, which the same ceremony destroys when it runs again.
        // In the opposite order the daemon would miss a key of keys.toml.
        mark_destroyed(&mut run.manifest, &self.key, &id, &self.fingerprint);
        run.save()?;
        let was_there = run.token.has(&self.key, &id)?;
        run.token.destroy(&self.key, &id)?;
        let act = if was_there { "destroyed" } else { "was destroyed before" };
        run.report.add_step(act, &self.key, &id, self.fingerprint.clone());
        Ok(())
    }
}

pub(super) fn mark_destroyed(manifest: &mut KeyManifest, name: &KeyName, id: &[u8], fingerprint: &str) {
    if manifest.destroyed.iter().any(|destroyed| destroyed.name == *name) {
        return;
    }
    let version = manifest.master_key(name).map(|key| key.version);
    let signing_replaces = manifest.signing_key(name).and_then(|key| key.replaces.clone());
    let replaces = signing_replaces.or_else(|| manifest.master_key(name).and_then(|key| key.replaces.clone()));
    manifest.signing.retain(|key| key.name != *name);
    manifest.log.retain(|key| key.name != *name);
    manifest.master.retain(|key| key.name != *name);
    manifest.backup.retain(|key| key.name != *name);
    let (name, id, fingerprint) = (name.clone(), id.to_vec(), fingerprint.to_owned());
    manifest.destroyed.push(DestroyedKey { name, id, fingerprint, time: now(), version, replaces });
}
