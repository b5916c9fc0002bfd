//! Access control in the running daemon: approvals, enrolment, revocation and identity ranges.

use std::ops::Deref;
use std::sync::Arc;

use spp_format::approval::{
    ApprovalRules, ApprovalStatement, ProtectedAction, Quota, RequestId, SignedStatement, Verdict,
};
use spp_format::certificate::{
    AccessCertificate, AccessName, Caller, CallerCertificate, CertificateSerial, IssuerCertificate, Role,
    access_certificate, verify_csr,
};
use spp_format::keys::sha256;
use spp_format::names::{KeyName, OfficerName, ProfileName, StationName};

use super::{
    AccessError, AccessReader, AccessStore, ApprovalRequest, IdentityRange, IssuedAccess, LoadedRange, Refused,
    RequestError, RequestState, Revocation, RevocationList,
};
use crate::clock::Clock;
use crate::hsm::{AccessSigner, Hsm};

/// Maximum lifetime of a certificate, in seconds: ten years.
const MAX_LIFETIME: u64 = 3650 * 24 * 60 * 60;

/// The access CA: the key that signs access certificates, and its certificate.
#[derive(Clone)]
pub struct AccessAuthority {
    /// The key's name in the HSM.
    pub key: KeyName,
    /// The CA certificate.
    pub issuer: IssuerCertificate,
    /// The CA certificate in PEM, for callers that verify others with it.
    pub pem: String,
}

/// Decides access requests and stores the decisions in the state store.
pub struct AccessControl {
    store: Arc<dyn AccessStore>,
    hsm: Hsm,
    authority: Option<(AccessAuthority, AccessSigner)>,
    node: String,
    revocation_list: Arc<RevocationList>,
    clock: Clock,
}

/// An approval request as an officer submits it, not verified yet.
pub struct SubmittedRequest {
    /// The officer who submits it.
    pub officer: OfficerName,
    /// The officer's TLS certificate, DER.
    pub certificate: Vec<u8>,
    /// The request ID that the officer chose.
    pub id: RequestId,
    /// The action to approve.
    pub action: ProtectedAction,
    /// Expiry; seconds since the Unix epoch.
    pub expires: u64,
    /// The officer's signature over [`ApprovalStatement::request`].
    pub signature: Vec<u8>,
}

/// An officer's verified decision on a request.
pub struct Decision {
    /// The request.
    pub id: RequestId,
    /// The action of the request.
    pub action: ProtectedAction,
    /// The signed decision.
    pub signed: SignedStatement,
    verdict: Verdict,
}

/// A certificate issued to a caller.
pub struct Enrolled {
    /// The certificate, PEM.
    pub certificate: String,
    /// The access CA certificate, PEM.
    pub authority: String,
    /// The stored record of the certificate.
    pub issued: IssuedAccess,
}

impl Deref for AccessControl {
    type Target = dyn AccessReader;

    fn deref(&self) -> &Self::Target {
        &*self.store
    }
}

impl AccessControl {
    /// Creates the service and loads the revocations from the store.
    pub async fn open(
        store: Arc<dyn AccessStore>,
        hsm: Hsm,
        authority: Option<AccessAuthority>,
        node: &str,
    ) -> Result<Self, AccessError> {
        let revocation_list = Arc::new(RevocationList::default());
        revocation_list.revoke(store.revocations().await?);
        let authority = authority.map(|authority| {
            let signer = hsm.access_signer(authority.key.clone());
            (authority, signer)
        });
        Ok(Self { store, hsm, authority, node: node.to_owned(), revocation_list, clock: Clock::system() })
    }

    /// The revocation list, for the code that admits callers.
    pub const fn revocation_list(&self) -> &Arc<RevocationList> {
        &self.revocation_list
    }

    /// The node name. It is part of every statement that officers sign.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Applies those rules and quotas of the configuration that need no approval: see [`AccessStore::apply`]. Returns a
    /// description of each setting that is not in force.
    pub async fn apply(
        &self,
        rules: ApprovalRules,
        quotas: Vec<(StationName, Quota)>,
        whole: bool,
    ) -> Result<Vec<String>, AccessError> {
        Ok(self.store.apply(rules, quotas, whole).await?)
    }

