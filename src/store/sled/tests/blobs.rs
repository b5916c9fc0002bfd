//! What only the files of the wrapped keys must do.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use spp_testkit::wait::eventually;

use crate::keys::KeyKind;
use crate::store::contract_pairs::{
    ALL, P256, abort, add, everything, is_wrong, name, open_pool, pooled, public_key, ready, rewrapped, session_with,
    wrapped,
};
use crate::store::{
    BatchStep, HeldPair, Holder, KeyStorage, MovedPair, PairId, PairToReserve, PooledPair, Purpose, SecretStore,
};

/// A store whose disk does what it is told.
fn open(sled: &Sled) -> (Arc<SledStateStore>, Arc<Faults>) {
    let faults = Arc::new(Faults::default());
    (Arc::new(SledStateStore::open_through(&sled.dir(), &options(), faults.clone()).unwrap()), faults)
}

fn file_of(sled: &Sled, batch: u64) -> PathBuf {
    sled.dir().join("pairs").join(batch.to_string())
}

fn random() -> Vec<u8> {
    let mut bytes = vec![0; 48];
    aws_lc_rs::rand::fill(&mut bytes).unwrap();
    bytes
}

/// In which files the blobs are, all files of the store searched byte by byte.
fn places(dir: &Path, blobs: &[Vec<u8>]) -> Vec<Vec<PathBuf>> {
    let begins: BTreeMap<&[u8], usize> = blobs.iter().enumerate().map(|(at, blob)| (&blob[..8], at)).collect();
    let (mut found, mut directories) = (vec![Vec::new(); blobs.len()], vec![dir.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            for window in fs::read(&path).unwrap().windows(8) {
                if let Some(at) = begins.get(window) {
                    found[*at].push(path.clone());
                }
            }
        }
    }
    found
}

fn are_in(dir: &Path, blobs: &[Vec<u8>], files: &[PathBuf]) {
    let expected: Vec<_> = files.iter().map(|file| vec![file.clone()]).collect();
    assert_eq!(places(dir, blobs), expected);
}

#[tokio::test]
async fn a_forgotten_batch_leaves_no_byte_of_a_blob_and_the_database_never_had_one() {
    let sled = Sled::new();
    let store = sled.state();
    let (pool, next_pool) = (open_pool(&*store).await, open_pool(&*store).await);
    let next = store.plan_batch(Purpose::Sessions, KeyStorage::Wrapped, 1000, 0).await.unwrap().number;
    store.step_batch(next, BatchStep::Open).await.unwrap();
    let old: Vec<_> = (0..12).map(|_| random()).collect();
    let of_pool = name(&*store, pool).await;
    let pair = |n: u64, blob: &Vec<u8>| PooledPair { public_key: public_key(n), kept: wrapped(of_pool, blob.clone()) };
    let pairs = (0..8).zip(&old).map(|(n, blob)| pair(n, blob)).collect();
    store.add_pairs(pool, pairs).await.unwrap();
    for n in 0..3 {
        store.reserve(&session_with(n, n), Some(&pooled(pool, n))).await.unwrap();
    }
    for (n, blob) in (8..).zip(&old[8..]) {
        let made = PairToReserve::Made { batch: 1, blob: blob.clone() };
        store.reserve(&session_with(n, n), Some(&made)).await.unwrap();
    }
    abort(&*store, 0, 3000).await;
    abort(&*store, 8, 3000).await;
    let files = [vec![file_of(&sled, pool); 8], vec![file_of(&sled, 1); 4]].concat();
    are_in(&sled.dir(), &old, &files);

    let (mut new, mut new_files) = (Vec::new(), Vec::new());
    for (from, to) in [(pool, next_pool), (1, next)] {
        let held = store.pairs_of_batch(from, ALL).await.unwrap();
        let rewrap = |held: &HeldPair| MovedPair { holder: held.holder, blob: random() };
        let pairs: Vec<_> = held.iter().map(rewrap).collect();
        new.extend(pairs.iter().map(|pair| pair.blob.clone()));
        new_files.extend(vec![file_of(&sled, to); pairs.len()]);
        store.move_pairs(from, to, pairs).await.unwrap();
        store.step_batch(from, BatchStep::Empty).await.unwrap();
    }
    // A second name of the file shows what is left where it was.
    let remains = sled.0.path().join("remains");
    fs::hard_link(file_of(&sled, pool), &remains).unwrap();
    let bytes = fs::metadata(&remains).unwrap().len();
    are_in(&sled.dir(), &old, &files);
    store.forget_batch(pool).await.unwrap();
    store.forget_batch(1).await.unwrap();
    let gone = vec![Vec::<PathBuf>::new(); old.len()];
    assert_eq!(places(sled.0.path(), &old), gone);
    assert_eq!(fs::read(&remains).unwrap(), vec![0; usize::try_from(bytes).unwrap()], "overwritten, not only removed");
    assert!(!file_of(&sled, pool).exists() && !file_of(&sled, 1).exists());
    are_in(&sled.dir(), &new, &new_files);
    drop(store);
    drop(sled.state());
    assert_eq!(places(sled.0.path(), &old), gone);
    are_in(&sled.dir(), &new, &new_files);
}

