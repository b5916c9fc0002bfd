//! Crash tests: whichever process is killed at any time, nothing acknowledged is lost and nothing is issued twice.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use spp_proto::SessionState;
use tonic::Code;
use tonic_types::StatusExt as _;

use spp_testkit::devices::{
    Line, Refusal, TestFab, assemble, chip, complete, install, is_retryable, phone, provision, session_of, state_of,
    without_proof,
};
use spp_testkit::load::*;
use spp_testkit::process::{Signal, is_running, send};
use spp_testkit::random::{Random, scaled};
use spp_testkit::site::Site;
use spp_testkit::wait::{eventually, eventually_blocking};

#[tokio::test]
async fn answers_are_identical_before_and_after_kill() {
    let mut site = Site::running();
    let fab = TestFab::new(&site);
    let before = assemble(&mut site.station().await, &phone(1)).await.unwrap();
    site.kill();
    site.start();
    assert_eq!(assemble(&mut site.station().await, &phone(1)).await.unwrap(), before);
    let request = install(&mut fab.device(1), &before);
    site.kill();
    site.start();
    let receipt = complete(&mut site.station().await, &request).await.expect("a kill between the calls costs nothing");
    site.kill();
    site.start();
    let mut line = site.station().await;
    assert_eq!(complete(&mut line, &request).await.unwrap(), receipt);
    assert_eq!(session_of(&mut line, &chip(1)).await.unwrap().receipt, without_proof(&receipt));
    let refused = Refusal::of(&assemble(&mut line, &phone(1)).await.unwrap_err());
    assert!(refused.is(Code::AlreadyExists, "ALREADY_COMPLETE"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeated_kills_lose_nothing_and_issue_nothing_twice() {
    let mut moments = Random::new();
    let mut site = Site::running();
    let load = ProvisioningLoad::new(&site);
    let mut line = Line::new(reconnecting_channel(&site));
    let tasks = start_load(&load, &line, 24);
    for _ in 0..scaled(4, 40) {
        // Any time after the start, so that some kills occur during startup or recovery.
        tokio::time::sleep(Duration::from_millis(40 + moments.below(1200))).await;
        site.kill();
        site.spawn();
    }
    stop_load(&load, tasks).await;
    let done = load.done();
    let repeats = load.repeated();
    println!("{} devices, {repeats} calls repeated", done.len());
    assert!(done.len() as u64 >= min_devices() && repeats > 0);
    assert_all_published_once(&site, &mut line, &done).await;
    site.kill();
    site.start();
    assert_all_published_once(&site, &mut line, &done).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_hsm_worker_is_replaced_without_permanent_failure() {
    let site = Site::running();
    let load = ProvisioningLoad::new(&site);
    let mut line = Line::new(reconnecting_channel(&site));
    let tasks = start_load(&load, &line, 12);
    let mut workers = HashSet::new();
    for round in 1..=3 {
        eventually("devices are made", async || load.count() >= 4 * round).await;
        let worker = worker_other_than(&site, &workers).await;
        send(worker, Signal::KILL);
        workers.insert(worker);
    }
    worker_other_than(&site, &workers).await;
    stop_load(&load, tasks).await;
    let status = site.status().await;
    assert!(status.ready && status.hsm.unwrap().members[0].worker_starts >= 4);
    let done = load.done();
    assert_all_published_once(&site, &mut line, &done).await;
}

#[tokio::test]
async fn worker_killed_during_startup_is_replaced() {
    let site = Site::running();
    let mut known = HashSet::new();
    // Loading, login, key lookup and key checks take about 100 ms in total.
    for moment in [0, 30, 60, 90, 120] {
        let worker = worker_other_than(&site, &known).await;
        tokio::time::sleep(Duration::from_millis(moment)).await;
        send(worker, Signal::KILL);
        known.insert(worker);
    }
    assemble(&mut site.station().await, &phone(1)).await.expect("the call waits for the next worker");
}

/// A module may hang in any call, also before the worker reads its first request. The worker has the PIN, so it must not outlive
/// the daemon.
#[test]
fn worker_hanging_in_module_ends_with_daemon() {
    let mut site = Site::new();
    site.use_faulty_module();
    site.fail("C_Initialize hang");
    site.spawn();
    let worker = eventually_blocking("the worker hangs", || {
        site.path("hsm/faults.fired").exists().then(|| site.worker_pid()).flatten()
    });
    assert!(is_running(worker));
    site.kill();
    eventually_blocking("the worker has ended", || !is_running(worker));
}

/// SoftHSM rewrites a token's file in place at each login; a kill between truncation and write leaves it empty.
#[tokio::test]
async fn interrupted_login_does_not_damage_token() {
    let mut site = Site::running();
    let before = assemble(&mut site.station().await, &phone(1)).await.unwrap();
    let token = std::fs::read_dir(site.path("hsm/tokens")).unwrap().next().unwrap().unwrap().path();
    let cut_off = || std::fs::write(token.join("token.object"), b"").unwrap();
    let worker = site.worker_pid().unwrap();
    cut_off();
    send(worker, Signal::KILL);
    worker_other_than(&site, &HashSet::from([worker])).await;
    site.wait_ready();
    site.kill();
    cut_off();
    site.sppctl("station enroll line-1/z --config sppd.toml --out tls/line-1-z");
    cut_off();
    site.start();
    assert_eq!(assemble(&mut site.station().await, &phone(1)).await.unwrap(), before);
}

async fn worker_other_than(site: &Site, known: &HashSet<u32>) -> u32 {
    eventually("there is a new worker", async || {
        site.worker_pid().filter(|worker| !known.contains(worker)).ok_or_else(|| site.log())
    })
    .await
}

#[tokio::test]
async fn hanging_hsm_worker_times_out_calls_and_is_replaced() {
    let mut site = Site::new();
    site.edit("sppd.toml", "[hsm]\n", "[hsm]\ncall_timeout = \"1s\"\n");
    site.edit("hsm-config/softhsm2.toml", "[worker]\n", "[worker]\nhang_after = \"3s\"\n");
    site.start();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let answer = assemble(&mut line, &phone(1)).await.unwrap();
    let request = install(&mut fab.device(1), &answer);
    let (finished, receipt) = provision(&mut line, &mut fab.device(2), &phone(2)).await;
    let worker = site.worker_pid().unwrap();
    send(worker, Signal::STOP);

    let began = Instant::now();
    let (one, two, mut other) = (phone(3), phone(4), line.clone());
    let (new, at_the_same_time) = tokio::join!(assemble(&mut line, &one), assemble(&mut other, &two));
    let took = began.elapsed();
    for status in [new.unwrap_err(), at_the_same_time.unwrap_err()] {
        assert_eq!(Refusal::of(&status).code, Code::Unavailable, "{status:?}");
        assert!(status.get_error_details().retry_info().is_some_and(|retry| retry.retry_delay.is_some()), "{status:?}");
    }
    assert!((Duration::from_millis(900)..Duration::from_secs(10)).contains(&took), "{took:?}");
    assert_eq!(state_of(&mut line, &chip(1)).await, SessionState::Issued, "what needs no HSM is answered");
    assert_eq!(complete(&mut line, &finished).await.unwrap(), receipt);
    let unsigned = Refusal::of(&complete(&mut line, &request).await.unwrap_err());
    assert_eq!(
        (unsigned.code, &*unsigned.reason),
        (Code::Unavailable, "CHECKPOINT_UNSIGNED"),
        "the HSM signs the log, too"
    );

    let new = eventually("the device is assembled", async || {
        let answer = assemble(&mut line, &phone(3)).await;
        assert!(answer.as_ref().err().is_none_or(is_retryable), "{answer:?}");
        answer
    })
    .await;
    complete(&mut line, &request).await.expect("a refused Complete can be repeated");
    let request = install(&mut fab.device(3), &new);
    complete(&mut line, &request).await.unwrap();
    assert_eq!(site.status().await.hsm.unwrap().members[0].worker_starts, 2);
    assert_ne!(site.worker_pid(), Some(worker));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_drains_calls_and_closes_idle_connections() {
    let mut site = Site::running();
    let load = ProvisioningLoad::new(&site);
    let mut line = Line::new(reconnecting_channel(&site));
    let _idle = site.station().await;
    let tasks = start_load(&load, &line, 8);
    eventually("devices are made", async || load.count() >= 8).await;
    let status = tokio::task::block_in_place(|| site.stop());
    assert!(status.success() && site.log().contains("drained"), "{status}");
    assert!(!site.log().contains("still in flight"), "an idle connection held the drain up");
    site.start();
    stop_load(&load, tasks).await;
    let done = load.done();
    assert_all_published_once(&site, &mut line, &done).await;
}
