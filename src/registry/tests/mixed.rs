//! Device records and audit checkpoints in one log are never confused.

use proptest::prelude::*;
use spp_format::record::{AuditCheckpoint, LogEntry};
use spp_format::tlog::LogProof;
use spp_log::registry::chip_files;

use super::super::first_checkpoints;
use super::reference_log::{TamperedLog, verify_source, with_changed_record};
use super::*;
use crate::store::contract_public::audit_checkpoint;

/// Whether entry `n` is an audit checkpoint; sometimes several in a row are.
fn is_audit(n: u64) -> bool {
    n.is_multiple_of(7) || (100..110).contains(&n)
}

fn node(n: u64) -> &'static str {
    if n.is_multiple_of(2) { "even" } else { "odd" }
}

fn audit(n: u64) -> AuditCheckpoint {
    audit_checkpoint(node(n), n)
}

fn bytes(n: u64) -> Vec<u8> {
    if is_audit(n) { audit(n).to_bytes().unwrap() } else { record(n).to_bytes().unwrap() }
}

fn records_below(size: u64) -> u64 {
    (0..size).filter(|n| !is_audit(*n)).count() as u64
}

fn newest_of(of: &str, size: u64) -> Option<(u64, AuditCheckpoint)> {
    (0..size).rev().find(|n| is_audit(*n) && node(*n) == of).map(|n| (n, audit(n)))
}

/// Appends entries one after the other, so that entry `n` has index `n`.
async fn append_mixed(public: &Arc<TransparencyLog>, numbers: std::ops::Range<u64>) {
    for n in numbers {
        let result = match is_audit(n) {
            true => public.append_audit(&audit(n)).await,
            false => public.publish(&record(n)).await,
        };
        assert_eq!(result.unwrap().index, n);
    }
}

