//! A device on the line and the station before it, and what must be true of a device that went the whole way.

use spp::device::{Delivery as ToDevice, Device, Installed, PublicRecord};
use spp::keys::sha256;
use spp::names::{ChipId, DeviceIdentity, Imei, ProfileName, SessionId};
use spp::package::TransportCurve;
use spp::provisioning::{Completion, Delivery, Order, ProvisionError};
use spp::store::{
    PublicDatabase as _, Publication, PublishedRecord, Session, SessionCounts, SessionState, StateName,
    StateStore as _, UniqueKey,
};

use super::{House, Point, station};

/// What a product of the demo gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A pair made in the HSM, X.509.
    Phone,
    /// Symmetric keys alone, sealed, CWT.
    Sensor,
    /// A pair of its own, X.509.
    Gateway,
    /// A pair that was made in advance, X.509.
    Pooled,
    /// The same, or one made in the HSM when none is ready.
    PooledOrMade,
}

/// A device with the station's notes about it.
pub struct OnTheLine {
    pub device: Device,
    pub chip: ChipId,
    pub identity: DeviceIdentity,
    pub kind: Kind,
    /// What was delivered, in order: session and certificate.
    pub delivered: Vec<(SessionId, Vec<u8>)>,
}

impl OnTheLine {
    /// The n-th chip with the n-th identity.
    pub fn new(house: &House, kind: Kind, n: u32) -> Self {
        Self::with_identity(house, kind, n, n)
    }

    pub fn with_identity(house: &House, kind: Kind, chip: u32, identity: u32) -> Self {
        let chip = ChipId::from_bytes(&[[0xC4; 8].as_slice(), &chip.to_be_bytes()].concat()).unwrap();
        let device = house.fab.device(&chip, Some(TransportCurve::X25519)).unwrap();
        Self { device, chip, identity: identity_of(kind, identity), kind, delivered: Vec::new() }
    }

    pub fn order(&self) -> Order {
        let own_key = match self.kind {
            Kind::Gateway => Some(self.device.own_key_pair().unwrap().public().clone()),
            _ => None,
        };
        let transport_key = match self.kind {
            Kind::Sensor => self.device.transport_public_key().unwrap(),
            _ => None,
        };
        let (chip, identity, profile) = (self.chip.clone(), self.identity.clone(), profile(self.kind));
        Order { station: station(), chip, identity, profile, own_key, transport_key }
    }

    /// Assembles and stores the package in the device.
    pub async fn assemble(&mut self, point: &Point<'_>) -> Result<Installed, ProvisionError> {
        let assembled = point.provisioner().assemble(self.order()).await?;
        let delivery = match &assembled.delivery {
            Delivery::Plain(package) => ToDevice::Clear(package),
            Delivery::Sealed(sealed) => ToDevice::Sealed(sealed),
        };
        let installed = self.device.install(&assembled.session, &delivery).unwrap();
        assert_eq!(installed.certificate, assembled.certificate, "the certificate beside the package is the one in it");
        self.delivered.push((assembled.session, assembled.certificate));
        Ok(installed)
    }

    pub async fn complete(&self, point: &Point<'_>) -> Result<Publication, ProvisionError> {
        let (session, _) = *self.delivered.last().expect("it was assembled");
        self.complete_session(point, session).await
    }

    /// Brings back what the device has, for that session.
    pub async fn complete_session(&self, point: &Point<'_>, session: SessionId) -> Result<Publication, ProvisionError> {
        let receipt = point.provisioner().complete(self.completion(session)).await?;
        // Whoever has the record and the log's key need believe nobody.
        let found = point.record_of(&self.chip).await.expect("what was acknowledged is public");
        let proven = receipt.proof.verify(&found.bytes, &point.log_key()).unwrap();
        assert_eq!((proven.index, found.publication), (receipt.publication.index, receipt.publication));
        Ok(receipt.publication)
    }

    pub fn completion(&self, session: SessionId) -> Completion {
        let (backup, confirmation) = (self.device.backup().unwrap(), self.device.confirmation().unwrap());
        Completion { station: station(), session, backup, confirmation }
    }

    pub async fn abort(&self, point: &Point<'_>) -> Result<(), ProvisionError> {
        let (session, _) = *self.delivered.last().expect("it was assembled");
        point.provisioner().abort(&station(), session, "a test".to_owned()).await
    }

    /// The whole way.
    pub async fn walk(&mut self, point: &Point<'_>) -> Publication {
        self.assemble(point).await.unwrap();
        self.complete(point).await.unwrap()
    }

    /// The newest session that the journal has of the chip.
    pub async fn session(&self, point: &Point<'_>) -> Option<Session> {
        point.state().session_of_chip(&self.chip).await.unwrap()
    }

    pub async fn state(&self, point: &Point<'_>) -> Option<StateName> {
        self.session(point).await.map(|session| session.state.name())
    }

    pub async fn is_public(&self, point: &Point<'_>) -> bool {
        point.record_of(&self.chip).await.is_some()
    }

