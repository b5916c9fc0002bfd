//! Failures of the disk and of the signer.

use std::sync::atomic::AtomicU8;

use spp_format::tlog::{LogKey, UnsignedCheckpoint};

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_batch_across_bundles_is_published_once_on_retry() {
    for persisted in [false, true] {
        let (log, faults) = (Log::new(), Arc::new(FaultInjector::default()));
        let public = log.open_through(&faults).await;
        let mut published = publish_all(&public, 0..250).await;
        let fault = if persisted { &faults.in_sync } else { &faults.before_apply };
        fault.store(true, SeqCst);
        for (_, answer) in try_publish_all(&public, 250..270).await {
            assert!(matches!(answer, Err(PublishError::Store(error)) if is_failed(&error)));
        }
        fault.store(false, SeqCst);
        for n in (250..270).rev() {
            let publication = publish_until_ok(&public, &with_later_time(n)).await;
            let is_first_attempt = publication.published == record(n).published;
            assert!(is_first_attempt || publication.published == with_later_time(n).published);
            assert!(publication.index < 270, "duplicate record {n}");
            if is_first_attempt {
                published.insert(n, publication);
            }
        }
        assert_eq!(public.len().await.unwrap(), 270);
        assert_published(&log, &public, &published).await;
        for index in 0..270 {
            let found = public.record(index).await.unwrap().unwrap();
            let by_chip = public.find(&UniqueKey::of_chip(&found.record.chip)).await.unwrap();
            assert_eq!(by_chip.unwrap().publication, found.publication);
        }
        close(public, &log).await;
        assert_published(&log, &*log.open().await, &published).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unwritable_full_tiles_stop_publication_without_loss() {
    for name in ["tile/entries/000", "tile/0/000", "tile/entries", "edge/00000000000000000256.new"] {
        let log = Log::new();
        let public = log.open().await;
        let in_the_way = log.dir().join(name);
        // A file in the place of a directory, or a directory in the place of a file, blocks the write.
        if name == "tile/entries" {
            fs::write(&in_the_way, "").unwrap()
        } else {
            fs::create_dir_all(&in_the_way).unwrap()
        }
        let mut published = publish_all(&public, 0..200).await;
        // Entries are durable before the bundle is sealed, so they are acknowledged.
        published.extend(publish_all(&public, 200..260).await);
        eventually("publish error", async || public.status().publish_error.is_some()).await;
        assert!(matches!(public.publish(&record(1000)).await, Err(PublishError::Store(error)) if is_failed(&error)));
        for (n, publication) in published.iter().filter(|(_, publication)| checked_in_full(publication.index)) {
            assert_proven(&log, &public, *n, publication).await;
        }
        let entries: Vec<_> = (0..260).map(|index| entry_at(&published, index)).collect();
        for (name, bytes) in tiles_of(&entries) {
            assert_eq!(public.tile(name.parse().unwrap()).await.unwrap(), Some(bytes), "{name} while unavailable");
        }
        if name == "tile/entries" {
            fs::remove_file(&in_the_way).unwrap()
        } else {
            fs::remove_dir(&in_the_way).unwrap()
        }
        published.insert(1000, publish_until_ok(&public, &record(1000)).await);
        assert_eq!(published[&1000].index, 260);
        assert_published(&log, &public, &published).await;
        assert!(log.dir().join("tile/entries/000").is_file() && log.dir().join("tile/0/000").is_file());
        close(public, &log).await;
        assert_published(&log, &*log.open().await, &published).await;
    }
}

fn entry_at(published: &Publications, index: u64) -> Vec<u8> {
    let (n, _) = published.iter().find(|(_, publication)| publication.index == index).unwrap();
    record(*n).to_bytes().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn existing_different_tile_is_never_overwritten() {
    let log = Log::new();
    let public = log.open().await;
    fs::create_dir_all(log.dir().join("tile/0")).unwrap();
    fs::write(log.dir().join("tile/0/000"), [7; 8192]).unwrap();
    let mut published = publish_all(&public, 0..256).await;
    eventually("publish error", async || {
        public.status().publish_error.is_some_and(|why| why.contains("exists with different content"))
    })
    .await;
    close(public, &log).await;
    let refused = log.try_open().await.err().unwrap();
    assert!(refused.to_string().contains("tile/0/000 exists with different content"), "{refused}");
    assert_eq!(fs::read(log.dir().join("tile/0/000")).unwrap(), [7; 8192]);
    fs::remove_file(log.dir().join("tile/0/000")).unwrap();
    let public = log.open().await;
    published.extend(publish_all(&public, 256..258).await);
    assert_published(&log, &public, &published).await;
}

/// A signer that can be made to fail.
struct FaultySigner {
    signer: Arc<LocalSigner>,
    other: LocalSigner,
    behaviour: AtomicU8,
}

#[async_trait]
impl LogSigner for FaultySigner {
    fn key(&self) -> &LogKey {
        self.signer.key()
    }

    async fn sign(&self, checkpoint: &UnsignedCheckpoint) -> Result<Vec<u8>, String> {
        let right = self.signer.sign_sync(checkpoint);
        match self.behaviour.load(SeqCst) {
            0 => Ok(right),
            1 => Err("token not present".to_owned()),
            2 => Ok(right.iter().map(|byte| byte ^ 1).collect()),
            3 => Ok(self.other.sign_sync(checkpoint)),
            _ => Ok(right[..63].to_vec()),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalid_signature_writes_nothing_and_retry_succeeds() {
    let log = Log::new();
    let faulty =
        FaultySigner { signer: log.signer.clone(), other: LocalSigner::new(ORIGIN), behaviour: AtomicU8::new(0) };
    let faulty = Arc::new(faulty);
    let public = log.open_with(faulty.clone(), LogSettings::default()).await;
    let mut published = publish_all(&public, 0..3).await;
    let (files, checkpoint) =
        (fs::read(partial_bundle_file(&log.dir(), 0)).unwrap(), public.checkpoint().await.unwrap());
    for behaviour in 1..=4 {
        faulty.behaviour.store(behaviour, SeqCst);
        for (_, answer) in try_publish_all(&public, 10..14).await {
            let Err(PublishError::Unsigned(why)) = answer else { panic!("{answer:?}") };
            assert_eq!(why.contains("token not present"), behaviour == 1, "{why}");
        }
        assert_eq!(fs::read(partial_bundle_file(&log.dir(), 0)).unwrap(), files, "behaviour {behaviour}");
        assert_eq!(public.find(&UniqueKey::of_chip(&record(10).chip)).await.unwrap(), None);
        assert_eq!((public.len().await.unwrap(), public.checkpoint().await.unwrap()), (3, checkpoint.clone()));
        assert!(public.status().publish_error.is_none(), "the files are unchanged");
        assert_published(&log, &public, &published).await;
    }
    faulty.behaviour.store(0, SeqCst);
    published.extend(publish_all(&public, 10..14).await);
    assert!(published.values().all(|publication| publication.index < 7));
    assert_published(&log, &public, &published).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conflict_with_failed_entry_is_not_reported() {
    for unsigned in [true, false] {
        let (log, faults) = (Log::new(), Arc::new(FaultInjector::default()));
        let faulty =
            FaultySigner { signer: log.signer.clone(), other: LocalSigner::new(ORIGIN), behaviour: AtomicU8::new(0) };
        let faulty = Arc::new(faulty);
        let settings = LogSettings { batch_period: Duration::from_millis(500), ..LogSettings::default() };
        let opened =
            TransparencyLog::open_through(&log.dir(), &options(), faulty.clone(), settings, faults.clone()).await;
        let public = opened.unwrap();
        public.publish(&record(0)).await.unwrap();
        if unsigned {
            faulty.behaviour.store(1, SeqCst)
        } else {
            faults.before_apply.store(true, SeqCst)
        }
        let rival = DeviceRecord { chip: record(1).chip, ..record(2) };
        let slots = (public.reserve_slot(), public.reserve_slot());
        let one = record(1);
        let (first, second) = tokio::join!(public.publish(&one), public.publish(&rival));
        drop(slots);
        for answer in [first, second] {
            assert!(!matches!(answer, Err(PublishError::Conflict(_)) | Ok(_)), "{answer:?}");
        }
        faulty.behaviour.store(0, SeqCst);
        faults.before_apply.store(false, SeqCst);
        assert_eq!(publish_until_ok(&public, &rival).await.index, 1);
        assert!(matches!(public.publish(&record(1)).await, Err(PublishError::Conflict(taken)) if taken.index == 1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_is_reported_and_publication_resumes() {
    let (log, faults) = (Log::new(), Arc::new(FaultInjector::default()));
    let public = log.open_through(&faults).await;
    let mut published = publish_all(&public, 0..20).await;
    faults.full.store(true, SeqCst);
    for _ in 0..3 {
        let refused = public.publish(&record(20)).await;
        assert!(matches!(refused, Err(PublishError::Store(StoreError::Full { .. }))), "{refused:?}");
    }
    assert!(public.status().publish_error.is_some_and(|why| why.contains("free disk space")));
    for (n, publication) in &published {
        assert_proven(&log, &public, *n, publication).await;
    }
    faults.full.store(false, SeqCst);
    published.insert(20, publish_until_ok(&public, &record(20)).await);
    assert_published(&log, &public, &published).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn find_of_pending_record_fails() {
    let (log, faults) = (Log::new(), Arc::new(FaultInjector::default()));
    let public = log.open_through(&faults).await;
    public.publish(&record(0)).await.unwrap();
    let (partial_bundles, moved) = (log.dir().join("edge"), log.dir().join("moved"));
    fs::rename(&partial_bundles, &moved).unwrap();
    faults.in_sync.store(true, SeqCst);
    assert!(matches!(public.publish(&record(1)).await, Err(PublishError::Store(_))));
    faults.in_sync.store(false, SeqCst);
    let (doubted, other) = (UniqueKey::of_chip(&record(1).chip), UniqueKey::of_chip(&record(2).chip));
    let unknown = public.find(&doubted).await.unwrap_err();
    assert!(unknown.to_string().contains("it is not known yet whether the entry was published"), "{unknown}");
    assert_eq!(public.find(&other).await.unwrap(), None);
    fs::rename(&moved, &partial_bundles).unwrap();
    publish_until_ok(&public, &record(3)).await;
    assert_eq!(public.find(&doubted).await.unwrap().unwrap().publication.index, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publish_cancelled_before_batch_is_not_published() {
    let (log, faults) = (Log::new(), Arc::new(FaultInjector::default()));
    let public = log.open_through(&faults).await;
    faults.slow.store(800, SeqCst);
    let (first, cancelled) = (record(0), record(1));
    let publication = tokio::time::timeout(Duration::from_millis(200), public.publish(&cancelled));
    let delay = tokio::time::sleep(Duration::from_millis(100));
    let (first, timed_out) = tokio::join!(public.publish(&first), async {
        delay.await;
        publication.await
    });
    assert!(first.is_ok() && timed_out.is_err());
    faults.slow.store(0, SeqCst);
    public.publish(&record(2)).await.unwrap();
    assert_eq!(public.find(&UniqueKey::of_chip(&cancelled.chip)).await.unwrap(), None);
    assert_eq!(public.len().await.unwrap(), 2);
}
