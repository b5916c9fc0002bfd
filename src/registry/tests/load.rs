//! Concurrent publication and reading.

use spp_format::tlog::{TileId, TileKind};

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_publications_are_all_proven() {
    const EACH: u64 = 32;
    let log = Log::new();
    let public = log.open().await;
    let mut writers = JoinSet::new();
    for task in 0..64 {
        let (public, key) = (public.clone(), log.signer.key().clone());
        writers.spawn(async move {
            let mut published = Publications::new();
            for n in task * EACH..task * EACH + EACH {
                let slot = public.reserve_slot();
                let publication = public.publish(&record(n)).await.unwrap();
                drop(slot);
                // Read the own record immediately, as every caller does.
                let proof = public.prove(publication.index).await.unwrap().unwrap();
                proof.verify(&record(n).to_bytes().unwrap(), &key).unwrap();
                let found = public.find(&UniqueKey::of_chip(&record(n).chip)).await.unwrap().unwrap();
                assert_eq!(found.publication, publication);
                if n % 8 == 0 {
                    assert_eq!(public.publish(&with_later_time(n)).await.unwrap(), publication);
                }
                published.insert(n, publication);
            }
            published
        });
    }
    let reader = tokio::spawn({
        let (public, key) = (public.clone(), log.signer.key().clone());
        async move {
            let (mut reads, mut seen) = (0u64, Vec::new());
            loop {
                let size = public.len().await.unwrap();
                for index in [0, size / 2, size.saturating_sub(1)] {
                    let Some(found) = public.record(index).await.unwrap() else { continue };
                    let proof = public.prove(index).await.unwrap().unwrap();
                    proof.verify(&found.bytes, &key).unwrap();
                    reads += 1;
                }
                let checkpoint = public.checkpoint().await.unwrap();
                if checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.size() == 64 * EACH) {
                    return (reads, seen);
                }
                seen.extend(checkpoint);
            }
        }
    });
    let published: Publications = writers.join_all().await.into_iter().flatten().collect();
    let mut indexes: Vec<_> = published.values().map(|publication| publication.index).collect();
    indexes.sort_unstable();
    assert_eq!(indexes, (0..64 * EACH).collect::<Vec<_>>(), "one entry per record");
    let (reads, seen) = reader.await.unwrap();
    assert!(reads > 20 && seen.is_sorted_by_key(SignedCheckpoint::size), "{reads}");
    // The log is consistent with each checkpoint that was read.
    let entries: BTreeMap<_, _> =
        published.iter().map(|(n, publication)| (publication.index, record(*n).to_bytes().unwrap())).collect();
    let (mut tree, mut seen) = (Tree::default(), seen.into_iter().peekable());
    for size in 0..=64 * EACH {
        while let Some(checkpoint) = seen.next_if(|checkpoint| checkpoint.size() == size) {
            assert_eq!(checkpoint.root(), tree.root());
        }
        if let Some(entry) = entries.get(&size) {
            tree.push(leaf_hash(entry));
        }
    }
    assert!(seen.next().is_none());
    close(public, &log).await;
    let public = log.open().await;
    for (n, publication) in published.iter().filter(|(_, publication)| checked_in_full(publication.index)) {
        assert_proven(&log, &public, *n, publication).await;
    }
}

