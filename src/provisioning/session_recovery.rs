//! What a crash left, and what time ends: the same steps as the stories, taken up where the journal says they stopped.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::{ProvisionError, Provisioner};
use crate::names::{ChipId, SessionId};
use crate::store::{Abortable, Loaded, Publication};

/// How often expired sessions are looked for, and unfinished steps tried again.
const INTERVAL: Duration = Duration::from_secs(30);
/// How often old packages are looked for.
const SWEEP: Duration = Duration::from_secs(5);

/// What one walk through the unfinished sessions did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Certificates signed that had been intended.
    pub signed: u64,
    /// Key pairs erased whose records were public.
    pub erased: u64,
    /// Sessions that expired, their key pairs destroyed.
    pub expired: u64,
    /// Sessions that wait for their station.
    pub waiting: u64,
    /// Steps that failed and are tried again later.
    pub failed: u64,
}

impl Provisioner {
    /// Walks the unfinished sessions once: published → erase; intended → sign the same bytes; issued → wait for the station,
    /// until the session expires. Each is looked at again under its chip's lock, so calls may run at the same time.
    pub async fn restart(&self) -> Result<RecoveryReport, ProvisionError> {
        let mut tidied = RecoveryReport::default();
        for found in self.journal.unfinished().await? {
            let (chip, id) = (found.session().chip.clone(), found.session().id);
            let done = self.recover_session(&chip, id).await;
            match done {
                Ok(Step::Signed) => tidied.signed += 1,
                Ok(Step::Erased) => tidied.erased += 1,
                Ok(Step::Expired) => tidied.expired += 1,
                Ok(Step::Waits) => tidied.waiting += 1,
                Err(error) => {
                    tracing::warn!(session = %id, %chip, %error, "a session could not be taken further; it is tried again");
                    tidied.failed += 1;
                }
            }
        }
        Ok(tidied)
    }

    async fn recover_session(&self, chip: &ChipId, id: SessionId) -> Result<Step, ProvisionError> {
        let _chip = self.chips.hold(chip).await?;
        self.resume(chip, id).await
    }

    /// Takes one session as far as it goes without its station. The caller holds the chip.
    pub(super) async fn resume(&self, chip: &ChipId, id: SessionId) -> Result<Step, ProvisionError> {
        let Some(taken_up) = self.journal.load(&id).await? else { return Ok(Step::Waits) };
        match taken_up {
            Loaded::Final(_) => Ok(Step::Waits),
            Loaded::Published(_) => self.finish_erasure(chip, id).await.map(|_| Step::Erased),
            Loaded::Intent(intent) if intent.session().has_expired(self.clock.now()) => {
                self.journal.abort(Abortable::Intent(intent), self.clock.now(), "expired".to_owned()).await?;
                Ok(Step::Expired)
            }
            // The journal is an old copy: the certificate was signed and published since, and must not be signed again.
            Loaded::Intent(intent) if self.registry.receipt_of(chip, id).await?.is_some() => {
                let reason = "its record is public already: the state store was rolled back".to_owned();
                self.journal.abort(Abortable::Intent(intent), self.clock.now(), reason).await?;
                Ok(Step::Expired)
            }
            // Waiting for the HSM here would keep what needs none waiting, too.
            Loaded::Intent(_) if !self.hsm.status().ready => Ok(Step::Waits),
            Loaded::Intent(intent) => {
                let rules = self.rules();
                let Ok(signer) = rules.signer_of(&intent) else { return Ok(Step::Waits) };
                let signed = signer.sign(&self.hsm, intent).await?;
                self.journal.issue(signed).await?;
                Ok(Step::Signed)
            }
            Loaded::Issued(issued) => match self.registry.receipt_of(chip, id).await? {
                Some(receipt) => {
                    self.journal.publish(&receipt).await?;
                    self.journal.erase(receipt).await?;
                    Ok(Step::Erased)
                }
                // The pair may have been seen by the device or the floor: destroyed, never given to another chip.
                None if issued.session().has_expired(self.clock.now()) => {
                    self.in_flight.take(&id);
                    self.journal.abort(Abortable::Issued(issued), self.clock.now(), "expired".to_owned()).await?;
                    Ok(Step::Expired)
                }
                None => Ok(Step::Waits),
            },
        }
    }

    /// Erases the pair of a session that is journaled as published. The public database must know the record too: if it does
    /// not, it was rolled back, and the pair is kept.
    pub(super) async fn finish_erasure(&self, chip: &ChipId, id: SessionId) -> Result<Publication, ProvisionError> {
        let receipt = self.registry.receipt_of(chip, id).await?.ok_or_else(|| ProvisionError::Internal {
            doing: "erasing a published key pair",
            cause: format!("the public database has no record of session {id}: it was rolled back; the pair is kept"),
        })?;
        let publication = receipt.publication();
        self.journal.erase(receipt).await?;
        Ok(publication)
    }
}

/// How far a session was taken.
pub(super) enum Step {
    /// Its certificate is signed.
    Signed,
    /// Its record was public: its pair is erased.
    Erased,
    /// Its time was over: its pair is destroyed, its chip and identity are free.
    Expired,
    /// It needs its station, or nothing.
    Waits,
}

/// Walks now and again, and wipes packages that nobody came back for, until the provisioner is gone.
pub async fn recovery_loop(provisioner: &Arc<Provisioner>) {
    tokio::join!(keep_sessions_tidy(Arc::downgrade(provisioner)), keep_shelf_tidy(Arc::downgrade(provisioner)));
}

async fn keep_shelf_tidy(provisioner: Weak<Provisioner>) {
    while let Some(provisioner) = provisioner.upgrade() {
        provisioner.in_flight.sweep();
        drop(provisioner);
        tokio::time::sleep(SWEEP).await;
    }
}

async fn keep_sessions_tidy(weak: Weak<Provisioner>) {
    loop {
        let Some(provisioner) = weak.upgrade() else { return };
        let hsm_was_ready = provisioner.hsm.status().ready;
        match provisioner.restart().await {
            Ok(tidied) if tidied.signed + tidied.erased + tidied.expired + tidied.failed > 0 => {
                tracing::info!(?tidied, "unfinished sessions were taken further");
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "the journal could not be walked; it is tried again"),
        }
        let away = (!hsm_was_ready).then(|| provisioner.hsm.clone());
        drop(provisioner);
        // The steps that need the HSM were left out; they are taken as soon as it is ready.
        let came_back = match away {
            Some(hsm) => hsm.ready(INTERVAL).await.is_ok(),
            None => false,
        };
        if !came_back {
            tokio::time::sleep(INTERVAL).await;
        }
    }
}
