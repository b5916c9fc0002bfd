//! Where officers and callers come to in the running daemon.

use std::sync::Arc;

use super::{
    AccessError, ApprovalRequest, ApprovalRules, ApprovalStatement, IdentityRange, IssuedAccess, LoadedRange,
    ProtectedAction, Quota, Refused, RequestError, RequestId, RequestState, Revocation, RevocationList,
    SignedStatement, StationUse, Verdict,
};
use crate::certificate::{
    AccessCertificate, AccessName, Caller, CallerCertificate, CertificateSerial, IssuerCertificate, Role,
    access_certificate, verify_csr,
};
use crate::clock::Clock;
use crate::hsm::Hsm;
use crate::keys::sha256;
use crate::names::{KeyName, OfficerName, ProfileName, StationName};
use crate::store::AccessStore;

/// Most seconds of a certificate's life: ten years.
const LONGEST_LIFE: u64 = 3650 * 24 * 60 * 60;

/// The key that signs access certificates, with its own one.
#[derive(Clone)]
pub struct AccessAuthority {
    /// The key's name in the HSM.
    pub key: KeyName,
    /// Its certificate.
    pub issuer: IssuerCertificate,
    /// The same in PEM, for those who verify others by it.
    pub pem: String,
}

/// The desk: what it is asked is decided here, and kept in the state store.
pub struct AccessControl {
    store: Arc<dyn AccessStore>,
    hsm: Hsm,
    authority: Option<AccessAuthority>,
    node: String,
    standing: Arc<RevocationList>,
    clock: Clock,
}

/// What an officer asks others to approve.
pub struct Asked {
    /// Who asks.
    pub officer: OfficerName,
    /// His TLS certificate, DER.
    pub certificate: Vec<u8>,
    /// What he calls it.
    pub id: RequestId,
    /// What shall be done.
    pub act: ProtectedAction,
    /// Until when it stands; seconds since the Unix epoch.
    pub expires: u64,
    /// His signature over [`ApprovalStatement::request`].
    pub signature: Vec<u8>,
}

/// What an officer says to a request, signed by him.
pub struct Decision {
    /// To which.
    pub id: RequestId,
    /// What the request is about.
    pub act: ProtectedAction,
    /// What he signed.
    pub signed: SignedStatement,
    verdict: Verdict,
}

/// A certificate that was made for a caller.
pub struct Enrolled {
    /// The certificate, PEM.
    pub certificate: String,
    /// Its authority's, PEM.
    pub authority: String,
    /// What is kept of it.
    pub issued: IssuedAccess,
}

impl AccessControl {
    /// Opens it, with the revocations that the store knows.
    pub async fn open(
        store: Arc<dyn AccessStore>,
        hsm: Hsm,
        authority: Option<AccessAuthority>,
        node: &str,
    ) -> Result<Self, AccessError> {
        let standing = Arc::new(RevocationList::default());
        standing.revoke(store.revocations().await?);
        Ok(Self { store, hsm, authority, node: node.to_owned(), standing, clock: Clock::system() })
    }

    /// Who is revoked, for those who admit callers.
    pub const fn standing(&self) -> &Arc<RevocationList> {
        &self.standing
    }

    /// The node's name, which is part of what officers sign.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Takes the configuration's rules and quotas over, as far as that needs nobody's approval: see [`AccessStore::settle`]. Tells, in words,
    /// what of it is not in force.
    pub async fn settle(
        &self,
        rules: ApprovalRules,
        quotas: Vec<(StationName, Quota)>,
        whole: bool,
    ) -> Result<Vec<String>, AccessError> {
        Ok(self.store.settle(rules, quotas, whole).await?)
    }

    /// The rules in force.
    pub async fn rules(&self) -> Result<ApprovalRules, AccessError> {
        Ok(self.store.rules().await?.map(|settled| settled.in_force).unwrap_or_default())
    }

