//! Several HSMs with the same keys behind one daemon: the line does not notice that one is lost, whatever is on that one alone waits
//! for it, and it is back by itself.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use spp::config::DaemonConfig;
use spp::hsm::{HeldKeyOrder, Hsm, HsmError, HsmId, KeepIn};
use spp::keys::{BatchName, KeyKind, StoreId};
use spp::proto::{HsmMember as MemberTold, PoolKind};
use tonic::Code;

use spp_testkit::files::{copy_directory, write_private};
use spp_testkit::floor::{Floor, Line, Refusal, assemble, complete, install, package, phone, provision};
use spp_testkit::load::persistent;
use spp_testkit::pools::{add_pool, add_profile, officer, pooled, until_pools};
use spp_testkit::process::{Process, program};
use spp_testkit::random::scaled;
use spp_testkit::site::Site;
use spp_testkit::wait::{LIMIT, eventually};

/// Orders for no device that is looked at: they make work for the HSMs, so that a loss is noticed.
static UNWATCHED: AtomicU64 = AtomicU64::new(1_000_000);

/// A site with two HSMs, `a` and `b`; the second one is a copy of the first one's token after the ceremony. Each fails as its file
/// `faults` says.
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

/// The same with a pool of P-256 pairs.
fn two_hsms_and_a_pool() -> Site {
    let site = two_hsms();
    add_profile(&site, "pooled", "phone", &[("source = \"generate\"", "source = \"pool\"")]);
    add_pool(&site, "p256", 40, 80);
    site
}

/// Two HSMs behind a daemon that serves with both.
async fn with_both() -> Site {
    started(two_hsms()).await
}

/// The same with a pool, and pairs of it on both.
async fn with_pairs_on_both() -> Site {
    let site = started(two_hsms_and_a_pool()).await;
    until_pools(&site, "pairs on both", |status| status.kinds.iter().any(on_both)).await;
    site
}

async fn started(mut site: Site) -> Site {
    site.start();
    until_ready(&site, [true, true]).await;
    site
}

fn copy_token(site: &Site, from: &str, to: &str) {
    copy_directory(&site.path(from), &site.path(to));
}

/// What is wrong with an HSM from now on.
fn fail(site: &Site, hsm: &str, rules: &str) {
    let control = site.path(hsm).join("faults");
    std::fs::write(control.with_extension("new"), rules).unwrap();
    std::fs::rename(control.with_extension("new"), &control).unwrap();
}

async fn members(site: &Site) -> Vec<MemberTold> {
    site.status().await.hsm.unwrap().members
}

async fn until_ready(site: &Site, ready: [bool; 2]) {
    eventually(&format!("the HSMs are {ready:?}"), async || {
        let now: Vec<_> = members(site).await.iter().map(|member| member.ready).collect();
        if now == ready {
            return Ok(());
        }
        let order = phone(UNWATCHED.fetch_add(1, Ordering::Relaxed));
        let _ = assemble(&mut site.station().await, &order).await;
        Err(now)
    })
    .await;
}

/// Devices that go the whole way one after the other, without a single call that fails.
struct Flow {
    floor: Floor,
    next: AtomicU64,
    done: AtomicU64,
    stop: AtomicBool,
}

impl Flow {
    fn start(site: &Site, tasks: usize) -> (Arc<Self>, Vec<tokio::task::JoinHandle<()>>) {
        let (next, done) = (AtomicU64::new(1000), AtomicU64::new(0));
        let flow = Arc::new(Self { floor: Floor::new(site), next, done, stop: AtomicBool::new(false) });
        let line = Line::new(persistent(site));
        let tasks = (0..tasks).map(|_| tokio::spawn(Arc::clone(&flow).work(line.clone()))).collect();
        (flow, tasks)
    }

