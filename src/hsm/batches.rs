//! PKCS#11 operations on objects that the daemon generates on the token: batch keys and stored pairs.
//!
//! Each operation can be repeated after a lost answer: it does not generate an existing key again, and destroying a missing
//! object succeeds.

use std::sync::Arc;
use std::time::SystemTime;

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, ObjectClass, ObjectHandle};
use cryptoki::session::SessionState;
use spp_format::keys::KeyType;
use spp_format::names::KeyName;

use super::attributes::{KeyRole, Provenance, audit};
use super::durable::sync_changed;
use super::failure::{Failure, FailureContext as _};
use super::failure_class::FailureClass;
use super::operations::TokenOperations;
use super::token::find_one;
use super::wire::{Answer, KeyOnToken, MadePair, StoredForm};
use super::{BatchName, TokenPair, batch_key_id};

/// Bytes of the CKA_ID of a pair.
const ID_LEN: u32 = 16;

impl TokenOperations {
    /// Generates an AES-256 key that is not extractable and can only wrap and unwrap.
    pub(super) fn create_batch_key(&mut self, name: &KeyName) -> Result<(), Failure> {
        let started_at = SystemTime::now();
        if self.find(ObjectClass::SECRET_KEY, name, &batch_key_id(name))?.is_none() {
            let mut template = KeyRole::Wrapping.template(name, &batch_key_id(name), &self.shared.module);
            template.push(Attribute::ValueLen(32.into()));
            let shared = Arc::clone(&self.shared);
            let _lock = shared.change_lock();
            self.session.generate_key(&Mechanism::AesKeyGen, &template).context(|| format!("generating {name}"))?;
        }
        self.batch_key(name)?;
        self.sync_objects(started_at)
    }

    /// Looks up and audits a batch key, once per session.
    pub(super) fn batch_key(&mut self, name: &KeyName) -> Result<ObjectHandle, Failure> {
        let object = self.find(ObjectClass::SECRET_KEY, name, &batch_key_id(name))?.ok_or_else(|| {
            Failure::new(FailureClass::Absent, format!("the batch key {name} is not on the token: it was destroyed"))
        })?;
        audit(&self.session, object, name, KeyRole::Wrapping, Provenance::Made)?;
        self.handles.insert(name.clone(), object);
        Ok(object)
    }

    pub(super) fn destroy_batch_key(&mut self, name: &KeyName) -> Result<(), Failure> {
        self.shared.invalidate_handles();
        let destroyed = self.destroy_if_present(ObjectClass::SECRET_KEY, name, &batch_key_id(name));
        self.shared.invalidate_handles();
        destroyed
    }

    /// Generates a pair whose private key can only be wrapped; the token does not store its public key. The pair is generated as
    /// a session object and copied to the token, so that the lock that excludes lookups is not held during the generation.
    pub(super) fn make_token_pair(&mut self, kind: KeyType, label: &KeyName) -> Result<MadePair, Failure> {
        let id = self.random(ID_LEN)?;
        let template =
            [Attribute::Token(true), Attribute::Label(label.as_str().as_bytes().to_vec()), Attribute::Id(id.clone())];
        let pair = TokenPair { label: label.clone(), id: id.clone() };
        self.with_session_pair(kind, |operations, public, private| {
            let shared = Arc::clone(&operations.shared);
            let _lock = shared.change_lock();
            let copied = operations.session.copy_object(private, &template);
            let object = copied.context(|| format!("copying a {kind} pair to the token"))?;
            shared.pairs().insert(pair, object);
            Ok(MadePair { public, stored: StoredForm::Id(id) })
        })
    }

    /// Wraps a pair of the token under the transport key.
    pub(super) fn deliver_pair(&mut self, kind: KeyType, pair: &TokenPair) -> Result<Vec<u8>, Failure> {
        let cached = self.shared.pairs().get(pair).copied();
        let object = match cached {
            Some(object) => object,
            None => self.find_pairs_by_label(self.class_of(kind), pair)?,
        };
        self.wrap_under(self.transport()?, object)
    }

    /// Looks up the handles of all pairs with this label at once, because a lookup is slow on a token with many objects.
    fn find_pairs_by_label(&self, class: ObjectClass, wanted: &TokenPair) -> Result<ObjectHandle, Failure> {
        let label = &wanted.label;
        let context = || format!("looking for the pairs {label}");
        let _lock = self.shared.lookup_lock();
        let template = [Attribute::Class(class), Attribute::Label(label.as_str().as_bytes().to_vec())];
        for object in self.session.find_objects(&template).context(context)? {
            let shown = self.session.get_attributes(object, &[AttributeType::Id]).context(context)?;
            if let Some(Attribute::Id(id)) = shown.into_iter().next() {
                self.shared.pairs().insert(TokenPair { label: label.clone(), id }, object);
            }
        }
        self.check_token_present()?;
        self.shared.pairs().get(wanted).copied().ok_or_else(|| {
            let message =
                format!("the pair {} of {label} is not on the token: it was destroyed", hex::encode(&wanted.id));
            Failure::new(FailureClass::Absent, message)
        })
    }

