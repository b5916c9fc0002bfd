//! The line under load with the faults observed in PKCS#11 modules.
//!
//! No device is lost or fails permanently, no key is delivered twice, no certificate has an invalid signature, and service
//! resumes without intervention.

use std::time::{Duration, Instant};

use spp_testkit::devices::{Line, assemble, phone};
use spp_testkit::load::{ProvisioningLoad, assert_all_published_once, reconnecting_channel, start_load, stop_load};
use spp_testkit::process::{Signal, send};
use spp_testkit::random::scaled;
use spp_testkit::site::Site;
use spp_testkit::wait::{LIMIT, eventually};

/// Duration of each fault in the full-size run. It lasts at least until it has occurred once.
const FAULT_DURATION: Duration = Duration::from_millis(1500);
/// Number of devices processed concurrently.
const TASKS: usize = 6;

/// A description of the fault, and the rules for the faulty module.
type Fault = (&'static str, &'static str);

/// Signatures fail.
const FAILING_SIGNATURES: &[Fault] = &[
    ("some signatures fail: CKR_DEVICE_ERROR", "C_Sign every=7 return CKR_DEVICE_ERROR"),
    ("all signatures fail: CKR_DEVICE_ERROR", "C_Sign return CKR_DEVICE_ERROR"),
    ("all signatures fail: CKR_GENERAL_ERROR", "C_Sign return CKR_GENERAL_ERROR"),
    ("some signatures fail: CKR_FUNCTION_FAILED", "C_Sign every=3 return CKR_FUNCTION_FAILED"),
    ("all signatures are refused: CKR_ARGUMENTS_BAD", "C_Sign return CKR_ARGUMENTS_BAD"),
    ("a vendor's own return value", "C_Sign return 0x80000042"),
];

/// Handles and sessions are lost.
const LOST_HANDLES: &[Fault] = &[
    ("some key handles are invalid", "C_SignInit every=5 return CKR_KEY_HANDLE_INVALID"),
    ("all object handles are invalid", "C_SignInit return CKR_OBJECT_HANDLE_INVALID"),
    ("an operation is left active", "C_SignInit every=4 return CKR_OPERATION_ACTIVE"),
    ("the HSM's memory is full for some calls", "C_GenerateKeyPair every=2 return CKR_DEVICE_MEMORY"),
    ("some sessions are lost", "C_GenerateKeyPair every=3 return CKR_SESSION_HANDLE_INVALID"),
    ("some wrapping handles are invalid", "C_WrapKey every=3 return CKR_WRAPPING_KEY_HANDLE_INVALID"),
    ("a key is destroyed with an error", "C_DestroyObject every=5 return CKR_GENERAL_ERROR"),
    ("the user is logged out for some calls", "C_GenerateRandom every=2 return CKR_USER_NOT_LOGGED_IN"),
];

/// The worker dies, and the next one cannot start at first.
const WORKER_DIES: &[Fault] = &[
    ("no session is left, and the worker dies", "C_OpenSession return CKR_SESSION_COUNT\nC_Sign times=1 crash"),
    ("the login fails, and the worker dies", "C_Login return CKR_FUNCTION_FAILED\nC_Sign times=1 crash"),
    ("the module does not start, and the worker dies", "C_Initialize return CKR_DEVICE_ERROR\nC_Sign times=1 crash"),
    ("the module crashes three times", "C_Sign times=3 crash"),
    ("the module crashes while it starts", "C_Initialize times=3 crash\nC_GenerateKeyPair times=1 crash"),
];

/// Calls hang or are slow.
const HANGS: &[Fault] = &[
    ("one signature hangs", "C_Sign times=1 hang"),
    ("every key pair hangs", "C_GenerateKeyPair hang"),
    ("every signature is slow", "C_Sign sleep 100"),
];

/// The login or the token is lost.
const LOST_LOGIN: &[Fault] = &[
    ("all sessions are dropped", "C_Sign every=60 drop-sessions"),
    ("the user is logged out", "C_Sign every=60 logout"),
    ("the token is removed", "* token-removed"),
];

/// Answers are wrong.
const WRONG_ANSWERS: &[Fault] = &[
    ("some signatures are wrong", "C_Sign every=6 flip"),
    ("all signatures are wrong", "C_Sign flip"),
    ("some signatures are a byte short", "C_Sign every=6 short"),
    ("some wrapped keys are wrong", "C_WrapKey every=3 flip"),
    ("some wrapped keys are a byte short", "C_WrapKey every=3 short"),
    ("some public keys are a byte short", "C_GetAttributeValue every=4 short"),
];