    /// The request of an officer, if its signature is his and it may be filed: what goes on record before it is.
    pub async fn prepare_request(&self, asked: Asked) -> Result<ApprovalRequest, AccessError> {
        let Asked { officer, certificate, id, act, expires, signature } = asked;
        let (now, rules) = (self.clock.now(), self.rules().await?);
        let known = self.store.request(id).await?;
        // A repeat may come late, and is answered as it stands.
        let is_in_time = (now + 1..=now + rules.valid_for).contains(&expires);
        if !is_in_time && known.is_none_or(|known| known.expires != expires) {
            let problem = format!("a request stands for at most {} seconds from now", rules.valid_for);
            return Err(Refused::Unfit(problem).into());
        }
        let statement = ApprovalStatement::request(&self.node, id, &officer, expires, &act);
        let requested = SignedStatement::verified(officer, now, &statement, &signature, &certificate);
        let requested = requested.map_err(Refused::Signature)?;
        if let ProtectedAction::RaiseQuota { station, .. } = &act
            && !self.store.stations().await?.iter().any(|known| known.station == *station)
        {
            return Err(Refused::Unfit(format!("the station {station} is not configured")).into());
        }
        let (needed, approvals, state) = (rules.needed(act.kind()), Vec::new(), RequestState::Pending);
        Ok(ApprovalRequest { id, act, requested, expires, needed, approvals, state })
    }

    /// Files it. The very same again is answered as it stands now.
    pub async fn file(&self, request: ApprovalRequest) -> Result<ApprovalRequest, AccessError> {
        self.store.file_request(request).await
    }

    /// An officer's word on a request, if the signature is his: what goes on record before it counts.
    pub async fn prepare_decision(
        &self,
        officer: OfficerName,
        certificate: &[u8],
        id: RequestId,
        verdict: Verdict,
        signature: &[u8],
    ) -> Result<Decision, AccessError> {
        let request = self.request_named(id).await?;
        let of = ApprovalStatement::request(&self.node, id, &request.requested.officer, request.expires, &request.act);
        let statement = ApprovalStatement::decision(&self.node, id, &officer, &of, &verdict);
        let signed = SignedStatement::verified(officer, self.clock.now(), &statement, signature, certificate);
        Ok(Decision { id, verdict, act: request.act, signed: signed.map_err(Refused::Signature)? })
    }

    /// Takes it. A revocation is in force when this returns.
    pub async fn decide(&self, decision: Decision) -> Result<ApprovalRequest, AccessError> {
        let Decision { id, verdict, signed, .. } = decision;
        let decided = self.store.decide(id, verdict, signed).await?;
        if let (ProtectedAction::Revoke { role, name, reason }, RequestState::Done(at)) = (&decided.act, &decided.state)
        {
            let caller = Caller::new(*role, name).map_err(|e| Refused::Unfit(e.to_string()))?;
            // At once, even if the store cannot be read now; it may know of certificates that begin later.
            self.standing.revoke([Revocation { caller, at: *at, reason: reason.clone(), request: id }]);
            self.standing.revoke(self.store.revocations().await?);
        }
        Ok(decided)
    }

    /// All requests that are kept, newest first.
    pub async fn requests(&self) -> Result<Vec<ApprovalRequest>, AccessError> {
        Ok(self.store.requests().await?)
    }

    /// A request by its name.
    pub async fn request_named(&self, id: RequestId) -> Result<ApprovalRequest, AccessError> {
        Ok(self.store.request(id).await?.ok_or(RequestError::Unknown(id))?)
    }

    /// Uses up the approval of a ceremony by one of those who signed it; it is held once.
    pub async fn use_up(
        &self,
        officer: &OfficerName,
        id: RequestId,
        file_hash: &[u8],
    ) -> Result<ApprovalRequest, AccessError> {
        let request = self.request_named(id).await?;
        if request.act.ceremony_hash().as_ref().map(<[u8; 32]>::as_slice) != Some(file_hash) {
            return Err(Refused::Unfit(format!("the request {id} is of another ceremony file, or of none")).into());
        }
        if !request.is_signed_by(officer) {
            return Err(Refused::Unfit(format!("{officer} has neither requested nor approved {id}")).into());
        }
        self.store.use_up(id, self.clock.now()).await
    }