    pub(super) fn destroy_pair(&mut self, kind: KeyType, pair: &TokenPair) -> Result<(), Failure> {
        self.shared.pairs().remove(pair);
        self.destroy_if_present(self.class_of(kind), &pair.label, &pair.id)
    }

    /// Lists every batch key and every pair that a daemon generated on this token, for any store.
    pub(super) fn list_own(&mut self) -> Result<Answer, Failure> {
        let _lock = self.shared.lookup_lock();
        let (mut keys, mut pairs) = (Vec::new(), Vec::new());
        for class in [ObjectClass::SECRET_KEY, ObjectClass::PRIVATE_KEY] {
            let template = [Attribute::Class(class), Attribute::Token(true)];
            for object in self.session.find_objects(&template).context(|| "listing the token's keys".to_owned())? {
                let wanted = [AttributeType::Label, AttributeType::Id];
                let shown =
                    self.session.get_attributes(object, &wanted).context(|| "reading a key's names".to_owned())?;
                let (mut label, mut id) = (None, Vec::new());
                for attribute in shown {
                    match attribute {
                        Attribute::Label(bytes) => label = String::from_utf8(bytes).ok(),
                        Attribute::Id(bytes) => id = bytes,
                        _ => {}
                    }
                }
                let Some(name) = label.and_then(|label| label.parse::<KeyName>().ok()) else { continue };
                if BatchName::from_key_name(&name).is_some() {
                    keys.push(name);
                } else if BatchName::from_pair_label(&name).is_some() {
                    pairs.push(TokenPair { label: name, id });
                }
            }
        }
        self.check_token_present()?;
        Ok(Answer::Own { keys, pairs })
    }

    /// Makes the creation or destruction of a token object survive a power loss.
    pub(super) fn sync_objects(&self, since: SystemTime) -> Result<(), Failure> {
        let Some(directory) = &self.shared.module.sync_directory else { return Ok(()) };
        sync_changed(directory, since)
            .map_err(|e| Failure::new(FailureClass::Transient, format!("syncing {}: {e}", directory.display())))
    }

    /// The object class of a stored private key of this type.
    fn class_of(&self, kind: KeyType) -> ObjectClass {
        if self.shared.module.unwrappable.contains(&kind) { ObjectClass::SECRET_KEY } else { ObjectClass::PRIVATE_KEY }
    }

    /// Destroys an object if it exists, and verifies by a lookup that it no longer exists.
    fn destroy_if_present(&mut self, class: ObjectClass, label: &KeyName, id: &[u8]) -> Result<(), Failure> {
        let started_at = SystemTime::now();
        if let Some(object) = self.find(class, label, id)? {
            let shared = Arc::clone(&self.shared);
            let _lock = shared.change_lock();
            self.session.destroy_object(object).context(|| format!("destroying {label}"))?;
        }
        if self.find(class, label, id)?.is_some() {
            let message = format!("{label} still exists after C_DestroyObject");
            return Err(Failure::new(FailureClass::Transient, message));
        }
        self.sync_objects(started_at)
    }

    /// Checks the login, so that a key that cannot be seen is not reported as absent: a session without login finds no private
    /// object and gets no error (PKCS#11 v2.40 §5.6).
    fn check_logged_in(&self) -> Result<(), Failure> {
        let info =
            self.session.get_session_info().context(|| "checking whether the session is logged in".to_owned())?;
        match info.session_state() {
            SessionState::RwUser | SessionState::RoUser => Ok(()),
            state => Err(Failure::new(FailureClass::SessionLost, format!("the session is not logged in: {state:?}"))),
        }
    }

    /// Checks that the token shows a key of the manifest: a removed token can look empty for a while, without an error.
    fn check_token_present(&self) -> Result<(), Failure> {
        self.check_logged_in()?;
        let keys = &self.shared.keys;
        let is_found = |(name, key): (_, &KeyOnToken)| find_one(&self.session, key.role.class(), name, &key.id).is_ok();
        match keys.is_empty() || keys.iter().any(is_found) {
            true => Ok(()),
            false => Err(Failure::new(FailureClass::ModuleLost, "the token shows no key: it may have been removed")),
        }
    }

    /// Finds the only object of a class with this label and this CKA_ID.
    fn find(&self, class: ObjectClass, label: &KeyName, id: &[u8]) -> Result<Option<ObjectHandle>, Failure> {
        let template =
            [Attribute::Class(class), Attribute::Label(label.as_str().as_bytes().to_vec()), Attribute::Id(id.to_vec())];
        let _lock = self.shared.lookup_lock();
        let find = || self.session.find_objects(&template).context(|| format!("looking for {label}"));
        let mut found = find()?;
        if found.is_empty() {
            // The token may have returned in between: then the second lookup finds the object.
            self.check_token_present()?;
            found = find()?;
        }
        match found.as_slice() {
            [] => Ok(None),
            [object] => Ok(Some(*object)),
            more => {
                let message = format!("found {} objects named {label}, expected exactly one", more.len());
                Err(Failure::new(FailureClass::Rejected, message))
            }
        }
    }
}
