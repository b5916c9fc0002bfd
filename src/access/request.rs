//! A request for the approval of others, and what may become of it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::action::ProtectedAction;
use super::statement::SignedStatement;
use crate::certificate::Role;
use crate::names::{NameError, OfficerName};

/// The name of a request: random bytes that the officer who makes it chooses, so that a repeat is the same request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId([u8; 8]);

impl RequestId {
    /// From random bytes.
    pub const fn from_bytes(bytes: [u8; 8]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 8] {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl FromStr for RequestId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let bytes = hex::decode(text).ok().and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or_else(|| NameError::new("a request has a name of 16 hex digits; sppctl approvals list"))
    }
}

/// What one officer wants and others must approve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApprovalRequest {
    /// Its name.
    pub id: RequestId,
    /// What shall be done.
    pub act: ProtectedAction,
    /// Who asks for it.
    pub requested: SignedStatement,
    /// Seconds since the Unix epoch; after that nothing comes of it.
    pub expires: u64,
    /// How many others must approve.
    pub needed: u8,
    /// Who has approved.
    pub approvals: Vec<SignedStatement>,
    /// How it stands.
    pub state: RequestState,
}

/// How a request stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RequestState {
    /// Approvals are missing.
    Pending,
    /// What may be done once by who has asked for it or approved it: a ceremony, an enrolment.
    Approved,
    /// It is done; seconds since the Unix epoch.
    Done(u64),
    /// Somebody has said no.
    Rejected {
        /// Who, and his signature.
        by: SignedStatement,
        /// Why.
        reason: String,
    },
    /// Nothing comes of it: one who signed it has been revoked since.
    Void(String),
}

/// Why a decision is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// There is none of that name.
    #[error("there is no request {0}; sppctl approvals list")]
    Unknown(RequestId),
    /// Another one has the name.
    #[error("the request {0} exists and says something else")]
    Taken(RequestId),
    /// Nobody decides on himself.
    #[error("{0} is the one to be revoked, and decides nothing on it")]
    OwnRevocation(OfficerName),
    /// What somebody signs who is revoked is worth nothing.
    #[error("{0} is revoked")]
    Revoked(OfficerName),
    /// Four eyes are two people.
    #[error("{0} has asked for it and cannot approve it as well: another officer must")]
    OwnRequest(OfficerName),
    /// Its time is over.
    #[error("the request {0} has expired; ask for it anew")]
    Expired(RequestId),
    /// It is decided.
    #[error("the request {id} is {state} already")]
    Decided {
        /// Which one.
        id: RequestId,
        /// How it stands.
        state: String,
    },
    /// It is not approved yet.
    #[error("the request {0} is not approved yet: {1} more must approve it")]
    NotApproved(RequestId, u8),
    /// Too many at once.
    #[error("{0} requests wait for a decision already; reject those that are not wanted")]
    TooMany(usize),
}

impl RequestState {
    /// In a word, whatever the time.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Approved => "approved",
            Self::Done(_) => "done",
            Self::Rejected { .. } => "rejected",
            Self::Void(_) => "void",
        }
    }
}

impl ApprovalRequest {
    /// Whether its time is over before it came to anything.
    pub const fn has_expired(&self, now: u64) -> bool {
        matches!(self.state, RequestState::Pending | RequestState::Approved) && self.expires <= now
    }

    /// Whether the officer has asked for it or approved it.
    pub fn is_signed_by(&self, officer: &OfficerName) -> bool {
        self.approvals.iter().chain([&self.requested]).any(|signed| signed.officer == *officer)
    }

