//! The HSM handle with a real worker process: worker failures do not fail calls and need no manual restart.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use spp::hsm::{
    BatchName, Derivation, DeviceKeyRequest, Hsm, HsmConfig, HsmError, KeyReloadRequest, PairSource, PinAttempts,
    PinSource, StoreId,
};
use spp_format::keys::{KeyType, SignatureAlgorithm};
use spp_testkit::files::write_private;
use spp_testkit::process::{Signal, send};
use spp_testkit::site::Site;
use spp_testkit::wait::{LIMIT, eventually, never};

/// Three times the supervisor's longest restart delay in tests: long enough for an unexpected step to happen.
const SETTLE_TIME: Duration = Duration::from_millis(600);

/// A ready handle with a batch key.
async fn ready_hsm(config: HsmConfig) -> Hsm {
    let hsm = Hsm::start(config);
    hsm.ready(LIMIT).await.unwrap();
    hsm.create_batch_key(BATCH).await.unwrap();
    hsm
}

/// The batch whose key wraps the pairs of these tests.
const BATCH: BatchName = BatchName { store: StoreId::from_random([7; 8]), number: 1 };

fn derivation(number: usize) -> Derivation {
    let identity = format!("serial:{number}").parse().unwrap();
    Derivation::device_key("master-1".parse().unwrap(), "channel", &identity, 32)
}

/// One call of a mixed load. Every answer is checked.
async fn mixed_call(hsm: &Hsm, number: usize) -> Result<(), HsmError> {
    match number % 4 {
        0 => assert_eq!(hsm.random(20).await?.len(), 20),
        1 => {
            let order = || vec![derivation(number), derivation(number + 1)];
            let (first, second) = (hsm.derive(order()).await?, hsm.derive(order()).await?);
            let bytes = |keys: Vec<spp_format::secret::SecretBytes>| {
                keys.iter().map(|k| k.expose().clone()).collect::<Vec<_>>()
            };
            assert_eq!(bytes(first), bytes(second));
        }
        2 => drop(pair(hsm, KeyType::P256, number).await?),
        _ => {
            let made = pair(hsm, KeyType::Ed25519, number).await?;
            let order = KeyReloadRequest {
                pair: Some((made.private.public().clone(), made.stored)),
                derivations: vec![derivation(number)],
            };
            let reloaded = hsm.reload_keys(&order).await?.pair.unwrap();
            assert_eq!(made.private.secrets()[0].expose(), reloaded.secrets()[0].expose());
        }
    }
    Ok(())
}

/// Requests a new pair and verifies that its private key works.
async fn pair(hsm: &Hsm, kind: KeyType, number: usize) -> Result<spp::hsm::DeliveredPair, HsmError> {
    let wrapped = Some(PairSource::Generate(kind, BATCH.key()));
    let order = DeviceKeyRequest { pair: wrapped, derivations: vec![derivation(number)], random: 16 };
    let keys = hsm.device_keys(&order).await?;
    assert_eq!((keys.derived[0].expose().len(), keys.random.len()), (32, 16));
    let pair = keys.pair.unwrap();
    let algorithm = SignatureAlgorithm::default_for(kind);
    let signature = pair.private.sign(algorithm, b"works").unwrap();
    pair.private.public().verify(algorithm, b"works", &signature).unwrap();
    Ok(pair)
}

/// Tasks that call without a pause until they are stopped.
struct Load {
    stop: tokio::sync::watch::Sender<bool>,
    tasks: Vec<tokio::task::JoinHandle<Result<usize, HsmError>>>,
}

impl Load {
    fn start(hsm: &Hsm, tasks: usize) -> Self {
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let one = |number: usize| {
            let (hsm, stopped) = (hsm.clone(), stopped.clone());
            tokio::spawn(async move {
                let mut done = 0;
                while !*stopped.borrow() {
                    mixed_call(&hsm, number + done).await?;
                    done += 1;
                }
                Ok(done)
            })
        };
        Self { stop, tasks: (0..tasks).map(one).collect() }
    }

    /// Stops the tasks and returns the number of calls. Every call must have succeeded.
    async fn stop(self) -> usize {
        self.stop.send(true).unwrap();
        let mut done = 0;
        for task in self.tasks {
            done += task.await.unwrap().unwrap();
        }
        done
    }
}

