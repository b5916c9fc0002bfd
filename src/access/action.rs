//! What no officer can do alone.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::quota::Quota;
use super::rules::ApprovalRules;
use crate::certificate::Role;
use crate::keys::sha256;
use crate::names::StationName;

/// Most bytes of a ceremony's file.
pub const MAX_CEREMONY_LEN: usize = 8 * 1024;
/// Most bytes of an act's text: it is in the audit log whole, where quotes and line ends take more room.
const MAX_LEN: usize = 16 * 1024;
/// Most characters of a reason.
pub const MAX_REASON_LEN: usize = 200;

/// An act that one officer requests and others approve, with everything that it will do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum ProtectedAction {
    /// Every certificate that a caller has so far is of no use any more.
    Revoke {
        /// What the caller is.
        role: Role,
        /// What it is called.
        name: String,
        /// Why.
        reason: String,
    },
    /// A station may make more devices.
    RaiseQuota {
        /// Which one.
        station: StationName,
        /// From then on.
        quota: Quota,
    },
    /// How many must approve what, and for how long a request stands.
    ChangeRules {
        /// From then on.
        rules: ApprovalRules,
    },
    /// A certificate for somebody whom one officer alone does not let in: another officer, or who was revoked.
    Enroll {
        /// What the caller is.
        role: Role,
        /// What it is called.
        name: String,
        /// Days until the certificate ends.
        days: u32,
        /// SHA-256 of the request (PKCS#10, DER) in hex: of the key that it is for.
        csr_sha256: String,
    },
    /// A ceremony on the token that destroys or replaces keys, once.
    Ceremony {
        /// Whether it destroys: else it replaces.
        destroys: bool,
        /// The ceremony's file, word for word.
        file: String,
    },
}

/// What kind of act it is, for the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProtectedActionKind {
    /// [`ProtectedAction::Revoke`].
    Revoke,
    /// [`ProtectedAction::Enroll`].
    Enroll,
    /// [`ProtectedAction::RaiseQuota`].
    RaiseQuota,
    /// [`ProtectedAction::ChangeRules`].
    ChangeRules,
    /// [`ProtectedAction::Ceremony`] that destroys.
    Destroy,
    /// [`ProtectedAction::Ceremony`] that replaces.
    Rotate,
}

impl ProtectedAction {
    /// The ceremony of that file.
    pub fn ceremony(file: String) -> Self {
        Self::Ceremony { destroys: destroys_keys(&file), file }
    }

    /// What kind it is.
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

    /// The one text form: what is signed, sent and stored.
    pub fn to_json(&self) -> String {
        // A value of names, numbers and texts has a JSON form.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads [`Self::to_json`]; another form of the same value is refused, so that what is signed is what is read.
    pub fn from_json(json: &str) -> Result<Self, String> {
        if json.len() > MAX_LEN {
            return Err(format!("at most {MAX_LEN} bytes are read"));
        }
        let act: Self = serde_json::from_str(json).map_err(|e| e.to_string())?;
        act.check()?;
        if act.to_json() == json { Ok(act) } else { Err("it is not in the canonical form".to_owned()) }
    }

    fn check(&self) -> Result<(), String> {
        match self {
            Self::Revoke { role, name, reason } => {
                crate::certificate::Caller::new(*role, name).map_err(|e| e.to_string())?;
                let length = reason.chars().count();
                let fits = (1..=MAX_REASON_LEN).contains(&length) && !reason.chars().any(char::is_control);
                if fits { Ok(()) } else { Err(format!("a reason has 1 to {MAX_REASON_LEN} printable characters")) }
            }
            Self::Enroll { role, name, days, csr_sha256 } => {
                crate::certificate::Caller::new(*role, name).map_err(|e| e.to_string())?;
                let hash = hex::decode(csr_sha256).is_ok_and(|hash| hash.len() == 32);
                let fits = (1..=3650).contains(days) && hash;
                if fits { Ok(()) } else { Err("it needs 1 to 3650 days and the SHA-256 of the request".to_owned()) }
            }
            Self::RaiseQuota { .. } => Ok(()),
            Self::ChangeRules { rules } => rules.check(),
            Self::Ceremony { file, .. } if file.len() > MAX_CEREMONY_LEN => {
                Err(format!("a ceremony's file has at most {MAX_CEREMONY_LEN} bytes"))
            }
            // Else a destruction could pass for a rotation, which fewer may have to approve.
            Self::Ceremony { destroys, file } if *destroys != destroys_keys(file) => {
                Err("the ceremony's file says something else of destroying keys".to_owned())
            }
            Self::Ceremony { .. } => Ok(()),
        }
    }

    /// Whether the approval waits to be used, once, by who does it: everything else is done with the last approval.
    pub const fn is_used_later(&self) -> bool {
        matches!(self, Self::Ceremony { .. } | Self::Enroll { .. })
    }

    /// SHA-256 of a ceremony's file.
    pub fn ceremony_hash(&self) -> Option<[u8; 32]> {
        match self {
            Self::Ceremony { file, .. } => Some(sha256(file.as_bytes())),
            _ => None,
        }
    }
}

/// A file that is none does not pass for one that destroys nothing.
fn destroys_keys(file: &str) -> bool {
    file.parse::<toml::Table>().map_or(true, |table| table.contains_key("destroy"))
}

/// In a line, for people.
impl fmt::Display for ProtectedAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Revoke { role, name, reason } => write!(f, "revoke the {role} {name}: {reason}"),
            Self::Enroll { role, name, days, csr_sha256 } => {
                write!(f, "enrol the {role} {name} for {days} days, for the key of the request sha256:{csr_sha256}")
            }
            Self::RaiseQuota { station, quota } => write!(f, "let the station {station} begin these {quota}"),
            Self::ChangeRules { rules } => write!(f, "change the rules of approval: {rules}"),
            Self::Ceremony { destroys, file } => {
                let what = if *destroys { "destroys" } else { "replaces" };
                write!(f, "run once the ceremony sha256:{}, which {what} keys", hex::encode(sha256(file.as_bytes())))
            }
        }
    }
}

impl fmt::Display for ProtectedActionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Revoke => "revoke",
            Self::Enroll => "enroll",
            Self::RaiseQuota => "raise-quota",
            Self::ChangeRules => "change-rules",
            Self::Destroy => "destroy",
            Self::Rotate => "rotate",
        })
    }
}
