//! What the engine does when its disk or its signer fails.

use std::sync::atomic::AtomicU8;

use super::*;
use crate::tlog::{LogKey, UnsignedCheckpoint};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_across_a_bundles_end_that_failed_is_in_once_after_repeating_it() {
    for persisted in [false, true] {
        let (log, faults) = (Log::new(), Arc::new(Faults::default()));
        let public = log.open_through(&faults).await;
        let mut told = grow(&public, 0..250).await;
        let fault = if persisted { &faults.in_sync } else { &faults.before_apply };
        fault.store(true, SeqCst);
        for (_, answer) in try_grow(&public, 250..270).await {
            assert!(matches!(answer, Err(PublishError::Store(error)) if is_away(&error)));
        }
        fault.store(false, SeqCst);
        for n in (250..270).rev() {
            let publication = until_published(&public, &later(n)).await;
            let kept = publication.published == record(n).published;
            assert!(kept || publication.published == later(n).published);
            assert!(publication.index < 270, "{n} is there twice");
            if kept {
                told.insert(n, publication);
            }
        }
        assert_eq!(public.len().await.unwrap(), 270);
        must_be_there(&log, &public, &told).await;
        for index in 0..270 {
            let found = public.record(index).await.unwrap().unwrap();
            let by_chip = public.find(&UniqueKey::of_chip(&found.record.chip)).await.unwrap();
            assert_eq!(by_chip.unwrap().publication, found.publication);
        }
        closed(public, &log).await;
        must_be_there(&log, &*log.open().await, &told).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_tiles_that_cannot_be_written_stop_publication_and_lose_nothing() {
    for name in ["tile/entries/000", "tile/0/000", "tile/entries", "edge/00000000000000000256.new"] {
        let log = Log::new();
        let public = log.open().await;
        let in_the_way = log.dir().join(name);
        // A file where a directory must be, a directory where a file must be.
        if name == "tile/entries" {
            fs::write(&in_the_way, "").unwrap()
        } else {
            fs::create_dir_all(&in_the_way).unwrap()
        }
        let mut told = grow(&public, 0..200).await;
        // What fills the bundle is durable before the bundle is written, so it is acknowledged.
        told.extend(grow(&public, 200..260).await);
        eventually("its trouble", async || public.status().publishing_trouble.is_some()).await;
        assert!(matches!(public.publish(&record(1000)).await, Err(PublishError::Store(error)) if is_away(&error)));
        for (n, publication) in told.iter().filter(|(_, publication)| checked_in_full(publication.index)) {
            must_be_proven(&log, &public, *n, publication).await;
        }
        let entries: Vec<_> = (0..260).map(|index| entry_at(&told, index)).collect();
        for (name, bytes) in tiles_of(&entries) {
            assert_eq!(public.tile(name.parse().unwrap()).await.unwrap(), Some(bytes), "{name} meanwhile");
        }
        if name == "tile/entries" {
            fs::remove_file(&in_the_way).unwrap()
        } else {
            fs::remove_dir(&in_the_way).unwrap()
        }
        told.insert(1000, until_published(&public, &record(1000)).await);
        assert_eq!(told[&1000].index, 260);
        must_be_there(&log, &public, &told).await;
        assert!(log.dir().join("tile/entries/000").is_file() && log.dir().join("tile/0/000").is_file());
        closed(public, &log).await;
        must_be_there(&log, &*log.open().await, &told).await;
    }
}

fn entry_at(told: &Told, index: u64) -> Vec<u8> {
    let (n, _) = told.iter().find(|(_, publication)| publication.index == index).unwrap();
    record(*n).to_bytes().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_tile_that_is_there_and_is_different_is_never_written_over() {
    let log = Log::new();
    let public = log.open().await;
    fs::create_dir_all(log.dir().join("tile/0")).unwrap();
    fs::write(log.dir().join("tile/0/000"), [7; 8192]).unwrap();
    let mut told = grow(&public, 0..256).await;
    eventually("its trouble", async || {
        public.status().publishing_trouble.is_some_and(|why| why.contains("is different"))
    })
    .await;
    closed(public, &log).await;
    let refused = log.try_open().await.err().unwrap();
    assert!(refused.to_string().contains("tile/0/000 is there already and is different"), "{refused}");
    assert_eq!(fs::read(log.dir().join("tile/0/000")).unwrap(), [7; 8192]);
    fs::remove_file(log.dir().join("tile/0/000")).unwrap();
    let public = log.open().await;
    told.extend(grow(&public, 256..258).await);
    must_be_there(&log, &public, &told).await;
}

/// Does not always sign.
struct Moody {
    signer: Arc<LocalSigner>,
    other: LocalSigner,
    mood: AtomicU8,
}

#[async_trait]
impl CheckpointSigner for Moody {
    fn key(&self) -> &LogKey {
        self.signer.key()
    }

    async fn sign(&self, checkpoint: &UnsignedCheckpoint) -> Result<Vec<u8>, String> {
        let right = self.signer.sign_now(checkpoint);
        match self.mood.load(SeqCst) {
            0 => Ok(right),
            1 => Err("the token is gone".to_owned()),
            2 => Ok(right.iter().map(|byte| byte ^ 1).collect()),
            3 => Ok(self.other.sign_now(checkpoint)),
            _ => Ok(right[..63].to_vec()),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_right_signature_nothing_is_written_and_the_next_try_succeeds() {
    let log = Log::new();
    let moody = Moody { signer: log.signer.clone(), other: LocalSigner::new(ORIGIN), mood: AtomicU8::new(0) };
    let moody = Arc::new(moody);
    let public = log.open_with(moody.clone(), LogSettings::default()).await;
    let mut told = grow(&public, 0..3).await;
    let (files, checkpoint) = (fs::read(edge_file(&log.dir(), 0)).unwrap(), public.checkpoint().await.unwrap());
    for mood in 1..=4 {
        moody.mood.store(mood, SeqCst);
        for (_, answer) in try_grow(&public, 10..14).await {
            let Err(PublishError::Unsigned(why)) = answer else { panic!("{answer:?}") };
            assert_eq!(why.contains("the token is gone"), mood == 1, "{why}");
        }
        assert_eq!(fs::read(edge_file(&log.dir(), 0)).unwrap(), files, "mood {mood}");
        assert_eq!(public.find(&UniqueKey::of_chip(&record(10).chip)).await.unwrap(), None);
        assert_eq!((public.len().await.unwrap(), public.checkpoint().await.unwrap()), (3, checkpoint.clone()));
        assert!(public.status().publishing_trouble.is_none(), "the files are as they were");
        must_be_there(&log, &public, &told).await;
    }
    moody.mood.store(0, SeqCst);
    told.extend(grow(&public, 10..14).await);
    assert!(told.values().all(|publication| publication.index < 7));
    must_be_there(&log, &public, &told).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_told_that_a_value_is_taken_by_an_entry_that_did_not_get_in() {
    for unsigned in [true, false] {
        let (log, faults) = (Log::new(), Arc::new(Faults::default()));
        let moody = Moody { signer: log.signer.clone(), other: LocalSigner::new(ORIGIN), mood: AtomicU8::new(0) };
        let moody = Arc::new(moody);
        let settings = LogSettings { batch_period: Duration::from_millis(500), ..LogSettings::default() };
        let opened =
            TransparencyLog::open_through(&log.dir(), &options(), moody.clone(), settings, faults.clone()).await;
        let public = opened.unwrap();
        public.publish(&record(0)).await.unwrap();
        if unsigned {
            moody.mood.store(1, SeqCst)
        } else {
            faults.before_apply.store(true, SeqCst)
        }
        let rival = DeviceRecord { chip: record(1).chip, ..record(2) };
        let on_the_way = (public.reserve_slot(), public.reserve_slot());
        let one = record(1);
        let (first, second) = tokio::join!(public.publish(&one), public.publish(&rival));
        drop(on_the_way);
        for answer in [first, second] {
            assert!(!matches!(answer, Err(PublishError::Taken(_)) | Ok(_)), "{answer:?}");
        }
        moody.mood.store(0, SeqCst);
        faults.before_apply.store(false, SeqCst);
        assert_eq!(until_published(&public, &rival).await.index, 1);
        assert!(matches!(public.publish(&record(1)).await, Err(PublishError::Taken(taken)) if taken.index == 1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_told_as_that_and_publication_goes_on_when_there_is_room() {
    let (log, faults) = (Log::new(), Arc::new(Faults::default()));
    let public = log.open_through(&faults).await;
    let mut told = grow(&public, 0..20).await;
    faults.full.store(true, SeqCst);
    for _ in 0..3 {
        let refused = public.publish(&record(20)).await;
        assert!(matches!(refused, Err(PublishError::Store(StoreError::Full { .. }))), "{refused:?}");
    }
    assert!(public.status().publishing_trouble.is_some_and(|why| why.contains("make room on the disk")));
    for (n, publication) in &told {
        must_be_proven(&log, &public, *n, publication).await;
    }
    faults.full.store(false, SeqCst);
    told.insert(20, until_published(&public, &record(20)).await);
    must_be_there(&log, &public, &told).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_told_that_a_record_is_not_public_while_that_is_not_known() {
    let (log, faults) = (Log::new(), Arc::new(Faults::default()));
    let public = log.open_through(&faults).await;
    public.publish(&record(0)).await.unwrap();
    let (edge, away) = (log.dir().join("edge"), log.dir().join("away"));
    fs::rename(&edge, &away).unwrap();
    faults.in_sync.store(true, SeqCst);
    assert!(matches!(public.publish(&record(1)).await, Err(PublishError::Store(_))));
    faults.in_sync.store(false, SeqCst);
    let (doubted, other) = (UniqueKey::of_chip(&record(1).chip), UniqueKey::of_chip(&record(2).chip));
    let unknown = public.find(&doubted).await.unwrap_err();
    assert!(unknown.to_string().contains("it is not known yet whether it was published"), "{unknown}");
    assert_eq!(public.find(&other).await.unwrap(), None);
    fs::rename(&away, &edge).unwrap();
    until_published(&public, &record(3)).await;
    assert_eq!(public.find(&doubted).await.unwrap().unwrap().publication.index, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_stopped_waiting_before_it_was_begun_is_not_published() {
    let (log, faults) = (Log::new(), Arc::new(Faults::default()));
    let public = log.open_through(&faults).await;
    faults.slow.store(800, SeqCst);
    let (first, gone) = (record(0), record(1));
    let impatient = tokio::time::timeout(Duration::from_millis(200), public.publish(&gone));
    let begun = tokio::time::sleep(Duration::from_millis(100));
    let (first, given_up) = tokio::join!(public.publish(&first), async {
        begun.await;
        impatient.await
    });
    assert!(first.is_ok() && given_up.is_err());
    faults.slow.store(0, SeqCst);
    public.publish(&record(2)).await.unwrap();
    assert_eq!(public.find(&UniqueKey::of_chip(&gone.chip)).await.unwrap(), None);
    assert_eq!(public.len().await.unwrap(), 2);
}
