//! Resolves the identity of an order: the requested one, or one allocated from the identities that officers have loaded.

use super::{Policy, ProvisionError, Provisioner, ResolvedOrder};
use crate::keys::PublicKey;
use crate::names::{ChipId, DeviceIdentity, ProfileName, StationName};
use crate::package::TransportPublicKey;
use crate::store::SessionState;

/// Maximum number of already published identities that one call skips. The next call continues after them.
const MAX_SKIPPED: usize = 100;

/// A parsed Assemble request.
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

impl From<ResolvedOrder> for AssembleRequest {
    fn from(order: ResolvedOrder) -> Self {
        let ResolvedOrder { station, chip, identity, profile, own_key, transport_key } = order;
        Self { station, chip, identity: Some(identity), profile, own_key, transport_key }
    }
}

impl Provisioner {
    /// Resolves the device's identity. A chip that has an identity keeps it in every repeated order. The caller holds the chip's
    /// lock.
    pub(super) async fn resolve_identity(
        &self,
        request: AssembleRequest,
        policy: &Policy,
    ) -> Result<ResolvedOrder, ProvisionError> {
        let identity = match &request.identity {
            Some(identity) => identity.clone(),
            None => self.allocate_identity(&request, policy).await?,
        };
        let AssembleRequest { station, chip, profile, own_key, transport_key, .. } = request;
        Ok(ResolvedOrder { station, chip, identity, profile, own_key, transport_key })
    }

    async fn allocate_identity(
        &self,
        request: &AssembleRequest,
        policy: &Policy,
    ) -> Result<DeviceIdentity, ProvisionError> {
        let (session, record) =
            tokio::try_join!(self.journal.load_by_chip(&request.chip), self.registry.find_by_chip(&request.chip))?;
        let session = session.map(|known| known.session().clone());
        if let Some(known) = session.filter(|known| !matches!(known.state, SessionState::Aborted { .. })) {
            return Ok(known.identity);
        }
        if let Some(published) = record {
            return Ok(published.record.identity);
        }
        let permitted = policy.admit_unnamed(request)?;
        let mut published_identity = None;
        for _ in 0..MAX_SKIPPED {
            let AssembleRequest { station, chip, profile, .. } = request;
            let allocated = self
                .access
                .allocate(chip, profile, station, permitted.clone(), published_identity, self.clock.now())
                .await?;
            // Check the public database: the state store could be an old copy and allocate identities again.
            if self.registry.find_by_identity(&allocated).await?.is_none() {
                return Ok(allocated);
            }
            published_identity = Some(allocated);
        }
        Err(ProvisionError::Identities(MAX_SKIPPED))
    }
}
