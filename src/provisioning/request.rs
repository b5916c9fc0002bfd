//! The parsed Assemble request and its answer.

use spp_format::keys::PublicKey;
use spp_format::names::{ChipId, DeviceIdentity, ProfileName, SessionId, StationName};
use spp_format::package::TransportPublicKey;
use spp_format::secret::SecretBytes;

/// A parsed Assemble request. The CSR is verified; nothing else is checked yet.
#[derive(Clone)]
pub struct AssembleRequest {
    /// The ordering station.
    pub station: StationName,
    /// The chip.
    pub chip: ChipId,
    /// The device identity. Without one, the next identity that officers have loaded is allocated.
    pub identity: Option<DeviceIdentity>,
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
