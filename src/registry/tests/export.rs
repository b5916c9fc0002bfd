//! A mirror grows with its log despite interruptions, and rejects a log that is not its continuation.

use std::os::unix::fs::MetadataExt as _;

use spp_format::tlog::{LogProof, TileId};
use spp_log::registry::chip_files;

use super::*;

/// The signer and the entries of a log from which test sources are made.
struct TestLog {
    signer: LocalSigner,
    entries: Vec<Vec<u8>>,
}

/// The checkpoint and files of a log, which a test may modify.
#[derive(Clone)]
struct TestSource {
    note: Vec<u8>,
    files: BTreeMap<String, Vec<u8>>,
}

impl LogSource for TestSource {
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

impl TestLog {
    fn new(size: u64) -> Self {
        let entries = (0..size).map(|n| record(n).to_bytes().unwrap()).collect();
        Self { signer: LocalSigner::new(ORIGIN), entries }
    }

    fn source(&self, size: usize) -> TestSource {
        let entries = &self.entries[..size];
        TestSource { note: checkpoint_of(entries, &self.signer).note().to_vec(), files: tiles_of(entries) }
    }

    fn export(&self, source: &mut dyn LogSource, dir: &Path) -> Result<ExportReport, ExportError> {
        export(source, self.signer.key(), dir, &mut |_, _| ())
    }

    /// Asserts that the files of every chip prove its record with the log's key alone.
    fn assert_chips_proven(&self, dir: &Path, size: usize) {
        self.assert_some_chips_proven(dir, size, 1);
    }