    /// The rules in force.
    pub async fn rules(&self) -> Result<ApprovalRules, AccessError> {
        Ok(self.store.rules().await?.map(|applied| applied.in_force).unwrap_or_default())
    }

    /// Verifies an officer's request without storing it. The caller writes the audit entry before [`Self::file`].
    pub async fn prepare_request(&self, submitted: SubmittedRequest) -> Result<ApprovalRequest, AccessError> {
        let SubmittedRequest { officer, certificate, id, action, expires, signature } = submitted;
        let (now, rules) = (self.clock.now(), self.rules().await?);
        let known = self.store.request(id).await?;
        // A repeated request may arrive late; it gets the stored request as the answer.
        let is_in_time = (now + 1..=now + rules.valid_for).contains(&expires);
        if !is_in_time && known.is_none_or(|known| known.expires != expires) {
            let problem = format!("expiry must be in the future and at most {} seconds from now", rules.valid_for);
            return Err(Refused::Unfit(problem).into());
        }
        let statement = ApprovalStatement::request(&self.node, id, &officer, expires, &action);
        let requested = SignedStatement::verified(officer, now, &statement, &signature, &certificate);
        let requested = requested.map_err(Refused::Signature)?;
        if let ProtectedAction::RaiseQuota { station, .. } = &action
            && !self.store.stations().await?.iter().any(|known| known.station == *station)
        {
            return Err(Refused::Unfit(format!("station {station} is not configured")).into());
        }
        let (needed, approvals, state) = (rules.needed(action.kind()), Vec::new(), RequestState::Pending);
        Ok(ApprovalRequest { id, action, requested, expires, needed, approvals, state })
    }

    /// Stores the request. A repeat of the same request returns the stored one.
    pub async fn file(&self, request: ApprovalRequest) -> Result<ApprovalRequest, AccessError> {
        self.store.file_request(request).await
    }

    /// Verifies an officer's decision without storing it. The caller writes the audit entry before [`Self::decide`].
    pub async fn prepare_decision(
        &self,
        officer: OfficerName,
        certificate: &[u8],
        id: RequestId,
        verdict: Verdict,
        signature: &[u8],
    ) -> Result<Decision, AccessError> {
        let request = self.request_by_id(id).await?;
        let requested =
            ApprovalStatement::request(&self.node, id, &request.requested.officer, request.expires, &request.action);
        let statement = ApprovalStatement::decision(&self.node, id, &officer, &requested, &verdict);
        let signed = SignedStatement::verified(officer, self.clock.now(), &statement, signature, certificate);
        Ok(Decision { id, verdict, action: request.action, signed: signed.map_err(Refused::Signature)? })
    }

    /// Stores the decision and carries out a fully approved action. A revocation is in force when this returns.
    pub async fn decide(&self, decision: Decision) -> Result<ApprovalRequest, AccessError> {
        let Decision { id, verdict, signed, .. } = decision;
        let decided = self.store.decide(id, verdict, signed).await?;
        if let (ProtectedAction::Revoke { role, name, reason }, RequestState::Done(at)) =
            (&decided.action, &decided.state)
        {
            let caller = Caller::new(*role, name).map_err(|e| Refused::Unfit(e.to_string()))?;
            // Revoke in memory first: this works even if the read fails. The store may hold a later revocation time.
            self.revocation_list.revoke([Revocation { caller, at: *at, reason: reason.clone(), request: id }]);
            self.revocation_list.revoke(self.store.revocations().await?);
        }
        Ok(decided)
    }

    /// The request with this ID.
    pub async fn request_by_id(&self, id: RequestId) -> Result<ApprovalRequest, AccessError> {
        Ok(self.store.request(id).await?.ok_or(RequestError::Unknown(id))?)
    }

    /// Consumes the approval of a ceremony. Only an officer who requested or approved it may do so, and only once.
    pub async fn consume_approval(
        &self,
        officer: &OfficerName,
        id: RequestId,
        file_hash: &[u8],
    ) -> Result<ApprovalRequest, AccessError> {
        let request = self.request_by_id(id).await?;
        if request.action.ceremony_hash().as_ref().map(<[u8; 32]>::as_slice) != Some(file_hash) {
            return Err(Refused::Unfit(format!("request {id} does not approve this ceremony file")).into());
        }
        if !request.is_signed_by(officer) {
            return Err(Refused::Unfit(format!("{officer} neither requested nor approved {id}")).into());
        }
        self.store.consume_approval(id, self.clock.now()).await
    }

