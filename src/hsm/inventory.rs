//! Lists a module's slots, tokens and mechanisms, without a login and without changes.

use serde::Serialize;

use super::failure::{Failure, FailureContext as _, HsmError, set_failure_overrides};
use super::module::ModuleProfile;
use super::token::load;
use cryptoki::context::Pkcs11;
use cryptoki::slot::Slot;

/// A slot with its token.
#[derive(Debug, Clone, Serialize)]
pub struct SlotReport {
    /// The current slot number. The product finds a slot by its token's label and serial number, never by the slot number.
    pub slot: u64,
    /// The slot's description.
    pub description: String,
    /// The token in the slot.
    pub token: Option<TokenReport>,
}

/// A token.
#[derive(Debug, Clone, Serialize)]
pub struct TokenReport {
    /// The label; empty until the token is initialised.
    pub label: String,
    /// The serial number.
    pub serial: String,
    /// Manufacturer and model.
    pub model: String,
    /// Notable states, as text.
    pub state: Vec<&'static str>,
}

/// A mechanism of a token.
#[derive(Debug, Clone, Serialize)]
pub struct MechanismReport {
    /// The standard's name.
    pub name: String,
    /// Minimum and maximum key size, in the unit of the mechanism.
    pub key_sizes: (usize, usize),
    /// The supported functions.
    pub uses: Vec<&'static str>,
}

/// A module loaded for inspection by an officer's tool.
pub struct Inventory {
    module: Pkcs11,
    nameless: bool,
    /// The module's description of itself.
    pub description: String,
}

impl Inventory {
    /// Loads the module. The process must have the module's environment ([`ModuleProfile::enter_environment`]).
    pub fn of(profile: &ModuleProfile) -> Result<Self, HsmError> {
        set_failure_overrides(profile.failures.clone());
        let open = || -> Result<Self, Failure> {
            let module = load(&profile.library)?;
            let info = module.get_library_info().context(|| "reading the module's description".to_owned())?;
            let (version, name) = (info.library_version(), info.library_description().trim());
            let description =
                format!("{name} {}.{} ({})", version.major(), version.minor(), info.manufacturer_id().trim());
            Ok(Self { module, nameless: profile.one_nameless_token, description })
        };
        open().map_err(super::objects::to_hsm_error)
    }

    /// Lists all slots.
    pub fn slots(&self) -> Result<Vec<SlotReport>, HsmError> {
        let slots =
            self.module.get_all_slots().context(|| "listing slots".to_owned()).map_err(super::objects::to_hsm_error)?;
        Ok(slots.into_iter().map(|slot| self.slot(slot)).collect())
    }

    fn slot(&self, slot: Slot) -> SlotReport {
        let description = self.module.get_slot_info(slot).map(|info| info.slot_description().trim().to_owned());
        let token = self.module.get_token_info(slot).ok().map(|token| {
            let states = [
                (!token.token_initialized(), "not initialised"),
                (token.token_initialized() && !token.user_pin_initialized(), "no user PIN"),
                (token.user_pin_locked(), "user PIN locked"),
                (token.user_pin_final_try(), "one attempt at the user PIN left"),
                (token.user_pin_count_low(), "a wrong user PIN was tried"),
                (token.protected_authentication_path(), "PIN is entered at the HSM"),
                (token.write_protected(), "write-protected"),
                (token.error_state(), "failed its self-tests"),
            ];
            TokenReport {
                label: token.label().trim().to_owned(),
                serial: token.serial_number().trim().to_owned(),
                model: format!("{} {}", token.manufacturer_id().trim(), token.model().trim()).trim().to_owned(),
                state: states.into_iter().filter(|(applies, _)| *applies).map(|(_, text)| text).collect(),
            }
        });
        SlotReport { slot: slot.id(), description: description.unwrap_or_default(), token }
    }

    /// Lists the mechanisms of the token with this label, or of the first slot. Mechanisms without a PKCS#11 name are omitted.
    pub fn mechanisms(&self, label: Option<&str>) -> Result<Vec<MechanismReport>, HsmError> {
        let slots = self.slots()?;
        let wanted = slots.iter().find(|slot| match (label, &slot.token) {
            (Some(label), Some(token)) => token.label == label || self.nameless,
            (Some(_), None) => self.nameless,
            (None, _) => true,
        });
        let wanted = wanted.ok_or_else(|| {
            let labels = slots.iter().filter_map(|slot| slot.token.as_ref()).map(|token| token.label.as_str());
            let labels = labels.filter(|label| !label.is_empty()).collect::<Vec<_>>().join(", ");
            HsmError::Refused(match label {
                Some(label) => format!("no token named {label}; the module has: {labels}"),
                None => "the module has no slot".to_owned(),
            })
        })?;
        let list = || -> Result<Vec<MechanismReport>, Failure> {
            let slot = Slot::try_from(wanted.slot).context(|| "naming a slot".to_owned())?;
            let mechanisms = self.module.get_mechanism_list(slot).context(|| "listing mechanisms".to_owned())?;
            let mut reports: Vec<_> = mechanisms
                .into_iter()
                .map(|mechanism| {
                    let info = self.module.get_mechanism_info(slot, mechanism).ok();
                    let uses = info.as_ref().map(uses).unwrap_or_default();
                    let key_sizes = info.map_or((0, 0), |info| (info.min_key_size(), info.max_key_size()));
                    MechanismReport { name: mechanism.to_string(), key_sizes, uses }
                })
                .collect();
            reports.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(reports)
        };
        list().map_err(super::objects::to_hsm_error)
    }
}

fn uses(info: &cryptoki::mechanism::MechanismInfo) -> Vec<&'static str> {
    let all = [
        (info.generate(), "generate"),
        (info.generate_key_pair(), "generate-pair"),
        (info.sign(), "sign"),
        (info.verify(), "verify"),
        (info.wrap(), "wrap"),
        (info.unwrap(), "unwrap"),
        (info.derive(), "derive"),
        (info.encrypt(), "encrypt"),
        (info.decrypt(), "decrypt"),
        (info.digest(), "digest"),
        (info.hardware(), "in hardware"),
    ];
    all.into_iter().filter(|(supported, _)| *supported).map(|(_, name)| name).collect()
}
