//! What only this engine must do; what every public database must do is in `store/contract_public.rs`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use sha2::{Digest as _, Sha256};
use tokio::task::JoinSet;

use super::*;
use spp_testkit::files::copy_directory;
use spp_testkit::random::{cases, scaled};
use spp_testkit::wait::eventually;

use crate::store::contract_public::{PublicFactory, contract_of_publication, record};
use crate::store::directory::System;
use crate::store::testing::Faults;
use crate::store::{
    DeviceRecord, PublicDatabase, Publication, PublishError, StoreError, StoreOptions, UniqueKey, WitnessStatus,
};
use crate::tlog::testing::LocalSigner;
use crate::tlog::{SignedCheckpoint, Tree, leaf_hash};

mod crash;
mod export;
mod faults;
mod load;
mod mixed;
mod real;
mod recovery;
mod tamper;
mod witness;

const ORIGIN: &str = "log.example/test";

struct Log {
    dir: tempfile::TempDir,
    signer: Arc<LocalSigner>,
}

impl Log {
    fn dir(&self) -> PathBuf {
        self.dir.path().join("public")
    }

    async fn open_through(&self, faults: &Arc<Faults>) -> Arc<TransparencyLog> {
        let (dir, options, settings) = (self.dir(), options(), LogSettings::default());
        let opened = TransparencyLog::open_through(&dir, &options, self.signer.clone(), settings, faults.clone());
        Arc::new(opened.await.unwrap())
    }

    async fn open(&self) -> Arc<TransparencyLog> {
        Arc::new(self.try_open().await.unwrap())
    }

    async fn open_with(&self, signer: Arc<dyn CheckpointSigner>, settings: LogSettings) -> Arc<TransparencyLog> {
        Arc::new(TransparencyLog::open(&self.dir(), &options(), signer, settings).await.unwrap())
    }

    async fn try_open(&self) -> Result<TransparencyLog, StoreError> {
        TransparencyLog::open(&self.dir(), &options(), self.signer.clone(), LogSettings::default()).await
    }
}

#[async_trait]
impl PublicFactory for Log {
    fn new() -> Self {
        let dir = spp_testkit::files::temp_dir();
        TransparencyLog::create(&dir.path().join("public"), &options()).unwrap();
        Self { dir, signer: Arc::new(LocalSigner::new(ORIGIN)) }
    }

    async fn public(&self) -> Arc<dyn PublicDatabase> {
        self.open().await
    }
}

contract_of_publication!(keeps_the_contract, Log);

fn options() -> StoreOptions {
    StoreOptions { floor_bytes: 16 << 20, reserve_bytes: 1 << 20, ..StoreOptions::default() }
}

fn later(n: u64) -> DeviceRecord {
    DeviceRecord { published: 7777, ..record(n) }
}

/// Which file holds what does not fill a bundle.
fn edge_file(dir: &Path, base: u64) -> PathBuf {
    dir.join("edge").join(format!("{base:020}"))
}

/// Directories can only be looked at when the sequencer has let go of them.
async fn closed(public: Arc<TransparencyLog>, log: &Log) {
    drop(Arc::into_inner(public).expect("nobody else has it"));
    let dir = log.dir();
    let take = move || files::LogFiles::take(&dir, &options(), Arc::new(System)).map(drop);
    tokio::task::spawn_blocking(take).await.unwrap().unwrap();
}

fn untroubled(public: &TransparencyLog) -> bool {
    let status = public.status();
    status.publishing_trouble.is_none() && status.reading_trouble.is_none()
}

type Told = BTreeMap<u64, Publication>;

/// Publishes records, all of which are on the way from the beginning, so that they share batches. What was told of each.
async fn grow(public: &Arc<TransparencyLog>, numbers: impl IntoIterator<Item = u64>) -> Told {
    let tell = |(n, told): (u64, Result<Publication, PublishError>)| (n, told.unwrap_or_else(|e| panic!("{n}: {e}")));
    try_grow(public, numbers).await.into_iter().map(tell).collect()
}

async fn try_grow(
    public: &Arc<TransparencyLog>,
    numbers: impl IntoIterator<Item = u64>,
) -> Vec<(u64, Result<Publication, PublishError>)> {
    let on_the_way: Vec<_> = numbers.into_iter().map(|n| (n, public.reserve_slot())).collect();
    let mut tasks = JoinSet::new();
    for (n, announced) in on_the_way {
        let public = public.clone();
        tasks.spawn(async move {
            let told = public.publish(&record(n)).await;
            drop(announced);
            (n, told)
        });
    }
    tasks.join_all().await
}

/// Whether an entry is checked in full: all are in a long run; the ends of bundles and every seventh are otherwise.
fn checked_in_full(index: u64) -> bool {
    scaled(index.is_multiple_of(7) || matches!(index % 256, 0 | 1 | 255), true)
}