async fn assert_mixed(log: &Log, public: &TransparencyLog, size: u64) {
    assert_eq!(public.len().await.unwrap(), records_below(size));
    assert_eq!(public.checkpoint().await.unwrap().unwrap().size(), size);
    for n in 0..size {
        let found = public.record(n).await.unwrap();
        assert_eq!(found.is_none(), is_audit(n), "{n}");
        for proof in [public.prove(n).await.unwrap(), public.receipt(n).await.unwrap()] {
            assert_eq!(proof.unwrap().verify(&bytes(n), log.signer.key()).unwrap().index, n);
        }
        match is_audit(n) {
            true => assert_eq!(public.append_audit(&audit(n)).await.unwrap().index, n),
            false => {
                let by_chip = public.find(&UniqueKey::of_chip(&record(n).chip)).await.unwrap();
                assert_eq!(by_chip, found, "{n}");
                assert_eq!(public.publish(&with_later_time(n)).await.unwrap().index, n);
            }
        }
    }
    for of in ["even", "odd"] {
        assert_eq!(public.newest_audit(of).await.unwrap(), newest_of(of, size));
    }
    let newest = (0..size).rev().find(|n| !is_audit(*n)).unwrap();
    assert_eq!(public.newest().await.unwrap().unwrap().publication.index, newest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mixed_entries_are_found_after_reopen_and_reindex() {
    let log = Log::new();
    let mut size = 0;
    for next in [1, 99, 111, 255, 256, 257, 300, 520] {
        let public = log.open().await;
        append_mixed(&public, size..next).await;
        size = next;
        if size > 1 {
            assert_mixed(&log, &public, size).await;
        }
        close(public, &log).await;
    }
    assert_mixed(&log, &*log.open().await, size).await;
    fs::remove_dir_all(log.dir().join("index")).unwrap();
    let public = log.open().await;
    assert_eq!(public.len().await.unwrap(), records_below(size), "the number of records must not depend on the index");
    assert_mixed(&log, &public, size).await;
    close(public, &log).await;
    let report = reindex(&log.dir(), &options(), log.signer.key(), false, |_, _| ()).await.unwrap();
    assert_eq!(report, ReindexReport { entries: size, lost: 0 });
    assert_mixed(&log, &*log.open().await, size).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn record_count_is_recomputed_only_if_not_stored() {
    let log = Log::new();
    let public = log.open().await;
    append_mixed(&public, 0..520).await;
    close(public, &log).await;
    let (bundle, stored) = (log.dir().join("tile/entries/000"), log.dir().join("signed/001"));
    let bytes = fs::read(&bundle).unwrap();
    // Without a bundle the records cannot be counted.
    fs::remove_file(&bundle).unwrap();
    assert_eq!(first_checkpoints::records_below(&log.dir(), 512).unwrap(), records_below(512));
    fs::remove_file(&stored).unwrap();
    let refused = log.try_open().await.err().unwrap();
    assert!(refused.to_string().contains("tile/entries/000"), "{refused}");
    assert!(refused.to_string().contains("replace the file by the same file of a mirror"), "{refused}");
    fs::write(&bundle, bytes).unwrap();
    assert_mixed(&log, &*log.open().await, 520).await;
    assert_eq!(fs::read(&stored).unwrap(), records_below(512).to_be_bytes(), "the number is stored after counting");
    // A damaged number is counted again; the file is not changed.
    for damaged in [&513u64.to_be_bytes()[..], &[7; 5]] {
        fs::write(&stored, damaged).unwrap();
        assert_eq!(first_checkpoints::records_below(&log.dir(), 512).unwrap(), records_below(512));
        assert_eq!(fs::read(&stored).unwrap(), damaged);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_without_audit_checkpoints_keeps_file_format() {
    let log = Log::new();
    let public = log.open().await;
    publish_all(&public, 0..300).await;
    close(public, &log).await;
    let stored = fs::read(log.dir().join("signed/000")).unwrap();
    assert!(!stored.is_empty() && stored.len().is_multiple_of(72), "{}", stored.len());
    assert_eq!(first_checkpoints::records_below(&log.dir(), 256).unwrap(), 256);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn newest_record_is_found_before_bundle_of_checkpoints() {
    let log = Log::new();
    let public = log.open().await;
    public.publish(&record(1)).await.unwrap();
    let mut tasks = JoinSet::new();
    for n in 0..520 {
        let public = public.clone();
        tasks.spawn(async move { public.append_audit(&audit_checkpoint("node-1", n)).await.unwrap() });
    }
    let result = tasks.join_all().await;
    assert_eq!(result.len(), 520);
    close(public, &log).await;
    let public = log.open().await;
    assert_eq!(public.newest().await.unwrap().unwrap().record, record(1));
    assert_eq!(public.len().await.unwrap(), 1);
    assert_eq!(public.newest_audit("node-1").await.unwrap().unwrap().0, 520);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_audit_checkpoint_is_published_once_on_retry() {
    for (persisted, before) in [(false, 3), (true, 3), (false, 255), (true, 255)] {
        let (log, faults) = (Log::new(), Arc::new(FaultInjector::default()));
        let public = log.open_through(&faults).await;
        publish_all(&public, 0..before).await;
        let fault = if persisted { &faults.in_sync } else { &faults.before_apply };
        fault.store(true, SeqCst);
        assert!(
            matches!(public.append_audit(&audit(before)).await, Err(PublishError::Store(error)) if is_failed(&error))
        );
        fault.store(false, SeqCst);
        let again = AuditCheckpoint { recorded: 7777, ..audit(before) };
        let publication = eventually("checkpoint appended", async || public.append_audit(&again).await).await;
        let recorded = if persisted { audit(before).recorded } else { 7777 };
        assert_eq!((publication.index, publication.published), (before, recorded));
        let (index, newest) = public.newest_audit(node(before)).await.unwrap().unwrap();
        assert_eq!((index, newest.recorded), (before, recorded));
        close(public, &log).await;
        let public = log.open().await;
        assert_eq!(public.newest_audit(node(before)).await.unwrap().unwrap().0, before);
        assert_eq!(
            (public.len().await.unwrap(), public.checkpoint().await.unwrap().unwrap().size()),
            (before, before + 1)
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn newest_audit_fails_while_newer_checkpoint_is_pending() {
    let (log, faults) = (Log::new(), Arc::new(FaultInjector::default()));
    let public = log.open_through(&faults).await;
    public.append_audit(&audit_checkpoint("a", 1)).await.unwrap();
    let (partial_bundles, moved) = (log.dir().join("edge"), log.dir().join("moved"));
    fs::rename(&partial_bundles, &moved).unwrap();
    faults.in_sync.store(true, SeqCst);
    assert!(matches!(public.append_audit(&audit_checkpoint("a", 2)).await, Err(PublishError::Store(_))));
    faults.in_sync.store(false, SeqCst);
    let unknown = public.newest_audit("a").await.unwrap_err();
    assert!(unknown.to_string().contains("it is not known yet whether the entry was published"), "{unknown}");
    fs::rename(&moved, &partial_bundles).unwrap();
    publish_until_ok(&public, &record(3)).await;
    assert_eq!(public.newest_audit("a").await.unwrap(), Some((1, audit_checkpoint("a", 2))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mirror_of_mixed_log_has_chip_files_only_for_devices() {
    let log = Log::new();
    let public = log.open().await;
    append_mixed(&public, 0..300).await;
    let (mirror, key) = (log.dir.path().join("mirror"), log.signer.key());
    let exported = export(&mut StoreDirectory::new(&log.dir(), key), key, &mirror, &mut |_, _| ()).unwrap();
    assert_eq!(exported, ExportReport { entries_before: 0, entries: 300 });
    append_mixed(&public, 300..520).await;
    let exported = export(&mut StoreDirectory::new(&log.dir(), key), key, &mirror, &mut |_, _| ()).unwrap();
    assert_eq!(exported, ExportReport { entries_before: 300, entries: 520 });
    let all: Vec<_> = (0..520).map(bytes).collect();
    let files = files_of(&mirror);
    assert!(tiles_of(&all).iter().all(|(name, bytes)| files[name] == *bytes));
    let of_chips = files.keys().filter(|name| name.starts_with("chip/")).count() as u64;
    assert_eq!(of_chips, 2 * records_below(520));
    for n in (0..520).filter(|n| !is_audit(*n)) {
        let proof = LogProof::from_bytes(&files[&chip_files(&record(n).chip).1]).unwrap();
        assert_eq!(proof.verify(&bytes(n), key).unwrap().index, n);
    }
    for source in [&mut Mirror::new(&mirror) as &mut dyn LogSource, &mut StoreDirectory::new(&log.dir(), key)] {
        for of in ["even", "odd", "unknown"] {
            let trail = audit_checkpoints(source, key, of, &mut |_, _| ()).unwrap();
            let expected: Vec<_> = (0..520).filter(|n| is_audit(*n) && node(*n) == of).map(|n| (n, audit(n))).collect();
            assert_eq!((trail.checkpoint.size(), trail.checkpoints), (520, expected));
        }
        let verification = verify(source, &VerifyOptions { key, issuers: &[], seen: None }, &mut |_, _| ());
        assert!(
            verification.findings.iter().all(|finding| finding.problem.contains("no issuer known")),
            "{verification:?}"
        );
        let records = records_below(520);
        assert_eq!(
            (verification.entries, verification.records, verification.audit_checkpoints),
            (520, records, 520 - records)
        );
    }
}

/// A manufacturer's log in which audit checkpoints replace some devices.
fn with_audit_checkpoints(audits: &[(usize, AuditCheckpoint)]) -> Vec<Vec<u8>> {
    let mut entries = with_changed_record(0, |_| ());
    for (at, checkpoint) in audits {
        entries[*at] = checkpoint.to_bytes().unwrap();
    }
    entries
}

#[test]
fn verify_reports_duplicate_or_malformed_audit_checkpoint() {
    let honest = with_audit_checkpoints(&[
        (3, audit_checkpoint("a", 7)),
        (4, audit_checkpoint("b", 7)),
        (400, audit_checkpoint("a", 8)),
    ]);
    TamperedLog::signed(&honest).findings().assert_no_more();
    let twice = with_audit_checkpoints(&[
        (3, audit_checkpoint("a", 7)),
        (400, AuditCheckpoint { note: vec![1], ..audit_checkpoint("a", 7) }),
    ]);
    let message = "duplicate number of audit entries: also in entry 3";
    TamperedLog::signed(&twice).findings().expect_finding("entry 400", message).assert_no_more();
    let damages: [fn(&mut Vec<u8>); 4] = [
        |bytes| bytes.push(0),
        |bytes| bytes.truncate(bytes.len() - 1),
        |bytes| bytes[0] += 1,
        // The number 7 in two bytes.
        |bytes| drop(bytes.splice(7..8, [0x18, 7])),
    ];
    for damage in damages {
        let mut entries = honest.clone();
        damage(&mut entries[3]);
        let tampered = TamperedLog::signed(&entries);
        tampered.findings().expect_finding("entry 3", "not an audit checkpoint").assert_no_more();
        let refused = trail_of(&tampered, "a").unwrap_err().to_string();
        assert!(refused.contains("entry 3 of ") && refused.contains("not an audit checkpoint"), "{refused}");
    }
}

fn trail_of(tampered: &TamperedLog, node: &str) -> Result<AuditTrail, AuditTrailError> {
    audit_checkpoints(
        &mut Mirror::new(tampered.0.path()),
        reference_log::REFERENCE.log.signer.key(),
        node,
        &mut |_, _| (),
    )
}

#[test]
fn audit_checkpoints_of_unsigned_entries_fail() {
    let honest = with_audit_checkpoints(&[(3, audit_checkpoint("a", 7)), (598, audit_checkpoint("a", 9))]);
    let trail = trail_of(&TamperedLog::signed(&honest), "a").unwrap();
    assert_eq!(trail.checkpoints, [(3, audit_checkpoint("a", 7)), (598, audit_checkpoint("a", 9))]);
    let note = checkpoint_of(&honest, &reference_log::REFERENCE.log.signer).note().to_vec();
    // The newest checkpoint is replaced by a device, replaced by a smaller one, or moved.
    let cut = with_audit_checkpoints(&[(3, audit_checkpoint("a", 7))]);
    let lowered = with_audit_checkpoints(&[(3, audit_checkpoint("a", 7)), (598, audit_checkpoint("a", 8))]);
    let moved = with_audit_checkpoints(&[(3, audit_checkpoint("a", 7)), (597, audit_checkpoint("a", 9))]);
    for entries in [cut, lowered, moved] {
        let refused = trail_of(&TamperedLog::new(&entries, &note), "a").unwrap_err();
        assert!(refused.to_string().contains("the root does not match the 600 entries"), "{refused}");
        assert!(refused.to_string().contains("run sppctl registry verify"), "{refused}");
    }
    let shorter = TamperedLog::new(&honest[..598], &note);
    assert!(matches!(trail_of(&shorter, "a"), Err(AuditTrailError::Source(SourceError::Missing(_)))));
    let other = checkpoint_of(&honest, &LocalSigner::new(ORIGIN)).note().to_vec();
    assert!(matches!(trail_of(&TamperedLog::new(&honest, &other), "a"), Err(AuditTrailError::Checkpoint { .. })));
    let found = verify_source(&mut Mirror::new(TamperedLog::new(&honest, &note).0.path()), None);
    found.assert_no_more();
}

/// An operation on a log.
#[derive(Debug, Clone)]
enum Step {
    Publish(u64),
    Audit(bool, u64, u8),
    Reopen,
    ForgetIndex,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0u64..40).prop_map(Step::Publish),
        6 => (any::<bool>(), 0u64..12, 0u8..2).prop_map(|(of, entries, note)| Step::Audit(of, entries, note)),
        1 => Just(Step::Reopen),
        1 => Just(Step::ForgetIndex),
    ]
}

proptest! {
    #![proptest_config(cases(6, 200))]

    #[test]
    fn log_behaves_like_list_of_entries(steps in prop::collection::vec(any_step(), 1..50)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(apply_steps(&steps));
    }
}

/// Applies the steps to a log and to a plain list, and compares both after each step.
async fn apply_steps(steps: &[Step]) {
    let log = Log::new();
    let mut public = log.open().await;
    let mut list: Vec<LogEntry> = Vec::new();
    for step in steps {
        match step {
            Step::Publish(n) => {
                let entry = LogEntry::Device(Box::new(record(*n)));
                let result = public.publish(&record(*n)).await;
                assert_matches_list(&mut list, entry, result);
            }
            Step::Audit(of, entries, note) => {
                let node = if *of { "one" } else { "other" };
                let checkpoint = AuditCheckpoint { note: vec![*note], ..audit_checkpoint(node, *entries) };
                let result = public.append_audit(&checkpoint).await;
                assert_matches_list(&mut list, LogEntry::Audit(checkpoint), result);
            }
            Step::Reopen | Step::ForgetIndex => {
                close(public, &log).await;
                if matches!(step, Step::ForgetIndex) {
                    fs::remove_dir_all(log.dir().join("index")).unwrap();
                }
                public = log.open().await;
            }
        }
        let devices = list.iter().filter(|entry| matches!(entry, LogEntry::Device(_))).count() as u64;
        assert_eq!(public.len().await.unwrap(), devices);
        for node in ["one", "other"] {
            let newest = (0..).zip(&list).filter_map(|(index, entry)| match entry {
                LogEntry::Audit(checkpoint) if checkpoint.node == node => Some((index, checkpoint.clone())),
                _ => None,
            });
            assert_eq!(public.newest_audit(node).await.unwrap(), newest.last());
        }
    }
}

/// Asserts that the log's answer for an entry is that of the list, and adds a new entry to the list.
fn assert_matches_list(list: &mut Vec<LogEntry>, entry: LogEntry, result: Result<Publication, PublishError>) {
    let unique = |entry: &LogEntry| entry.keys().into_iter().filter(UniqueKey::is_unique).collect::<Vec<_>>();
    let same = list.iter().position(|known| unique(known).iter().any(|key| unique(&entry).contains(key)));
    match same {
        Some(at) if list[at] == entry => assert_eq!(result.unwrap().index, at as u64),
        Some(at) => assert!(matches!(result, Err(PublishError::Conflict(taken)) if taken.index == at as u64)),
        None => {
            assert_eq!(result.unwrap().index, list.len() as u64);
            list.push(entry);
        }
    }
}
