//! Step 1 of provisioning: checks that the station may place the order, that the order fits its profile, and that chip and
//! identity are free; allocates an identity if the order names none.

use spp_format::certificate::IssuedSubject;
use spp_format::keys::PublicKey;
use spp_format::names::{ChipId, DeviceIdentity, ProfileName, SessionId, StationName};
use spp_format::package::TransportPublicKey;
use spp_format::record::{PublishedRecord, UniqueKey};

use super::pair_supplier::KeyOrder;
use super::product::Product;
use super::session_recovery::Step;
use super::{AssembleRequest, Policy, ProvisionError, Provisioner};
use crate::store::{Intent, Issued, Loaded, Session, SessionState};

/// Maximum number of identities that one call skips because the public database has them, or because their subjects are taken. The
/// next call continues after them.
const MAX_SKIPPED: usize = 100;

/// An order that its station may place, that fits its profile, and whose chip and identity are free or already belong to each
/// other. Only [`Provisioner::admit`] makes one.
pub(super) struct AdmittedOrder<'policy> {
    pub(super) station: StationName,
    pub(super) chip: ChipId,
    /// The identity that the request names, that the chip already has, or that was allocated.
    pub(super) identity: DeviceIdentity,
    pub(super) profile: ProfileName,
    pub(super) product: &'policy Product,
    pub(super) own_key: Option<PublicKey>,
    pub(super) transport_key: Option<TransportPublicKey>,
    /// The maximum number of the station's sessions that are not final.
    open_sessions: u64,
    /// Private, so that no other module makes an order.
    _admitted: (),
}

/// The journal's state for an admitted order.
pub(super) enum Progress {
    /// The device is new: no session holds its chip or its identity.
    New,
    /// The same order was placed before, and its signature is not journaled yet.
    Intended(Intent),
    /// The same order was placed before, and its certificate is issued.
    Issued(Issued),
}

/// What the journal and the public database have for a chip.
struct ChipState {
    /// The newest session, unless it is aborted.
    session: Option<Loaded>,
    record: Option<PublishedRecord>,
}

/// What the journal and the public database have for an identity.
struct IdentityState {
    session: Option<Session>,
    record: Option<PublishedRecord>,
}

impl AdmittedOrder<'_> {
    /// The keys that the profile prescribes for this device.
    pub(super) fn keys(&self) -> KeyOrder<'_> {
        let profile = &self.product.profile;
        let derivations = self.product.derivations(&self.identity, profile.master_key());
        KeyOrder { rule: profile.key_pair(), derivations, own_key: self.own_key.as_ref() }
    }
}

impl ChipState {
    fn identity(&self) -> Option<&DeviceIdentity> {
        let of_session = self.session.as_ref().map(|known| &known.session().identity);
        of_session.or_else(|| self.record.as_ref().map(|published| &published.record.identity))
    }
}

