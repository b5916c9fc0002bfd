//! What the engine does with what it finds when it is opened: torn, damaged, old or foreign files.

use super::super::files::LogFiles;
use super::*;
use crate::store::directory::System;
use crate::tlog::LogKey;

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
            let mut bytes = fs::read(index.join("db")).unwrap();
            bytes.iter_mut().skip(20).for_each(|byte| *byte = 0xEE);
            fs::write(index.join("db"), bytes).unwrap();
        }),
        ("behind", |index, old| copy_directory(old, index)),
        ("another log's", |_, _| ()),
    ];
    for (last, old_at) in scaled(&[(300, 100)][..], &[(300, 100), (600, 300)]).iter().copied() {
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
            assert!(untroubled(&public), "{what}: {:?}", public.status());
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
        assert!(refused.to_string().contains("sppctl registry reindex --accept-loss"), "{refused}");
        let refused = reindex(&log.dir(), &options(), log.signer.key(), false, |_, _| ()).await.unwrap_err();
        assert!(refused.to_string().contains(&words), "{refused}");
        assert_eq!((files_of(&log.dir().join("tile")), files_of(&log.dir().join("edge"))), before);
        let done = reindex(&log.dir(), &options(), log.signer.key(), true, |_, _| ()).await.unwrap();
        assert_eq!((done.entries, done.lost), (old_at, last - old_at));
        let public = log.open().await;
        must_be_there(&log, &public, &told).await;
        assert_eq!(public.publish(&record(last - 1)).await.unwrap().index, old_at);
    }
}

/// Records so small that every byte of a batch can be tried.
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
        for byte in &mut torn[from..] {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = if round % 2 == 0 { 0 } else { (random >> 56) as u8 };
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
    let added = after.len() - before.len();
    for cut in scaled(vec![9, added - 1], vec![1, 9, 300, added / 2, added - 1]) {
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
        assert!(matches!(refused, Err(StoreError::Damaged { .. })), "byte {at}: {refused:?}");
        assert_eq!(fs::read(&file).unwrap(), flipped, "byte {at}");
    }
    // The last one may have been cut off by a crash, but not if the index has it.
    for at in begins[2]..edge.len() {
        let mut flipped = edge.clone();
        flipped[at] ^= 1 << (at % 8);
        fs::write(&file, &flipped).unwrap();
        let refused = recovered(&log.dir(), log.signer.key(), 3);
        assert!(matches!(refused, Err(StoreError::Damaged { .. })), "byte {at}: {refused:?}");
        assert_eq!(fs::read(&file).unwrap(), flipped, "byte {at}");
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
