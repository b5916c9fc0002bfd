//! The session journal. Each durable step returns the proof that the next step requires.

use std::ops::Deref;
use std::sync::Arc;

use spp_format::names::{ChipId, SessionId};

use super::secret::PairToReserve;
use super::session::{Session, SessionState};
use super::state_store::{ReserveError, SessionReader, StateStore};
use super::{PublicationReceipt, StoreError};
use crate::state_name::StateName;

/// The state store as the request flows use it: steps return proofs. Reads are those of [`SessionReader`]; a session that is read
/// so is no proof of anything.
#[derive(Clone)]
pub struct Journal(Arc<dyn StateStore>);

/// Proof that the journal has recorded the intent to sign a certificate. Signing requires it.
///
/// The signature consumes it:
/// ```
/// # use spp::store::{Intent, Signed};
/// fn once(intent: Intent, certificate: Vec<u8>) -> Signed {
///     intent.into_signed(certificate)
/// }
/// ```
/// Using it twice does not compile, nor does copying it:
/// ```compile_fail,E0382
/// # use spp::store::{Intent, Signed};
/// fn twice(intent: Intent, certificate: Vec<u8>) -> [Signed; 2] {
///     [intent.into_signed(certificate.clone()), intent.into_signed(certificate)]
/// }
/// ```
/// ```compile_fail,E0599
/// # use spp::store::Intent;
/// fn copied(intent: Intent) -> (Intent, Intent) {
///     (intent.clone(), intent)
/// }
/// ```
/// Only the journal creates one:
/// ```compile_fail,E0423
/// # use spp::store::{Intent, Session};
/// fn forged(session: Session) -> Intent {
///     Intent(session)
/// }
/// ```
#[derive(Debug)]
pub struct Intent(Session);

/// A signature made for an intent, not yet journaled. Only [`Journal::issue`] accepts it.
///
/// It cannot be created without an intent:
/// ```compile_fail,E0451
/// # use spp::store::{Session, Signed};
/// fn without_intent(session: Session, certificate: Vec<u8>) -> Signed {
///     Signed { session, certificate }
/// }
/// ```
/// and code outside the module `hsm` cannot sign bytes of its choice:
/// ```compile_fail,E0624
/// # use spp::hsm::Hsm;
/// # use spp_format::keys::SignatureAlgorithm;
/// # use spp_format::names::KeyName;
/// async fn anything(hsm: &Hsm, key: &KeyName, bytes: &[u8]) {
///     let _ = hsm.sign(key, SignatureAlgorithm::EcdsaP256Sha256, bytes).await;
/// }
/// ```
#[derive(Debug)]
pub struct Signed {
    session: Session,
    certificate: Vec<u8>,
}

/// A session whose certificate is signed and journaled. It may be delivered, completed or aborted.
#[derive(Debug)]
pub struct Issued {
    session: Session,
    certificate: Vec<u8>,
}

/// A session whose publication is journaled. Its key pair can be erased.
#[derive(Debug)]
pub struct Published(Session);

/// A session that can still be aborted.
#[derive(Debug)]
pub enum Abortable {
    /// No signature is recorded.
    Intent(Intent),
    /// Signed but not published.
    Issued(Issued),
}

impl Abortable {
    /// The session.
    pub const fn session(&self) -> &Session {
        match self {
            Self::Intent(Intent(session)) | Self::Issued(Issued { session, .. }) => session,
        }
    }
}

impl Intent {
    /// The session, in state Reserved.
    pub const fn session(&self) -> &Session {
        &self.0
    }

    /// Adds the signed certificate. Consumes the intent, so that each intent yields one certificate.
    pub fn into_signed(self, certificate: Vec<u8>) -> Signed {
        Signed { session: self.0, certificate }
    }
}

impl Issued {
    /// The session, in state Issued.
    pub const fn session(&self) -> &Session {
        &self.session
    }