impl Provisioner {
    /// Admits an order. A chip that has an identity keeps it in every repeated order. The caller holds the chip's lock.
    ///
    /// The public database is checked as well as the journal, because the journal may have been restored from an old copy; the
    /// transaction that reserves the session checks the journal again.
    pub(super) async fn admit<'policy>(
        &self,
        request: AssembleRequest,
        policy: &'policy Policy,
    ) -> Result<(AdmittedOrder<'policy>, Progress), ProvisionError> {
        let (order, chip, identity) = match request.identity.clone() {
            Some(name) => {
                // Before the lookups: a station that may not order this identity learns nothing about the device.
                let order = permitted(request, name, policy)?;
                // The stores answer the four lookups concurrently.
                let (chip, identity) =
                    tokio::try_join!(self.look_up_chip(&order.chip), self.look_up_identity(&order.identity))?;
                (order, chip, identity)
            }
            None => {
                let chip = self.look_up_chip(&request.chip).await?;
                let (name, identity) = match chip.identity() {
                    Some(name) => (name.clone(), self.look_up_identity(name).await?),
                    None => self.allocate_identity(&request, policy).await?,
                };
                (permitted(request, name, policy)?, chip, identity)
            }
        };
        let progress = self.progress(&order, chip, identity).await?;
        Ok((order, progress))
    }

    async fn look_up_chip(&self, chip: &ChipId) -> Result<ChipState, ProvisionError> {
        let (session, record) = tokio::try_join!(self.journal.load_by_chip(chip), self.registry.find_by_chip(chip))?;
        Ok(ChipState { session: session.filter(|known| !is_aborted(known.session())), record })
    }

    async fn look_up_identity(&self, identity: &DeviceIdentity) -> Result<IdentityState, ProvisionError> {
        let (session, record) =
            tokio::try_join!(self.journal.session_of_identity(identity), self.registry.find_by_identity(identity))?;
        Ok(IdentityState { session, record })
    }

    /// Checks what must be free for a new session besides chip and identity.
    async fn check_new(&self, order: &AdmittedOrder<'_>) -> Result<(), ProvisionError> {
        let AdmittedOrder { station, identity, product, own_key, open_sessions, .. } = order;
        let (subject, ()) = tokio::try_join!(
            self.subject_holder(product, identity),
            self.check_key_and_sessions(station, own_key.as_ref(), *open_sessions)
        )?;
        let taken = |session| Err(ProvisionError::SubjectTaken { identity: identity.clone(), session });
        subject.map_or(Ok(()), taken)
    }

    /// Checks the device's own key, and the number of the station's sessions. Calls in progress at the same time may exceed that
    /// limit by their number, which the listener bounds.
    async fn check_key_and_sessions(
        &self,
        station: &StationName,
        own_key: Option<&PublicKey>,
        limit: u64,
    ) -> Result<(), ProvisionError> {
        // A pair that is generated here is checked by its supplier.
        let key_holder = async {
            match own_key {
                Some(key) => self.public_key_holder(key).await,
                None => Ok(None),
            }
        };
        let open = async { Ok(self.journal.open_sessions(station).await?) };
        let (key_holder, open) = tokio::try_join!(key_holder, open)?;
        if let Some(session) = key_holder {
            return Err(ProvisionError::PublicKeyTaken(session));
        }
        if open >= limit {
            return Err(ProvisionError::TooManyOpen { station: station.clone(), limit });
        }
        Ok(())
    }

    /// The other session whose certificate has the subject that this identity would get.
    async fn subject_holder(
        &self,
        product: &Product,
        identity: &DeviceIdentity,
    ) -> Result<Option<SessionId>, ProvisionError> {
        let subject = IssuedSubject::of_order(&product.profile, product.issuer.certificate(), identity)
            .map_err(ProvisionError::internal("naming the subject of a certificate"))?;
        let Some(subject) = subject else { return Ok(None) };
        let key = UniqueKey::of_subject(&subject);
        let (session, record) = tokio::try_join!(self.journal.session_of_subject(&subject), self.registry.find(&key))?;
        Ok(holder(session, record))
    }

    /// The session whose device has the public key.
    async fn public_key_holder(&self, key: &PublicKey) -> Result<Option<SessionId>, ProvisionError> {
        let spki = key.spki_der();
        let unique = UniqueKey::of_public_key(spki);
        let (session, record) =
            tokio::try_join!(self.journal.session_of_public_key(spki), self.registry.find(&unique))?;
        Ok(holder(session, record))
    }

    async fn allocate_identity(
        &self,
        request: &AssembleRequest,
        policy: &Policy,
    ) -> Result<(DeviceIdentity, IdentityState), ProvisionError> {
        let (product, permitted) = policy.permit_allocation(request)?;
        let AssembleRequest { station, chip, profile, own_key, .. } = request;
        // Before the allocation, which is permanent: an order that is refused must use up no identity.
        self.check_key_and_sessions(station, own_key.as_ref(), policy.open_sessions(station)?).await?;
        let mut taken = None;
        for _ in 0..MAX_SKIPPED {
            let now = self.clock.now();
            let allocated = self.access.allocate(chip, profile, station, permitted.clone(), taken, now).await?;
            // The state store could be an old copy and allocate identities again; and another identity may have the subject.
            let state = self.look_up_identity(&allocated).await?;
            if state.record.is_none() && self.subject_holder(product, &allocated).await?.is_none() {
                return Ok((allocated, state));
            }
            taken = Some(allocated);
        }
        Err(ProvisionError::Identities(MAX_SKIPPED))
    }

    /// Compares the order with what the stores have.
    async fn progress(
        &self,
        order: &AdmittedOrder<'_>,
        chip: ChipState,
        identity: IdentityState,
    ) -> Result<Progress, ProvisionError> {
        if let Some(known) = chip.session {
            // A public record makes the device complete, whatever the journal says. The journal may be an old copy or may not
            // have recorded the publication yet, and would deliver a pair that has been erased since.
            if let Some(PublishedRecord { record, .. }) = &chip.record
                && is_same_order(known.session(), order)
            {
                if record.session == known.session().id {
                    self.resume(&order.chip, record.session).await?;
                }
                return Err(ProvisionError::AlreadyComplete { chip: order.chip.clone(), session: record.session });
            }
            let progress = self.repeated_order(order, known).await?;
            if matches!(progress, Progress::New) {
                self.check_new(order).await?;
            }
            return Ok(progress);
        }
        if let Some(other) = identity.session {
            let (chip, session) = (other.chip, other.id);
            return Err(ProvisionError::IdentityTaken { identity: order.identity.clone(), chip, session });
        }
        if let Some(PublishedRecord { record, .. }) = chip.record {
            let session = record.session;
            return Err(if record.identity == order.identity {
                ProvisionError::AlreadyComplete { chip: record.chip, session }
            } else {
                ProvisionError::ChipTaken { chip: record.chip, identity: record.identity, session }
            });
        }
        if let Some(PublishedRecord { record, .. }) = identity.record {
            let (identity, chip, session) = (record.identity, record.chip, record.session);
            return Err(ProvisionError::IdentityTaken { identity, chip, session });
        }
        self.check_new(order).await?;
        Ok(Progress::New)
    }

    /// Handles an order for a chip that has a session.
    async fn repeated_order(&self, order: &AdmittedOrder<'_>, known: Loaded) -> Result<Progress, ProvisionError> {
        if !is_same_order(known.session(), order) {
            return Err(chip_taken(known.session()));
        }
        if !known.session().state.is_final() {
            check_transport_key(known.session(), order)?;
        }
        let session = known.session().id;
        let complete = || ProvisionError::AlreadyComplete { chip: order.chip.clone(), session };
        match known {
            Loaded::Intent(intent) if !intent.session().has_expired(self.clock.now()) => Ok(Progress::Intended(intent)),
            Loaded::Issued(issued) if !issued.session().has_expired(self.clock.now()) => Ok(Progress::Issued(issued)),
            // The session has expired: resume it as the recovery loop does. Its record may be public although the journal does
            // not show it; in that case the pair was delivered and confirmed, and the chip must not get a second one.
            Loaded::Intent(_) | Loaded::Issued(_) => match self.resume(&order.chip, session).await? {
                Step::Erased => Err(complete()),
                // The session has ended and has released the chip and the identity. If the clock was set back it has not, and the
                // transaction that reserves the new session refuses.
                Step::Expired | Step::Signed | Step::Waiting => Ok(Progress::New),
            },
            Loaded::Published(_) | Loaded::Final(_) => Err(complete()),
        }
    }
}

