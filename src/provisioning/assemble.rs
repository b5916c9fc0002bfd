//! First half of provisioning: from the order to the data package.

use std::pin::pin;
use std::time::{Duration, Instant};

use crate::certificate::{CertificateRequest, CertificateSerial, prepare};
use crate::hsm::{DeviceKeyRequest, HsmError};
use crate::keys::PublicKey;
use crate::names::SessionId;
use crate::package::TransportPublicKey;
use crate::store::{CertificateToSign, MasterKeyVersion, Session, SessionState};

use super::admit::Admitted;
use super::deliver::{PackageKeys, package};
use super::name::AssembleRequest;
use super::order::{Assembled, ResolvedOrder, derivations};
use super::pair_supplier::{PairSupply, UnstoredPair};
use super::{Product, ProvisionError, Provisioner};

/// Pause before a failed HSM call is repeated on another HSM.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// Random bytes per device: the session ID and the certificate's serial number.
const RANDOM_LEN: usize = SessionId::LEN + CertificateSerial::LEN;

impl Provisioner {
    /// Assembles a device's certificate and keys. A repeated call returns the same ones until the device is complete.
    pub async fn assemble(&self, request: impl Into<AssembleRequest>) -> Result<Assembled, ProvisionError> {
        // 1. Admit: the station is permitted, the chip and the identity are free. A repeated call waits here for the first one.
        let (policy, request) = (self.policy(), request.into());
        let _chip = self.chip_locks.lock(&request.chip).await?;
        let order = self.resolve_identity(request, &policy).await?;
        let product = policy.admit_order(&order)?;
        let (issued, keys) = match self.admit_device(&order).await? {
            Admitted::Known(issued) => (issued, None),
            // A crash or an HSM failure occurred between the intent and the journaled signature: the same bytes are signed again.
            Admitted::Intended(intent) => {
                let signed = policy.signer_of(&intent)?.sign(&self.hsm, intent).await?;
                (self.journal.issue(signed).await?, None)
            }
            Admitted::New => {
                // 2. Keys: generated in the HSM, or taken from the pool. Nothing is written yet, so a crash leaves nothing
                // behind.
                let made = self.make_keys(&order, product).await?;
                // 3. Prepare and lint the certificate: the types prevent signing bytes that were not linted.
                let session = self.prepare_session(&order, product, &made)?;
                // 4. Journal the intent. After a crash from here on, the journal has the session, its pair and the bytes to be
                // signed. The same transaction assigns a pooled pair to this session.
                let intent = self.journal_intent(session, made.pair).await?;
                // 5. Sign: consumes the intent and verifies the signature.
                let signed = product.issuer.sign(&self.hsm, intent).await?;
                // 6. Issue: the certificate is durable before it leaves, so every repeated call returns this one.
                (self.journal.issue(signed).await?, Some(made.package_keys))
            }
        };
        // 7. Deliver: a repeated call reads its keys from the secret store and the HSM; the package has the same bytes.
        let package = match keys {
            Some(keys) => package(&issued, product, keys)?,
            None => self.take_or_rebuild_package(&issued, product).await?,
        };
        self.deliver(&issued, package, order.transport_key.as_ref())
    }

    /// The HSM that generates or owns the pair may fail or hang. If there are several HSMs, a second one is tried after half of
    /// the time limit, and the first answer wins. Keys of the slower one are dropped, as after a crash.
    async fn make_keys(&self, order: &ResolvedOrder, product: &Product) -> Result<MadeKeys, ProvisionError> {
        let limit = self.hsm.call_timeout();
        let deadline = Instant::now() + limit;
        let mut first = pin!(self.make_keys_until(order, product, deadline));
        let wait = if self.hsm.members().nth(1).is_some() { limit / 2 } else { Duration::MAX };
        if let Ok(made) = tokio::time::timeout(wait, first.as_mut()).await {
            return made;
        }
        let mut second = pin!(self.make_keys_until(order, product, deadline));
        tokio::select! {
            made = first.as_mut() => if made.is_ok() { made } else { second.await },
            made = second.as_mut() => if made.is_ok() { made } else { first.await },
        }
    }