    /// The certificate as delivered.
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

impl Deref for Journal {
    type Target = dyn SessionReader;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl Journal {
    /// Wraps a storage engine.
    pub fn new(engine: Arc<dyn StateStore>) -> Self {
        Self(engine)
    }

    /// Step 4, intend. Once this returns, the session, its keys and the bytes to be signed survive a crash.
    pub async fn intend(&self, session: Session, pair: Option<&PairToReserve>) -> Result<Intent, ReserveError> {
        assert_eq!(session.state, SessionState::Reserved);
        self.0.reserve(&session, pair).await?;
        Ok(Intent(session))
    }

    /// Step 6, issue. Once this returns, the certificate may be delivered: every retry delivers the same one.
    pub async fn issue(&self, signed: Signed) -> Result<Issued, StoreError> {
        let Signed { session, certificate } = signed;
        let to = SessionState::Issued { certificate: certificate.clone() };
        let session = self.0.advance(&session.id, StateName::Reserved, to).await?;
        Ok(Issued { session, certificate })
    }

    /// Journals the publication. The receipt names the session, so it cannot be applied to another one.
    pub async fn publish(&self, receipt: &PublicationReceipt) -> Result<Published, StoreError> {
        let to = SessionState::Published { publication: receipt.publication() };
        self.0.advance(&receipt.session(), StateName::Issued, to).await.map(Published)
    }

    /// Erases the key pair from the secret store. Consumes the proof that the record is public.
    ///
    /// ```
    /// # use spp::store::{Journal, PublicationReceipt, Session, StoreError};
    /// async fn with_receipt(journal: &Journal, receipt: PublicationReceipt) -> Result<Session, StoreError> {
    ///     journal.erase(receipt).await
    /// }
    /// ```
    /// Only the public database issues that proof:
    /// ```compile_fail,E0451
    /// # use spp_format::names::SessionId;
    /// # use spp::store::{Journal, PublicationReceipt, Session, StoreError};
    /// # use spp_format::record::Publication;
    /// async fn forged(journal: &Journal, session: SessionId, publication: Publication) -> Result<Session, StoreError> {
    ///     journal.erase(PublicationReceipt { session, publication }).await
    /// }
    /// ```
    /// ```compile_fail,E0308
    /// # use spp_format::names::SessionId;
    /// # use spp::store::{Journal, Session, StoreError};
    /// async fn without_receipt(journal: &Journal, session: SessionId) -> Result<Session, StoreError> {
    ///     journal.erase(session).await
    /// }
    /// ```
    pub async fn erase(&self, receipt: PublicationReceipt) -> Result<Session, StoreError> {
        let to = SessionState::Erased { publication: receipt.publication() };
        self.0.advance(&receipt.session(), StateName::Published, to).await
    }

    /// Aborts a session and destroys its key pair.
    pub async fn abort(&self, session: Abortable, at: u64, reason: String) -> Result<Session, StoreError> {
        let (id, from) = match session {
            Abortable::Intent(intent) => (intent.0.id, StateName::Reserved),
            Abortable::Issued(issued) => (issued.session.id, StateName::Issued),
        };
        self.0.advance(&id, from, SessionState::Aborted { at, reason }).await
    }

    /// Loads a session by ID, with the proof that its journaled state provides.
    pub async fn load(&self, id: &SessionId) -> Result<Option<Loaded>, StoreError> {
        Ok(self.0.session(id).await?.map(Loaded::from_session))
    }

    /// Loads the newest session of a chip, with the proof that its journaled state provides.
    pub async fn load_by_chip(&self, chip: &ChipId) -> Result<Option<Loaded>, StoreError> {
        Ok(self.0.session_of_chip(chip).await?.map(Loaded::from_session))
    }

    /// Reports whether the journal has the session.
    pub async fn contains(&self, session: &SessionId) -> Result<bool, StoreError> {
        Ok(self.0.session(session).await?.is_some())
    }

    /// All sessions that are not final, oldest first.
    pub async fn unfinished(&self) -> Result<Vec<Loaded>, StoreError> {
        Ok(self.0.unfinished().await?.into_iter().map(Loaded::from_session).collect())
    }
}

/// A session loaded from the journal, with the proof that its state provides.
#[derive(Debug)]
pub enum Loaded {
    /// Reserved; no signature is recorded.
    Intent(Intent),
    /// Issued.
    Issued(Issued),
    /// Published; its key pair is not erased.
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

    /// Private, so that only sessions read from the engine become proofs.
    fn from_session(session: Session) -> Self {
        match session.state.clone() {
            SessionState::Reserved => Self::Intent(Intent(session)),
            SessionState::Issued { certificate } => Self::Issued(Issued { session, certificate }),
            SessionState::Published { .. } => Self::Published(Published(session)),
            SessionState::Erased { .. } | SessionState::Aborted { .. } => Self::Final(session),
        }
    }
}
