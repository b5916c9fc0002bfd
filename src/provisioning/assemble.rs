//! The way of a device, first half: from the order to the data package.

use std::pin::pin;
use std::time::{Duration, Instant};

use crate::certificate::{CertificateRequest, CertificateSerial, prepare};
use crate::hsm::{Derivation, DeviceKeyOrder, HsmError};
use crate::keys::PublicKey;
use crate::names::{ChipId, DeviceIdentity, KeyName, ProfileName, SessionId, StationName};
use crate::package::TransportPublicKey;
use crate::secret::SecretBytes;
use crate::store::{CertificateToSign, MasterKeyUse, Session, SessionState};

use super::admit::Admitted;
use super::deliver::{PackageKeys, package};
use super::name::Wanted;
use super::pair_supplier::{PairSource, UnstoredPair};
use super::{Product, ProvisionError, Provisioner};

/// What a station orders for a chip; every name is parsed, the CSR verified.
pub struct Order {
    /// Who asks.
    pub station: StationName,
    /// For which chip.
    pub chip: ChipId,
    /// Its identity.
    pub identity: DeviceIdentity,
    /// What it gets.
    pub profile: ProfileName,
    /// The public key of a verified CSR.
    pub own_key: Option<PublicKey>,
    /// Where the package is sealed to.
    pub transport_key: Option<TransportPublicKey>,
}

/// What the station gets for the device.
pub struct Assembled {
    /// The session.
    pub session: SessionId,
    /// The identity, also where it was given out.
    pub identity: DeviceIdentity,
    /// The certificate.
    pub certificate: Vec<u8>,
    /// Whether it is a CWT.
    pub certificate_is_cwt: bool,
    /// The package.
    pub delivery: Delivery,
    /// Seconds since the Unix epoch.
    pub expires: u64,
}

/// The package on its way.
pub enum Delivery {
    /// For the mTLS channel's end to pass on.
    Plain(SecretBytes),
    /// For the chip's eyes only.
    Sealed(Vec<u8>),
}

/// Before another HSM is asked for what one did not give.
const PAUSE: Duration = Duration::from_millis(10);
/// Bytes of randomness per device: the session's name and the certificate's serial number.
const RANDOM_LEN: usize = SessionId::LEN + CertificateSerial::LEN;

impl Provisioner {
    /// Gives a device its certificate and keys. Repeating it gives the same ones again, until the device is complete.
    pub async fn assemble(&self, wanted: impl Into<Wanted>) -> Result<Assembled, ProvisionError> {
        // 1. Admit: the caller may, the chip and the identity are free. A repeat waits for the first call here.
        let (rules, wanted) = (self.rules(), wanted.into());
        let _chip = self.chips.hold(&wanted.chip).await?;
        let order = self.name(wanted, &rules).await?;
        let product = rules.admit_order(&order)?;
        let (issued, keys) = match self.admit_device(&order).await? {
            Admitted::Known(issued) => (issued, None),
            // A crash or a lost HSM came between the intent and the journaled signature: the same bytes are signed again.
            Admitted::Intended(intent) => {
                let signed = rules.signer_of(&intent)?.sign(&self.hsm, intent).await?;
                (self.journal.issue(signed).await?, None)
            }
            Admitted::New => {
                // 2. Keys: made in the HSM, or a pair of the pool. Nothing is written yet; a crash leaves nothing.
                let made = self.make_keys(&order, product).await?;
                // 3. Prepare the certificate, linted: no unlinted bytes can be signed.
                let session = self.prepare_session(&order, product, &made)?;
                // 4. Intend. From here a crash finds the session, its pair and the bytes to be signed; a pair of the pool is
                //    this session's in the same transaction.
                let intent = self.intend(session, made.pair).await?;
                // 5. Sign: uses the intent up and verifies the signature.
                let signed = product.issuer.sign(&self.hsm, intent).await?;
                // 6. Issue: the certificate is on the disk before it leaves, so every repeat gives this one.
                (self.journal.issue(signed).await?, Some(made.package_keys))
            }
        };
        // 7. Deliver: a repeat finds its keys in the secret store and the HSM; the package comes out the same.
        let package = match keys {
            Some(keys) => package(&issued, product, keys)?,
            None => self.package_again(&issued, product).await?,
        };
        self.deliver(&issued, package, order.transport_key.as_ref())
    }