/// Every publication is found by its chip ID at its index. Those checked in full are found by each of their values, their proof
/// verifies, they cannot be published again, and no other record can take one of their values.
async fn must_be_there(log: &Log, public: &TransparencyLog, told: &Told) {
    for (n, publication) in told {
        if !checked_in_full(publication.index) {
            let found = public.find(&UniqueKey::of_chip(&record(*n).chip)).await.unwrap();
            assert_eq!(found.map(|found| found.publication).as_ref(), Some(publication), "{n}");
            continue;
        }
        for key in UniqueKey::of_record(&record(*n)) {
            let found = public.find(&key).await.unwrap();
            let found = found.unwrap_or_else(|| panic!("the {} of {n} is not found", key.what()));
            assert_eq!((&found.publication, &found.record), (publication, &record(*n)), "by its {}", key.what());
        }
        must_be_proven(log, public, *n, publication).await;
        let later = DeviceRecord { published: 9_999, ..record(*n) };
        assert_eq!(public.publish(&later).await.unwrap(), *publication, "{n} once more");
        let rival = DeviceRecord { chip: record(*n).chip, ..record(*n + (1 << 50)) };
        let refused = public.publish(&rival).await;
        assert!(matches!(&refused, Err(PublishError::Taken(taken)) if taken.index == publication.index), "{refused:?}");
    }
}

async fn must_be_proven(log: &Log, public: &TransparencyLog, n: u64, publication: &Publication) {
    let bytes = public.record(publication.index).await.unwrap().unwrap().bytes;
    assert_eq!(bytes, record(n).to_bytes().unwrap());
    let proof = public.prove(publication.index).await.unwrap().unwrap();
    let verified = proof.verify(&bytes, log.signer.key()).unwrap_or_else(|e| panic!("{n}: {e}"));
    assert_eq!(verified.index, publication.index);
}

/// Until what failed works again.
async fn until_published(public: &TransparencyLog, record: &DeviceRecord) -> Publication {
    eventually("it is published", async || public.publish(record).await).await
}

/// The files below a directory and what is in them.
fn files_of(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut directories = vec![dir.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
                files.insert(name, fs::read(path).unwrap());
            }
        }
    }
    files
}

/// The tiles of a log with these entries, below 65,536 of them, as C2SP tlog-tiles names and fills them; without this program's code.
fn tiles_of(entries: &[impl AsRef<[u8]>]) -> BTreeMap<String, Vec<u8>> {
    let hash = |parts: &[&[u8]]| <[u8; 32]>::from(Sha256::digest(parts.concat()));
    let name = |kind: &str, number: usize, width: usize| match width {
        256 => format!("tile/{kind}/{number:03}"),
        _ => format!("tile/{kind}/{number:03}.p/{width}"),
    };
    let (mut tiles, mut upper) = (BTreeMap::new(), Vec::new());
    for (number, entries) in entries.chunks(256).enumerate() {
        let entries: Vec<&[u8]> = entries.iter().map(AsRef::as_ref).collect();
        let bundle = entries.iter().flat_map(|entry| [&(entry.len() as u16).to_be_bytes(), *entry].concat());
        tiles.insert(name("entries", number, entries.len()), bundle.collect());
        let mut hashes: Vec<_> = entries.iter().map(|entry| hash(&[&[0], entry])).collect();
        tiles.insert(name("0", number, hashes.len()), hashes.concat());
        while hashes.len() > 1 && entries.len() == 256 {
            hashes = hashes.chunks(2).map(|pair| hash(&[&[1], &pair[0], &pair[1]])).collect();
        }
        if entries.len() == 256 {
            upper.push(hashes[0]);
        }
    }
    if !upper.is_empty() {
        tiles.insert(name("1", 0, upper.len()), upper.concat());
    }
    tiles
}

fn tree_of(entries: &[impl AsRef<[u8]>]) -> Tree {
    let mut tree = Tree::default();
    entries.iter().for_each(|entry| drop(tree.push(leaf_hash(entry.as_ref()))));
    tree
}

fn checkpoint_of(entries: &[impl AsRef<[u8]>], signer: &LocalSigner) -> SignedCheckpoint {
    signer.checkpoint(&tree_of(entries))
}

#[tokio::test]
async fn a_publication_that_failed_is_in_once_after_repeating_it() {
    for persisted in [false, true] {
        let (log, faults) = (Log::new(), Arc::new(Faults::default()));
        let public = log.open_through(&faults).await;
        public.publish(&record(0)).await.unwrap();
        let fault = if persisted { &faults.in_sync } else { &faults.before_apply };
        fault.store(true, SeqCst);
        assert!(matches!(public.publish(&record(1)).await, Err(PublishError::Store(error)) if is_away(&error)));
        fault.store(false, SeqCst);
        let publication = until_published(&public, &DeviceRecord { published: 7777, ..record(1) }).await;
        assert_eq!(publication.index, 1);
        assert_eq!(publication.published, if persisted { record(1).published } else { 7777 });
        assert_eq!(public.len().await.unwrap(), 2);
    }
}

#[tokio::test]
async fn a_new_record_is_refused_below_the_floor_and_a_repeat_answered() {
    let (log, faults) = (Log::new(), Arc::new(Faults::default()));
    let public = log.open_through(&faults).await;
    let first = public.publish(&record(1)).await.unwrap();
    faults.free.store(12 << 20, SeqCst);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(public.publish(&record(1)).await.unwrap(), first);
    let refused = public.publish(&record(2)).await;
    assert!(matches!(refused, Err(PublishError::Store(StoreError::Full { .. }))), "{refused:?}");
}

fn is_away(error: &StoreError) -> bool {
    matches!(error, StoreError::Failed { .. })
}
