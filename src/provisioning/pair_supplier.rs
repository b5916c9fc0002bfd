//! Where a new device's pair comes from, and how it becomes the session's.

use super::{Product, ProvisionError, Provisioner};
use crate::certificate::KeyPairRule;
use crate::hsm::{DeviceKeyOrder, DeviceKeys, HsmError, PairOrder};
use crate::keypool::{PoolError, PoolLease, SessionLease};
use crate::keys::{KeyKind, StoredKey};
use crate::store::{Intent, PairToReserve, ReserveError, Session};

/// Where the pair of a new device comes from.
pub(super) enum PairSource {
    /// It is made now.
    ToMake(SessionLease, KeyKind),
    /// It was made in advance.
    Pooled(PoolLease),
}

/// A pair that is nobody's yet, and what the journal is told of it. Dropped, a pooled one goes back.
pub(super) struct UnstoredPair {
    source: PairSource,
    reserve: PairToReserve,
}

impl PairSource {
    pub(super) fn order(&self) -> PairOrder {
        match self {
            Self::ToMake(lease, kind) => PairOrder::Make(*kind, lease.key()),
            Self::Pooled(claim) => PairOrder::Kept(claim.public().clone(), claim.kept().clone()),
        }
    }

    /// The pair as it is kept.
    pub(super) fn take(self, kept: &StoredKey) -> Result<UnstoredPair, ProvisionError> {
        let reserve = match &self {
            Self::ToMake(lease, _) => lease.reserve(kept),
            Self::Pooled(claim) => Some(claim.reserve()),
        };
        let cause = || "it is wrapped under another key than was ordered".to_owned();
        let reserve =
            reserve.ok_or_else(|| ProvisionError::Internal { doing: "keeping a new pair", cause: cause() })?;
        Ok(UnstoredPair { source: self, reserve })
    }
}

impl Provisioner {
    /// What the profile says, as far as there is any.
    pub(super) async fn source_of_pair(&self, product: &Product) -> Result<Option<PairSource>, ProvisionError> {
        let made = async |kind| Ok(Some(PairSource::ToMake(self.pool.lease_for_session().await?, kind)));
        match *product.profile.key_pair() {
            KeyPairRule::Generate { kind } => made(kind).await,
            KeyPairRule::Pool { kind, or_generate } => match self.pool.claim(kind).await {
                Ok(claim) => Ok(Some(PairSource::Pooled(claim))),
                Err(PoolError::Empty { .. }) if or_generate => made(kind).await,
                Err(error) => Err(error.into()),
            },
            KeyPairRule::Csr { .. } | KeyPairRule::None => Ok(None),
        }
    }

    /// The keys of a new device. A pooled pair is delivered only if the public database does not know it: else the state store
    /// is an old copy, which offers again what a device has since.
    pub(super) async fn keys_of_new_device(
        &self,
        order: &DeviceKeyOrder,
        source: &mut Option<PairSource>,
    ) -> Result<DeviceKeys, ProvisionError> {
        let Some(PairSource::Pooled(claim)) = source else { return Ok(self.hsm.device_keys(order).await?) };
        let (taken, made) =
            tokio::join!(self.registry.taker_of_public_key(claim.public().spki_der()), self.hsm.device_keys(order),);
        let (error, why) = match (taken?, made) {
            (Some(taken), _) => {
                let why = format!("a ready pair is on a device: {taken}");
                (ProvisionError::RolledBack(taken), why)
            }
            (None, Err(HsmError::Absent(why))) => {
                (PoolError::RolledBack(format!("{why}: the state store was rolled back")).into(), why)
            }
            (None, Err(error)) => {
                if let Some(PairSource::Pooled(claim)) = source.take() {
                    claim.set_aside();
                }
                return Err(error.into());
            }
            (None, Ok(made)) => return Ok(made),
        };
        if let Some(PairSource::Pooled(claim)) = source.take() {
            claim.spent();
        }
        self.pool.quarantine_all(why).await?;
        Err(error)
    }

    /// Journals the session with its pair. Whatever else happens, a pair whose fate is not known goes to nobody else.
    pub(super) async fn intend(&self, session: Session, pair: Option<UnstoredPair>) -> Result<Intent, ProvisionError> {
        let intended = self.journal.intend(session, pair.as_ref().map(|pair| &pair.reserve)).await;
        let known_to_be_free = matches!(&intended, Err(ReserveError::ChipTaken(_) | ReserveError::IdentityTaken(_)));
        if let Some(UnstoredPair { source: PairSource::Pooled(claim), .. }) = pair
            && !known_to_be_free
        {
            claim.spent();
        }
        Ok(intended?)
    }
}
