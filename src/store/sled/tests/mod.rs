//! Tests specific to the sled engines. The contract tests of all engines are in `store/contract*.rs`.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::*;
use spp_testkit::wait::eventually;

use crate::store::contract::{
    Factory, PrivateStore, blob, erased, finish, id, issued, key, open_session_batch, published, session,
    session_contract, stored_blob,
};
use crate::store::contract_access::access_store_contract;
use crate::store::contract_pairs::secret_store_contract;
use crate::store::contract_production::{assert_production_matches_counts, production_contract};
use crate::store::testing::FaultInjector;
use crate::store::{ReserveError, Session, SessionCounts, SessionReader, StateName, StateStore, StoreError};

mod blobs;
mod crash;

struct Sled(tempfile::TempDir);

impl Factory for Sled {
    fn new() -> Self {
        let dir = spp_testkit::files::temp_dir();
        open_session_batch(SledStateStore::create(&dir.path().join("state"), &options()).unwrap());
        Self(dir)
    }

    fn state(&self) -> Arc<dyn PrivateStore> {
        Arc::new(SledStateStore::open(&self.dir(), &options()).unwrap())
    }
}

impl Sled {
    fn dir(&self) -> std::path::PathBuf {
        self.0.path().join("state")
    }
}

session_contract!(session_contract_tests, Sled);
secret_store_contract!(secret_store_contract_tests, Sled);
access_store_contract!(access_store_contract_tests, Sled);
production_contract!(production_contract_tests, Sled);

fn options() -> StoreOptions {
    StoreOptions { floor_bytes: 16 << 20, reserve_bytes: 1 << 20, ..StoreOptions::default() }
}

fn is_failed(error: &StoreError) -> bool {
    matches!(error, StoreError::Failed { .. })
}

async fn wait_until_recovered(store: &dyn StateStore) -> SessionCounts {
    eventually("the store has recovered", async || store.counts().await).await
}

