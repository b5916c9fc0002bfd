//! The desk of the running daemon, over gRPC with the caller's certificate: approvals, callers, identities.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use prost_types::Timestamp;
use tonic::transport::Channel;

use super::files::{make_directory, must_be_new, replace, write_new, write_new_private};
pub(super) use super::now;
use super::status::{StatusError, connect_access, refused, with_deadline};
use crate::access::{ApprovalStatement, ProtectedAction, RequestId, Verdict, verify_statement};
use crate::certificate::{Caller, IssuerCertificate, access_request, caller_of, verify_caller};
use crate::config::open_private;
use crate::keys::{PublicKey, TlsKey};
use crate::names::OfficerName;
use crate::proto;
use crate::proto::access_client::AccessClient;
use crate::secret::SecretBytes;

/// A caller with the key of its certificate, connected.
pub(super) struct OfficerClient {
    server: String,
    tls: PathBuf,
    client: AccessClient<Channel>,
}

impl OfficerClient {
    pub(super) async fn connect(server: &str, tls: &Path) -> Result<Self, StatusError> {
        let client = connect_access(server, tls).await?;
        Ok(Self { server: server.to_owned(), tls: tls.to_owned(), client })
    }

    /// Everything that officers have asked for, the rules and the node.
    pub(super) async fn approvals(&mut self) -> Result<proto::ListApprovalsResponse, StatusError> {
        let answer = self.client.list_approvals(with_deadline(proto::ListApprovalsRequest {})).await;
        Ok(answer.map_err(|status| refused(&self.server, &status))?.into_inner())
    }

    /// One request.
    pub(super) async fn approval(&mut self, id: RequestId) -> Result<proto::Approval, StatusError> {
        let request = proto::GetApprovalRequest { id: id.as_bytes().to_vec() };
        let answer = self.client.get_approval(with_deadline(request)).await;
        let answer = answer.map_err(|status| refused(&self.server, &status))?.into_inner();
        answer.approval.ok_or_else(|| self.unfit("it answered without the request"))
    }

    /// Asks for the approval of others, signed.
    pub(super) async fn request(
        &mut self,
        act: &ProtectedAction,
        valid_for: Option<Duration>,
    ) -> Result<proto::Approval, StatusError> {
        let known = self.approvals().await?;
        let longest = known.rules.map_or(0, |rules| rules.valid_for_seconds);
        let expires = now() + valid_for.map_or(longest, |valid| valid.as_secs());
        let mut bytes = [0; 8];
        aws_lc_rs::rand::fill(&mut bytes).map_err(|e| self.unfit(e))?;
        let id = RequestId::from_bytes(bytes);
        let (officer, key) = (officer_of(&self.tls)?, key_of(&self.tls)?);
        let statement = ApprovalStatement::request(&known.node, id, &officer, expires, act);
        let signature = key.sign(statement.as_bytes()).map_err(|e| self.unfit(e))?;
        let expires = Some(Timestamp { seconds: i64::try_from(expires).unwrap_or(i64::MAX), nanos: 0 });
        let request = proto::RequestApprovalRequest { id: bytes.to_vec(), act: act.to_json(), expires, signature };
        let answer = self.client.request_approval(with_deadline(request)).await;
        let answer = answer.map_err(|status| refused(&self.server, &status))?.into_inner();
        answer.approval.ok_or_else(|| self.unfit("it answered without the request"))
    }

    /// Says yes or no to what was seen, signed.
    pub(super) async fn decide(&mut self, seen: &Seen, verdict: &Verdict) -> Result<proto::Approval, StatusError> {
        let (officer, key) = (officer_of(&self.tls)?, key_of(&self.tls)?);
        let statement = ApprovalStatement::decision(&seen.node, seen.id, &officer, &seen.statement, verdict);
        let signature = key.sign(statement.as_bytes()).map_err(|e| self.unfit(e))?;
        let (approve, reason) = match verdict {
            Verdict::Approve => (true, String::new()),
            Verdict::Reject(reason) => (false, reason.clone()),
        };
        let request = proto::DecideApprovalRequest { id: seen.id.as_bytes().to_vec(), approve, reason, signature };
        let answer = self.client.decide_approval(with_deadline(request)).await;
        let answer = answer.map_err(|status| refused(&self.server, &status))?.into_inner();
        answer.approval.ok_or_else(|| self.unfit("it answered without the request"))
    }

