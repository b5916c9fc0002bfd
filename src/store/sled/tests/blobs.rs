//! Tests of the batch files with wrapped private keys.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use spp_testkit::wait::eventually;

use spp_format::keys::KeyType;

use crate::store::contract_pairs::{
    ALL, P256, abort_session, aborted_at, add, is_wrong_batch, name, open_pool, pooled, public_key, ready, rewrapped,
    session_with, snapshot, wrapped,
};
use crate::store::{
    BatchPair, BatchStep, KeyStorage, PairAssignment, PairId, PairToReserve, PooledPair, Purpose, RewrappedPair,
    SecretStore,
};

/// A store with fault injection.
fn open(sled: &Sled) -> (Arc<SledStateStore>, Arc<FaultInjector>) {
    let faults = Arc::new(FaultInjector::default());
    (Arc::new(SledStateStore::open_through(&sled.dir(), &options(), faults.clone()).unwrap()), faults)
}

fn batch_file(sled: &Sled, batch: u64) -> PathBuf {
    sled.dir().join("pairs").join(batch.to_string())
}

fn random() -> Vec<u8> {
    let mut bytes = vec![0; 48];
    aws_lc_rs::rand::fill(&mut bytes).unwrap();
    bytes
}

/// Searches all files of a directory for the blobs and returns the files that contain each blob.
fn find_blobs(dir: &Path, blobs: &[Vec<u8>]) -> Vec<Vec<PathBuf>> {
    let prefixes: BTreeMap<&[u8], usize> = blobs.iter().enumerate().map(|(index, blob)| (&blob[..8], index)).collect();
    let (mut found, mut directories) = (vec![Vec::new(); blobs.len()], vec![dir.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            for window in fs::read(&path).unwrap().windows(8) {
                if let Some(index) = prefixes.get(window) {
                    found[*index].push(path.clone());
                }
            }
        }
    }
    found
}

fn assert_blobs_in(dir: &Path, blobs: &[Vec<u8>], files: &[PathBuf]) {
    let expected: Vec<_> = files.iter().map(|file| vec![file.clone()]).collect();
    assert_eq!(find_blobs(dir, blobs), expected);
}

#[tokio::test]
async fn deleted_batch_leaves_no_blob_bytes_on_disk() {
    let sled = Sled::new();
    let store = sled.state();
    let (pool, next_pool) = (open_pool(&*store).await, open_pool(&*store).await);
    let next = store.plan_batch(Purpose::Sessions, KeyStorage::Wrapped, 1000, 0).await.unwrap().number;
    store.step_batch(next, BatchStep::Open).await.unwrap();
    let old: Vec<_> = (0..12).map(|_| random()).collect();
    let pool_name = name(&*store, pool).await;
    let pair = |n: u64, blob: &Vec<u8>| PooledPair {
        public_key: public_key(n),
        private_key: wrapped(pool_name, blob.clone()),
    };
    let pairs = (0..8).zip(&old).map(|(n, blob)| pair(n, blob)).collect();
    store.add_pairs(pool, pairs).await.unwrap();
    for n in 0..3 {
        store.reserve(&session_with(n, n), Some(&pooled(pool, n))).await.unwrap();
    }
    for (n, blob) in (8..).zip(&old[8..]) {
        let on_demand = PairToReserve::OnDemand { batch: 1, blob: blob.clone() };
        store.reserve(&session_with(n, n), Some(&on_demand)).await.unwrap();
    }
    abort_session(&*store, 0, 3000).await;
    abort_session(&*store, 8, 3000).await;
    let files = [vec![batch_file(&sled, pool); 8], vec![batch_file(&sled, 1); 4]].concat();
    assert_blobs_in(&sled.dir(), &old, &files);

    let (mut new, mut new_files) = (Vec::new(), Vec::new());
    for (from, to) in [(pool, next_pool), (1, next)] {
        let held = store.pairs_of_batch(from, ALL).await.unwrap();
        let rewrap = |held: &BatchPair| RewrappedPair { assignment: held.assignment, blob: random() };
        let pairs: Vec<_> = held.iter().map(rewrap).collect();
        new.extend(pairs.iter().map(|pair| pair.blob.clone()));
        new_files.extend(vec![batch_file(&sled, to); pairs.len()]);
        store.move_pairs(from, to, pairs).await.unwrap();
        store.step_batch(from, BatchStep::Empty).await.unwrap();
    }
    // A hard link to the file shows the overwritten content after the deletion.
    let remains = sled.0.path().join("remains");
    fs::hard_link(batch_file(&sled, pool), &remains).unwrap();
    let bytes = fs::metadata(&remains).unwrap().len();
    assert_blobs_in(&sled.dir(), &old, &files);
    store.delete_batch(pool).await.unwrap();
    store.delete_batch(1).await.unwrap();
    let none = vec![Vec::<PathBuf>::new(); old.len()];
    assert_eq!(find_blobs(sled.0.path(), &old), none);
    assert_eq!(fs::read(&remains).unwrap(), vec![0; usize::try_from(bytes).unwrap()], "overwritten, not only deleted");
    assert!(!batch_file(&sled, pool).exists() && !batch_file(&sled, 1).exists());
    assert_blobs_in(&sled.dir(), &new, &new_files);
    drop(store);
    drop(sled.state());
    assert_eq!(find_blobs(sled.0.path(), &old), none);
    assert_blobs_in(&sled.dir(), &new, &new_files);
}

