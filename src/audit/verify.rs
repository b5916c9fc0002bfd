//! The log as anybody verifies it, from its first line to its last, also while a daemon writes it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde_json::json;

use super::chain::ChainHead;
use super::{AuditError, Checkpoint, Entries, Outcome, Recorded};
use crate::access::verify_statement;
use crate::certificate::{caller_of, verify_caller};
use crate::keys::PublicKey;
use crate::tlog::LogKey;

/// A log whose chain is whole, and as it was signed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verified {
    /// How many entries it has.
    pub entries: u64,
    /// SHA-256 of the last line, in hex; zeros if there is none. Whoever keeps it elsewhere can tell later that the log up to
    /// here is still the same.
    pub head: String,
    /// Bytes after the last whole line: an entry that is being written, or one that a crash cut off before anybody was told of
    /// it. The daemon cuts them off when it opens the log.
    pub unfinished: u64,
    /// Checkpoints in the log whose signature and content are right; 0 without a key.
    pub signed: u64,
    /// Checkpoints in the public database, all of which fit.
    pub published: u64,
    /// Of them those whose entries an officer has given up as lost.
    pub given_up: u64,
    /// The first so many entries are covered by a checkpoint.
    pub covered: u64,
    /// Statements of officers whose signature is right.
    pub statements: u64,
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} entries, chain is whole", self.entries)?;
        if self.signed + self.published > 0 {
            let (covered, after) = (self.covered, self.entries.saturating_sub(self.covered));
            write!(f, "; {} signed checkpoints in it and {} in the public database fit", self.signed, self.published)?;
            write!(f, ", the newest covers {covered} entries, {after} came after it")?;
        }
        if self.given_up > 0 {
            write!(f, "; {} checkpoints are of entries that were given up as lost", self.given_up)?;
        }
        if self.statements > 0 {
            write!(f, "; {} statements of officers are signed by them", self.statements)?;
        }
        match self.unfinished {
            0 => Ok(()),
            bytes => write!(f, "; {bytes} bytes of an unfinished line follow"),
        }
    }
}

/// A checkpoint in the public database, and its place there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The log's entry.
    pub index: u64,
    /// The note, signed.
    pub note: Vec<u8>,
}

/// All of them that a public database has of a node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PublishedTrail {
    /// So many entries the public database has.
    pub size: u64,
    /// The checkpoints, in the order of their places.
    pub found: Vec<Published>,
}

/// Whom and what a log is held against.
#[derive(Default)]
pub struct Trust {
    /// The key of the public database, which signs checkpoints; without it none is looked at.
    pub key: Option<LogKey>,
    /// The keys that certify officers; without any, nobody's certificate is believed or doubted.
    pub authorities: Vec<PublicKey>,
    /// What the public database has.
    pub published: Option<PublishedTrail>,
    /// Entries of the public database whose checkpoints officers have given up as lost, as whoever verifies knows from them.
    pub given_up: Vec<u64>,
}

/// Reads the whole log and says that its chain is whole, or at which line and why it is not.
///
/// It finds a line that was changed, removed, added or moved, if any line follows it. It does not find that lines are missing at
/// the end, that the last one was changed, or that everything was written anew from some line on: that takes [`verify_with`].
pub fn verify(dir: &Path) -> Result<Verified, AuditError> {
    verify_with(dir, &Trust::default())
}

/// The same, compared with everything that was ever signed of it: the checkpoints in it, and those in the public database. With the
/// latter not even the newest entries can be missing, but for those that came after the last checkpoint.
pub fn verify_with(dir: &Path, trust: &Trust) -> Result<Verified, AuditError> {
    let mut found = FirstReading::of(trust);
    let mut entries = Entries::open(dir)?;
    while let Some(entry) = entries.next_entry()? {
        found.take(&entry).map_err(|why| entries.broken_at(entry.sequence, why))?;
    }
    let not_as_signed = |why| AuditError::NotAsSigned { path: entries.path().to_owned(), why };
    let head = entries.head();
    if let Some(published) = &trust.published {
        found.must_be_whole(published).map_err(not_as_signed)?;
        published.found.iter().try_for_each(|one| found.take_published(one)).map_err(not_as_signed)?;
    }
    found.must_end_at(head.lines()).map_err(not_as_signed)?;
    if !found.claims.is_empty() {
        let mut again = Entries::open(dir)?;
        while again.head().lines() < head.lines() && again.next_entry()?.is_some() {
            found.must_fit(again.head()).map_err(not_as_signed)?;
        }
    }
    let (unfinished, hash) = (entries.unfinished(), hex::encode(head.hash));
    Ok(Verified { entries: head.lines(), head: hash, unfinished, ..found.verified })
}

