//! Sessions as stored in the journal.

use serde::{Deserialize, Serialize};
use spp_format::certificate::CertificateToSign;
use spp_format::names::{ChipId, DeviceIdentity, KeyName, ProfileName, SessionId, StationName};
use spp_format::record::Publication;

use crate::state_name::StateName;

/// The provisioning of one device. Contains no secrets: key pairs are in the secret store, wrapped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// The session ID.
    pub id: SessionId,
    /// The chip ID.
    pub chip: ChipId,
    /// The identity that the certificate binds to the chip.
    pub identity: DeviceIdentity,
    /// The product's profile.
    pub profile: ProfileName,
    /// The station that opened the session.
    pub station: StationName,
    /// When the session was opened, seconds since the Unix epoch.
    pub created: u64,
    /// When the session expires and its key pair is destroyed, seconds since the Unix epoch.
    pub expires: u64,
    /// The device's public key, SubjectPublicKeyInfo in DER; `None` for profiles without a key pair.
    pub public_key: Option<Vec<u8>>,
    /// Whether the device generated its own pair (CSR), so that the secret store has none.
    pub own_key_pair: bool,
    /// SHA-256 of the chip's transport public key, if the package is sealed to it. A retry with another key is refused.
    pub sealed_to: Option<[u8; 32]>,
    /// SHA-256 of the other inputs of the package: the profile's symmetric keys and the issuer's chain. A retry after these
    /// changed could not reproduce the package, so it is refused.
    pub recipe: [u8; 32],
    /// The master key from which the symmetric keys are derived.
    pub master_key: Option<MasterKeyVersion>,
    /// The certificate to sign; exactly these bytes are signed.
    pub certificate: CertificateToSign,
    /// The session's state.
    pub state: SessionState,
}

impl Session {
    /// Reports whether the session has expired at `now`, seconds since the Unix epoch.
    pub const fn has_expired(&self, now: u64) -> bool {
        self.expires <= now
    }

    /// The session's position in listings.
    pub const fn cursor(&self) -> SessionCursor {
        SessionCursor { created: self.created, id: self.id }
    }
}

/// A position in a listing: the next page starts after this session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionCursor {
    /// When the session was opened, seconds since the Unix epoch.
    pub created: u64,
    /// The session ID.
    pub id: SessionId,
}

/// Which sessions to list, and in which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionSet {
    /// Sessions that are not final, oldest first.
    Unfinished,
    /// All sessions, by session ID. IDs are random, so the order does not reflect age.
    All,
}

/// A master key and its version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MasterKeyVersion {
    /// Name of the key in the HSM.
    pub key: KeyName,
    /// Version, from 1.
    pub version: u32,
}

/// The state of a session: `Reserved → Issued → Published → Erased`, or `Aborted`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionState {
    /// Keys are reserved; the certificate is not signed yet.
    Reserved,
    /// The certificate is signed.
    Issued {
        /// The certificate as delivered.
        certificate: Vec<u8>,
    },
    /// The record is public.
    Published {
        /// The publication.
        publication: Publication,
    },
    /// The key pair is erased from the secret store. Final.
    Erased {
        /// The publication.
        publication: Publication,
    },
    /// Aborted; the key pair is destroyed. Final.
    Aborted {
        /// When, seconds since the Unix epoch.
        at: u64,
        /// The reason.
        reason: String,
    },
}

impl SessionState {
    /// The state's name.
    pub const fn name(&self) -> StateName {
        match self {
            Self::Reserved => StateName::Reserved,
            Self::Issued { .. } => StateName::Issued,
            Self::Published { .. } => StateName::Published,
            Self::Erased { .. } => StateName::Erased,
            Self::Aborted { .. } => StateName::Aborted,
        }
    }

    /// Reports whether no further state can follow.
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::Erased { .. } | Self::Aborted { .. })
    }
}

/// Number of sessions per state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SessionCounts {
    /// In state Reserved.
    pub reserved: u64,
    /// In state Issued.
    pub issued: u64,
    /// In state Published.
    pub published: u64,
    /// In state Erased.
    pub erased: u64,
    /// In state Aborted.
    pub aborted: u64,
}

impl SessionCounts {
    /// Mutable access to the count of one state.
    pub const fn count_mut(&mut self, state: StateName) -> &mut u64 {
        match state {
            StateName::Reserved => &mut self.reserved,
            StateName::Issued => &mut self.issued,
            StateName::Published => &mut self.published,
            StateName::Erased => &mut self.erased,
            StateName::Aborted => &mut self.aborted,
        }
    }
}
