//! What the daemon itself makes on the token, in PKCS#11: batch keys, and pairs that are kept there. Each of these verbs may be
//! repeated after an answer that was lost: what is there already is not made, what is gone already is not destroyed.

use std::sync::Arc;
use std::time::SystemTime;

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, ObjectClass, ObjectHandle};
use cryptoki::session::SessionState;

use super::attributes::{KeyRole, Provenance, audit};
use super::durable::sync_changed;
use super::failure::{Doing as _, Failure, FailureClass};
use super::operations::TokenOperations;
use super::token::find_one;
use super::wire::{Answer, Kept, KeyOnToken, MadePair};
use crate::keys::{BatchName, KeyKind, TokenPair, batch_key_id};
use crate::names::KeyName;

/// Bytes of the CKA_ID of a pair.
const ID_LEN: u32 = 16;

impl TokenOperations {
    /// AES-256, not extractable, for wrapping and unwrapping alone.
    pub(super) fn create_batch_key(&mut self, name: &KeyName) -> Result<(), Failure> {
        let begun = SystemTime::now();
        if self.find(ObjectClass::SECRET_KEY, name, &batch_key_id(name))?.is_none() {
            let mut template = KeyRole::Wrapping.template(name, &batch_key_id(name), &self.shared.module);
            template.push(Attribute::ValueLen(32.into()));
            let shared = Arc::clone(&self.shared);
            let _alone = shared.changing();
            self.session.generate_key(&Mechanism::AesKeyGen, &template).doing(|| format!("generating {name}"))?;
        }
        self.batch_key(name)?;
        self.sync_objects(begun)
    }

    /// Looks a batch key up, once per session, and audits it.
    pub(super) fn batch_key(&mut self, name: &KeyName) -> Result<ObjectHandle, Failure> {
        let object = self.find(ObjectClass::SECRET_KEY, name, &batch_key_id(name))?.ok_or_else(|| {
            Failure::new(FailureClass::Absent, format!("the batch key {name} is not on the token: it was destroyed"))
        })?;
        audit(&self.session, object, name, KeyRole::Wrapping, Provenance::Made)?;
        self.handles.insert(name.clone(), object);
        Ok(object)
    }

    pub(super) fn destroy_batch_key(&mut self, name: &KeyName) -> Result<(), Failure> {
        self.shared.forget_handles();
        let destroyed = self.destroy_found(ObjectClass::SECRET_KEY, name, &batch_key_id(name));
        self.shared.forget_handles();
        destroyed
    }

    /// A pair that can do nothing in the HSM but leave it wrapped; its public half is not kept there. It is generated as a
    /// session object and copied to the token, since the change of the token alone excludes look-ups, not the generation.
    pub(super) fn make_token_pair(&mut self, kind: KeyKind, label: &KeyName) -> Result<MadePair, Failure> {
        let id = self.random(ID_LEN)?;
        let template =
            [Attribute::Token(true), Attribute::Label(label.as_str().as_bytes().to_vec()), Attribute::Id(id.clone())];
        let pair = TokenPair { label: label.clone(), id: id.clone() };
        self.with_session_pair(kind, |verbs, public, private| {
            let shared = Arc::clone(&verbs.shared);
            let _alone = shared.changing();
            let copied = verbs.session.copy_object(private, &template);
            let object = copied.doing(|| format!("putting a {kind} pair on the token"))?;
            shared.pairs().insert(pair, object);
            Ok(MadePair { public, kept: Kept::Id(id) })
        })
    }

    /// From the token to delivery.
    pub(super) fn deliver_pair(&mut self, kind: KeyKind, pair: &TokenPair) -> Result<Vec<u8>, Failure> {
        let known = self.shared.pairs().get(pair).copied();
        let object = match known {
            Some(object) => object,
            None => self.look_pairs_up(self.class_of(kind), pair)?,
        };
        self.wrap_under(self.transport()?, object)
    }

    /// The handles of all pairs with the label at once: on a token with many objects each look-up is slow.
    fn look_pairs_up(&self, class: ObjectClass, wanted: &TokenPair) -> Result<ObjectHandle, Failure> {
        let label = &wanted.label;
        let doing = || format!("looking for the pairs {label}");
        let _shared = self.shared.looking();
        let template = [Attribute::Class(class), Attribute::Label(label.as_str().as_bytes().to_vec())];
        for object in self.session.find_objects(&template).doing(doing)? {
            let shown = self.session.get_attributes(object, &[AttributeType::Id]).doing(doing)?;
            if let Some(Attribute::Id(id)) = shown.into_iter().next() {
                self.shared.pairs().insert(TokenPair { label: label.clone(), id }, object);
            }
        }
        self.must_be_there()?;
        self.shared.pairs().get(wanted).copied().ok_or_else(|| {
            let message =
                format!("the pair {} of {label} is not on the token: it was destroyed", hex::encode(&wanted.id));
            Failure::new(FailureClass::Absent, message)
        })
    }

