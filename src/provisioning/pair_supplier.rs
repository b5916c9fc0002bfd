//! Supplies the key pair of a new device, and assigns it to the session.

use super::{Product, ProvisionError, Provisioner};
use crate::certificate::KeyPairRule;
use crate::hsm::{DeviceKeyRequest, DeviceKeys, HsmError, PairSource};
use crate::keypool::{PoolError, PoolLease, SessionLease};
use crate::keys::{KeyKind, StoredKey};
use crate::store::{Intent, PairToReserve, ReserveError, Session};

/// The source of a new device's pair.
pub(super) enum PairSupply {
    /// The HSM generates it now.
    Generate(SessionLease, KeyKind),
    /// It was generated in advance.
    Pooled(PoolLease),
}

/// A pair that the journal has not assigned to a session yet. Dropping it returns a pooled pair to its queue.
pub(super) struct UnstoredPair {
    source: PairSupply,
    reservation: PairToReserve,
}

impl PairSupply {
    /// The pair part of the HSM request.
    pub(super) fn hsm_source(&self) -> PairSource {
        match self {
            Self::Generate(lease, kind) => PairSource::Generate(*kind, lease.key()),
            Self::Pooled(lease) => PairSource::Stored(lease.public().clone(), lease.stored_key().clone()),
        }
    }

    /// Combines the source with the stored private key.
    pub(super) fn into_unstored(self, stored_key: &StoredKey) -> Result<UnstoredPair, ProvisionError> {
        let reservation = match &self {
            Self::Generate(lease, _) => lease.reservation(stored_key),
            Self::Pooled(lease) => Some(lease.reservation()),
        };
        let cause = || "the HSM wrapped the pair under another key than requested".to_owned();
        let reservation =
            reservation.ok_or_else(|| ProvisionError::Internal { doing: "storing a new pair", cause: cause() })?;
        Ok(UnstoredPair { source: self, reservation })
    }
}

impl Provisioner {
    /// The pair source that the profile prescribes, if the profile has a pair.
    pub(super) async fn pair_source(&self, product: &Product) -> Result<Option<PairSupply>, ProvisionError> {
        let generate = async |kind| Ok(Some(PairSupply::Generate(self.pool.lease_for_session().await?, kind)));
        match *product.profile.key_pair() {
            KeyPairRule::Generate { kind } => generate(kind).await,
            KeyPairRule::Pool { kind, or_generate } => match self.pool.lease_pair(kind).await {
                Ok(lease) => Ok(Some(PairSupply::Pooled(lease))),
                Err(PoolError::Empty { .. }) if or_generate => generate(kind).await,
                Err(error) => Err(error.into()),
            },
            KeyPairRule::Csr { .. } | KeyPairRule::None => Ok(None),
        }
    }

    /// The keys of a new device. A pooled pair is delivered only if the public database has no record of it. If there is a
    /// record, the state store is an old copy and offers a pair that a device already has.
    pub(super) async fn new_device_keys(
        &self,
        order: &DeviceKeyRequest,
        source: &mut Option<PairSupply>,
    ) -> Result<DeviceKeys, ProvisionError> {
        let Some(PairSupply::Pooled(lease)) = source else { return Ok(self.hsm.device_keys(order).await?) };
        let (taken, made) =
            tokio::join!(self.registry.public_key_conflict(lease.public().spki_der()), self.hsm.device_keys(order),);
        let (error, why) = match (taken?, made) {
            (Some(taken), _) => {
                let why = format!("a ready pair is already on a device: {taken}");
                (ProvisionError::RolledBack(taken), why)
            }
            (None, Err(HsmError::Absent(why))) => {
                (PoolError::RolledBack(format!("{why}: the state store was rolled back")).into(), why)
            }
            (None, Err(error)) => {
                if let Some(PairSupply::Pooled(lease)) = source.take() {
                    lease.demote();
                }
                return Err(error.into());
            }
            (None, Ok(made)) => return Ok(made),
        };
        if let Some(PairSupply::Pooled(lease)) = source.take() {
            lease.consume();
        }
        self.pool.quarantine_all(why).await?;
        Err(error)
    }

    /// Journals the session with its pair. A pooled pair returns to its queue only if it is certain that the reservation was not
    /// committed.
    pub(super) async fn journal_intent(
        &self,
        session: Session,
        pair: Option<UnstoredPair>,
    ) -> Result<Intent, ProvisionError> {
        let result = self.journal.intend(session, pair.as_ref().map(|pair| &pair.reservation)).await;
        let is_not_reserved = matches!(&result, Err(ReserveError::ChipTaken(_) | ReserveError::IdentityTaken(_)));
        if let Some(UnstoredPair { source: PairSupply::Pooled(lease), .. }) = pair
            && !is_not_reserved
        {
            lease.consume();
        }
        Ok(result?)
    }
}
