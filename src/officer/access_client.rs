//! gRPC client for the daemon's access service: approvals, callers, certificates, identities, audit log.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use prost_types::Timestamp;
use spp_format::approval::{ApprovalStatement, ProtectedAction, RequestId, Verdict, verify_statement};
use spp_format::certificate::{
    Caller, IssuerCertificate, access_request, parse_caller_certificate, verify_caller_certificate,
};
use spp_format::file_format::open_private;
use spp_format::keys::{PublicKey, TlsKey};
use spp_format::names::OfficerName;
use spp_format::secret::SecretBytes;
use spp_proto as proto;
use spp_proto::access_client::AccessClient;
use tonic::transport::Channel;

use super::files::{make_directory, must_be_new, replace, write_new, write_new_private};
pub(super) use super::now;
use super::status::{StatusError, call_error, connect_access, with_deadline};

/// A connection to the access service, with the caller's TLS key for signing statements.
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

    /// All approval requests, the approval rules and the node name.
    pub(super) async fn approvals(&mut self) -> Result<proto::ListApprovalsResponse, StatusError> {
        let answer = self.client.list_approvals(with_deadline(proto::ListApprovalsRequest {})).await;
        Ok(answer.map_err(|status| call_error(&self.server, &status))?.into_inner())
    }

    /// One approval request.
    pub(super) async fn approval(&mut self, id: RequestId) -> Result<proto::Approval, StatusError> {
        let request = proto::GetApprovalRequest { id: id.as_bytes().to_vec() };
        let answer = self.client.get_approval(with_deadline(request)).await;
        let answer = answer.map_err(|status| call_error(&self.server, &status))?.into_inner();
        answer.approval.ok_or_else(|| self.failure("response without the approval request"))
    }

    /// Submits a signed approval request.
    pub(super) async fn request(
        &mut self,
        action: &ProtectedAction,
        valid_for: Option<Duration>,
    ) -> Result<proto::Approval, StatusError> {
        let known = self.approvals().await?;
        let longest = known.rules.map_or(0, |rules| rules.valid_for_seconds);
        let expires = now() + valid_for.map_or(longest, |valid| valid.as_secs());
        let mut bytes = [0; 8];
        aws_lc_rs::rand::fill(&mut bytes).map_err(|e| self.failure(e))?;
        let id = RequestId::from_bytes(bytes);
        let (officer, key) = (officer_name(&self.tls)?, load_key(&self.tls)?);
        let statement = ApprovalStatement::request(&known.node, id, &officer, expires, action);
        let signature = key.sign(statement.as_bytes()).map_err(|e| self.failure(e))?;
        let expires = Some(Timestamp { seconds: i64::try_from(expires).unwrap_or(i64::MAX), nanos: 0 });
        let request =
            proto::RequestApprovalRequest { id: bytes.to_vec(), action: action.to_json(), expires, signature };
        let answer = self.client.request_approval(with_deadline(request)).await;
        let answer = answer.map_err(|status| call_error(&self.server, &status))?.into_inner();
        answer.approval.ok_or_else(|| self.failure("response without the approval request"))
    }

    /// Submits a signed decision on a verified request.
    pub(super) async fn decide(
        &mut self,
        request: &VerifiedRequest,
        verdict: &Verdict,
    ) -> Result<proto::Approval, StatusError> {
        let (officer, key) = (officer_name(&self.tls)?, load_key(&self.tls)?);
        let statement = ApprovalStatement::decision(&request.node, request.id, &officer, &request.statement, verdict);
        let signature = key.sign(statement.as_bytes()).map_err(|e| self.failure(e))?;
        let (approve, reason) = match verdict {
            Verdict::Approve => (true, String::new()),
            Verdict::Reject(reason) => (false, reason.clone()),
        };
        let request = proto::DecideApprovalRequest { id: request.id.as_bytes().to_vec(), approve, reason, signature };
        let answer = self.client.decide_approval(with_deadline(request)).await;
        let answer = answer.map_err(|status| call_error(&self.server, &status))?.into_inner();
        answer.approval.ok_or_else(|| self.failure("response without the approval request"))
    }

    /// Uses up the approval of a ceremony.
    pub(super) async fn use_approval(
        &mut self,
        id: RequestId,
        file_sha256: &[u8; 32],
    ) -> Result<proto::Approval, StatusError> {
        let request = proto::UseApprovalRequest { id: id.as_bytes().to_vec(), file_sha256: file_sha256.to_vec() };
        let answer = self.client.use_approval(with_deadline(request)).await;
        let answer = answer.map_err(|status| call_error(&self.server, &status))?.into_inner();
        answer.approval.ok_or_else(|| self.failure("response without the approval request"))
    }

    /// Records a ceremony in the audit log.
    pub(super) async fn record_ceremony(&mut self, request: proto::RecordCeremonyRequest) -> Result<(), StatusError> {
        let answer = self.client.record_ceremony(with_deadline(request)).await;
        answer.map(drop).map_err(|status| call_error(&self.server, &status))
    }

    /// Streams the audit log from a byte offset to `take`.
    pub(super) async fn read_audit_log(
        &mut self,
        offset: u64,
        mut take: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<(), StatusError> {
        let answer = self.client.read_audit_log(proto::ReadAuditLogRequest { offset }).await;
        let mut parts = answer.map_err(|status| call_error(&self.server, &status))?.into_inner();
        while let Some(part) = parts.message().await.map_err(|status| call_error(&self.server, &status))? {
            take(&part.data).map_err(|e| self.failure(format!("writing the copy: {e}")))?;
        }
        Ok(())
    }

    /// All callers: certificates, revocations, stations.
    pub(super) async fn callers(&mut self) -> Result<proto::ListCallersResponse, StatusError> {
        let answer = self.client.list_callers(with_deadline(proto::ListCallersRequest {})).await;
        Ok(answer.map_err(|status| call_error(&self.server, &status))?.into_inner())
    }

    /// Loads a range of identities.
    pub(super) async fn load_identities(
        &mut self,
        request: proto::LoadIdentitiesRequest,
    ) -> Result<proto::IdentityRange, StatusError> {
        let answer = self.client.load_identities(with_deadline(request)).await;
        let answer = answer.map_err(|status| call_error(&self.server, &status))?.into_inner();
        answer.range.ok_or_else(|| self.failure("response without the identity range"))
    }

    /// Loaded identity ranges.
    pub(super) async fn identities(&mut self) -> Result<Vec<proto::IdentityRange>, StatusError> {
        let answer = self.client.list_identities(with_deadline(proto::ListIdentitiesRequest {})).await;
        Ok(answer.map_err(|status| call_error(&self.server, &status))?.into_inner().ranges)
    }

    /// Enrols a caller, for the key of a request or for a key generated here, and writes the files.
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
            Some(path) => (load_csr(path)?, None),
            None => {
                paths.push(key_path.clone());
                let key = TlsKey::generate().map_err(|e| self.failure(e))?;
                (self.csr_for(&key)?, Some(key))
            }
        };
        paths.iter().try_for_each(|path| must_be_new(path)).map_err(write_error)?;
        let (role, name) = (caller.role().to_string(), caller.name().to_owned());
        let answer =
            self.client.enroll_caller(with_deadline(proto::EnrollCallerRequest { role, name, csr, days })).await;
        let issued = answer.map_err(|status| call_error(&self.server, &status))?.into_inner().certificate;
        let issued = issued.ok_or_else(|| self.failure("response without the certificate"))?;
        make_directory(out).map_err(write_error)?;
        if let Some(key) = key {
            // Exposed to be written to a file with mode 0600.
            write_new_private(&key_path, key.pem().expose()).map_err(write_error)?;
        }
        write_new(&certificate_path, issued.certificate_pem.as_bytes()).map_err(write_error)?;
        write_new(&ca_path, issued.authority_pem.as_bytes()).map_err(write_error)?;
        Ok(paths)
    }

    /// Renews the caller's certificate: replaces it for the same key, or writes a new key and certificate to `out`.
    pub(super) async fn renew(&mut self, out: Option<&Path>) -> Result<(Vec<PathBuf>, u64), StatusError> {
        let key = match out {
            Some(_) => TlsKey::generate().map_err(|e| self.failure(e))?,
            None => load_key(&self.tls)?,
        };
        let paths = |dir: &Path| ["key.pem", "certificate.pem", "ca.pem"].map(|name| dir.join(name));
        if let Some(out) = out {
            paths(out).iter().try_for_each(|path| must_be_new(path)).map_err(write_error)?;
        }
        let csr = self.csr_for(&key)?;
        let answer = self.client.renew_certificate(with_deadline(proto::RenewCertificateRequest { csr })).await;
        let issued = answer.map_err(|status| call_error(&self.server, &status))?.into_inner().certificate;
        let issued = issued.ok_or_else(|| self.failure("response without the certificate"))?;
        let until = issued.not_after.map_or(0, |time| u64::try_from(time.seconds).unwrap_or_default());
        let Some(out) = out else {
            let path = self.tls.join("certificate.pem");
            replace(&path, issued.certificate_pem.as_bytes()).map_err(write_error)?;
            return Ok((vec![path], until));
        };
        make_directory(out).map_err(write_error)?;
        let [key_path, certificate_path, ca_path] = paths(out);
        // Exposed to be written to a file with mode 0600.
        write_new_private(&key_path, key.pem().expose()).map_err(write_error)?;
        write_new(&certificate_path, issued.certificate_pem.as_bytes()).map_err(write_error)?;
        write_new(&ca_path, issued.authority_pem.as_bytes()).map_err(write_error)?;
        Ok((paths(out).to_vec(), until))
    }

    fn csr_for(&self, key: &TlsKey) -> Result<Vec<u8>, StatusError> {
        let document = access_request(key).map_err(|e| self.failure(e))?;
        let signature = key.sign(document.to_be_signed()).map_err(|e| self.failure(e))?;
        Ok(document.assemble(&signature).map_err(|e| self.failure(e))?.as_der().to_vec())
    }

    fn failure(&self, reason: impl std::fmt::Display) -> StatusError {
        StatusError::Refused { server: self.server.clone(), message: reason.to_string() }
    }
}

