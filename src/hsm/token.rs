//! A token in an opened module: found by label and serial number, logged in once, keys found exactly.

use std::path::Path;

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::object::{Attribute, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use cryptoki::types::AuthPin;
use serde::{Deserialize, Serialize};

use super::failure::{Doing as _, Failure, FailureClass};
use super::module::ModuleProfile;
use super::pin::PinSource;
use crate::names::KeyName;
use crate::secret::SecretBytes;

/// A token's names. Slot numbers move; these do not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenIdentity {
    /// The label, without the padding.
    pub label: String,
    /// The serial number, without the padding; empty means that the label alone decides.
    pub serial: String,
}

/// A loaded module with one token of it, logged in. One per process.
pub(crate) struct Token {
    module: Pkcs11,
    slot: Slot,
    identity: TokenIdentity,
    /// Never closes: closing the last session would log everybody out.
    anchor: Session,
    description: String,
}

impl Token {
    /// Loads the module, finds the token, logs in. A wrong PIN is tried this once.
    pub(crate) fn open(profile: &ModuleProfile, wanted: &TokenIdentity, pin: &PinSource) -> Result<Self, Failure> {
        Self::open_in(load(&profile.library)?, profile, wanted, pin)
    }

    /// Initialises a free token and opens it: a module that is loaded once more in one process does not see it.
    pub(crate) fn initialise(
        profile: &ModuleProfile,
        label: &str,
        so_pin: &PinSource,
        user_pin: &PinSource,
    ) -> Result<Self, Failure> {
        let module = load(&profile.library)?;
        let identity = initialise_in(&module, profile, label, so_pin, user_pin)?;
        Self::open_in(module, profile, &identity, user_pin)
    }

    fn open_in(
        module: Pkcs11,
        profile: &ModuleProfile,
        wanted: &TokenIdentity,
        pin: &PinSource,
    ) -> Result<Self, Failure> {
        let (slot, identity) = find_token(&module, wanted, profile)?;
        let info = module.get_library_info().doing(|| "reading the module's description".to_owned())?;
        let version = info.library_version();
        let description = format!("{} {}.{}", info.library_description().trim(), version.major(), version.minor());
        let pin = pin.read().map_err(|e| Failure::new(FailureClass::Rejected, e.to_string()))?;
        let anchor = module.open_rw_session(slot).doing(|| format!("opening a session on {}", identity.label))?;
        let info = match module.get_token_info(slot) {
            Err(_) if profile.one_nameless_token => None,
            info => Some(info.doing(|| format!("looking at {}", identity.label))?),
        };
        if let Some(info) = info.filter(|info| info.user_pin_locked() || info.user_pin_final_try()) {
            let message = format!(
                "the user PIN of {} {}; the token's security officer must look at it first",
                identity.label,
                if info.user_pin_locked() { "is locked" } else { "may be tried once more, and then the token locks" }
            );
            return Err(Failure::new(FailureClass::Permanent, message));
        }
        login(&anchor, pin.as_ref(), &identity)?;
        Ok(Self { module, slot, identity, anchor, description })
    }

    /// Another session; it is logged in already, since the login is the token's.
    pub(crate) fn session(&self) -> Result<Session, Failure> {
        self.module.open_rw_session(self.slot).doing(|| format!("opening a session on {}", self.identity.label))
    }

    /// Uses the session that holds the login.
    pub(crate) fn keep_alive(&self) -> Result<(), Failure> {
        self.anchor.generate_random_vec(1).map(drop).doing(|| "keeping the login".to_owned())
    }

    pub(crate) const fn identity(&self) -> &TokenIdentity {
        &self.identity
    }

    pub(crate) fn description(&self) -> &str {
        &self.description
    }
}

/// Exactly one object of the class has this label and this CKA_ID.
pub(crate) fn find_one(
    session: &Session,
    class: ObjectClass,
    name: &KeyName,
    id: &[u8],
) -> Result<ObjectHandle, Failure> {
    let template =
        [Attribute::Class(class), Attribute::Label(name.as_str().as_bytes().to_vec()), Attribute::Id(id.to_vec())];
    let found = session.find_objects(&template).doing(|| format!("looking for the key {name}"))?;
    match found.as_slice() {
        [object] => Ok(*object),
        [] => Err(Failure::new(
            FailureClass::ModuleLost,
            format!("the key {name} (CKA_ID {}) is not on the token", hex::encode(id)),
        )),
        more => Err(Failure::new(
            FailureClass::Rejected,
            format!("{} objects are named {name} with CKA_ID {}; exactly one must be", more.len(), hex::encode(id)),
        )),
    }
}

/// Initialises an empty slot's token with a label, a security officer's PIN and a user PIN, so that no PIN needs to be an
/// argument of a vendor's tool. Refuses a label that exists.
pub fn initialise_token(
    profile: &ModuleProfile,
    label: &str,
    so_pin: &PinSource,
    user_pin: &PinSource,
) -> Result<TokenIdentity, String> {
    let module = load(&profile.library).map_err(|failure| failure.message)?;
    initialise_in(&module, profile, label, so_pin, user_pin).map_err(|failure| failure.message)
}

