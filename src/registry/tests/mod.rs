//! Tests specific to the transparency log. Tests for every public database are in `store/contract_public.rs`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use sha2::{Digest as _, Sha256};
use spp_format::record::{DeviceRecord, Publication, UniqueKey};
use spp_format::tlog::testing::LocalSigner;
use spp_format::tlog::{LogKey, SignedCheckpoint, Tree, UnsignedCheckpoint, leaf_hash};
use tokio::task::JoinSet;

use super::*;
use spp_log::registry::{
    AuditTrail, AuditTrailError, ExportError, ExportReport, Finding, LogSource, Mirror, SourceError, StoreDirectory,
    VerifyOptions, audit_checkpoints, export, read_chip, verify,
};
use spp_testkit::files::copy_directory;
use spp_testkit::random::{cases, scaled};
use spp_testkit::wait::eventually;

use crate::store::contract_public::{PublicFactory, public_database_contract, record};
use crate::store::directory::OsFs;
use crate::store::testing::FaultInjector;
use crate::store::{LogReader, PublicDatabase, PublishError, StoreError, StoreOptions, WitnessStatus};

mod crash;
mod export;
mod faults;
mod load;
mod mixed;
mod recovery;
mod reference_log;
mod tamper;
mod witness;

const ORIGIN: &str = "log.example/test";

#[async_trait]
impl LogSigner for LocalSigner {
    fn key(&self) -> &LogKey {
        self.key()
    }

    async fn sign(&self, checkpoint: &UnsignedCheckpoint) -> Result<Vec<u8>, String> {
        Ok(self.sign_sync(checkpoint))
    }
}

struct Log {
    dir: tempfile::TempDir,
    signer: Arc<LocalSigner>,
}

impl Log {
    fn dir(&self) -> PathBuf {
        self.dir.path().join("public")
    }

    async fn open_through(&self, faults: &Arc<FaultInjector>) -> Arc<TransparencyLog> {
        let (dir, options, settings) = (self.dir(), options(), LogSettings::default());
        let opened = TransparencyLog::open_through(&dir, &options, self.signer.clone(), settings, faults.clone());
        Arc::new(opened.await.unwrap())
    }

    /// Opens the log and waits until its index is usable: a log without one builds it in the background, and a lookup waits only
    /// a second for it.
    async fn open(&self) -> Arc<TransparencyLog> {
        let public = Arc::new(self.try_open().await.unwrap());
        eventually("the index is usable", async || public.find(&UniqueKey::of_chip(&record(u64::MAX >> 1).chip)).await)
            .await;
        public
    }

    async fn open_with(&self, signer: Arc<dyn LogSigner>, settings: LogSettings) -> Arc<TransparencyLog> {
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
        Arc::new(self.try_open().await.unwrap())
    }
}

public_database_contract!(keeps_the_contract, Log);

fn options() -> StoreOptions {
    StoreOptions { floor_bytes: 16 << 20, reserve_bytes: 1 << 20, ..StoreOptions::default() }
}

fn with_later_time(n: u64) -> DeviceRecord {
    DeviceRecord { published: 7777, ..record(n) }
}

/// The file of the partial bundle.
fn partial_bundle_file(dir: &Path, base: u64) -> PathBuf {
    dir.join("edge").join(format!("{base:020}"))
}

/// Closes a log and waits until the sequencer has released its directory.
async fn close(public: Arc<TransparencyLog>, log: &Log) {
    drop(Arc::into_inner(public).expect("other references exist"));
    let dir = log.dir();
    let take = move || files::LogFiles::open(&dir, &options(), Arc::new(OsFs)).map(drop);
    tokio::task::spawn_blocking(take).await.unwrap().unwrap();
}

fn is_available(public: &TransparencyLog) -> bool {
    let status = public.status();
    status.publish_error.is_none() && status.read_error.is_none()
}

type Publications = BTreeMap<u64, Publication>;

/// Publishes records concurrently with slots reserved in advance, so that they share batches. Returns the publication of each.
async fn publish_all(public: &Arc<TransparencyLog>, numbers: impl IntoIterator<Item = u64>) -> Publications {
    let unwrap =
        |(n, result): (u64, Result<Publication, PublishError>)| (n, result.unwrap_or_else(|e| panic!("{n}: {e}")));
    try_publish_all(public, numbers).await.into_iter().map(unwrap).collect()
}

