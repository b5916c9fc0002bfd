//! Verifies an audit log from its first line to its last, also while a daemon writes it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde_json::json;
use spp_format::approval::verify_statement;
use spp_format::audit::Checkpoint;
use spp_format::certificate::{parse_caller_certificate, verify_caller_certificate};
use spp_format::keys::PublicKey;
use spp_format::tlog::LogKey;

use super::chain::ChainHead;
use super::{AuditError, Entries, Outcome, RecordedEntry};

/// The result of a successful verification: the chain is intact and matches the checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verified {
    /// Number of entries.
    pub entries: u64,
    /// SHA-256 of the last line, in hex; zeros if there is none. A copy stored elsewhere later proves that the log is unchanged
    /// up to this line.
    pub head: String,
    /// Number of bytes after the last complete line: an entry that is being written, or one that a crash truncated before it
    /// was acknowledged. The daemon removes them when it opens the log.
    pub unfinished: u64,
    /// Number of verified checkpoints in the log; 0 without a key.
    pub signed: u64,
    /// Number of verified checkpoints in the public database.
    pub published: u64,
    /// Number of published checkpoints whose entries an officer accepted as lost.
    pub accepted_losses: u64,
    /// Number of entries, from the first on, that a checkpoint covers.
    pub covered: u64,
    /// Number of officer statements with a valid signature.
    pub statements: u64,
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} entries, chain intact", self.entries)?;
        if self.signed + self.published > 0 {
            let (covered, after) = (self.covered, self.entries.saturating_sub(self.covered));
            write!(
                f,
                "; {} checkpoints in the log and {} in the public database verified",
                self.signed, self.published
            )?;
            write!(f, ", the newest covers {covered} entries, {after} follow it")?;
        }
        if self.accepted_losses > 0 {
            write!(f, "; {} checkpoints cover entries accepted as lost", self.accepted_losses)?;
        }
        if self.statements > 0 {
            write!(f, "; {} officer statements verified", self.statements)?;
        }
        match self.unfinished {
            0 => Ok(()),
            bytes => write!(f, "; {bytes} bytes of an incomplete line follow"),
        }
    }
}

/// A checkpoint in the public database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedCheckpoint {
    /// Index of the entry in the public database.
    pub index: u64,
    /// The signed note.
    pub note: Vec<u8>,
}

/// All checkpoints of a node in the public database.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PublishedCheckpoints {
    /// Number of entries in the public database.
    pub size: u64,
    /// The checkpoints, ordered by index.
    pub checkpoints: Vec<PublishedCheckpoint>,
}

/// Trust anchors and reference data for the verification of a log.
#[derive(Default)]
pub struct Trust {
    /// The key of the public database, which signs checkpoints. Without it no checkpoint is verified.
    pub key: Option<LogKey>,
    /// The keys that certify officers. Without any, officers' certificates are not verified.
    pub authorities: Vec<PublicKey>,
    /// The checkpoints in the public database.
    pub published: Option<PublishedCheckpoints>,
    /// Indices of published checkpoints whose entries officers accepted as lost, as the verifying person learned from them.
    pub accepted_losses: Vec<u64>,
}

/// Verifies the chain of the whole log. An error names the first line that is not valid.
///
/// Detects a line that was changed, removed, added or moved, if another line follows it. Does not detect that lines are missing
/// at the end, that the last line was changed, or that all lines from some line on were rewritten: use [`verify_with`].
pub fn verify(dir: &Path) -> Result<Verified, AuditError> {
    verify_with(dir, &Trust::default())
}

/// Verifies the chain and compares it with the checkpoints in the log and in the public database. With the published ones,
/// missing entries are detected up to the newest checkpoint.
pub fn verify_with(dir: &Path, trust: &Trust) -> Result<Verified, AuditError> {
    let mut verifier = Verifier::new(trust);
    let mut entries = Entries::open(dir)?;
    while let Some(entry) = entries.next_entry()? {
        verifier.add_entry(&entry).map_err(|why| entries.broken_at(entry.sequence, why))?;
    }
    let mismatch = |why| AuditError::CheckpointMismatch { path: entries.path().to_owned(), why };
    let head = entries.head();
    if let Some(published) = &trust.published {
        verifier.check_published(published).map_err(mismatch)?;
        published.checkpoints.iter().try_for_each(|one| verifier.add_published(one)).map_err(mismatch)?;
    }
    verifier.check_length(head.lines()).map_err(mismatch)?;
    if !verifier.claims.is_empty() {
        let mut second_pass = Entries::open(dir)?;
        while second_pass.head().lines() < head.lines() && second_pass.next_entry()?.is_some() {
            verifier.check_claims_at(second_pass.head()).map_err(mismatch)?;
        }
    }
    let (unfinished, hash) = (entries.unfinished(), hex::encode(head.hash));
    Ok(Verified { entries: head.lines(), head: hash, unfinished, ..verifier.verified })
}

