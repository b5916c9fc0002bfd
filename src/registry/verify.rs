//! Walking a whole log as a stranger would, who believes nothing but the log's public key and the manufacturer's certificate.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;

use super::files::BUNDLE;
use super::source::{LogSource, SourceError, chip_of};
use crate::certificate::{IssuerCertificate, PublishedClaims, lint_published};
use crate::names::ChipId;
use crate::store::{DeviceRecord, LogEntry};
use crate::tlog::{FullTile, LogKey, LogProof, SignedCheckpoint, TileId, TileKind, Tree, TreeHash, bundle, leaf_hash};

/// Findings that are told; of a ruined log there would be millions.
const MOST: usize = 200;

/// What is believed.
pub struct VerifyOptions<'a> {
    /// Who signs checkpoints.
    pub key: &'a LogKey,
    /// Who signs device certificates.
    pub issuers: &'a [IssuerCertificate],
    /// A checkpoint that was seen before: the log must continue it.
    pub seen: Option<&'a [u8]>,
}

/// Something is wrong.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// Where: `checkpoint`, `tile/0/001`, `entry 17`.
    pub at: String,
    /// What.
    pub problem: String,
}

/// What a walk found.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Verification {
    /// Entries that the checkpoint covers.
    pub entries: u64,
    /// How many of those that were read are device records.
    pub records: u64,
    /// How many of those that were read are checkpoints of audit logs.
    pub audit_checkpoints: u64,
    /// The root of their tree, in hex.
    pub root: String,
    /// What is wrong; empty if nothing is.
    pub findings: Vec<Finding>,
    /// Findings beyond those that are told.
    pub more_findings: u64,
    /// Why the walk ended early: whoever has the log could not be asked, which says nothing about the log.
    pub unreachable: Option<String>,
    /// The checkpoint, to be remembered for the next time if nothing is wrong.
    #[serde(skip)]
    pub checkpoint: Option<SignedCheckpoint>,
}

impl Verification {
    /// Whether all of it was read, and nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.findings.is_empty() && self.unreachable.is_none()
    }

    fn unread(&mut self, at: impl std::fmt::Display, error: &SourceError) {
        match error {
            SourceError::Unreachable { .. } => self.unreachable = Some(error.to_string()),
            error => self.add(at, error),
        }
    }

    fn add(&mut self, at: impl std::fmt::Display, problem: impl std::fmt::Display) {
        if self.findings.len() < MOST {
            self.tell(at, problem);
        } else {
            self.more_findings += 1;
        }
    }

    /// However many there are already: it is about all of the log.
    fn tell(&mut self, at: impl std::fmt::Display, problem: impl std::fmt::Display) {
        self.findings.push(Finding { at: at.to_string(), problem: problem.to_string() });
    }
}