/// An approval request whose content matches its officer's signature.
pub(super) struct VerifiedRequest {
    pub(super) id: RequestId,
    pub(super) action: ProtectedAction,
    /// Officer who requested it.
    pub(super) officer: OfficerName,
    /// Signed expiry time, in seconds since the Unix epoch.
    pub(super) expires: u64,
    node: String,
    statement: ApprovalStatement,
}

impl VerifiedRequest {
    /// Rebuilds the officer's statement from the displayed content and verifies the signature over it, because the daemon is not
    /// trusted.
    pub(super) fn verify(
        node: &str,
        approval: &proto::Approval,
        authorities: &[PublicKey],
    ) -> Result<Self, StatusError> {
        let invalid = |reason: String| StatusError::Invalid(format!("request {}: {reason}", approval.id));
        let id: RequestId = approval.id.parse().map_err(|e: spp_format::names::NameError| invalid(e.to_string()))?;
        let action = ProtectedAction::from_json(&approval.action).map_err(invalid)?;
        let requested = approval.requested.as_ref().ok_or_else(|| invalid("not signed".to_owned()))?;
        let certificate =
            verify_caller_certificate(&requested.certificate, authorities).map_err(|e| invalid(e.to_string()))?;
        let Caller::Officer(officer) = certificate.caller else {
            return Err(invalid("not signed by an officer".to_owned()));
        };
        let expires = approval.expires.map_or(0, |time| u64::try_from(time.seconds).unwrap_or_default());
        let statement = ApprovalStatement::request(node, id, &officer, expires, &action);
        if requested.officer != officer.as_str() || requested.statement != statement.as_str() {
            return Err(invalid("the content does not match what its officer signed".to_owned()));
        }
        verify_statement(statement.as_bytes(), &requested.signature, &requested.certificate).map_err(invalid)?;
        Ok(Self { id, action, officer, expires, node: node.to_owned(), statement })
    }

