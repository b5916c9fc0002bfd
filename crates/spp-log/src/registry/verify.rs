//! Verifies a whole log. The only trust anchors are the log's public key and the manufacturer's issuer certificates.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;

use spp_format::certificate::{IssuerCertificate, PublishedClaims, lint_published};
use spp_format::names::ChipId;
use spp_format::record::{DeviceRecord, LogEntry};
use spp_format::tlog::{
    FullTile, LogKey, LogProof, SignedCheckpoint, TileId, TileKind, Tree, TreeHash, bundle, leaf_hash,
};

use super::full_tiles::BUNDLE;
use super::source::{LogSource, SourceError, read_chip_files};

/// Maximum number of reported findings: a damaged log could have millions.
const MAX_FINDINGS: usize = 200;

/// Trust anchors of [`verify`].
pub struct VerifyOptions<'a> {
    /// The key that signs checkpoints.
    pub key: &'a LogKey,
    /// The certificates of the CAs that sign device certificates.
    pub issuers: &'a [IssuerCertificate],
    /// A checkpoint from an earlier verification: the log must be consistent with it.
    pub seen: Option<&'a [u8]>,
}

/// A problem in the log.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// The location: `checkpoint`, `tile/0/001`, `entry 17`.
    pub at: String,
    /// The problem.
    pub problem: String,
}

/// Result of [`verify`].
#[derive(Debug, Clone, serde::Serialize)]
pub struct Verification {
    /// Entries that the checkpoint covers.
    pub entries: u64,
    /// Number of device records that were read.
    pub records: u64,
    /// Number of audit checkpoints that were read.
    pub audit_checkpoints: u64,
    /// The root of the checkpoint's tree, in hex.
    pub root: String,
    /// The problems; empty if there are none.
    pub findings: Vec<Finding>,
    /// Number of further findings that are not in `findings`.
    pub more_findings: u64,
    /// Why the verification ended early: the server was unreachable, which says nothing about the log.
    pub unreachable: Option<String>,
    /// The checkpoint, to be stored for the next verification if there are no findings.
    #[serde(skip)]
    pub checkpoint: Option<SignedCheckpoint>,
}

impl Verification {
    /// Whether the whole log was read and has no findings.
    pub fn is_good(&self) -> bool {
        self.findings.is_empty() && self.unreachable.is_none()
    }

    fn add_read_error(&mut self, at: impl std::fmt::Display, error: &SourceError) {
        match error {
            SourceError::Unreachable { .. } => self.unreachable = Some(error.to_string()),
            error => self.add(at, error),
        }
    }

    fn add(&mut self, at: impl std::fmt::Display, problem: impl std::fmt::Display) {
        if self.findings.len() < MAX_FINDINGS {
            self.add_global(at, problem);
        } else {
            self.more_findings += 1;
        }
    }

    /// Adds a finding about the whole log, regardless of the limit.
    fn add_global(&mut self, at: impl std::fmt::Display, problem: impl std::fmt::Display) {
        self.findings.push(Finding { at: at.to_string(), problem: problem.to_string() });
    }
}