#[tokio::test]
async fn calls_share_a_sync_before_acknowledgement() {
    let (sled, faults) = (Sled::new(), Arc::new(FaultInjector::default()));
    let store = Arc::new(SledStateStore::open_through(&sled.dir(), &options(), faults.clone()).unwrap());
    store.reserve(&session(0), None).await.unwrap();
    assert_eq!(faults.syncs.load(SeqCst), 1);
    let calls = (1..=256).map(|n| {
        let store = store.clone();
        tokio::spawn(async move { store.reserve(&session(n), None).await })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap().unwrap();
    }
    let syncs = faults.syncs.load(SeqCst);
    assert!((2..200).contains(&syncs), "{syncs} syncs");
    store.session(&id(0)).await.unwrap();
    assert_eq!(faults.syncs.load(SeqCst), syncs, "a read needs no sync");
}

#[tokio::test]
async fn failed_step_is_not_acknowledged_and_can_be_repeated() {
    for persisted in [false, true] {
        let (sled, faults) = (Sled::new(), Arc::new(FaultInjector::default()));
        let store = SledStateStore::open_through(&sled.dir(), &options(), faults.clone()).unwrap();
        let fault = if persisted { &faults.in_sync } else { &faults.before_apply };
        let mut expected = SessionCounts { erased: 1, ..SessionCounts::default() };
        finish(&store, 0).await;

        // The pair is written and synced before the session.
        faults.syncs_before.store(u64::from(persisted), SeqCst);
        fault.store(true, SeqCst);
        let error = store.reserve(&session(1), Some(&key(1))).await.unwrap_err();
        assert!(matches!(&error, ReserveError::Store(error) if is_failed(error)), "{error}");
        fault.store(false, SeqCst);
        expected.reserved += u64::from(persisted);
        assert_eq!(wait_until_recovered(&store).await, expected);
        assert_eq!(stored_blob(&store, &id(1)).await, persisted.then(|| blob(1)), "session and key: both or neither");
        store.reserve(&session(1), Some(&key(1))).await.unwrap();
        expected.reserved = 1;
        assert_eq!(store.counts().await.unwrap(), expected);

        let transitions =
            [(StateName::Reserved, issued(1)), (StateName::Issued, published(1)), (StateName::Published, erased(1))];
        for (from, to) in transitions {
            fault.store(true, SeqCst);
            assert!(is_failed(&store.advance(&id(1), from, to.clone()).await.unwrap_err()));
            fault.store(false, SeqCst);
            wait_until_recovered(&store).await;
            let found = store.session(&id(1)).await.unwrap().unwrap().state;
            assert_eq!(found == to, persisted);
            assert_eq!(stored_blob(&store, &id(1)).await.is_none(), found.is_final());
            assert_eq!(store.advance(&id(1), from, to.clone()).await.unwrap().state, to);
        }
        assert_eq!(store.counts().await.unwrap(), SessionCounts { erased: 2, ..SessionCounts::default() });
        assert_eq!(store.unfinished().await.unwrap(), []);
        assert_production_matches_counts(&store).await;
        assert_eq!(stored_blob(&store, &id(1)).await, None);
    }
}

#[tokio::test]
async fn broken_disk_fails_calls_and_store_recovers() {
    let (sled, faults) = (Sled::new(), Arc::new(FaultInjector::default()));
    let store = SledStateStore::open_through(&sled.dir(), &options(), faults.clone()).unwrap();
    for n in 0..3 {
        faults.in_sync.store(true, SeqCst);
        store.reserve(&session(n), None).await.unwrap_err();
        assert!(is_failed(&store.session(&id(n)).await.unwrap_err()), "reads fail until data is known to be durable");
        faults.in_sync.store(false, SeqCst);
        assert_eq!(wait_until_recovered(&store).await.reserved, n + 1);
    }
}

#[tokio::test]
async fn refused_transaction_does_not_affect_others() {
    let sled = Sled::new();
    let store = sled.state();
    let calls = (0..200).map(|n| {
        let store = store.clone();
        let new = if n % 2 == 0 { session(n) } else { Session { chip: session(0).chip, ..session(n) } };
        tokio::spawn(async move { store.reserve(&new, Some(&key(n))).await.is_ok() })
    });
    let mut accepted = 0;
    for call in calls.collect::<Vec<_>>() {
        accepted += u64::from(call.await.unwrap());
    }
    // 99 sessions on separate chips, and one on chip 0 (an odd session may be first).
    assert_eq!(accepted, 100);
    assert_eq!(store.counts().await.unwrap().reserved, accepted);
    assert_eq!(store.unfinished().await.unwrap().len(), 100);
}

#[tokio::test]
async fn below_floor_only_existing_sessions_proceed() {
    let (sled, faults) = (Sled::new(), Arc::new(FaultInjector::default()));
    let store = SledStateStore::open_through(&sled.dir(), &options(), faults.clone()).unwrap();
    store.reserve(&session(1), None).await.unwrap();
    let set_free = async |bytes: u64| {
        faults.free.store(bytes, SeqCst);
        // 0 stands for the real free space.
        let is_read = |free| if bytes == 0 { free > 16 << 20 } else { free == bytes };
        eventually("the free space is refreshed", async || is_read(store.disk_space().unwrap().0)).await;
    };
    set_free((16 << 20) - 1).await;
    let refused = store.reserve(&session(2), None).await;
    assert!(matches!(refused, Err(ReserveError::Store(StoreError::Full { .. }))), "{refused:?}");
    store.reserve(&session(1), None).await.expect("a repeat is not a new device");
    store.advance(&id(1), StateName::Reserved, issued(1)).await.unwrap();
    assert_eq!(store.disk_space().unwrap(), ((16 << 20) - 1, 16 << 20));
    set_free(1 << 20).await;
    let refused = store.advance(&id(1), StateName::Issued, published(1)).await;
    assert!(matches!(refused, Err(StoreError::Full { .. })), "{refused:?}");
    assert_eq!(store.session(&id(1)).await.unwrap().unwrap().state, issued(1));
    set_free(0).await;
    store.advance(&id(1), StateName::Issued, published(1)).await.unwrap();
    store.reserve(&session(2), None).await.unwrap();
}

#[test]
fn reserve_file_is_released_and_recreated() {
    let sled = Sled::new();
    let reserve = sled.dir().join("reserve");
    assert_eq!(fs::metadata(&reserve).unwrap().blocks() * 512, 1 << 20);
    let faults = Arc::new(FaultInjector::default());
    faults.free.store(1, SeqCst);
    // A path that sled cannot open simulates a full disk.
    let db = sled.dir().join("db");
    let moved = sled.dir().join("moved");
    fs::rename(&db, &moved).unwrap();
    fs::create_dir(&db).unwrap();
    assert!(SledStateStore::open_through(&sled.dir(), &options(), faults.clone()).is_err());
    assert!(!reserve.exists());
    fs::remove_dir(&db).unwrap();
    fs::rename(&moved, &db).unwrap();
    drop(SledStateStore::open_through(&sled.dir(), &options(), faults.clone()).unwrap());
    assert!(!reserve.exists(), "the disk is still full");
    drop(sled.state());
    assert!(reserve.exists());
}

#[test]
fn create_never_overwrites_and_open_never_creates() {
    let sled = Sled::new();
    let refused = |result: Result<SledStateStore, StoreError>, words: &str| {
        let error = result.err().unwrap();
        assert!(matches!(error, StoreError::Directory(_)) && error.to_string().contains(words), "{error}");
    };
    refused(SledStateStore::create(&sled.dir(), &options()), "never overwritten");
    refused(SledStateStore::create(sled.0.path(), &options()), "never overwritten");
    refused(SledStateStore::open(&sled.0.path().join("nowhere"), &options()), "sppctl init");
    SledIndex::create(&sled.0.path().join("index"), &options()).unwrap();
    refused(SledStateStore::open(&sled.0.path().join("index"), &options()), "expected \"state\"");
    assert!(!sled.0.path().join("nowhere").exists());
}

#[test]
fn empty_marker_is_refused() {
    let sled = Sled::new();
    File::create(sled.dir().join("store.toml")).unwrap();
    let error = SledStateStore::open(&sled.dir(), &options()).err().unwrap();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
}

#[test]
fn second_open_reports_store_in_use() {
    let sled = Sled::new();
    let first = sled.state();
    let error = SledStateStore::open(&sled.dir(), &options()).err().unwrap();
    assert!(error.to_string().contains("another process"), "{error}");
    drop(first);
    sled.state();
}

#[test]
fn open_waits_for_inherited_lock() {
    let sled = Sled::new();
    drop(sled.state());
    // A forked child process holds such a copy until `exec`.
    let copy = File::open(sled.dir().join("db")).unwrap();
    rustix::fs::flock(&copy, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let child = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        drop(copy);
    });
    let opened = SledStateStore::open(&sled.dir(), &options());
    assert!(opened.is_ok(), "{:?}", opened.err());
    child.join().unwrap();
}

