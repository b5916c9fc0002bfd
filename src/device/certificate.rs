//! Certificate verification in the device.

use super::DeviceError;
use crate::certificate::{VerifiedCertificate, verify_device_certificate};
use crate::keys::PublicKey;
use crate::names::ChipId;

/// Verifies that the manufacturer bound an identity to this chip.
pub(super) fn verify_certificate(
    bytes: &[u8],
    is_cwt: bool,
    manufacturer: &PublicKey,
    chip: &ChipId,
) -> Result<VerifiedCertificate, DeviceError> {
    verify_device_certificate(bytes, is_cwt, manufacturer, chip).map_err(|e| DeviceError::Certificate(e.to_string()))
}