/// Reads every entry and every tile. Verifies the hashes, the checkpoint's signature, consistency with an earlier checkpoint,
/// every certificate, and that unique values occur once. Continues after a finding, so that all are reported.
pub fn verify(
    source: &mut dyn LogSource,
    options: &VerifyOptions<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Verification {
    let mut result = Verification {
        entries: 0,
        records: 0,
        audit_checkpoints: 0,
        root: String::new(),
        findings: Vec::new(),
        more_findings: 0,
        unreachable: None,
        checkpoint: None,
    };
    // 1. Verify the signed checkpoint and the earlier one.
    let note = match source.checkpoint() {
        Ok(note) => note,
        Err(error) => {
            result.add_read_error("checkpoint", &error);
            return result;
        }
    };
    let checkpoint = match SignedCheckpoint::verify(&note, options.key) {
        Ok(checkpoint) => checkpoint,
        Err(why) => {
            result.add("checkpoint", why);
            return result;
        }
    };
    result.entries = checkpoint.size();
    result.root = hex::encode(checkpoint.root());
    let seen = options.seen.map(|note| SignedCheckpoint::verify(note, options.key));
    let seen = match seen {
        Some(Ok(seen)) if seen.size() > checkpoint.size() => {
            let problem = format!(
                "the log has {} entries, an earlier checkpoint {}: entries were removed, or this is an old copy",
                checkpoint.size(),
                seen.size()
            );
            result.add("checkpoint", problem);
            None
        }
        Some(Ok(seen)) => Some(seen),
        Some(Err(error)) => {
            result.add("earlier checkpoint", error);
            None
        }
        None => None,
    };
    // 2. Verify every entry and build the tree.
    let mut verifier = LogVerifier {
        has_chips: source.has_chips(),
        source: &*source,
        options,
        size: checkpoint.size(),
        tree: Tree::default(),
        known: HashMap::new(),
    };
    verifier.check_consistency(seen.as_ref(), &mut result);
    for number in 0..checkpoint.size().div_ceil(BUNDLE) {
        verifier.check_bundle(number, seen.as_ref(), &mut result);
        if result.unreachable.is_some() {
            return result;
        }
        progress(verifier.tree.size(), checkpoint.size());
    }
    verifier.check_partial_tiles(&mut result);
    if result.unreachable.is_some() {
        return result;
    }
    // 3. Compare the root with the signed one.
    if verifier.tree.root() != checkpoint.root() {
        let problem = format!(
            "the root does not match the {} entries: an entry was changed, removed, added or moved, or the checkpoint is of \
             another log",
            checkpoint.size()
        );
        result.add_global("checkpoint", problem);
    }
    result.checkpoint = Some(checkpoint);
    result
}

struct LogVerifier<'a> {
    source: &'a dyn LogSource,
    options: &'a VerifyOptions<'a>,
    size: u64,
    /// Whether to verify the files of each chip.
    has_chips: bool,
    /// The tree of the entries that were read.
    tree: Tree,
    /// The first half of each unique value's key, and the index of its entry. Half of a SHA-256 hash has no accidental
    /// collisions.
    known: HashMap<[u8; 17], u32>,
}

