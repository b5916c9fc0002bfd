//! The transcript of a ceremony: JSON for programs, and a text for people that the log's key signs and that names the JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::files::write_new;
use super::text::{at, printable};
use super::{OfficerError, now};
use crate::hsm::{Ceremony, CheckpointKey, CreatedKey};
use crate::keys::{KeyKind, SignatureAlgorithm, sha256};
use crate::names::{KeyName, OfficerName};
use crate::tlog::{LogKey, UnsignedText, verify_text};

const TITLE: &str = "spp ceremony transcript v1";
/// What the text says before the hash of the JSON.
const JSON: &str = "json        sha256:";

/// What a ceremony made.
#[derive(Debug, Serialize)]
pub struct Transcript {
    /// This program's version.
    pub tool: String,
    /// The ceremony file's name.
    pub file: String,
    /// SHA-256 of it.
    pub file_sha256: String,
    /// Who held it.
    pub officers: Vec<OfficerName>,
    /// Who else approved it, where one officer alone may not hold it.
    pub approval: Option<Approval>,
    /// The module's description of itself.
    pub module: String,
    /// The token's label.
    pub token_label: String,
    /// The token's serial number.
    pub token_serial: String,
    /// Seconds since the Unix epoch.
    pub begun: u64,
    /// Seconds since the Unix epoch.
    pub ended: u64,
    /// Whether the ceremony began with initialising the token.
    pub token_initialised: bool,
    /// Why it failed after what is told here; none if it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// What was done to keys, in the order in which it was done.
    pub keys: Vec<KeyReport>,
    /// The files that were written.
    pub files: Vec<PathBuf>,
}

/// The approval of a ceremony.
#[derive(Debug, Serialize)]
pub struct Approval {
    /// The request's name.
    pub request: String,
    /// Who asked for it.
    pub requested_by: OfficerName,
    /// Which others approved it.
    pub approved_by: Vec<OfficerName>,
    /// What they have signed, the request first: so that it can be verified ever after without the daemon.
    pub statements: Vec<OfficerStatement>,
}

/// What an officer has signed.
#[derive(Debug, Serialize)]
pub struct OfficerStatement {
    /// Who.
    pub officer: OfficerName,
    /// The text.
    pub statement: String,
    /// By the key of the certificate, in hex.
    pub signature: String,
    /// PEM.
    pub certificate: String,
}

/// One act on one key.
#[derive(Debug, Serialize)]
pub struct KeyReport {
    /// What was done: `made`, `destroyed` and so on.
    pub act: &'static str,
    /// Its name.
    pub name: KeyName,
    /// Its CKA_ID in hex.
    pub id: String,
    /// When; seconds since the Unix epoch.
    pub at: u64,
    /// Its public key's hash, or its check value.
    pub fingerprint: String,
    /// What else there is to know.
    pub details: Vec<String>,
    /// The attributes of a new one as the token showed them.
    pub attributes: BTreeMap<String, String>,
}

/// What a transcript is of.
pub(super) struct Subject<'a> {
    pub(super) file: &'a Path,
    pub(super) file_hash: &'a [u8; 32],
    pub(super) officers: &'a [OfficerName],
    pub(super) approval: Option<Approval>,
}

impl Transcript {
    pub(super) fn begin(of: Subject<'_>, token: &Ceremony) -> Self {
        Self {
            tool: format!("sppctl {}", env!("CARGO_PKG_VERSION")),
            file: of.file.display().to_string(),
            file_sha256: hex::encode(of.file_hash),
            officers: of.officers.to_vec(),
            approval: of.approval,
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

    /// A new key.
    pub(super) fn add(&mut self, act: &'static str, key: &CreatedKey, fingerprint: String) -> &mut KeyReport {
        let report = self.add_act(act, &key.name, &key.id, fingerprint);
        report.attributes.clone_from(&key.attributes);
        report
    }

    /// Something that was done to a key that is, or was, there.
    pub(super) fn add_act(
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

    /// What was done, in a line.
    pub(super) fn done(&self) -> String {
        let acts: Vec<_> = self.keys.iter().map(|key| format!("{} {}", key.act, key.name)).collect();
        if acts.is_empty() { "nothing".to_owned() } else { acts.join(", ") }
    }

    /// Writes both files into `out`. Whether the text is signed: a token without a log's key signs none.
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
        let other = |e: crate::tlog::TlogError| OfficerError::Other(e.to_string());
        let text = UnsignedText::new(TITLE, &self.text(json.as_bytes())).map_err(other)?;
        let Some(signer) = signer else {
            write_new(&text_path, text.unsigned().as_bytes())?;
            return Ok(false);
        };
        let (kind, algorithm) = (KeyKind::Ed25519, SignatureAlgorithm::Ed25519);
        let signature = token.sign(&signer.name, &signer.id, kind, algorithm, text.to_be_signed())?;
        write_new(&text_path, text.signed(&signer.key, &signature).map_err(other)?.as_bytes())?;
        Ok(true)
    }

    fn text(&self, json: &[u8]) -> String {
        let mut text = String::new();
        let officers: Vec<_> = self.officers.iter().map(OfficerName::as_str).collect();
        let officers = if officers.is_empty() { "not named".to_owned() } else { officers.join(", ") };
        // Writing into a string does not fail.
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
        row("begun", &at(self.begun));
        row("ended", &at(self.ended));
        if let Some(why) = &self.failed {
            row("failed", &printable(why));
        }
        let _ = writeln!(text, "{JSON}{}", hex::encode(sha256(json)));
        for key in &self.keys {
            let _ = write!(text, "\nkey {}\n  {} at {}\n  CKA_ID       {}\n", key.name, key.act, at(key.at), key.id);
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

/// `transcript.json` and `transcript.txt`, or with the next number that is free.
fn free_paths(out: &Path) -> [PathBuf; 2] {
    let names = std::iter::once("transcript".to_owned()).chain((2..).map(|n: u32| format!("transcript-{n}")));
    let mut paths = names.map(|name| ["json", "txt"].map(|extension| out.join(format!("{name}.{extension}"))));
    let first = paths.next().unwrap_or_default();
    let is_free = |paths: &[PathBuf; 2]| paths.iter().all(|path| !path.exists());
    // An endless sequence has a first free one.
    if is_free(&first) { first } else { paths.find(is_free).unwrap_or(first) }
}

/// A transcript that its log's key has signed.
#[derive(Debug, Serialize)]
pub struct VerifiedTranscript {
    /// The text, without the signature.
    pub text: String,
    /// Whose key signed it.
    pub signed_by: String,
    /// Whether the JSON beside it is the one that it names; none if there is none.
    pub json_fits: Option<bool>,
}

/// Verifies the text against the log's public key, and the JSON beside it against the text.
pub fn verify_transcript(text: &Path, key: &LogKey) -> Result<VerifiedTranscript, OfficerError> {
    let failed = |problem: String| OfficerError::Other(format!("{}: {problem}", text.display()));
    let note = std::fs::read(text).map_err(|e| failed(e.to_string()))?;
    let verified = verify_text(&note, key).map_err(|e| failed(e.to_string()))?;
    if verified.lines().next() != Some(TITLE) {
        return Err(failed("it is signed, and no transcript of a ceremony".to_owned()));
    }
    let named = verified.lines().find_map(|line| line.strip_prefix(JSON)).map(str::to_owned);
    let json = std::fs::read(text.with_extension("json")).ok();
    let json_fits = json.map(|json| named.is_some_and(|named| named == hex::encode(sha256(&json))));
    Ok(VerifiedTranscript { text: verified, signed_by: key.origin().to_string(), json_fits })
}
