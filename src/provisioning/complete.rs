//! The way of a device, second half: from the backup to the receipt.

use super::deliver::public_key;
use super::in_flight::InFlightPackage;
use super::{Product, ProvisionError, Provisioner};
use crate::names::{ChipId, SessionId, StationName};
use crate::package::{BackupPackage, ConfirmationClaims, ConfirmationKey, KeyConfirmation, verify_confirmation};
use crate::store::{
    DeviceRecord, InFlightPublication, Issued, Loaded, Publication, PublicationReceipt, PublishError, Session,
    SessionState,
};
use crate::tlog::LogProof;

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
    pub async fn complete(&self, completion: Completion) -> Result<Receipt, ProvisionError> {
        // 1. Find the session; one that is finished has its answer already.
        let rules = self.rules();
        let _chip = self.chips.hold(&self.chip_of(&completion.session).await?).await?;
        let known = self.load(&completion.session).await?;
        let product = rules.permitted_product(&completion.station, known.session())?;
        let issued = match self.find_issued(known).await? {
            Found::Issued(issued) => issued,
            Found::Answered(publication) => return self.receipt(publication).await,
        };
        // 2. Accept the backup and the confirmation. A wrong one changes nothing; the station may try again.
        let on_the_way = self.registry.reserve_slot();
        let record = self.accept(&completion, &issued, product).await?;
        // 3. Publish: on the disk and under a signed checkpoint before it returns. A crash from here on is finished by a repeat or by
        //    the restart.
        let proof_of_publication = self.publish(&record, on_the_way).await?;
        let publication = proof_of_publication.publication();
        self.journal.publish(&proof_of_publication).await?;
        // 4. Erase: uses the proof up; no other value allows it.
        self.journal.erase(proof_of_publication).await?;
        self.pool.erased();
        // 5. The receipt goes back, which anybody can verify who knows the log's key.
        self.receipt(publication).await
    }

    /// Where the record stands, and the proof of it; the same whenever it is asked for.
    async fn receipt(&self, publication: Publication) -> Result<Receipt, ProvisionError> {
        let proof = self.registry.receipt(publication.index).await?;
        let proof = proof.ok_or_else(|| ProvisionError::Internal {
            doing: "making a receipt",
            cause: format!("the public database has no record {}: it was rolled back", publication.index),
        })?;
        Ok(Receipt { publication, proof })
    }

    /// The accepted record: there is no other way from a backup to the public database.
    async fn accept(
        &self,
        completion: &Completion,
        issued: &Issued,
        product: &Product,
    ) -> Result<DeviceRecord, ProvisionError> {
        let package = self.package_again(issued, product).await?;
        match check(completion, issued, product, &package) {
            // From here on the package is needed no more: it is wiped.
            Ok(accepted) => Ok(record(issued, accepted, self.clock.now())),
            Err(error) => {
                self.in_flight.keep(issued.session().id, package);
                Err(error)
            }
        }
    }

    /// The first publication of a session stands: one that came before a crash, with another backup of the same device, is the
    /// answer.
    async fn publish(
        &self,
        record: &DeviceRecord,
        on_the_way: InFlightPublication,
    ) -> Result<PublicationReceipt, ProvisionError> {
        let published = self.registry.publish(record).await;
        drop(on_the_way);
        let refused = match published {
            Ok(receipt) => return Ok(receipt),
            Err(refused) => refused,
        };
        match &refused {
            PublishError::Taken(taken) if taken.session == Some(record.session) => {
                self.registry.receipt_of(&record.chip, record.session).await?.ok_or_else(|| refused.into())
            }
            PublishError::Taken(taken) if taken.what == "public key" => {
                let why = format!("the public key of session {} is in record {} already", record.session, taken.index);
                self.pool.quarantine_all(why).await?;
                Err(refused.into())
            }
            _ => Err(refused.into()),
        }
    }

    /// The session if it may be completed, or its answer if it was.
    async fn find_issued(&self, known: Loaded) -> Result<Found, ProvisionError> {
        match known {
            Loaded::Issued(issued) if !issued.session().has_expired(self.clock.now()) => {
                Ok(Found::Issued(Box::new(issued)))
            }
            Loaded::Issued(expired) => {
                let (chip, id) = (expired.session().chip.clone(), expired.session().id);
                let receipt = self.registry.receipt_of(&chip, id).await?;
                // Published before a crash, not yet journaled: finished as the restart would.
                let receipt = receipt.ok_or_else(|| wrong_state(expired.session(), "; it has expired"))?;
                let publication = receipt.publication();
                self.journal.publish(&receipt).await?;
                self.journal.erase(receipt).await?;
                Ok(Found::Answered(publication))
            }
            Loaded::Published(published) => {
                let (chip, id) = (published.session().chip.clone(), published.session().id);
                let publication = self.finish_erasure(&chip, id).await?;
                Ok(Found::Answered(publication))
            }
            Loaded::Final(session) => match session.state {
                SessionState::Erased { publication } => Ok(Found::Answered(publication)),
                _ => Err(wrong_state(&session, ": its key pair is destroyed; assemble the device again")),
            },
            Loaded::Intent(intent) => {
                Err(wrong_state(intent.session(), ": no certificate was delivered; repeat Assemble first"))
            }
        }
    }

    /// The chip of a session, to hold it; what the session is must be looked at again then.
    pub(super) async fn chip_of(&self, id: &SessionId) -> Result<ChipId, ProvisionError> {
        match self.in_flight.chip_of(id) {
            Some(chip) => Ok(chip),
            None => Ok(self.load(id).await?.session().chip.clone()),
        }
    }

    pub(super) async fn load(&self, id: &SessionId) -> Result<Loaded, ProvisionError> {
        self.journal.load(id).await?.ok_or_else(|| ProvisionError::NoSession(id.to_string()))
    }
}

