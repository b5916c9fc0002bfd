//! A symmetric device key of the data package, with its purpose.

use super::{PackageError, package_error};
use crate::names::KeyName;
use crate::secret::SecretBytes;

/// A key shared by manufacturer and device, with its purpose.
pub struct SymmetricKey {
    purpose: KeyName,
    key: SecretBytes,
}

impl SymmetricKey {
    /// Validates the purpose (syntax of a key name) and the length (16 to 64 bytes).
    pub fn new(purpose: &str, key: SecretBytes) -> Result<Self, PackageError> {
        let field = "symmetric keys (10)";
        let purpose = purpose.parse().map_err(package_error(field))?;
        // Exposed to read its length.
        if !(16..=64).contains(&key.expose().len()) {
            return Err(package_error(field)("expected a symmetric key of 16 to 64 bytes"));
        }
        Ok(Self { purpose, key })
    }

    /// The purpose; unique within a package.
    pub fn purpose(&self) -> &str {
        self.purpose.as_str()
    }

    /// The key.
    pub const fn key(&self) -> &SecretBytes {
        &self.key
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_key_or_invalid_purpose_rejected() {
        assert!(SymmetricKey::new("short", SecretBytes::new(vec![0; 15])).is_err());
        assert!(SymmetricKey::new("No Name", SecretBytes::new(vec![0; 32])).is_err());
    }
}
