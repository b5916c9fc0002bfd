//! Recovery at startup from torn, damaged, old or foreign files.

use spp_format::tlog::LogKey;

use super::super::files::LogFiles;
use super::*;
use crate::store::directory::OsFs;

/// Marks an index as one of the previous format.
fn set_previous_format(index: &Path) {
    let marker = index.join("store.toml");
    let text = fs::read_to_string(&marker).unwrap();
    assert!(text.contains("format = 2"), "{text}");
    fs::write(marker, text.replace("format = 2", "format = 1")).unwrap();
}

/// Damages an index.
type Damage = fn(&Path, &Path);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unusable_index_is_rebuilt() {
    let other = Log::new();
    let public = other.open().await;
    publish_all(&public, 5000..5300).await;
    close(public, &other).await;
    let others_index = other.dir().join("index");
    let damages: [(&str, Damage); 7] = [
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
        ("of the previous format", |index, old| {
            copy_directory(old, index);
            set_previous_format(index);
        }),
        ("another log's", |_, _| ()),
    ];
    for (last, old_at) in scaled(&[(300, 100)][..], &[(300, 100), (600, 300)]).iter().copied() {
        let log = Log::new();
        let (index, old) = (log.dir().join("index"), log.dir.path().join("old"));
        let public = log.open().await;
        let mut published = publish_all(&public, 0..old_at).await;
        close(public, &log).await;
        copy_directory(&index, &old);
        let public = log.open().await;
        published.extend(publish_all(&public, old_at..last).await);
        close(public, &log).await;
        for (what, damage) in damages {
            fs::remove_dir_all(&index).unwrap();
            if what == "another log's" {
                copy_directory(&others_index, &index)
            } else {
                damage(&index, &old)
            }
            let public = log.open().await;
            assert_eq!(public.len().await.unwrap(), last, "{what}");
            assert_published(&log, &public, &published).await;
            assert!(is_available(&public), "{what}: {:?}", public.status());
            assert_eq!(public.len().await.unwrap(), last, "{what}");
            close(public, &log).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_copy_is_rejected_until_loss_is_accepted() {
    for (old_at, last) in [(100, 150), (250, 300), (300, 600)] {
        let log = Log::new();
        let old = log.dir.path().join("old");
        let public = log.open().await;
        let published = publish_all(&public, 0..old_at).await;
        close(public, &log).await;
        copy_directory(&log.dir(), &old);
        let public = log.open().await;
        publish_all(&public, old_at..last).await;
        close(public, &log).await;
        for part in ["tile", "edge"] {
            fs::remove_dir_all(log.dir().join(part)).unwrap();
            copy_directory(&old.join(part), &log.dir().join(part));
        }
        let before = (files_of(&log.dir().join("tile")), files_of(&log.dir().join("edge")));
        // The size that it counted counts, although the index itself is to be rebuilt.
        if last == 150 {
            set_previous_format(&log.dir().join("index"));
        }
        let refused = log.try_open().await.err().unwrap();
        assert!(matches!(refused, StoreError::Damaged { .. }), "{refused}");
        let message = format!("{old_at} entries found, {last} expected: the files are damaged or an old copy");
        assert!(refused.to_string().contains(&message), "{refused}");
        assert!(refused.to_string().contains("sppctl registry reindex --accept-loss"), "{refused}");
        let refused = reindex(&log.dir(), &options(), log.signer.key(), false, |_, _| ()).await.unwrap_err();
        assert!(refused.to_string().contains(&message), "{refused}");
        assert_eq!((files_of(&log.dir().join("tile")), files_of(&log.dir().join("edge"))), before);
        let done = reindex(&log.dir(), &options(), log.signer.key(), true, |_, _| ()).await.unwrap();
        assert_eq!((done.entries, done.lost), (old_at, last - old_at));
        let public = log.open().await;
        assert_published(&log, &public, &published).await;
        assert_eq!(public.publish(&record(last - 1)).await.unwrap().index, old_at);
    }
}

/// A record small enough to test every byte of a batch.
fn small(n: u64) -> DeviceRecord {
    DeviceRecord { certificate: vec![1], backup: vec![2], public_key: None, ..record(n) }
}

/// The number of entries that recovery finds without a running log.
fn recovered_entries(dir: &Path, key: &LogKey, acknowledged: u64) -> Result<u64, StoreError> {
    let files = LogFiles::open(dir, &options(), Arc::new(OsFs)).unwrap();
    files.recover(key, acknowledged).map(|found| found.tree.size())
}

/// A closed log of three batches of one entry each: the partial bundle and the offset of each batch.
async fn three_batches(log: &Log) -> (Vec<u8>, Vec<usize>) {
    let public = log.open().await;
    let mut offsets = Vec::new();
    for n in 0..3 {
        offsets.push(usize::try_from(fs::metadata(partial_bundle_file(&log.dir(), 0)).unwrap().len()).unwrap());
        public.publish(&small(n)).await.unwrap();
    }
    close(public, log).await;
    (fs::read(partial_bundle_file(&log.dir(), 0)).unwrap(), offsets)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn torn_last_batch_is_removed() {
    let log = Log::new();
    let (edge, offsets) = three_batches(&log).await;
    let (file, last, key) = (partial_bundle_file(&log.dir(), 0), offsets[2], log.signer.key());
    for length in last..=edge.len() {
        fs::write(&file, &edge[..length]).unwrap();
        let whole = length == edge.len();
        assert_eq!(recovered_entries(&log.dir(), key, 2).unwrap(), if whole { 3 } else { 2 }, "{length}");
        assert_eq!(fs::metadata(&file).unwrap().len(), if whole { length } else { last } as u64, "{length}");
    }
    // Blocks reach a disk in any order: missing ones may be zeros or old content.
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
        assert_eq!(recovered_entries(&log.dir(), key, 2).unwrap(), 2, "{round}");
        assert_eq!(fs::read(&file).unwrap(), edge[..last], "{round}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publish_after_torn_batch_reuses_its_index() {
    let log = Log::new();
    let public = log.open().await;
    let mut published = publish_all(&public, 0..300).await;
    close(public, &log).await;
    let before = fs::read(partial_bundle_file(&log.dir(), 256)).unwrap();
    let copy = log.dir.path().join("copy");
    copy_directory(&log.dir(), &copy);
    let public = log.open().await;
    publish_all(&public, 300..320).await;
    close(public, &log).await;
    let after = fs::read(partial_bundle_file(&log.dir(), 256)).unwrap();
    let added = after.len() - before.len();
    for cut in scaled(vec![9, added - 1], vec![1, 9, 300, added / 2, added - 1]) {
        fs::remove_dir_all(log.dir()).unwrap();
        copy_directory(&copy, &log.dir());
        fs::write(partial_bundle_file(&log.dir(), 256), &after[..before.len() + cut]).unwrap();
        let public = log.open().await;
        assert_eq!(public.len().await.unwrap(), 300);
        let publication = public.publish(&record(1000)).await.unwrap();
        assert_eq!(publication.index, 300);
        published.insert(1000, publication);
        close(public, &log).await;
        assert_published(&log, &*log.open().await, &published).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flipped_bit_before_last_batch_is_rejected_unchanged() {
    let log = Log::new();
    let (edge, offsets) = three_batches(&log).await;
    let file = partial_bundle_file(&log.dir(), 0);
    for at in 0..offsets[2] {
        let mut flipped = edge.clone();
        flipped[at] ^= 1 << (at % 8);
        fs::write(&file, &flipped).unwrap();
        let refused = recovered_entries(&log.dir(), log.signer.key(), 0);
        assert!(matches!(refused, Err(StoreError::Damaged { .. })), "byte {at}: {refused:?}");
        assert_eq!(fs::read(&file).unwrap(), flipped, "byte {at}");
    }
    // A crash may have truncated the last batch, but not if the index has it.
    for at in offsets[2]..edge.len() {
        let mut flipped = edge.clone();
        flipped[at] ^= 1 << (at % 8);
        fs::write(&file, &flipped).unwrap();
        let refused = recovered_entries(&log.dir(), log.signer.key(), 3);
        assert!(matches!(refused, Err(StoreError::Damaged { .. })), "byte {at}: {refused:?}");
        assert_eq!(fs::read(&file).unwrap(), flipped, "byte {at}");
    }
    let refused = log.try_open().await.err().unwrap();
    assert!(
        refused.to_string().contains("2 entries found, 3 expected: the files are damaged or an old copy"),
        "{refused}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_log_key_is_rejected_unchanged() {
    for last in [3, 256, 300] {
        let log = Log::new();
        let public = log.open().await;
        let published = publish_all(&public, 0..last).await;
        close(public, &log).await;
        let files = || (files_of(&log.dir().join("tile")), files_of(&log.dir().join("edge")));
        let before = files();
        for origin in [ORIGIN, "log.example/other"] {
            let other = Arc::new(LocalSigner::new(origin));
            // With and without an index: the result must not depend on it.
            for known in [0, last] {
                let refused = recovered_entries(&log.dir(), other.key(), known).err().unwrap();
                assert!(
                    refused
                        .to_string()
                        .contains("check that the configured log key is the one that the log was created with"),
                    "{refused}"
                );
            }
            let refused = TransparencyLog::open(&log.dir(), &options(), other, LogSettings::default()).await;
            assert!(matches!(refused, Err(StoreError::Damaged { .. })));
            assert_eq!(files(), before);
        }
        assert_published(&log, &*log.open().await, &published).await;
    }
}
