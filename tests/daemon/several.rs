//! Several HSMs with the same keys behind one daemon: provisioning continues if one fails, work that needs the failed HSM waits
//! for it, and a recovered HSM rejoins automatically.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use spp::config::DaemonConfig;
use spp::hsm::{BatchName, Hsm, HsmError, HsmId, KeyReloadRequest, PairStorage, StoreId};
use spp_format::keys::KeyType;
use spp_proto::{HsmMemberStatus, PoolKind};
use tonic::Code;

use spp_testkit::devices::{Line, Refusal, TestFab, assemble, complete, install, package, phone, provision};
use spp_testkit::files::{copy_directory, write_private};
use spp_testkit::load::reconnecting_channel;
use spp_testkit::pools::{add_pool, add_profile, officer, pooled, wait_for_pools};
use spp_testkit::process::{Process, program};
use spp_testkit::random::scaled;
use spp_testkit::site::Site;
use spp_testkit::wait::{LIMIT, eventually};

/// Order numbers of unchecked devices: these orders create HSM calls, so that a failure is noticed.
static NEXT_UNCHECKED_DEVICE: AtomicU64 = AtomicU64::new(1_000_000);

/// Creates a site with two HSMs, `a` and `b`. The token of `b` is a copy of the token of `a` after the ceremony. Each HSM fails
/// as its file `faults` says.
fn two_hsms() -> Site {
    let site = Site::new();
    site.use_faulty_module();
    copy_token(&site, "hsm", "hsm-b");
    let conf = String::from_utf8(site.read("hsm/softhsm2.conf")).unwrap();
    let tokens = |of: &str| site.path(of).join("tokens").display().to_string();
    std::fs::write(site.path("hsm-b/softhsm2.conf"), conf.replace(&tokens("hsm"), &tokens("hsm-b"))).unwrap();
    write_private(&site.path("hsm-b/user.pin"), "482910375566");
    site.edit("sppd.toml", "[hsm]\n", "[[hsm]]\nname = \"a\"\ncall_timeout = \"4s\"\n");
    let second = "[[hsm]]\nname = \"b\"\nmodule = \"hsm-config/softhsm2.toml\"\ndirectory = \"hsm-b\"\n\
                  pin_file = \"hsm-b/user.pin\"\nkeys = \"keys/keys.toml\"\n\n[store]\n";
    site.edit("sppd.toml", "[store]\n", second);
    site.edit("hsm-config/softhsm2.toml", "[worker]\n", "[worker]\nhang_after = \"6s\"\n");
    site.edit("sppd.toml", "requests_per_second = 100\nburst = 400", "requests_per_second = 100000\nburst = 100000");
    site
}

/// Creates a site with two HSMs and a pool of P-256 pairs.
fn two_hsms_with_pool() -> Site {
    let site = two_hsms();
    add_profile(&site, "pooled", "phone", &[("source = \"generate\"", "source = \"pool\"")]);
    add_pool(&site, "p256", 40, 80);
    site
}

/// Starts a site with two ready HSMs.
async fn two_ready_hsms() -> Site {
    start_and_wait(two_hsms()).await
}

/// Starts a site with two ready HSMs that both have pooled pairs.
async fn two_ready_hsms_with_pairs() -> Site {
    let site = start_and_wait(two_hsms_with_pool()).await;
    wait_for_pools(&site, "pairs on both", |status| status.kinds.iter().any(has_pairs_on_both)).await;
    site
}

async fn start_and_wait(mut site: Site) -> Site {
    site.start();
    wait_for_readiness(&site, [true, true]).await;
    site
}

fn copy_token(site: &Site, from: &str, to: &str) {
    copy_directory(&site.path(from), &site.path(to));
}

/// Sets the fault rules of an HSM.
fn fail(site: &Site, hsm: &str, rules: &str) {
    let control = site.path(hsm).join("faults");
    std::fs::write(control.with_extension("new"), rules).unwrap();
    std::fs::rename(control.with_extension("new"), &control).unwrap();
}

async fn members(site: &Site) -> Vec<HsmMemberStatus> {
    site.status().await.hsm.unwrap().members
}

async fn wait_for_readiness(site: &Site, ready: [bool; 2]) {
    eventually(&format!("the HSMs are {ready:?}"), async || {
        let now: Vec<_> = members(site).await.iter().map(|member| member.ready).collect();
        if now == ready {
            return Ok(());
        }
        let order = phone(NEXT_UNCHECKED_DEVICE.fetch_add(1, Ordering::Relaxed));
        let _ = assemble(&mut site.station().await, &order).await;
        Err(now)
    })
    .await;
}

