//! Protected actions: operations that need the approval of several officers.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::action_kind::ProtectedActionKind;
use super::quota::Quota;
use super::rules::ApprovalRules;
use crate::certificate::Role;
use crate::keys::sha256;
use crate::names::StationName;

/// Maximum length of a ceremony file, in bytes.
pub const MAX_CEREMONY_LEN: usize = 8 * 1024;
/// Maximum length of an action's JSON, in bytes. An audit line must hold all of it, and escaping makes it longer there.
const MAX_LEN: usize = 16 * 1024;
/// Maximum length of a reason, in characters.
pub const MAX_REASON_LEN: usize = 200;

/// An action that one officer requests and others approve, with all its parameters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum ProtectedAction {
    /// Revoke all certificates that a caller has so far.
    Revoke {
        /// The caller's role.
        role: Role,
        /// The caller's name.
        name: String,
        /// The reason.
        reason: String,
    },
    /// Raise a station's quota.
    RaiseQuota {
        /// The station.
        station: StationName,
        /// The new quota.
        quota: Quota,
    },
    /// Change the number of approvals per action and the lifetime of requests.
    ChangeRules {
        /// The new rules.
        rules: ApprovalRules,
    },
    /// Issue a certificate to an officer, or to a caller that was revoked. One officer alone cannot do either.
    Enroll {
        /// The caller's role.
        role: Role,
        /// The caller's name.
        name: String,
        /// Lifetime of the certificate, in days.
        days: u32,
        /// SHA-256 of the CSR (PKCS#10, DER) in hex. It binds the approval to the caller's key.
        csr_sha256: String,
    },
    /// Run a ceremony that destroys or replaces keys, once.
    Ceremony {
        /// True if the ceremony destroys keys, false if it replaces keys.
        destroys: bool,
        /// The ceremony file, byte for byte.
        file: String,
    },
}

impl ProtectedAction {
    /// The action that runs this ceremony file.
    pub fn ceremony(file: String) -> Self {
        Self::Ceremony { destroys: destroys_keys(&file), file }
    }

    /// The kind of the action.
    pub const fn kind(&self) -> ProtectedActionKind {
        match self {
            Self::Revoke { .. } => ProtectedActionKind::Revoke,
            Self::Enroll { .. } => ProtectedActionKind::Enroll,
            Self::RaiseQuota { .. } => ProtectedActionKind::RaiseQuota,
            Self::ChangeRules { .. } => ProtectedActionKind::ChangeRules,
            Self::Ceremony { destroys: true, .. } => ProtectedActionKind::Destroy,
            Self::Ceremony { destroys: false, .. } => ProtectedActionKind::Rotate,
        }
    }

    /// The canonical JSON form. It is signed, sent and stored.
    pub fn to_json(&self) -> String {
        // Cannot fail: names, numbers and strings always have a JSON form.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Parses [`Self::to_json`]. Refuses other JSON forms of the same value, so that the parsed bytes are the signed bytes.
    pub fn from_json(json: &str) -> Result<Self, String> {
        if json.len() > MAX_LEN {
            return Err(format!("{} bytes exceed the limit of {MAX_LEN}", json.len()));
        }
        let action: Self = serde_json::from_str(json).map_err(|e| e.to_string())?;
        action.check()?;
        if action.to_json() == json { Ok(action) } else { Err("JSON is not in canonical form".to_owned()) }
    }

    fn check(&self) -> Result<(), String> {
        match self {
            Self::Revoke { role, name, reason } => {
                crate::certificate::Caller::new(*role, name).map_err(|e| e.to_string())?;
                let length = reason.chars().count();
                let fits = (1..=MAX_REASON_LEN).contains(&length) && !reason.chars().any(char::is_control);
                if fits { Ok(()) } else { Err(format!("reason must have 1 to {MAX_REASON_LEN} printable characters")) }
            }
            Self::Enroll { role, name, days, csr_sha256 } => {
                crate::certificate::Caller::new(*role, name).map_err(|e| e.to_string())?;
                let hash = hex::decode(csr_sha256).is_ok_and(|hash| hash.len() == 32);
                let fits = (1..=3650).contains(days) && hash;
                if fits { Ok(()) } else { Err("days must be 1 to 3650, and csr_sha256 a SHA-256 in hex".to_owned()) }
            }
            Self::RaiseQuota { .. } => Ok(()),
            Self::ChangeRules { rules } => rules.check(),
            Self::Ceremony { file, .. } if file.len() > MAX_CEREMONY_LEN => {
                Err(format!("ceremony file has {} bytes; the limit is {MAX_CEREMONY_LEN}", file.len()))
            }
            // Otherwise a destruction could be declared as a rotation, which may need fewer approvals.
            Self::Ceremony { destroys, file } if *destroys != destroys_keys(file) => {
                Err(format!("destroys is {destroys}, which contradicts the ceremony file"))
            }
            Self::Ceremony { .. } => Ok(()),
        }
    }

    /// True if an officer uses the approval later, once. All other actions take effect with the last approval.
    pub const fn is_single_use(&self) -> bool {
        matches!(self, Self::Ceremony { .. } | Self::Enroll { .. })
    }

    /// SHA-256 of the ceremony file; `None` for other actions.
    pub fn ceremony_hash(&self) -> Option<[u8; 32]> {
        match self {
            Self::Ceremony { file, .. } => Some(sha256(file.as_bytes())),
            _ => None,
        }
    }
}

/// True if the ceremony file destroys keys. A file that is no valid TOML counts as destroying, the stricter kind.
fn destroys_keys(file: &str) -> bool {
    file.parse::<toml::Table>().map_or(true, |table| table.contains_key("destroy"))
}

/// One line for people.
impl fmt::Display for ProtectedAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Revoke { role, name, reason } => write!(f, "revoke the {role} {name}: {reason}"),
            Self::Enroll { role, name, days, csr_sha256 } => {
                write!(f, "enrol the {role} {name} for {days} days, CSR sha256:{csr_sha256}")
            }
            Self::RaiseQuota { station, quota } => write!(f, "set the quota of the station {station}: {quota}"),
            Self::ChangeRules { rules } => write!(f, "change the approval rules: {rules}"),
            Self::Ceremony { destroys, file } => {
                let effect = if *destroys { "destroys" } else { "replaces" };
                write!(f, "run the ceremony sha256:{} once ({effect} keys)", hex::encode(sha256(file.as_bytes())))
            }
        }
    }
}