#[tokio::test]
async fn failed_file_sync_aborts_whole_transaction() {
    let sled = Sled::new();
    let (store, faults) = open(&sled);
    let (from, to) = (open_pool(&*store).await, open_pool(&*store).await);
    add(&*store, from, 0..3).await;
    store.reserve(&session_with(1, 1), Some(&pooled(from, 1))).await.unwrap();
    let before = snapshot(&*store).await;
    let moved: Vec<_> = store.pairs_of_batch(from, ALL).await.unwrap().iter().map(rewrapped).collect();
    let pair = PooledPair { public_key: public_key(3), private_key: wrapped(name(&*store, from).await, blob(3)) };
    for operation in ["reserving", "adding", "moving"] {
        let run = async || match operation {
            "reserving" => store.reserve(&session(7), Some(&key(7))).await.is_ok(),
            "adding" => store.add_pairs(from, vec![pair.clone()]).await.is_ok(),
            _ => store.move_pairs(from, to, moved.clone()).await.is_ok(),
        };
        // The first sync is of the batch file. Rows written before it would be found after reopening.
        faults.in_sync.store(true, SeqCst);
        assert!(!run().await, "{operation}");
        faults.in_sync.store(false, SeqCst);
        wait_until_recovered(&*store).await;
        assert_eq!(snapshot(&*store).await, before, "{operation} must leave no trace");
        assert_eq!(stored_blob(&*store, &id(7)).await, None);
    }
    store.reserve(&session(7), Some(&key(7))).await.unwrap();
    store.add_pairs(from, vec![pair]).await.unwrap();
    assert_eq!(store.move_pairs(from, to, moved.clone()).await.unwrap(), 3);
    drop(store);
    let store = sled.state();
    assert_eq!(stored_blob(&*store, &id(7)).await, Some(blob(7)));
    assert_eq!(stored_blob(&*store, &id(1)).await, Some(moved[0].blob.clone()));
    assert_eq!(ready(&*store).await[0].1.private_key, wrapped(name(&*store, from).await, blob(3)));
}