/// Provisions devices continuously. Any failed call fails the test.
struct ContinuousLoad {
    fab: TestFab,
    next: AtomicU64,
    done: AtomicU64,
    stop: AtomicBool,
}

impl ContinuousLoad {
    fn start(site: &Site, tasks: usize) -> (Arc<Self>, Vec<tokio::task::JoinHandle<()>>) {
        let (next, done) = (AtomicU64::new(1000), AtomicU64::new(0));
        let load = Arc::new(Self { fab: TestFab::new(site), next, done, stop: AtomicBool::new(false) });
        let line = Line::new(reconnecting_channel(site));
        let tasks = (0..tasks).map(|_| tokio::spawn(Arc::clone(&load).work(line.clone()))).collect();
        (load, tasks)
    }

    async fn work(self: Arc<Self>, mut line: Line) {
        while !self.stop.load(Ordering::Relaxed) {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            let order = if n.is_multiple_of(2) { phone(n) } else { pooled(n) };
            let answer = loop {
                match assemble(&mut line, &order).await {
                    Ok(answer) => break answer,
                    // The pool is filled at low priority.
                    Err(status) if Refusal::of(&status).is(Code::ResourceExhausted, "POOL_EMPTY") => {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    Err(status) => panic!("device {n}: {status:?}"),
                }
            };
            let request = install(&mut self.fab.device(n), &answer);
            complete(&mut line, &request).await.unwrap();
            self.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until `count` more devices are complete.
    async fn wait_for_more(&self, count: u64) {
        let wanted = self.done.load(Ordering::Relaxed) + count;
        eventually("the line has made more devices", async || self.done.load(Ordering::Relaxed) >= wanted).await;
    }
}

/// Fault rules, each of which makes an HSM fail.
const LOSSES: [&str; 8] = [
    "* token-removed",
    "C_Sign crash\nC_GenerateKeyPair crash",
    "C_Sign return CKR_DEVICE_ERROR",
    "C_Sign return CKR_ARGUMENTS_BAD",
    "C_Sign flip",
    "C_Sign hang",
    "C_WrapKey hang",
    "C_GenerateKeyPair return CKR_DEVICE_MEMORY",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_or_error_of_one_hsm_fails_no_call() {
    provision_while_each_hsm_fails(&LOSSES[..3]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_answer_or_hang_of_one_hsm_fails_no_call() {
    provision_while_each_hsm_fails(&LOSSES[3..6]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_generation_on_one_hsm_fails_no_call() {
    provision_while_each_hsm_fails(&LOSSES[6..]).await;
}

async fn provision_while_each_hsm_fails(losses: &[&str]) {
    let mut site = two_ready_hsms_with_pairs().await;
    let (load, tasks) = ContinuousLoad::start(&site, 6);
    load.wait_for_more(40).await;
    for rules in losses {
        // Both HSMs in full runs, alternating in short runs.
        let in_turn = rules.len() % 2;
        for lost in scaled(vec![in_turn], vec![0, 1]) {
            let directory = ["hsm", "hsm-b"][lost];
            let before = members(&site).await;
            fail(&site, directory, rules);
            let begun = Instant::now();
            load.wait_for_more(scaled(20, 60)).await;
            println!("{rules:?} at {directory}: the line went on for {:?}", begun.elapsed());
            assert!(site.status().await.ready, "{rules}: one HSM is enough");
            fail(&site, directory, "");
            // The HSM recovers automatically. A hanging worker counts as ready until the hang is detected.
            let fault_ended = Instant::now();
            let mut now = members(&site).await;
            let (starts, answered) = (before[lost].worker_starts, now[lost].calls_answered);
            let has_recovered = |now: &HsmMemberStatus| {
                let replaced = now.worker_starts > starts || !rules.contains("hang");
                replaced && now.ready && now.calls_answered > answered + 20
            };
            while !has_recovered(&now[lost]) {
                assert!(fault_ended.elapsed() < LIMIT, "{rules} at {directory}: {now:?}");
                load.wait_for_more(10).await;
                now = members(&site).await;
            }
        }
    }
    load.stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    let [a, b] = members(&site).await.try_into().unwrap();
    println!(
        "{} devices; {} calls at a, {} at b",
        load.done.load(Ordering::Relaxed),
        a.calls_answered,
        b.calls_answered
    );
    let (least, most) = (a.calls_answered.min(b.calls_answered), a.calls_answered.max(b.calls_answered));
    assert!(least * scaled(20, 4) > most, "the work is shared: {least} and {most}");
    assert!(site.stop().success());
}

fn both_made_pairs(members: &[HsmMemberStatus]) -> bool {
    let made = |member: &HsmMemberStatus| {
        member
            .calls
            .iter()
            .filter(|call| call.operation == "generate_pair" && call.result == "ok")
            .map(|call| call.count)
            .sum::<u64>()
    };
    members.iter().all(|member| made(member) >= 3)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pair_on_lost_hsm_waits_and_is_unchanged() {
    let mut site = two_ready_hsms().await;
    wait_for_pools(&site, "a batch on each", |status| status.session_batches == 2).await;
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let mut answers = Vec::new();
    // A pair may be discarded because the other HSM answered first, so provision at least 20 devices.
    while answers.len() < 20 || !both_made_pairs(&members(&site).await) {
        assert!(answers.len() < 500, "one of them makes no pair: {:?}", members(&site).await);
        answers.push(assemble(&mut line, &phone(answers.len() as u64 + 1)).await.unwrap());
    }
    // The kill clears the cached packages.
    site.kill();
    fail(&site, "hsm", "C_Initialize return CKR_DEVICE_ERROR");
    site.start();
    wait_for_readiness(&site, [false, true]).await;
    let mut line = site.station().await;
    let mut waiting = Vec::new();
    for (n, first) in (1..).zip(&answers) {
        match assemble(&mut line, &phone(n)).await {
            Ok(again) => assert_eq!((&again.certificate, &again.delivery), (&first.certificate, &first.delivery)),
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                waiting.push(n);
            }
        }
    }
    assert!(!waiting.is_empty() && waiting.len() < answers.len(), "some were made on each: {waiting:?}");
    fail(&site, "hsm", "");
    wait_for_readiness(&site, [true, true]).await;
    for n in &waiting {
        let (first, mut device) = (&answers[usize::try_from(*n).unwrap() - 1], fab.device(*n));
        install(&mut device, first);
        let installed = package(&device);
        let request = install(&mut device, &assemble(&mut line, &phone(*n)).await.unwrap());
        assert_eq!(package(&device), installed);
        complete(&mut line, &request).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemon_starts_with_one_hsm_and_adds_the_other() {
    let mut site = two_ready_hsms_with_pairs().await;
    assert!(site.stop().success());
    // Pairs on the failed HSM are not lost, and not offered.
    fail(&site, "hsm", "C_Initialize return CKR_DEVICE_ERROR");
    site.start();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let pools = wait_for_pools(&site, "those of the other one", |status| ready_pairs(status) >= 40).await;
    assert!(pools.kinds.iter().any(|pool| pool.kind == "p256" && pool.ready + pool.unavailable >= 80), "{pools:?}");
    assert_eq!((pools.rolled_back.as_str(), pools.error.as_str()), ("", ""));
    for n in 1..=30 {
        provision(&mut line, &mut fab.device(n), &pooled(n)).await;
    }
    wait_for_pools(&site, "that the other one makes up for it", |status| ready_pairs(status) >= 50).await;
    wait_for_readiness(&site, [false, true]).await;
    let output = site.sppctl(&format!("hsm status {}", officer(&site)));
    assert!(output.contains("HSM       a\nNOT ready") && output.contains("CKR_DEVICE_ERROR"), "{output}");
    fail(&site, "hsm", "");
    wait_for_readiness(&site, [true, true]).await;
    let pools = wait_for_pools(&site, "those of the first one, too", |status| ready_pairs(status) > 80).await;
    assert_eq!((pools.rolled_back.as_str(), pools.error.as_str()), ("", ""));
    let before = members(&site).await[0].calls_answered;
    for n in 101..=140 {
        provision(&mut line, &mut fab.device(n), &pooled(n)).await;
    }
    assert!(members(&site).await[0].calls_answered > before, "the first one has its share again");
    site.sppctl(&format!("pool shred {}", officer(&site)));
}

/// Whether both HSMs have their share of pairs, not only the first one.
fn has_pairs_on_both(pool: &PoolKind) -> bool {
    pool.kind == "p256" && pool.batches == 2 && pool.made_total >= 80 && !pool.filling
}

fn ready_pairs(status: &spp_proto::GetPoolStatusResponse) -> u64 {
    status.kinds.iter().filter(|pool| pool.kind == "p256").map(|pool| pool.ready).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_lost_is_reported_and_one_recovered_suffices() {
    let site = two_ready_hsms().await;
    fail(&site, "hsm", "* token-removed");
    fail(&site, "hsm-b", "* token-removed");
    wait_for_readiness(&site, [false, false]).await;
    let status = site.status().await;
    let error = status.hsm.unwrap().error;
    assert!(!status.ready && error.contains("HSM a: ") && error.contains("HSM b: "), "{error}");
    let refused = assemble(&mut site.station().await, &phone(1)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    fail(&site, "hsm-b", "");
    wait_for_readiness(&site, [false, true]).await;
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    provision(&mut line, &mut fab.device(1), &phone(1)).await;
    // A wrong PIN of one HSM does not affect the other.
    write_private(&site.path("hsm/user.pin"), "000000000000");
    fail(&site, "hsm", "");
    eventually("the wrong PIN is known", async || {
        let [first, _] = members(&site).await.try_into().unwrap();
        if first.error.contains("CKR_PIN_INCORRECT") { Ok(()) } else { Err(first) }
    })
    .await;
    provision(&mut line, &mut fab.device(2), &phone(2)).await;
    let unknown = site.try_sppctl("hsm retry-pin --config sppd.toml --hsm c");
    assert!(
        String::from_utf8_lossy(&unknown.stderr).contains("no HSM c in sppd.toml; configured: a, b"),
        "{unknown:?}"
    );
    let output = site.sppctl("hsm retry-pin --config sppd.toml");
    assert!(output.contains("PIN refused by HSM a"), "{output}");
    write_private(&site.path("hsm/user.pin"), "482910375566");
    wait_for_readiness(&site, [true, true]).await;
}

/// A token that was cloned after batches were created has keys that are shredded on the other token only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batch_on_two_hsms_requires_officer_decision() {
    let mut site = two_ready_hsms_with_pairs().await;
    assert!(site.stop().success());
    copy_token(&site, "hsm/tokens", "hsm-b/tokens");
    site.start();
    let pools = wait_for_pools(&site, "that it is seen", |status| !status.rolled_back.is_empty()).await;
    assert!(pools.rolled_back.contains("is on two HSMs"), "{pools:?}");
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    provision(&mut line, &mut fab.device(1), &phone(1)).await;
    site.sppctl(&format!("pool shred --quarantined {}", officer(&site)));
    assert!(site.stop().success());
    let hsm = handle(&site);
    let mut keys = Vec::new();
    for member in hsm.members() {
        hsm.pinned_to(member).ready(Duration::from_secs(60)).await.unwrap();
        keys.extend(hsm.pinned_to(member).daemon_objects().await.unwrap().keys);
    }
    let log = site.log();
    let shredded: BTreeSet<u64> = log
        .lines()
        .filter(|line| line.contains("batch of key pairs shredded"))
        .filter_map(|line| line.split("batch=").nth(1)?.split(' ').next()?.parse().ok())
        .collect();
    assert!(!shredded.is_empty(), "{log}");
    let left: Vec<_> = keys.iter().filter(|key| shredded.contains(&key.number)).collect();
    assert!(left.is_empty(), "shredded, and on a token still: {left:?}");
}

/// A handle on the HSMs of a site without its daemon.
fn handle(site: &Site) -> Hsm {
    let mut hsms = DaemonConfig::load(&site.path("sppd.toml")).unwrap().hsms;
    hsms.members_mut().iter_mut().for_each(|hsm| hsm.worker_program = program("sppd"));
    Hsm::start(hsms)
}

/// Background calls may take very long. Only tasks that shred or create batches on that HSM wait for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn background_hang_of_one_hsm_does_not_block_other() {
    let site = two_ready_hsms_with_pairs().await;
    let (load, tasks) = ContinuousLoad::start(&site, 6);
    load.wait_for_more(40).await;
    fail(&site, "hsm-b", "C_GenerateKey hang");
    let shredding = Process::spawn(site.command("sppctl", &format!("pool shred {}", officer(&site))));
    let fired = site.path("hsm-b/faults.fired");
    eventually("the HSM hangs", async || fired.exists()).await;
    load.wait_for_more(300).await;
    load.stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    drop(shredding);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fill_order_is_executed_by_working_hsm() {
    let site = two_ready_hsms_with_pairs().await;
    fail(&site, "hsm-b", "C_GenerateKeyPair return CKR_ARGUMENTS_BAD");
    let output = site.sppctl(&format!("pool fill p256 --to 200 {}", officer(&site)));
    assert_eq!(members(&site).await[1].worker_starts, 1, "the other HSM was ready throughout");
    wait_for_pools(&site, "as many as were ordered", |status| ready_pairs(status) >= 200).await;
    // The log has the reason why one HSM paused; the status shows it only while pairs are missing.
    let log = site.log();
    assert!(
        log.lines().any(|line| line.contains("pool filling paused")
            && line.contains("p256")
            && line.contains("CKR_ARGUMENTS_BAD")),
        "{output}: {log}"
    );
}

/// A generation that takes longer than half of the time limit succeeds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_generation_is_awaited() {
    let site = two_ready_hsms().await;
    for directory in ["hsm", "hsm-b"] {
        fail(&site, directory, "C_GenerateKeyPair sleep 2600");
    }
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    for n in 1..=2 {
        provision(&mut line, &mut fab.device(n), &phone(n)).await;
    }
}

/// Batch lookup by the handle without recorded owners.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batch_owner_is_found_and_unavailable_hsm_not_ruled_out() {
    const BATCH: BatchName = BatchName { store: StoreId::from_random([9; 8]), number: 3 };
    let site = two_hsms();
    let hsm = handle(&site);
    let [a, b]: [HsmId; 2] = hsm.members().collect::<Vec<_>>().try_into().unwrap();
    let ready = async |member| hsm.pinned_to(member).ready(Duration::from_secs(60)).await.unwrap();
    ready(a).await;
    ready(b).await;
    hsm.pinned_to(a).create_batch_key(BATCH).await.unwrap();
    let within = Duration::from_secs(5);
    let made = hsm.pinned_to(a).make_pairs(KeyType::P256, PairStorage::Wrapped(BATCH), 1, within).await.unwrap();
    let held = KeyReloadRequest { pair: made.into_iter().next(), derivations: Vec::new() };
    for _ in 0..4 {
        hsm.reload_keys(&held).await.expect("the owner is found, whichever HSM is asked first");
    }
    let elsewhere = hsm.pinned_to(b).reload_keys(&held).await.err();
    assert!(matches!(elsewhere, Some(HsmError::Absent(_))), "{elsewhere:?}");
    fail(&site, "hsm", "* token-removed");
    eventually("HSM a is detected as unavailable", async || {
        let _ = hsm.random(1).await;
        if hsm.ready_members() == [b] { Ok(()) } else { Err(hsm.status()) }
    })
    .await;
    let unavailable = hsm.reload_keys(&held).await.err();
    assert!(
        matches!(&unavailable, Some(HsmError::Unavailable { reason, .. }) if reason.starts_with("HSM a: ")),
        "{unavailable:?}"
    );
    assert!(hsm.destroy_batch_key(BATCH).await.is_err(), "it cannot be known that it is nowhere");
    fail(&site, "hsm", "");
    ready(a).await;
    hsm.destroy_batch_key(BATCH).await.unwrap();
    let destroyed = hsm.reload_keys(&held).await.err();
    assert!(matches!(destroyed, Some(HsmError::Absent(_))), "{destroyed:?}");
}

#[test]
fn invalid_hsm_list_is_reported() {
    let site = two_hsms();
    let check = |what: &str| {
        let output = site.run("sppd", "--config sppd.toml --check");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains(what), "{text}");
        output.status.code()
    };
    let good = String::from_utf8(site.read("sppd.toml")).unwrap();
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        std::fs::write(site.path("sppd.toml"), good.replacen(from, to, 1)).unwrap();
    };
    assert_eq!(check(""), Some(0));
    with("name = \"b\"\n", "");
    assert_eq!(check("hsm 2.name: is required in each of several [[hsm]]"), Some(78));
    with("name = \"b\"\n", "name = \"a\"\n");
    assert_eq!(check("two HSMs are named a"), Some(78));
    with("name = \"b\"\n", "name = \"b\"\nqueue = 5\n");
    assert_eq!(check("hsm b.queue: applies to all HSMs"), Some(78));
    with("directory = \"hsm-b\"", "directory = \"hsm\"");
    assert_eq!(check("are one HSM; change or remove one"), Some(78));
    with("pin_file = \"hsm-b/user.pin\"", "pin = \"typed\"");
    assert_eq!(check("hsm b.pin_file: set pin_file"), Some(78));
    with("name = \"b\"\n", "name = \"b\"\nslot = 3\n");
    assert_eq!(check("unknown field `slot`"), Some(78));
    // A different master key makes it a different HSM.
    let manifest = String::from_utf8(site.read("keys/keys.toml")).unwrap();
    let value = manifest.lines().find(|line| line.starts_with("check_value")).unwrap();
    std::fs::write(site.path("keys/other.toml"), manifest.replace(value, "check_value = \"0011223344556677\""))
        .unwrap();
    with("keys = \"keys/keys.toml\"\n\n[store]", "keys = \"keys/other.toml\"\n\n[store]");
    assert_eq!(check("differ from HSM a: the master key master-1 has another version, PRF or check value"), Some(78));
}
