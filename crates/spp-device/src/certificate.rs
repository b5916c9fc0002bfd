//! Certificate verification in the device.

use spp_format::certificate::{VerifiedCertificate, verify_device_certificate};
use spp_format::keys::PublicKey;
use spp_format::names::ChipId;

use super::DeviceError;

/// Verifies that the manufacturer bound an identity to this chip.
pub(super) fn verify_certificate(
    bytes: &[u8],
    is_cwt: bool,
    manufacturer: &PublicKey,
    chip: &ChipId,
) -> Result<VerifiedCertificate, DeviceError> {
    verify_device_certificate(bytes, is_cwt, manufacturer, chip).map_err(|e| DeviceError::Certificate(e.to_string()))
}
