//! Builder for ceremony files.

use std::fmt::Write as _;

/// The text of a ceremony file. Each method adds a table; [`with`](CeremonyFile::with) adds a line to the last one.
#[derive(Debug, Clone, Default)]
pub struct CeremonyFile(String);

impl CeremonyFile {
    /// Creates an empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the table `[[NAME]]` without fields.
    pub fn table(mut self, name: &str) -> Self {
        let _ = writeln!(self.0, "[[{name}]]");
        self
    }

    /// Adds a field to the last table; the value is TOML.
    pub fn with(mut self, field: &str, value: &str) -> Self {
        let _ = writeln!(self.0, "{field} = {value}");
        self
    }

    /// Adds a field to the last table; the value is a string.
    pub fn with_text(self, field: &str, value: &str) -> Self {
        self.with(field, &format!("{value:?}"))
    }

    /// Adds a signing key whose certificate is `self-signed` or a `csr`.
    pub fn signing_key(self, name: &str, kind: &str, certificate: &str, common_name: &str) -> Self {
        self.table("signing_key")
            .with_text("name", name)
            .with_text("kind", kind)
            .with_text("certificate", certificate)
            .with("subject", &format!("{{ common_name = {common_name:?} }}"))
    }

    /// Adds a signing key that a root of the same token certifies.
    pub fn issued_key(self, name: &str, kind: &str, issuer: &str, common_name: &str) -> Self {
        self.signing_key(name, kind, "issued", common_name).with_text("issuer", issuer)
    }

    /// Adds a self-signed root key.
    pub fn root_key(self, name: &str, kind: &str, common_name: &str) -> Self {
        self.signing_key(name, kind, "self-signed", common_name).with_text("use", "root")
    }

    /// Adds a key for the checkpoints of a log.
    pub fn log_key(self, name: &str, origin: &str) -> Self {
        self.table("log_key").with_text("name", name).with_text("origin", origin)
    }

    /// Adds a master key.
    pub fn master_key(self, name: &str, version: u32, prf: &str) -> Self {
        self.table("master_key").with_text("name", name).with("version", &version.to_string()).with_text("prf", prf)
    }

    /// Adds a verification of a key's check value.
    pub fn check_value(self, key: &str) -> Self {
        self.table("check_value").with_text("key", key)
    }

    /// The text of the file.
    pub fn text(&self) -> &str {
        &self.0
    }
}
