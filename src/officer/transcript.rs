//! The transcript of a ceremony: a JSON file, and a text signed by the log key that contains the SHA-256 of the JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::Serialize;
use spp_format::keys::sha256;
use spp_format::names::{KeyName, OfficerName};
use spp_format::tlog::{LogKey, UnsignedText, verify_text};

use super::files::write_new;
use super::text::{escape_controls, format_time};
use super::{OfficerError, now};
use crate::hsm::{Ceremony, CheckpointKey, CreatedKey};

const TITLE: &str = "spp ceremony transcript v1";
/// Prefix of the line with the hash of the JSON.
const JSON: &str = "json        sha256:";

/// Record of one ceremony run.
#[derive(Debug, Serialize)]
pub struct Transcript {
    /// Program name and version.
    pub tool: String,
    /// Path of the ceremony file.
    pub file: String,
    /// SHA-256 of the ceremony file, in hex.
    pub file_sha256: String,
    /// Officers named on the command line.
    pub officers: Vec<OfficerName>,
    /// The approval, if the ceremony needed one.
    pub approval: Option<Approval>,
    /// Description of the PKCS#11 module.
    pub module: String,
    /// Token label.
    pub token_label: String,
    /// Token serial number.
    pub token_serial: String,
    /// Start time in seconds since the Unix epoch.
    pub begun: u64,
    /// End time in seconds since the Unix epoch.
    pub ended: u64,
    /// Whether the ceremony initialised the token.
    pub token_initialised: bool,
    /// Error that ended the ceremony; `None` if it completed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Completed steps, in order.
    pub keys: Vec<KeyReport>,
    /// Files that were written.
    pub files: Vec<PathBuf>,
}

/// Approval of a ceremony.
#[derive(Debug, Serialize)]
pub struct Approval {
    /// Request ID.
    pub request: String,
    /// Officer who requested it.
    pub requested_by: OfficerName,
    /// Officers who approved it.
    pub approved_by: Vec<OfficerName>,
    /// Signed statements, the request first, so that the approval can be verified without the daemon.
    pub statements: Vec<OfficerStatement>,
}

/// A statement signed by an officer.
#[derive(Debug, Serialize)]
pub struct OfficerStatement {
    /// Officer who signed.
    pub officer: OfficerName,
    /// Signed text.
    pub statement: String,
    /// Signature by the key of the certificate, in hex.
    pub signature: String,
    /// Certificate of the officer, PEM.
    pub certificate: String,
}

/// One completed step on one key.
#[derive(Debug, Serialize)]
pub struct KeyReport {
    /// What was done, for example `made` or `destroyed`.
    pub act: &'static str,
    /// Key name.
    pub name: KeyName,
    /// CKA_ID in hex.
    pub id: String,
    /// Time in seconds since the Unix epoch.
    pub at: u64,
    /// SHA-256 of the public key, or the check value of a secret key.
    pub fingerprint: String,
    /// Further details, as text.
    pub details: Vec<String>,
    /// Attributes of a new key, read back from the token.
    pub attributes: BTreeMap<String, String>,
}

/// Inputs of a transcript.
pub(super) struct TranscriptInput<'a> {
    pub(super) file: &'a Path,
    pub(super) file_hash: &'a [u8; 32],
    pub(super) officers: &'a [OfficerName],
    pub(super) approval: Option<Approval>,
}

impl Transcript {
    pub(super) fn begin(input: TranscriptInput<'_>, token: &Ceremony) -> Self {
        Self {
            tool: format!("sppctl {}", env!("CARGO_PKG_VERSION")),
            file: input.file.display().to_string(),
            file_sha256: hex::encode(input.file_hash),
            officers: input.officers.to_vec(),
            approval: input.approval,
            token_initialised: token.was_initialised(),
            module: token.module().to_owned(),
            token_label: token.token().label.clone(),
            token_serial: token.token().serial.clone(),
            begun: now(),
            ended: 0,
            failed: None,
            keys: Vec::new(),
            files: Vec::new(),
        }
    }

    /// Adds a new key.
    pub(super) fn add(&mut self, act: &'static str, key: &CreatedKey, fingerprint: String) -> &mut KeyReport {
        let report = self.add_step(act, &key.name, &key.id, fingerprint);
        report.attributes.clone_from(&key.attributes);
        report
    }

    /// Adds a step on an existing or destroyed key.
    pub(super) fn add_step(
        &mut self,
        act: &'static str,
        name: &KeyName,
        id: &[u8],
        fingerprint: String,
    ) -> &mut KeyReport {
        let (name, id, details, attributes) = (name.clone(), hex::encode(id), Vec::new(), BTreeMap::new());
        let next = self.keys.len();
        self.keys.push(KeyReport { act, name, id, at: now(), fingerprint, details, attributes });
        &mut self.keys[next]
    }

    /// The completed steps as one line.
    pub(super) fn completed_steps(&self) -> String {
        let steps: Vec<_> = self.keys.iter().map(|key| format!("{} {}", key.act, key.name)).collect();
        if steps.is_empty() { "nothing".to_owned() } else { steps.join(", ") }
    }