#[tokio::test]
async fn a_failed_sync_of_a_file_loses_the_whole_transaction() {
    let sled = Sled::new();
    let (store, faults) = open(&sled);
    let (from, to) = (open_pool(&*store).await, open_pool(&*store).await);
    add(&*store, from, 0..3).await;
    store.reserve(&session_with(1, 1), Some(&pooled(from, 1))).await.unwrap();
    let before = everything(&*store).await;
    let moved: Vec<_> = store.pairs_of_batch(from, ALL).await.unwrap().iter().map(rewrapped).collect();
    let pair = PooledPair { public_key: public_key(3), kept: wrapped(name(&*store, from).await, blob(3)) };
    for what in ["reserving", "adding", "moving"] {
        let run = async || match what {
            "reserving" => store.reserve(&session(7), Some(&key(7))).await.is_ok(),
            "adding" => store.add_pairs(from, vec![pair.clone()]).await.is_ok(),
            _ => store.move_pairs(from, to, moved.clone()).await.is_ok(),
        };
        // The first sync is the file's. Had the rows been written before it, opening again would find them.
        faults.in_sync.store(true, SeqCst);
        assert!(!run().await, "{what}");
        faults.in_sync.store(false, SeqCst);
        until_healed(&*store).await;
        assert_eq!(everything(&*store).await, before, "nothing of {what} is there");
        assert_eq!(kept(&*store, &id(7)).await, None);
    }
    store.reserve(&session(7), Some(&key(7))).await.unwrap();
    store.add_pairs(from, vec![pair]).await.unwrap();
    assert_eq!(store.move_pairs(from, to, moved.clone()).await.unwrap(), 3);
    drop(store);
    let store = sled.state();
    assert_eq!(kept(&*store, &id(7)).await, Some(blob(7)));
    assert_eq!(kept(&*store, &id(1)).await, Some(moved[0].blob.clone()));
    assert_eq!(ready(&*store).await[0].1.kept, wrapped(name(&*store, from).await, blob(3)));
}

