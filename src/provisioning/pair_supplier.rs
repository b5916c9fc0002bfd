//! Step 2 of provisioning: supplies the keys of a new device. The pair is generated in an HSM or taken from the pool; the
//! symmetric keys are derived, and the random values drawn, in the same HSM call.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use spp_format::certificate::{CertificateSerial, KeyPairRule};
use spp_format::keys::{DevicePrivateKey, KeyType, PublicKey};
use spp_format::names::SessionId;
use spp_format::record::UniqueKey;
use spp_format::secret::SecretBytes;

use super::ProvisionError;
use crate::hsm::{Derivation, DeviceKeyRequest, DeviceKeys, Hsm, HsmError, PairSource, StoredKey};
use crate::keypool::{KeyPool, PoolError, PoolLease, SessionLease};
use crate::store::{Intent, PairToReserve, Registry, ReserveError, StoreError};

/// Pause before a failed HSM call is repeated on another HSM.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// Random bytes per device: the session ID and the certificate's serial number.
const RANDOM_LEN: usize = SessionId::LEN + CertificateSerial::LEN;

/// Makes the keys of new devices on whichever HSM answers.
pub(super) struct PairSupplier {
    hsm: Hsm,
    pool: Arc<KeyPool>,
    registry: Registry,
}

/// The keys that a new device is to get.
pub(super) struct KeyOrder<'a> {
    /// Where the profile takes key pairs from.
    pub(super) rule: &'a KeyPairRule,
    /// The derivations of its symmetric keys.
    pub(super) derivations: Vec<Derivation>,
    /// The public key of a device that generates its own pair.
    pub(super) own_key: Option<&'a PublicKey>,
}

/// The secret keys of a package, in memory for the duration of one call.
pub(super) struct PackageKeys {
    pub(super) pair: Option<DevicePrivateKey>,
    pub(super) derived: Vec<SecretBytes>,
}

/// The keys and random values of a new device. Nothing of them is stored yet: dropping them leaves nothing behind.
pub(super) struct NewKeys {
    pub(super) session: SessionId,
    pub(super) serial: CertificateSerial,
    /// The key that the certificate binds: of the new pair, or of the device's own.
    pub(super) public_key: Option<PublicKey>,
    /// The pair to be stored, if the device has no own pair.
    pub(super) pair: Option<UnstoredPair>,
    pub(super) package_keys: PackageKeys,
}

/// A pair that the journal has not assigned to a session yet. Dropping it returns a pooled pair to its queue.
pub(super) struct UnstoredPair {
    source: LeasedSource,
    reservation: PairToReserve,
}

/// The source of a new device's pair, leased until the pair is stored.
enum LeasedSource {
    /// An HSM generates it now.
    Generate(SessionLease, KeyType),
    /// It was generated in advance.
    Pooled(PoolLease),
}

impl PairSupplier {
    pub(super) const fn new(hsm: Hsm, pool: Arc<KeyPool>, registry: Registry) -> Self {
        Self { hsm, pool, registry }
    }

    /// The HSM that generates or owns the pair may fail or hang. If there are several HSMs, a second one is tried after half of
    /// the time limit, and the first answer wins. Keys of the slower one are dropped, as after a crash.
    pub(super) async fn new_keys(&self, order: &KeyOrder<'_>) -> Result<NewKeys, ProvisionError> {
        let limit = self.hsm.call_timeout();
        let deadline = Instant::now() + limit;
        let mut first = pin!(self.new_keys_until(order, deadline));
        let wait = if self.has_several_hsms() { limit / 2 } else { Duration::MAX };
        if let Ok(made) = tokio::time::timeout(wait, first.as_mut()).await {
            return made;
        }
        let mut second = pin!(self.new_keys_until(order, deadline));
        tokio::select! {
            made = first.as_mut() => if made.is_ok() { made } else { second.await },
            made = second.as_mut() => if made.is_ok() { made } else { first.await },
        }
    }