/// Checks the order against the station's permissions and the profile.
fn permitted(
    request: AssembleRequest,
    identity: DeviceIdentity,
    policy: &Policy,
) -> Result<AdmittedOrder<'_>, ProvisionError> {
    let product = policy.permit_order(&request, &identity)?;
    let open_sessions = policy.open_sessions(&request.station)?;
    let AssembleRequest { station, chip, identity: _, profile, own_key, transport_key } = request;
    Ok(AdmittedOrder {
        station,
        chip,
        identity,
        profile,
        product,
        own_key,
        transport_key,
        open_sessions,
        _admitted: (),
    })
}

/// Checks that a repeated order names the same transport key, or none. A station that could repeat an order without sealing, or
/// sealed to its own key, would see the package's secrets.
fn check_transport_key(session: &Session, order: &AdmittedOrder<'_>) -> Result<(), ProvisionError> {
    if session.sealed_to != order.transport_key.as_ref().map(TransportPublicKey::fingerprint) {
        let problem = "the session was ordered with another transport key, or with none; repeat the original order, or abort the \
            session";
        return Err(ProvisionError::not_accepted("transport_key", problem));
    }
    Ok(())
}

fn holder(session: Option<Session>, record: Option<PublishedRecord>) -> Option<SessionId> {
    session.map(|session| session.id).or_else(|| record.map(|published| published.record.session))
}

const fn is_aborted(session: &Session) -> bool {
    matches!(session.state, SessionState::Aborted { .. })
}

/// The station may differ: another one may take over when the first fails.
fn is_same_order(session: &Session, order: &AdmittedOrder<'_>) -> bool {
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