    /// The officer who approved this request; an error if the signature is not for this approval.
    pub(super) fn approved_by(&self, signed: &proto::OfficerSignature) -> Result<OfficerName, String> {
        let certificate = parse_caller_certificate(&signed.certificate).map_err(|e| e.to_string())?;
        let Caller::Officer(officer) = certificate.caller else {
            return Err("approval not signed by an officer".to_owned());
        };
        let statement = ApprovalStatement::decision(&self.node, self.id, &officer, &self.statement, &Verdict::Approve);
        if signed.officer != officer.as_str() || signed.statement != statement.as_str() {
            return Err(format!("the statement signed by {officer} is not an approval of this request"));
        }
        verify_statement(statement.as_bytes(), &signed.signature, &signed.certificate)?;
        Ok(officer)
    }

    /// SHA-256 of the signed statement, which officers compare over another channel.
    pub(super) fn hash(&self) -> String {
        self.statement.hash()
    }
}

/// Seconds until the caller's certificate expires.
pub(super) fn certificate_seconds_left(tls: &Path) -> Result<u64, StatusError> {
    Ok(parse_caller_certificate(&load_certificate(tls)?)
        .map_err(|e| StatusError::Tls(e.to_string()))?
        .not_after
        .saturating_sub(now()))
}

fn officer_name(tls: &Path) -> Result<OfficerName, StatusError> {
    let certificate = parse_caller_certificate(&load_certificate(tls)?).map_err(|e| StatusError::Tls(e.to_string()))?;
    match certificate.caller {
        Caller::Officer(officer) => Ok(officer),
        other => {
            Err(StatusError::Tls(format!("{} has the certificate of the {other}, not of an officer", tls.display())))
        }
    }
}

