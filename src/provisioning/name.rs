//! The identity of a device that is ordered without one.

use super::{Order, Policy, ProvisionError, Provisioner};
use crate::keys::PublicKey;
use crate::names::{ChipId, DeviceIdentity, ProfileName, StationName};
use crate::package::TransportPublicKey;
use crate::store::SessionState;

/// How many identities of the public database are passed over in one call; the next call goes on behind them.
const PASSED_OVER: usize = 100;

/// An order as a station gives it.
pub struct Wanted {
    /// Who asks.
    pub station: StationName,
    /// For which chip.
    pub chip: ChipId,
    /// Its identity; without one it gets the next of those that officers have loaded.
    pub identity: Option<DeviceIdentity>,
    /// What it gets.
    pub profile: ProfileName,
    /// The public key of a verified CSR.
    pub own_key: Option<PublicKey>,
    /// Where the package is sealed to.
    pub transport_key: Option<TransportPublicKey>,
}

impl From<Order> for Wanted {
    fn from(order: Order) -> Self {
        let Order { station, chip, identity, profile, own_key, transport_key } = order;
        Self { station, chip, identity: Some(identity), profile, own_key, transport_key }
    }
}

impl Provisioner {
    /// The order with the device's identity. A chip that has one keeps it, however often it is ordered; the caller holds the chip.
    pub(super) async fn name(&self, wanted: Wanted, rules: &Policy) -> Result<Order, ProvisionError> {
        let identity = match &wanted.identity {
            Some(identity) => identity.clone(),
            None => self.identity_of(&wanted, rules).await?,
        };
        let Wanted { station, chip, profile, own_key, transport_key, .. } = wanted;
        Ok(Order { station, chip, identity, profile, own_key, transport_key })
    }

    async fn identity_of(&self, wanted: &Wanted, rules: &Policy) -> Result<DeviceIdentity, ProvisionError> {
        let (session, record) =
            tokio::try_join!(self.journal.load_chip(&wanted.chip), self.registry.find_by_chip(&wanted.chip))?;
        let session = session.map(|known| known.session().clone());
        if let Some(known) = session.filter(|known| !matches!(known.state, SessionState::Aborted { .. })) {
            return Ok(known.identity);
        }
        if let Some(published) = record {
            return Ok(published.record.identity);
        }
        let permitted = rules.admit_unnamed(wanted)?;
        let mut taken = None;
        for _ in 0..PASSED_OVER {
            let Wanted { station, chip, profile, .. } = wanted;
            let given =
                self.access.allocate(chip, profile, station, permitted.clone(), taken, self.clock.now()).await?;
            // The public database knows best: the state store could be an old copy, and count anew from where it was.
            if self.registry.find_by_identity(&given).await?.is_none() {
                return Ok(given);
            }
            taken = Some(given);
        }
        Err(ProvisionError::Identities(PASSED_OVER))
    }
}
