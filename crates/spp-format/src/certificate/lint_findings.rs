//! The findings of a lint: which rules a certificate violates.

use std::fmt;

/// A violated rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LintFinding {
    /// The rule's name, for example `serial-number`. Stable, for tests and metrics.
    pub rule: &'static str,
    /// Description of the violation.
    pub problem: String,
}

/// All violated rules of a certificate. A finding is an error in the profile or in this program, never in a station's input.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LintFindings(Vec<LintFinding>);

impl LintFindings {
    /// The findings in the order of detection.
    pub fn iter(&self) -> impl Iterator<Item = &LintFinding> {
        self.0.iter()
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn add(&mut self, rule: &'static str, problem: impl fmt::Display) {
        self.0.push(LintFinding { rule, problem: problem.to_string() });
    }

    pub(super) fn require(&mut self, holds: bool, rule: &'static str, problem: &str) {
        if !holds {
            self.add(rule, problem);
        }
    }
}

impl fmt::Display for LintFindings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("certificate not signed, lint failed:")?;
        self.0.iter().try_for_each(|finding| write!(f, " [{}] {};", finding.rule, finding.problem))
    }
}

impl std::error::Error for LintFindings {}
