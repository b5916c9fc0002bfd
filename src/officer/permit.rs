//! The approval of a ceremony that one officer alone may not hold.

use crate::names::OfficerName;

/// That a ceremony file was approved by other officers. Whoever holds such a ceremony gives it up: it is good for one time.
#[derive(Debug)]
pub struct Permit {
    request: String,
    file_sha256: [u8; 32],
    approved_by: Vec<OfficerName>,
}

impl Permit {
    /// Of an approval that the daemon has used up.
    pub(super) const fn new(request: String, file_sha256: [u8; 32], approved_by: Vec<OfficerName>) -> Self {
        Self { request, file_sha256, approved_by }
    }

    /// The SHA-256 of the file that was approved.
    pub(super) const fn file_sha256(&self) -> &[u8; 32] {
        &self.file_sha256
    }

    /// The request's name and who approved it, for the transcript.
    pub(super) fn into_parts(self) -> (String, Vec<OfficerName>) {
        (self.request, self.approved_by)
    }
}