/// A site whose module fails according to the rules in `hsm/faults`.
fn faulty_site() -> Site {
    let site = Site::new();
    site.use_faulty_module();
    site.edit("hsm-config/softhsm2.toml", "[worker]\n", "[worker]\nhang_after = \"2s\"\n");
    site.edit("sppd.toml", "[hsm]\n", "[hsm]\ncall_timeout = \"1s\"\n");
    site.edit("sppd.toml", "requests_per_second = 100\nburst = 400", "requests_per_second = 100000\nburst = 100000");
    site
}

/// No file that the daemon can read contains the user PIN: a person enters it at the HSM for each worker start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pin_entered_at_hsm_is_seen_by_no_process() {
    let mut site = faulty_site();
    let keypad = site.path("keypad");
    std::fs::rename(site.path("hsm/user.pin"), &keypad).unwrap();
    let environment = format!("[environment]\nFAULTY_HSM_KEYPAD = \"{}\"\n", keypad.display());
    site.edit("hsm-config/softhsm2.toml", "[environment]\n", &environment);
    site.edit("sppd.toml", "pin_file = \"hsm/user.pin\"", "pin = \"protected\"");
    site.fail("C_GetTokenInfo keypad\nC_Login keypad\n");
    site.start();
    assemble(&mut site.station().await, &phone(1)).await.unwrap();
    let slots = site.sppctl("hsm slots --profile hsm-config/softhsm2.toml --directory hsm");
    assert!(slots.contains("PIN is entered at the HSM"), "{slots}");
    let worker = site.worker_pid().unwrap();
    send(worker, Signal::KILL);
    let mut line = site.station().await;
    eventually("the next worker logs in through the keypad", async || assemble(&mut line, &phone(2)).await).await;
    assert_ne!(site.worker_pid(), Some(worker));
}

/// Observes when devices complete.
struct CompletionMonitor<'a> {
    load: &'a ProvisioningLoad,
    count: usize,
    last: Instant,
    /// The longest time without a completed device.
    gap: Duration,
}

impl<'a> CompletionMonitor<'a> {
    fn new(load: &'a ProvisioningLoad) -> Self {
        Self { load, count: load.count(), last: Instant::now(), gap: Duration::ZERO }
    }

    async fn poll(&mut self) {
        tokio::time::sleep(Duration::from_millis(5)).await;
        self.gap = self.gap.max(self.last.elapsed());
        let count = self.load.count();
        if count != std::mem::replace(&mut self.count, count) {
            self.last = Instant::now();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn line_survives_failing_signatures() {
    line_survives(FAILING_SIGNATURES).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn line_survives_lost_handles_and_sessions() {
    line_survives(LOST_HANDLES).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn line_survives_workers_that_die_and_do_not_start() {
    line_survives(WORKER_DIES).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn line_survives_calls_that_hang() {
    line_survives(HANGS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn line_survives_a_lost_login_and_token() {
    line_survives(LOST_LOGIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn line_survives_wrong_answers() {
    line_survives(WRONG_ANSWERS).await;
}

/// Applies one fault after the other to the line under load. After each fault, service resumes without intervention.
async fn line_survives(faults: &[Fault]) {
    let mut site = faulty_site();
    site.start();
    let load = ProvisioningLoad::new(&site);
    let mut line = Line::new(reconnecting_channel(&site));
    let tasks = start_load(&load, &line, TASKS);
    println!("{:50} {:>9} {:>9} {:>8} {:>8}", "fault", "outage", "recovery", "repeats", "workers");
    for (name, rules) in faults {
        let repeats = load.repeated();
        let workers = site.status().await.hsm.unwrap().members[0].worker_starts;
        let mut monitor = CompletionMonitor::new(&load);
        let started = Instant::now();
        let fired = site.path("hsm/faults.fired");
        let _ = std::fs::remove_file(&fired);
        site.fail(rules);
        while started.elapsed() < scaled(FAULT_DURATION / 2, FAULT_DURATION) || !fired.exists() {
            monitor.poll().await;
        }
        site.fail("");
        let fault_ended = Instant::now();
        // The devices in progress during the fault, and as many new ones.
        let enough = monitor.count + 2 * TASKS;
        let mut recovery = None;
        while monitor.count < enough {
            assert!(fault_ended.elapsed() < LIMIT, "{name}: no service\n{}", site.log());
            let before = monitor.count;
            monitor.poll().await;
            if monitor.count > before {
                recovery.get_or_insert(fault_ended.elapsed());
            }
        }
        let recovery = recovery.unwrap();
        let hsm = site.status().await.hsm.unwrap();
        let (repeats, workers) = (load.repeated() - repeats, hsm.members[0].worker_starts - workers);
        println!(
            "{name:50} {:>8.2}s {:>8.2}s {repeats:>8} {workers:>8}",
            monitor.gap.as_secs_f64(),
            recovery.as_secs_f64()
        );
    }
    stop_load(&load, tasks).await;
    let done = load.done();
    println!("{} devices, none failed permanently", done.len());
    assert_all_published_once(&site, &mut line, &done).await;
}
