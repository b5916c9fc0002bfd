//! Second half of provisioning: from the backup package to the receipt.

use spp_format::names::{SessionId, StationName};
use spp_format::package::{BackupPackage, ConfirmationClaims, ConfirmationKey, KeyConfirmation, verify_confirmation};
use spp_format::record::{DeviceRecord, Publication, UniquenessConflict};
use spp_format::tlog::LogProof;

use super::deliver::public_key;
use super::in_flight::InFlightPackage;
use super::product::Product;
use super::{ProvisionError, Provisioner, wrong_state};
use crate::store::{InFlightPublication, Issued, Loaded, PublicationReceipt, PublishError, SessionState};

/// The station's Complete request for a device.
pub struct Completion {
    /// The calling station.
    pub station: StationName,
    /// The session to complete.
    pub session: SessionId,
    /// The backup package: the data package encrypted by the device under its chip key.
    pub backup: Vec<u8>,
    /// The key confirmation: proof that the device holds its keys. Empty where the profile waives it.
    pub confirmation: Vec<u8>,
}

impl Provisioner {
    /// Publishes a device and erases its key pair from the SPP. A repeated call returns the same receipt.
    pub async fn complete(&self, completion: Completion) -> Result<Receipt, ProvisionError> {
        // 1. Find the session. A finished session already has its receipt.
        let policy = self.policy();
        let _chip = self.chip_locks.lock(&self.chip_of(&completion.session).await?).await?;
        let known = self.load(&completion.session).await?;
        let product = policy.permitted_product(&completion.station, known.session())?;
        let issued = match self.find_issued(known).await? {
            CompletionState::Issued(issued) => issued,
            CompletionState::Completed(publication) => return self.receipt(publication).await,
        };
        // 2. Verify the backup and the confirmation. A refusal changes nothing; the station may try again.
        let slot = self.registry.reserve_slot();
        let record = self.accept(&completion, &issued, product).await?;
        // 3. Publish: the record is durable and under a signed checkpoint before the call returns. After a crash from here on, a
        // repeated call or the recovery loop finishes the session.
        let published = self.publish(&record, issued.session().own_key_pair, slot).await?;
        // 4. Erase: consumes the publication receipt; no other value permits an erasure.
        let publication = self.publish_and_erase(published).await?;
        // 5. Return the receipt, which anyone who knows the log's key can verify.
        self.receipt(publication).await
    }

    /// The receipt of a publication. Every call returns the same one.
    async fn receipt(&self, publication: Publication) -> Result<Receipt, ProvisionError> {
        let proof = self.registry.receipt(publication.index).await?;
        let proof = proof.ok_or_else(|| ProvisionError::Internal {
            doing: "making a receipt",
            cause: format!(
                "record {} is not in the public database: the public database was rolled back",
                publication.index
            ),
        })?;
        Ok(Receipt { publication, proof })
    }

    /// Verifies a backup and makes the record of it. No other function makes a record from a backup.
    async fn accept(
        &self,
        completion: &Completion,
        issued: &Issued,
        product: &Product,
    ) -> Result<DeviceRecord, ProvisionError> {
        let package = self.take_or_rebuild_package(issued, product).await?;
        match check(completion, issued, product, &package) {
            // The package is no longer needed: drop and wipe it.
            Ok(accepted) => Ok(record(issued, accepted, self.clock.now())),
            Err(error) => {
                self.in_flight.insert(issued.session().id, package);
                Err(error)
            }
        }
    }

    /// Publishes a record. The first publication of a session is final: if a record of the session was published before a crash,
    /// with another backup of the same device, its receipt is returned.
    async fn publish(
        &self,
        record: &DeviceRecord,
        own_key_pair: bool,
        slot: InFlightPublication,
    ) -> Result<PublicationReceipt, ProvisionError> {
        let published = self.registry.publish(record).await;
        drop(slot);
        let refused = match published {
            Ok(receipt) => return Ok(receipt),
            Err(refused) => refused,
        };
        match &refused {
            PublishError::Conflict(taken) if taken.session == Some(record.session) => {
                self.registry.find_receipt(&record.chip, record.session).await?.ok_or_else(|| refused.into())
            }
            PublishError::Conflict(UniquenessConflict {
                field: "certificate subject", session: Some(holder), ..
            }) => Err(ProvisionError::SubjectTaken { identity: record.identity.clone(), session: *holder }),
            // A device chose the key, this one or the other one, so the conflict says nothing about the state store.
            PublishError::Conflict(UniquenessConflict { field: "public key", session: Some(holder), .. })
                if own_key_pair || self.journal.session(holder).await?.is_some_and(|other| other.own_key_pair) =>
            {
                Err(ProvisionError::PublicKeyTaken(*holder))
            }
            PublishError::Conflict(taken) if taken.field == "public key" => {
                let why = format!("the public key of session {} is already in record {}", record.session, taken.index);
                self.pool.quarantine_all(why).await?;
                Err(refused.into())
            }
            _ => Err(refused.into()),
        }
    }

