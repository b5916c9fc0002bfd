//! The way of a device, second half: from the backup to the receipt.

use super::deliver::{package, public_key};
use super::{Product, ProvisionError, Provisioner, now};
use crate::names::{SessionId, StationName};
use crate::package::{BackupPackage, ConfirmationClaims, ConfirmationKey, verify_confirmation};
use crate::store::{DeviceRecord, Issued, Publication, Session, SessionState, TakenUp};

/// What the station brings back from the device.
pub struct Completion {
    /// Who brings it.
    pub station: StationName,
    /// For which session.
    pub session: SessionId,
    /// The package under the chip's key.
    pub backup: Vec<u8>,
    /// The proof that the device holds its keys; empty where the profile waives it.
    pub confirmation: Vec<u8>,
}

impl Provisioner {
    /// Publishes a device and erases its key pair here. Repeating it gives the same receipt again.
    pub async fn complete(&self, completion: Completion) -> Result<Publication, ProvisionError> {
        // 1. Find the session; one that is finished has its answer already.
        let known = self.session(&completion.session).await?;
        let _chip = self.chips.hold(&known.chip).await?;
        let product = self.permitted_product(&completion.station, &known)?;
        let issued = match self.find_issued(&completion.session).await? {
            Found::Issued(issued) => issued,
            Found::Answered(publication) => return Ok(publication),
        };
        // 2. Accept the backup and the confirmation. A wrong one changes nothing; the station may try again.
        let record = self.accept(&completion, &issued, product).await?;
        // 3. Publish: on the disk before it returns. A crash from here on is finished by a repeat or by the restart.
        let receipt = self.registry.publish(&record).await?;
        let publication = receipt.publication();
        self.journal.publish(&receipt).await?;
        // 4. Erase: uses the receipt up; no other value allows it.
        self.journal.erase(receipt).await?;
        // 5. The receipt goes back.
        Ok(publication)
    }

    /// The accepted record: there is no other way from a backup to the public database.
    async fn accept(
        &self,
        completion: &Completion,
        issued: &Issued,
        product: &Product,
    ) -> Result<DeviceRecord, ProvisionError> {
        let session = issued.session();
        let package = package(issued, product, self.held_keys(session, product).await?)?;
        let octets = package.encode()?;
        let rules = product.profile.backup();
        let backup = BackupPackage::accept(&completion.backup, &rules, &session.chip, &octets, &package.secrets())?;
        if product.profile.confirmation_required() || !completion.confirmation.is_empty() {
            let claims = ConfirmationClaims::about(session.id, session.chip.clone(), &octets, &completion.backup);
            let device_key = session.public_key.as_deref().map(public_key).transpose()?;
            let key = match (&device_key, package.symmetric_keys.first()) {
                (Some(pair), _) => ConfirmationKey::Pair(pair),
                (None, Some(symmetric)) => ConfirmationKey::Symmetric(symmetric.key()),
                (None, None) => return Err(ProvisionError::not_accepted("key_confirmation", "the device has no key")),
            };
            verify_confirmation(&completion.confirmation, &claims, &key)?;
        }
        Ok(record(issued, backup.into_bytes()))
    }

    /// The session if it may be completed, or its answer if it was.
    async fn find_issued(&self, id: &SessionId) -> Result<Found, ProvisionError> {
        let taken_up = self.journal.take_up(id).await?.ok_or_else(|| ProvisionError::NoSession(id.to_string()))?;
        match taken_up {
            TakenUp::Issued(issued) => match self.registry.receipt_of(&issued.session().chip, *id).await? {
                // Published before a crash, not yet journaled: finished as the restart would.
                Some(receipt) => {
                    let publication = receipt.publication();
                    self.journal.publish(&receipt).await?;
                    self.journal.erase(receipt).await?;
                    Ok(Found::Answered(publication))
                }
                None if issued.session().has_expired(now()) => Err(wrong_state(issued.session(), "; it has expired")),
                None => Ok(Found::Issued(Box::new(issued))),
            },
            TakenUp::Published(published) => {
                let chip = published.session().chip.clone();
                let publication = self.finish_erasure(&chip, *id).await?;
                Ok(Found::Answered(publication))
            }
            TakenUp::Final(session) => match session.state {
                SessionState::Erased { publication } => Ok(Found::Answered(publication)),
                _ => Err(wrong_state(&session, ": its key pair is destroyed; assemble the device again")),
            },
            TakenUp::Intent(intent) => {
                Err(wrong_state(intent.session(), ": no certificate was delivered; repeat Assemble first"))
            }
        }
    }

    /// The session's product, if the station may work on it.
    pub(super) fn permitted_product(
        &self,
        station: &StationName,
        session: &Session,
    ) -> Result<&Product, ProvisionError> {
        self.stations.permit(station, &session.profile, &session.identity)?;
        self.products.get(&session.profile).ok_or_else(|| {
            let problem = format!("the profile {} is no longer configured", session.profile);
            ProvisionError::not_accepted("session_id", problem)
        })
    }

    pub(super) async fn session(&self, id: &SessionId) -> Result<Session, ProvisionError> {
        let taken_up = self.journal.take_up(id).await?;
        taken_up.map(|known| known.session().clone()).ok_or_else(|| ProvisionError::NoSession(id.to_string()))
    }
}

enum Found {
    Issued(Box<Issued>),
    Answered(Publication),
}

pub(super) fn wrong_state(session: &Session, hint: &'static str) -> ProvisionError {
    ProvisionError::WrongState { session: session.id, state: session.state.name(), hint }
}

fn record(issued: &Issued, backup: Vec<u8>) -> DeviceRecord {
    let session = issued.session();
    DeviceRecord {
        chip: session.chip.clone(),
        identity: session.identity.clone(),
        profile: session.profile.clone(),
        certificate: issued.certificate().to_vec(),
        certificate_is_cwt: session.certificate.is_cwt,
        serial: session.certificate.serial.clone(),
        public_key: session.public_key.clone(),
        backup,
        master_key_version: session.master_key.as_ref().map_or(0, |master| master.version),
        session: session.id,
        published: now(),
    }
}