/// What the log and the public database say of it.
struct FirstReading<'a> {
    trust: &'a Trust,
    verified: Verified,
    node: Option<String>,
    /// How many entries, the hash of the last of them, and who says so.
    claims: BTreeMap<u64, Vec<([u8; 32], String)>>,
    losses: Vec<Loss>,
    /// The highest place in the public database that the log knows of.
    published_at: Option<u64>,
}

/// Entries that the daemon was told to go on without.
struct Loss {
    sequence: u64,
    /// Where the public database has the checkpoint of what is lost, and how many entries that covers.
    index: u64,
    known: u64,
    /// So many entries were left.
    kept: u64,
}

impl<'a> FirstReading<'a> {
    fn of(trust: &'a Trust) -> Self {
        let (verified, claims, losses) = (Verified::default(), BTreeMap::new(), Vec::new());
        Self { trust, verified, node: None, claims, losses, published_at: None }
    }

    fn take(&mut self, entry: &Recorded) -> Result<(), String> {
        let node = self.node.get_or_insert_with(|| entry.node.clone());
        if *node != entry.node {
            return Err(format!("it is of the node {}, and the log of {node}", entry.node));
        }
        let number = |name: &str| entry.details.get(name).and_then(|text| text.parse::<u64>().ok());
        match entry.act.as_str() {
            "audit.checkpoint" => {
                self.published_at = self.published_at.max(number("index"));
                self.take_checkpoint(entry)
            }
            "audit.loss" => {
                let numbers = (number("index"), number("known"), number("kept"));
                let (Some(index), Some(known), Some(kept)) = numbers else {
                    return Err("it tells of a loss and not of which".to_owned());
                };
                self.losses.push(Loss { sequence: entry.sequence, index, known, kept });
                Ok(())
            }
            act => match act.strip_prefix("approval.") {
                Some(verb) if entry.outcome == Outcome::Begun => self.take_statement(entry, verb),
                _ => Ok(()),
            },
        }
    }

    fn take_checkpoint(&mut self, entry: &Recorded) -> Result<(), String> {
        let (Some(key), Some(note)) = (&self.trust.key, entry.details.get("note")) else { return Ok(()) };
        let signed = Checkpoint::verified(note.as_bytes(), key).map_err(|e| format!("its checkpoint: {e}"))?;
        self.claim(signed, &entry.node, format!("the checkpoint in entry {}", entry.sequence))?;
        self.verified.signed += 1;
        Ok(())
    }

    /// What an officer has signed is signed by him, and is what the entry says.
    fn take_statement(&mut self, entry: &Recorded, verb: &str) -> Result<(), String> {
        let detail = |name: &str| entry.details.get(name).ok_or_else(|| format!("it has no {name} of the officer"));
        let bytes = |text: &str| hex::decode(text).map_err(|e| e.to_string());
        let (statement, certificate) = (detail("statement")?, bytes(detail("certificate")?)?);
        let of = match self.trust.authorities.as_slice() {
            [] => caller_of(&certificate),
            authorities => verify_caller(&certificate, authorities),
        };
        let of = of.map_err(|e| format!("the officer's certificate: {e}"))?;
        if of.caller.to_string() != entry.caller {
            return Err(format!("it is of {}, and the certificate in it of {}", entry.caller, of.caller));
        }
        if !(of.not_before..=of.not_after).contains(&entry.time) {
            return Err(format!("the certificate of {} was not valid then", entry.caller));
        }
        for (name, value) in [
            ("node", entry.node.as_str()),
            ("verb", verb),
            ("request", detail("request")?),
            ("officer", of.caller.name()),
        ] {
            let line = format!("{name:<10}{value}");
            if !statement.lines().any(|said| said == line) {
                return Err(format!("the officer's statement does not say {line:?}"));
            }
        }
        verify_statement(statement.as_bytes(), &bytes(detail("signature")?)?, &certificate)?;
        self.verified.statements += 1;
        Ok(())
    }

