//! Finds a token by label and serial number, logs in once, and looks up keys.

use std::path::Path;

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::object::{Attribute, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use cryptoki::types::AuthPin;
use serde::{Deserialize, Serialize};
use spp_format::names::KeyName;
use spp_format::secret::SecretBytes;

use super::failure::{Failure, FailureContext as _};
use super::failure_class::FailureClass;
use super::module::ModuleProfile;
use super::pin::PinSource;

/// The identity of a token. Unlike slot numbers, it is stable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenIdentity {
    /// The label, without the padding.
    pub label: String,
    /// The serial number, without the padding. If empty, the label alone identifies the token.
    pub serial: String,
}

/// A loaded module with one logged-in token. One per process.
pub(crate) struct Token {
    module: Pkcs11,
    slot: Slot,
    identity: TokenIdentity,
    /// Stays open: closing the last session would end the login.
    anchor: Session,
    description: String,
}

impl Token {
    /// Loads the module, finds the token and logs in. The PIN is tried once.
    pub(crate) fn open(profile: &ModuleProfile, wanted: &TokenIdentity, pin: &PinSource) -> Result<Self, Failure> {
        Self::open_in(load(&profile.library)?, profile, wanted, pin)
    }

    /// Initialises an uninitialised token and opens it with the same module: a module loaded again in this process would not see
    /// it.
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
        let info = module.get_library_info().context(|| "reading the module's description".to_owned())?;
        let version = info.library_version();
        let description = format!("{} {}.{}", info.library_description().trim(), version.major(), version.minor());
        let pin = pin.read().map_err(|e| Failure::new(FailureClass::Rejected, e.to_string()))?;
        let anchor = module.open_rw_session(slot).context(|| format!("opening a session on {}", identity.label))?;
        let info = match module.get_token_info(slot) {
            Err(_) if profile.one_nameless_token => None,
            info => Some(info.context(|| format!("reading the token information of {}", identity.label))?),
        };
        if let Some(info) = info.filter(|info| info.user_pin_locked() || info.user_pin_final_try()) {
            let message = format!(
                "the user PIN of {} {}; the token's security officer must act first",
                identity.label,
                if info.user_pin_locked() { "is locked" } else { "has one attempt left before the token locks" }
            );
            return Err(Failure::new(FailureClass::Permanent, message));
        }
        login(&anchor, pin.as_ref(), &identity)?;
        Ok(Self { module, slot, identity, anchor, description })
    }

    /// Opens another session. It is logged in, because a login applies to the token.
    pub(crate) fn session(&self) -> Result<Session, Failure> {
        self.module.open_rw_session(self.slot).context(|| format!("opening a session on {}", self.identity.label))
    }

    /// Uses the session that holds the login.
    pub(crate) fn keep_alive(&self) -> Result<(), Failure> {
        self.anchor.generate_random_vec(1).map(drop).context(|| "keeping the login alive".to_owned())
    }

    pub(crate) const fn identity(&self) -> &TokenIdentity {
        &self.identity
    }

    pub(crate) fn description(&self) -> &str {
        &self.description
    }
}

/// Finds the only object of a class with this label and this CKA_ID.
pub(crate) fn find_one(
    session: &Session,
    class: ObjectClass,
    name: &KeyName,
    id: &[u8],
) -> Result<ObjectHandle, Failure> {
    let template =
        [Attribute::Class(class), Attribute::Label(name.as_str().as_bytes().to_vec()), Attribute::Id(id.to_vec())];
    let found = session.find_objects(&template).context(|| format!("looking for the key {name}"))?;
    match found.as_slice() {
        [object] => Ok(*object),
        [] => Err(Failure::new(
            FailureClass::ModuleLost,
            format!("the key {name} (CKA_ID {}) is not on the token", hex::encode(id)),
        )),
        more => Err(Failure::new(
            FailureClass::Rejected,
            format!("found {} objects named {name} with CKA_ID {}, expected exactly one", more.len(), hex::encode(id)),
        )),
    }
}