fn load_certificate(tls: &Path) -> Result<Vec<u8>, StatusError> {
    let path = tls.join("certificate.pem");
    let failed = |e: &dyn std::fmt::Display| StatusError::Tls(format!("{}: {e}", path.display()));
    let pem = std::fs::read(&path).map_err(|e| failed(&e))?;
    let (_, der) = der::pem::decode_vec(&pem).map_err(|e| failed(&e))?;
    Ok(der)
}

/// Public key of the CA that certifies callers, from ca.pem.
pub(super) fn load_authority(tls: &Path) -> Result<PublicKey, StatusError> {
    let path = tls.join("ca.pem");
    let failed = |e: &dyn std::fmt::Display| StatusError::Tls(format!("{}: {e}", path.display()));
    let pem = std::fs::read_to_string(&path).map_err(|e| failed(&e))?;
    let authority = IssuerCertificate::from_pem_with_default_algorithm(&pem).map_err(|e| failed(&e))?;
    Ok(authority.public_key().clone())
}

fn load_key(tls: &Path) -> Result<TlsKey, StatusError> {
    let path = tls.join("key.pem");
    let failed = |e: &dyn std::fmt::Display| StatusError::Tls(format!("{}: {e}", path.display()));
    let file = open_private(&path).map_err(|e| failed(&e))?;
    let mut pem = SecretBytes::new(Vec::with_capacity(8192));
    file.take(8192).read_to_end(pem.expose_mut()).map_err(|e| failed(&e))?;
    TlsKey::from_pem(pem).map_err(|e| failed(&e))
}

/// Reads a certificate request (PKCS#10) from a PEM file and returns its DER.
pub(super) fn load_csr(path: &Path) -> Result<Vec<u8>, StatusError> {
    let failed = |e: &dyn std::fmt::Display| StatusError::Invalid(format!("{}: {e}", path.display()));
    let pem = std::fs::read(path).map_err(|e| failed(&e))?;
    spp_format::certificate::verify_csr_pem(&pem).map_err(|e| failed(&e))?;
    Ok(der::pem::decode_vec(&pem).map_err(|e| failed(&e))?.1)
}

fn write_error(error: super::FileError) -> StatusError {
    StatusError::Invalid(error.to_string())
}