fn initialise_in(
    module: &Pkcs11,
    profile: &ModuleProfile,
    label: &str,
    so_pin: &PinSource,
    user_pin: &PinSource,
) -> Result<TokenIdentity, Failure> {
    let rejected = |e: super::pin::PinError| Failure::new(FailureClass::Rejected, e.to_string());
    let (so_pin, user_pin) = (so_pin.read().map_err(rejected)?, user_pin.read().map_err(rejected)?);
    let wanted = TokenIdentity { label: label.to_owned(), serial: String::new() };
    if let Ok((_, found)) = find_token(module, &wanted, profile) {
        let message = format!("a token named {label} exists already (serial {})", found.serial);
        return Err(Failure::new(FailureClass::Rejected, message));
    }
    let slots = module.get_slots_with_token().doing(|| "listing slots".to_owned())?;
    let free = slots.into_iter().find(|slot| module.get_token_info(*slot).is_ok_and(|t| !t.token_initialized()));
    let slot = free.ok_or_else(|| Failure::new(FailureClass::Rejected, "no slot has an uninitialised token"))?;
    let typed = || Failure::new(FailureClass::Rejected, "a token is initialised with PINs from files or a terminal");
    let so_pin = auth_pin(so_pin.as_ref().ok_or_else(typed)?)?;
    let user_pin = auth_pin(user_pin.as_ref().ok_or_else(typed)?)?;
    module.init_token(slot, &so_pin, label).doing(|| format!("initialising the token {label}"))?;
    let (slot, identity) = find_token(module, &wanted, profile)?;
    let session = module.open_rw_session(slot).doing(|| "opening a session".to_owned())?;
    session.login(UserType::So, Some(&so_pin)).doing(|| "logging in as security officer".to_owned())?;
    session.init_pin(&user_pin).doing(|| "setting the user PIN".to_owned())?;
    Ok(identity)
}

pub(super) fn load(library: &Path) -> Result<Pkcs11, Failure> {
    let module = Pkcs11::new(library).doing(|| format!("loading {}", library.display()))?;
    module
        .initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))
        .doing(|| format!("initialising {}", library.display()))?;
    Ok(module)
}

fn find_token(
    module: &Pkcs11,
    wanted: &TokenIdentity,
    profile: &ModuleProfile,
) -> Result<(Slot, TokenIdentity), Failure> {
    if profile.one_nameless_token {
        let slots = module.get_slots_with_token().doing(|| "listing tokens".to_owned())?;
        return match slots.as_slice() {
            [slot] => Ok((*slot, wanted.clone())),
            // The one token is away, say: that is what a lost token looks like.
            [] => Err(Failure::new(FailureClass::ModuleLost, "the module has no token")),
            more => {
                let message = format!("the module has {} tokens, and their names cannot be read", more.len());
                Err(Failure::new(FailureClass::Rejected, message))
            }
        };
    }
    let mut found = Vec::new();
    let mut seen = Vec::new();
    for slot in module.get_slots_with_initialized_token().doing(|| "listing tokens".to_owned())? {
        let info = module.get_token_info(slot).doing(|| "reading a token's names".to_owned())?;
        let identity =
            TokenIdentity { label: info.label().trim().to_owned(), serial: info.serial_number().trim().to_owned() };
        if identity.label == wanted.label && (wanted.serial.is_empty() || identity.serial == wanted.serial) {
            found.push((slot, identity.clone()));
        }
        seen.push(format!("{} ({})", identity.label, identity.serial));
    }
    if found.len() > 1 {
        let message = format!("{} tokens are named {}; give the serial number too", found.len(), wanted.label);
        return Err(Failure::new(FailureClass::Rejected, message));
    }
    found.pop().ok_or_else(|| {
        let have = if seen.is_empty() { "none".to_owned() } else { seen.join(", ") };
        Failure::new(
            FailureClass::ModuleLost,
            format!("no token named {} (serial {}); the module has: {have}", wanted.label, wanted.serial),
        )
    })
}

fn login(session: &Session, pin: Option<&SecretBytes>, identity: &TokenIdentity) -> Result<(), Failure> {
    let pin = pin.map(auth_pin).transpose()?;
    match session.login(UserType::User, pin.as_ref()) {
        // Login belongs to the token, not to the session: somebody in this process was first.
        Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(()),
        Err(e) => {
            let failure = Failure::of(&format!("logging in to the token {}", identity.label), &e);
            // Whatever a module calls it: a login that was refused is not tried again.
            let class = match failure.class {
                FailureClass::Rejected => FailureClass::Permanent,
                class => class,
            };
            Err(Failure { class, ..failure })
        }
    }
}

/// Exposed for the one call that takes it; cryptoki's type is wiped when dropped.
fn auth_pin(pin: &SecretBytes) -> Result<AuthPin, Failure> {
    let text =
        std::str::from_utf8(pin.expose()).map_err(|_| Failure::new(FailureClass::Rejected, "the PIN is not UTF-8"))?;
    Ok(AuthPin::new(text.into()))
}
