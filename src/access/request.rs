//! Approval requests and their state transitions.

use serde::{Deserialize, Serialize};
use spp_format::approval::{ProtectedAction, RequestId, SignedStatement};
use spp_format::certificate::Role;
use spp_format::names::OfficerName;

/// A request of one officer that other officers must approve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApprovalRequest {
    /// The request ID.
    pub id: RequestId,
    /// The action to approve.
    pub action: ProtectedAction,
    /// The statement of the requesting officer.
    pub requested: SignedStatement,
    /// Expiry; seconds since the Unix epoch. A request that is not done by then cannot take effect.
    pub expires: u64,
    /// Number of other officers who must approve.
    pub needed: u8,
    /// The approvals given.
    pub approvals: Vec<SignedStatement>,
    /// The stored state.
    pub state: RequestState,
}

/// The state of a request. Expiry is not stored: see [`ApprovalRequest::effective_state`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RequestState {
    /// Approvals are missing.
    Pending,
    /// Approved. One of the officers who requested or approved it may carry it out once: a ceremony or an enrolment.
    Approved,
    /// Done; seconds since the Unix epoch.
    Done(u64),
    /// Rejected by an officer.
    Rejected {
        /// The signed rejection.
        by: SignedStatement,
        /// The reason.
        reason: String,
    },
    /// Void with this reason, because the requesting officer was revoked.
    Void(String),
}

/// A refused decision.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No request has this ID.
    #[error("unknown request {0}; list requests with sppctl approvals list")]
    Unknown(RequestId),
    /// Another request has this ID.
    #[error("request {0} exists with different content")]
    Taken(RequestId),
    /// An officer cannot approve or reject their own revocation.
    #[error("{0} cannot approve or reject their own revocation")]
    OwnRevocation(OfficerName),
    /// Signatures of a revoked officer do not count.
    #[error("{0} is revoked")]
    Revoked(OfficerName),
    /// An officer cannot approve their own request.
    #[error("{0} cannot approve their own request; another officer must approve it")]
    OwnRequest(OfficerName),
    /// The request has expired.
    #[error("request {0} has expired; submit a new one")]
    Expired(RequestId),
    /// The request is decided.
    #[error("request {id} is {state} already")]
    Decided {
        /// The request.
        id: RequestId,
        /// The state of the request.
        state: String,
    },
    /// Approvals are missing.
    #[error("request {0} needs {1} more approvals")]
    NotApproved(RequestId, u8),
    /// Too many requests are open.
    #[error("{0} requests are pending already; reject those that are not needed")]
    TooMany(usize),
}

impl RequestState {
    /// The name of the stored state.
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
    /// True if the request expired before it was done.
    pub const fn has_expired(&self, now: u64) -> bool {
        matches!(self.state, RequestState::Pending | RequestState::Approved) && self.expires <= now
    }

    /// True if the officer requested or approved it.
    pub fn is_signed_by(&self, officer: &OfficerName) -> bool {
        self.approvals.iter().chain([&self.requested]).any(|signed| signed.officer == *officer)
    }

