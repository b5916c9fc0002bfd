//! What is wrong with the files people write, all of it together.

use std::fmt;

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// File and key: `profiles/phone.toml: key_pair.kind`.
    pub place: String,
    /// What is wrong and what would be right.
    pub problem: String,
}

/// All faults that were found; empty means that nothing is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Faults(Vec<Fault>);

impl Faults {
    /// Notes a fault and goes on.
    pub fn add(&mut self, place: impl Into<String>, problem: impl fmt::Display) {
        self.0.push(Fault { place: place.into(), problem: problem.to_string() });
    }

    /// Takes over what another check found.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// The value of a check that may have failed; its faults are noted.
    pub fn keep<T>(&mut self, checked: Result<T, Self>) -> Option<T> {
        checked.map_err(|faults| self.extend(faults)).ok()
    }

    /// The value of a single check, its error noted at the place.
    pub fn note<T, E: fmt::Display>(&mut self, place: impl Into<String>, checked: Result<T, E>) -> Option<T> {
        checked.map_err(|e| self.add(place, e)).ok()
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The faults in the order they were found.
    pub fn iter(&self) -> impl Iterator<Item = &Fault> {
        self.0.iter()
    }

    /// The value if nothing was found to be wrong.
    pub fn ok_or_all<T>(self, value: Option<T>) -> Result<T, Self> {
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
