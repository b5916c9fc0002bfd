//! A mirror grows with its log, whatever interrupts it, and never takes over what does not continue it.

use std::os::unix::fs::MetadataExt as _;

use super::super::export::chip_files;
use super::*;
use crate::tlog::{LogProof, TileId};

/// A log that somebody made of the first so many records.
struct Made {
    signer: LocalSigner,
    entries: Vec<Vec<u8>>,
}

/// Its files, with which a test may do what it wants.
#[derive(Clone)]
struct Source {
    note: Vec<u8>,
    files: BTreeMap<String, Vec<u8>>,
}

impl LogSource for Source {
    fn name(&self) -> String {
        "the log".to_owned()
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>, SourceError> {
        Ok(self.note.clone())
    }

    fn tile(&self, tile: TileId) -> Result<Vec<u8>, SourceError> {
        self.file(&tile.to_string(), u64::MAX)
    }

    fn file(&self, path: &str, _: u64) -> Result<Vec<u8>, SourceError> {
        self.files.get(path).cloned().ok_or_else(|| SourceError::Missing(path.to_owned()))
    }
}

impl Made {
    fn new(size: u64) -> Self {
        let entries = (0..size).map(|n| record(n).to_bytes().unwrap()).collect();
        Self { signer: LocalSigner::new(ORIGIN), entries }
    }

    fn of(&self, size: usize) -> Source {
        let entries = &self.entries[..size];
        Source { note: checkpoint_of(entries, &self.signer).note().to_vec(), files: tiles_of(entries) }
    }

    fn export(&self, source: &mut dyn LogSource, dir: &Path) -> Result<Exported, ExportError> {
        export(source, self.signer.key(), dir, &mut |_, _| ())
    }

    /// Every chip of the mirror proves that it is in the log, to somebody who has the log's key alone.
    fn chips_are_proven(&self, dir: &Path, size: usize) {
        self.some_chips_are_proven(dir, size, 1);
    }

