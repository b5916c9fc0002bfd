//! Step 1 of provisioning: checks that the station may place the order, that the order fits its profile, and that chip and
//! identity are free.

use super::session_recovery::Step;
use super::{FieldViolation, ProvisionError, Provisioner, ResolvedOrder};
use crate::certificate::{KeyPairRule, Profile, Sealing};
use crate::keys::PublicKey;
use crate::names::ProfileName;
use crate::package::TransportPublicKey;
use crate::store::{Intent, Issued, Loaded, PublishedRecord, Session, SessionState};

/// The journal's state for an admitted order.
pub(super) enum Admitted {
    /// The device is new: the journal has no session for it.
    New,
    /// The same order was placed before, and its signature is not journaled yet.
    Intended(Intent),
    /// The same order was placed before, and its certificate is issued.
    Known(Issued),
}

impl Provisioner {
    /// Looks up the chip and the identity in the journal and in the public database. The public database is checked too, because
    /// the journal may have been restored from an old copy; the transaction that reserves the session checks the journal again.
    pub(super) async fn admit_device(&self, order: &ResolvedOrder) -> Result<Admitted, ProvisionError> {
        // The stores answer the four lookups concurrently.
        let (known, other_session, chip_record, identity_record) = tokio::try_join!(
            self.journal.load_by_chip(&order.chip),
            self.journal.session_of_identity(&order.identity),
            self.registry.find_by_chip(&order.chip),
            self.registry.find_by_identity(&order.identity),
        )?;
        if let Some(known) = known
            && !is_aborted(known.session())
        {
            // A public record makes the device complete, whatever the journal says. The journal may be an old copy or may not
            // have recorded the publication yet, and would deliver a pair that has been erased since.
            if let Some(PublishedRecord { record, .. }) = &chip_record
                && is_same_order(known.session(), order)
            {
                if record.session == known.session().id {
                    self.resume(&order.chip, record.session).await?;
                }
                return Err(ProvisionError::AlreadyComplete { chip: order.chip.clone(), session: record.session });
            }
            // `None`: the chip's own session has just ended and has released the identity.
            return Ok(self.admit_repeated(order, known).await?.unwrap_or(Admitted::New));
        }
        if let Some(other) = other_session {
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

    /// Handles an order for a chip that has a session. Returns `None` if that session has just ended and the chip is free.
    async fn admit_repeated(&self, order: &ResolvedOrder, known: Loaded) -> Result<Option<Admitted>, ProvisionError> {
        if !is_same_order(known.session(), order) {
            return Err(chip_taken(known.session()));
        }
        if !known.session().state.is_final() {
            self.check_transport_key(known.session(), order)?;
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
            // The session has expired: resume it as the recovery loop does. Its record may be public although the journal does
            // not show it; in that case the pair was delivered and confirmed, and the chip must not get a second one.
            Loaded::Intent(_) | Loaded::Issued(_) => match self.resume(&order.chip, session).await? {
                Step::Erased => Err(complete()),
                Step::Expired | Step::Signed | Step::Waiting => Ok(None),
            },
            Loaded::Published(_) | Loaded::Final(_) => Err(complete()),
        }
    }
}

/// Lists every field of the order that does not fit the profile.
pub(super) fn violations(profile: &Profile, order: &ResolvedOrder) -> Vec<FieldViolation> {
    let mut violations = Vec::new();
    if !profile.allows(&order.identity) {
        let problem = format!("the profile {} does not accept {} identities", order.profile, order.identity.kind());
        violations.push(FieldViolation::new("identity", problem));
    }
    let sealed = order.transport_key.is_some();
    violations.extend(violations_without_identity(profile, &order.profile, order.own_key.as_ref(), sealed));
    violations
}

/// Checks an order whose identity is not known yet.
pub(super) fn violations_without_identity(
    profile: &Profile,
    name: &ProfileName,
    own_key: Option<&PublicKey>,
    sealed: bool,
) -> Vec<FieldViolation> {
    let mut violations = Vec::new();
    let mut violation = |field, problem: String| violations.push(FieldViolation::new(field, problem));
    match (profile.key_pair(), own_key) {
        (KeyPairRule::Csr { .. }, None) => {
            violation("csr", format!("the profile {name} requires a PKCS#10 request from the device"));
        }
        (KeyPairRule::Csr { accepted }, Some(key)) if !accepted.contains(&key.kind()) => {
            violation("csr", format!("the profile {name} does not accept {} keys", key.kind()));
        }
        (KeyPairRule::Generate { .. } | KeyPairRule::Pool { .. } | KeyPairRule::None, Some(_)) => {
            violation(
                "csr",
                format!("the profile {name} does not accept a PKCS#10 request: the SPP generates the key pair"),
            );
        }
        _ => {}
    }
    if profile.sealing() == Sealing::Required && !sealed {
        violation("transport_key", format!("the profile {name} seals its packages: send the chip's transport key"));
    }
    violations
}

impl Provisioner {
    /// Checks that a repeated order names the same transport key, or none. A station that could repeat an order without
    /// sealing, or sealed to its own key, would see the package's secrets.
    fn check_transport_key(&self, session: &Session, order: &ResolvedOrder) -> Result<(), ProvisionError> {
        if session.sealed_to != order.transport_key.as_ref().map(TransportPublicKey::fingerprint) {
            let problem = "the session was ordered with another transport key, or with none; repeat the original order, or abort the \
                session";
            return Err(ProvisionError::not_accepted("transport_key", problem));
        }
        Ok(())
    }
}

const fn is_aborted(session: &Session) -> bool {
    matches!(session.state, SessionState::Aborted { .. })
}

/// The station may differ: another one may take over when the first fails.
fn is_same_order(session: &Session, order: &ResolvedOrder) -> bool {
    let same_key = match &order.own_key {
        Some(key) => session.own_key_pair && session.public_key.as_deref() == Some(key.spki_der()),
        None => !session.own_key_pair,
    };
    session.identity == order.identity && session.profile == order.profile && same_key
}

fn chip_taken(session: &Session) -> ProvisionError {
    let (chip, identity) = (session.chip.clone(), session.identity.clone());
    ProvisionError::ChipTaken { chip, identity, session: session.id }
}