    /// Writes both files to `out`. Returns whether the text is signed; it is not if the token has no log key.
    pub(super) fn write(
        &mut self,
        out: &Path,
        token: &Ceremony,
        signer: Option<&CheckpointKey>,
    ) -> Result<bool, OfficerError> {
        let [json_path, text_path] = free_paths(out);
        self.ended = now();
        self.files.extend([json_path.clone(), text_path.clone()]);
        let json = serde_json::to_string_pretty(self).map_err(|e| OfficerError::Other(e.to_string()))?;
        write_new(&json_path, json.as_bytes())?;
        let other = |e: spp_format::tlog::TlogError| OfficerError::Other(e.to_string());
        let text = UnsignedText::new(TITLE, &self.text(json.as_bytes())).map_err(other)?;
        let Some(signer) = signer else {
            write_new(&text_path, text.unsigned().as_bytes())?;
            return Ok(false);
        };
        let signature = token.sign_text(signer, &text)?;
        write_new(&text_path, text.signed(&signer.key, &signature).map_err(other)?.as_bytes())?;
        Ok(true)
    }

    fn text(&self, json: &[u8]) -> String {
        let mut text = String::new();
        let officers: Vec<_> = self.officers.iter().map(OfficerName::as_str).collect();
        let officers = if officers.is_empty() { "not named".to_owned() } else { officers.join(", ") };
        // Writing to a String cannot fail.
        let mut row = |name: &str, value: &str| {
            let _ = writeln!(text, "{name:<11} {value}");
        };
        row("ceremony", &format!("{}, sha256:{}", self.file, self.file_sha256));
        row("officers", &officers);
        if let Some(Approval { request, requested_by, approved_by, .. }) = &self.approval {
            let others: Vec<_> = approved_by.iter().map(OfficerName::as_str).collect();
            row("approved", &format!("request {request} of {requested_by}, by {}", others.join(", ")));
        }
        row("tool", &self.tool);
        row("module", &self.module);
        let initialised = if self.token_initialised { ", initialised in this ceremony" } else { "" };
        row("token", &format!("{}, serial {}{initialised}", self.token_label, self.token_serial));
        row("begun", &format_time(self.begun));
        row("ended", &format_time(self.ended));
        if let Some(why) = &self.failed {
            row("failed", &escape_controls(why));
        }
        let _ = writeln!(text, "{JSON}{}", hex::encode(sha256(json)));
        for key in &self.keys {
            let _ = write!(
                text,
                "\nkey {}\n  {} at {}\n  CKA_ID       {}\n",
                key.name,
                key.act,
                format_time(key.at),
                key.id
            );
            let _ = writeln!(text, "  known by     {}", key.fingerprint);
            for detail in &key.details {
                let _ = writeln!(text, "  {detail}");
            }
            for (name, value) in &key.attributes {
                let _ = writeln!(text, "  {name:<12} {value}");
            }
        }
        let _ = writeln!(text, "\nfiles");
        for file in &self.files {
            let _ = writeln!(text, "  {}", file.display());
        }
        text
    }
}

/// `transcript.json` and `transcript.txt`, or the first pair `transcript-N` whose files do not exist.
fn free_paths(out: &Path) -> [PathBuf; 2] {
    let names = std::iter::once("transcript".to_owned()).chain((2..).map(|n: u32| format!("transcript-{n}")));
    let mut paths = names.map(|name| ["json", "txt"].map(|extension| out.join(format!("{name}.{extension}"))));
    let first = paths.next().unwrap_or_default();
    let is_free = |paths: &[PathBuf; 2]| paths.iter().all(|path| !path.exists());
    // The sequence is infinite, so `find` returns a pair.
    if is_free(&first) { first } else { paths.find(is_free).unwrap_or(first) }
}

/// A transcript with a valid signature.
#[derive(Debug, Serialize)]
pub struct VerifiedTranscript {
    /// Text without the signature.
    pub text: String,
    /// Origin of the log whose key signed it.
    pub signed_by: String,
    /// Whether the JSON file beside it has the hash in the text; `None` if there is no JSON file.
    pub json_fits: Option<bool>,
}

/// Verifies the signature of the text with the log's public key, and the JSON file beside it with the hash in the text.
pub fn verify_transcript(text: &Path, key: &LogKey) -> Result<VerifiedTranscript, OfficerError> {
    let failed = |problem: String| OfficerError::Other(format!("{}: {problem}", text.display()));
    let note = std::fs::read(text).map_err(|e| failed(e.to_string()))?;
    let verified = verify_text(&note, key).map_err(|e| failed(e.to_string()))?;
    if verified.lines().next() != Some(TITLE) {
        return Err(failed("not a ceremony transcript, although the signature is valid".to_owned()));
    }
    let named = verified.lines().find_map(|line| line.strip_prefix(JSON)).map(str::to_owned);
    let json = std::fs::read(text.with_extension("json")).ok();
    let json_fits = json.map(|json| named.is_some_and(|named| named == hex::encode(sha256(&json))));
    Ok(VerifiedTranscript { text: verified, signed_by: key.origin().to_string(), json_fits })
}
