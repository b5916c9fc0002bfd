//! What the engine does when its disk, its signer or its index fails, or when somebody put old or damaged files there.

use std::ops::Range;
use std::sync::atomic::AtomicU8;

use super::super::files::LogFiles;
use super::*;
use crate::store::place::System;
use crate::tlog::{LogKey, TileId, TileKind, UnsignedCheckpoint};

const LATER: u64 = 7777;

fn later(n: u64) -> DeviceRecord {
    DeviceRecord { published: LATER, ..record(n) }
}

/// Which file holds what does not fill a bundle.
fn edge_file(dir: &Path, base: u64) -> PathBuf {
    dir.join("edge").join(format!("{base:020}"))
}

/// Directories can only be looked at when the sequencer has let go of them.
async fn closed(public: Arc<TransparencyLog>, log: &Log) {
    drop(Arc::into_inner(public).expect("nobody else has it"));
    let dir = log.dir();
    let take = move || LogFiles::take(&dir, &options(), Arc::new(System)).map(drop);
    tokio::task::spawn_blocking(take).await.unwrap().unwrap();
}

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
            assert!(kept || publication.published == LATER);
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
        until("its trouble", || public.status().publishing_trouble.is_some()).await;
        assert!(matches!(public.publish(&record(1000)).await, Err(PublishError::Store(error)) if is_away(&error)));
        for (n, publication) in &told {
            must_be_proven(&log, &public, *n, publication).await;
        }
        let entries: Vec<_> = (0..260).map(|index| entry_at(&told, index)).collect();
        for (name, octets) in tiles_of(&entries) {
            assert_eq!(public.tile(name.parse().unwrap()).await.unwrap(), Some(octets), "{name} meanwhile");
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
    until("its trouble", || public.status().publishing_trouble.is_some_and(|why| why.contains("is different"))).await;
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
            2 => Ok(right.iter().map(|octet| octet ^ 1).collect()),
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
        let on_the_way = (public.announce(), public.announce());
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

/// What becomes of an index.
type Harm = fn(&Path, &Path);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_is_missing_damaged_behind_or_anothers_is_made_anew() {
    let other = Log::new();
    let public = other.open().await;
    grow(&public, 5000..5300).await;
    closed(public, &other).await;
    let others_index = other.dir().join("index");
    let harms: [(&str, Harm); 6] = [
        ("missing", |_, _| ()),
        ("an empty directory", |index, _| fs::create_dir(index).unwrap()),
        ("garbage", |index, _| {
            fs::create_dir(index).unwrap();
            for name in ["db", "conf", "store.toml"] {
                fs::write(index.join(name), [0xEE; 70_000]).unwrap();
            }
        }),
        ("damaged", |index, old| {
            copy_directory(old, index);
            let mut octets = fs::read(index.join("db")).unwrap();
            octets.iter_mut().skip(20).for_each(|octet| *octet = 0xEE);
            fs::write(index.join("db"), octets).unwrap();
        }),
        ("behind", |index, old| copy_directory(old, index)),
        ("another log's", |_, _| ()),
    ];
    for (last, old_at) in [(300, 100), (600, 300)] {
        let log = Log::new();
        let (index, old) = (log.dir().join("index"), log.dir.path().join("old"));
        let public = log.open().await;
        let mut told = grow(&public, 0..old_at).await;
        closed(public, &log).await;
        copy_directory(&index, &old);
        let public = log.open().await;
        told.extend(grow(&public, old_at..last).await);
        closed(public, &log).await;
        for (what, harm) in harms {
            fs::remove_dir_all(&index).unwrap();
            if what == "another log's" {
                copy_directory(&others_index, &index)
            } else {
                harm(&index, &old)
            }
            let public = log.open().await;
            assert_eq!(public.len().await.unwrap(), last, "{what}");
            must_be_there(&log, &public, &told).await;
            assert!(untroubled(&*public), "{what}: {:?}", public.status());
            assert_eq!(public.len().await.unwrap(), last, "{what}");
            closed(public, &log).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_copy_of_the_files_is_refused_until_its_loss_is_accepted() {
    for (old_at, last) in [(100, 150), (250, 300), (300, 600)] {
        let log = Log::new();
        let old = log.dir.path().join("old");
        let public = log.open().await;
        let told = grow(&public, 0..old_at).await;
        closed(public, &log).await;
        copy_directory(&log.dir(), &old);
        let public = log.open().await;
        grow(&public, old_at..last).await;
        closed(public, &log).await;
        for part in ["tile", "edge"] {
            fs::remove_dir_all(log.dir().join(part)).unwrap();
            copy_directory(&old.join(part), &log.dir().join(part));
        }
        let before = (files_of(&log.dir().join("tile")), files_of(&log.dir().join("edge")));
        let refused = log.try_open().await.err().unwrap();
        assert!(matches!(refused, StoreError::Damaged { .. }), "{refused}");
        let words = format!("it ends with entry {old_at}, and {last} are known: the files are damaged or an old copy");
        assert!(refused.to_string().contains(&words), "{refused}");
        assert!(refused.to_string().contains("sppctl registry reindex"), "{refused}");
        assert_eq!((files_of(&log.dir().join("tile")), files_of(&log.dir().join("edge"))), before);
        let done = reindex(&log.dir(), &options(), log.signer.key(), |_, _| ()).await.unwrap();
        assert_eq!(done.entries, old_at);
        let public = log.open().await;
        must_be_there(&log, &public, &told).await;
        assert_eq!(public.publish(&record(last - 1)).await.unwrap().index, old_at);
    }
}

/// Records so small that every octet of a batch can be tried.
fn small(n: u64) -> DeviceRecord {
    DeviceRecord { certificate: vec![1], backup: vec![2], public_key: None, ..record(n) }
}

/// What an engine-less look at the files finds: the entries that count.
fn recovered(dir: &Path, key: &LogKey, acknowledged: u64) -> Result<u64, StoreError> {
    let files = LogFiles::take(dir, &options(), Arc::new(System)).unwrap();
    files.recover(key, acknowledged).map(|found| found.tree.size())
}

/// A log of three batches of one entry, closed, and where in its edge each of them begins.
async fn three_batches(log: &Log) -> (Vec<u8>, Vec<usize>) {
    let public = log.open().await;
    let mut begins = Vec::new();
    for n in 0..3 {
        begins.push(usize::try_from(fs::metadata(edge_file(&log.dir(), 0)).unwrap().len()).unwrap());
        public.publish(&small(n)).await.unwrap();
    }
    closed(public, log).await;
    (fs::read(edge_file(&log.dir(), 0)).unwrap(), begins)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_last_batch_is_cut_off_wherever_it_was_torn() {
    let log = Log::new();
    let (edge, begins) = three_batches(&log).await;
    let (file, last, key) = (edge_file(&log.dir(), 0), begins[2], log.signer.key());
    for length in last..=edge.len() {
        fs::write(&file, &edge[..length]).unwrap();
        let whole = length == edge.len();
        assert_eq!(recovered(&log.dir(), key, 2).unwrap(), if whole { 3 } else { 2 }, "{length}");
        assert_eq!(fs::metadata(&file).unwrap().len(), if whole { length } else { last } as u64, "{length}");
    }
    // Blocks reach a disk in any order: what is missing may be zeros, or what was there before.
    let mut random = 1u64;
    for round in 0..400 {
        let mut torn = edge.clone();
        let from = last + round % (edge.len() - last);
        for octet in &mut torn[from..] {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *octet = if round % 2 == 0 { 0 } else { (random >> 56) as u8 };
        }
        torn.extend(vec![0xA5; round % 3 * 500]);
        fs::write(&file, torn).unwrap();
        assert_eq!(recovered(&log.dir(), key, 2).unwrap(), 2, "{round}");
        assert_eq!(fs::read(&file).unwrap(), edge[..last], "{round}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_torn_batch_the_log_goes_on_in_its_place() {
    let log = Log::new();
    let public = log.open().await;
    let mut told = grow(&public, 0..300).await;
    closed(public, &log).await;
    let before = fs::read(edge_file(&log.dir(), 256)).unwrap();
    let copy = log.dir.path().join("copy");
    copy_directory(&log.dir(), &copy);
    let public = log.open().await;
    grow(&public, 300..320).await;
    closed(public, &log).await;
    let after = fs::read(edge_file(&log.dir(), 256)).unwrap();
    for cut in [1, 9, 300, (after.len() - before.len()) / 2, after.len() - before.len() - 1] {
        fs::remove_dir_all(log.dir()).unwrap();
        copy_directory(&copy, &log.dir());
        fs::write(edge_file(&log.dir(), 256), &after[..before.len() + cut]).unwrap();
        let public = log.open().await;
        assert_eq!(public.len().await.unwrap(), 300);
        let publication = public.publish(&record(1000)).await.unwrap();
        assert_eq!(publication.index, 300);
        told.insert(1000, publication);
        closed(public, &log).await;
        must_be_there(&log, &*log.open().await, &told).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_flipped_bit_before_the_last_batch_is_refused_and_nothing_is_cut_off() {
    let log = Log::new();
    let (edge, begins) = three_batches(&log).await;
    let file = edge_file(&log.dir(), 0);
    for at in 0..begins[2] {
        let mut flipped = edge.clone();
        flipped[at] ^= 1 << (at % 8);
        fs::write(&file, &flipped).unwrap();
        let refused = recovered(&log.dir(), log.signer.key(), 0);
        assert!(matches!(refused, Err(StoreError::Damaged { .. })), "octet {at}: {refused:?}");
        assert_eq!(fs::read(&file).unwrap(), flipped, "octet {at}");
    }
    // The last one may have been cut off by a crash, but not if the index has it.
    for at in begins[2]..edge.len() {
        let mut flipped = edge.clone();
        flipped[at] ^= 1 << (at % 8);
        fs::write(&file, &flipped).unwrap();
        let refused = recovered(&log.dir(), log.signer.key(), 3);
        assert!(matches!(refused, Err(StoreError::Damaged { .. })), "octet {at}: {refused:?}");
        assert_eq!(fs::read(&file).unwrap(), flipped, "octet {at}");
    }
    let refused = log.try_open().await.err().unwrap();
    assert!(refused.to_string().contains("it ends with entry 2, and 3 are known"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_log_key_is_refused_and_nothing_is_cut_off() {
    for last in [3, 256, 300] {
        let log = Log::new();
        let public = log.open().await;
        let told = grow(&public, 0..last).await;
        closed(public, &log).await;
        let files = || (files_of(&log.dir().join("tile")), files_of(&log.dir().join("edge")));
        let before = files();
        for origin in [ORIGIN, "log.example/other"] {
            let other = Arc::new(LocalSigner::new(origin));
            // With an index and without one: it must not depend on what the index knows.
            for known in [0, last] {
                let refused = recovered(&log.dir(), other.key(), known).err().unwrap();
                assert!(refused.to_string().contains("another log key"), "{refused}");
            }
            let refused = TransparencyLog::open(&log.dir(), &options(), other, LogSettings::default()).await;
            assert!(matches!(refused, Err(StoreError::Damaged { .. })));
            assert_eq!(files(), before);
        }
        must_be_there(&log, &*log.open().await, &told).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_publish_and_read_at_once_and_everything_acknowledged_is_proven() {
    const EACH: u64 = 32;
    let log = Log::new();
    let public = log.open().await;
    let mut writers = JoinSet::new();
    for task in 0..64 {
        let (public, key) = (public.clone(), log.signer.key().clone());
        writers.spawn(async move {
            let mut told = Told::new();
            for n in task * EACH..task * EACH + EACH {
                let announced = public.announce();
                let publication = public.publish(&record(n)).await.unwrap();
                drop(announced);
                // Its own record at once, as every caller asks for it.
                let proof = public.prove(publication.index).await.unwrap().unwrap();
                proof.verify(&record(n).to_bytes().unwrap(), &key).unwrap();
                let found = public.find(&UniqueKey::of_chip(&record(n).chip)).await.unwrap().unwrap();
                assert_eq!(found.publication, publication);
                if n % 8 == 0 {
                    assert_eq!(public.publish(&later(n)).await.unwrap(), publication);
                }
                told.insert(n, publication);
            }
            told
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
                    proof.verify(&found.octets, &key).unwrap();
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
    let told: Told = writers.join_all().await.into_iter().flatten().collect();
    let mut indexes: Vec<_> = told.values().map(|publication| publication.index).collect();
    indexes.sort_unstable();
    assert_eq!(indexes, (0..64 * EACH).collect::<Vec<_>>(), "one entry each");
    let (reads, seen) = reader.await.unwrap();
    assert!(reads > 20 && seen.is_sorted_by_key(SignedCheckpoint::size), "{reads}");
    // Each checkpoint that was shown is of the first entries of the log as it is now.
    let entries: BTreeMap<_, _> =
        told.iter().map(|(n, publication)| (publication.index, record(*n).to_bytes().unwrap())).collect();
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
    closed(public, &log).await;
    let public = log.open().await;
    for (n, publication) in &told {
        must_be_proven(&log, &public, *n, publication).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_are_on_the_way_share_a_batch_and_nobody_waits_for_nobody() {
    let (log, faults) = (Log::new(), Arc::new(Faults::default()));
    let settings = LogSettings { batch_period: Duration::from_secs(3), ..LogSettings::default() };
    let opened =
        TransparencyLog::open_through(&log.dir(), &options(), log.signer.clone(), settings, faults.clone()).await;
    let public = Arc::new(opened.unwrap());
    let begun = Instant::now();
    public.publish(&record(0)).await.unwrap();
    let announced = public.announce();
    public.publish(&record(1)).await.unwrap();
    drop(announced);
    assert!(begun.elapsed() < Duration::from_secs(2), "alone it waits for nobody");
    let alone = faults.syncs.load(SeqCst);
    let begun = Instant::now();
    grow(&public, 2..1000).await;
    let shared = faults.syncs.load(SeqCst) - alone;
    assert_eq!(shared, 4, "998 publications in batches of up to 256");
    assert!(begun.elapsed() < Duration::from_secs(20));

    // Those who come one after the other share one, too: each of them was announced.
    let before = faults.syncs.load(SeqCst);
    let mut tasks = JoinSet::new();
    for (n, announced) in (1000..1020).map(|n| (n, public.announce())).collect::<Vec<_>>() {
        let public = public.clone();
        tasks.spawn(async move {
            tokio::time::sleep(Duration::from_millis((n - 1000) * 10)).await;
            public.publish(&record(n)).await.unwrap();
            drop(announced);
        });
    }
    tasks.join_all().await;
    assert_eq!(faults.syncs.load(SeqCst) - before, 1);

    // Somebody who said that he comes and does not is waited for as long as the period, and no longer once he has left.
    let announced = (public.announce(), public.announce());
    let begun = Instant::now();
    let late = record(1020);
    let left = tokio::join!(public.publish(&late), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(announced.0);
    });
    left.0.unwrap();
    let waited = begun.elapsed();
    assert!((300..2500).contains(&waited.as_millis()), "{waited:?}");
    drop(announced.1);
}

async fn proofs_of_all(log: &Log, public: &TransparencyLog, sizes: Range<u64>) {
    for index in 0..sizes.end {
        let octets = public.record(index).await.unwrap().unwrap().octets;
        let proof = public.prove(index).await.unwrap().unwrap();
        let verified = proof.verify(&octets, log.signer.key()).unwrap();
        assert_eq!((verified.index, verified.checkpoint.size()), (index, sizes.end));
    }
    assert_eq!(public.prove(sizes.end).await.unwrap(), None);
    assert_eq!(public.record(sizes.end).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_entry_is_proven_around_the_ends_of_bundles() {
    let log = Log::new();
    let mut public = log.open().await;
    let mut size = 0;
    for next in [1, 2, 255, 256, 257, 258, 511, 512, 513] {
        grow(&public, size..next).await;
        size = next;
        proofs_of_all(&log, &public, 0..size).await;
        closed(public, &log).await;
        public = log.open().await;
        proofs_of_all(&log, &public, 0..size).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_tile_of_every_earlier_checkpoint_is_served() {
    let log = Log::new();
    let public = log.open().await;
    let mut told = Told::new();
    for (from, to) in [(0, 200), (200, 256), (256, 257), (257, 520)] {
        told.extend(grow(&public, from..to).await);
        let by_index: BTreeMap<_, _> = told.iter().map(|(n, told)| (told.index, *n)).collect();
        let entries: Vec<_> = by_index.values().map(|n| record(*n).to_bytes().unwrap()).collect();
        for size in (1..=to).rev().step_by(if to < 500 { 7 } else { 1 }) {
            // Most tiles of a size are those of all others; the last ones are its own.
            let all = tiles_of(&entries[..size as usize]);
            for (name, octets) in all.into_iter().filter(|(name, _)| size == to || name.contains(".p/")) {
                let tile: TileId = name.parse().unwrap();
                assert_eq!(public.tile(tile).await.unwrap(), Some(octets), "{name} of {size} at {to}");
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