/// Step 2, without any I/O: the backup has the right form and chip and shows no secret, and the device holds its keys.
fn check(
    completion: &Completion,
    issued: &Issued,
    product: &Product,
    in_hand: &InFlightPackage,
) -> Result<Accepted, ProvisionError> {
    let session = issued.session();
    let InFlightPackage { package, bytes } = in_hand;
    let rules = product.profile.backup();
    let backup = BackupPackage::accept(&completion.backup, &rules, &session.chip, bytes, &package.secrets())?;
    if !product.profile.confirmation_required() && completion.confirmation.is_empty() {
        return Ok(Accepted { backup, _confirmed: Confirmed::Waived });
    }
    let claims = ConfirmationClaims::about(session.id, session.chip.clone(), bytes, &completion.backup);
    let device_key = session.public_key.as_deref().map(public_key).transpose()?;
    let key = match (&device_key, package.symmetric_keys.first()) {
        (Some(pair), _) => ConfirmationKey::Pair(pair),
        (None, Some(symmetric)) => ConfirmationKey::Symmetric(symmetric.key()),
        (None, None) => return Err(ProvisionError::not_accepted("key_confirmation", "the device has no key")),
    };
    let confirmation = verify_confirmation(&completion.confirmation, &claims, &key)?;
    Ok(Accepted { backup, _confirmed: Confirmed::By(confirmation) })
}

/// What a device is told in the end: it is public, and here is the proof.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// Where its record stands.
    pub publication: Publication,
    /// The proof that it is in the log.
    pub proof: LogProof,
}

/// What step 2 lets through, and the only thing that becomes a record.
struct Accepted {
    backup: BackupPackage,
    _confirmed: Confirmed,
}

/// Why the keys may be erased here.
enum Confirmed {
    /// The device proved that it holds them.
    By(#[expect(dead_code, reason = "a proof: that it exists is all")] KeyConfirmation),
    /// The profile asks for no proof.
    Waived,
}

enum Found {
    Issued(Box<Issued>),
    Answered(Publication),
}

pub(super) fn wrong_state(session: &Session, hint: &'static str) -> ProvisionError {
    ProvisionError::WrongState { session: session.id, state: session.state.name(), hint }
}

fn record(issued: &Issued, accepted: Accepted, published: u64) -> DeviceRecord {
    let session = issued.session();
    DeviceRecord {
        chip: session.chip.clone(),
        identity: session.identity.clone(),
        profile: session.profile.clone(),
        certificate: issued.certificate().to_vec(),
        certificate_is_cwt: session.certificate.is_cwt,
        serial: session.certificate.serial.clone(),
        public_key: session.public_key.clone(),
        backup: accepted.backup.into_bytes(),
        master_key_version: session.master_key.as_ref().map_or(0, |master| master.version),
        session: session.id,
        published,
    }
}