    /// How it stands, in a word.
    pub fn standing(&self, now: u64) -> &'static str {
        if self.has_expired(now) { "expired" } else { self.state.name() }
    }

    /// How many approvals are missing.
    pub fn missing(&self) -> u8 {
        self.needed.saturating_sub(u8::try_from(self.approvals.len()).unwrap_or(u8::MAX))
    }

    /// Whoever is to be revoked does not decide on it.
    fn must_not_be_about(&self, officer: &OfficerName) -> Result<(), RequestError> {
        match &self.act {
            ProtectedAction::Revoke { role: Role::Officer, name, .. } if name == officer.as_str() => {
                Err(RequestError::OwnRevocation(officer.clone()))
            }
            _ => Ok(()),
        }
    }

    /// One more approval; the last one makes it done, or a ceremony ready to be held. The same officer's again changes nothing.
    pub fn approve(mut self, by: SignedStatement) -> Result<Self, RequestError> {
        if by.officer == self.requested.officer {
            return Err(RequestError::OwnRequest(by.officer));
        }
        self.must_not_be_about(&by.officer)?;
        let stands = matches!(self.state, RequestState::Pending | RequestState::Approved | RequestState::Done(_));
        if stands && self.approvals.iter().any(|given| given.officer == by.officer) && !self.has_expired(by.at) {
            return Ok(self);
        }
        self.must_be_pending(by.at)?;
        let at = by.at;
        self.approvals.push(by);
        if self.missing() == 0 {
            self.state = if self.act.is_used_later() { RequestState::Approved } else { RequestState::Done(at) };
        }
        Ok(self)
    }

    /// One officer's no is enough, the own one included.
    pub fn reject(mut self, by: SignedStatement, reason: String) -> Result<Self, RequestError> {
        if by.officer != self.requested.officer {
            self.must_not_be_about(&by.officer)?;
        }
        if let RequestState::Rejected { by: before, .. } = &self.state
            && before.officer == by.officer
        {
            return Ok(self);
        }
        if self.state != RequestState::Approved || self.has_expired(by.at) {
            self.must_be_pending(by.at)?;
        }
        self.state = RequestState::Rejected { by, reason };
        Ok(self)
    }

    /// A ceremony is about to be held: it can be held once.
    pub fn use_up(mut self, now: u64) -> Result<Self, RequestError> {
        match self.state {
            RequestState::Approved if self.missing() > 0 => Err(RequestError::NotApproved(self.id, self.missing())),
            RequestState::Approved if !self.has_expired(now) => {
                self.state = RequestState::Done(now);
                Ok(self)
            }
            RequestState::Pending if !self.has_expired(now) => Err(RequestError::NotApproved(self.id, self.missing())),
            _ => self.must_be_pending(now).map(|()| self),
        }
    }

    /// What an officer signed who is revoked is worth nothing: his request is void, his approval is gone.
    pub fn without(mut self, officer: &OfficerName) -> Self {
        if !matches!(self.state, RequestState::Pending | RequestState::Approved) {
            return self;
        }
        if self.requested.officer == *officer {
            self.state = RequestState::Void(format!("the officer {officer} was revoked"));
            return self;
        }
        self.approvals.retain(|given| given.officer != *officer);
        if self.missing() > 0 {
            self.state = RequestState::Pending;
        }
        self
    }

    fn must_be_pending(&self, now: u64) -> Result<(), RequestError> {
        if self.has_expired(now) {
            return Err(RequestError::Expired(self.id));
        }
        match self.state {
            RequestState::Pending => Ok(()),
            _ => Err(RequestError::Decided { id: self.id, state: self.standing(now).to_owned() }),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn signed(officer: &str, at: u64) -> SignedStatement {
        let officer = officer.parse().unwrap();
        SignedStatement { officer, at, statement: String::new(), signature: Vec::new(), certificate: Vec::new() }
    }

    pub(crate) fn request(act: ProtectedAction, needed: u8) -> ApprovalRequest {
        let (requested, approvals) = (signed("o-1", 100), Vec::new());
        let id = RequestId::from_bytes([7; 8]);
        ApprovalRequest { id, act, requested, expires: 1000, needed, approvals, state: RequestState::Pending }
    }

    fn ceremony() -> ProtectedAction {
        ProtectedAction::Ceremony { destroys: true, file: "x".to_owned() }
    }

    fn raise() -> ProtectedAction {
        ProtectedAction::RaiseQuota { station: "line-1/a".parse().unwrap(), quota: super::super::Quota::default() }
    }

    #[test]
    fn nobody_approves_what_he_asked_for_and_nobody_counts_twice() {
        let asked = request(raise(), 2);
        let about = ProtectedAction::Revoke { role: Role::Officer, name: "o-3".to_owned(), reason: "left".to_owned() };
        let about = request(about, 1);
        assert!(matches!(about.clone().approve(signed("o-3", 200)), Err(RequestError::OwnRevocation(_))));
        assert!(matches!(about.reject(signed("o-3", 200), "no".to_owned()), Err(RequestError::OwnRevocation(_))));
        let own = asked.clone().approve(signed("o-1", 200));
        assert!(matches!(own, Err(RequestError::OwnRequest(_))));
        let once = asked.approve(signed("o-2", 200)).unwrap();
        let twice = once.clone().approve(signed("o-2", 300)).unwrap();
        assert_eq!((twice.state.clone(), twice.approvals.len()), (RequestState::Pending, 1));
        let done = twice.approve(signed("o-3", 400)).unwrap();
        assert_eq!(done.state, RequestState::Done(400));
        assert!(matches!(done.reject(signed("o-4", 500), String::new()), Err(RequestError::Decided { .. })));
    }

    #[test]
    fn nothing_comes_of_it_after_its_time() {
        let asked = request(raise(), 1);
        assert!(matches!(asked.clone().approve(signed("o-2", 1000)), Err(RequestError::Expired(_))));
        assert_eq!((asked.standing(999), asked.standing(1000)), ("pending", "expired"));
        let approved = request(ceremony(), 1).approve(signed("o-2", 200)).unwrap();
        assert!(matches!(approved.use_up(1000), Err(RequestError::Expired(_))));
    }

    #[test]
    fn a_ceremony_is_held_once_and_only_when_it_is_approved() {
        let asked = request(ceremony(), 1);
        assert!(matches!(asked.clone().use_up(200), Err(RequestError::NotApproved(_, 1))));
        let approved = asked.approve(signed("o-2", 200)).unwrap();
        assert_eq!(approved.state, RequestState::Approved);
        let used = approved.clone().use_up(300).unwrap();
        assert!(matches!(used.use_up(301), Err(RequestError::Decided { .. })));
        let rejected = approved.reject(signed("o-1", 300), "no".to_owned()).unwrap();
        assert!(rejected.use_up(301).is_err());
    }

    #[test]
    fn what_a_revoked_officer_signed_is_worth_nothing() {
        let (one, two): (OfficerName, OfficerName) = ("o-1".parse().unwrap(), "o-2".parse().unwrap());
        let approved = request(ceremony(), 1).approve(signed("o-2", 200)).unwrap();
        assert_eq!(approved.clone().without(&two).state, RequestState::Pending);
        assert_eq!(approved.without(&one).standing(300), "void");
    }

    proptest! {
        #[test]
        fn nothing_is_done_without_as_many_others_as_are_needed(
            needed in 1_u8..4,
            steps in proptest::collection::vec((0_u8..3, 1_u8..6, 1_u64..1200), 0..30),
        ) {
            let mut now = request(raise(), needed);
            for (what, who, at) in steps {
                let by = signed(&format!("o-{who}"), at);
                let officer = by.officer.clone();
                let next = match what {
                    0 => now.clone().approve(by),
                    1 => now.clone().reject(by, String::new()),
                    _ => Ok(now.clone().without(&officer)),
                };
                now = next.unwrap_or(now);
                let others: std::collections::BTreeSet<_> =
                    now.approvals.iter().map(|given| given.officer.as_str().to_owned()).collect();
                prop_assert!(!others.contains("o-1"));
                if let RequestState::Done(at) = now.state {
                    prop_assert!(others.len() >= usize::from(needed) && at < 1000);
                }
            }
        }
    }
}