    /// Uses up the approval of a ceremony.
    pub(super) async fn use_approval(
        &mut self,
        id: RequestId,
        file_sha256: &[u8; 32],
    ) -> Result<proto::Approval, StatusError> {
        let request = proto::UseApprovalRequest { id: id.as_bytes().to_vec(), file_sha256: file_sha256.to_vec() };
        let answer = self.client.use_approval(with_deadline(request)).await;
        let answer = answer.map_err(|status| refused(&self.server, &status))?.into_inner();
        answer.approval.ok_or_else(|| self.unfit("it answered without the request"))
    }

    /// Has a ceremony put into the audit log.
    pub(super) async fn record_ceremony(&mut self, request: proto::RecordCeremonyRequest) -> Result<(), StatusError> {
        let answer = self.client.record_ceremony(with_deadline(request)).await;
        answer.map(drop).map_err(|status| refused(&self.server, &status))
    }

    /// The audit log from a byte on, part by part.
    pub(super) async fn read_audit_log(
        &mut self,
        offset: u64,
        mut take: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<(), StatusError> {
        let answer = self.client.read_audit_log(proto::ReadAuditLogRequest { offset }).await;
        let mut parts = answer.map_err(|status| refused(&self.server, &status))?.into_inner();
        while let Some(part) = parts.message().await.map_err(|status| refused(&self.server, &status))? {
            take(&part.bytes).map_err(|e| self.unfit(format!("writing the copy: {e}")))?;
        }
        Ok(())
    }

    /// Everybody who is known.
    pub(super) async fn callers(&mut self) -> Result<proto::ListCallersResponse, StatusError> {
        let answer = self.client.list_callers(with_deadline(proto::ListCallersRequest {})).await;
        Ok(answer.map_err(|status| refused(&self.server, &status))?.into_inner())
    }

    /// Loads identities.
    pub(super) async fn load_identities(
        &mut self,
        request: proto::LoadIdentitiesRequest,
    ) -> Result<proto::IdentityRange, StatusError> {
        let answer = self.client.load_identities(with_deadline(request)).await;
        let answer = answer.map_err(|status| refused(&self.server, &status))?.into_inner();
        answer.range.ok_or_else(|| self.unfit("it answered without the range"))
    }

    /// What is loaded.
    pub(super) async fn identities(&mut self) -> Result<Vec<proto::IdentityRange>, StatusError> {
        let answer = self.client.list_identities(with_deadline(proto::ListIdentitiesRequest {})).await;
        Ok(answer.map_err(|status| refused(&self.server, &status))?.into_inner().ranges)
    }

    /// Has a certificate made for somebody: for the key of a request, or for one that is made here and stays here.
    pub(super) async fn enroll(
        &mut self,
        caller: &Caller,
        csr: Option<&Path>,
        days: u32,
        out: &Path,
    ) -> Result<Vec<PathBuf>, StatusError> {
        let [certificate_path, ca_path, key_path] = ["certificate.pem", "ca.pem", "key.pem"].map(|name| out.join(name));
        let mut paths = vec![certificate_path.clone(), ca_path.clone()];
        let (csr, key) = match csr {
            Some(path) => (request_in(path)?, None),
            None => {
                paths.push(key_path.clone());
                let key = TlsKey::generate().map_err(|e| self.unfit(e))?;
                (self.request_for(&key)?, Some(key))
            }
        };
        paths.iter().try_for_each(|path| must_be_new(path)).map_err(unwritable)?;
        let (role, name) = (caller.role().to_string(), caller.name().to_owned());
        let answer =
            self.client.enroll_caller(with_deadline(proto::EnrollCallerRequest { role, name, csr, days })).await;
        let made = answer.map_err(|status| refused(&self.server, &status))?.into_inner().certificate;
        let made = made.ok_or_else(|| self.unfit("it answered without the certificate"))?;
        make_directory(out).map_err(unwritable)?;
        if let Some(key) = key {
            // Exposed to be written where only its owner may read it.
            write_new_private(&key_path, key.pem().expose()).map_err(unwritable)?;
        }
        write_new(&certificate_path, made.certificate_pem.as_bytes()).map_err(unwritable)?;
        write_new(&ca_path, made.authority_pem.as_bytes()).map_err(unwritable)?;
        Ok(paths)
    }

    /// Another certificate for the caller: for the same key, in the place of the old one, or for a new key in another directory.
    pub(super) async fn renew(&mut self, out: Option<&Path>) -> Result<(Vec<PathBuf>, u64), StatusError> {
        let key = match out {
            Some(_) => TlsKey::generate().map_err(|e| self.unfit(e))?,
            None => key_of(&self.tls)?,
        };
        let paths = |dir: &Path| ["key.pem", "certificate.pem", "ca.pem"].map(|name| dir.join(name));
        if let Some(out) = out {
            paths(out).iter().try_for_each(|path| must_be_new(path)).map_err(unwritable)?;
        }
        let csr = self.request_for(&key)?;
        let answer = self.client.renew_certificate(with_deadline(proto::RenewCertificateRequest { csr })).await;
        let made = answer.map_err(|status| refused(&self.server, &status))?.into_inner().certificate;
        let made = made.ok_or_else(|| self.unfit("it answered without the certificate"))?;
        let until = made.not_after.map_or(0, |time| u64::try_from(time.seconds).unwrap_or_default());
        let Some(out) = out else {
            let path = self.tls.join("certificate.pem");
            replace(&path, made.certificate_pem.as_bytes()).map_err(unwritable)?;
            return Ok((vec![path], until));
        };
        make_directory(out).map_err(unwritable)?;
        let [key_path, certificate_path, ca_path] = paths(out);
        // Exposed to be written where only its owner may read it.
        write_new_private(&key_path, key.pem().expose()).map_err(unwritable)?;
        write_new(&certificate_path, made.certificate_pem.as_bytes()).map_err(unwritable)?;
        write_new(&ca_path, made.authority_pem.as_bytes()).map_err(unwritable)?;
        Ok((paths(out).to_vec(), until))
    }

    fn request_for(&self, key: &TlsKey) -> Result<Vec<u8>, StatusError> {
        let document = access_request(key).map_err(|e| self.unfit(e))?;
        let signature = key.sign(document.to_be_signed()).map_err(|e| self.unfit(e))?;
        Ok(document.assemble(&signature).map_err(|e| self.unfit(e))?.as_der().to_vec())
    }

    fn unfit(&self, why: impl std::fmt::Display) -> StatusError {
        StatusError::Refused { server: self.server.clone(), message: why.to_string() }
    }
}

/// A request that was looked at: what it says is what its officer has signed.
pub(super) struct Seen {
    pub(super) id: RequestId,
    pub(super) act: ProtectedAction,
    /// Who has asked for it.
    pub(super) officer: OfficerName,
    /// Seconds since the Unix epoch; as he has signed it.
    pub(super) expires: u64,
    node: String,
    statement: ApprovalStatement,
}

impl Seen {
    /// Puts the officer's statement together from what is shown, and verifies his signature over it: the daemon is not believed.
    pub(super) fn of(node: &str, approval: &proto::Approval, authorities: &[PublicKey]) -> Result<Self, StatusError> {
        let wrong = |why: String| StatusError::Unfit(format!("the request {}: {why}", approval.id));
        let id: RequestId = approval.id.parse().map_err(|e: crate::names::NameError| wrong(e.to_string()))?;
        let act = ProtectedAction::from_json(&approval.act).map_err(wrong)?;
        let requested = approval.requested.as_ref().ok_or_else(|| wrong("it is not signed".to_owned()))?;
        let certificate = verify_caller(&requested.certificate, authorities).map_err(|e| wrong(e.to_string()))?;
        let Caller::Officer(officer) = certificate.caller else {
            return Err(wrong("it is not signed by an officer".to_owned()));
        };
        let expires = approval.expires.map_or(0, |time| u64::try_from(time.seconds).unwrap_or_default());
        let statement = ApprovalStatement::request(node, id, &officer, expires, &act);
        if requested.officer != officer.as_str() || requested.statement != statement.as_str() {
            return Err(wrong("what is shown is not what its officer has signed".to_owned()));
        }
        verify_statement(statement.as_bytes(), &requested.signature, &requested.certificate).map_err(wrong)?;
        Ok(Self { id, act, officer, expires, node: node.to_owned(), statement })
    }