    /// Makes a certificate for the key of a request (PKCS#10, DER). One officer alone lets in neither another officer, who would be the
    /// second pair of eyes, nor anybody who was revoked.
    pub async fn enroll(
        &self,
        caller: Caller,
        csr: &[u8],
        days: u32,
        by: &OfficerName,
    ) -> Result<Enrolled, AccessError> {
        let revoked = self.standing.revoked_until(&caller);
        if revoked.is_some() || caller.role() == Role::Officer {
            self.use_enrolment(&caller, csr, days, by).await?;
        }
        // A certificate of the very second of a revocation would be revoked with the others.
        let not_before = self.clock.now().max(revoked.map_or(0, |until| until + 1));
        let life = u64::from(days) * 24 * 60 * 60;
        self.issue(caller, csr, not_before, life, &Caller::Officer(by.clone())).await
    }

    async fn use_enrolment(&self, caller: &Caller, csr: &[u8], days: u32, by: &OfficerName) -> Result<(), AccessError> {
        let (role, name, csr_sha256) = (caller.role(), caller.name().to_owned(), hex::encode(sha256(csr)));
        let act = ProtectedAction::Enroll { role, name, days, csr_sha256 };
        let known = self.store.requests().await?;
        let is_usable = |known: &&ApprovalRequest| {
            known.act == act && known.standing(self.clock.now()) == "approved" && known.is_signed_by(by)
        };
        let needed = || Refused::NeedsApproval { caller: caller.clone() };
        let found = known.iter().find(is_usable).ok_or_else(needed)?;
        self.store.use_up(found.id, self.clock.now()).await.map(drop)
    }

    async fn issue(
        &self,
        caller: Caller,
        csr: &[u8],
        not_before: u64,
        life: u64,
        by: &Caller,
    ) -> Result<Enrolled, AccessError> {
        let authority = self.authority.as_ref().ok_or(Refused::NoAuthority)?;
        let public_key = verify_csr(csr).map_err(|e| Refused::Unfit(format!("csr: {e}")))?;
        let serial = self.hsm.random(CertificateSerial::LEN).await?;
        let serial = <[u8; CertificateSerial::LEN]>::try_from(serial);
        let serial =
            CertificateSerial::from_random(serial.map_err(|_| Refused::Unfit("the HSM gave too few bytes".into()))?);
        let not_after = not_before + life.min(LONGEST_LIFE);
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
        // Noted before it is signed: none exists that was newer than the list's.
        self.store.note_certificate(&issued).await?;
        let signature = self.hsm.sign(&authority.key, document.algorithm(), document.to_be_signed()).await?;
        let certificate = document.assemble(&signature)?.to_pem()?;
        Ok(Enrolled { certificate, authority: authority.pem.clone(), issued })
    }

    /// Another certificate for a caller who has one, with as long a life.
    pub async fn renew(&self, present: &CallerCertificate, csr: &[u8]) -> Result<Enrolled, AccessError> {
        let life = present.not_after.saturating_sub(present.not_before);
        // It begins now, not after a revocation that came meanwhile: then it is revoked with the others.
        self.issue(present.caller.clone(), csr, self.clock.now(), life, &present.caller).await
    }

    /// Stations with their quotas and what they have begun.
    pub async fn stations(&self) -> Result<Vec<StationUse>, AccessError> {
        Ok(self.store.stations().await?)
    }

    /// The newest certificate of each caller that the daemon has made one for.
    pub async fn certificates(&self) -> Result<Vec<IssuedAccess>, AccessError> {
        Ok(self.store.certificates().await?)
    }

    /// Who is revoked.
    pub async fn revocations(&self) -> Result<Vec<Revocation>, AccessError> {
        Ok(self.store.revocations().await?)
    }

    /// Loads identities that the daemon may give out.
    pub async fn load_range(
        &self,
        profile: ProfileName,
        range: IdentityRange,
        by: &Caller,
    ) -> Result<LoadedRange, AccessError> {
        self.store.load_range(profile, range, by, self.clock.now()).await
    }

    /// What is loaded, and how far it is used.
    pub async fn ranges(&self) -> Result<Vec<LoadedRange>, AccessError> {
        Ok(self.store.ranges().await?)
    }

    /// Now, by the clock that requests are judged by; seconds since the Unix epoch.
    pub fn now(&self) -> u64 {
        self.clock.now()
    }
}