/// The worker processes of this site. Other tests may run workers at the same time.
fn workers(site: &Site) -> BTreeSet<u32> {
    let site_variable = format!("SOFTHSM2_CONF={}", site.path("hsm/softhsm2.conf").display());
    let is_worker = |pid: &u32| {
        let read = |what: &str| std::fs::read(format!("/proc/{pid}/{what}")).unwrap_or_default();
        let contains = |bytes: Vec<u8>, wanted: &str| bytes.split(|b| *b == 0).any(|word| word == wanted.as_bytes());
        contains(read("cmdline"), "hsm-worker") && contains(read("environ"), &site_variable)
    };
    let processes = std::fs::read_dir("/proc").unwrap();
    let pids = processes.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    pids.filter(is_worker).collect()
}

fn worker(site: &Site) -> u32 {
    let workers = workers(site);
    assert_eq!(workers.len(), 1, "{workers:?}");
    workers.into_iter().next().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_tasks_share_one_worker() {
    let site = Site::new();
    let hsm = ready_hsm(site.hsm_config()).await;
    let tasks = (0..64).map(|number| {
        let hsm = hsm.clone();
        tokio::spawn(async move {
            for round in 0..4 {
                mixed_call(&hsm, number + round).await.unwrap();
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    let status = hsm.status();
    assert!(status.ready && status.error.is_empty());
    assert_eq!((status.members[0].worker_starts, status.calls_in_flight), (1, 0));
    // The key check calls two signing keys and one master key. Each task makes at least one call per round.
    assert!(status.members[0].calls_answered >= 3 + 64 * 4, "{status:?}");
    assert_eq!(status.members[0].token_label, "spp-demo");
    assert_eq!(status.members[0].token_serial.len(), 16);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_worker_fails_no_call() {
    let site = Site::new();
    let hsm = ready_hsm(site.hsm_config()).await;
    let load = Load::start(&hsm, 16);
    for kills in 1..=5 {
        let answered = hsm.status().members[0].calls_answered;
        eventually("calls are answered", async || hsm.status().members[0].calls_answered > answered + 20).await;
        send(worker(&site), Signal::KILL);
        eventually("a new worker is ready", async || {
            let status = hsm.status();
            status.ready && status.members[0].worker_starts > kills
        })
        .await;
    }
    assert!(load.stop().await > 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn worker_at_operation_limit_is_replaced_without_failed_call() {
    let site = Site::new();
    let mut config = site.hsm_config();
    config.module.recycle_after_operations = 100;
    let hsm = ready_hsm(config).await;
    let load = Load::start(&hsm, 16);
    eventually("five workers were started", async || hsm.status().members[0].worker_starts >= 5).await;
    assert!(load.stop().await >= 200, "four workers reached their limit, key checks included");
    eventually("one worker is left", async || workers(&site).len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_queue_refuses_at_once_and_recovers() {
    let site = Site::new();
    let mut config = site.hsm_config();
    config.queue = 4;
    let hsm = ready_hsm(config).await;
    send(worker(&site), Signal::STOP);
    let waiting: Vec<_> = (0..4)
        .map(|_| {
            tokio::spawn({
                let hsm = hsm.clone();
                async move { hsm.random(8).await }
            })
        })
        .collect();
    eventually("four calls wait", async || hsm.status().calls_in_flight == 4).await;
    // The worker is stopped, so the refusal comes from the handle, without waiting.
    assert_eq!(hsm.random(8).await, Err(HsmError::Busy { waiting: 4 }));
    send(worker(&site), Signal::CONT);
    for call in waiting {
        assert_eq!(call.await.unwrap().unwrap().len(), 8);
    }
    hsm.random(8).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn hung_worker_times_out_and_is_replaced() {
    let site = Site::new();
    let mut config = site.hsm_config();
    config.call_timeout = Duration::from_millis(700);
    config.module.hang_after = Duration::from_millis(1500);
    let hsm = ready_hsm(config).await;
    let hung = worker(&site);
    send(hung, Signal::STOP);
    let started = Instant::now();
    assert_eq!(hsm.random(8).await, Err(HsmError::Deadline(Duration::from_millis(700))));
    assert!(started.elapsed() >= Duration::from_millis(700), "{:?}", started.elapsed());
    eventually("a new worker is ready", async || {
        let status = hsm.status();
        status.ready && status.members[0].worker_starts == 2
    })
    .await;
    hsm.random(8).await.unwrap();
    eventually("the hung worker has ended", async || workers(&site).len() == 1).await;
    assert_ne!(worker(&site), hung);
}

#[tokio::test(flavor = "multi_thread")]
async fn worker_ends_when_last_handle_drops() {
    let site = Site::new();
    let hsm = ready_hsm(site.hsm_config()).await;
    let clone = hsm.clone();
    let pid = worker(&site);
    drop(hsm);
    never("the worker ends while a clone exists", SETTLE_TIME, async || worker(&site) != pid).await;
    clone.random(8).await.unwrap();
    drop(clone);
    eventually("no worker", async || workers(&site).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_check_value_prevents_service() {
    let site = Site::new();
    let mut config = site.hsm_config();
    config.keys.master[0].check_value[0] ^= 1;
    config.call_timeout = Duration::from_millis(300);
    let hsm = Hsm::start(config);
    eventually("the status shows the reason", async || hsm.status().error.contains("check value")).await;
    let error = hsm.ready(SETTLE_TIME).await.unwrap_err();
    let HsmError::Unavailable { reason, .. } = &error else { panic!("{error}") };
    assert!(reason.contains("the check value of the master key master-1 differs from the key manifest"), "{reason}");
    assert!(!hsm.status().ready);
    assert_eq!(&hsm.status().error, reason);
    assert!(matches!(hsm.random(8).await, Err(HsmError::Unavailable { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_signing_key_prevents_service() {
    let site = Site::new();
    let mut config = site.hsm_config();
    assert_eq!(config.keys.signing.len(), 2);
    config.keys.signing[0].public_key = config.keys.signing[1].public_key.clone();
    let name = config.keys.signing[0].name.clone();
    let hsm = Hsm::start(config);
    eventually("the status shows the reason", async || hsm.status().error.contains("does not match")).await;
    let error = hsm.ready(SETTLE_TIME).await.unwrap_err().to_string();
    assert!(error.contains(&format!("the key {name} does not match the key manifest")), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_pin_is_tried_once_and_stops_hsm() {
    let site = Site::new();
    write_private(&site.path("hsm/wrong.pin"), "000000");
    let mut config = site.hsm_config();
    config.pin = PinSource::File(site.path("hsm/wrong.pin"));
    let hsm = Hsm::start(config);
    let Err(HsmError::Stopped(reason)) = hsm.ready(LIMIT).await else { panic!("not stopped") };
    assert!(reason.contains("CKR_PIN_INCORRECT") && !reason.contains("000000"), "{reason}");
    never("a second start makes a second attempt", SETTLE_TIME, async || hsm.status().members[0].worker_starts > 1)
        .await;
    assert!(matches!(hsm.random(8).await, Err(HsmError::Stopped(_))));
    eventually("no worker", async || workers(&site).is_empty()).await;

    // No second attempt by another process after a restart.
    let mut config = site.hsm_config();
    config.pin = PinSource::File(site.path("hsm/wrong.pin"));
    drop(hsm);
    let hsm = Hsm::start(config.clone());
    let Err(HsmError::Stopped(recorded)) = hsm.ready(LIMIT).await else { panic!("not stopped") };
    assert_eq!(recorded, reason);
    never("a start makes a second attempt", SETTLE_TIME, async || hsm.status().members[0].worker_starts > 0).await;

    // An officer writes the correct PIN to the file: service resumes without a restart.
    write_private(&site.path("hsm/wrong.pin"), "482910375566");
    eventually("the HSM is ready", async || hsm.status().ready).await;
    hsm.random(8).await.unwrap();
    assert_eq!(hsm.status().members[0].worker_starts, 1);

    // An officer allows one more attempt. The PIN is still wrong, so exactly one attempt is made.
    drop(hsm);
    eventually("no worker", async || workers(&site).is_empty()).await;
    write_private(&site.path("hsm/wrong.pin"), "000000");
    let hsm = Hsm::start(config.clone());
    assert!(matches!(hsm.ready(LIMIT).await, Err(HsmError::Stopped(_))));
    assert_eq!(hsm.status().members[0].worker_starts, 1);
    assert!(PinAttempts::new(config.pin_refused).allow().unwrap().unwrap().contains("CKR_PIN_INCORRECT"));
    eventually("one more attempt is made", async || hsm.status().members[0].worker_starts == 2).await;
    never("there is a third attempt", SETTLE_TIME, async || hsm.status().members[0].worker_starts > 2).await;
    assert!(matches!(hsm.random(8).await, Err(HsmError::Stopped(_))));
}

/// If the refusal cannot be recorded, for example on a full disk, this process does not try the PIN again either.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_pin_is_tried_once_without_writable_record() {
    let site = Site::new();
    write_private(&site.path("hsm/wrong.pin"), "000000");
    let mut config = site.hsm_config();
    config.pin = PinSource::File(site.path("hsm/wrong.pin"));
    config.pin_refused = site.path("no-such-directory/pin-refused.json");
    let hsm = Hsm::start(config);
    assert!(matches!(hsm.ready(LIMIT).await, Err(HsmError::Stopped(_))));
    never("there is a second attempt", SETTLE_TIME, async || hsm.status().members[0].worker_starts > 1).await;
    std::fs::create_dir(site.path("no-such-directory")).unwrap();
    eventually("the refusal is recorded", async || site.path("no-such-directory/pin-refused.json").exists()).await;
    never("there is a second attempt", SETTLE_TIME, async || hsm.status().members[0].worker_starts > 1).await;
}

/// A wrong derived key cannot be detected later, and its device would keep it for life.
#[tokio::test(flavor = "multi_thread")]
async fn bit_flips_never_yield_wrong_key_or_lost_pair() {
    let site = Site::new();
    site.use_faulty_module();
    let hsm = ready_hsm(site.hsm_config()).await;
    let derive =
        async |number| hsm.derive(vec![derivation(number)]).await.map(|mut keys| keys.remove(0).expose().clone());
    let mut expected = Vec::new();
    for number in 0..40 {
        expected.push(derive(number).await.unwrap());
    }
    let starts = hsm.status().members[0].worker_starts;
    site.fail("C_Sign every=23 flip");
    for (number, expected) in expected.iter().enumerate() {
        assert_eq!(derive(number).await.as_ref(), Ok(expected), "{number}");
    }
    assert!(hsm.status().members[0].worker_starts > starts, "the fault did not occur");

    let starts = hsm.status().members[0].worker_starts;
    site.fail("C_WrapKey every=17 flip");
    let mut pairs = Vec::new();
    for number in 0..20 {
        pairs.push(pair(&hsm, KeyType::P256, number).await.unwrap());
    }
    assert!(hsm.status().members[0].worker_starts > starts, "the fault did not occur");
    site.fail("");
    for pair in pairs {
        let order =
            KeyReloadRequest { pair: Some((pair.private.public().clone(), pair.stored)), derivations: Vec::new() };
        let reloaded = hsm.reload_keys(&order).await.expect("the stored pair unwraps").pair.unwrap();
        assert_eq!(reloaded.secrets()[0].expose(), pair.private.secrets()[0].expose());
    }
}

/// Makes an operation fail for the life of the worker, and calls it until the worker is replaced.
async fn call_until_replaced(rules: &str, operation: impl AsyncFn(&Hsm, usize) -> Result<(), HsmError>) {
    let site = Site::new();
    site.use_faulty_module();
    let mut config = site.hsm_config();
    config.call_timeout = Duration::from_secs(2);
    let hsm = ready_hsm(config).await;
    site.fail(rules);
    eventually("the worker is replaced", async || {
        let call = |number| operation(&hsm, number);
        let _ = tokio::join!(call(0), call(1), call(2), call(3), call(4), call(5));
        let status = hsm.status();
        if status.members[0].worker_starts < 2 { Err(status) } else { Ok(()) }
    })
    .await;
    operation(&hsm, 6).await.unwrap();
    assert_eq!(hsm.status().members[0].worker_starts, 2);
}

/// The return value is transient, but the failure persists until the process is replaced.
#[tokio::test(flavor = "multi_thread")]
async fn always_failing_module_is_replaced() {
    let derived = async |hsm: &Hsm, number| hsm.derive(vec![derivation(number)]).await.map(drop);
    call_until_replaced("C_Sign times=1 lasts=1 return CKR_GENERAL_ERROR", derived).await;
}

/// The supervisor's key check passes, but an operation that the line needs fails.
#[tokio::test(flavor = "multi_thread")]
async fn module_with_one_failing_operation_is_replaced() {
    let made = async |hsm: &Hsm, number| pair(hsm, KeyType::P256, number).await.map(drop);
    call_until_replaced("C_GenerateKeyPair times=1 lasts=1 return CKR_DEVICE_MEMORY", made).await;
}

/// Modules close idle sessions; the transport key would end with its session.
#[tokio::test(flavor = "multi_thread")]
async fn idle_sessions_are_kept_alive() {
    let site = Site::new();
    site.use_faulty_module();
    let mut config = site.hsm_config();
    config.module.keep_alive = Duration::from_millis(100);
    site.fail("* idle 1500");
    let hsm = ready_hsm(config).await;
    // A real delay is needed, because idle time causes the fault.
    tokio::time::sleep(Duration::from_secs(4)).await;
    mixed_call(&hsm, 2).await.unwrap();
    // The background sessions have been idle for the whole time.
    for _ in 0..4 {
        let lists =
            tokio::join!(hsm.daemon_objects(), hsm.daemon_objects(), hsm.daemon_objects(), hsm.daemon_objects());
        assert!(lists.0.is_ok() && lists.1.is_ok() && lists.2.is_ok() && lists.3.is_ok());
    }
    // Load uses the sessions of the line threads, but not those of the login and of the transport key.
    let load = Load::start(&hsm, 4);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(load.stop().await > 100);
    let status = hsm.status();
    assert_eq!(status.members[0].worker_starts, 1, "{}", status.error);
    let failed: Vec<_> = status.members[0].calls.iter().filter(|call| call.outcome != "ok").collect();
    assert!(failed.is_empty(), "{failed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn token_loss_on_idle_hsm_is_detected() {
    let site = Site::new();
    let mut config = site.hsm_config();
    config.module.keep_alive = Duration::from_millis(100);
    let hsm = ready_hsm(config).await;
    never("an idle worker is replaced", SETTLE_TIME, async || hsm.status().members[0].worker_starts > 1).await;
    let (present, removed) = (site.path("hsm/tokens"), site.path("hsm/tokens-removed"));
    std::fs::rename(&present, &removed).unwrap();
    eventually("not ready", async || !hsm.status().ready).await;
    std::fs::rename(&removed, &present).unwrap();
    eventually("ready", async || hsm.status().ready).await;
    mixed_call(&hsm, 3).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn returned_token_serves_again() {
    let site = Site::new();
    let mut config = site.hsm_config();
    config.call_timeout = Duration::from_millis(1500);
    let hsm = ready_hsm(config).await;
    let (present, removed) = (site.path("hsm/tokens"), site.path("hsm/tokens-removed"));
    std::fs::rename(&present, &removed).unwrap();
    // Cached keys may still work for a while. A new worker fails in C_Initialize.
    send(worker(&site), Signal::KILL);
    eventually("the token is unavailable", async || hsm.status().error.contains("initialising")).await;
    let error = hsm.random(8).await.unwrap_err();
    assert!(matches!(&error, HsmError::Unavailable { reason, .. } if reason.contains("CKR_GENERAL_ERROR")), "{error}");
    // After this number of starts the restart delay has reached its maximum.
    let starts = hsm.status().members[0].worker_starts;
    eventually("the worker was restarted several times", async || hsm.status().members[0].worker_starts >= starts + 6)
        .await;
    std::fs::rename(&removed, &present).unwrap();
    hsm.ready(LIMIT).await.unwrap();
    mixed_call(&hsm, 3).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn token_loss_under_load_recovers() {
    let site = Site::new();
    let mut config = site.hsm_config();
    config.call_timeout = Duration::from_secs(8);
    let hsm = ready_hsm(config).await;
    let (present, removed) = (site.path("hsm/tokens"), site.path("hsm/tokens-removed"));
    std::fs::rename(&present, &removed).unwrap();
    let load = Load::start(&hsm, 8);
    tokio::time::sleep(Duration::from_millis(500)).await;
    std::fs::rename(&removed, &present).unwrap();
    let answered = hsm.status().members[0].calls_answered;
    eventually("calls are answered", async || hsm.status().members[0].calls_answered > answered + 50).await;
    load.stop().await;
    mixed_call(&hsm, 2).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn destroyed_key_leaves_other_keys_serving() {
    let site = Site::new();
    let hsm = ready_hsm(site.hsm_config()).await;
    pair(&hsm, KeyType::P256, 0).await.unwrap();
    let unknown = hsm.destroy(&"unheard-of".parse().unwrap()).await;
    assert!(matches!(unknown, Err(HsmError::Refused(why)) if why.contains("is not in the key manifest")));
    hsm.destroy(&"access".parse().unwrap()).await.unwrap();
    for number in 0..50 {
        hsm.derive(vec![derivation(number)]).await.unwrap();
    }
    assert_eq!(hsm.status().members[0].worker_starts, 1);
    drop(hsm);
    let hsm = Hsm::start(site.hsm_config());
    eventually("the status shows the reason", async || hsm.status().error.contains("is not on the token")).await;
    let error = hsm.ready(SETTLE_TIME).await.unwrap_err().to_string();
    assert!(error.contains("the key access") && error.contains("is not on the token"), "{error}");
}
