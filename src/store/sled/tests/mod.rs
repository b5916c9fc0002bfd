//! What only the fence around sled must do; what every engine must do is in `store/contract.rs`.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::*;
use spp_testkit::wait::eventually;

use crate::store::contract::{
    Factory, PrivateStore, begin_a_batch_for_sessions, blob, contract, erased, finish, id, issued, kept, key,
    published, session,
};
use crate::store::contract_access::contract_of_access;
use crate::store::contract_pairs::contract_of_pairs;
use crate::store::contract_production::{assert_adds_up, contract_of_production};
use crate::store::testing::Faults;
use crate::store::{ReserveError, Session, SessionCounts, StateName, StateStore, StoreError};

mod blobs;
mod crash;

struct Sled(tempfile::TempDir);

impl Factory for Sled {
    fn new() -> Self {
        let dir = spp_testkit::files::temp_dir();
        begin_a_batch_for_sessions(SledStateStore::create(&dir.path().join("state"), &options()).unwrap());
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

contract!(keeps_the_contract, Sled);
contract_of_pairs!(keeps_the_contract_of_pairs, Sled);
contract_of_access!(keeps_the_contract_of_access, Sled);
contract_of_production!(keeps_the_contract_of_production, Sled);

fn options() -> StoreOptions {
    StoreOptions { floor_bytes: 16 << 20, reserve_bytes: 1 << 20, ..StoreOptions::default() }
}

fn is_away(error: &StoreError) -> bool {
    matches!(error, StoreError::Failed { .. })
}

async fn until_healed(store: &dyn StateStore) -> SessionCounts {
    eventually("the store has healed", async || store.counts().await).await
}

#[tokio::test]
async fn nothing_is_acknowledged_before_the_sync_and_calls_share_it() {
    let (sled, faults) = (Sled::new(), Arc::new(Faults::default()));
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
    assert_eq!(faults.syncs.load(SeqCst), syncs, "a read needs none");
}

#[tokio::test]
async fn a_step_that_failed_is_not_acknowledged_and_can_be_repeated() {
    for persisted in [false, true] {
        let (sled, faults) = (Sled::new(), Arc::new(Faults::default()));
        let store = SledStateStore::open_through(&sled.dir(), &options(), faults.clone()).unwrap();
        let fault = if persisted { &faults.in_sync } else { &faults.before_apply };
        let mut expected = SessionCounts { erased: 1, ..SessionCounts::default() };
        finish(&store, 0).await;

        // The pair is written and synced before the session.
        faults.syncs_before.store(u64::from(persisted), SeqCst);
        fault.store(true, SeqCst);
        let error = store.reserve(&session(1), Some(&key(1))).await.unwrap_err();
        assert!(matches!(&error, ReserveError::Store(error) if is_away(error)), "{error}");
        fault.store(false, SeqCst);
        expected.reserved += u64::from(persisted);
        assert_eq!(until_healed(&store).await, expected);
        assert_eq!(kept(&store, &id(1)).await, persisted.then(|| blob(1)), "session and key: both or neither");
        store.reserve(&session(1), Some(&key(1))).await.unwrap();
        expected.reserved = 1;
        assert_eq!(store.counts().await.unwrap(), expected);

        let way =
            [(StateName::Reserved, issued(1)), (StateName::Issued, published(1)), (StateName::Published, erased(1))];
        for (from, to) in way {
            fault.store(true, SeqCst);
            assert!(is_away(&store.advance(&id(1), from, to.clone()).await.unwrap_err()));
            fault.store(false, SeqCst);
            until_healed(&store).await;
            let found = store.session(&id(1)).await.unwrap().unwrap().state;
            assert_eq!(found == to, persisted);
            assert_eq!(kept(&store, &id(1)).await.is_none(), found.is_final());
            assert_eq!(store.advance(&id(1), from, to.clone()).await.unwrap().state, to);
        }
        assert_eq!(store.counts().await.unwrap(), SessionCounts { erased: 2, ..SessionCounts::default() });
        assert_eq!(store.unfinished().await.unwrap(), []);
        assert_adds_up(&store).await;
        assert_eq!(kept(&store, &id(1)).await, None);
    }
}

#[tokio::test]
async fn while_the_disk_is_broken_calls_fail_fast_and_then_it_heals() {
    let (sled, faults) = (Sled::new(), Arc::new(Faults::default()));
    let store = SledStateStore::open_through(&sled.dir(), &options(), faults.clone()).unwrap();
    for n in 0..3 {
        faults.in_sync.store(true, SeqCst);
        store.reserve(&session(n), None).await.unwrap_err();
        assert!(is_away(&store.session(&id(n)).await.unwrap_err()), "nothing is read before it is known to be durable");
        faults.in_sync.store(false, SeqCst);
        assert_eq!(until_healed(&store).await.reserved, n + 1);
    }
}

#[tokio::test]
async fn a_refused_transaction_does_not_disturb_the_others() {
    let sled = Sled::new();
    let store = sled.state();
    let calls = (0..200).map(|n| {
        let store = store.clone();
        let of_one_chip = if n % 2 == 0 { session(n) } else { Session { chip: session(0).chip, ..session(n) } };
        tokio::spawn(async move { store.reserve(&of_one_chip, Some(&key(n))).await.is_ok() })
    });
    let mut kept = 0;
    for call in calls.collect::<Vec<_>>() {
        kept += u64::from(call.await.unwrap());
    }
    // All on chips of their own, and one of those on chip 0 (an odd one may come before session 0).
    assert_eq!(kept, 100);
    assert_eq!(store.counts().await.unwrap().reserved, kept);
    assert_eq!(store.unfinished().await.unwrap().len(), 100);
}

#[tokio::test]
async fn below_the_floor_only_what_exists_goes_on() {
    let (sled, faults) = (Sled::new(), Arc::new(Faults::default()));
    let store = SledStateStore::open_through(&sled.dir(), &options(), faults.clone()).unwrap();
    store.reserve(&session(1), None).await.unwrap();
    let set_free = async |bytes: u64| {
        faults.free.store(bytes, SeqCst);
        // Nought stands for what the disk has.
        let is_read = |free| if bytes == 0 { free > 16 << 20 } else { free == bytes };
        eventually("the free space is read anew", async || is_read(store.room().unwrap().0)).await;
    };
    set_free((16 << 20) - 1).await;
    let refused = store.reserve(&session(2), None).await;
    assert!(matches!(refused, Err(ReserveError::Store(StoreError::Full { .. }))), "{refused:?}");
    store.reserve(&session(1), None).await.expect("a repeat is no new device");
    store.advance(&id(1), StateName::Reserved, issued(1)).await.unwrap();
    assert_eq!(store.room().unwrap(), ((16 << 20) - 1, 16 << 20));
    set_free(1 << 20).await;
    let refused = store.advance(&id(1), StateName::Issued, published(1)).await;
    assert!(matches!(refused, Err(StoreError::Full { .. })), "{refused:?}");
    assert_eq!(store.session(&id(1)).await.unwrap().unwrap().state, issued(1));
    set_free(0).await;
    store.advance(&id(1), StateName::Issued, published(1)).await.unwrap();
    store.reserve(&session(2), None).await.unwrap();
}

#[test]
fn the_reserve_is_given_up_and_made_again() {
    let sled = Sled::new();
    let reserve = sled.dir().join("reserve");
    assert_eq!(fs::metadata(&reserve).unwrap().blocks() * 512, 1 << 20);
    let faults = Arc::new(Faults::default());
    faults.free.store(1, SeqCst);
    // Something that sled cannot open stands for a full disk.
    let db = sled.dir().join("db");
    let away = sled.dir().join("away");
    fs::rename(&db, &away).unwrap();
    fs::create_dir(&db).unwrap();
    assert!(SledStateStore::open_through(&sled.dir(), &options(), faults.clone()).is_err());
    assert!(!reserve.exists());
    fs::remove_dir(&db).unwrap();
    fs::rename(&away, &db).unwrap();
    drop(SledStateStore::open_through(&sled.dir(), &options(), faults.clone()).unwrap());
    assert!(!reserve.exists(), "there is no room for it yet");
    drop(sled.state());
    assert!(reserve.exists());
}

#[test]
fn a_store_is_made_once_and_opened_only_where_it_is() {
    let sled = Sled::new();
    let refused = |result: Result<SledStateStore, StoreError>, words: &str| {
        let error = result.err().unwrap();
        assert!(matches!(error, StoreError::Directory(_)) && error.to_string().contains(words), "{error}");
    };
    refused(SledStateStore::create(&sled.dir(), &options()), "never overwritten");
    refused(SledStateStore::create(sled.0.path(), &options()), "never overwritten");
    refused(SledStateStore::open(&sled.0.path().join("nowhere"), &options()), "sppctl init");
    SledIndex::create(&sled.0.path().join("index"), &options()).unwrap();
    refused(SledStateStore::open(&sled.0.path().join("index"), &options()), "\"state\" is needed");
    assert!(!sled.0.path().join("nowhere").exists());
}

#[test]
fn an_interrupted_init_is_no_store() {
    let sled = Sled::new();
    File::create(sled.dir().join("store.toml")).unwrap();
    let error = SledStateStore::open(&sled.dir(), &options()).err().unwrap();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
}

#[test]
fn a_second_daemon_is_told_that_the_store_is_in_use() {
    let sled = Sled::new();
    let first = sled.state();
    let error = SledStateStore::open(&sled.dir(), &options()).err().unwrap();
    assert!(error.to_string().contains("another process"), "{error}");
    drop(first);
    sled.state();
}

#[test]
fn a_copy_of_a_closed_handle_only_delays_the_opening() {
    let sled = Sled::new();
    drop(sled.state());
    // What a process has until it runs its own program, when another thread starts it.
    let copy = File::open(sled.dir().join("db")).unwrap();
    rustix::fs::flock(&copy, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        drop(copy);
    });
    let opened = SledStateStore::open(&sled.dir(), &options());
    assert!(opened.is_ok(), "{:?}", opened.err());
    other.join().unwrap();
}

#[tokio::test]
async fn a_half_written_snapshot_does_not_keep_a_store_closed() {
    let sled = Sled::new();
    sled.state().reserve(&session(1), None).await.unwrap();
    fs::write(sled.dir().join("snap.FFFFFFFFFFFFFFFF.generating"), [0; 40]).unwrap();
    assert_eq!(sled.state().session(&id(1)).await.unwrap(), Some(session(1)));
}

#[tokio::test]
async fn no_value_makes_a_blob_file() {
    let sled = Sled::new();
    let store = sled.state();
    for n in 0..60 {
        let mut large = session(n);
        large.certificate.to_be_signed = vec![5; 60_000];
        store.reserve(&large, None).await.unwrap();
    }
    assert_eq!(fs::read_dir(sled.dir().join("blobs")).unwrap().count(), 0);
}

#[tokio::test]
async fn damage_is_reported_when_the_store_is_opened() {
    let sled = Sled::new();
    sled.state().reserve(&session(1), None).await.unwrap();
    let db = sled.dir().join("db");
    let mut bytes = fs::read(&db).unwrap();
    bytes.iter_mut().skip(20).for_each(|byte| *byte = 0xEE);
    OpenOptions::new().write(true).open(&db).unwrap().write_all(&bytes).unwrap();
    let error = SledStateStore::open(&sled.dir(), &options()).err().unwrap();
    assert!(matches!(error, StoreError::Damaged { .. } | StoreError::Failed { .. }), "{error}");
}
