//! A process that is killed, or whose disk fills up, while it commits: what it acknowledged must be there afterwards.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit};

use super::{Sled, options, until_healed};
use crate::store::contract::{Factory, blob, id, issued, kept, key, session};
use crate::store::{SessionState, SledStateStore, StateName, StateStore};

const CHILD: &str = "SPP_STORE_TEST_DIR";
/// Numbers from here on come after the disk was full.
const LATER: u64 = 1 << 40;
const CHILD_FIRST: &str = "SPP_STORE_TEST_FIRST";

fn child(wrap: &str, test: &str, dir: &Path, first: u64) -> Command {
    let mut command = Command::new("sh");
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
                if n % 3 == 0 && store.advance(&id(n), StateName::Reserved, issued(n)).await.is_err() {
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
            child("", "what_was_acknowledged_survives_kill_9", &sled.dir(), round * 1_000_000).spawn().unwrap();
        let out = process.stdout.take().unwrap();
        let numbers = acknowledged(out, 150 + 40 * usize::try_from(round).unwrap(), &mut || process.kill().unwrap());
        process.wait().unwrap();
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
        let mut process = child(&wrap, test, &sled.dir(), 0).spawn().unwrap();
        let numbers = acknowledged(process.stdout.take().unwrap(), usize::MAX, &mut || ());
        assert!(process.wait().unwrap().success(), "it did not heal");
        assert!(numbers.len() > 100, "only {} were acknowledged", numbers.len());
        assert_eq!(numbers.last(), Some(&LATER));
        let store = sled.state();
        for n in &numbers {
            assert!(store.session(&id(*n)).await.unwrap().is_some(), "{n} is lost");
        }
    }
}
