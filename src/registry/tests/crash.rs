//! A process is killed or runs out of disk space while it publishes. Every acknowledged entry must survive.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use rustix::process::{Resource, Rlimit};
use spp_testkit::process::{Process, child_command};

use super::*;
use crate::store::contract_public::audit_checkpoint;

const CHILD: &str = "SPP_REGISTRY_TEST_DIR";
const CHILD_FIRST: &str = "SPP_REGISTRY_TEST_FIRST";
/// The number of the record that is published after the disk was full.
const LATER: u64 = 1 << 40;

/// A log with a deterministic key, which a child process can open, too.
fn log() -> Log {
    Log { signer: Arc::new(LocalSigner::from_seed(ORIGIN, &[5; 32])), ..Log::new() }
}

fn child(wrap: &str, test: &str, dir: &Path, first: u64) -> Command {
    let mut command = child_command("sh");
    command
        .args(["-c", &format!("{wrap} exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("registry::tests::crash::{test}"), "--nocapture", "-q"])
        .envs([(CHILD, dir.as_os_str()), (CHILD_FIRST, first.to_string().as_ref())])
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// The log, if this process is a test's child: the test executable, run with the name of the same test.
async fn as_child() -> Option<Arc<TransparencyLog>> {
    let dir = PathBuf::from(std::env::var(CHILD).ok()?);
    let settings = LogSettings { index_patience: Duration::from_millis(300), ..LogSettings::default() };
    let opened = TransparencyLog::open(&dir, &options(), log().signer, settings).await;
    Some(Arc::new(opened.unwrap()))
}

fn print_acknowledgement(n: u64, publication: &Publication) {
    println!("acknowledged {n} {} {}.", publication.index, hex::encode(publication.record_hash));
}

/// The acknowledgements that a child printed. The last line may be truncated and is ignored then.
fn read_acknowledgements(out: impl Read, enough: usize, stop: &mut dyn FnMut()) -> BTreeMap<u64, (u64, String)> {
    let mut acknowledged = BTreeMap::new();
    for line in BufReader::new(out).lines() {
        let line = line.unwrap();
        if let Some(rest) = line.strip_prefix("acknowledged ").and_then(|rest| rest.strip_suffix('.')) {
            let words: Vec<_> = rest.split(' ').collect();
            acknowledged.insert(words[0].parse().unwrap(), (words[1].parse().unwrap(), words[2].to_owned()));
        }
        if acknowledged.len() == enough {
            stop();
        }
    }
    acknowledged
}

/// A record with a backup of `bytes` bytes.
fn large(n: u64, bytes: usize) -> DeviceRecord {
    DeviceRecord { backup: vec![n as u8; bytes], ..record(n) }
}

async fn publish_until_failure(public: &Arc<TransparencyLog>, first: u64, bytes: usize) {
    let mut writers = JoinSet::new();
    for writer in 0..16 {
        let public = public.clone();
        writers.spawn(async move {
            for n in (first + writer..).step_by(16) {
                let slot = public.reserve_slot();
                let Ok(publication) = public.publish(&large(n, bytes)).await else { return };
                drop(slot);
                print_acknowledgement(n, &publication);
            }
        });
    }
    writers.join_all().await;
}

fn first() -> u64 {
    std::env::var(CHILD_FIRST).unwrap().parse().unwrap()
}

/// Opens the log after the child ended and asserts that it has every acknowledged record.
async fn assert_acknowledged_present(
    log: &Log,
    acknowledged: &BTreeMap<u64, (u64, String)>,
    record: impl Fn(u64) -> DeviceRecord,
) -> u64 {
    let public = log.open().await;
    for (n, (index, hash)) in acknowledged {
        let found = public.record(*index).await.unwrap().unwrap_or_else(|| panic!("record {n} lost"));
        assert_eq!((&found.record, &hex::encode(found.publication.record_hash)), (&record(*n), hash));
        let proof = public.prove(*index).await.unwrap().unwrap();
        assert_eq!(proof.verify(&found.bytes, log.signer.key()).unwrap().index, *index);
        let by_chip = public.find(&UniqueKey::of_chip(&record(*n).chip)).await.unwrap();
        assert_eq!(by_chip.unwrap().publication, found.publication);
        assert_eq!(public.publish(&record(*n)).await.unwrap(), found.publication);
    }
    // A record that was not acknowledged is published once or not at all.
    let size = public.len().await.unwrap();
    let mut chips = std::collections::BTreeSet::new();
    for index in 0..size {
        let found = public.record(index).await.unwrap().unwrap();
        assert!(chips.insert(found.record.chip.clone()), "duplicate record at {index}");
        let by_chip = public.find(&UniqueKey::of_chip(&found.record.chip)).await.unwrap();
        assert_eq!(by_chip.unwrap().publication.index, index);
    }
    assert_eq!(public.checkpoint().await.unwrap().unwrap().size(), size);
    size
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_records_survive_sigkill() {
    if let Some(public) = as_child().await {
        return publish_until_failure(&public, first(), 900).await;
    }
    let log = log();
    let (mut all, mut seen) = (BTreeMap::new(), None::<SignedCheckpoint>);
    let rounds = scaled(&[40, 230, 300][..], &[40, 150, 230, 256, 300, 370, 420]);
    for (round, &enough) in rounds.iter().enumerate() {
        let test = "acknowledged_records_survive_sigkill";
        let mut process = Process::spawn(child("", test, &log.dir(), round as u64 * 1_000_000));
        let acknowledged = read_acknowledgements(process.child().stdout.take().unwrap(), enough, &mut || {
            process.child().kill().unwrap()
        });
        process.wait();
        assert!(acknowledged.len() >= enough, "only {} acknowledged", acknowledged.len());
        all.extend(acknowledged);
        let size = assert_acknowledged_present(&log, &all, |n| large(n, 900)).await;
        assert!(size >= all.len() as u64);
        // The log is consistent with the checkpoint of the previous round.
        let mut source = StoreDirectory::new(&log.dir(), log.signer.key());
        let note = seen.as_ref().map(|seen| seen.note().to_vec());
        let options = VerifyOptions { key: log.signer.key(), issuers: &[], seen: note.as_deref() };
        let verification = verify(&mut source, &options, &mut |_, _| ());
        assert_eq!(verification.entries, size);
        assert!(
            verification.findings.iter().all(|finding| finding.problem.contains("no issuer known")),
            "{verification:?}"
        );
        assert!(seen.is_none_or(|seen| seen.size() < size), "log did not grow");
        seen = verification.checkpoint;
    }
}

/// A file size limit simulates a full disk: a write stops in the middle of a batch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_loses_no_records_and_publication_resumes() {
    const BACKUP_BYTES: usize = 60_000;
    if let Some(public) = as_child().await {
        for round in 0..3 {
            publish_until_failure(&public, round * 1_000_000, BACKUP_BYTES).await;
            assert!(public.len().await.unwrap() > 0, "log not readable while the disk is full");
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        rustix::process::setrlimit(Resource::Fsize, Rlimit { current: None, maximum: None }).unwrap();
        let publication = publish_until_ok(&public, &large(LATER, BACKUP_BYTES)).await;
        return print_acknowledgement(LATER, &publication);
    }
    for kilobytes in [2500, 6000, 9001] {
        let log = log();
        let wrap = format!("trap '' XFSZ; ulimit -S -f {};", 2 * kilobytes);
        let test = "full_disk_loses_no_records_and_publication_resumes";
        let mut process = Process::spawn(child(&wrap, test, &log.dir(), 0));
        let acknowledged = read_acknowledgements(process.child().stdout.take().unwrap(), usize::MAX, &mut || ());
        assert!(process.wait().success(), "it did not heal");
        assert!(acknowledged.len() > 20, "only {} acknowledged", acknowledged.len());
        assert!(acknowledged.contains_key(&LATER));
        assert_acknowledged_present(&log, &acknowledged, |n| large(n, BACKUP_BYTES)).await;
    }
}

/// The index's file reaches the size limit, the log's files do not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unwritable_index_is_rebuilt_completely() {
    if let Some(public) = as_child().await {
        let index_write_failed = || public.status().publish_error.is_some_and(|why| why.contains("index write failed"));
        // Small batches, so that the index has some of the entries of the partial bundle.
        for first in (0..).step_by(10) {
            for (n, publication) in try_publish_all(&public, first..first + 10).await {
                publication.iter().for_each(|publication| print_acknowledgement(n, publication));
            }
            if index_write_failed() {
                break;
            }
        }
        // The index is rebuilt only after writes have failed for a while.
        eventually("index rebuilt", async || {
            public.status().read_error.is_some_and(|why| why.contains("index being rebuilt"))
        })
        .await;
        rustix::process::setrlimit(Resource::Fsize, Rlimit { current: None, maximum: None }).unwrap();
        eventually("log available", async || is_available(&public)).await;
        let publication = publish_until_ok(&public, &record(LATER)).await;
        print_acknowledgement(LATER, &publication);
        for index in 0..public.len().await.unwrap() {
            let found = public.record(index).await.unwrap().unwrap();
            let by_chip = public.find(&UniqueKey::of_chip(&found.record.chip)).await.unwrap();
            assert_eq!(by_chip.unwrap().publication.index, index);
        }
        return;
    }
    let log = log();
    let test = "unwritable_index_is_rebuilt_completely";
    let mut process = Process::spawn(child("trap '' XFSZ; ulimit -S -f 3000;", test, &log.dir(), 0));
    let acknowledged = read_acknowledgements(process.child().stdout.take().unwrap(), usize::MAX, &mut || ());
    assert!(process.wait().success(), "it did not heal");
    assert!(acknowledged.contains_key(&LATER) && acknowledged.len() > 100, "only {} acknowledged", acknowledged.len());
    assert_acknowledged_present(&log, &acknowledged, record).await;
}

/// The node of the audit log.
const NODE: &str = "node-1";

/// Every third entry is an audit checkpoint.
fn is_audit(n: u64) -> bool {
    n.is_multiple_of(3)
}

async fn append_mixed_until_failure(public: &Arc<TransparencyLog>, first: u64) {
    let mut writers = JoinSet::new();
    for writer in 0..16 {
        let public = public.clone();
        writers.spawn(async move {
            for n in (first + writer..).step_by(16) {
                let acknowledged = match is_audit(n) {
                    true => public.append_audit(&audit_checkpoint(NODE, n)).await,
                    false => public.publish(&record(n)).await,
                };
                let Ok(publication) = acknowledged else { return };
                print_acknowledgement(n, &publication);
            }
        });
    }
    writers.join_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_audit_checkpoints_survive_sigkill() {
    if let Some(public) = as_child().await {
        return append_mixed_until_failure(&public, first()).await;
    }
    let (log, mut all) = (log(), BTreeMap::new());
    for (round, &enough) in scaled(&[30, 290][..], &[30, 256, 290, 400]).iter().enumerate() {
        let test = "acknowledged_audit_checkpoints_survive_sigkill";
        let mut process = Process::spawn(child("", test, &log.dir(), round as u64 * 999_999));
        all.extend(read_acknowledgements(process.child().stdout.take().unwrap(), enough, &mut || {
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
                true => public.append_audit(&audit_checkpoint(NODE, *n)).await.unwrap(),
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
        assert_eq!((trail.checkpoints.len() as u64, trail.checkpoints.last().unwrap().0), (size - records, newest));
    }
}
