//! An entry as the rooms write it: who does what, with what, and how it went.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What is to be recorded. The log adds when, on which node, and the place in the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub(super) caller: String,
    pub(super) act: &'static str,
    pub(super) details: BTreeMap<String, String>,
    pub(super) outcome: Outcome,
}

impl Entry {
    /// An entry without details. The caller is a role and a name, `officer o-1`, or `sppd` for the daemon itself; the act is
    /// named once and for all, `pool.fill`.
    pub fn new(caller: impl fmt::Display, act: &'static str, outcome: Outcome) -> Self {
        Self { caller: caller.to_string(), act, details: BTreeMap::new(), outcome }
    }

    /// Who acts.
    pub(crate) fn caller(&self) -> &str {
        &self.caller
    }

    /// The same with one more detail. Whoever reads the log reads it, so it is never a secret.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.details.insert(name.to_owned(), value.to_string());
        self
    }

    /// The same without these details, which an entry before it has.
    #[must_use]
    pub(crate) fn without(mut self, names: &[&str]) -> Self {
        self.details.retain(|name, _| !names.contains(&name.as_str()));
        self
    }

    /// The entry that tells how this act ended: same caller, act and details.
    #[must_use]
    pub fn ended(&self, outcome: Outcome) -> Self {
        Self { outcome, ..self.clone() }
    }
}

/// How an act went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Outcome {
    /// It is about to be done. An act that begins and never ends was cut off by a crash.
    Begun,
    /// It was done.
    Done,
    /// It was not permitted or not possible, and nothing was done.
    Refused(String),
    /// It was tried and did not succeed; what was done of it is said.
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

/// The text is none of the outcomes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no outcome; there are begun, done, refused: WHY and failed: WHY")]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_is_read_as_it_was_written() {
        for outcome in
            [Outcome::Begun, Outcome::Done, Outcome::Refused("failed: no".into()), Outcome::Failed(String::new())]
        {
            assert_eq!(outcome.to_string().parse(), Ok(outcome));
        }
        assert!("refused".parse::<Outcome>().unwrap_err().to_string().contains("refused: WHY"));
    }

    #[test]
    fn the_end_of_an_act_tells_of_the_same_act() {
        let begun = Entry::new("officer o-1", "pool.fill", Outcome::Begun).with("profile", "phone").with("keys", 100);
        let ended = begun.ended(Outcome::Failed("7 were made".to_owned()));
        assert_eq!((&ended.caller, ended.act, &ended.details), (&begun.caller, begun.act, &begun.details));
        assert_ne!(ended.outcome, begun.outcome);
    }
}