    /// Who has approved it, if what he has signed is just that.
    pub(super) fn approved_by(&self, signed: &proto::OfficerSignature) -> Result<OfficerName, String> {
        let certificate = caller_of(&signed.certificate).map_err(|e| e.to_string())?;
        let Caller::Officer(officer) = certificate.caller else {
            return Err("an approval is not signed by an officer".to_owned());
        };
        let statement = ApprovalStatement::decision(&self.node, self.id, &officer, &self.statement, &Verdict::Approve);
        if signed.officer != officer.as_str() || signed.statement != statement.as_str() {
            return Err(format!("what {officer} has signed is not an approval of this request"));
        }
        verify_statement(statement.as_bytes(), &signed.signature, &signed.certificate)?;
        Ok(officer)
    }

    /// By which people compare what they see.
    pub(super) fn hash(&self) -> String {
        self.statement.hash()
    }
}

/// Seconds until the caller's certificate ends.
pub(super) fn life_left(tls: &Path) -> Result<u64, StatusError> {
    Ok(caller_of(&certificate_of(tls)?).map_err(|e| StatusError::Tls(e.to_string()))?.not_after.saturating_sub(now()))
}

fn officer_of(tls: &Path) -> Result<OfficerName, StatusError> {
    let certificate = caller_of(&certificate_of(tls)?).map_err(|e| StatusError::Tls(e.to_string()))?;
    match certificate.caller {
        Caller::Officer(officer) => Ok(officer),
        other => {
            Err(StatusError::Tls(format!("{} is the certificate of the {other}, not of an officer", tls.display())))
        }
    }
}

fn certificate_of(tls: &Path) -> Result<Vec<u8>, StatusError> {
    let path = tls.join("certificate.pem");
    let failed = |e: &dyn std::fmt::Display| StatusError::Tls(format!("{}: {e}", path.display()));
    let pem = std::fs::read(&path).map_err(|e| failed(&e))?;
    let (_, der) = der::pem::decode_vec(&pem).map_err(|e| failed(&e))?;
    Ok(der)
}

/// Who certifies callers.
pub(super) fn authority_of(tls: &Path) -> Result<PublicKey, StatusError> {
    let path = tls.join("ca.pem");
    let failed = |e: &dyn std::fmt::Display| StatusError::Tls(format!("{}: {e}", path.display()));
    let pem = std::fs::read_to_string(&path).map_err(|e| failed(&e))?;
    let authority = IssuerCertificate::from_pem_alone(&pem).map_err(|e| failed(&e))?;
    Ok(authority.public_key().clone())
}

fn key_of(tls: &Path) -> Result<TlsKey, StatusError> {
    let path = tls.join("key.pem");
    let failed = |e: &dyn std::fmt::Display| StatusError::Tls(format!("{}: {e}", path.display()));
    let file = open_private(&path).map_err(|e| failed(&e))?;
    let mut pem = SecretBytes::new(Vec::with_capacity(8192));
    file.take(8192).read_to_end(pem.expose_mut()).map_err(|e| failed(&e))?;
    TlsKey::from_pem(pem).map_err(|e| failed(&e))
}

/// The request (PKCS#10, DER) in a file of PEM.
pub(super) fn request_in(path: &Path) -> Result<Vec<u8>, StatusError> {
    let failed = |e: &dyn std::fmt::Display| StatusError::Unfit(format!("{}: {e}", path.display()));
    let pem = std::fs::read(path).map_err(|e| failed(&e))?;
    crate::certificate::verify_csr_pem(&pem).map_err(|e| failed(&e))?;
    Ok(der::pem::decode_vec(&pem).map_err(|e| failed(&e))?.1)
}

fn unwritable(error: super::FileError) -> StatusError {
    StatusError::Unfit(error.to_string())
}