    async fn work(self: Arc<Self>, mut line: Line) {
        while !self.stop.load(Ordering::Relaxed) {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            let order = if n.is_multiple_of(2) { phone(n) } else { pooled(n) };
            let answer = loop {
                match assemble(&mut line, &order).await {
                    Ok(answer) => break answer,
                    // The pool is filled when nothing else wants the processor.
                    Err(status) if Refusal::of(&status).is(Code::ResourceExhausted, "POOL_EMPTY") => {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    Err(status) => panic!("device {n}: {status:?}"),
                }
            };
            let request = install(&mut self.floor.device(n), &answer);
            complete(&mut line, &request).await.unwrap();
            self.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits for so many more.
    async fn more(&self, count: u64) {
        let wanted = self.done.load(Ordering::Relaxed) + count;
        eventually("the line has made more devices", async || self.done.load(Ordering::Relaxed) >= wanted).await;
    }
}

/// What is said of the HSM while it is lost, and how it is lost.
const LOSSES: [&str; 8] = [
    "* away",
    "C_Sign crash\nC_GenerateKeyPair crash",
    "C_Sign return CKR_DEVICE_ERROR",
    "C_Sign return CKR_ARGUMENTS_BAD",
    "C_Sign flip",
    "C_Sign hang",
    "C_WrapKey hang",
    "C_GenerateKeyPair return CKR_DEVICE_MEMORY",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_hsm_may_die_or_fail_and_no_call_of_the_line_fails() {
    either_hsm_may_be_lost(&LOSSES[..3]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_hsm_may_lie_or_hang_and_no_call_of_the_line_fails() {
    either_hsm_may_be_lost(&LOSSES[3..6]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_hsm_may_stop_making_pairs_and_no_call_of_the_line_fails() {
    either_hsm_may_be_lost(&LOSSES[6..]).await;
}

async fn either_hsm_may_be_lost(losses: &[&str]) {
    let mut site = with_pairs_on_both().await;
    let (flow, tasks) = Flow::start(&site, 6);
    flow.more(40).await;
    for rules in losses {
        // Each of them in the full size, one or the other in turn in the short one.
        let in_turn = rules.len() % 2;
        for lost in scaled(vec![in_turn], vec![0, 1]) {
            let directory = ["hsm", "hsm-b"][lost];
            let before = members(&site).await;
            fail(&site, directory, rules);
            let begun = Instant::now();
            flow.more(scaled(20, 60)).await;
            println!("{rules:?} at {directory}: the line went on for {:?}", begun.elapsed());
            assert!(site.status().await.ready, "{rules}: one HSM is enough");
            fail(&site, directory, "");
            // Back at work, without anybody's help. A worker that hangs is ready until it is known to hang.
            let well = Instant::now();
            let mut now = members(&site).await;
            let (starts, answered) = (before[lost].worker_starts, now[lost].calls_answered);
            let is_back = |now: &MemberTold| {
                let replaced = now.worker_starts > starts || !rules.contains("hang");
                replaced && now.ready && now.calls_answered > answered + 20
            };
            while !is_back(&now[lost]) {
                assert!(well.elapsed() < LIMIT, "{rules} at {directory}: {now:?}");
                flow.more(10).await;
                now = members(&site).await;
            }
        }
    }
    flow.stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    let [a, b] = members(&site).await.try_into().unwrap();
    println!(
        "{} devices; {} calls at a, {} at b",
        flow.done.load(Ordering::Relaxed),
        a.calls_answered,
        b.calls_answered
    );
    let (least, most) = (a.calls_answered.min(b.calls_answered), a.calls_answered.max(b.calls_answered));
    assert!(least * scaled(20, 4) > most, "the work is shared: {least} and {most}");
    assert!(site.stop().success());
}

fn each_made_some(members: &[MemberTold]) -> bool {
    let made = |member: &MemberTold| {
        member
            .calls
            .iter()
            .filter(|call| call.verb == "generate_pair" && call.result == "ok")
            .map(|call| call.count)
            .sum::<u64>()
    };
    members.iter().all(|member| made(member) >= 3)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_that_is_on_a_lost_hsm_alone_waits_for_it_and_comes_out_the_same() {
    let mut site = with_both().await;
    until_pools(&site, "a batch on each", |status| status.session_batches == 2).await;
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let mut answers = Vec::new();
    while !each_made_some(&members(&site).await) {
        assert!(answers.len() < 500, "one of them makes no pair: {:?}", members(&site).await);
        answers.push(assemble(&mut line, &phone(answers.len() as u64 + 1)).await.unwrap());
    }
    // The packages are in the memory of nobody any more.
    site.kill();
    fail(&site, "hsm", "C_Initialize return CKR_DEVICE_ERROR");
    site.start();
    until_ready(&site, [false, true]).await;
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
    until_ready(&site, [true, true]).await;
    for n in &waiting {
        let (first, mut device) = (&answers[usize::try_from(*n).unwrap() - 1], floor.device(*n));
        install(&mut device, first);
        let installed = package(&device);
        let request = install(&mut device, &assemble(&mut line, &phone(*n)).await.unwrap());
        assert_eq!(package(&device), installed);
        complete(&mut line, &request).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_line_starts_with_one_of_them_and_takes_the_other_one_in() {
    let mut site = with_pairs_on_both().await;
    assert!(site.stop().success());
    // The pairs that are on it are not lost, and not offered.
    fail(&site, "hsm", "C_Initialize return CKR_DEVICE_ERROR");
    site.start();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let pools = until_pools(&site, "those of the other one", |status| ready_pairs(status) >= 40).await;
    assert!(pools.kinds.iter().any(|pool| pool.kind == "p256" && pool.ready + pool.away >= 80), "{pools:?}");
    assert_eq!((pools.rolled_back.as_str(), pools.trouble.as_str()), ("", ""));
    for n in 1..=30 {
        provision(&mut line, &mut floor.device(n), &pooled(n)).await;
    }
    until_pools(&site, "that the other one makes up for it", |status| ready_pairs(status) >= 50).await;
    until_ready(&site, [false, true]).await;
    let told = site.sppctl(&format!("hsm status {}", officer(&site)));
    assert!(told.contains("HSM       a\nNOT ready") && told.contains("CKR_DEVICE_ERROR"), "{told}");
    fail(&site, "hsm", "");
    until_ready(&site, [true, true]).await;
    let pools = until_pools(&site, "those of the first one, too", |status| ready_pairs(status) > 80).await;
    assert_eq!((pools.rolled_back.as_str(), pools.trouble.as_str()), ("", ""));
    let before = members(&site).await[0].calls_answered;
    for n in 101..=140 {
        provision(&mut line, &mut floor.device(n), &pooled(n)).await;
    }
    assert!(members(&site).await[0].calls_answered > before, "the first one has its share again");
    site.sppctl(&format!("pool shred {}", officer(&site)));
}

/// Not only the first one's share, before the second one was there.
fn on_both(pool: &PoolKind) -> bool {
    pool.kind == "p256" && pool.batches == 2 && pool.made_total >= 80 && !pool.filling
}

fn ready_pairs(status: &spp::proto::GetPoolStatusResponse) -> u64 {
    status.kinds.iter().filter(|pool| pool.kind == "p256").map(|pool| pool.ready).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_lost_is_said_and_either_one_back_is_enough() {
    let site = with_both().await;
    fail(&site, "hsm", "* away");
    fail(&site, "hsm-b", "* away");
    until_ready(&site, [false, false]).await;
    let status = site.status().await;
    let trouble = status.hsm.unwrap().trouble;
    assert!(!status.ready && trouble.contains("HSM a: ") && trouble.contains("HSM b: "), "{trouble}");
    let refused = assemble(&mut site.station().await, &phone(1)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    fail(&site, "hsm-b", "");
    until_ready(&site, [false, true]).await;
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    provision(&mut line, &mut floor.device(1), &phone(1)).await;
    // A wrong PIN of one is its own affair.
    write_private(&site.path("hsm/user.pin"), "000000000000");
    fail(&site, "hsm", "");
    eventually("the wrong PIN is known", async || {
        let [first, _] = members(&site).await.try_into().unwrap();
        if first.trouble.contains("CKR_PIN_INCORRECT") { Ok(()) } else { Err(first) }
    })
    .await;
    provision(&mut line, &mut floor.device(2), &phone(2)).await;
    let unknown = site.try_sppctl("hsm retry-pin --config sppd.toml --hsm c");
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("it has a, b"), "{unknown:?}");
    let told = site.sppctl("hsm retry-pin --config sppd.toml");
    assert!(told.contains("refused by the HSM a"), "{told}");
    write_private(&site.path("hsm/user.pin"), "482910375566");
    until_ready(&site, [true, true]).await;
}

/// A copy of a token that was made when it had batches already has keys that are shredded on the other one alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_on_two_hsms_is_an_officers_affair() {
    let mut site = with_pairs_on_both().await;
    assert!(site.stop().success());
    copy_token(&site, "hsm/tokens", "hsm-b/tokens");
    site.start();
    let pools = until_pools(&site, "that it is seen", |status| !status.rolled_back.is_empty()).await;
    assert!(pools.rolled_back.contains("is on two HSMs"), "{pools:?}");
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    provision(&mut line, &mut floor.device(1), &phone(1)).await;
    site.sppctl(&format!("pool shred --quarantined {}", officer(&site)));
    assert!(site.stop().success());
    let hsm = handle(&site);
    let mut keys = Vec::new();
    for member in hsm.each() {
        hsm.at(member).ready(Duration::from_secs(60)).await.unwrap();
        keys.extend(hsm.at(member).own_objects().await.unwrap().keys);
    }
    let log = site.log();
    let shredded: BTreeSet<u64> = log
        .lines()
        .filter(|line| line.contains("a batch of key pairs is shredded"))
        .filter_map(|line| line.split("batch=").nth(1)?.split(' ').next()?.parse().ok())
        .collect();
    assert!(!shredded.is_empty(), "{log}");
    let left: Vec<_> = keys.iter().filter(|key| shredded.contains(&key.number)).collect();
    assert!(left.is_empty(), "shredded, and on a token still: {left:?}");
}

/// The HSMs of a site without its daemon.
fn handle(site: &Site) -> Hsm {
    let mut hsms = DaemonConfig::load(&site.path("sppd.toml")).unwrap().hsms;
    hsms.members_mut().iter_mut().for_each(|hsm| hsm.worker_program = program("sppd"));
    Hsm::start(hsms)
}

/// What nobody waits for may take very long; whoever shreds or begins a batch on that HSM waits for it, and nobody else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_hsm_that_hangs_in_the_background_holds_up_nothing_of_the_other() {
    let site = with_pairs_on_both().await;
    let (flow, tasks) = Flow::start(&site, 6);
    flow.more(40).await;
    fail(&site, "hsm-b", "C_GenerateKey hang");
    let shredding = Process::spawn(site.command("sppctl", &format!("pool shred {}", officer(&site))));
    let fired = site.path("hsm-b/faults.fired");
    eventually("the HSM hangs", async || fired.exists()).await;
    flow.more(300).await;
    flow.stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    drop(shredding);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_is_carried_out_by_whoever_can() {
    let site = with_pairs_on_both().await;
    fail(&site, "hsm-b", "C_GenerateKeyPair return CKR_ARGUMENTS_BAD");
    let told = site.sppctl(&format!("pool fill p256 --to 200 {}", officer(&site)));
    assert_eq!(members(&site).await[1].worker_starts, 1, "not because the other one was away for a moment");
    let pools = until_pools(&site, "as many as were ordered", |status| ready_pairs(status) >= 200).await;
    assert!(pools.kinds.iter().any(|pool| pool.paused.contains("CKR_ARGUMENTS_BAD")), "{told}: {pools:?}");
}

/// A pair that takes longer than half of the time is made, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_only_slow_is_waited_for() {
    let site = with_both().await;
    for directory in ["hsm", "hsm-b"] {
        fail(&site, directory, "C_GenerateKeyPair sleep 2600");
    }
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    for n in 1..=2 {
        provision(&mut line, &mut floor.device(n), &phone(n)).await;
    }
}

/// The handle by itself, as long as nothing is on record.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_has_a_batch_is_found_and_who_is_away_is_not_taken_for_one_without_it() {
    const BATCH: BatchName = BatchName { store: StoreId::from_random([9; 8]), number: 3 };
    let site = two_hsms();
    let hsm = handle(&site);
    let [a, b]: [HsmId; 2] = hsm.each().collect::<Vec<_>>().try_into().unwrap();
    let ready = async |member| hsm.at(member).ready(Duration::from_secs(60)).await.unwrap();
    ready(a).await;
    ready(b).await;
    hsm.at(a).create_batch_key(BATCH).await.unwrap();
    let within = Duration::from_secs(5);
    let made = hsm.at(a).make_pairs(KeyKind::P256, KeepIn::Wrapped(BATCH), 1, within).await.unwrap();
    let held = HeldKeyOrder { pair: made.into_iter().next(), derivations: Vec::new() };
    for _ in 0..4 {
        hsm.held_keys(&held).await.expect("whoever is asked first");
    }
    let elsewhere = hsm.at(b).held_keys(&held).await.err();
    assert!(matches!(elsewhere, Some(HsmError::Absent(_))), "{elsewhere:?}");
    fail(&site, "hsm", "* away");
    eventually("HSM a is known to be away", async || {
        let _ = hsm.random(1).await;
        if hsm.ready_members() == [b] { Ok(()) } else { Err(hsm.status()) }
    })
    .await;
    let away = hsm.held_keys(&held).await.err();
    assert!(matches!(&away, Some(HsmError::Unavailable { why, .. }) if why.starts_with("HSM a: ")), "{away:?}");
    assert!(hsm.destroy_batch_key(BATCH).await.is_err(), "it cannot be known that it is nowhere");
    fail(&site, "hsm", "");
    ready(a).await;
    hsm.destroy_batch_key(BATCH).await.unwrap();
    let gone = hsm.held_keys(&held).await.err();
    assert!(matches!(gone, Some(HsmError::Absent(_))), "{gone:?}");
}

#[test]
fn what_is_wrong_with_a_list_of_hsms_is_told() {
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
    assert_eq!(check("hsm 2.name: must be there in each of several [[hsm]]"), Some(78));
    with("name = \"b\"\n", "name = \"a\"\n");
    assert_eq!(check("two HSMs are named a"), Some(78));
    with("name = \"b\"\n", "name = \"b\"\nqueue = 5\n");
    assert_eq!(check("hsm b.queue: holds for all HSMs together"), Some(78));
    with("directory = \"hsm-b\"", "directory = \"hsm\"");
    assert_eq!(check("are one HSM; give each its own"), Some(78));
    with("pin_file = \"hsm-b/user.pin\"", "pin = \"typed\"");
    assert_eq!(check("hsm b.pin_file: give pin_file"), Some(78));
    with("name = \"b\"\n", "name = \"b\"\nslot = 3\n");
    assert_eq!(check("unknown field `slot`"), Some(78));
    // Another master key is another HSM.
    let register = String::from_utf8(site.read("keys/keys.toml")).unwrap();
    let value = register.lines().find(|line| line.starts_with("check_value")).unwrap();
    std::fs::write(site.path("keys/other.toml"), register.replace(value, "check_value = \"0011223344556677\""))
        .unwrap();
    with("keys = \"keys/keys.toml\"\n\n[store]", "keys = \"keys/other.toml\"\n\n[store]");
    assert_eq!(check("has not the keys of a: the master key master-1 is another one"), Some(78));
}
