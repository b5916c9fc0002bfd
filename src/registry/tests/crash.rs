//! A process that is killed, or that can write no more, while it publishes: what it acknowledged must be there afterwards.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use rustix::process::{Resource, Rlimit};
use spp_testkit::process::{Process, tethered};

use super::*;
use crate::store::contract_public::audit_of;

const CHILD: &str = "SPP_REGISTRY_TEST_DIR";
const CHILD_FIRST: &str = "SPP_REGISTRY_TEST_FIRST";
/// Numbers from here on come after the disk was full.
const LATER: u64 = 1 << 40;

/// A log that a child process can open, too.
fn log() -> Log {
    Log { signer: Arc::new(LocalSigner::from_seed(ORIGIN, &[5; 32])), ..Log::new() }
}

fn child(wrap: &str, test: &str, dir: &Path, first: u64) -> Command {
    let mut command = tethered("sh");
    command
        .args(["-c", &format!("{wrap} exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("registry::tests::crash::{test}"), "--nocapture", "-q"])
        .envs([(CHILD, dir.as_os_str()), (CHILD_FIRST, first.to_string().as_ref())])
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// The log, if this process is the child that a test started: the test's own program with the same test's name.
async fn as_child() -> Option<Arc<TransparencyLog>> {
    let dir = PathBuf::from(std::env::var(CHILD).ok()?);
    let settings = LogSettings { index_patience: Duration::from_millis(300), ..LogSettings::default() };
    let opened = TransparencyLog::open(&dir, &options(), log().signer, settings).await;
    Some(Arc::new(opened.unwrap()))
}

fn tell(n: u64, publication: &Publication) {
    println!("acknowledged {n} {} {}.", publication.index, hex::encode(publication.record_hash));
}

/// What a child printed; the last line may be cut off and is dropped unless it is whole.
fn acknowledged(out: impl Read, enough: usize, stop: &mut dyn FnMut()) -> BTreeMap<u64, (u64, String)> {
    let mut told = BTreeMap::new();
    for line in BufReader::new(out).lines() {
        let line = line.unwrap();
        if let Some(rest) = line.strip_prefix("acknowledged ").and_then(|rest| rest.strip_suffix('.')) {
            let words: Vec<_> = rest.split(' ').collect();
            told.insert(words[0].parse().unwrap(), (words[1].parse().unwrap(), words[2].to_owned()));
        }
        if told.len() == enough {
            stop();
        }
    }
    told
}

/// A record that takes so many bytes.
fn large(n: u64, bytes: usize) -> DeviceRecord {
    DeviceRecord { backup: vec![n as u8; bytes], ..record(n) }
}

async fn publish_until_it_fails(public: &Arc<TransparencyLog>, first: u64, bytes: usize) {
    let mut writers = JoinSet::new();
    for writer in 0..16 {
        let public = public.clone();
        writers.spawn(async move {
            for n in (first + writer..).step_by(16) {
                let announced = public.reserve_slot();
                let Ok(publication) = public.publish(&large(n, bytes)).await else { return };
                drop(announced);
                tell(n, &publication);
            }
        });
    }
    writers.join_all().await;
}

fn first() -> u64 {
    std::env::var(CHILD_FIRST).unwrap().parse().unwrap()
}

/// Opens what a child left, and looks for everything that it acknowledged.
async fn must_have_kept(log: &Log, told: &BTreeMap<u64, (u64, String)>, record: impl Fn(u64) -> DeviceRecord) -> u64 {
    let public = log.open().await;
    for (n, (index, hash)) in told {
        let found = public.record(*index).await.unwrap().unwrap_or_else(|| panic!("{n} is lost"));
        assert_eq!((&found.record, &hex::encode(found.publication.record_hash)), (&record(*n), hash));
        let proof = public.prove(*index).await.unwrap().unwrap();
        assert_eq!(proof.verify(&found.bytes, log.signer.key()).unwrap().index, *index);
        let by_chip = public.find(&UniqueKey::of_chip(&record(*n).chip)).await.unwrap();
        assert_eq!(by_chip.unwrap().publication, found.publication);
        assert_eq!(public.publish(&record(*n)).await.unwrap(), found.publication);
    }
    // What nobody was told of is there once, or not at all.
    let size = public.len().await.unwrap();
    let mut chips = std::collections::BTreeSet::new();
    for index in 0..size {
        let found = public.record(index).await.unwrap().unwrap();
        assert!(chips.insert(found.record.chip.clone()), "{index} is there twice");
        let by_chip = public.find(&UniqueKey::of_chip(&found.record.chip)).await.unwrap();
        assert_eq!(by_chip.unwrap().publication.index, index);
    }
    assert_eq!(public.checkpoint().await.unwrap().unwrap().size(), size);
    size
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_kill_9_with_its_place() {
    if let Some(public) = as_child().await {
        return publish_until_it_fails(&public, first(), 900).await;
    }
    let log = log();
    let (mut all, mut seen) = (BTreeMap::new(), None::<SignedCheckpoint>);
    let rounds = scaled(&[40, 230, 300][..], &[40, 150, 230, 256, 300, 370, 420]);
    for (round, &enough) in rounds.iter().enumerate() {
        let test = "what_was_acknowledged_survives_kill_9_with_its_place";
        let mut process = Process::spawn(child("", test, &log.dir(), round as u64 * 1_000_000));
        let told =
            acknowledged(process.child().stdout.take().unwrap(), enough, &mut || process.child().kill().unwrap());
        process.wait();
        assert!(told.len() >= enough, "only {} were acknowledged", told.len());
        all.extend(told);
        let size = must_have_kept(&log, &all, |n| large(n, 900)).await;
        assert!(size >= all.len() as u64);
        // What was signed before is the beginning of what is there now, to anybody who walks it.
        let mut source = StoreDirectory::new(&log.dir(), log.signer.key());
        let note = seen.as_ref().map(|seen| seen.note().to_vec());
        let options = VerifyOptions { key: log.signer.key(), issuers: &[], seen: note.as_deref() };
        let walked = verify(&mut source, &options, &mut |_, _| ());
        assert_eq!(walked.entries, size);
        assert!(walked.findings.iter().all(|finding| finding.problem.contains("no issuer is known")), "{walked:?}");
        assert!(seen.is_none_or(|seen| seen.size() < size), "it only grows");
        seen = walked.checkpoint;
    }
}

/// A limit on the files' size stands for a full disk: a write stops in the middle of a batch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fills_up_loses_nothing_and_publication_goes_on_when_there_is_room() {
    const OCTETS: usize = 60_000;
    if let Some(public) = as_child().await {
        for round in 0..3 {
            publish_until_it_fails(&public, round * 1_000_000, OCTETS).await;
            assert!(public.len().await.unwrap() > 0, "it can be read meanwhile");
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        rustix::process::setrlimit(Resource::Fsize, Rlimit { current: None, maximum: None }).unwrap();
        let publication = until_published(&public, &large(LATER, OCTETS)).await;
        return tell(LATER, &publication);
    }
    for kilobytes in [2500, 6000, 9001] {
        let log = log();
        let wrap = format!("trap '' XFSZ; ulimit -S -f {};", 2 * kilobytes);
        let test = "a_disk_that_fills_up_loses_nothing_and_publication_goes_on_when_there_is_room";
        let mut process = Process::spawn(child(&wrap, test, &log.dir(), 0));
        let told = acknowledged(process.child().stdout.take().unwrap(), usize::MAX, &mut || ());
        assert!(process.wait().success(), "it did not heal");
        assert!(told.len() > 20, "only {} were acknowledged", told.len());
        assert!(told.contains_key(&LATER));
        must_have_kept(&log, &told, |n| large(n, OCTETS)).await;
    }
}

/// The index's file reaches the limit, and the log's files do not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_can_be_written_no_more_is_made_anew_and_knows_everything() {
    if let Some(public) = as_child().await {
        let cannot =
            || public.status().publishing_trouble.is_some_and(|why| why.contains("the index cannot be written"));
        // Small batches, so that the index knows a part of what does not fill a bundle.
        for first in (0..).step_by(10) {
            for (n, publication) in try_grow(&public, first..first + 10).await {
                publication.iter().for_each(|publication| tell(n, publication));
            }
            if cannot() {
                break;
            }
        }
        // It fails for a while before it is given up.
        eventually("a new index", async || {
            public.status().reading_trouble.is_some_and(|why| why.contains("made anew"))
        })
        .await;
        rustix::process::setrlimit(Resource::Fsize, Rlimit { current: None, maximum: None }).unwrap();
        eventually("the end of its trouble", async || untroubled(&public)).await;
        let publication = until_published(&public, &record(LATER)).await;
        tell(LATER, &publication);
        for index in 0..public.len().await.unwrap() {
            let found = public.record(index).await.unwrap().unwrap();
            let by_chip = public.find(&UniqueKey::of_chip(&found.record.chip)).await.unwrap();
            assert_eq!(by_chip.unwrap().publication.index, index);
        }
        return;
    }
    let log = log();
    let test = "an_index_that_can_be_written_no_more_is_made_anew_and_knows_everything";
    let mut process = Process::spawn(child("trap '' XFSZ; ulimit -S -f 3000;", test, &log.dir(), 0));
    let told = acknowledged(process.child().stdout.take().unwrap(), usize::MAX, &mut || ());
    assert!(process.wait().success(), "it did not heal");
    assert!(told.contains_key(&LATER) && told.len() > 100, "only {} were acknowledged", told.len());
    must_have_kept(&log, &told, record).await;
}

/// Whose audit log it is.
const NODE: &str = "node-1";

/// Every third is an audit checkpoint.
fn is_audit(n: u64) -> bool {
    n.is_multiple_of(3)
}

async fn append_both_kinds_until_it_fails(public: &Arc<TransparencyLog>, first: u64) {
    let mut writers = JoinSet::new();
    for writer in 0..16 {
        let public = public.clone();
        writers.spawn(async move {
            for n in (first + writer..).step_by(16) {
                let told = match is_audit(n) {
                    true => public.append_audit(&audit_of(NODE, n)).await,
                    false => public.publish(&record(n)).await,
                };
                let Ok(publication) = told else { return };
                tell(n, &publication);
            }
        });
    }
    writers.join_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn audit_checkpoints_among_records_survive_kill_9_with_their_places() {
    if let Some(public) = as_child().await {
        return append_both_kinds_until_it_fails(&public, first()).await;
    }
    let (log, mut all) = (log(), BTreeMap::new());
    for (round, &enough) in scaled(&[30, 290][..], &[30, 256, 290, 400]).iter().enumerate() {
        let test = "audit_checkpoints_among_records_survive_kill_9_with_their_places";
        let mut process = Process::spawn(child("", test, &log.dir(), round as u64 * 999_999));
        all.extend(acknowledged(process.child().stdout.take().unwrap(), enough, &mut || {
            process.child().kill().unwrap()
        }));
        process.wait();
        if round % 2 == 1 {
            fs::remove_dir_all(log.dir().join("index")).unwrap();
        }
        let public = log.open().await;
        let (newest, _) = public.newest_audit(NODE).await.unwrap().unwrap();
        for (n, (index, hash)) in &all {
            let again = match is_audit(*n) {
                true => public.append_audit(&audit_of(NODE, *n)).await.unwrap(),
                false => public.publish(&record(*n)).await.unwrap(),
            };
            assert_eq!((again.index, &hex::encode(again.record_hash)), (*index, hash), "{n}");
            assert!(!is_audit(*n) || *index <= newest, "{n} at {index} is newer than {newest}");
        }
        let size = public.checkpoint().await.unwrap().unwrap().size();
        let mut records = 0;
        for index in 0..size {
            records += u64::from(public.record(index).await.unwrap().is_some());
        }
        assert_eq!(public.len().await.unwrap(), records);
        let trail = audit_checkpoints(
            &mut StoreDirectory::new(&log.dir(), log.signer.key()),
            log.signer.key(),
            NODE,
            &mut |_, _| (),
        );
        let trail = trail.unwrap();
        assert_eq!((trail.found.len() as u64, trail.found.last().unwrap().0), (size - records, newest));
    }
}