/// Reads every entry and every tile: hashes, the checkpoint's signature, that the log continues the checkpoint that was seen last,
/// every certificate, and that nothing unique is there twice. Goes on after a finding, so that all are told.
pub fn verify(
    source: &mut dyn LogSource,
    options: &VerifyOptions<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Verification {
    let mut found = Verification {
        entries: 0,
        records: 0,
        audit_checkpoints: 0,
        root: String::new(),
        findings: Vec::new(),
        more_findings: 0,
        unreachable: None,
        checkpoint: None,
    };
    // 1. The signed tree, and the one that was seen before.
    let note = match source.checkpoint() {
        Ok(note) => note,
        Err(error) => {
            found.unread("checkpoint", &error);
            return found;
        }
    };
    let checkpoint = match SignedCheckpoint::verify(&note, options.key) {
        Ok(checkpoint) => checkpoint,
        Err(why) => {
            found.add("checkpoint", why);
            return found;
        }
    };
    found.entries = checkpoint.size();
    found.root = hex::encode(checkpoint.root());
    let seen = options.seen.map(|note| SignedCheckpoint::verify(note, options.key));
    let seen = match seen {
        Some(Ok(seen)) if seen.size() > checkpoint.size() => {
            let problem = format!(
                "it has {} entries, and {} were seen before: entries were removed, or an old copy is shown",
                checkpoint.size(),
                seen.size()
            );
            found.add("checkpoint", problem);
            None
        }
        Some(Ok(seen)) => Some(seen),
        Some(Err(error)) => {
            found.add("the checkpoint that was seen before", error);
            None
        }
        None => None,
    };
    // 2. Every entry, and with them the tree.
    let mut walk = Walk {
        chips: source.has_chips(),
        source: &*source,
        options,
        size: checkpoint.size(),
        tree: Tree::default(),
        known: HashMap::new(),
    };
    walk.continues(seen.as_ref(), &mut found);
    for number in 0..checkpoint.size().div_ceil(BUNDLE) {
        walk.bundle(number, seen.as_ref(), &mut found);
        if found.unreachable.is_some() {
            return found;
        }
        progress(walk.tree.size(), checkpoint.size());
    }
    walk.edge(&mut found);
    if found.unreachable.is_some() {
        return found;
    }
    // 3. They are the entries that were signed.
    if walk.tree.root() != checkpoint.root() {
        let problem = format!(
            "its root is not that of the {} entries: an entry was changed, removed, added or moved, or this is another log's",
            checkpoint.size()
        );
        found.tell("checkpoint", problem);
    }
    found.checkpoint = Some(checkpoint);
    found
}

struct Walk<'a> {
    source: &'a dyn LogSource,
    options: &'a VerifyOptions<'a>,
    size: u64,
    /// Whether the files of each chip are read, too.
    chips: bool,
    /// Of the entries as they are.
    tree: Tree,
    /// Half of each unique value's key, and the entry that has it. Halves of SHA-256 do not meet by accident.
    known: HashMap<[u8; 17], u32>,
}