    /// The HSM that is to make the pair, or keeps it, may be lost or hang: where there are several, another one is asked as well when
    /// half of the time is over, and whoever answers first counts. What the other one made is dropped, which is a crash like any other.
    async fn make_keys(&self, order: &Order, product: &Product) -> Result<MadeKeys, ProvisionError> {
        let limit = self.hsm.call_timeout();
        let until = Instant::now() + limit;
        let mut first = pin!(self.make_keys_until(order, product, until));
        let wait = if self.hsm.each().nth(1).is_some() { limit / 2 } else { Duration::MAX };
        if let Ok(made) = tokio::time::timeout(wait, first.as_mut()).await {
            return made;
        }
        let mut second = pin!(self.make_keys_until(order, product, until));
        tokio::select! {
            made = first.as_mut() => if made.is_ok() { made } else { second.await },
            made = second.as_mut() => if made.is_ok() { made } else { first.await },
        }
    }

    /// Makes them with whichever HSM, as long as one fails and there is another.
    async fn make_keys_until(
        &self,
        order: &Order,
        product: &Product,
        until: Instant,
    ) -> Result<MadeKeys, ProvisionError> {
        loop {
            let made = self.make_keys_once(order, product).await;
            let others = self.hsm.each().nth(1).is_some() && !self.hsm.ready_members().is_empty();
            match made {
                Err(ProvisionError::Hsm(HsmError::Unavailable { .. })) if others && Instant::now() < until => {
                    tokio::time::sleep(PAUSE).await;
                }
                made => return made,
            }
        }
    }

    async fn make_keys_once(&self, order: &Order, product: &Product) -> Result<MadeKeys, ProvisionError> {
        let mut source = self.source_of_pair(product).await?;
        let pair = source.as_ref().map(PairSource::order);
        let derivations = derivations(product, &order.identity, product.profile.master_key());
        let keys = DeviceKeyOrder { pair, derivations, random: RANDOM_LEN };
        let made = self.keys_of_new_device(&keys, &mut source).await?;
        let (private, kept) = made.pair.map(|pair| (pair.private, pair.kept)).unzip();
        let pair = source.zip(kept).map(|(source, kept)| source.take(&kept)).transpose()?;
        let public_key = private.as_ref().map(|pair| pair.public().clone()).or_else(|| order.own_key.clone());
        let short = || ProvisionError::Internal { doing: "drawing random bytes", cause: "too few came".to_owned() };
        let (session, serial) = made.random.split_first_chunk::<{ SessionId::LEN }>().ok_or_else(short)?;
        let serial = serial.first_chunk::<{ CertificateSerial::LEN }>().ok_or_else(short)?;
        Ok(MadeKeys {
            session: SessionId::from_bytes(session).map_err(ProvisionError::internal("naming a session"))?,
            serial: CertificateSerial::from_random(*serial),
            public_key,
            pair,
            package_keys: PackageKeys { pair: private, derived: made.derived },
        })
    }

    fn prepare_session(&self, order: &Order, product: &Product, made: &MadeKeys) -> Result<Session, ProvisionError> {
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

    /// The profile's master key and its version; all symmetric keys of a profile come from one.
    fn master_key_use(&self, product: &Product) -> Option<MasterKeyUse> {
        let key = product.profile.master_key()?;
        let version = self.hsm.keys().master_key(key)?.version;
        Some(MasterKeyUse { key: key.clone(), version })
    }
}

/// What step 2 made.
struct MadeKeys {
    session: SessionId,
    serial: CertificateSerial,
    public_key: Option<PublicKey>,
    pair: Option<UnstoredPair>,
    package_keys: PackageKeys,
}

/// The symmetric keys of a device, as the HSM derives them: from the profile's master key, or from the one that the session
/// began with.
pub(super) fn derivations(product: &Product, identity: &DeviceIdentity, master: Option<&KeyName>) -> Vec<Derivation> {
    let rules = product.profile.symmetric_keys().iter();
    let pairs = rules.filter_map(|rule| Some((rule, master?)));
    pairs
        .map(|(rule, key)| Derivation::device_key(key.clone(), &rule.purpose, identity, usize::from(rule.length)))
        .collect()
}
