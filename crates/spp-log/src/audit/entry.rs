//! Audit entries: as modules write them, and as the log returns them with their position in the chain.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An entry to be recorded. The log adds the time, the node and the position in the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The caller, a role and a name.
    pub caller: String,
    /// Stable name of the action.
    pub action: &'static str,
    /// Details of the action. Everyone who reads the log sees them.
    pub details: BTreeMap<String, String>,
    /// Outcome of the action.
    pub outcome: Outcome,
}

impl Entry {
    /// Creates an entry without details. The caller is a role and a name, `officer o-1`, or `sppd` for the daemon itself. The
    /// action is a stable name, `pool.fill`.
    pub fn new(caller: impl fmt::Display, action: &'static str, outcome: Outcome) -> Self {
        Self { caller: caller.to_string(), action, details: BTreeMap::new(), outcome }
    }

    /// The caller.
    pub fn caller(&self) -> &str {
        &self.caller
    }

    /// Adds a detail. Everyone who reads the log sees it, so it must not be a secret.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.details.insert(name.to_owned(), value.to_string());
        self
    }

    /// Removes these details, which an earlier entry of the same action already has.
    #[must_use]
    pub fn without(mut self, names: &[&str]) -> Self {
        self.details.retain(|name, _| !names.contains(&name.as_str()));
        self
    }

    /// The entry that records the outcome of this action, with the same caller, action and details.
    #[must_use]
    pub fn ended(&self, outcome: Outcome) -> Self {
        Self { outcome, ..self.clone() }
    }
}

/// The outcome of an action.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Outcome {
    /// The action is about to start. An action that has only this entry was interrupted by a crash.
    Begun,
    /// The action is done.
    Done,
    /// The action was not permitted or not possible, and nothing was done.
    Refused(String),
    /// The action failed; the text says which part was done.
    Failed(String),
}

const REFUSED: &str = "refused: ";
const FAILED: &str = "failed: ";

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begun => f.write_str("begun"),
            Self::Done => f.write_str("done"),
            Self::Refused(why) => write!(f, "{REFUSED}{why}"),
            Self::Failed(why) => write!(f, "{FAILED}{why}"),
        }
    }
}

/// The text is not an outcome.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown outcome {0:?}: expected begun, done, refused: REASON or failed: REASON")]
pub struct UnknownOutcome(String);

impl FromStr for Outcome {
    type Err = UnknownOutcome;

    fn from_str(text: &str) -> Result<Self, UnknownOutcome> {
        match text {
            "begun" => Ok(Self::Begun),
            "done" => Ok(Self::Done),
            _ => {
                let refused = text.strip_prefix(REFUSED).map(|why| Self::Refused(why.to_owned()));
                let outcome = refused.or_else(|| text.strip_prefix(FAILED).map(|why| Self::Failed(why.to_owned())));
                outcome.ok_or_else(|| UnknownOutcome(text.to_owned()))
            }
        }
    }
}

impl TryFrom<String> for Outcome {
    type Error = UnknownOutcome;

    fn try_from(text: String) -> Result<Self, UnknownOutcome> {
        text.parse()
    }
}

impl From<Outcome> for String {
    fn from(outcome: Outcome) -> Self {
        outcome.to_string()
    }
}

/// An entry with its position in the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RecordedEntry {
    /// Sequence number, from 0.
    pub sequence: u64,
    /// Time of recording; seconds since the Unix epoch.
    pub time: u64,
    /// The node that wrote the entry.
    pub node: String,
    /// The caller, a role and a name.
    pub caller: String,
    /// Name of the action.
    pub act: String,
    /// Details of the action.
    pub details: BTreeMap<String, String>,
    /// Outcome of the action.
    pub outcome: Outcome,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcome_round_trips_through_text() {
        for outcome in
            [Outcome::Begun, Outcome::Done, Outcome::Refused("failed: no".into()), Outcome::Failed(String::new())]
        {
            assert_eq!(outcome.to_string().parse(), Ok(outcome));
        }
        assert!("refused".parse::<Outcome>().unwrap_err().to_string().contains("refused: REASON"));
    }

    #[test]
    fn ended_entry_keeps_caller_action_and_details() {
        let begun = Entry::new("officer o-1", "pool.fill", Outcome::Begun).with("profile", "phone").with("keys", 100);
        let ended = begun.ended(Outcome::Failed("7 were made".to_owned()));
        assert_eq!((&ended.caller, ended.action, &ended.details), (&begun.caller, begun.action, &begun.details));
        assert_ne!(ended.outcome, begun.outcome);
    }
}
