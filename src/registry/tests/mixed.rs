//! Device records and audit checkpoints in one log: neither is taken for the other, whatever happens to the log.

use proptest::prelude::*;

use super::super::export::chip_files;
use super::super::first_checkpoints;
use super::real::{Shown, found as found_in, with};
use super::*;
use crate::store::contract_public::audit_of;
use crate::store::{AuditCheckpoint, LogEntry};
use crate::tlog::LogProof;

/// Which entries are audit checkpoints: sometimes several in a row.
fn is_audit(n: u64) -> bool {
    n.is_multiple_of(7) || (100..110).contains(&n)
}

fn node(n: u64) -> &'static str {
    if n.is_multiple_of(2) { "even" } else { "odd" }
}

fn audit(n: u64) -> AuditCheckpoint {
    audit_of(node(n), n)
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

/// Appends entries one after the other, so that entry `n` is at place `n`.
async fn mix(public: &Arc<TransparencyLog>, numbers: std::ops::Range<u64>) {
    for n in numbers {
        let told = match is_audit(n) {
            true => public.append_audit(&audit(n)).await,
            false => public.publish(&record(n)).await,
        };
        assert_eq!(told.unwrap().index, n);
    }
}

async fn must_be_mixed(log: &Log, public: &TransparencyLog, size: u64) {
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
                assert_eq!(public.publish(&later(n)).await.unwrap().index, n);
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
async fn both_kinds_are_found_and_counted_after_reopening_and_in_an_index_that_is_made_anew() {
    let log = Log::new();
    let mut size = 0;
    for next in [1, 99, 111, 255, 256, 257, 300, 520] {
        let public = log.open().await;
        mix(&public, size..next).await;
        size = next;
        if size > 1 {
            must_be_mixed(&log, &public, size).await;
        }
        closed(public, &log).await;
    }
    must_be_mixed(&log, &*log.open().await, size).await;
    fs::remove_dir_all(log.dir().join("index")).unwrap();
    let public = log.open().await;
    assert_eq!(public.len().await.unwrap(), records_below(size), "it does not wait for the index");
    must_be_mixed(&log, &public, size).await;
    closed(public, &log).await;
    let made = reindex(&log.dir(), &options(), log.signer.key(), false, |_, _| ()).await.unwrap();
    assert_eq!(made, Reindexed { entries: size, lost: 0 });
    must_be_mixed(&log, &*log.open().await, size).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_number_of_records_is_read_and_counted_only_where_it_was_not_kept() {
    let log = Log::new();
    let public = log.open().await;
    mix(&public, 0..520).await;
    closed(public, &log).await;
    let (bundle, kept) = (log.dir().join("tile/entries/000"), log.dir().join("signed/001"));
    let bytes = fs::read(&bundle).unwrap();
    // With a bundle away it cannot be counted.
    fs::remove_file(&bundle).unwrap();
    assert_eq!(first_checkpoints::records_below(&log.dir(), 512).unwrap(), records_below(512));
    fs::remove_file(&kept).unwrap();
    let refused = log.try_open().await.err().unwrap();
    assert!(refused.to_string().contains("tile/entries/000"), "{refused}");
    assert!(refused.to_string().contains("put the same file of a mirror in its place"), "{refused}");
    fs::write(&bundle, bytes).unwrap();
    must_be_mixed(&log, &*log.open().await, 520).await;
    assert_eq!(fs::read(&kept).unwrap(), records_below(512).to_be_bytes(), "it is kept from now on");
    // What is damaged is counted again, and left as it is.
    for damaged in [&513u64.to_be_bytes()[..], &[7; 5]] {
        fs::write(&kept, damaged).unwrap();
        assert_eq!(first_checkpoints::records_below(&log.dir(), 512).unwrap(), records_below(512));
        assert_eq!(fs::read(&kept).unwrap(), damaged);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_of_records_alone_has_the_files_that_it_always_had() {
    let log = Log::new();
    let public = log.open().await;
    grow(&public, 0..300).await;
    closed(public, &log).await;
    let kept = fs::read(log.dir().join("signed/000")).unwrap();
    assert!(!kept.is_empty() && kept.len().is_multiple_of(72), "{}", kept.len());
    assert_eq!(first_checkpoints::records_below(&log.dir(), 256).unwrap(), 256);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newest_record_is_found_behind_more_than_a_bundle_of_audit_checkpoints() {
    let log = Log::new();
    let public = log.open().await;
    public.publish(&record(1)).await.unwrap();
    let mut tasks = JoinSet::new();
    for n in 0..520 {
        let public = public.clone();
        tasks.spawn(async move { public.append_audit(&audit_of("node-1", n)).await.unwrap() });
    }
    let told = tasks.join_all().await;
    assert_eq!(told.len(), 520);
    closed(public, &log).await;
    let public = log.open().await;
    assert_eq!(public.newest().await.unwrap().unwrap().record, record(1));
    assert_eq!(public.len().await.unwrap(), 1);
    assert_eq!(public.newest_audit("node-1").await.unwrap().unwrap().0, 520);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_audit_checkpoint_that_failed_is_in_once_after_repeating_it() {
    for (persisted, before) in [(false, 3), (true, 3), (false, 255), (true, 255)] {
        let (log, faults) = (Log::new(), Arc::new(Faults::default()));
        let public = log.open_through(&faults).await;
        grow(&public, 0..before).await;
        let fault = if persisted { &faults.in_sync } else { &faults.before_apply };
        fault.store(true, SeqCst);
        assert!(
            matches!(public.append_audit(&audit(before)).await, Err(PublishError::Store(error)) if is_away(&error))
        );
        fault.store(false, SeqCst);
        let again = AuditCheckpoint { recorded: 7777, ..audit(before) };
        let publication = eventually("it is appended", async || public.append_audit(&again).await).await;
        let recorded = if persisted { audit(before).recorded } else { 7777 };
        assert_eq!((publication.index, publication.published), (before, recorded));
        let (index, newest) = public.newest_audit(node(before)).await.unwrap().unwrap();
        assert_eq!((index, newest.recorded), (before, recorded));
        closed(public, &log).await;
        let public = log.open().await;
        assert_eq!(public.newest_audit(node(before)).await.unwrap().unwrap().0, before);
        assert_eq!(
            (public.len().await.unwrap(), public.checkpoint().await.unwrap().unwrap().size()),
            (before, before + 1)
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_told_of_an_older_audit_checkpoint_while_it_is_not_known_whether_a_newer_one_is_in() {
    let (log, faults) = (Log::new(), Arc::new(Faults::default()));
    let public = log.open_through(&faults).await;
    public.append_audit(&audit_of("a", 1)).await.unwrap();
    let (edge, away) = (log.dir().join("edge"), log.dir().join("away"));
    fs::rename(&edge, &away).unwrap();
    faults.in_sync.store(true, SeqCst);
    assert!(matches!(public.append_audit(&audit_of("a", 2)).await, Err(PublishError::Store(_))));
    faults.in_sync.store(false, SeqCst);
    let unknown = public.newest_audit("a").await.unwrap_err();
    assert!(unknown.to_string().contains("it is not known yet whether it was published"), "{unknown}");
    fs::rename(&away, &edge).unwrap();
    until_published(&public, &record(3)).await;
    assert_eq!(public.newest_audit("a").await.unwrap(), Some((1, audit_of("a", 2))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_has_both_kinds_and_files_for_the_devices_alone_and_gives_the_audit_checkpoints() {
    let log = Log::new();
    let public = log.open().await;
    mix(&public, 0..300).await;
    let (mirror, key) = (log.dir.path().join("mirror"), log.signer.key());
    let exported = export(&mut StoreDirectory::new(&log.dir(), key), key, &mirror, &mut |_, _| ()).unwrap();
    assert_eq!(exported, Exported { before: 0, now: 300 });
    mix(&public, 300..520).await;
    let exported = export(&mut StoreDirectory::new(&log.dir(), key), key, &mirror, &mut |_, _| ()).unwrap();
    assert_eq!(exported, Exported { before: 300, now: 520 });
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
        for of in ["even", "odd", "nobody"] {
            let trail = audit_checkpoints(source, key, of, &mut |_, _| ()).unwrap();
            let expected: Vec<_> = (0..520).filter(|n| is_audit(*n) && node(*n) == of).map(|n| (n, audit(n))).collect();
            assert_eq!((trail.checkpoint.size(), trail.found), (520, expected));
        }
        let walked = verify(source, &VerifyOptions { key, issuers: &[], seen: None }, &mut |_, _| ());
        assert!(walked.findings.iter().all(|finding| finding.problem.contains("no issuer is known")), "{walked:?}");
        let records = records_below(520);
        assert_eq!((walked.entries, walked.records, walked.audit_checkpoints), (520, records, 520 - records));
    }
}

/// A manufacturer's log with an audit checkpoint in the place of some devices.
fn with_audits(audits: &[(usize, AuditCheckpoint)]) -> Vec<Vec<u8>> {
    let mut entries = with(0, |_| ());
    for (at, checkpoint) in audits {
        entries[*at] = checkpoint.to_bytes().unwrap();
    }
    entries
}

#[test]
fn an_audit_checkpoint_that_is_there_twice_or_is_not_as_it_must_be_is_named() {
    let honest = with_audits(&[(3, audit_of("a", 7)), (4, audit_of("b", 7)), (400, audit_of("a", 8))]);
    Shown::signed(&honest).found().and_nothing_else();
    let twice = with_audits(&[(3, audit_of("a", 7)), (400, AuditCheckpoint { note: vec![1], ..audit_of("a", 7) })]);
    let words = "its number of audit entries is that of entry 3 already";
    Shown::signed(&twice).found().has("entry 400", words).and_nothing_else();
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
        let shown = Shown::signed(&entries);
        shown.found().has("entry 3", "not an audit checkpoint").and_nothing_else();
        let refused = trail_of(&shown, "a").unwrap_err().to_string();
        assert!(refused.contains("entry 3 of ") && refused.contains("not an audit checkpoint"), "{refused}");
    }
}

fn trail_of(shown: &Shown, node: &str) -> Result<AuditTrail, AuditTrailError> {
    audit_checkpoints(&mut Mirror::new(shown.0.path()), real::REAL.log.signer.key(), node, &mut |_, _| ())
}

#[test]
fn no_audit_checkpoint_is_given_of_a_log_that_is_not_the_signed_one() {
    let honest = with_audits(&[(3, audit_of("a", 7)), (598, audit_of("a", 9))]);
    let trail = trail_of(&Shown::signed(&honest), "a").unwrap();
    assert_eq!(trail.found, [(3, audit_of("a", 7)), (598, audit_of("a", 9))]);
    let note = checkpoint_of(&honest, &real::REAL.log.signer).note().to_vec();
    // The newest one replaced by a device, by a smaller one, or moved.
    let cut = with_audits(&[(3, audit_of("a", 7))]);
    let lowered = with_audits(&[(3, audit_of("a", 7)), (598, audit_of("a", 8))]);
    let moved = with_audits(&[(3, audit_of("a", 7)), (597, audit_of("a", 9))]);
    for entries in [cut, lowered, moved] {
        let refused = trail_of(&Shown::made_of(&entries, &note), "a").unwrap_err();
        assert!(refused.to_string().contains("its root is not that of the 600 entries"), "{refused}");
        assert!(refused.to_string().contains("see sppctl registry verify"), "{refused}");
    }
    let shorter = Shown::made_of(&honest[..598], &note);
    assert!(matches!(trail_of(&shorter, "a"), Err(AuditTrailError::Source(SourceError::Missing(_)))));
    let other = checkpoint_of(&honest, &LocalSigner::new(ORIGIN)).note().to_vec();
    assert!(matches!(trail_of(&Shown::made_of(&honest, &other), "a"), Err(AuditTrailError::Checkpoint { .. })));
    let found = found_in(&mut Mirror::new(Shown::made_of(&honest, &note).0.path()), None);
    found.and_nothing_else();
}

/// What is done to a log, in any order.
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
    fn any_mixture_is_what_a_list_of_entries_would_be(steps in prop::collection::vec(any_step(), 1..50)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(follow(&steps));
    }
}

/// Takes the steps beside a plain list, and compares after each.
async fn follow(steps: &[Step]) {
    let log = Log::new();
    let mut public = log.open().await;
    let mut list: Vec<LogEntry> = Vec::new();
    for step in steps {
        match step {
            Step::Publish(n) => {
                let entry = LogEntry::Device(Box::new(record(*n)));
                let told = public.publish(&record(*n)).await;
                must_be_the_lists(&mut list, entry, told);
            }
            Step::Audit(of, entries, note) => {
                let node = if *of { "one" } else { "other" };
                let checkpoint = AuditCheckpoint { note: vec![*note], ..audit_of(node, *entries) };
                let told = public.append_audit(&checkpoint).await;
                must_be_the_lists(&mut list, LogEntry::Audit(checkpoint), told);
            }
            Step::Reopen | Step::ForgetIndex => {
                closed(public, &log).await;
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

/// The list's answer to an entry that comes, which is the log's.
fn must_be_the_lists(list: &mut Vec<LogEntry>, entry: LogEntry, told: Result<Publication, PublishError>) {
    let unique = |entry: &LogEntry| entry.keys().into_iter().filter(UniqueKey::is_unique).collect::<Vec<_>>();
    let same = list.iter().position(|known| unique(known).iter().any(|key| unique(&entry).contains(key)));
    match same {
        Some(at) if list[at] == entry => assert_eq!(told.unwrap().index, at as u64),
        Some(at) => assert!(matches!(told, Err(PublishError::Taken(taken)) if taken.index == at as u64)),
        None => {
            assert_eq!(told.unwrap().index, list.len() as u64);
            list.push(entry);
        }
    }
}
