//! Collects the faults of a ceremony file while its sections are checked.

use std::path::Path;

use spp_format::file_format::Faults;

/// Context of all checks.
pub(super) struct ParseContext<'a> {
    pub(super) place: &'a str,
    pub(super) base: &'a Path,
    pub(super) faults: &'a mut Faults,
}

impl ParseContext<'_> {
    pub(super) fn fault(&mut self, at: impl std::fmt::Display, problem: impl std::fmt::Display) {
        self.faults.add(format!("{}: {at}", self.place), problem);
    }
}