    /// Makes the keys on any HSM, and tries again while one fails, another is ready, and time is left.
    async fn new_keys_until(&self, order: &KeyOrder<'_>, deadline: Instant) -> Result<NewKeys, ProvisionError> {
        loop {
            let made = self.new_keys_once(order).await;
            let has_alternative = self.has_several_hsms() && !self.hsm.ready_members().is_empty();
            match made {
                Err(ProvisionError::Hsm(HsmError::Unavailable { .. }))
                    if has_alternative && Instant::now() < deadline =>
                {
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                made => return made,
            }
        }
    }

    fn has_several_hsms(&self) -> bool {
        self.hsm.members().nth(1).is_some()
    }

    async fn new_keys_once(&self, order: &KeyOrder<'_>) -> Result<NewKeys, ProvisionError> {
        let source = self.lease_source(order.rule).await?;
        let request = DeviceKeyRequest {
            pair: source.as_ref().map(LeasedSource::hsm_source),
            derivations: order.derivations.clone(),
            random: RANDOM_LEN,
        };
        let (made, source) = match source {
            Some(LeasedSource::Pooled(lease)) => {
                let (made, lease) = self.pooled_keys(&request, lease).await?;
                (made, Some(LeasedSource::Pooled(lease)))
            }
            source => (self.hsm.device_keys(&request).await?, source),
        };
        let (private, stored_key) = made.pair.map(|pair| (pair.private, pair.stored)).unzip();
        let pair = source.zip(stored_key).map(|(source, key)| source.into_unstored(&key)).transpose()?;
        let public_key = private.as_ref().map(|pair| pair.public().clone()).or_else(|| order.own_key.cloned());
        let too_few = || ProvisionError::Internal {
            doing: "drawing random bytes",
            cause: "the HSM returned too few bytes".to_owned(),
        };
        let (session, serial) = made.random.split_first_chunk::<{ SessionId::LEN }>().ok_or_else(too_few)?;
        let serial = serial.first_chunk::<{ CertificateSerial::LEN }>().ok_or_else(too_few)?;
        Ok(NewKeys {
            session: SessionId::from_bytes(session).map_err(ProvisionError::internal("naming a session"))?,
            serial: CertificateSerial::from_random(*serial),
            public_key,
            pair,
            package_keys: PackageKeys { pair: private, derived: made.derived },
        })
    }

    /// Leases the source that the profile prescribes, if the profile has a pair.
    async fn lease_source(&self, rule: &KeyPairRule) -> Result<Option<LeasedSource>, ProvisionError> {
        let generate = async |kind| Ok(Some(LeasedSource::Generate(self.pool.lease_for_session().await?, kind)));
        match *rule {
            KeyPairRule::Generate { kind } => generate(kind).await,
            KeyPairRule::Pool { kind, or_generate } => match self.pool.lease_pair(kind).await {
                Ok(lease) => Ok(Some(LeasedSource::Pooled(lease))),
                Err(PoolError::Empty { .. }) if or_generate => generate(kind).await,
                Err(error) => Err(error.into()),
            },
            KeyPairRule::Csr { .. } | KeyPairRule::None => Ok(None),
        }
    }

    /// The keys of a device with a pooled pair. The pair is delivered only if the public database has no record of it. If
    /// there is a record, the state store is an old copy and offers a pair that a device already has.
    async fn pooled_keys(
        &self,
        request: &DeviceKeyRequest,
        lease: PoolLease,
    ) -> Result<(DeviceKeys, PoolLease), ProvisionError> {
        let key = UniqueKey::of_public_key(lease.public().spki_der());
        let (taken, made) = tokio::join!(self.registry.conflict(&key), self.hsm.device_keys(request));
        let (error, why) = match (taken?, made) {
            (None, Ok(made)) => return Ok((made, lease)),
            (Some(taken), _) => {
                let why = format!("a ready pair is already on a device: {taken}");
                (ProvisionError::RolledBack(taken), why)
            }
            (None, Err(HsmError::Absent(why))) => {
                (PoolError::RolledBack(format!("{why}: the state store was rolled back")).into(), why)
            }
            (None, Err(error)) => {
                lease.demote();
                return Err(error.into());
            }
        };
        lease.consume();
        self.pool.quarantine_all(why).await?;
        Err(error)
    }
}

impl LeasedSource {
    /// The pair part of the HSM request.
    fn hsm_source(&self) -> PairSource {
        match self {
            Self::Generate(lease, kind) => PairSource::Generate(*kind, lease.key()),
            Self::Pooled(lease) => PairSource::Stored(lease.public().clone(), lease.stored_key().clone()),
        }
    }

    /// Combines the source with the stored private key.
    fn into_unstored(self, stored_key: &StoredKey) -> Result<UnstoredPair, ProvisionError> {
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

impl UnstoredPair {
    /// The pair, for the transaction that reserves the session.
    pub(super) const fn reservation(&self) -> &PairToReserve {
        &self.reservation
    }

    /// Ends the lease once the reservation has ended. A pooled pair returns to its queue only if it is certain that the
    /// reservation was not committed.
    pub(super) fn end_lease(self, reserved: &Result<Intent, ReserveError>) {
        let is_not_reserved = matches!(
            reserved,
            Err(ReserveError::ChipTaken(_)
                | ReserveError::IdentityTaken(_)
                | ReserveError::SubjectTaken { .. }
                | ReserveError::PublicKeyTaken(_)
                | ReserveError::QuotaExceeded { .. }
                | ReserveError::Store(StoreError::Full { .. }))
        );
        if let LeasedSource::Pooled(lease) = self.source
            && !is_not_reserved
        {
            lease.consume();
        }
    }
}