impl Walk<'_> {
    fn bundle(&mut self, number: u64, seen: Option<&SignedCheckpoint>, found: &mut Verification) {
        let id = |kind| TileId::in_tree(kind, number, self.size).unwrap_or(TileId::full(kind, number));
        let (entries_id, leaves_id) = (id(TileKind::Entries), id(TileKind::Hashes(0)));
        let width = usize::from(entries_id.width());
        let told = self.source.tile(leaves_id).map_err(|e| found.unread(leaves_id, &e)).unwrap_or_default();
        if told.len() != width * 32 {
            found.add(leaves_id, format!("it has {} bytes and should have {}", told.len(), width * 32));
        }
        let bytes = self.source.tile(entries_id).map_err(|e| found.unread(entries_id, &e)).unwrap_or_default();
        let entries: Vec<&[u8]> = bundle::entries(&bytes).map_while(Result::ok).collect();
        let taken = entries.iter().map(|entry| entry.len() + bundle::HEAD).sum::<usize>();
        if entries.len() == width && taken < bytes.len() {
            found.add(entries_id, format!("{} bytes that are no entry follow its last one", bytes.len() - taken));
        }
        if entries.len() != width {
            let problem = format!(
                "it has {} whole entries and should have {width}: entries are missing or cut off",
                entries.len()
            );
            found.add(entries_id, problem);
        }
        let leaves: Vec<TreeHash> = entries.iter().map(|entry| leaf_hash(entry)).collect();
        self.compare(number, &leaves, &told, leaves_id, found);
        for (at, (entry, leaf)) in entries.iter().zip(leaves).take(width).enumerate() {
            self.entry(number * BUNDLE + at as u64, entry, found);
            for FullTile { id, hashes } in self.tree.push(leaf) {
                self.tile(id, &hashes, found);
            }
            self.continues(seen, found);
        }
        // So that what follows is counted from its own place. The root is wrong then, and that is told, too.
        for _ in entries.len()..width {
            for FullTile { id, hashes } in self.tree.push([0; 32]) {
                self.tile(id, &hashes, found);
            }
        }
    }

    /// The entries against the hashes of level 0, so that what was changed is named.
    fn compare(&self, number: u64, leaves: &[TreeHash], told: &[u8], tile: TileId, found: &mut Verification) {
        let told = told.as_chunks::<32>().0;
        let differ: Vec<_> = (0..leaves.len().min(told.len())).filter(|at| leaves[*at] != told[*at]).collect();
        if differ.is_empty() {
            return;
        }
        let sorted = |hashes: &[TreeHash]| {
            let mut hashes = hashes.to_vec();
            hashes.sort_unstable();
            hashes
        };
        if sorted(leaves) == sorted(told) {
            let places: Vec<_> = differ.iter().map(|at| (number * BUNDLE + *at as u64).to_string()).collect();
            return found
                .add(tile, format!("the entries {} are in another order than their hashes", places.join(", ")));
        }
        for at in differ {
            let index = number * BUNDLE + at as u64;
            found.add(format!("entry {index}"), format!("its hash is not the one in {tile}: one of them was changed"));
        }
    }

    fn tile(&self, id: TileId, computed: &[u8], found: &mut Verification) {
        // Level 0 was compared entry by entry.
        if id.kind() == TileKind::Hashes(0) {
            return;
        }
        match self.source.tile(id) {
            Ok(told) if told == computed => {}
            Ok(_) => found.add(id, "its hashes are not those of the tiles below it"),
            Err(error) => found.unread(id, &error),
        }
    }

    /// The partial tiles above level 0.
    fn edge(&self, found: &mut Verification) {
        for level in 1..64 {
            let of_level = self.size.checked_shr(8 * u32::from(level)).unwrap_or(0);
            if of_level == 0 {
                return;
            }
            let partial = TileId::in_tree(TileKind::Hashes(level), of_level / BUNDLE, self.size);
            if let Some((id, hashes)) = partial.and_then(|id| Some((id, self.tree.partial(id)?))) {
                self.tile(id, hashes, found);
            }
        }
    }

    fn continues(&self, seen: Option<&SignedCheckpoint>, found: &mut Verification) {
        if let Some(seen) = seen
            && seen.size() == self.tree.size()
            && seen.root() != self.tree.root()
        {
            let problem = format!(
                "it does not continue the checkpoint of {} entries that was seen before: the log was rewritten, or it has two faces",
                seen.size()
            );
            found.tell("checkpoint", problem);
        }
    }

    fn entry(&mut self, index: u64, bytes: &[u8], found: &mut Verification) {
        let at = format!("entry {index}");
        let entry = match LogEntry::from_bytes(bytes) {
            Ok(entry) => entry,
            Err(error) => return found.add(at, error),
        };
        for key in entry.keys().iter().filter(|key| key.is_unique()) {
            let mut half = [0; 17];
            half.copy_from_slice(&key.as_bytes()[..17]);
            match self.known.entry(half) {
                Slot::Vacant(free) => {
                    free.insert(u32::try_from(index).unwrap_or(u32::MAX));
                }
                Slot::Occupied(first) => {
                    found.add(&at, format!("its {} is that of entry {} already", key.what(), first.get()));
                }
            }
        }
        match entry {
            LogEntry::Device(record) => {
                found.records += 1;
                self.record(index, bytes, &record, found);
            }
            // Whether the audit log is as long as that only its owner can tell: sppctl audit verify.
            LogEntry::Audit(_) => found.audit_checkpoints += 1,
        }
    }

    fn record(&self, index: u64, bytes: &[u8], record: &DeviceRecord, found: &mut Verification) {
        let at = format!("entry {index}");
        let claims = PublishedClaims {
            chip: &record.chip,
            identity: &record.identity,
            serial: &record.serial,
            public_key: record.public_key.as_deref(),
        };
        let findings = lint_published(&record.certificate, record.certificate_is_cwt, &claims, self.options.issuers);
        for finding in findings.iter() {
            found.add(&at, format!("certificate, {}: {}", finding.rule, finding.problem));
        }
        if self.chips {
            self.chip(index, bytes, &record.chip, found);
        }
    }

    /// What a mirror gives to whoever asks for the chip.
    fn chip(&self, index: u64, entry: &[u8], chip: &ChipId, found: &mut Verification) {
        let at = format!("the files of chip {chip}");
        let (record, proof) = match chip_of(self.source, chip) {
            Ok(files) => files,
            Err(error) => return found.add(at, error),
        };
        if record != entry {
            found.add(&at, format!("the record is not entry {index}"));
        }
        let proven = LogProof::from_bytes(&proof).and_then(|proof| proof.verify(entry, self.options.key));
        match proven {
            Ok(proven) if proven.index == index => {}
            Ok(proven) => found.add(at, format!("the proof is of entry {}, not {index}", proven.index)),
            Err(error) => found.add(at, error),
        }
    }
}