/// Much longer than the test, so that a caller that waits for its end is detected on a slow machine, too.
const PERIOD: Duration = Duration::from_secs(100);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publications_in_flight_share_a_batch() {
    let (log, faults) = (Log::new(), Arc::new(FaultInjector::default()));
    let settings = LogSettings { batch_period: PERIOD, ..LogSettings::default() };
    let opened =
        TransparencyLog::open_through(&log.dir(), &options(), log.signer.clone(), settings, faults.clone()).await;
    let public = Arc::new(opened.unwrap());
    let started = Instant::now();
    public.publish(&record(0)).await.unwrap();
    let slot = public.reserve_slot();
    public.publish(&record(1)).await.unwrap();
    drop(slot);
    assert!(started.elapsed() < PERIOD, "a single publication waited for the batch period");
    let alone = faults.syncs.load(SeqCst);
    let started = Instant::now();
    publish_all(&public, 2..1000).await;
    let shared = faults.syncs.load(SeqCst) - alone;
    assert_eq!(shared, 4, "998 publications in batches of up to 256");
    assert!(started.elapsed() < PERIOD);

    // Publications that arrive one after the other share a batch, too, if their slots are reserved.
    let before = faults.syncs.load(SeqCst);
    let mut tasks = JoinSet::new();
    for (n, slot) in (1000..1020).map(|n| (n, public.reserve_slot())).collect::<Vec<_>>() {
        let public = public.clone();
        tasks.spawn(async move {
            tokio::time::sleep(Duration::from_millis((n - 1000) * 10)).await;
            public.publish(&record(n)).await.unwrap();
            drop(slot);
        });
    }
    tasks.join_all().await;
    assert_eq!(faults.syncs.load(SeqCst) - before, 1);

    // A reserved slot without a publication delays the batch until the slot is dropped or the batch period ends.
    let slot = (public.reserve_slot(), public.reserve_slot());
    let started = Instant::now();
    let late = record(1020);
    let left = tokio::join!(public.publish(&late), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(slot.0);
    });
    left.0.unwrap();
    let waited = started.elapsed();
    assert!((Duration::from_millis(300)..PERIOD).contains(&waited), "{waited:?}");
    drop(slot.1);
}

async fn proofs_of_all(log: &Log, public: &TransparencyLog, size: u64) {
    for index in (0..size).filter(|index| checked_in_full(*index) || index + 3 > size) {
        let bytes = public.record(index).await.unwrap().unwrap().bytes;
        let proof = public.prove(index).await.unwrap().unwrap();
        let verified = proof.verify(&bytes, log.signer.key()).unwrap();
        assert_eq!((verified.index, verified.checkpoint.size()), (index, size));
    }
    assert_eq!(public.prove(size).await.unwrap(), None);
    assert_eq!(public.record(size).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_around_bundle_ends_are_proven() {
    let log = Log::new();
    let mut public = log.open().await;
    let mut size = 0;
    for next in [1, 2, 255, 256, 257, 258, 511, 512, 513] {
        publish_all(&public, size..next).await;
        size = next;
        proofs_of_all(&log, &public, size).await;
        close(public, &log).await;
        public = log.open().await;
        proofs_of_all(&log, &public, size).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiles_of_all_earlier_checkpoints_are_served() {
    let log = Log::new();
    let public = log.open().await;
    let mut published = Publications::new();
    for (from, to) in [(0, 200), (200, 256), (256, 257), (257, 520)] {
        published.extend(publish_all(&public, from..to).await);
        let by_index: BTreeMap<_, _> = published.iter().map(|(n, published)| (published.index, *n)).collect();
        let entries: Vec<_> = by_index.values().map(|n| record(*n).to_bytes().unwrap()).collect();
        for size in (1..=to).rev().step_by(scaled(13, if to < 500 { 7 } else { 1 })) {
            // Full tiles are the same for all sizes; check them once.
            let all = tiles_of(&entries[..size as usize]);
            for (name, bytes) in all.into_iter().filter(|(name, _)| size == to || name.contains(".p/")) {
                let tile: TileId = name.parse().unwrap();
                assert_eq!(public.tile(tile).await.unwrap(), Some(bytes), "{name} of {size} at {to}");
            }
        }
        for kind in [TileKind::Entries, TileKind::Hashes(0), TileKind::Hashes(1), TileKind::Hashes(2)] {
            let wide = TileId::in_tree(kind, 0, u64::MAX).unwrap();
            let there = matches!(kind, TileKind::Entries | TileKind::Hashes(0)) && to >= 256;
            assert_eq!(public.tile(wide).await.unwrap().is_some(), there, "{wide} at {to}");
            assert_eq!(public.tile(TileId::full(kind, 7)).await.unwrap(), None);
        }
    }
}