    /// Makes the keys on any HSM, and tries again while one fails, another is ready, and time is left.
    async fn make_keys_until(
        &self,
        order: &ResolvedOrder,
        product: &Product,
        deadline: Instant,
    ) -> Result<MadeKeys, ProvisionError> {
        loop {
            let made = self.make_keys_once(order, product).await;
            let has_alternative = self.hsm.members().nth(1).is_some() && !self.hsm.ready_members().is_empty();
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

    async fn make_keys_once(&self, order: &ResolvedOrder, product: &Product) -> Result<MadeKeys, ProvisionError> {
        let mut source = self.pair_source(product).await?;
        let pair = source.as_ref().map(PairSupply::hsm_source);
        let derivations = derivations(product, &order.identity, product.profile.master_key());
        let keys = DeviceKeyRequest { pair, derivations, random: RANDOM_LEN };
        let made = self.new_device_keys(&keys, &mut source).await?;
        let (private, stored_key) = made.pair.map(|pair| (pair.private, pair.stored)).unzip();
        let pair = source.zip(stored_key).map(|(source, stored_key)| source.into_unstored(&stored_key)).transpose()?;
        let public_key = private.as_ref().map(|pair| pair.public().clone()).or_else(|| order.own_key.clone());
        let too_few = || ProvisionError::Internal {
            doing: "drawing random bytes",
            cause: "the HSM returned too few bytes".to_owned(),
        };
        let (session, serial) = made.random.split_first_chunk::<{ SessionId::LEN }>().ok_or_else(too_few)?;
        let serial = serial.first_chunk::<{ CertificateSerial::LEN }>().ok_or_else(too_few)?;
        Ok(MadeKeys {
            session: SessionId::from_bytes(session).map_err(ProvisionError::internal("naming a session"))?,
            serial: CertificateSerial::from_random(*serial),
            public_key,
            pair,
            package_keys: PackageKeys { pair: private, derived: made.derived },
        })
    }

    fn prepare_session(
        &self,
        order: &ResolvedOrder,
        product: &Product,
        made: &MadeKeys,
    ) -> Result<Session, ProvisionError> {
        let created = self.clock.now();
        let request = CertificateRequest {
            profile: &product.profile,
            issuer: product.issuer.certificate(),
            chip: &order.chip,
            identity: &order.identity,
            public_key: made.public_key.as_ref(),
            serial: made.serial,
            not_before: created,
        };
        let linted = prepare(&request)
            .map_err(ProvisionError::internal("preparing a certificate"))?
            .lint()
            .map_err(ProvisionError::internal("linting a certificate"))?;
        let certificate: CertificateToSign = linted.into_to_sign();
        Ok(Session {
            id: made.session,
            chip: order.chip.clone(),
            identity: order.identity.clone(),
            profile: order.profile.clone(),
            station: order.station.clone(),
            created,
            expires: created.saturating_add(self.session_lifetime.as_secs()),
            public_key: made.public_key.as_ref().map(|key| key.spki_der().to_vec()),
            own_key_pair: order.own_key.is_some(),
            sealed_to: order.transport_key.as_ref().map(TransportPublicKey::fingerprint),
            recipe: product.recipe(),
            master_key: self.master_key_use(product),
            certificate,
            state: SessionState::Reserved,
        })
    }

    /// The profile's master key and its version. All symmetric keys of a profile are derived from one master key.
    fn master_key_use(&self, product: &Product) -> Option<MasterKeyVersion> {
        let key = product.profile.master_key()?;
        let version = self.hsm.keys().master_key(key)?.version;
        Some(MasterKeyVersion { key: key.clone(), version })
    }
}

/// The keys and random values of step 2.
struct MadeKeys {
    session: SessionId,
    serial: CertificateSerial,
    public_key: Option<PublicKey>,
    pair: Option<UnstoredPair>,
    package_keys: PackageKeys,
}