#[tokio::test]
async fn partial_snapshot_does_not_prevent_opening() {
    let sled = Sled::new();
    sled.state().reserve(&session(1), None).await.unwrap();
    fs::write(sled.dir().join("snap.FFFFFFFFFFFFFFFF.generating"), [0; 40]).unwrap();
    assert_eq!(sled.state().session(&id(1)).await.unwrap(), Some(session(1)));
}

#[tokio::test]
async fn large_values_create_no_sled_blob_file() {
    let sled = Sled::new();
    let store = sled.state();
    for n in 0..60 {
        let mut large = session(n);
        large.certificate = crate::store::contract::unsigned(vec![5; 60_000]);
        store.reserve(&large, None).await.unwrap();
    }
    assert_eq!(fs::read_dir(sled.dir().join("blobs")).unwrap().count(), 0);
}

#[tokio::test]
async fn open_reports_corruption() {
    let sled = Sled::new();
    sled.state().reserve(&session(1), None).await.unwrap();
    let db = sled.dir().join("db");
    let mut bytes = fs::read(&db).unwrap();
    bytes.iter_mut().skip(20).for_each(|byte| *byte = 0xEE);
    OpenOptions::new().write(true).open(&db).unwrap().write_all(&bytes).unwrap();
    let error = SledStateStore::open(&sled.dir(), &options()).err().unwrap();
    assert!(matches!(error, StoreError::Damaged { .. } | StoreError::Failed { .. }), "{error}");
}
