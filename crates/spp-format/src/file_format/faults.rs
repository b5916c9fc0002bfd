//! Collects the faults of configuration files, so that they are reported together.

use std::fmt;

/// A fault and its location.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// File and key: `profiles/phone.toml: key_pair.kind`.
    pub place: String,
    /// The problem and what is expected.
    pub problem: String,
}

/// The faults found so far.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Faults(Vec<Fault>);

impl Faults {
    /// Adds a fault.
    pub fn add(&mut self, place: impl Into<String>, problem: impl fmt::Display) {
        self.0.push(Fault { place: place.into(), problem: problem.to_string() });
    }

    /// Adds the faults of another check.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Returns the value of a check, or adds its faults.
    pub fn merge<T>(&mut self, checked: Result<T, Self>) -> Option<T> {
        checked.map_err(|faults| self.extend(faults)).ok()
    }

    /// Returns the value of a check, or adds its error as a fault at `place`.
    pub fn note<T, E: fmt::Display>(&mut self, place: impl Into<String>, checked: Result<T, E>) -> Option<T> {
        checked.map_err(|e| self.add(place, e)).ok()
    }

    /// True if no fault was found.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The faults in the order in which they were found.
    pub fn iter(&self) -> impl Iterator<Item = &Fault> {
        self.0.iter()
    }

    /// Returns the value if no fault was found, otherwise the faults.
    pub fn into_result<T>(self, value: Option<T>) -> Result<T, Self> {
        match value {
            Some(value) if self.is_empty() => Ok(value),
            _ => Err(self),
        }
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|fault| writeln!(f, "{fault}"))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.problem)
    }
}

impl std::error::Error for Faults {}
