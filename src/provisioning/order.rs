//! A resolved order and the answer to it, shared by admission, assembly and delivery.

use crate::hsm::Derivation;
use crate::keys::PublicKey;
use crate::names::{ChipId, DeviceIdentity, KeyName, ProfileName, SessionId, StationName};
use crate::package::TransportPublicKey;
use crate::secret::SecretBytes;

use super::Product;

/// An order whose identity is resolved. All names are parsed and the CSR is verified.
pub struct ResolvedOrder {
    /// The ordering station.
    pub station: StationName,
    /// The chip.
    pub chip: ChipId,
    /// The device identity.
    pub identity: DeviceIdentity,
    /// The profile that the device receives.
    pub profile: ProfileName,
    /// The public key of the verified CSR, if the device generates its own pair.
    pub own_key: Option<PublicKey>,
    /// The chip's transport key, to which the package is sealed.
    pub transport_key: Option<TransportPublicKey>,
}

/// The answer to Assemble.
pub struct Assembled {
    /// The session.
    pub session: SessionId,
    /// The device identity, ordered or allocated.
    pub identity: DeviceIdentity,
    /// The certificate.
    pub certificate: Vec<u8>,
    /// Whether the certificate is a CWT.
    pub certificate_is_cwt: bool,
    /// The data package.
    pub delivery: Delivery,
    /// When the session expires, in seconds since the Unix epoch.
    pub expires: u64,
}

/// The data package as it leaves the SPP.
pub enum Delivery {
    /// In the clear, protected by the station's mTLS channel.
    Plain(SecretBytes),
    /// Encrypted to the chip's transport key.
    Sealed(Vec<u8>),
}

/// The derivations of a device's symmetric keys, from the profile's master key or from the one that the session began with.
pub(super) fn derivations(product: &Product, identity: &DeviceIdentity, master: Option<&KeyName>) -> Vec<Derivation> {
    let specs = product.profile.symmetric_keys().iter();
    let with_master = specs.filter_map(|spec| Some((spec, master?)));
    with_master
        .map(|(spec, key)| Derivation::device_key(key.clone(), &spec.purpose, identity, usize::from(spec.length)))
        .collect()
}