/// Collects the checkpoints and losses of a log and verifies the log against them.
struct Verifier<'a> {
    trust: &'a Trust,
    verified: Verified,
    node: Option<String>,
    /// By number of entries: the signed hash of the last of them, and the source of the claim.
    claims: BTreeMap<u64, Vec<([u8; 32], String)>>,
    losses: Vec<Loss>,
    /// The highest index of a published checkpoint that the log mentions.
    max_published_index: Option<u64>,
}

/// An `audit.loss` entry: an accepted loss of entries.
struct Loss {
    sequence: u64,
    /// Index of the published checkpoint that covers the lost entries, and the number of entries that it covers.
    index: u64,
    known: u64,
    /// Number of entries that remained.
    kept: u64,
}

impl<'a> Verifier<'a> {
    fn new(trust: &'a Trust) -> Self {
        let (verified, claims, losses) = (Verified::default(), BTreeMap::new(), Vec::new());
        Self { trust, verified, node: None, claims, losses, max_published_index: None }
    }

    fn add_entry(&mut self, entry: &RecordedEntry) -> Result<(), String> {
        let node = self.node.get_or_insert_with(|| entry.node.clone());
        if *node != entry.node {
            return Err(format!("entry is of node {}, but the log is of node {node}", entry.node));
        }
        let number = |name: &str| entry.details.get(name).and_then(|text| text.parse::<u64>().ok());
        match entry.act.as_str() {
            "audit.checkpoint" => {
                self.max_published_index = self.max_published_index.max(number("index"));
                self.add_checkpoint(entry)
            }
            "audit.loss" => {
                let numbers = (number("index"), number("known"), number("kept"));
                let (Some(index), Some(known), Some(kept)) = numbers else {
                    return Err("audit.loss entry without index, known or kept".to_owned());
                };
                self.losses.push(Loss { sequence: entry.sequence, index, known, kept });
                Ok(())
            }
            act => match act.strip_prefix("approval.") {
                Some(verb) if entry.outcome == Outcome::Begun => self.verify_officer_statement(entry, verb),
                _ => Ok(()),
            },
        }
    }

    fn add_checkpoint(&mut self, entry: &RecordedEntry) -> Result<(), String> {
        let (Some(key), Some(note)) = (&self.trust.key, entry.details.get("note")) else { return Ok(()) };
        let signed = Checkpoint::verified(note.as_bytes(), key).map_err(|e| format!("checkpoint: {e}"))?;
        self.add_claim(signed, &entry.node, format!("the checkpoint in entry {}", entry.sequence))?;
        self.verified.signed += 1;
        Ok(())
    }

    /// Verifies an officer's signature and that the statement matches the entry.
    fn verify_officer_statement(&mut self, entry: &RecordedEntry, verb: &str) -> Result<(), String> {
        let detail = |name: &str| entry.details.get(name).ok_or_else(|| format!("officer statement without {name}"));
        let bytes = |text: &str| hex::decode(text).map_err(|e| e.to_string());
        let (statement, certificate) = (detail("statement")?, bytes(detail("certificate")?)?);
        let signer = match self.trust.authorities.as_slice() {
            [] => parse_caller_certificate(&certificate),
            authorities => verify_caller_certificate(&certificate, authorities),
        };
        let signer = signer.map_err(|e| format!("the officer's certificate: {e}"))?;
        if signer.caller.to_string() != entry.caller {
            return Err(format!("entry is of {}, but its certificate is of {}", entry.caller, signer.caller));
        }
        if !(signer.not_before..=signer.not_after).contains(&entry.time) {
            return Err(format!("the certificate of {} was not valid at the time of the entry", entry.caller));
        }
        for (name, value) in [
            ("node", entry.node.as_str()),
            ("verb", verb),
            ("request", detail("request")?),
            ("officer", signer.caller.name()),
        ] {
            let expected = format!("{name:<10}{value}");
            if !statement.lines().any(|line| line == expected) {
                return Err(format!("the officer's statement lacks the line {expected:?}"));
            }
        }
        verify_statement(statement.as_bytes(), &bytes(detail("signature")?)?, &certificate)?;
        self.verified.statements += 1;
        Ok(())
    }