    /// The public database has at least what the log knows of it, and each loss is one that it knows and that was given up.
    fn must_be_whole(&self, published: &PublishedTrail) -> Result<(), String> {
        if let Some(index) = self.published_at.filter(|index| *index >= published.size) {
            let size = published.size;
            return Err(format!(
                "a checkpoint is in entry {index} of the public database, and what was read of that has {size} entries: it is an older copy"
            ));
        }
        for loss in &self.losses {
            let Loss { sequence, index, known, .. } = loss;
            let knows = |one: &&Published| one.index == *index;
            let checkpoint = published.found.iter().find(knows).zip(self.trust.key.as_ref());
            let signed = checkpoint.and_then(|(one, key)| Checkpoint::verified(&one.note, key).ok());
            if signed.is_none_or(|signed| signed.head.entries != *known) {
                return Err(format!("entry {sequence} tells of a loss that the public database does not know"));
            }
            if !self.trust.given_up.contains(index) {
                return Err(format!(
                    "entry {sequence} says that entries up to {known} are lost and that was accepted: ask the officers, and if it is so, \
                     confirm it with --given-up {index}"
                ));
            }
        }
        Ok(())
    }

    fn take_published(&mut self, published: &Published) -> Result<(), String> {
        let key = self.trust.key.as_ref().ok_or("the public key of the log is needed to read its checkpoints")?;
        let at = format!("the checkpoint in entry {} of the public database", published.index);
        let signed = Checkpoint::verified(&published.note, key).map_err(|e| format!("{at}: {e}"))?;
        self.verified.published += 1;
        let is_given_up = |loss: &Loss| published.index <= loss.index && signed.head.entries > loss.kept;
        if self.losses.iter().any(is_given_up) {
            self.verified.given_up += 1;
            return Ok(());
        }
        let node = self.node.clone().unwrap_or_else(|| signed.node.clone());
        self.claim(signed, &node, at)
    }

    fn claim(&mut self, signed: Checkpoint, node: &str, by: String) -> Result<(), String> {
        if signed.node != node {
            return Err(format!("{by} is of the node {}, not {node}", signed.node));
        }
        self.verified.covered = self.verified.covered.max(signed.head.entries);
        self.claims.entry(signed.head.entries).or_default().push((signed.head.hash, by));
        Ok(())
    }

    fn must_end_at(&self, entries: u64) -> Result<(), String> {
        match self.claims.last_key_value() {
            Some((known, by)) if *known > entries => {
                let by = by.first().map(|(_, by)| by.as_str()).unwrap_or_default();
                Err(format!(
                    "it has {entries} entries, and {by} knows {known}: the newest {} are missing",
                    known - entries
                ))
            }
            _ => Ok(()),
        }
    }

    fn must_fit(&self, head: ChainHead) -> Result<(), String> {
        let claims = self.claims.get(&head.lines()).map(Vec::as_slice).unwrap_or_default();
        match claims.iter().find(|(hash, _)| *hash != head.hash) {
            Some((_, by)) => {
                let last = head.lines().saturating_sub(1);
                Err(format!("entry {last} or one before it is not the one that {by} has signed: it was replaced"))
            }
            None => Ok(()),
        }
    }
}

