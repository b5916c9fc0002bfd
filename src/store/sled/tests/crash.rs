//! A process that is killed, or whose disk fills up, while it commits: what it acknowledged must be there afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use rustix::process::{Resource, Rlimit};
use spp_testkit::process::{Process, tethered};

use super::{Sled, options, until_healed};
use crate::keys::{BatchName, KeyKind, StoredKey};
use crate::store::contract::{Factory, PrivateStore, blob, id, issued, kept, key, session};
use crate::store::contract_pairs::{ALL, given_up, name, open_pool, public_key, session_with, wrapped};
use crate::store::contract_production::assert_adds_up;
use crate::store::{
    BatchState, BatchStep, Holder, MovedPair, PairToReserve, PooledPair, Purpose, ReserveError, SecretStore,
    SessionState, SledStateStore, StateName, StateStore, StoreError,
};

const CHILD: &str = "SPP_STORE_TEST_DIR";
/// Numbers from here on come after the disk was full.
const LATER: u64 = 1 << 40;
const CHILD_FIRST: &str = "SPP_STORE_TEST_FIRST";

fn child(wrap: &str, test: &str, dir: &Path, first: u64) -> Command {
    let mut command = tethered("sh");
    command
        .args(["-c", &format!("{wrap} exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("store::sled::tests::crash::{test}"), "--nocapture", "-q"])
        .envs([(CHILD, dir.as_os_str()), (CHILD_FIRST, first.to_string().as_ref())])
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// The numbers that a child printed; the last line may be cut off and is dropped unless it is whole.
fn acknowledged(out: impl Read, enough: usize, stop: &mut dyn FnMut()) -> Vec<u64> {
    let mut numbers = Vec::new();
    for line in BufReader::new(out).lines() {
        let line = line.unwrap();
        if let Some(n) = line.strip_prefix("acknowledged ").and_then(|rest| rest.strip_suffix('.')) {
            numbers.push(n.parse().unwrap());
        }
        if numbers.len() == enough {
            stop();
        }
    }
    numbers
}

/// What the child of the first test below does.
async fn write_until_stopped(store: &Arc<SledStateStore>) {
    let first = std::env::var(CHILD_FIRST).unwrap().parse().unwrap();
    write_until_it_fails(store, first).await;
}

/// What the child of the second test below does.
async fn write_until_the_disk_is_full_and_then_heal(store: &Arc<SledStateStore>) {
    // Opening again may find a little room: it is filled up, too.
    for round in 0..4 {
        write_until_it_fails(store, round * 1_000_000).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    rustix::process::setrlimit(Resource::Fsize, Rlimit { current: None, maximum: None }).unwrap();
    until_healed(&**store).await;
    store.reserve(&session(LATER), None).await.unwrap();
    println!("acknowledged {LATER}.");
}

/// The store, if this process is the child that a test started: the test's own program with the same test's name.
fn as_child() -> Option<Arc<SledStateStore>> {
    let dir = std::env::var(CHILD).ok()?;
    Some(Arc::new(SledStateStore::open(Path::new(&dir), &options()).unwrap()))
}

async fn write_until_it_fails(store: &Arc<SledStateStore>, first: u64) {
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
async fn what_was_acknowledged_survives_kill_9() {
    if let Some(store) = as_child() {
        return write_until_stopped(&store).await;
    }
    let sled = Sled::new();
    let mut all = Vec::new();
    for round in 0..5u64 {
        let mut process =
            Process::spawn(child("", "what_was_acknowledged_survives_kill_9", &sled.dir(), round * 1_000_000));
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
            assert_eq!(kept(&*store, &id(*n)).await, Some(blob(*n)));
        }
        let (counts, listed) = (store.counts().await.unwrap(), store.unfinished().await.unwrap().len());
        assert_eq!(counts.reserved + counts.issued, listed as u64, "counts and list are from the same batches");
        assert_adds_up(&*store).await;
    }
}

/// A limit on the file's size stands for a full disk: sled's writes fail, in whichever of its threads they happen.
#[tokio::test]
async fn a_disk_that_fills_up_loses_nothing_and_the_store_heals_when_there_is_room() {
    if let Some(store) = as_child() {
        return write_until_the_disk_is_full_and_then_heal(&store).await;
    }
    for kilobytes in [3000, 5000, 8192] {
        let sled = Sled::new();
        let wrap = format!("trap '' XFSZ; ulimit -S -f {};", 2 * kilobytes);
        let test = "a_disk_that_fills_up_loses_nothing_and_the_store_heals_when_there_is_room";
        let mut process = Process::spawn(child(&wrap, test, &sled.dir(), 0));
        let numbers = acknowledged(process.child().stdout.take().unwrap(), usize::MAX, &mut || ());
        assert!(process.wait().success(), "it did not heal");
        assert!(numbers.len() > 100, "only {} were acknowledged", numbers.len());
        assert_eq!(numbers.last(), Some(&LATER));
        let store = sled.state();
        for n in &numbers {
            assert!(store.session(&id(*n)).await.unwrap().is_some(), "{n} is lost");
        }
    }
}

/// What a child of the last test tells, as one number each.
const TOLD: u64 = 4;
const ADDED: u64 = 0;
const RESERVED: u64 = 1;
const ABORTED: u64 = 2;
const FORGOTTEN: u64 = 3;

fn tell(what: u64, n: u64) {
    println!("acknowledged {}.", n * TOLD + what);
}

/// The private half of pair `n` in a batch: it tells what it is and under which key.
fn half(batch: BatchName, n: u64) -> StoredKey {
    wrapped(batch, [n, batch.number].map(u64::to_be_bytes).concat().repeat(3))
}

/// Which pair a public key belongs to.
fn number_of(public: &[u8]) -> u64 {
    u64::from_be_bytes(public[public.len() - 8..].try_into().unwrap())
}

/// What the child of the last test does: pairs are made, given to sessions and moved from batch to batch, all at once.
async fn pool_until_stopped(store: &Arc<SledStateStore>) {
    let first: u64 = std::env::var(CHILD_FIRST).unwrap().parse().unwrap();
    let current = Arc::new(AtomicU64::new(open_pool(&**store).await));
    let mut tasks = tokio::task::JoinSet::new();
    for lane in 0..4 {
        tasks.spawn(add_for_ever(store.clone(), current.clone(), first + lane));
        tasks.spawn(reserve_for_ever(store.clone(), lane));
    }
    tasks.spawn(shred_for_ever(store.clone(), current));
    // None of them ends but by a fault.
    tasks.join_next().await.unwrap().unwrap();
}

async fn add_for_ever(store: Arc<SledStateStore>, current: Arc<AtomicU64>, first: u64) {
    for begin in (first..).step_by(16) {
        let pairs = [begin, begin + 4, begin + 8, begin + 12];
        loop {
            let batch = name(&*store, current.load(SeqCst)).await;
            let pair = |n| PooledPair { public_key: public_key(n), kept: half(batch, n) };
            match store.add_pairs(batch.number, pairs.map(pair).into()).await {
                Ok(_) => break,
                Err(error) => assert!(matches!(error, StoreError::WrongBatch { .. }), "{error}"),
            }
        }
        pairs.into_iter().for_each(|n| tell(ADDED, n));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn reserve_for_ever(store: Arc<SledStateStore>, lane: u64) {
    loop {
        for (place, pair) in store.ready_pairs(KeyKind::P256, None, 64).await.unwrap() {
            let n = number_of(&pair.public_key);
            if n % 4 != lane {
                continue;
            }
            match store.reserve(&session_with(n, n), Some(&PairToReserve::Pooled(place))).await {
                Ok(()) => tell(RESERVED, n),
                Err(error) => assert!(matches!(error, ReserveError::PairGone), "{error}"),
            }
            if n.is_multiple_of(3) && store.advance(&id(n), StateName::Reserved, given_up(3000)).await.is_ok() {
                tell(ABORTED, n);
            }
        }
    }
}

async fn shred_for_ever(store: Arc<SledStateStore>, current: Arc<AtomicU64>) {
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
            let moved = held.into_iter().map(|held| match half(target, number_of(&held.public_key)) {
                StoredKey::Wrapped(wrapped) => MovedPair { holder: held.holder, blob: wrapped.blob },
                StoredKey::OnToken(_) => panic!("it is wrapped"),
            });
            store.move_pairs(from, to, moved.collect()).await.unwrap();
        }
        store.step_batch(from, BatchStep::Empty).await.unwrap();
    }
    store.forget_batch(from).await.unwrap();
    tell(FORGOTTEN, from);
}

/// Everybody who has a pair; each pair is in one place, with its own bytes under its batch's key.
async fn holders(store: &dyn PrivateStore) -> BTreeMap<u64, Holder> {
    let mut holders = BTreeMap::new();
    for batch in store.batches().await.unwrap() {
        let (held, name) = (store.pairs_of_batch(batch.number, ALL).await.unwrap(), name(store, batch.number).await);
        assert_eq!(batch.ready + batch.reserved, held.len() as u64, "batch {}", batch.number);
        for held in held {
            let n = number_of(&held.public_key);
            assert_eq!(held.kept, half(name, n));
            assert_eq!(holders.insert(n, held.holder), None, "pair {n} is in one place");
        }
    }
    holders
}

#[tokio::test]
async fn pairs_and_their_blobs_survive_kill_9_amid_adding_reserving_and_moving() {
    if let Some(store) = as_child() {
        return pool_until_stopped(&store).await;
    }
    let sled = Sled::new();
    let mut all = BTreeSet::new();
    for round in 0..5u64 {
        let test = "pairs_and_their_blobs_survive_kill_9_amid_adding_reserving_and_moving";
        let mut process = Process::spawn(child("", test, &sled.dir(), round * 1_000_000));
        let out = process.child().stdout.take().unwrap();
        let told =
            acknowledged(out, 400 + 70 * usize::try_from(round).unwrap(), &mut || process.child().kill().unwrap());
        process.wait();
        assert!(told.len() >= 400, "only {} were acknowledged", told.len());
        all.extend(told);
        let store = sled.state();
        let holders = holders(&*store).await;
        for told in &all {
            let n = told / TOLD;
            let (holder, session) = (holders.get(&n), store.session(&id(n)).await.unwrap());
            let over = session.as_ref().is_some_and(|session| session.state.is_final());
            match told % TOLD {
                ADDED if over => assert_eq!(holder, None, "pair {n} is erased"),
                ADDED => assert!(holder.is_some(), "pair {n} is lost"),
                RESERVED if over => assert_eq!(n % 3, 0),
                RESERVED => assert_eq!(holder, Some(&Holder::Session(id(n)))),
                ABORTED => assert!(over),
                _ => assert!(!sled.dir().join("pairs").join(n.to_string()).exists(), "batch {n} is forgotten"),
            }
        }
        let counts = store.pair_counts(KeyKind::P256).await.unwrap();
        let ready = holders.values().filter(|holder| matches!(holder, Holder::Ready(_))).count() as u64;
        assert_eq!(counts.made, ready + counts.reserved);
    }
    let told = |what| all.iter().filter(|told| *told % TOLD == what).count();
    assert!([ADDED, RESERVED, ABORTED, FORGOTTEN].into_iter().all(|what| told(what) > 5), "it did all of it");
}