#[tokio::test]
async fn bytes_behind_the_last_named_blob_do_no_harm() {
    let sled = Sled::new();
    let mut store = sled.state();
    let pool = open_pool(&*store).await;
    for round in 0..3 {
        let n = 10 * round;
        add(&*store, pool, n..n + 5).await;
        store.reserve(&session(n), Some(&key(n))).await.unwrap();
        let before = everything(&*store).await;
        drop(store);
        // What a crash leaves between the file and the rows.
        for batch in [1, pool] {
            let mut file = OpenOptions::new().append(true).open(file_of(&sled, batch)).unwrap();
            file.write_all(&vec![0xEE; 37 + usize::try_from(n).unwrap()]).unwrap();
        }
        store = sled.state();
        assert_eq!(everything(&*store).await, before);
    }
    for n in [0, 10, 20] {
        assert_eq!(kept(&*store, &id(n)).await, Some(blob(n)));
    }
    let pool = name(&*store, pool).await;
    let kept: Vec<_> = ready(&*store).await.into_iter().map(|(_, pair)| pair.kept).collect();
    let added = [0, 10, 20].into_iter().flat_map(|n| n..n + 5);
    assert_eq!(kept, added.map(|n| wrapped(pool, blob(n))).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_refused_transaction_does_not_shift_the_blobs_of_others() {
    let sled = Sled::new();
    let (store, faults) = open(&sled);
    let pool = open_pool(&*store).await;
    let name = name(&*store, pool).await;
    faults.slow.store(5, SeqCst);
    let before = faults.syncs.load(SeqCst);
    let long = |n: u64| n.to_be_bytes().repeat(2 + usize::try_from(n % 7).unwrap());
    let calls = (1..=200).map(|n| {
        let store = store.clone();
        let pair = move |n, kept_for| PooledPair { public_key: public_key(n), kept: wrapped(kept_for, long(n)) };
        tokio::spawn(async move {
            // Every other one is refused: the session after its chip was taken, the pairs after the first two were written.
            let new = if n % 2 == 0 { session(n) } else { Session { chip: session(0).chip, ..session(n) } };
            let last = if n % 2 == 0 { name } else { crate::keys::BatchName { number: 99, ..name } };
            let pairs = vec![pair(3 * n, name), pair(3 * n + 1, name), pair(3 * n + 2, last)];
            let reserve = store.reserve(&new, Some(&PairToReserve::Made { batch: 1, blob: long(n) })).await;
            (n, reserve.is_ok(), store.add_pairs(pool, pairs).await.is_ok())
        })
    });
    let (mut reserved, mut added) = (0, Vec::new());
    for call in calls.collect::<Vec<_>>() {
        let (n, has_session, has_pairs) = call.await.unwrap();
        reserved += u64::from(has_session);
        assert_eq!(kept(&*store, &id(n)).await, has_session.then(|| long(n)));
        assert_eq!(has_pairs, n % 2 == 0);
        added.extend(has_pairs.then_some([3 * n, 3 * n + 1, 3 * n + 2]).into_iter().flatten());
    }
    assert_eq!(reserved, 101, "all on chips of their own, and one on the chip of the others");
    assert!(faults.syncs.load(SeqCst) - before < 200, "they shared syncs");
    drop(store);
    let store = sled.state();
    let mut found = ready(&*store).await;
    found.sort_by(|(_, a), (_, b)| a.public_key.cmp(&b.public_key));
    let found: Vec<_> = found.into_iter().map(|(_, pair)| pair).collect();
    let pair = |n| PooledPair { public_key: public_key(n), kept: wrapped(name, long(n)) };
    assert_eq!(found, added.into_iter().map(pair).collect::<Vec<_>>());
}

/// Keeps the committer busy, so that the calls made next are one batch.
async fn while_busy(store: &Arc<SledStateStore>, faults: &Faults) {
    let syncs = faults.syncs.load(SeqCst);
    faults.slow.store(300, SeqCst);
    let busy = store.clone();
    tokio::spawn(async move { busy.plan_batch(P256, KeyStorage::Hsm, 1000, 0).await.unwrap() });
    eventually("the committer syncs", async || faults.syncs.load(SeqCst) > syncs).await;
    faults.slow.store(0, SeqCst);
}

#[tokio::test]
async fn calls_in_one_batch_see_what_those_before_them_did() {
    let sled = Sled::new();
    let (store, faults) = open(&sled);
    let (from, to) = (open_pool(&*store).await, open_pool(&*store).await);
    let (old, new) = (name(&*store, from).await, name(&*store, to).await);
    let pairs = (0..4).map(|n| PooledPair { public_key: public_key(n), kept: wrapped(old, blob(n)) }).collect();
    let at = |batch, number| PairId { batch, number };
    let (taken, moved) = (session_with(0, 0), [Holder::Ready(at(from, 1)), Holder::Session(id(0))]);
    let moved = moved.map(|holder| MovedPair { holder, blob: blob(77) });
    let first_pair_of_all = pooled(from, 0);
    let given_up = crate::store::contract_pairs::given_up(3000);
    while_busy(&store, &faults).await;
    let syncs = faults.syncs.load(SeqCst);
    let (_, first, first_pair, _, second, kept_key, count, third, held, _, discarded, last, counts, emptied) = tokio::join!(
        store.add_pairs(from, pairs),
        store.ready_pairs(KeyKind::P256, Some(at(from, 0)), 2),
        store.ready_pairs(KeyKind::P256, None, 1),
        store.reserve(&taken, Some(&first_pair_of_all)),
        store.ready_pairs(KeyKind::P256, None, ALL),
        store.kept_key(&taken.id),
        store.move_pairs(from, to, moved.into()),
        store.ready_pairs(KeyKind::P256, Some(at(from, 2)), 2),
        store.pairs_of_batch(to, ALL),
        store.advance(&taken.id, StateName::Reserved, given_up),
        store.step_batch(from, BatchStep::Discard),
        store.ready_pairs(KeyKind::P256, None, ALL),
        store.pair_counts(KeyKind::P256),
        store.step_batch(from, BatchStep::Empty),
    );
    assert_eq!(faults.syncs.load(SeqCst) - syncs, 3, "of two files and the log: it was one batch");
    let ids = |page: Result<Vec<(PairId, PooledPair)>, StoreError>| -> Vec<_> {
        page.unwrap().into_iter().map(|(id, _)| id).collect()
    };
    assert_eq!(ids(first), [at(from, 1), at(from, 2)]);
    assert_eq!(first_pair.unwrap()[0].1.kept, wrapped(old, blob(0)));
    assert_eq!(ids(second), [at(from, 1), at(from, 2), at(from, 3)]);
    assert_eq!(kept_key.unwrap(), Some(wrapped(old, blob(0))));
    assert_eq!(count.unwrap(), 2);
    assert_eq!(ids(third), [at(from, 3), at(to, 0)]);
    let held: Vec<_> = held.unwrap().into_iter().map(|held| (held.holder, held.kept)).collect();
    assert_eq!(held, [Holder::Session(id(0)), Holder::Ready(at(to, 0))].map(|who| (who, wrapped(new, blob(77)))));
    assert_eq!(discarded.unwrap().ready, 0);
    assert_eq!(ids(last), [at(to, 0)]);
    let counts = counts.unwrap();
    assert_eq!((counts.made, counts.reserved, counts.discarded), (4, 1, 2));
    assert!(emptied.unwrap().is_used_up());
    let before = everything(&*store).await;
    drop(store);
    assert_eq!(everything(&*sled.state()).await, before);
}

#[tokio::test]
async fn a_file_is_not_removed_before_its_batch_is_durably_empty() {
    for fails in [true, false] {
        let sled = Sled::new();
        let (store, faults) = open(&sled);
        let pool = open_pool(&*store).await;
        add(&*store, pool, 0..3).await;
        let before = ready(&*store).await;
        let last = PooledPair { public_key: public_key(3), kept: wrapped(name(&*store, pool).await, random()) };
        while_busy(&store, &faults).await;
        faults.before_apply.store(fails, SeqCst);
        let (_, _, emptied, forgotten) = tokio::join!(
            store.add_pairs(pool, vec![last]),
            store.step_batch(pool, BatchStep::Discard),
            store.step_batch(pool, BatchStep::Empty),
            store.forget_batch(pool),
        );
        faults.before_apply.store(false, SeqCst);
        if fails {
            assert!(forgotten.is_err());
            until_healed(&*store).await;
            assert_eq!(ready(&*store).await, before, "with their bytes");
        } else {
            emptied.unwrap();
            assert!(is_wrong(forgotten), "nobody was told yet that it is empty");
            store.forget_batch(pool).await.unwrap();
            assert!(!file_of(&sled, pool).exists());
        }
    }
}

#[tokio::test]
async fn below_the_floor_no_pair_comes_in_or_goes_out_and_what_exists_goes_on() {
    let sled = Sled::new();
    let (store, faults) = open(&sled);
    let (from, to) = (open_pool(&*store).await, open_pool(&*store).await);
    add(&*store, from, 0..4).await;
    store.reserve(&session_with(0, 0), Some(&pooled(from, 0))).await.unwrap();
    let held = store.pairs_of_batch(from, ALL).await.unwrap();
    let pair = PooledPair { public_key: public_key(4), kept: wrapped(name(&*store, from).await, blob(4)) };
    let set_free = async |bytes: u64| {
        faults.free.store(bytes, SeqCst);
        // Nought stands for what the disk has.
        let is_read = |free| if bytes == 0 { free > 16 << 20 } else { free == bytes };
        eventually("the free space is read anew", async || is_read(store.room().unwrap().0)).await;
    };
    set_free((16 << 20) - 1).await;
    let before = everything(&*store).await;
    let refused = store.reserve(&session_with(1, 1), Some(&pooled(from, 1))).await;
    assert!(matches!(refused, Err(ReserveError::Store(StoreError::Full { .. }))), "{refused:?}");
    let refused = store.add_pairs(from, vec![pair]).await;
    assert!(matches!(refused, Err(StoreError::Full { .. })), "{refused:?}");
    assert_eq!(everything(&*store).await, before);
    let moved = held.iter().map(rewrapped).collect();
    assert_eq!(store.move_pairs(from, to, moved).await.unwrap(), 4, "shredding goes on");
    abort(&*store, 0, 3000).await;
    store.step_batch(from, BatchStep::Empty).await.unwrap();
    store.forget_batch(from).await.unwrap();
    set_free(1 << 20).await;
    let refused = store.step_batch(to, BatchStep::Discard).await;
    assert!(matches!(refused, Err(StoreError::Full { .. })), "{refused:?}");
    assert_eq!(ready(&*store).await.len(), 3);
    set_free(0).await;
    store.reserve(&session_with(1, 1), Some(&pooled(to, 1))).await.unwrap();
}

/// It could be a pair that was being moved when the process was killed, and that is erased since.
#[tokio::test]
async fn what_a_crash_left_behind_the_bytes_that_count_is_gone_when_the_store_is_opened() {
    let sled = Sled::new();
    sled.state().reserve(&session(1), Some(&key(1))).await.unwrap();
    let pairs = sled.dir().join("pairs");
    let (known, unknown) = (pairs.join("1"), pairs.join("77"));
    let counted = fs::metadata(&known).unwrap().len();
    let left: Vec<u8> = (0..100).map(|n: u8| n.wrapping_mul(41) ^ 0x5a).collect();
    for path in [&known, &unknown] {
        OpenOptions::new().create(true).append(true).open(path).unwrap().write_all(&left).unwrap();
    }
    let other_name = sled.0.path().join("same-bytes");
    fs::hard_link(&known, &other_name).unwrap();
    let store = sled.state();
    assert_eq!(fs::metadata(&known).unwrap().len(), counted);
    assert!(!unknown.exists());
    assert!(!fs::read(&other_name).unwrap().windows(8).any(|bytes| bytes == &left[..8]));
    assert_eq!(kept(&*store, &id(1)).await, Some(blob(1)));
}