/// What was found, for programs: `whole` says whether the chain is; if not, `line` is the first that does not fit, and `fault`
/// says why.
pub fn verified_json(found: &Result<Verified, AuditError>) -> serde_json::Value {
    match found {
        Ok(found) => json!({
            "whole": true,
            "entries": found.entries,
            "head": found.head,
            "unfinished": found.unfinished,
            "signed_checkpoints": found.signed,
            "published_checkpoints": found.published,
            "given_up_checkpoints": found.given_up,
            "covered": found.covered,
            "statements": found.statements,
        }),
        Err(AuditError::Broken { line, why, .. }) => json!({ "whole": false, "line": line, "fault": why }),
        Err(error) => json!({ "whole": false, "line": null, "fault": error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::FILE;
    use super::super::chain::{MAX_LINE, TOO_LONG};
    use super::*;
    use crate::audit::{AuditLog, Entry};

    /// The lines of a log of six entries, and a way to verify others in their place.
    struct Case {
        _place: tempfile::TempDir,
        dir: std::path::PathBuf,
        lines: Vec<String>,
    }

    impl Case {
        async fn new(caller: &str) -> Self {
            let place = spp_testkit::files::temp_dir();
            let dir = place.path().join("audit");
            AuditLog::create(&dir).unwrap();
            assert_eq!(verify(&dir).unwrap().to_string(), "0 entries, chain is whole");
            let log = AuditLog::open(&dir, "node-1").unwrap();
            for n in 0..6 {
                log.record(Entry::new(caller, "key.destroy", Outcome::Begun).with("n", n)).await.unwrap();
            }
            let lines = std::fs::read_to_string(dir.join(FILE)).unwrap().lines().map(str::to_owned).collect();
            Self { _place: place, dir, lines }
        }

        fn verify(&self, change: impl FnOnce(&mut Vec<String>)) -> Result<Verified, AuditError> {
            let mut lines = self.lines.clone();
            change(&mut lines);
            let text: String = lines.into_iter().map(|line| line + "\n").collect();
            std::fs::write(self.dir.join(FILE), text).unwrap();
            verify(&self.dir)
        }

        fn broken_at(&self, line: u64, why: &str, change: impl FnOnce(&mut Vec<String>)) {
            let found = self.verify(change);
            assert_eq!(verified_json(&found)["line"], line, "{found:?}");
            let error = found.unwrap_err().to_string();
            assert!(error.contains(&format!("line {line}: ")) && error.contains(why), "{error}");
        }
    }

    #[tokio::test]
    async fn every_change_inside_is_found_at_its_line() {
        let case = Case::new("officer o-1").await;
        let other = Case::new("officer o-2").await;
        let untouched = case.verify(|_| {}).unwrap();
        assert_eq!(untouched.entries, 6);
        assert_eq!(untouched.head, hex::encode(crate::keys::sha256(case.lines[5].as_bytes())));
        let (changed, moved) = ("one of the two was changed", "removed, added or moved");
        // Edited: it is the next line that no longer follows.
        case.broken_at(4, changed, |lines| lines[2] = lines[2].replace("o-1", "o-9"));
        case.broken_at(2, changed, |lines| lines[0].push(' '));
        // Removed, at the beginning, inside, and put in twice.
        case.broken_at(1, moved, |lines| drop(lines.remove(0)));
        case.broken_at(3, moved, |lines| drop(lines.remove(2)));
        case.broken_at(4, moved, |lines| lines.insert(3, lines[2].clone()));
        case.broken_at(3, moved, |lines| lines.swap(2, 3));
        // Removed and those after it numbered anew.
        case.broken_at(3, changed, |lines| {
            lines.remove(2);
            lines[2] = lines[2].replace("\"sequence\":3", "\"sequence\":2");
        });
        // A line of another log in its place.
        case.broken_at(3, changed, |lines| lines[2].clone_from(&other.lines[2]));
        case.broken_at(2, changed, |lines| lines[0].clone_from(&other.lines[0]));
        case.broken_at(6, "no entry", |lines| lines[5] = lines[5].replace("\"begun\"", "\"well\""));
        case.broken_at(5, "no entry", |lines| lines[4].clear());
        case.broken_at(5, TOO_LONG, |lines| lines[4] = " ".repeat(MAX_LINE));
    }

    #[tokio::test]
    async fn what_is_gone_at_the_end_shows_only_to_those_who_know_the_head() {
        let case = Case::new("officer o-1").await;
        let whole = case.verify(|_| {}).unwrap();
        let shorter = case.verify(|lines| lines.truncate(4)).unwrap();
        assert_eq!(shorter.entries, 4);
        assert_ne!(shorter.head, whole.head);
    }
}
