//! Officer statements: the texts that officers sign with the key of their TLS certificate. Each contains the whole action.

use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::action::ProtectedAction;
use super::request_id::RequestId;
use crate::certificate::certificate_public_key;
use crate::keys::{SignatureAlgorithm, sha256};
use crate::names::OfficerName;

/// The text to be signed. The `verb` line separates requests from decisions, so neither can be mistaken for the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApprovalStatement(String);

/// The last second of the year 9999. Later times have no RFC 3339 form.
const LAST_SECOND: u64 = 253_402_300_799;
const TITLE: &str = "spp officer statement v1";

impl ApprovalStatement {
    /// The statement that requests an action on this node, until `expires`.
    pub fn request(node: &str, id: RequestId, officer: &OfficerName, expires: u64, action: &ProtectedAction) -> Self {
        let at = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(expires.min(LAST_SECOND)));
        let content = action.to_json();
        Self(format!(
            "{TITLE}\nnode      {node}\nverb      request\nrequest   {id}\nofficer   {officer}\nexpires   {at}\ncontent   {content}\n"
        ))
    }

    /// The statement that approves or rejects a request. It contains the SHA-256 of the request statement.
    pub fn decision(node: &str, id: RequestId, officer: &OfficerName, request: &Self, verdict: &Verdict) -> Self {
        let (hash, verb) = (request.hash(), verdict.verb());
        let mut text = format!(
            "{TITLE}\nnode      {node}\nverb      {verb}\nrequest   {id}\nofficer   {officer}\nof        sha256:{hash}\n"
        );
        if let Verdict::Reject(reason) = verdict {
            text.push_str(&format!("reason    {reason}\n"));
        }
        Self(text)
    }

    /// The bytes to be signed.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// SHA-256 of the text in hex. Officers compare it before they approve.
    pub fn hash(&self) -> String {
        hex::encode(sha256(self.as_bytes()))
    }
}

/// An officer's decision on a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Approve.
    Approve,
    /// Reject, with this reason.
    Reject(String),
}

impl Verdict {
    /// The verb in the statement.
    pub const fn verb(&self) -> &'static str {
        match self {
            Self::Approve => "approve",
            Self::Reject(_) => "reject",
        }
    }
}

/// A signed statement, with everything that is needed to verify it later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedStatement {
    /// The signer.
    pub officer: OfficerName,
    /// Time of receipt; seconds since the Unix epoch.
    pub at: u64,
    /// The text.
    pub statement: String,
    /// The signature by the certificate's key.
    pub signature: Vec<u8>,
    /// The officer's TLS certificate, DER.
    pub certificate: Vec<u8>,
}

impl SignedStatement {
    /// Verifies the signature with the certificate's key.
    pub fn verified(
        officer: OfficerName,
        at: u64,
        statement: &ApprovalStatement,
        signature: &[u8],
        certificate: &[u8],
    ) -> Result<Self, String> {
        verify(statement.as_bytes(), signature, certificate)?;
        let (signature, certificate) = (signature.to_vec(), certificate.to_vec());
        Ok(Self { officer, at, statement: statement.0.clone(), signature, certificate })
    }
}

/// Verifies that the certificate's key has signed the statement.
pub fn verify(statement: &[u8], signature: &[u8], certificate: &[u8]) -> Result<(), String> {
    let key = certificate_public_key(certificate).map_err(|e| e.to_string())?;
    let algorithm = SignatureAlgorithm::default_for(key.kind());
    key.verify(algorithm, statement, signature).map_err(|_| {
        "signature does not match the statement and the certificate's key; repeat the command with sppctl".to_owned()
    })
}
