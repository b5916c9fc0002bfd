//! The journal: durable steps of a session, each handing out the proof that the next one needs.

use std::ops::Range;
use std::sync::Arc;

use super::production::{ProductionCounts, ProductionSlot};
use super::secret::PairToReserve;
use super::session::{Listed, ReserveError, Session, SessionCounts, SessionPlace, SessionState, StateName, StateStore};
use super::{PublicationReceipt, StoreError};
use crate::keys::StoredKey;
use crate::names::{ChipId, DeviceIdentity, SessionId};

/// The state store as the stories see it.
#[derive(Clone)]
pub struct Journal(Arc<dyn StateStore>);

/// Proof that a certificate is about to be signed and that the journal knows it: the one thing that allows the signature.
///
/// It is used up by the signature:
/// ```
/// # use spp::store::{Intent, Signed};
/// fn once(intent: Intent, certificate: Vec<u8>) -> Signed {
///     intent.signed(certificate)
/// }
/// ```
/// Using it twice does not compile, nor does keeping a copy for later:
/// ```compile_fail,E0382
/// # use spp::store::{Intent, Signed};
/// fn twice(intent: Intent, certificate: Vec<u8>) -> [Signed; 2] {
///     [intent.signed(certificate.clone()), intent.signed(certificate)]
/// }
/// ```
/// ```compile_fail,E0599
/// # use spp::store::Intent;
/// fn kept(intent: Intent) -> (Intent, Intent) {
///     (intent.clone(), intent)
/// }
/// ```
/// Nothing makes one but the journal:
/// ```compile_fail,E0423
/// # use spp::store::{Intent, Session};
/// fn made_up(session: Session) -> Intent {
///     Intent(session)
/// }
/// ```
#[derive(Debug)]
pub struct Intent(Session);

/// A signature made for an intent, not yet journaled. It goes to [`Journal::issue`] and nowhere else.
///
/// A signature without an intent cannot become one:
/// ```compile_fail,E0451
/// # use spp::store::{Session, Signed};
/// fn without_intent(session: Session, certificate: Vec<u8>) -> Signed {
///     Signed { session, certificate }
/// }
/// ```
/// and outside this program's own rooms the HSM signs nothing at all:
/// ```compile_fail,E0624
/// # use spp::{hsm::Hsm, keys::SignatureAlgorithm, names::KeyName};
/// async fn anything(hsm: &Hsm, key: &KeyName, bytes: &[u8]) {
///     let _ = hsm.sign(key, SignatureAlgorithm::EcdsaP256Sha256, bytes).await;
/// }
/// ```
#[derive(Debug)]
pub struct Signed {
    session: Session,
    certificate: Vec<u8>,
}

/// A session whose certificate is signed and journaled: it may be delivered, completed or aborted.
#[derive(Debug)]
pub struct Issued {
    session: Session,
    certificate: Vec<u8>,
}

/// A session whose record is public and journaled as such; its key pair waits to be erased.
#[derive(Debug)]
pub struct Published(Session);

/// A session that may still be given up.
#[derive(Debug)]
pub enum Abortable {
    /// Nothing is signed, or no signature was recorded.
    Intent(Intent),
    /// Signed, not published.
    Issued(Issued),
}

impl Intent {
    /// The session, in state Reserved.
    pub const fn session(&self) -> &Session {
        &self.0
    }

    /// The intent is fulfilled: it is used up, so that nothing is signed twice for it.
    pub fn signed(self, certificate: Vec<u8>) -> Signed {
        Signed { session: self.0, certificate }
    }
}

impl Issued {
    /// The session, in state Issued.
    pub const fn session(&self) -> &Session {
        &self.session
    }

    /// The certificate as it is delivered.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }
}

impl Published {
    /// The session, in state Published.
    pub const fn session(&self) -> &Session {
        &self.0
    }
}

impl Journal {
    /// Stands before an engine.
    pub fn new(engine: Arc<dyn StateStore>) -> Self {
        Self(engine)
    }

    /// Step 4, intend. Once this returns, a crash finds the session with its keys and the bytes to be signed.
    pub async fn intend(&self, session: Session, pair: Option<&PairToReserve>) -> Result<Intent, ReserveError> {
        assert_eq!(session.state, SessionState::Reserved);
        self.0.reserve(&session, pair).await?;
        Ok(Intent(session))
    }

    /// Step 6, issue. Once this returns, the certificate may leave: every repeat delivers this one.
    pub async fn issue(&self, signed: Signed) -> Result<Issued, StoreError> {
        let Signed { session, certificate } = signed;
        let to = SessionState::Issued { certificate: certificate.clone() };
        let session = self.0.advance(&session.id, StateName::Reserved, to).await?;
        Ok(Issued { session, certificate })
    }

    /// Notes the publication. The receipt names the session, so it cannot be another one's.
    pub async fn publish(&self, receipt: &PublicationReceipt) -> Result<Published, StoreError> {
        let to = SessionState::Published { publication: receipt.publication() };
        self.0.advance(&receipt.session(), StateName::Issued, to).await.map(Published)
    }