    /// Returns the session if it can be completed, or its publication if it already is.
    async fn find_issued(&self, known: Loaded) -> Result<CompletionState, ProvisionError> {
        match known {
            Loaded::Issued(issued) if !issued.session().has_expired(self.clock.now()) => {
                Ok(CompletionState::Issued(Box::new(issued)))
            }
            Loaded::Issued(expired) => {
                let (chip, id) = (expired.session().chip.clone(), expired.session().id);
                let receipt = self.registry.find_receipt(&chip, id).await?;
                // Published before a crash, not yet journaled: finish it as the recovery loop does.
                let receipt = receipt.ok_or_else(|| wrong_state(expired.session(), "; it has expired"))?;
                Ok(CompletionState::Completed(self.publish_and_erase(receipt).await?))
            }
            Loaded::Published(published) => {
                let (chip, id) = (published.session().chip.clone(), published.session().id);
                Ok(CompletionState::Completed(self.finish_erasure(&chip, id).await?))
            }
            Loaded::Final(session) => match session.state {
                SessionState::Erased { publication } => Ok(CompletionState::Completed(publication)),
                _ => Err(wrong_state(&session, ": its key pair is destroyed; repeat Assemble")),
            },
            Loaded::Intent(intent) => {
                Err(wrong_state(intent.session(), ": no certificate was delivered; repeat Assemble first"))
            }
        }
    }
}

/// Step 2, without I/O: the backup has the right form and chip and contains no plaintext secret, and the device holds its keys.
fn check(
    completion: &Completion,
    issued: &Issued,
    product: &Product,
    in_flight: &InFlightPackage,
) -> Result<Accepted, ProvisionError> {
    let session = issued.session();
    let InFlightPackage { package, bytes } = in_flight;
    let backup_rules = product.profile.backup();
    let backup = BackupPackage::accept(&completion.backup, &backup_rules, &session.chip, bytes, &package.secrets())?;
    if !product.profile.confirmation_required() && completion.confirmation.is_empty() {
        return Ok(Accepted { backup, _confirmed: Confirmed::Waived });
    }
    let claims = ConfirmationClaims::new(session.id, session.chip.clone(), bytes, &completion.backup);
    let device_key = session.public_key.as_deref().map(public_key).transpose()?;
    let key = match (&device_key, package.symmetric_keys.first()) {
        (Some(pair), _) => ConfirmationKey::Pair(pair),
        (None, Some(symmetric)) => ConfirmationKey::Symmetric(symmetric.key()),
        (None, None) => return Err(ProvisionError::not_accepted("key_confirmation", "the device has no key")),
    };
    let confirmation = verify_confirmation(&completion.confirmation, &claims, &key)?;
    Ok(Accepted { backup, _confirmed: Confirmed::By(confirmation) })
}

/// The answer to Complete: the position of the public record and its inclusion proof.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The position of the record in the log.
    pub publication: Publication,
    /// The inclusion proof.
    pub proof: LogProof,
}

/// The verified input of step 2. Only this type becomes a record.
struct Accepted {
    backup: BackupPackage,
    _confirmed: Confirmed,
}

/// The reason why the SPP may erase the keys.
enum Confirmed {
    /// The device proved that it holds the keys.
    By(#[expect(dead_code, reason = "a proof: that it exists is all")] KeyConfirmation),
    /// The profile does not require a confirmation.
    Waived,
}

enum CompletionState {
    Issued(Box<Issued>),
    Completed(Publication),
}

fn record(issued: &Issued, accepted: Accepted, published: u64) -> DeviceRecord {
    let session = issued.session();
    DeviceRecord {
        chip: session.chip.clone(),
        identity: session.identity.clone(),
        profile: session.profile.clone(),
        certificate: issued.certificate().to_vec(),
        certificate_is_cwt: session.certificate.is_cwt(),
        serial: session.certificate.serial().to_vec(),
        public_key: session.public_key.clone(),
        backup: accepted.backup.into_bytes(),
        master_key_version: session.master_key.as_ref().map_or(0, |master| master.version),
        session: session.id,
        published,
    }
}