    pub(super) fn destroy_pair(&mut self, kind: KeyKind, pair: &TokenPair) -> Result<(), Failure> {
        self.shared.pairs().remove(pair);
        self.destroy_found(self.class_of(kind), &pair.label, &pair.id)
    }

    /// Every batch key and every pair that a daemon made on this token, whichever its store.
    pub(super) fn list_own(&mut self) -> Result<Answer, Failure> {
        let _shared = self.shared.looking();
        let (mut keys, mut pairs) = (Vec::new(), Vec::new());
        for class in [ObjectClass::SECRET_KEY, ObjectClass::PRIVATE_KEY] {
            let template = [Attribute::Class(class), Attribute::Token(true)];
            for object in self.session.find_objects(&template).doing(|| "listing the token's keys".to_owned())? {
                let wanted = [AttributeType::Label, AttributeType::Id];
                let shown =
                    self.session.get_attributes(object, &wanted).doing(|| "reading a key's names".to_owned())?;
                let (mut label, mut id) = (None, Vec::new());
                for attribute in shown {
                    match attribute {
                        Attribute::Label(bytes) => label = String::from_utf8(bytes).ok(),
                        Attribute::Id(bytes) => id = bytes,
                        _ => {}
                    }
                }
                let Some(name) = label.and_then(|label| label.parse::<KeyName>().ok()) else { continue };
                if BatchName::of_key(&name).is_some() {
                    keys.push(name);
                } else if BatchName::of_pairs(&name).is_some() {
                    pairs.push(TokenPair { label: name, id });
                }
            }
        }
        self.must_be_there()?;
        Ok(Answer::Own { keys, pairs })
    }

    /// A new or destroyed token object must be so after a power loss, too.
    pub(super) fn sync_objects(&self, since: SystemTime) -> Result<(), Failure> {
        let Some(directory) = &self.shared.module.sync_directory else { return Ok(()) };
        sync_changed(directory, since)
            .map_err(|e| Failure::new(FailureClass::Transient, format!("syncing {}: {e}", directory.display())))
    }

    /// How a private key of this kind is kept on the token.
    fn class_of(&self, kind: KeyKind) -> ObjectClass {
        if self.shared.module.unwrappable.contains(&kind) { ObjectClass::SECRET_KEY } else { ObjectClass::PRIVATE_KEY }
    }

    /// Destroys an object if it is there, and looks again: it must be gone.
    fn destroy_found(&mut self, class: ObjectClass, label: &KeyName, id: &[u8]) -> Result<(), Failure> {
        let begun = SystemTime::now();
        if let Some(object) = self.find(class, label, id)? {
            let shared = Arc::clone(&self.shared);
            let _alone = shared.changing();
            self.session.destroy_object(object).doing(|| format!("destroying {label}"))?;
        }
        if self.find(class, label, id)?.is_some() {
            let message = format!("{label} is still there after C_DestroyObject");
            return Err(Failure::new(FailureClass::Transient, message));
        }
        self.sync_objects(begun)
    }

    /// A session that lost its login finds no private object, and no error either (PKCS#11 v2.40 §5.6): nothing is absent only
    /// because it cannot be seen.
    fn must_be_logged_in(&self) -> Result<(), Failure> {
        let info = self.session.get_session_info().doing(|| "looking whether the session is logged in".to_owned())?;
        match info.session_state() {
            SessionState::RwUser | SessionState::RoUser => Ok(()),
            state => Err(Failure::new(FailureClass::SessionLost, format!("the session is not logged in: {state:?}"))),
        }
    }

    /// A token that is taken away looks empty for a while, and no error says so. One that shows a key of the register is there.
    fn must_be_there(&self) -> Result<(), Failure> {
        self.must_be_logged_in()?;
        let keys = &self.shared.keys;
        let shows = |(name, key): (_, &KeyOnToken)| find_one(&self.session, key.role.class(), name, &key.id).is_ok();
        match keys.is_empty() || keys.iter().any(shows) {
            true => Ok(()),
            false => Err(Failure::new(FailureClass::ModuleLost, "the token shows no key: it may have been taken away")),
        }
    }

    /// The one object of a class with this label and this CKA_ID, if there is one.
    fn find(&self, class: ObjectClass, label: &KeyName, id: &[u8]) -> Result<Option<ObjectHandle>, Failure> {
        let template =
            [Attribute::Class(class), Attribute::Label(label.as_str().as_bytes().to_vec()), Attribute::Id(id.to_vec())];
        let _shared = self.shared.looking();
        let look = || self.session.find_objects(&template).doing(|| format!("looking for {label}"));
        let mut found = look()?;
        if found.is_empty() {
            // It may have come back in between: then the second look finds what the first did not.
            self.must_be_there()?;
            found = look()?;
        }
        match found.as_slice() {
            [] => Ok(None),
            [object] => Ok(Some(*object)),
            more => {
                let message = format!("{} objects are named {label}; exactly one must be", more.len());
                Err(Failure::new(FailureClass::Rejected, message))
            }
        }
    }
}