impl LogVerifier<'_> {
    fn check_bundle(&mut self, number: u64, seen: Option<&SignedCheckpoint>, result: &mut Verification) {
        let id = |kind| TileId::in_tree(kind, number, self.size).unwrap_or(TileId::full(kind, number));
        let (entries_id, leaves_id) = (id(TileKind::Entries), id(TileKind::Hashes(0)));
        let width = usize::from(entries_id.width());
        let stored = self.source.tile(leaves_id).map_err(|e| result.add_read_error(leaves_id, &e)).unwrap_or_default();
        if stored.len() != width * 32 {
            result.add(leaves_id, format!("{} bytes found, {} expected", stored.len(), width * 32));
        }
        let bytes = self.source.tile(entries_id).map_err(|e| result.add_read_error(entries_id, &e)).unwrap_or_default();
        let entries: Vec<&[u8]> = bundle::entries(&bytes).map_while(Result::ok).collect();
        let length = entries.iter().map(|entry| entry.len() + bundle::LENGTH_SIZE).sum::<usize>();
        if entries.len() == width && length < bytes.len() {
            result.add(entries_id, format!("{} trailing bytes after the last entry", bytes.len() - length));
        }
        if entries.len() != width {
            let problem =
                format!("{} complete entries found, {width} expected: entries are missing or truncated", entries.len());
            result.add(entries_id, problem);
        }
        let leaves: Vec<TreeHash> = entries.iter().map(|entry| leaf_hash(entry)).collect();
        self.compare_leaves(number, &leaves, &stored, leaves_id, result);
        for (at, (entry, leaf)) in entries.iter().zip(leaves).take(width).enumerate() {
            self.check_entry(number * BUNDLE + at as u64, entry, result);
            for FullTile { id, hashes } in self.tree.push(leaf) {
                self.check_tile(id, &hashes, result);
            }
            self.check_consistency(seen, result);
        }
        // Add placeholders, so that the following entries have their own indexes. The root does not match then, which is
        // reported, too.
        for _ in entries.len()..width {
            for FullTile { id, hashes } in self.tree.push([0; 32]) {
                self.check_tile(id, &hashes, result);
            }
        }
    }

    /// Compares the entries with the hashes of level 0, to report exactly what was changed.
    fn compare_leaves(&self, number: u64, leaves: &[TreeHash], stored: &[u8], tile: TileId, result: &mut Verification) {
        let stored = stored.as_chunks::<32>().0;
        let differing: Vec<_> = (0..leaves.len().min(stored.len())).filter(|at| leaves[*at] != stored[*at]).collect();
        if differing.is_empty() {
            return;
        }
        let sorted = |hashes: &[TreeHash]| {
            let mut hashes = hashes.to_vec();
            hashes.sort_unstable();
            hashes
        };
        if sorted(leaves) == sorted(stored) {
            let indexes: Vec<_> = differing.iter().map(|at| (number * BUNDLE + *at as u64).to_string()).collect();
            return result.add(tile, format!("entries {} and their hashes are in different order", indexes.join(", ")));
        }
        for at in differing {
            let index = number * BUNDLE + at as u64;
            result.add(
                format!("entry {index}"),
                format!("the hash does not match {tile}: the entry or the tile was changed"),
            );
        }
    }

    fn check_tile(&self, id: TileId, computed: &[u8], result: &mut Verification) {
        // `compare_leaves` has checked level 0 entry by entry.
        if id.kind() == TileKind::Hashes(0) {
            return;
        }
        match self.source.tile(id) {
            Ok(stored) if stored == computed => {}
            Ok(_) => result.add(id, "the hashes do not match the tiles below"),
            Err(error) => result.add_read_error(id, &error),
        }
    }

    /// Checks the partial tiles above level 0.
    fn check_partial_tiles(&self, result: &mut Verification) {
        for level in 1..64 {
            let of_level = self.size.checked_shr(8 * u32::from(level)).unwrap_or(0);
            if of_level == 0 {
                return;
            }
            let partial = TileId::in_tree(TileKind::Hashes(level), of_level / BUNDLE, self.size);
            if let Some((id, hashes)) = partial.and_then(|id| Some((id, self.tree.partial(id)?))) {
                self.check_tile(id, hashes, result);
            }
        }
    }

    fn check_consistency(&self, seen: Option<&SignedCheckpoint>, result: &mut Verification) {
        if let Some(seen) = seen
            && seen.size() == self.tree.size()
            && seen.root() != self.tree.root()
        {
            let problem = format!(
                "inconsistent with the earlier checkpoint of {} entries: the log was rewritten, or it presents different views",
                seen.size()
            );
            result.add_global("checkpoint", problem);
        }
    }

    fn check_entry(&mut self, index: u64, bytes: &[u8], result: &mut Verification) {
        let at = format!("entry {index}");
        let entry = match LogEntry::from_bytes(bytes) {
            Ok(entry) => entry,
            Err(error) => return result.add(at, error),
        };
        for key in entry.keys().iter().filter(|key| key.is_unique()) {
            let mut half = [0; 17];
            half.copy_from_slice(&key.as_bytes()[..17]);
            match self.known.entry(half) {
                Slot::Vacant(free) => {
                    free.insert(u32::try_from(index).unwrap_or(u32::MAX));
                }
                Slot::Occupied(first) => {
                    result.add(&at, format!("duplicate {}: also in entry {}", key.field(), first.get()));
                }
            }
        }
        match entry {
            LogEntry::Device(record) => {
                result.records += 1;
                self.check_record(index, bytes, &record, result);
            }
            // The audit log itself is needed to verify its checkpoints: sppctl audit verify.
            LogEntry::Audit(_) => result.audit_checkpoints += 1,
        }
    }

    fn check_record(&self, index: u64, bytes: &[u8], record: &DeviceRecord, result: &mut Verification) {
        let at = format!("entry {index}");
        let claims = PublishedClaims {
            chip: &record.chip,
            identity: &record.identity,
            serial: &record.serial,
            public_key: record.public_key.as_deref(),
        };
        let findings = lint_published(&record.certificate, record.certificate_is_cwt, &claims, self.options.issuers);
        for finding in findings.iter() {
            result.add(&at, format!("certificate, {}: {}", finding.rule, finding.problem));
        }
        if self.has_chips {
            self.check_chip_files(index, bytes, &record.chip, result);
        }
    }

    /// Checks a mirror's record and proof files of a chip.
    fn check_chip_files(&self, index: u64, entry: &[u8], chip: &ChipId, result: &mut Verification) {
        let at = format!("files of chip {chip}");
        let (record, proof) = match read_chip_files(self.source, chip) {
            Ok(files) => files,
            Err(error) => return result.add(at, error),
        };
        if record != entry {
            result.add(&at, format!("the record differs from entry {index}"));
        }
        let proven = LogProof::from_bytes(&proof).and_then(|proof| proof.verify(entry, self.options.key));
        match proven {
            Ok(proven) if proven.index == index => {}
            Ok(proven) => result.add(at, format!("the proof is for entry {}, expected {index}", proven.index)),
            Err(error) => result.add(at, error),
        }
    }
}