    fn assert_some_chips_proven(&self, dir: &Path, size: usize, step: usize) {
        for n in (0..size as u64).rev().step_by(step) {
            let (bytes, proof) = read_chip(dir.to_str().unwrap(), &record(n).chip, None).unwrap();
            assert_eq!(bytes, self.entries[n as usize]);
            let verified = LogProof::from_bytes(&proof).unwrap().verify(&bytes, self.signer.key()).unwrap();
            assert_eq!(verified.index, n);
        }
    }
}

/// The files of a mirror of this size, without partial tiles of earlier sizes.
fn expected(source: &TestSource, size: usize) -> Vec<String> {
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
fn export_writes_specified_files_and_chip_proofs() {
    let test_log = TestLog::new(600);
    for size in [0, 1, 255, 256, 257, 512, 600] {
        let dir = spp_testkit::files::temp_dir();
        let mut source = test_log.source(size);
        let exported = test_log.export(&mut source, dir.path()).unwrap();
        assert_eq!(exported, ExportReport { entries_before: 0, entries: size as u64 });
        let files = files_of(dir.path());
        assert_eq!(names(&files), expected(&source, size), "{size}");
        assert!(source.files.iter().all(|(name, bytes)| files[name] == *bytes), "{size}");
        assert_eq!(files["checkpoint"], source.note);
        assert_eq!(files["log.vkey"], format!("{}\n", test_log.signer.key()).as_bytes());
        test_log.assert_chips_proven(dir.path(), size);
    }
}

/// Inode and modification time of each file.
fn file_ids(dir: &Path) -> BTreeMap<String, (u64, i64, i64)> {
    let file_id = |name: String| {
        let about = fs::metadata(dir.join(&name)).unwrap();
        (name, (about.ino(), about.mtime(), about.mtime_nsec()))
    };
    files_of(dir).into_keys().map(file_id).collect()
}

#[test]
fn export_writes_full_tiles_once_and_removes_partial_ones() {
    let (test_log, dir) = (TestLog::new(800), spp_testkit::files::temp_dir());
    let mut before = 0;
    let mut partial = Vec::new();
    for size in [10, 100, 255, 256, 300, 300, 512, 513, 700, 800] {
        let old = if before > 0 { file_ids(dir.path()) } else { BTreeMap::new() };
        let mut source = test_log.source(size);
        let exported = test_log.export(&mut source, dir.path()).unwrap();
        assert_eq!(exported, ExportReport { entries_before: before, entries: size as u64 });
        let new = file_ids(dir.path());
        for (name, file_id) in &old {
            let is_tile = name.starts_with("tile/");
            let outgrown = name.contains(".p/") && new.contains_key(name.split(".p/").next().unwrap());
            assert!(!outgrown || !new.contains_key(name), "{name} at {size}");
            if is_tile && !outgrown {
                assert_eq!(new.get(name), Some(file_id), "{name} modified at {size}");
            }
            if name.starts_with("chip/") {
                assert_eq!(new.get(name), Some(file_id), "{name} modified at {size}");
            }
        }
        // Partial tiles of earlier checkpoints may exist until there is a full tile.
        partial.extend(source.files.keys().filter(|name| name.contains(".p/")).cloned());
        let files = files_of(dir.path());
        let known = expected(&source, size);
        assert!(known.iter().all(|name| files.contains_key(name)), "{size}");
        let extra: Vec<_> = names(&files).into_iter().filter(|name| !known.contains(name)).collect();
        assert!(extra.iter().all(|name| partial.contains(name)), "{extra:?} at {size}");
        assert!(source.files.iter().all(|(name, bytes)| files[name] == *bytes), "{size}");
        test_log.assert_chips_proven(dir.path(), size);
        before = size as u64;
    }
}

/// Writes the files that an interrupted export leaves in a directory.
type Interruption = fn(&Path);

#[test]
fn interrupted_export_is_completed_by_next_export() {
    let test_log = TestLog::new(520);
    let (old, whole) = (spp_testkit::files::temp_dir(), spp_testkit::files::temp_dir());
    test_log.export(&mut test_log.source(260), old.path()).unwrap();
    test_log.export(&mut test_log.source(520), whole.path()).unwrap();
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
        // The first export, and an update of an existing mirror.
        for has_old_mirror in [false, true] {
            let dir = spp_testkit::files::temp_dir();
            fs::create_dir_all(dir.path().join("tile/entries")).unwrap();
            if has_old_mirror {
                copy_directory(old.path(), dir.path());
            }
            interrupt(dir.path());
            test_log.export(&mut test_log.source(520), dir.path()).unwrap();
            let mut files = files_of(dir.path());
            files.retain(|name, _| !name.contains(".p/") || name.ends_with("/8") || name.ends_with("tile/1/000.p/2"));
            let mut known = files_of(whole.path());
            known.retain(|name, _| files.contains_key(name) || !name.contains(".p/"));
            assert_eq!(names(&files), names(&known), "{what}");
            assert!(test_log.source(520).files.iter().all(|(name, bytes)| files[name] == *bytes), "{what}");
            test_log.assert_some_chips_proven(dir.path(), 520, 7);
        }
    }
    // A mirror without a checkpoint is exported completely.
    fs::remove_file(whole.path().join("checkpoint")).unwrap();
    assert_eq!(
        test_log.export(&mut test_log.source(520), whole.path()).unwrap(),
        ExportReport { entries_before: 0, entries: 520 }
    );
    test_log.assert_chips_proven(whole.path(), 520);
}

#[test]
fn export_of_forked_log_fails_without_changing_mirror() {
    let test_log = TestLog::new(700);
    for old in [100, 256, 300, 600] {
        let dir = spp_testkit::files::temp_dir();
        test_log.export(&mut test_log.source(old), dir.path()).unwrap();
        let before = (files_of(dir.path()), file_ids(dir.path()));
        // Rewritten at any entry: the export does not read again what the mirror has.
        let forked = |at: usize, size: usize| {
            let mut entries = test_log.entries[..size].to_vec();
            entries[at] = record(9_000).to_bytes().unwrap();
            TestSource { note: checkpoint_of(&entries, &test_log.signer).note().to_vec(), files: tiles_of(&entries) }
        };
        for (mut source, message) in [
            (forked(old - 1, old), "entries differ from those of the mirror"),
            (forked(old - 1, old + 1), "entries differ from those of the mirror"),
            (forked(old - 1, 700), "entries differ from those of the mirror"),
            (forked(0, old), "entries differ from those of the mirror"),
            (forked(0, 700), "entries differ from those of the mirror"),
            (test_log.source(old - 1), "entries, the log only"),
            (test_log.source(0), "entries, the log only"),
        ] {
            let refused = test_log.export(&mut source, dir.path()).unwrap_err();
            assert!(matches!(refused, ExportError::Forked(_)), "{refused}");
            assert!(refused.to_string().contains(message), "{refused}");
            assert_eq!((files_of(dir.path()), file_ids(dir.path())), before);
        }
        let foreign = TestLog { signer: LocalSigner::new(ORIGIN), entries: test_log.entries.clone() };
        assert!(matches!(test_log.export(&mut foreign.source(700), dir.path()), Err(ExportError::Invalid { .. })));
        assert_eq!((files_of(dir.path()), file_ids(dir.path())), before);
        test_log.export(&mut test_log.source(700), dir.path()).unwrap();
    }
}

/// Damages the content of a file.
type Damage = fn(&mut Vec<u8>);

#[test]
fn export_of_damaged_log_keeps_mirror_checkpoint() {
    let test_log = TestLog::new(520);
    let (good, old) = (test_log.source(520), spp_testkit::files::temp_dir());
    test_log.export(&mut test_log.source(260), old.path()).unwrap();
    for name in ["tile/entries/001", "tile/entries/002.p/8", "tile/0/001", "tile/0/002.p/8"] {
        let damages: [(&str, Damage); 4] = [
            ("flipped", |bytes| bytes[100] ^= 4),
            ("truncated", |bytes| bytes.truncate(bytes.len() - 1)),
            ("longer", |bytes| bytes.push(0)),
            ("empty", Vec::clear),
        ];
        for (what, damage) in damages {
            let dir = spp_testkit::files::temp_dir();
            copy_directory(old.path(), dir.path());
            let mut damaged = good.clone();
            damage(damaged.files.get_mut(name).unwrap());
            let refused = test_log.export(&mut damaged, dir.path()).unwrap_err();
            assert!(matches!(refused, ExportError::Damaged { .. }), "{name} {what}: {refused}");
            assert_mirror_unchanged(&test_log, dir.path());
            damaged.files.remove(name);
            let refused = test_log.export(&mut damaged, dir.path()).unwrap_err();
            assert!(matches!(refused, ExportError::Source(SourceError::Missing(_))), "{name}: {refused}");
            assert_mirror_unchanged(&test_log, dir.path());
            if what != "flipped" {
                continue;
            }
            assert_eq!(
                test_log.export(&mut good.clone(), dir.path()).unwrap(),
                ExportReport { entries_before: 260, entries: 520 }
            );
            assert!(good.files.iter().all(|(name, bytes)| fs::read(dir.path().join(name)).unwrap() == *bytes));
            test_log.assert_some_chips_proven(dir.path(), 520, 9);
        }
    }
}

/// Asserts that the mirror has the old checkpoint and everything that it covers.
fn assert_mirror_unchanged(test_log: &TestLog, dir: &Path) {
    assert_eq!(fs::read(dir.join("checkpoint")).unwrap(), test_log.source(260).note);
    let mirror = Mirror::new(dir);
    for (name, bytes) in test_log.source(260).files {
        assert_eq!(mirror.tile(name.parse().unwrap()).unwrap(), bytes, "{name}");
    }
    test_log.assert_some_chips_proven(dir, 260, 9);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn export_during_publication_is_consistent() {
    let log = Log::new();
    let public = log.open().await;
    publish_all(&public, 0..10).await;
    let writer = tokio::spawn({
        let public = public.clone();
        async move {
            for first in (10..1400).step_by(40) {
                publish_all(&public, first..first + 40).await;
            }
        }
    });
    let (dir, mirror, signer) = (log.dir(), log.dir.path().join("mirror"), log.signer.clone());
    let exports = tokio::task::spawn_blocking(move || {
        let mut last = 0;
        let mut grown_exports = 0;
        while last < 1410 {
            let mut source = StoreDirectory::new(&dir, signer.key());
            let exported = match export(&mut source, signer.key(), &mirror, &mut |_, _| ()) {
                Ok(exported) => exported,
                Err(error) => panic!("after {last}: {error}"),
            };
            assert_eq!(exported.entries_before, last);
            grown_exports += u64::from(exported.entries > last);
            last = exported.entries;
            let options = VerifyOptions { key: signer.key(), issuers: &[], seen: None };
            let verification = verify(&mut Mirror::new(&mirror), &options, &mut |_, _| ());
            assert!(
                verification.findings.iter().all(|finding| finding.problem.contains("no issuer known")),
                "{verification:?}"
            );
        }
        grown_exports
    });
    writer.await.unwrap();
    assert!(exports.await.unwrap() > 2, "too few exports while the log grew");
}

#[test]
fn export_to_damaged_mirror_is_not_reported_as_fork() {
    let (test_log, dir) = (TestLog::new(700), spp_testkit::files::temp_dir());
    test_log.export(&mut test_log.source(300), dir.path()).unwrap();
    fs::write(dir.path().join("tile/0/000"), [7; 8192]).unwrap();
    let refused = test_log.export(&mut test_log.source(700), dir.path()).unwrap_err();
    assert!(matches!(refused, ExportError::Mirror(_)), "{refused}");
}