    /// Checks that the public database has every checkpoint that the log mentions, and that each loss is published and accepted.
    fn check_published(&self, published: &PublishedCheckpoints) -> Result<(), String> {
        if let Some(index) = self.max_published_index.filter(|index| *index >= published.size) {
            let size = published.size;
            return Err(format!(
                "the log mentions a checkpoint in entry {index} of the public database, whose copy has {size} entries: \
                 fetch a newer copy"
            ));
        }
        for loss in &self.losses {
            let Loss { sequence, index, known, .. } = loss;
            let is_lost = |one: &&PublishedCheckpoint| one.index == *index;
            let checkpoint = published.checkpoints.iter().find(is_lost).zip(self.trust.key.as_ref());
            let signed = checkpoint.and_then(|(one, key)| Checkpoint::verified(&one.note, key).ok());
            if signed.is_none_or(|signed| signed.head.entries != *known) {
                return Err(format!(
                    "entry {sequence} records a loss without a matching checkpoint in the public database"
                ));
            }
            if !self.trust.accepted_losses.contains(index) {
                return Err(format!(
                    "entry {sequence} records an accepted loss of entries up to {known}: ask the officers, and if they \
                     accepted it, confirm it with --accepted-loss {index}"
                ));
            }
        }
        Ok(())
    }

    fn add_published(&mut self, published: &PublishedCheckpoint) -> Result<(), String> {
        let key = self.trust.key.as_ref().ok_or("verifying checkpoints needs the public key of the log")?;
        let source = format!("the checkpoint in entry {} of the public database", published.index);
        let signed = Checkpoint::verified(&published.note, key).map_err(|e| format!("{source}: {e}"))?;
        self.verified.published += 1;
        let is_given_up = |loss: &Loss| published.index <= loss.index && signed.head.entries > loss.kept;
        if self.losses.iter().any(is_given_up) {
            self.verified.accepted_losses += 1;
            return Ok(());
        }
        let node = self.node.clone().unwrap_or_else(|| signed.node.clone());
        self.add_claim(signed, &node, source)
    }

    fn add_claim(&mut self, signed: Checkpoint, node: &str, source: String) -> Result<(), String> {
        if signed.node != node {
            return Err(format!("{source} is of node {}, not of node {node}", signed.node));
        }
        self.verified.covered = self.verified.covered.max(signed.head.entries);
        self.claims.entry(signed.head.entries).or_default().push((signed.head.hash, source));
        Ok(())
    }

    fn check_length(&self, entries: u64) -> Result<(), String> {
        match self.claims.last_key_value() {
            Some((covered, claims)) if *covered > entries => {
                let source = claims.first().map(|(_, source)| source.as_str()).unwrap_or_default();
                Err(format!(
                    "the log has {entries} entries, but {source} covers {covered}: the newest {} are missing",
                    covered - entries
                ))
            }
            _ => Ok(()),
        }
    }

    fn check_claims_at(&self, head: ChainHead) -> Result<(), String> {
        let claims = self.claims.get(&head.lines()).map(Vec::as_slice).unwrap_or_default();
        match claims.iter().find(|(hash, _)| *hash != head.hash) {
            Some((_, source)) => {
                let last = head.lines().saturating_sub(1);
                Err(format!("entry {last} or an earlier one was replaced: it does not match {source}"))
            }
            None => Ok(()),
        }
    }
}

/// The result of a verification as JSON. `whole` is true if the chain is intact; otherwise `line` is the first invalid line and
/// `fault` the reason.
pub fn verified_json(result: &Result<Verified, AuditError>) -> serde_json::Value {
    match result {
        Ok(verified) => json!({
            "whole": true,
            "entries": verified.entries,
            "head": verified.head,
            "unfinished": verified.unfinished,
            "signed_checkpoints": verified.signed,
            "published_checkpoints": verified.published,
            "checkpoints_of_accepted_losses": verified.accepted_losses,
            "covered": verified.covered,
            "statements": verified.statements,
        }),
        Err(AuditError::Broken { line, why, .. }) => json!({ "whole": false, "line": line, "fault": why }),
        Err(error) => json!({ "whole": false, "line": null, "fault": error.to_string() }),
    }
}
