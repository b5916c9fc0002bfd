//! What an officer signs: a text that names the act in full, with the key of his TLS certificate.

use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::RequestId;
use super::action::ProtectedAction;
use crate::certificate::public_key_of;
use crate::keys::{SignatureAlgorithm, sha256};
use crate::names::OfficerName;

/// What is signed, as bytes: requests and decisions can never be taken for each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApprovalStatement(String);

/// Of the year 9999: later ones have no RFC 3339 form.
const LAST_SECOND: u64 = 253_402_300_799;
const TITLE: &str = "spp officer statement v1";

impl ApprovalStatement {
    /// "I ask for this act on this node, until then."
    pub fn request(node: &str, id: RequestId, officer: &OfficerName, expires: u64, act: &ProtectedAction) -> Self {
        let at = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(expires.min(LAST_SECOND)));
        let content = act.to_json();
        Self(format!(
            "{TITLE}\nnode      {node}\nverb      request\nrequest   {id}\nofficer   {officer}\nexpires   {at}\ncontent   {content}\n"
        ))
    }

    /// "I approve", or "I reject", of what that request says, to the last byte.
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

    /// SHA-256 of it in hex, by which people compare what they see.
    pub fn hash(&self) -> String {
        hex::encode(sha256(self.as_bytes()))
    }
}

/// What an officer says to another's request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It shall be done.
    Approve,
    /// It shall not be done, for that reason.
    Reject(String),
}

impl Verdict {
    /// As it is written.
    pub const fn verb(&self) -> &'static str {
        match self {
            Self::Approve => "approve",
            Self::Reject(_) => "reject",
        }
    }
}

/// A statement that an officer has signed, with all that is needed to verify it ever after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedStatement {
    /// Who.
    pub officer: OfficerName,
    /// When it came; seconds since the Unix epoch.
    pub at: u64,
    /// The text.
    pub statement: String,
    /// By the key of the certificate.
    pub signature: Vec<u8>,
    /// The officer's TLS certificate, DER.
    pub certificate: Vec<u8>,
}

impl SignedStatement {
    /// The statement as signed, if that certificate's key has signed it.
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

/// Whether the certificate's key has signed the text.
pub fn verify(statement: &[u8], signature: &[u8], certificate: &[u8]) -> Result<(), String> {
    let key = public_key_of(certificate).map_err(|e| e.to_string())?;
    let algorithm = SignatureAlgorithm::default_for(key.kind());
    key.verify(algorithm, statement, signature).map_err(|_| {
        "it is not signed with the key of the certificate, or of something else than was sent; ask again with sppctl".to_owned()
    })
}