#[tokio::test]
async fn trailing_bytes_after_crash_are_ignored() {
    let sled = Sled::new();
    let mut store = sled.state();
    let pool = open_pool(&*store).await;
    for round in 0..3 {
        let n = 10 * round;
        add(&*store, pool, n..n + 5).await;
        store.reserve(&session(n), Some(&key(n))).await.unwrap();
        let before = snapshot(&*store).await;
        drop(store);
        // Simulates a crash after the file was written and before the rows were.
        for batch in [1, pool] {
            let mut file = OpenOptions::new().append(true).open(batch_file(&sled, batch)).unwrap();
            file.write_all(&vec![0xEE; 37 + usize::try_from(n).unwrap()]).unwrap();
        }
        store = sled.state();
        assert_eq!(snapshot(&*store).await, before);
    }
    for n in [0, 10, 20] {
        assert_eq!(stored_blob(&*store, &id(n)).await, Some(blob(n)));
    }
    let pool = name(&*store, pool).await;
    let keys: Vec<_> = ready(&*store).await.into_iter().map(|(_, pair)| pair.private_key).collect();
    let added = [0, 10, 20].into_iter().flat_map(|n| n..n + 5);
    assert_eq!(keys, added.map(|n| wrapped(pool, blob(n))).collect::<Vec<_>>());
}

#[tokio::test]
async fn refused_transaction_does_not_shift_other_blobs() {
    let sled = Sled::new();
    let (store, faults) = open(&sled);
    let pool = open_pool(&*store).await;
    let name = name(&*store, pool).await;
    faults.slow.store(5, SeqCst);
    let before = faults.syncs.load(SeqCst);
    let long = |n: u64| n.to_be_bytes().repeat(2 + usize::try_from(n % 7).unwrap());
    let calls = (1..=200).map(|n| {
        let store = store.clone();
        let pair = move |n, batch| PooledPair { public_key: public_key(n), private_key: wrapped(batch, long(n)) };
        tokio::spawn(async move {
            // Half of the calls are refused: sessions because their chip is taken, pairs after two of a call were written.
            let new = if n % 2 == 0 { session(n) } else { Session { chip: session(0).chip, ..session(n) } };
            let last = if n % 2 == 0 { name } else { crate::hsm::BatchName { number: 99, ..name } };
            let pairs = vec![pair(3 * n, name), pair(3 * n + 1, name), pair(3 * n + 2, last)];
            let reserve = store.reserve(&new, Some(&PairToReserve::OnDemand { batch: 1, blob: long(n) })).await;
            (n, reserve.is_ok(), store.add_pairs(pool, pairs).await.is_ok())
        })
    });
    let (mut reserved, mut added) = (0, Vec::new());
    for call in calls.collect::<Vec<_>>() {
        let (n, has_session, has_pairs) = call.await.unwrap();
        reserved += u64::from(has_session);
        assert_eq!(stored_blob(&*store, &id(n)).await, has_session.then(|| long(n)));
        assert_eq!(has_pairs, n % 2 == 0);
        added.extend(has_pairs.then_some([3 * n, 3 * n + 1, 3 * n + 2]).into_iter().flatten());
    }
    assert_eq!(reserved, 101, "100 on separate chips and one on the shared chip");
    assert!(faults.syncs.load(SeqCst) - before < 200, "calls must share syncs");
    drop(store);
    let store = sled.state();
    let mut found = ready(&*store).await;
    found.sort_by(|(_, a), (_, b)| a.public_key.cmp(&b.public_key));
    let found: Vec<_> = found.into_iter().map(|(_, pair)| pair).collect();
    let pair = |n| PooledPair { public_key: public_key(n), private_key: wrapped(name, long(n)) };
    assert_eq!(found, added.into_iter().map(pair).collect::<Vec<_>>());
}

/// Keeps the committer busy, so that the next calls form one batch.
async fn occupy_committer(store: &Arc<SledStateStore>, faults: &FaultInjector) {
    let syncs = faults.syncs.load(SeqCst);
    faults.slow.store(300, SeqCst);
    let store = store.clone();
    tokio::spawn(async move { store.plan_batch(P256, KeyStorage::Hsm, 1000, 0).await.unwrap() });
    eventually("the committer syncs", async || faults.syncs.load(SeqCst) > syncs).await;
    faults.slow.store(0, SeqCst);
}