    fn some_chips_are_proven(&self, dir: &Path, size: usize, step: usize) {
        for n in (0..size as u64).rev().step_by(step) {
            let (bytes, proof) = read_chip(dir.to_str().unwrap(), &record(n).chip, None).unwrap();
            assert_eq!(bytes, self.entries[n as usize]);
            let verified = LogProof::from_bytes(&proof).unwrap().verify(&bytes, self.signer.key()).unwrap();
            assert_eq!(verified.index, n);
        }
    }
}

/// What a mirror of the log of that size has, besides the partial tiles of the sizes that it had before.
fn expected(source: &Source, size: usize) -> Vec<String> {
    let mut names: Vec<_> = source.files.keys().cloned().collect();
    for n in 0..size as u64 {
        let (record, proof) = chip_files(&record(n).chip);
        names.extend([record, proof]);
    }
    names.extend(["checkpoint".to_owned(), "log.vkey".to_owned()]);
    names.sort();
    names
}

fn names(files: &BTreeMap<String, Vec<u8>>) -> Vec<String> {
    files.keys().cloned().collect()
}

#[test]
fn a_mirror_is_exactly_what_the_specification_says_and_every_chip_is_proven() {
    let made = Made::new(600);
    for size in [0, 1, 255, 256, 257, 512, 600] {
        let dir = spp_testkit::files::temp_dir();
        let mut source = made.of(size);
        let exported = made.export(&mut source, dir.path()).unwrap();
        assert_eq!(exported, Exported { before: 0, now: size as u64 });
        let files = files_of(dir.path());
        assert_eq!(names(&files), expected(&source, size), "{size}");
        assert!(source.files.iter().all(|(name, bytes)| files[name] == *bytes), "{size}");
        assert_eq!(files["checkpoint"], source.note);
        assert_eq!(files["log.vkey"], format!("{}\n", made.signer.key()).as_bytes());
        made.chips_are_proven(dir.path(), size);
    }
}

/// When a file was written and which one it is.
fn marks(dir: &Path) -> BTreeMap<String, (u64, i64, i64)> {
    let mark = |name: String| {
        let about = fs::metadata(dir.join(&name)).unwrap();
        (name, (about.ino(), about.mtime(), about.mtime_nsec()))
    };
    files_of(dir).into_keys().map(mark).collect()
}

#[test]
fn what_is_full_is_written_once_and_outgrown_parts_are_gone() {
    let (made, dir) = (Made::new(800), spp_testkit::files::temp_dir());
    let mut before = 0;
    let mut partial = Vec::new();
    for size in [10, 100, 255, 256, 300, 300, 512, 513, 700, 800] {
        let old = if before > 0 { marks(dir.path()) } else { BTreeMap::new() };
        let mut source = made.of(size);
        let exported = made.export(&mut source, dir.path()).unwrap();
        assert_eq!(exported, Exported { before, now: size as u64 });
        let new = marks(dir.path());
        for (name, mark) in &old {
            let is_tile = name.starts_with("tile/");
            let outgrown = name.contains(".p/") && new.contains_key(name.split(".p/").next().unwrap());
            assert!(!outgrown || !new.contains_key(name), "{name} at {size}");
            if is_tile && !outgrown {
                assert_eq!(new.get(name), Some(mark), "{name} was touched at {size}");
            }
            if name.starts_with("chip/") {
                assert_eq!(new.get(name), Some(mark), "{name} was touched at {size}");
            }
        }
        // Partial tiles of earlier checkpoints may stay as long as there is no full one.
        partial.extend(source.files.keys().filter(|name| name.contains(".p/")).cloned());
        let files = files_of(dir.path());
        let known = expected(&source, size);
        assert!(known.iter().all(|name| files.contains_key(name)), "{size}");
        let extra: Vec<_> = names(&files).into_iter().filter(|name| !known.contains(name)).collect();
        assert!(extra.iter().all(|name| partial.contains(name)), "{extra:?} at {size}");
        assert!(source.files.iter().all(|(name, bytes)| files[name] == *bytes), "{size}");
        made.chips_are_proven(dir.path(), size);
        before = size as u64;
    }
}

/// What an export that was interrupted left in a directory.
type Interruption = fn(&Path);

#[test]
fn an_interrupted_export_is_finished_by_the_next_one() {
    let made = Made::new(520);
    let (old, whole) = (spp_testkit::files::temp_dir(), spp_testkit::files::temp_dir());
    made.export(&mut made.of(260), old.path()).unwrap();
    made.export(&mut made.of(520), whole.path()).unwrap();
    let interruptions: [(&str, Interruption); 6] = [
        ("before the first file", |_| ()),
        ("in the middle of a full tile", |dir| {
            fs::create_dir_all(dir.join("tile/0")).unwrap();
            fs::write(dir.join("tile/0/001"), [1; 100]).unwrap();
            fs::write(dir.join("tile/0/001.new"), [1; 100]).unwrap();
        }),
        ("in the middle of a bundle", |dir| fs::write(dir.join("tile/entries/001"), [1; 100_000]).unwrap()),
        ("in the middle of a partial tile", |dir| {
            fs::create_dir_all(dir.join("tile/0/002.p")).unwrap();
            fs::write(dir.join("tile/0/002.p/8"), "").unwrap();
        }),
        ("in the middle of a chip", |dir| {
            let (record, proof) = chip_files(&record(515).chip);
            fs::create_dir_all(dir.join(&record).parent().unwrap()).unwrap();
            fs::write(dir.join(record), [1; 10]).unwrap();
            fs::write(dir.join(format!("{proof}.new")), [1; 10]).unwrap();
        }),
        ("in the middle of the checkpoint", |dir| fs::write(dir.join("checkpoint.new"), "log.example").unwrap()),
    ];
    for (what, interrupt) in interruptions {
        // The first export ever, and one that has a checkpoint to go on from.
        for begun in [false, true] {
            let dir = spp_testkit::files::temp_dir();
            fs::create_dir_all(dir.path().join("tile/entries")).unwrap();
            if begun {
                copy_directory(old.path(), dir.path());
            }
            interrupt(dir.path());
            made.export(&mut made.of(520), dir.path()).unwrap();
            let mut files = files_of(dir.path());
            files.retain(|name, _| !name.contains(".p/") || name.ends_with("/8") || name.ends_with("tile/1/000.p/2"));
            let mut known = files_of(whole.path());
            known.retain(|name, _| files.contains_key(name) || !name.contains(".p/"));
            assert_eq!(names(&files), names(&known), "{what}");
            assert!(made.of(520).files.iter().all(|(name, bytes)| files[name] == *bytes), "{what}");
            made.some_chips_are_proven(dir.path(), 520, 7);
        }
    }
    // A mirror whose checkpoint is gone is like one that was never finished.
    fs::remove_file(whole.path().join("checkpoint")).unwrap();
    assert_eq!(made.export(&mut made.of(520), whole.path()).unwrap(), Exported { before: 0, now: 520 });
    made.chips_are_proven(whole.path(), 520);
}

#[test]
fn a_log_that_does_not_continue_the_mirror_is_refused_and_the_mirror_is_left_alone() {
    let made = Made::new(700);
    for old in [100, 256, 300, 600] {
        let dir = spp_testkit::files::temp_dir();
        made.export(&mut made.of(old), dir.path()).unwrap();
        let before = (files_of(dir.path()), marks(dir.path()));
        // Wherever it was rewritten: what the mirror has of it is not read again.
        let forked = |at: usize, size: usize| {
            let mut entries = made.entries[..size].to_vec();
            entries[at] = record(9_000).to_bytes().unwrap();
            Source { note: checkpoint_of(&entries, &made.signer).note().to_vec(), files: tiles_of(&entries) }
        };
        for (mut source, words) in [
            (forked(old - 1, old), "are not those that the mirror has"),
            (forked(old - 1, old + 1), "are not those that the mirror has"),
            (forked(old - 1, 700), "are not those that the mirror has"),
            (forked(0, old), "are not those that the mirror has"),
            (forked(0, 700), "are not those that the mirror has"),
            (made.of(old - 1), "entries and the log only"),
            (made.of(0), "entries and the log only"),
        ] {
            let refused = made.export(&mut source, dir.path()).unwrap_err();
            assert!(matches!(refused, ExportError::Forked(_)), "{refused}");
            assert!(refused.to_string().contains(words), "{refused}");
            assert_eq!((files_of(dir.path()), marks(dir.path())), before);
        }
        let foreign = Made { signer: LocalSigner::new(ORIGIN), entries: made.entries.clone() };
        assert!(matches!(made.export(&mut foreign.of(700), dir.path()), Err(ExportError::Wrong { .. })));
        assert_eq!((files_of(dir.path()), marks(dir.path())), before);
        made.export(&mut made.of(700), dir.path()).unwrap();
    }
}

/// What happened to a file.
type Harm = fn(&mut Vec<u8>);

#[test]
fn a_damaged_log_is_refused_and_the_mirrors_checkpoint_stays() {
    let made = Made::new(520);
    let (good, old) = (made.of(520), spp_testkit::files::temp_dir());
    made.export(&mut made.of(260), old.path()).unwrap();
    for name in ["tile/entries/001", "tile/entries/002.p/8", "tile/0/001", "tile/0/002.p/8"] {
        let harms: [(&str, Harm); 4] = [
            ("flipped", |bytes| bytes[100] ^= 4),
            ("cut off", |bytes| bytes.truncate(bytes.len() - 1)),
            ("longer", |bytes| bytes.push(0)),
            ("empty", Vec::clear),
        ];
        for (what, harm) in harms {
            let dir = spp_testkit::files::temp_dir();
            copy_directory(old.path(), dir.path());
            let mut damaged = good.clone();
            harm(damaged.files.get_mut(name).unwrap());
            let refused = made.export(&mut damaged, dir.path()).unwrap_err();
            assert!(matches!(refused, ExportError::Damaged { .. }), "{name} {what}: {refused}");
            must_still_be_of_260(&made, dir.path());
            damaged.files.remove(name);
            let refused = made.export(&mut damaged, dir.path()).unwrap_err();
            assert!(matches!(refused, ExportError::Source(SourceError::Missing(_))), "{name}: {refused}");
            must_still_be_of_260(&made, dir.path());
            if what != "flipped" {
                continue;
            }
            assert_eq!(made.export(&mut good.clone(), dir.path()).unwrap(), Exported { before: 260, now: 520 });
            assert!(good.files.iter().all(|(name, bytes)| fs::read(dir.path().join(name)).unwrap() == *bytes));
            made.some_chips_are_proven(dir.path(), 520, 9);
        }
    }
}

/// The old checkpoint is there, and everything that it covers.
fn must_still_be_of_260(made: &Made, dir: &Path) {
    assert_eq!(fs::read(dir.join("checkpoint")).unwrap(), made.of(260).note);
    let mirror = Mirror::new(dir);
    for (name, bytes) in made.of(260).files {
        assert_eq!(mirror.tile(name.parse().unwrap()).unwrap(), bytes, "{name}");
    }
    made.some_chips_are_proven(dir, 260, 9);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_publishes_meanwhile_is_mirrored_as_it_was_at_one_moment() {
    let log = Log::new();
    let public = log.open().await;
    grow(&public, 0..10).await;
    let writer = tokio::spawn({
        let public = public.clone();
        async move {
            for first in (10..1400).step_by(40) {
                grow(&public, first..first + 40).await;
            }
        }
    });
    let (dir, mirror, signer) = (log.dir(), log.dir.path().join("mirror"), log.signer.clone());
    let exports = tokio::task::spawn_blocking(move || {
        let mut last = 0;
        let mut growths = 0;
        while last < 1410 {
            let mut source = StoreDirectory::new(&dir, signer.key());
            let exported = match export(&mut source, signer.key(), &mirror, &mut |_, _| ()) {
                Ok(exported) => exported,
                Err(error) => panic!("after {last}: {error}"),
            };
            assert_eq!(exported.before, last);
            growths += u64::from(exported.now > last);
            last = exported.now;
            let options = VerifyOptions { key: signer.key(), issuers: &[], seen: None };
            let walked = verify(&mut Mirror::new(&mirror), &options, &mut |_, _| ());
            assert!(walked.findings.iter().all(|finding| finding.problem.contains("no issuer is known")), "{walked:?}");
        }
        growths
    });
    writer.await.unwrap();
    assert!(exports.await.unwrap() > 2, "it was exported while it grew");
}

#[test]
fn a_mirror_whose_own_tiles_are_damaged_is_told_from_a_fork() {
    let (made, dir) = (Made::new(700), spp_testkit::files::temp_dir());
    made.export(&mut made.of(300), dir.path()).unwrap();
    fs::write(dir.path().join("tile/0/000"), [7; 8192]).unwrap();
    let refused = made.export(&mut made.of(700), dir.path()).unwrap_err();
    assert!(matches!(refused, ExportError::Mirror(_)), "{refused}");
}