    /// Removes the key pair from the secret store. Consumes the proof that the record is public.
    ///
    /// ```
    /// # use spp::store::{Journal, PublicationReceipt, Session, StoreError};
    /// async fn with_receipt(journal: &Journal, receipt: PublicationReceipt) -> Result<Session, StoreError> {
    ///     journal.erase(receipt).await
    /// }
    /// ```
    /// Only the public database gives that proof:
    /// ```compile_fail,E0451
    /// # use spp::names::SessionId;
    /// # use spp::store::{Journal, Publication, PublicationReceipt, Session, StoreError};
    /// async fn made_up(journal: &Journal, session: SessionId, publication: Publication) -> Result<Session, StoreError> {
    ///     journal.erase(PublicationReceipt { session, publication }).await
    /// }
    /// ```
    /// ```compile_fail,E0308
    /// # use spp::names::SessionId;
    /// # use spp::store::{Journal, Session, StoreError};
    /// async fn without_receipt(journal: &Journal, session: SessionId) -> Result<Session, StoreError> {
    ///     journal.erase(session).await
    /// }
    /// ```
    pub async fn erase(&self, receipt: PublicationReceipt) -> Result<Session, StoreError> {
        let to = SessionState::Erased { publication: receipt.publication() };
        self.0.advance(&receipt.session(), StateName::Published, to).await
    }

    /// Gives a session up and destroys its key pair.
    pub async fn abort(&self, session: Abortable, at: u64, reason: String) -> Result<Session, StoreError> {
        let (id, from) = match session {
            Abortable::Intent(intent) => (intent.0.id, StateName::Reserved),
            Abortable::Issued(issued) => (issued.session.id, StateName::Issued),
        };
        self.0.advance(&id, from, SessionState::Aborted { at, reason }).await
    }

    /// A session by name, taken up in the state the journal has.
    pub async fn load(&self, id: &SessionId) -> Result<Option<Loaded>, StoreError> {
        Ok(self.0.session(id).await?.map(Loaded::of))
    }

    /// The newest session of a chip, taken up in the state the journal has.
    pub async fn load_chip(&self, chip: &ChipId) -> Result<Option<Loaded>, StoreError> {
        Ok(self.0.session_of_chip(chip).await?.map(Loaded::of))
    }

    /// The session that holds an identity, to name it in a refusal.
    pub async fn session_of_identity(&self, identity: &DeviceIdentity) -> Result<Option<Session>, StoreError> {
        self.0.session_of_identity(identity).await
    }

    /// The key pair of a session, while it is in the secret store.
    pub async fn kept_key(&self, session: &SessionId) -> Result<Option<StoredKey>, StoreError> {
        self.0.kept_key(session).await
    }

    /// Whether the journal knows the session at all.
    pub async fn knows(&self, session: &SessionId) -> Result<bool, StoreError> {
        Ok(self.0.session(session).await?.is_some())
    }

    /// All sessions that are not final, oldest first.
    pub async fn unfinished(&self) -> Result<Vec<Loaded>, StoreError> {
        Ok(self.0.unfinished().await?.into_iter().map(Loaded::of).collect())
    }

    /// A session as it is, for people to read.
    pub async fn session(&self, id: &SessionId) -> Result<Option<Session>, StoreError> {
        self.0.session(id).await
    }

    /// See [`StateStore::sessions`].
    pub async fn sessions(
        &self,
        which: Listed,
        after: Option<SessionPlace>,
        limit: usize,
    ) -> Result<Vec<Session>, StoreError> {
        self.0.sessions(which, after, limit).await
    }

    /// See [`StateStore::sessions_of_chip`].
    pub async fn sessions_of_chip(&self, chip: &ChipId, limit: usize) -> Result<Vec<Session>, StoreError> {
        self.0.sessions_of_chip(chip, limit).await
    }

    /// See [`StateStore::production`].
    pub async fn production(
        &self,
        hours: Range<u64>,
        after: Option<&ProductionSlot>,
        limit: usize,
    ) -> Result<Vec<(ProductionSlot, ProductionCounts)>, StoreError> {
        self.0.production(hours, after, limit).await
    }

    /// Sessions by state.
    pub async fn counts(&self) -> Result<SessionCounts, StoreError> {
        self.0.counts().await
    }

    /// Free bytes and the floor.
    pub fn room(&self) -> Result<(u64, u64), StoreError> {
        self.0.room()
    }
}

/// A journaled session, taken up again as the proof that its state is.
#[derive(Debug)]
pub enum Loaded {
    /// Intended, no signature recorded.
    Intent(Intent),
    /// Issued.
    Issued(Issued),
    /// Published, not erased.
    Published(Published),
    /// Erased or aborted.
    Final(Session),
}

impl Loaded {
    /// The session.
    pub const fn session(&self) -> &Session {
        match self {
            Self::Intent(Intent(session))
            | Self::Issued(Issued { session, .. })
            | Self::Published(Published(session))
            | Self::Final(session) => session,
        }
    }

    /// What the journal said of this session. Only the journal calls it, with what the engine gave.
    fn of(session: Session) -> Self {
        match session.state.clone() {
            SessionState::Reserved => Self::Intent(Intent(session)),
            SessionState::Issued { certificate } => Self::Issued(Issued { session, certificate }),
            SessionState::Published { .. } => Self::Published(Published(session)),
            SessionState::Erased { .. } | SessionState::Aborted { .. } => Self::Final(session),
        }
    }
}