#[tokio::test]
async fn calls_in_a_batch_see_earlier_results() {
    let sled = Sled::new();
    let (store, faults) = open(&sled);
    let (from, to) = (open_pool(&*store).await, open_pool(&*store).await);
    let (old, new) = (name(&*store, from).await, name(&*store, to).await);
    let pairs = (0..4).map(|n| PooledPair { public_key: public_key(n), private_key: wrapped(old, blob(n)) }).collect();
    let pair_id = |batch, number| PairId { batch, number };
    let (taken, moved) =
        (session_with(0, 0), [PairAssignment::Ready(pair_id(from, 1)), PairAssignment::Session(id(0))]);
    let moved = moved.map(|assignment| RewrappedPair { assignment, blob: blob(77) });
    let first_pair_of_all = pooled(from, 0);
    let aborted = aborted_at(3000);
    occupy_committer(&store, &faults).await;
    let syncs = faults.syncs.load(SeqCst);
    let (_, first, first_pair, _, second, stored_key, count, third, held, _, discarded, last, counts, emptied) = tokio::join!(
        store.add_pairs(from, pairs),
        store.ready_pairs(KeyType::P256, Some(pair_id(from, 0)), 2),
        store.ready_pairs(KeyType::P256, None, 1),
        store.reserve(&taken, Some(&first_pair_of_all)),
        store.ready_pairs(KeyType::P256, None, ALL),
        store.stored_key(&taken.id),
        store.move_pairs(from, to, moved.into()),
        store.ready_pairs(KeyType::P256, Some(pair_id(from, 2)), 2),
        store.pairs_of_batch(to, ALL),
        store.advance(&taken.id, StateName::Reserved, aborted),
        store.step_batch(from, BatchStep::Discard),
        store.ready_pairs(KeyType::P256, None, ALL),
        store.pair_counts(KeyType::P256),
        store.step_batch(from, BatchStep::Empty),
    );
    assert_eq!(faults.syncs.load(SeqCst) - syncs, 3, "two files and the log, in one batch");
    let ids = |page: Result<Vec<(PairId, PooledPair)>, StoreError>| -> Vec<_> {
        page.unwrap().into_iter().map(|(id, _)| id).collect()
    };
    assert_eq!(ids(first), [pair_id(from, 1), pair_id(from, 2)]);
    assert_eq!(first_pair.unwrap()[0].1.private_key, wrapped(old, blob(0)));
    assert_eq!(ids(second), [pair_id(from, 1), pair_id(from, 2), pair_id(from, 3)]);
    assert_eq!(stored_key.unwrap(), Some(wrapped(old, blob(0))));
    assert_eq!(count.unwrap(), 2);
    assert_eq!(ids(third), [pair_id(from, 3), pair_id(to, 0)]);
    let held: Vec<_> = held.unwrap().into_iter().map(|held| (held.assignment, held.private_key)).collect();
    assert_eq!(
        held,
        [PairAssignment::Session(id(0)), PairAssignment::Ready(pair_id(to, 0))]
            .map(|assignment| (assignment, wrapped(new, blob(77))))
    );
    assert_eq!(discarded.unwrap().ready, 0);
    assert_eq!(ids(last), [pair_id(to, 0)]);
    let counts = counts.unwrap();
    assert_eq!((counts.made, counts.reserved, counts.discarded), (4, 1, 2));
    assert!(emptied.unwrap().has_no_pairs());
    let before = snapshot(&*store).await;
    drop(store);
    assert_eq!(snapshot(&*sled.state()).await, before);
}

