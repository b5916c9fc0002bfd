//! Resumes sessions that a crash interrupted, and ends expired ones. It takes the same steps as the workflows, from the journaled
//! state.

use std::sync::{Arc, Weak};
use std::time::Duration;

use spp_format::names::{ChipId, SessionId};

use super::{ProvisionError, Provisioner};
use crate::store::{Abortable, Loaded};

/// Interval between two passes over the unfinished sessions.
const INTERVAL: Duration = Duration::from_secs(30);
/// Interval between two removals of expired packages.
const SWEEP: Duration = Duration::from_secs(5);

/// The result of one pass over the unfinished sessions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Intended certificates that were signed.
    pub signed: u64,
    /// Key pairs that were erased because their records were public.
    pub erased: u64,
    /// Sessions that expired; their key pairs were destroyed.
    pub expired: u64,
    /// Sessions that wait for their station.
    pub waiting: u64,
    /// Steps that failed and will be retried.
    pub failed: u64,
}

impl Provisioner {
    /// Passes once over the unfinished sessions: published → erase; intended → sign the same bytes; issued → wait for the station
    /// until the session expires. Each session is read again under its chip's lock, so calls may run concurrently.
    pub async fn resume_sessions(&self) -> Result<RecoveryReport, ProvisionError> {
        let mut report = RecoveryReport::default();
        for found in self.journal.unfinished().await? {
            let (chip, id) = (found.session().chip.clone(), found.session().id);
            match self.recover_session(&chip, id).await {
                Ok(Step::Signed) => report.signed += 1,
                Ok(Step::Erased) => report.erased += 1,
                Ok(Step::Expired) => report.expired += 1,
                Ok(Step::Waiting) => report.waiting += 1,
                Err(error) => {
                    tracing::warn!(session = %id, %chip, %error, "session not resumed, retrying later");
                    report.failed += 1;
                }
            }
        }
        Ok(report)
    }

    async fn recover_session(&self, chip: &ChipId, id: SessionId) -> Result<Step, ProvisionError> {
        let _chip = self.chip_locks.lock(chip).await?;
        self.resume(chip, id).await
    }

    /// Advances one session as far as possible without its station. The caller holds the chip's lock.
    pub(super) async fn resume(&self, chip: &ChipId, id: SessionId) -> Result<Step, ProvisionError> {
        let Some(loaded) = self.journal.load(&id).await? else { return Ok(Step::Waiting) };
        match loaded {
            Loaded::Final(_) => Ok(Step::Waiting),
            Loaded::Published(_) => self.finish_erasure(chip, id).await.map(|_| Step::Erased),
            Loaded::Intent(intent) if intent.session().has_expired(self.clock.now()) => {
                self.abort_session(Abortable::Intent(intent), "expired".to_owned()).await?;
                Ok(Step::Expired)
            }
            // The journal is an old copy: the certificate was signed and published later, and must not be signed again.
            Loaded::Intent(intent) if self.registry.find_receipt(chip, id).await?.is_some() => {
                let reason = "its record is already public: the state store was rolled back".to_owned();
                self.abort_session(Abortable::Intent(intent), reason).await?;
                Ok(Step::Expired)
            }
            // Do not wait for the HSM here: that would delay sessions that need no HSM.
            Loaded::Intent(_) if !self.hsm.status().ready => Ok(Step::Waiting),
            Loaded::Intent(intent) => {
                let policy = self.policy();
                let Ok(signer) = policy.signer_of(&intent) else { return Ok(Step::Waiting) };
                let signed = signer.sign(&self.hsm, intent).await?;
                self.journal.issue(signed).await?;
                Ok(Step::Signed)
            }
            Loaded::Issued(issued) => match self.registry.find_receipt(chip, id).await? {
                Some(receipt) => {
                    self.publish_and_erase(receipt).await?;
                    Ok(Step::Erased)
                }
                None if issued.session().has_expired(self.clock.now()) => {
                    self.abort_session(Abortable::Issued(issued), "expired".to_owned()).await?;
                    Ok(Step::Expired)
                }
                None => Ok(Step::Waiting),
            },
        }
    }
}

/// The progress of one session.
pub(super) enum Step {
    /// Its certificate was signed.
    Signed,
    /// Its record was public; its pair was erased.
    Erased,
    /// It expired: its pair was destroyed, its chip and identity are free.
    Expired,
    /// It waits for its station or the HSM, or needs no further step.
    Waiting,
}

/// Resumes sessions and evicts cached packages periodically, until the provisioner is dropped.
pub async fn recovery_loop(provisioner: &Arc<Provisioner>) {
    tokio::join!(resume_sessions_loop(Arc::downgrade(provisioner)), sweep_packages_loop(Arc::downgrade(provisioner)));
}

async fn sweep_packages_loop(provisioner: Weak<Provisioner>) {
    while let Some(provisioner) = provisioner.upgrade() {
        provisioner.in_flight.sweep();
        drop(provisioner);
        tokio::time::sleep(SWEEP).await;
    }
}

async fn resume_sessions_loop(weak: Weak<Provisioner>) {
    loop {
        let Some(provisioner) = weak.upgrade() else { return };
        let hsm_was_ready = provisioner.hsm.status().ready;
        match provisioner.resume_sessions().await {
            Ok(report) if report.signed + report.erased + report.expired + report.failed > 0 => {
                tracing::info!(?report, "unfinished sessions resumed");
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "unfinished sessions not read, retrying later"),
        }
        let unready_hsm = (!hsm_was_ready).then(|| provisioner.hsm.clone());
        drop(provisioner);
        // Steps that need the HSM were skipped; run them as soon as the HSM is ready.
        let became_ready = match unready_hsm {
            Some(hsm) => hsm.ready(INTERVAL).await.is_ok(),
            None => false,
        };
        if !became_ready {
            tokio::time::sleep(INTERVAL).await;
        }
    }
}