async fn try_publish_all(
    public: &Arc<TransparencyLog>,
    numbers: impl IntoIterator<Item = u64>,
) -> Vec<(u64, Result<Publication, PublishError>)> {
    let slots: Vec<_> = numbers.into_iter().map(|n| (n, public.reserve_slot())).collect();
    let mut tasks = JoinSet::new();
    for (n, slot) in slots {
        let public = public.clone();
        tasks.spawn(async move {
            let result = public.publish(&record(n)).await;
            drop(slot);
            (n, result)
        });
    }
    tasks.join_all().await
}

/// Whether an entry is checked in full: every entry in a long run, otherwise those at the ends of bundles and every seventh.
fn checked_in_full(index: u64) -> bool {
    scaled(index.is_multiple_of(7) || matches!(index % 256, 0 | 1 | 255), true)
}

/// Asserts that every publication is found by its chip ID at its index. For those checked in full, also asserts that they are
/// found by each of their values, their proof verifies, they cannot be published again, and no other record can have one of their
/// values.
async fn assert_published(log: &Log, public: &TransparencyLog, published: &Publications) {
    for (n, publication) in published {
        if !checked_in_full(publication.index) {
            let found = public.find(&UniqueKey::of_chip(&record(*n).chip)).await.unwrap();
            assert_eq!(found.map(|found| found.publication).as_ref(), Some(publication), "{n}");
            continue;
        }
        for key in UniqueKey::of_record(&record(*n)) {
            let found = public.find(&key).await.unwrap();
            let found = found.unwrap_or_else(|| panic!("{} of record {n} not found", key.field()));
            assert_eq!((&found.publication, &found.record), (publication, &record(*n)), "by its {}", key.field());
        }
        assert_proven(log, public, *n, publication).await;
        let later = DeviceRecord { published: 9_999, ..record(*n) };
        assert_eq!(public.publish(&later).await.unwrap(), *publication, "{n} once more");
        let rival = DeviceRecord { chip: record(*n).chip, ..record(*n + (1 << 50)) };
        let refused = public.publish(&rival).await;
        assert!(
            matches!(&refused, Err(PublishError::Conflict(taken)) if taken.index == publication.index),
            "{refused:?}"
        );
    }
}

async fn assert_proven(log: &Log, public: &TransparencyLog, n: u64, publication: &Publication) {
    let bytes = public.record(publication.index).await.unwrap().unwrap().bytes;
    assert_eq!(bytes, record(n).to_bytes().unwrap());
    let proof = public.prove(publication.index).await.unwrap().unwrap();
    let verified = proof.verify(&bytes, log.signer.key()).unwrap_or_else(|e| panic!("{n}: {e}"));
    assert_eq!(verified.index, publication.index);
}

/// Retries until the record is published.
async fn publish_until_ok(public: &TransparencyLog, record: &DeviceRecord) -> Publication {
    eventually("record published", async || public.publish(record).await).await
}

/// The files below a directory and their content.
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

/// The tiles of a log with these entries (fewer than 65,536) as specified by C2SP tlog-tiles, implemented independently.
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
async fn publish_failed_then_retried_is_published_once() {
    for persisted in [false, true] {
        let (log, faults) = (Log::new(), Arc::new(FaultInjector::default()));
        let public = log.open_through(&faults).await;
        public.publish(&record(0)).await.unwrap();
        let fault = if persisted { &faults.in_sync } else { &faults.before_apply };
        fault.store(true, SeqCst);
        assert!(matches!(public.publish(&record(1)).await, Err(PublishError::Store(error)) if is_failed(&error)));
        fault.store(false, SeqCst);
        let publication = publish_until_ok(&public, &DeviceRecord { published: 7777, ..record(1) }).await;
        assert_eq!(publication.index, 1);
        assert_eq!(publication.published, if persisted { record(1).published } else { 7777 });
        assert_eq!(public.len().await.unwrap(), 2);
    }
}

#[tokio::test]
async fn publish_below_disk_floor_rejects_only_new_records() {
    let (log, faults) = (Log::new(), Arc::new(FaultInjector::default()));
    let public = log.open_through(&faults).await;
    let first = public.publish(&record(1)).await.unwrap();
    faults.free.store(12 << 20, SeqCst);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(public.publish(&record(1)).await.unwrap(), first);
    let refused = public.publish(&record(2)).await;
    assert!(matches!(refused, Err(PublishError::Store(StoreError::Full { .. }))), "{refused:?}");
}

fn is_failed(error: &StoreError) -> bool {
    matches!(error, StoreError::Failed { .. })
}