#[tokio::test]
async fn file_remains_until_batch_is_durably_empty() {
    for fails in [true, false] {
        let sled = Sled::new();
        let (store, faults) = open(&sled);
        let pool = open_pool(&*store).await;
        add(&*store, pool, 0..3).await;
        let before = ready(&*store).await;
        let last = PooledPair { public_key: public_key(3), private_key: wrapped(name(&*store, pool).await, random()) };
        occupy_committer(&store, &faults).await;
        faults.before_apply.store(fails, SeqCst);
        let (_, _, emptied, deleted) = tokio::join!(
            store.add_pairs(pool, vec![last]),
            store.step_batch(pool, BatchStep::Discard),
            store.step_batch(pool, BatchStep::Empty),
            store.delete_batch(pool),
        );
        faults.before_apply.store(false, SeqCst);
        if fails {
            assert!(deleted.is_err());
            wait_until_recovered(&*store).await;
            assert_eq!(ready(&*store).await, before, "with their blobs");
        } else {
            emptied.unwrap();
            assert!(is_wrong_batch(deleted), "its state is not durable yet");
            store.delete_batch(pool).await.unwrap();
            assert!(!batch_file(&sled, pool).exists());
        }
    }
}

#[tokio::test]
async fn below_floor_no_pair_is_added_or_reserved() {
    let sled = Sled::new();
    let (store, faults) = open(&sled);
    let (from, to) = (open_pool(&*store).await, open_pool(&*store).await);
    add(&*store, from, 0..4).await;
    store.reserve(&session_with(0, 0), Some(&pooled(from, 0))).await.unwrap();
    let held = store.pairs_of_batch(from, ALL).await.unwrap();
    let pair = PooledPair { public_key: public_key(4), private_key: wrapped(name(&*store, from).await, blob(4)) };
    let set_free = async |bytes: u64| {
        faults.free.store(bytes, SeqCst);
        // 0 stands for the real free space.
        let is_read = |free| if bytes == 0 { free > 16 << 20 } else { free == bytes };
        eventually("the free space is refreshed", async || is_read(store.disk_space().unwrap().0)).await;
    };
    set_free((16 << 20) - 1).await;
    let before = snapshot(&*store).await;
    let refused = store.reserve(&session_with(1, 1), Some(&pooled(from, 1))).await;
    assert!(matches!(refused, Err(ReserveError::Store(StoreError::Full { .. }))), "{refused:?}");
    let refused = store.add_pairs(from, vec![pair]).await;
    assert!(matches!(refused, Err(StoreError::Full { .. })), "{refused:?}");
    assert_eq!(snapshot(&*store).await, before);
    let moved = held.iter().map(rewrapped).collect();
    assert_eq!(store.move_pairs(from, to, moved).await.unwrap(), 4, "shredding continues");
    abort_session(&*store, 0, 3000).await;
    store.step_batch(from, BatchStep::Empty).await.unwrap();
    store.delete_batch(from).await.unwrap();
    set_free(1 << 20).await;
    let refused = store.step_batch(to, BatchStep::Discard).await;
    assert!(matches!(refused, Err(StoreError::Full { .. })), "{refused:?}");
    assert_eq!(ready(&*store).await.len(), 3);
    set_free(0).await;
    store.reserve(&session_with(1, 1), Some(&pooled(to, 1))).await.unwrap();
}

/// The trailing bytes could be a pair that was being moved during the crash and was erased since.
#[tokio::test]
async fn open_overwrites_trailing_bytes_after_crash() {
    let sled = Sled::new();
    sled.state().reserve(&session(1), Some(&key(1))).await.unwrap();
    let pairs = sled.dir().join("pairs");
    let (known, unknown) = (pairs.join("1"), pairs.join("77"));
    let valid_len = fs::metadata(&known).unwrap().len();
    let trailing: Vec<u8> = (0..100).map(|n: u8| n.wrapping_mul(41) ^ 0x5a).collect();
    for path in [&known, &unknown] {
        OpenOptions::new().create(true).append(true).open(path).unwrap().write_all(&trailing).unwrap();
    }
    let hard_link = sled.0.path().join("same-bytes");
    fs::hard_link(&known, &hard_link).unwrap();
    let store = sled.state();
    assert_eq!(fs::metadata(&known).unwrap().len(), valid_len);
    assert!(!unknown.exists());
    assert!(!fs::read(&hard_link).unwrap().windows(8).any(|bytes| bytes == &trailing[..8]));
    assert_eq!(stored_blob(&*store, &id(1)).await, Some(blob(1)));
}
