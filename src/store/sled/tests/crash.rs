//! Crash tests: acknowledged data must survive a kill and a full disk during commits.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use rustix::process::{Resource, Rlimit};
use spp_format::keys::KeyType;
use spp_testkit::process::{Process, child_command};

use super::{Sled, options, wait_until_recovered};
use crate::hsm::{BatchName, StoredKey};
use crate::store::contract::{Factory, PrivateStore, blob, id, issued, key, session, stored_blob};
use crate::store::contract_pairs::{ALL, aborted_at, name, open_pool, public_key, session_with, wrapped};
use crate::store::contract_production::assert_production_matches_counts;
use crate::store::{
    BatchState, BatchStep, PairAssignment, PairToReserve, PooledPair, Purpose, ReserveError, RewrappedPair,
    SecretStore, SessionState, SledStateStore, StateName, StateStore, StoreError,
};

const CHILD: &str = "SPP_STORE_TEST_DIR";
/// Session number for the write after recovery from a full disk.
const AFTER_RECOVERY: u64 = 1 << 40;
const CHILD_FIRST: &str = "SPP_STORE_TEST_FIRST";

fn child(wrap: &str, test: &str, dir: &Path, first: u64) -> Command {
    let mut command = child_command("sh");
    command
        .args(["-c", &format!("{wrap} exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("store::sled::tests::crash::{test}"), "--nocapture", "-q"])
        .envs([(CHILD, dir.as_os_str()), (CHILD_FIRST, first.to_string().as_ref())])
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// Reads the numbers that a child printed, ignoring an incomplete last line. Calls `stop` after `limit` numbers.
fn acknowledged(out: impl Read, limit: usize, stop: &mut dyn FnMut()) -> Vec<u64> {
    let mut numbers = Vec::new();
    for line in BufReader::new(out).lines() {
        let line = line.unwrap();
        if let Some(n) = line.strip_prefix("acknowledged ").and_then(|rest| rest.strip_suffix('.')) {
            numbers.push(n.parse().unwrap());
        }
        if numbers.len() == limit {
            stop();
        }
    }
    numbers
}

/// Child process of `acknowledged_sessions_survive_kill_9`.
async fn write_until_stopped(store: &Arc<SledStateStore>) {
    let first = std::env::var(CHILD_FIRST).unwrap().parse().unwrap();
    write_until_failure(store, first).await;
}

/// Child process of `full_disk_loses_nothing_and_store_recovers`.
async fn fill_disk_then_recover(store: &Arc<SledStateStore>) {
    // Reopening may free some space, which is filled too.
    for round in 0..4 {
        write_until_failure(store, round * 1_000_000).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    rustix::process::setrlimit(Resource::Fsize, Rlimit { current: None, maximum: None }).unwrap();
    wait_until_recovered(&**store).await;
    store.reserve(&session(AFTER_RECOVERY), None).await.unwrap();
    println!("acknowledged {AFTER_RECOVERY}.");
}

/// Opens the store if this process is a child that a test started. Tests run their own executable with their own name.
fn open_as_child() -> Option<Arc<SledStateStore>> {
    let dir = std::env::var(CHILD).ok()?;
    Some(Arc::new(SledStateStore::open(Path::new(&dir), &options()).unwrap()))
}

async fn write_until_failure(store: &Arc<SledStateStore>, first: u64) {
    let writers = (0..16).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            for n in (first + writer..).step_by(16) {
                if store.reserve(&session(n), Some(&key(n))).await.is_err() {
                    return;
                }
                println!("acknowledged {n}.");
                if n.is_multiple_of(3) && store.advance(&id(n), StateName::Reserved, issued(n)).await.is_err() {
                    return;
                }
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
}

#[tokio::test]
async fn acknowledged_sessions_survive_kill_9() {
    if let Some(store) = open_as_child() {
        return write_until_stopped(&store).await;
    }
    let sled = Sled::new();
    let mut all = Vec::new();
    for round in 0..5u64 {
        let mut process =
            Process::spawn(child("", "acknowledged_sessions_survive_kill_9", &sled.dir(), round * 1_000_000));
        let out = process.child().stdout.take().unwrap();
        let numbers =
            acknowledged(out, 150 + 40 * usize::try_from(round).unwrap(), &mut || process.child().kill().unwrap());
        process.wait();
        assert!(numbers.len() >= 150, "only {} were acknowledged", numbers.len());
        all.extend(numbers);
        let store = sled.state();
        for n in &all {
            let found = store.session(&id(*n)).await.unwrap().unwrap();
            assert!(found.state == SessionState::Reserved || found.state == issued(*n));
            assert_eq!(stored_blob(&*store, &id(*n)).await, Some(blob(*n)));
        }
        let (counts, listed) = (store.counts().await.unwrap(), store.unfinished().await.unwrap().len());
        assert_eq!(counts.reserved + counts.issued, listed as u64, "counts must match the list");
        assert_production_matches_counts(&*store).await;
    }
}

/// A file size limit simulates a full disk: sled's writes fail in any of its threads.
#[tokio::test]
async fn full_disk_loses_nothing_and_store_recovers() {
    if let Some(store) = open_as_child() {
        return fill_disk_then_recover(&store).await;
    }
    for kilobytes in [3000, 5000, 8192] {
        let sled = Sled::new();
        let wrap = format!("trap '' XFSZ; ulimit -S -f {};", 2 * kilobytes);
        let test = "full_disk_loses_nothing_and_store_recovers";
        let mut process = Process::spawn(child(&wrap, test, &sled.dir(), 0));
        let numbers = acknowledged(process.child().stdout.take().unwrap(), usize::MAX, &mut || ());
        assert!(process.wait().success(), "the store did not recover");
        assert!(numbers.len() > 100, "only {} were acknowledged", numbers.len());
        assert_eq!(numbers.last(), Some(&AFTER_RECOVERY));
        let store = sled.state();
        for n in &numbers {
            assert!(store.session(&id(*n)).await.unwrap().is_some(), "{n} is lost");
        }
    }
}

/// Events that the child of `pairs_survive_kill_9_during_pool_operations` reports, encoded as number * EVENTS + event.
const EVENTS: u64 = 4;
const ADDED: u64 = 0;
const RESERVED: u64 = 1;
const ABORTED: u64 = 2;
const DELETED: u64 = 3;

fn report(event: u64, n: u64) {
    println!("acknowledged {}.", n * EVENTS + event);
}

/// The private key of pair `n` in a batch. Its bytes encode both numbers.
fn private_key(batch: BatchName, n: u64) -> StoredKey {
    wrapped(batch, [n, batch.number].map(u64::to_be_bytes).concat().repeat(3))
}

/// The pair number that a public key encodes.
fn pair_number(public: &[u8]) -> u64 {
    u64::from_be_bytes(public[public.len() - 8..].try_into().unwrap())
}

/// Child process of `pairs_survive_kill_9_during_pool_operations`: adds, reserves and moves pairs concurrently.
async fn run_pool_until_stopped(store: &Arc<SledStateStore>) {
    let first: u64 = std::env::var(CHILD_FIRST).unwrap().parse().unwrap();
    let current = Arc::new(AtomicU64::new(open_pool(&**store).await));
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..4 {
        tasks.spawn(add_pairs_loop(store.clone(), current.clone(), first + worker));
        tasks.spawn(reserve_loop(store.clone(), worker));
    }
    tasks.spawn(shred_loop(store.clone(), current));
    // A task ends only on failure.
    tasks.join_next().await.unwrap().unwrap();
}

async fn add_pairs_loop(store: Arc<SledStateStore>, current: Arc<AtomicU64>, first: u64) {
    for begin in (first..).step_by(16) {
        let pairs = [begin, begin + 4, begin + 8, begin + 12];
        loop {
            let batch = name(&*store, current.load(SeqCst)).await;
            let pair = |n| PooledPair { public_key: public_key(n), private_key: private_key(batch, n) };
            match store.add_pairs(batch.number, pairs.map(pair).into()).await {
                Ok(_) => break,
                Err(error) => assert!(matches!(error, StoreError::WrongBatch { .. }), "{error}"),
            }
        }
        pairs.into_iter().for_each(|n| report(ADDED, n));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn reserve_loop(store: Arc<SledStateStore>, worker: u64) {
    loop {
        for (pair_id, pair) in store.ready_pairs(KeyType::P256, None, 64).await.unwrap() {
            let n = pair_number(&pair.public_key);
            if n % 4 != worker {
                continue;
            }
            match store.reserve(&session_with(n, n), Some(&PairToReserve::Pooled(pair_id))).await {
                Ok(()) => report(RESERVED, n),
                Err(error) => assert!(matches!(error, ReserveError::PairUnavailable), "{error}"),
            }
            if n.is_multiple_of(3) && store.advance(&id(n), StateName::Reserved, aborted_at(3000)).await.is_ok() {
                report(ABORTED, n);
            }
        }
    }
}

async fn shred_loop(store: Arc<SledStateStore>, current: Arc<AtomicU64>) {
    loop {
        let next = open_pool(&*store).await;
        current.store(next, SeqCst);
        for batch in store.batches().await.unwrap() {
            if batch.number < next && batch.purpose != Purpose::Sessions {
                shred(&store, batch.number, batch.state, next).await;
            }
        }
    }
}

async fn shred(store: &SledStateStore, from: u64, state: BatchState, to: u64) {
    if !matches!(state, BatchState::Planned | BatchState::Emptied) {
        store.step_batch(from, BatchStep::Seal).await.unwrap();
        let target = name(store, to).await;
        loop {
            let held = store.pairs_of_batch(from, 16).await.unwrap();
            if held.is_empty() {
                break;
            }
            let moved = held.into_iter().map(|held| match private_key(target, pair_number(&held.public_key)) {
                StoredKey::Wrapped(wrapped) => RewrappedPair { assignment: held.assignment, blob: wrapped.blob },
                StoredKey::OnToken(_) => panic!("expected a wrapped key"),
            });
            store.move_pairs(from, to, moved.collect()).await.unwrap();
        }
        store.step_batch(from, BatchStep::Empty).await.unwrap();
    }
    store.delete_batch(from).await.unwrap();
    report(DELETED, from);
}

/// The assignment of every pair. Checks that each pair is stored once, wrapped under its batch's key.
async fn assignments(store: &dyn PrivateStore) -> BTreeMap<u64, PairAssignment> {
    let mut assignments = BTreeMap::new();
    for batch in store.batches().await.unwrap() {
        let (held, name) = (store.pairs_of_batch(batch.number, ALL).await.unwrap(), name(store, batch.number).await);
        assert_eq!(batch.ready + batch.reserved, held.len() as u64, "batch {}", batch.number);
        for held in held {
            let n = pair_number(&held.public_key);
            assert_eq!(held.private_key, private_key(name, n));
            assert_eq!(assignments.insert(n, held.assignment), None, "pair {n} is stored twice");
        }
    }
    assignments
}

#[tokio::test]
async fn pairs_survive_kill_9_during_pool_operations() {
    if let Some(store) = open_as_child() {
        return run_pool_until_stopped(&store).await;
    }
    let sled = Sled::new();
    let mut all = BTreeSet::new();
    for round in 0..5u64 {
        let test = "pairs_survive_kill_9_during_pool_operations";
        let mut process = Process::spawn(child("", test, &sled.dir(), round * 1_000_000));
        let out = process.child().stdout.take().unwrap();
        let numbers =
            acknowledged(out, 400 + 70 * usize::try_from(round).unwrap(), &mut || process.child().kill().unwrap());
        process.wait();
        assert!(numbers.len() >= 400, "only {} were acknowledged", numbers.len());
        all.extend(numbers);
        let store = sled.state();
        let assignments = assignments(&*store).await;
        for number in &all {
            let n = number / EVENTS;
            let (assignment, session) = (assignments.get(&n), store.session(&id(n)).await.unwrap());
            let is_final = session.as_ref().is_some_and(|session| session.state.is_final());
            match number % EVENTS {
                ADDED if is_final => assert_eq!(assignment, None, "pair {n} is erased"),
                ADDED => assert!(assignment.is_some(), "pair {n} is lost"),
                RESERVED if is_final => assert_eq!(n % 3, 0),
                RESERVED => assert_eq!(assignment, Some(&PairAssignment::Session(id(n)))),
                ABORTED => assert!(is_final),
                _ => assert!(!sled.dir().join("pairs").join(n.to_string()).exists(), "batch {n} is deleted"),
            }
        }
        let counts = store.pair_counts(KeyType::P256).await.unwrap();
        let ready =
            assignments.values().filter(|assignment| matches!(assignment, PairAssignment::Ready(_))).count() as u64;
        assert_eq!(counts.made, ready + counts.reserved);
    }
    let event_count = |event| all.iter().filter(|number| *number % EVENTS == event).count();
    assert!(
        [ADDED, RESERVED, ABORTED, DELETED].into_iter().all(|event| event_count(event) > 5),
        "every event must occur"
    );
}