    /// Whether the wrapped pair of the chip's newest session is in the secret store.
    pub async fn has_wrapped_key(&self, point: &Point<'_>) -> bool {
        let session = self.session(point).await.expect("the chip has a session");
        point.state().kept_key(&session.id).await.unwrap().is_some()
    }

    /// The secret store holds the pair that was made here for as long as the way is not over, and no longer.
    pub async fn assert_key_is_kept_until_the_end(&self, point: &Point<'_>) {
        let Some(session) = self.session(point).await else { return };
        let made_here = matches!(self.kind, Kind::Phone | Kind::Pooled | Kind::PooledOrMade);
        let expected = made_here && !session.state.is_final();
        assert_eq!(self.has_wrapped_key(point).await, expected, "{:?}", session.state.name());
    }

    /// Everything that must be true once this device, the only one of the stores, went the whole way.
    pub async fn assert_complete(&mut self, point: &Point<'_>, answer: Publication) {
        let session = self.session(point).await.unwrap();
        self.assert_the_journal_has_one_session(point, &session, answer).await;
        self.assert_one_certificate(&session);
        let found = point.record_of(&self.chip).await.unwrap();
        let PublishedRecord { record, bytes, publication } = found.clone();
        assert_eq!(point.public().len().await.unwrap(), 1);
        assert_eq!((publication, publication.record_hash), (answer, sha256(&bytes)));
        let of_identity = point.public().find(&UniqueKey::of_identity(&self.identity)).await.unwrap();
        assert_eq!(of_identity, Some(found));
        assert_eq!((&record.chip, &record.identity, record.session), (&self.chip, &self.identity, session.id));
        assert_eq!((&record.serial, &record.public_key), (&session.certificate.serial, &session.public_key));
        assert_eq!(record.certificate, self.delivered[0].1);
        assert_eq!(record.backup, self.device.backup().unwrap());

        // What the device has is what the record gives back to a wiped one.
        let before = self.device.installed().unwrap();
        assert_eq!(before.public_key.as_ref().map(|key| key.spki_der().to_vec()), session.public_key);
        self.device.wipe().unwrap();
        let (certificate, is_cwt, backup) = (&*record.certificate, record.certificate_is_cwt, &*record.backup);
        let recovered = self.device.recover(&PublicRecord { certificate, is_cwt, backup }).unwrap();
        assert_eq!(recovered, before);
    }

    async fn assert_the_journal_has_one_session(&self, point: &Point<'_>, session: &Session, answer: Publication) {
        assert_eq!(session.state, SessionState::Erased { publication: answer });
        assert_eq!(session.identity, self.identity);
        assert_eq!(point.state().session_of_identity(&self.identity).await.unwrap().as_ref(), Some(session));
        assert_eq!(point.state().counts().await.unwrap(), SessionCounts { erased: 1, ..SessionCounts::default() });
        assert_eq!(point.state().unfinished().await.unwrap(), []);
        assert!(point.state().kept_key(&session.id).await.unwrap().is_none(), "the pair must be erased");
    }

    /// However often it was delivered, it was one certificate, over the bytes that were intended.
    fn assert_one_certificate(&self, session: &Session) {
        let (_, certificate) = &self.delivered[0];
        assert!(self.delivered.iter().all(|delivered| *delivered == (session.id, certificate.clone())));
        assert!(is_over(certificate, session), "the certificate must be over the journaled bytes");
    }
}

/// Whether a certificate holds exactly the bytes that the journal had for it before they were signed.
pub fn is_over(certificate: &[u8], session: &Session) -> bool {
    let to_be_signed = session.certificate.to_be_signed.clone();
    let bytes = if session.certificate.is_cwt {
        // The payload of the Sig_structure (RFC 9052 §4.4) is the payload of the CWT.
        let structure: ciborium::Value = ciborium::from_reader(to_be_signed.as_slice()).unwrap();
        structure.into_array().unwrap().pop().unwrap().into_bytes().unwrap()
    } else {
        to_be_signed
    };
    certificate.windows(bytes.len()).any(|window| window == bytes)
}

pub fn profile(kind: Kind) -> ProfileName {
    match kind {
        Kind::Phone => "phone",
        Kind::Sensor => "sensor",
        Kind::Gateway => "gateway",
        Kind::Pooled => "pooled",
        Kind::PooledOrMade => "pooled-or-made",
    }
    .parse()
    .unwrap()
}

/// The n-th identity of that kind of product, within the station's ranges.
pub fn identity_of(kind: Kind, n: u32) -> DeviceIdentity {
    let text = match kind {
        Kind::Phone => {
            let first = format!("49015420{n:06}");
            format!("imei:{first}{}", Imei::check_digit(&first).unwrap())
        }
        Kind::Sensor => format!("eui48:{n:012x}"),
        Kind::Gateway => format!("serial:GW-{n}"),
        Kind::Pooled | Kind::PooledOrMade => format!("serial:PL-{n}"),
    };
    text.parse().unwrap()
}