    /// The name of the state at `now`, which may be "expired".
    pub fn effective_state(&self, now: u64) -> &'static str {
        if self.has_expired(now) { "expired" } else { self.state.name() }
    }

    /// Number of missing approvals.
    pub fn missing_approvals(&self) -> u8 {
        self.needed.saturating_sub(u8::try_from(self.approvals.len()).unwrap_or(u8::MAX))
    }

    /// Refuses the vote of the officer whom the request revokes.
    fn check_not_own_revocation(&self, officer: &OfficerName) -> Result<(), RequestError> {
        match &self.action {
            ProtectedAction::Revoke { role: Role::Officer, name, .. } if name == officer.as_str() => {
                Err(RequestError::OwnRevocation(officer.clone()))
            }
            _ => Ok(()),
        }
    }

    /// Adds an approval. The last one makes the request done, or approved if the action is single-use. A repeated approval by
    /// the same officer changes nothing.
    pub fn approve(mut self, by: SignedStatement) -> Result<Self, RequestError> {
        if by.officer == self.requested.officer {
            return Err(RequestError::OwnRequest(by.officer));
        }
        self.check_not_own_revocation(&by.officer)?;
        let is_valid = matches!(self.state, RequestState::Pending | RequestState::Approved | RequestState::Done(_));
        if is_valid && self.approvals.iter().any(|given| given.officer == by.officer) && !self.has_expired(by.at) {
            return Ok(self);
        }
        self.check_pending(by.at)?;
        let at = by.at;
        self.approvals.push(by);
        if self.missing_approvals() == 0 {
            self.state = if self.action.is_single_use() { RequestState::Approved } else { RequestState::Done(at) };
        }
        Ok(self)
    }

    /// Rejects the request. One officer is enough, and the requesting officer may reject it too.
    pub fn reject(mut self, by: SignedStatement, reason: String) -> Result<Self, RequestError> {
        if by.officer != self.requested.officer {
            self.check_not_own_revocation(&by.officer)?;
        }
        if let RequestState::Rejected { by: rejected, .. } = &self.state
            && rejected.officer == by.officer
        {
            return Ok(self);
        }
        if self.state != RequestState::Approved || self.has_expired(by.at) {
            self.check_pending(by.at)?;
        }
        self.state = RequestState::Rejected { by, reason };
        Ok(self)
    }

    /// Consumes the approval of a single-use action, before the action is carried out.
    pub fn consume_approval(mut self, now: u64) -> Result<Self, RequestError> {
        match self.state {
            RequestState::Approved if self.missing_approvals() > 0 => {
                Err(RequestError::NotApproved(self.id, self.missing_approvals()))
            }
            RequestState::Approved if !self.has_expired(now) => {
                self.state = RequestState::Done(now);
                Ok(self)
            }
            RequestState::Pending if !self.has_expired(now) => {
                Err(RequestError::NotApproved(self.id, self.missing_approvals()))
            }
            _ => self.check_pending(now).map(|()| self),
        }
    }

    /// Discards the signatures of a revoked officer: their request becomes void, their approval is removed.
    pub fn without_signatures_of(mut self, officer: &OfficerName) -> Self {
        if !matches!(self.state, RequestState::Pending | RequestState::Approved) {
            return self;
        }
        if self.requested.officer == *officer {
            self.state = RequestState::Void(format!("the officer {officer} was revoked"));
            return self;
        }
        self.approvals.retain(|given| given.officer != *officer);
        if self.missing_approvals() > 0 {
            self.state = RequestState::Pending;
        }
        self
    }

    fn check_pending(&self, now: u64) -> Result<(), RequestError> {
        if self.has_expired(now) {
            return Err(RequestError::Expired(self.id));
        }
        match self.state {
            RequestState::Pending => Ok(()),
            _ => Err(RequestError::Decided { id: self.id, state: self.effective_state(now).to_owned() }),
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

    pub(crate) fn request(action: ProtectedAction, needed: u8) -> ApprovalRequest {
        let (requested, approvals) = (signed("o-1", 100), Vec::new());
        let id = RequestId::from_bytes([7; 8]);
        ApprovalRequest { id, action, requested, expires: 1000, needed, approvals, state: RequestState::Pending }
    }

    fn ceremony() -> ProtectedAction {
        ProtectedAction::Ceremony { destroys: true, file: "x".to_owned() }
    }

    fn raise() -> ProtectedAction {
        ProtectedAction::RaiseQuota {
            station: "line-1/a".parse().unwrap(),
            quota: spp_format::approval::Quota::default(),
        }
    }

    #[test]
    fn approve_by_requester_or_twice_does_not_count() {
        let pending = request(raise(), 2);
        let action = ProtectedAction::Revoke { role: Role::Officer, name: "o-3".to_owned(), reason: "left".to_owned() };
        let revocation = request(action, 1);
        assert!(matches!(revocation.clone().approve(signed("o-3", 200)), Err(RequestError::OwnRevocation(_))));
        assert!(matches!(revocation.reject(signed("o-3", 200), "no".to_owned()), Err(RequestError::OwnRevocation(_))));
        let own = pending.clone().approve(signed("o-1", 200));
        assert!(matches!(own, Err(RequestError::OwnRequest(_))));
        let once = pending.approve(signed("o-2", 200)).unwrap();
        let twice = once.clone().approve(signed("o-2", 300)).unwrap();
        assert_eq!((twice.state.clone(), twice.approvals.len()), (RequestState::Pending, 1));
        let done = twice.approve(signed("o-3", 400)).unwrap();
        assert_eq!(done.state, RequestState::Done(400));
        assert!(matches!(done.reject(signed("o-4", 500), String::new()), Err(RequestError::Decided { .. })));
    }

    #[test]
    fn approve_and_consume_fail_after_expiry() {
        let pending = request(raise(), 1);
        assert!(matches!(pending.clone().approve(signed("o-2", 1000)), Err(RequestError::Expired(_))));
        assert_eq!((pending.effective_state(999), pending.effective_state(1000)), ("pending", "expired"));
        let approved = request(ceremony(), 1).approve(signed("o-2", 200)).unwrap();
        assert!(matches!(approved.consume_approval(1000), Err(RequestError::Expired(_))));
    }

    #[test]
    fn ceremony_approval_is_consumed_once() {
        let pending = request(ceremony(), 1);
        assert!(matches!(pending.clone().consume_approval(200), Err(RequestError::NotApproved(_, 1))));
        let approved = pending.approve(signed("o-2", 200)).unwrap();
        assert_eq!(approved.state, RequestState::Approved);
        let used = approved.clone().consume_approval(300).unwrap();
        assert!(matches!(used.consume_approval(301), Err(RequestError::Decided { .. })));
        let rejected = approved.reject(signed("o-1", 300), "no".to_owned()).unwrap();
        assert!(rejected.consume_approval(301).is_err());
    }

    #[test]
    fn signatures_of_revoked_officer_are_discarded() {
        let (one, two): (OfficerName, OfficerName) = ("o-1".parse().unwrap(), "o-2".parse().unwrap());
        let approved = request(ceremony(), 1).approve(signed("o-2", 200)).unwrap();
        assert_eq!(approved.clone().without_signatures_of(&two).state, RequestState::Pending);
        assert_eq!(approved.without_signatures_of(&one).effective_state(300), "void");
    }

    proptest! {
        #[test]
        fn request_is_done_only_with_enough_other_approvals(
            needed in 1_u8..4,
            steps in proptest::collection::vec((0_u8..3, 1_u8..6, 1_u64..1200), 0..30),
        ) {
            let mut current = request(raise(), needed);
            for (step, officer, at) in steps {
                let by = signed(&format!("o-{officer}"), at);
                let officer = by.officer.clone();
                let next = match step {
                    0 => current.clone().approve(by),
                    1 => current.clone().reject(by, String::new()),
                    _ => Ok(current.clone().without_signatures_of(&officer)),
                };
                current = next.unwrap_or(current);
                let others: std::collections::BTreeSet<_> =
                    current.approvals.iter().map(|given| given.officer.as_str().to_owned()).collect();
                prop_assert!(!others.contains("o-1"));
                if let RequestState::Done(at) = current.state {
                    prop_assert!(others.len() >= usize::from(needed) && at < 1000);
                }
            }
        }
    }
}
