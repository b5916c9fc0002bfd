//! Step 1 of the way: may the caller, does the order fit its profile, are chip and identity free.

use super::session_recovery::Step;
use super::{FieldViolation, Order, ProvisionError, Provisioner};
use crate::certificate::{KeyPairRule, Profile, Sealing};
use crate::keys::PublicKey;
use crate::names::ProfileName;
use crate::package::TransportPublicKey;
use crate::store::{Intent, Issued, Loaded, PublishedRecord, Session, SessionState};

/// What the journal knows of an admitted order.
pub(super) enum Admitted {
    /// Nothing: the device is new.
    New,
    /// The same order came before and stopped before its signature was journaled.
    Intended(Intent),
    /// The same order came before.
    Known(Issued),
}

impl Provisioner {
    /// Looks for the chip and the identity in the journal and in the public database. The database is asked too, since the
    /// journal could be an old copy; the transaction that reserves checks the journal once more.
    pub(super) async fn admit_device(&self, order: &Order) -> Result<Admitted, ProvisionError> {
        // All four at once: the stores answer them together.
        let (known, identity_session, chip_record, identity_record) = tokio::try_join!(
            self.journal.load_chip(&order.chip),
            self.journal.session_of_identity(&order.identity),
            self.registry.find_by_chip(&order.chip),
            self.registry.find_by_identity(&order.identity),
        )?;
        if let Some(known) = known
            && !is_aborted(known.session())
        {
            // A public record ends the way, whatever the journal says: it may be an old copy, or not have learned of it yet, and
            // would give out a pair again that was erased since.
            if let Some(PublishedRecord { record, .. }) = &chip_record
                && is_same_order(known.session(), order)
            {
                if record.session == known.session().id {
                    self.resume(&order.chip, record.session).await?;
                }
                return Err(ProvisionError::AlreadyComplete { chip: order.chip.clone(), session: record.session });
            }
            // None: the chip's own session has just ended, and with it what held the identity.
            return Ok(self.admit_again(order, known).await?.unwrap_or(Admitted::New));
        }
        if let Some(other) = identity_session {
            let (chip, session) = (other.chip, other.id);
            return Err(ProvisionError::IdentityTaken { identity: order.identity.clone(), chip, session });
        }
        if let Some(PublishedRecord { record, .. }) = chip_record {
            let session = record.session;
            return Err(if record.identity == order.identity {
                ProvisionError::AlreadyComplete { chip: record.chip, session }
            } else {
                ProvisionError::ChipTaken { chip: record.chip, identity: record.identity, session }
            });
        }
        if let Some(PublishedRecord { record, .. }) = identity_record {
            let (identity, chip, session) = (record.identity, record.chip, record.session);
            return Err(ProvisionError::IdentityTaken { identity, chip, session });
        }
        Ok(Admitted::New)
    }

    /// An order for a chip that has a session; none if that session has just ended and the chip is free again.
    async fn admit_again(&self, order: &Order, known: Loaded) -> Result<Option<Admitted>, ProvisionError> {
        if !is_same_order(known.session(), order) {
            return Err(taken_by(known.session()));
        }
        if !known.session().state.is_final() {
            self.is_same_package(known.session(), order)?;
        }
        let session = known.session().id;
        let complete = || ProvisionError::AlreadyComplete { chip: order.chip.clone(), session };
        match known {
            Loaded::Intent(intent) if !intent.session().has_expired(self.clock.now()) => {
                Ok(Some(Admitted::Intended(intent)))
            }
            Loaded::Issued(issued) if !issued.session().has_expired(self.clock.now()) => {
                Ok(Some(Admitted::Known(issued)))
            }
            // Ended as the restart ends it: its record may be public though the journal does not know, and then its pair was
            // delivered and confirmed; a second one for the chip must not be.
            Loaded::Intent(_) | Loaded::Issued(_) => match self.resume(&order.chip, session).await? {
                Step::Erased => Err(complete()),
                Step::Expired | Step::Signed | Step::Waits => Ok(None),
            },
            Loaded::Published(_) | Loaded::Final(_) => Err(complete()),
        }
    }
}

/// Everything in the order that does not fit its profile, told at once.
pub(super) fn misfits(profile: &Profile, order: &Order) -> Vec<FieldViolation> {
    let mut misfits = Vec::new();
    if !profile.allows(&order.identity) {
        let problem = format!("the profile {} does not take {} identities", order.profile, order.identity.kind());
        misfits.push(FieldViolation::new("identity", problem));
    }
    let sealed = order.transport_key.is_some();
    misfits.extend(misfits_beside_identity(profile, &order.profile, order.own_key.as_ref(), sealed));
    misfits
}

/// The same of an order whose identity is not known yet.
pub(super) fn misfits_beside_identity(
    profile: &Profile,
    name: &ProfileName,
    own_key: Option<&PublicKey>,
    sealed: bool,
) -> Vec<FieldViolation> {
    let mut misfits = Vec::new();
    let mut misfit = |field, problem: String| misfits.push(FieldViolation::new(field, problem));
    match (profile.key_pair(), own_key) {
        (KeyPairRule::Csr { .. }, None) => {
            misfit("csr", format!("the profile {name} needs a PKCS#10 request by the device"));
        }
        (KeyPairRule::Csr { accepted }, Some(key)) if !accepted.contains(&key.kind()) => {
            misfit("csr", format!("the profile {name} does not take {} keys", key.kind()));
        }
        (KeyPairRule::Generate { .. } | KeyPairRule::Pool { .. } | KeyPairRule::None, Some(_)) => {
            misfit("csr", format!("the profile {name} does not take a request: the pair is made here"));
        }
        _ => {}
    }
    if profile.sealing() == Sealing::Required && !sealed {
        misfit("transport_key", format!("the profile {name} seals its packages: the chip's transport key is needed"));
    }
    misfits
}

impl Provisioner {
    /// The same order must come out as the same package: sealed to the same key, of the same parts. A station that could have a
    /// sealed package opened, or sealed to a key of its own, by asking again would see its secrets.
    fn is_same_package(&self, session: &Session, order: &Order) -> Result<(), ProvisionError> {
        if session.sealed_to != order.transport_key.as_ref().map(TransportPublicKey::fingerprint) {
            let problem = "the session's package goes to another transport key, or to none; repeat the order as it was, or abort \
                the session";
            return Err(ProvisionError::not_accepted("transport_key", problem));
        }
        Ok(())
    }
}

const fn is_aborted(session: &Session) -> bool {
    matches!(session.state, SessionState::Aborted { .. })
}

/// The station may differ: another one may take over when the first breaks.
fn is_same_order(session: &Session, order: &Order) -> bool {
    let same_key = match &order.own_key {
        Some(key) => session.own_key_pair && session.public_key.as_deref() == Some(key.spki_der()),
        None => !session.own_key_pair,
    };
    session.identity == order.identity && session.profile == order.profile && same_key
}

fn taken_by(session: &Session) -> ProvisionError {
    let (chip, identity) = (session.chip.clone(), session.identity.clone());
    ProvisionError::ChipTaken { chip, identity, session: session.id }
}