/// Initialises an uninitialised token with a label, a security officer's PIN and a user PIN, so that no PIN has to be an argument
/// of a vendor's tool. Refuses a label that exists.
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
        let message = format!("a token named {label} already exists (serial {})", found.serial);
        return Err(Failure::new(FailureClass::Rejected, message));
    }
    let slots = module.get_slots_with_token().context(|| "listing slots".to_owned())?;
    let free = slots.into_iter().find(|slot| module.get_token_info(*slot).is_ok_and(|t| !t.token_initialized()));
    let slot = free.ok_or_else(|| Failure::new(FailureClass::Rejected, "no slot has an uninitialised token"))?;
    let no_pin =
        || Failure::new(FailureClass::Rejected, "initialising a token requires PINs from files or from a terminal");
    let so_pin = auth_pin(so_pin.as_ref().ok_or_else(no_pin)?)?;
    let user_pin = auth_pin(user_pin.as_ref().ok_or_else(no_pin)?)?;
    module.init_token(slot, &so_pin, label).context(|| format!("initialising the token {label}"))?;
    let (slot, identity) = find_token(module, &wanted, profile)?;
    let session = module.open_rw_session(slot).context(|| "opening a session".to_owned())?;
    session.login(UserType::So, Some(&so_pin)).context(|| "logging in as security officer".to_owned())?;
    session.init_pin(&user_pin).context(|| "setting the user PIN".to_owned())?;
    Ok(identity)
}

pub(super) fn load(library: &Path) -> Result<Pkcs11, Failure> {
    let module = Pkcs11::new(library).context(|| format!("loading {}", library.display()))?;
    module
        .initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))
        .context(|| format!("initialising {}", library.display()))?;
    Ok(module)
}

fn find_token(
    module: &Pkcs11,
    wanted: &TokenIdentity,
    profile: &ModuleProfile,
) -> Result<(Slot, TokenIdentity), Failure> {
    if profile.one_nameless_token {
        let slots = module.get_slots_with_token().context(|| "listing tokens".to_owned())?;
        return match slots.as_slice() {
            [slot] => Ok((*slot, wanted.clone())),
            // The token may have been removed, so the module counts as lost.
            [] => Err(Failure::new(FailureClass::ModuleLost, "the module has no token")),
            more => {
                let message = format!("found {} tokens whose names cannot be read, expected exactly one", more.len());
                Err(Failure::new(FailureClass::Rejected, message))
            }
        };
    }
    let mut found = Vec::new();
    let mut seen = Vec::new();
    for slot in module.get_slots_with_initialized_token().context(|| "listing tokens".to_owned())? {
        let info = module.get_token_info(slot).context(|| "reading a token's names".to_owned())?;
        let identity =
            TokenIdentity { label: info.label().trim().to_owned(), serial: info.serial_number().trim().to_owned() };
        if identity.label == wanted.label && (wanted.serial.is_empty() || identity.serial == wanted.serial) {
            found.push((slot, identity.clone()));
        }
        seen.push(format!("{} ({})", identity.label, identity.serial));
    }
    if found.len() > 1 {
        let message = format!("found {} tokens named {}; specify the serial number", found.len(), wanted.label);
        return Err(Failure::new(FailureClass::Rejected, message));
    }
    found.pop().ok_or_else(|| {
        let seen = if seen.is_empty() { "none".to_owned() } else { seen.join(", ") };
        Failure::new(
            FailureClass::ModuleLost,
            format!("no token named {} (serial {}); the module has: {seen}", wanted.label, wanted.serial),
        )
    })
}

fn login(session: &Session, pin: Option<&SecretBytes>, identity: &TokenIdentity) -> Result<(), Failure> {
    let pin = pin.map(auth_pin).transpose()?;
    match session.login(UserType::User, pin.as_ref()) {
        // A login applies to the token, not to the session: another session of this process has logged in.
        Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(()),
        Err(e) => {
            let failure = Failure::of(&format!("logging in to the token {}", identity.label), &e);
            // A refused login is never retried, whatever return value the module gives.
            let class = match failure.class {
                FailureClass::Rejected => FailureClass::Permanent,
                class => class,
            };
            Err(Failure { class, ..failure })
        }
    }
}

/// Converts a PIN to cryptoki's type, which is wiped when dropped. Exposed for the call that uses it.
fn auth_pin(pin: &SecretBytes) -> Result<AuthPin, Failure> {
    let text =
        std::str::from_utf8(pin.expose()).map_err(|_| Failure::new(FailureClass::Rejected, "the PIN is not UTF-8"))?;
    Ok(AuthPin::new(text.into()))
}