    /// Issues a certificate for the key of a CSR (PKCS#10, DER). Enrolling an officer or a revoked caller needs an approval:
    /// otherwise one officer could create their own second officer.
    pub async fn enroll(
        &self,
        caller: Caller,
        csr: &[u8],
        days: u32,
        by: &OfficerName,
    ) -> Result<Enrolled, AccessError> {
        let revoked = self.revocation_list.revoked_until(&caller);
        if revoked.is_some() || caller.role() == Role::Officer {
            self.consume_enrolment(&caller, csr, days, by).await?;
        }
        // A certificate that begins in the second of the revocation would be revoked too.
        let not_before = self.clock.now().max(revoked.map_or(0, |until| until + 1));
        let life = u64::from(days) * 24 * 60 * 60;
        self.issue(caller, csr, not_before, life, &Caller::Officer(by.clone())).await
    }

    async fn consume_enrolment(
        &self,
        caller: &Caller,
        csr: &[u8],
        days: u32,
        by: &OfficerName,
    ) -> Result<(), AccessError> {
        let (role, name, csr_sha256) = (caller.role(), caller.name().to_owned(), hex::encode(sha256(csr)));
        let action = ProtectedAction::Enroll { role, name, days, csr_sha256 };
        let requests = self.store.requests().await?;
        let is_usable = |request: &&ApprovalRequest| {
            let is_approved = request.effective_state(self.clock.now()) == "approved";
            request.action == action && is_approved && request.is_signed_by(by)
        };
        let missing = || Refused::NeedsApproval { caller: caller.clone() };
        let request = requests.iter().find(is_usable).ok_or_else(missing)?;
        self.store.consume_approval(request.id, self.clock.now()).await.map(drop)
    }

    async fn issue(
        &self,
        caller: Caller,
        csr: &[u8],
        not_before: u64,
        life: u64,
        by: &Caller,
    ) -> Result<Enrolled, AccessError> {
        let (authority, signer) = self.authority.as_ref().ok_or(Refused::NoAuthority)?;
        let public_key = verify_csr(csr).map_err(|e| Refused::Unfit(format!("csr: {e}")))?;
        let serial = self.hsm.random(CertificateSerial::LEN).await?;
        let serial = <[u8; CertificateSerial::LEN]>::try_from(serial);
        let serial = CertificateSerial::from_random(
            serial.map_err(|_| Refused::Unfit("the HSM returned too few random bytes".into()))?,
        );
        let not_after = not_before + life.min(MAX_LIFETIME);
        let name = AccessName::Client(caller.clone());
        let document = access_certificate(&AccessCertificate {
            name: &name,
            public_key: &public_key,
            issuer: &authority.issuer,
            serial,
            not_before,
            not_after,
        })?;
        let issued =
            IssuedAccess { caller, serial: serial.as_bytes().to_vec(), not_before, not_after, by: by.to_string() };
        // Stored before it is signed, so that no certificate exists that the list does not contain.
        self.store.record_certificate(&issued).await?;
        let signature = signer.sign(&document).await?;
        let certificate = document.assemble(&signature)?.to_pem()?;
        Ok(Enrolled { certificate, authority: authority.pem.clone(), issued })
    }

    /// Issues a new certificate to a caller, with the same lifetime as the present one.
    pub async fn renew(&self, present: &CallerCertificate, csr: &[u8]) -> Result<Enrolled, AccessError> {
        let life = present.not_after.saturating_sub(present.not_before);
        // It begins now, so that a revocation that arrives during this call revokes the new certificate too.
        self.issue(present.caller.clone(), csr, self.clock.now(), life, &present.caller).await
    }

    /// Loads a range of identities for the daemon to assign.
    pub async fn load_range(
        &self,
        profile: ProfileName,
        range: IdentityRange,
        by: &Caller,
    ) -> Result<LoadedRange, AccessError> {
        self.store.load_range(profile, range, by, self.clock.now()).await
    }

    /// The current time of the clock that decides expiry; seconds since the Unix epoch.
    pub fn now(&self) -> u64 {
        self.clock.now()
    }
}
