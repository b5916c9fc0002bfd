//! The handle of the HSM with a real worker process: nothing that happens to the worker costs a call or needs a restart by
//! hand.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use spp::hsm::{Derivation, DeviceKeyOrder, HeldKeyOrder, Hsm, HsmConfig, HsmError, PairOrder, PinAttempts, PinSource};
use spp::keys::{BatchName, KeyKind, SignatureAlgorithm, StoreId};
use spp_testkit::files::write_private;
use spp_testkit::process::{Signal, send};
use spp_testkit::site::Site;
use spp_testkit::wait::{LIMIT, eventually, never};

/// Several times as long as the supervisor of a test's site waits before its next step.
const A_MOMENT: Duration = Duration::from_millis(600);

/// A handle that serves.
async fn serving(config: HsmConfig) -> Hsm {
    let hsm = Hsm::start(config);
    hsm.ready(LIMIT).await.unwrap();
    hsm.create_batch_key(BATCH).await.unwrap();
    hsm
}

/// Under whose key pairs are wrapped here.
const BATCH: BatchName = BatchName { store: StoreId::from_random([7; 8]), number: 1 };

fn derivation(number: usize) -> Derivation {
    let identity = format!("serial:{number}").parse().unwrap();
    Derivation::device_key("master-1".parse().unwrap(), "channel", &identity, 32)
}

/// One task's share of a mixed load; every answer is checked.
async fn mixed(hsm: &Hsm, number: usize) -> Result<(), HsmError> {
    match number % 4 {
        0 => assert_eq!(hsm.random(20).await?.len(), 20),
        1 => {
            let order = || vec![derivation(number), derivation(number + 1)];
            let (first, again) = (hsm.derive(order()).await?, hsm.derive(order()).await?);
            let bytes =
                |keys: Vec<spp::secret::SecretBytes>| keys.iter().map(|k| k.expose().clone()).collect::<Vec<_>>();
            assert_eq!(bytes(first), bytes(again));
        }
        2 => drop(pair(hsm, KeyKind::P256, number).await?),
        _ => {
            let kept = pair(hsm, KeyKind::Ed25519, number).await?;
            let order = HeldKeyOrder {
                pair: Some((kept.private.public().clone(), kept.kept)),
                derivations: vec![derivation(number)],
            };
            let held = hsm.held_keys(&order).await?;
            let (first, again) = (kept.private.secrets()[0].expose().clone(), held.pair.unwrap());
            assert_eq!(&first, again.secrets()[0].expose());
        }
    }
    Ok(())
}

/// A new pair whose private half works.
async fn pair(hsm: &Hsm, kind: KeyKind, number: usize) -> Result<spp::hsm::DeliveredPair, HsmError> {
    let wrapped = Some(PairOrder::Make(kind, BATCH.key()));
    let order = DeviceKeyOrder { pair: wrapped, derivations: vec![derivation(number)], random: 16 };
    let keys = hsm.device_keys(&order).await?;
    assert_eq!((keys.derived[0].expose().len(), keys.random.len()), (32, 16));
    let pair = keys.pair.unwrap();
    let algorithm = SignatureAlgorithm::default_for(kind);
    let signature = pair.private.sign(algorithm, b"works").unwrap();
    pair.private.public().verify(algorithm, b"works", &signature).unwrap();
    Ok(pair)
}

/// Tasks that call without a pause until they are told to stop.
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
                    mixed(&hsm, number + done).await?;
                    done += 1;
                }
                Ok(done)
            })
        };
        Self { stop, tasks: (0..tasks).map(one).collect() }
    }

    /// Calls done; every one of them must have succeeded.
    async fn end(self) -> usize {
        self.stop.send(true).unwrap();
        let mut done = 0;
        for task in self.tasks {
            done += task.await.unwrap().unwrap();
        }
        done
    }
}

/// The worker processes of this site: other tests have workers in this process too.
fn workers(site: &Site) -> BTreeSet<u32> {
    let of_site = format!("SOFTHSM2_CONF={}", site.path("hsm/softhsm2.conf").display());
    let is_worker = |pid: &u32| {
        let read = |what: &str| std::fs::read(format!("/proc/{pid}/{what}")).unwrap_or_default();
        let has = |bytes: Vec<u8>, wanted: &str| bytes.split(|b| *b == 0).any(|word| word == wanted.as_bytes());
        has(read("cmdline"), "hsm-worker") && has(read("environ"), &of_site)
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
async fn sixty_four_tasks_share_the_worker() {
    let site = Site::new();
    let hsm = serving(site.hsm_config()).await;
    let tasks = (0..64).map(|number| {
        let hsm = hsm.clone();
        tokio::spawn(async move {
            for round in 0..4 {
                mixed(&hsm, number + round).await.unwrap();
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    let status = hsm.status();
    assert!(status.ready && status.trouble.is_empty());
    assert_eq!((status.members[0].worker_starts, status.calls_in_flight), (1, 0));
    // Two keys of the register sign and one derives when the worker is checked; a quarter of the tasks calls once.
    assert!(status.members[0].calls_answered >= 3 + 64 * 4, "{status:?}");
    assert_eq!(status.members[0].token_label, "spp-demo");
    assert_eq!(status.members[0].token_serial.len(), 16);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_costs_no_call() {
    let site = Site::new();
    let hsm = serving(site.hsm_config()).await;
    let load = Load::start(&hsm, 16);
    for kills in 1..=5 {
        let answered = hsm.status().members[0].calls_answered;
        eventually("it works", async || hsm.status().members[0].calls_answered > answered + 20).await;
        send(worker(&site), Signal::KILL);
        eventually("there is a new worker", async || {
            let status = hsm.status();
            status.ready && status.members[0].worker_starts > kills
        })
        .await;
    }
    assert!(load.end().await > 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_has_done_its_share_is_replaced_without_a_failed_call() {
    let site = Site::new();
    let mut config = site.hsm_config();
    config.module.recycle_after_operations = 100;
    let hsm = serving(config).await;
    let load = Load::start(&hsm, 16);
    eventually("five workers", async || hsm.status().members[0].worker_starts >= 5).await;
    assert!(load.end().await >= 200, "four workers did their share, of which the supervisor's checks are a part");
    eventually("one is left", async || workers(&site).len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_at_once_and_serves_again() {
    let site = Site::new();
    let mut config = site.hsm_config();
    config.queue = 4;
    let hsm = serving(config).await;
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
    // The four that wait are in nobody's way: the worker stands still, and the answer comes all the same.
    assert_eq!(hsm.random(8).await, Err(HsmError::Busy { waiting: 4 }));
    send(worker(&site), Signal::CONT);
    for call in waiting {
        assert_eq!(call.await.unwrap().unwrap().len(), 8);
    }
    hsm.random(8).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_worker_costs_a_deadline_and_is_replaced() {
    let site = Site::new();
    let mut config = site.hsm_config();
    config.call_timeout = Duration::from_millis(700);
    config.module.hang_after = Duration::from_millis(1500);
    let hsm = serving(config).await;
    let hanging = worker(&site);
    send(hanging, Signal::STOP);
    let asked = Instant::now();
    assert_eq!(hsm.random(8).await, Err(HsmError::Deadline(Duration::from_millis(700))));
    assert!(asked.elapsed() >= Duration::from_millis(700), "{:?}", asked.elapsed());
    eventually("there is a new worker", async || {
        let status = hsm.status();
        status.ready && status.members[0].worker_starts == 2
    })
    .await;
    hsm.random(8).await.unwrap();
    eventually("the old one is dead", async || workers(&site).len() == 1).await;
    assert_ne!(worker(&site), hanging);
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_last_handle_ends_the_worker() {
    let site = Site::new();
    let hsm = serving(site.hsm_config()).await;
    let clone = hsm.clone();
    let pid = worker(&site);
    drop(hsm);
    never("the worker of a clone ends", A_MOMENT, async || worker(&site) != pid).await;
    clone.random(8).await.unwrap();
    drop(clone);
    eventually("no worker", async || workers(&site).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_check_value_keeps_the_hsm_from_serving_and_says_so() {
    let site = Site::new();
    let mut config = site.hsm_config();
    config.keys.master[0].check_value[0] ^= 1;
    config.call_timeout = Duration::from_millis(300);
    let hsm = Hsm::start(config);
    eventually("it says why", async || hsm.status().trouble.contains("check value")).await;
    let error = hsm.ready(A_MOMENT).await.unwrap_err();
    let HsmError::Unavailable { why, .. } = &error else { panic!("{error}") };
    assert!(why.contains("the master key master-1 has another check value than the register"), "{why}");
    assert!(!hsm.status().ready);
    assert_eq!(&hsm.status().trouble, why);
    assert!(matches!(hsm.random(8).await, Err(HsmError::Unavailable { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signing_key_of_another_pair_keeps_the_hsm_from_serving_and_says_so() {
    let site = Site::new();
    let mut config = site.hsm_config();
    assert_eq!(config.keys.signing.len(), 2);
    config.keys.signing[0].public_key = config.keys.signing[1].public_key.clone();
    let name = config.keys.signing[0].name.clone();
    let hsm = Hsm::start(config);
    eventually("it says why", async || hsm.status().trouble.contains("is not the one")).await;
    let why = hsm.ready(A_MOMENT).await.unwrap_err().to_string();
    assert!(why.contains(&format!("the key {name} is not the one of the register")), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_pin_is_tried_once_and_stops_the_hsm() {
    let site = Site::new();
    write_private(&site.path("hsm/wrong.pin"), "000000");
    let mut config = site.hsm_config();
    config.pin = PinSource::File(site.path("hsm/wrong.pin"));
    let hsm = Hsm::start(config);
    let Err(HsmError::Stopped(why)) = hsm.ready(LIMIT).await else { panic!("not stopped") };
    assert!(why.contains("CKR_PIN_INCORRECT") && !why.contains("000000"), "{why}");
    never("a second start makes a second attempt", A_MOMENT, async || hsm.status().members[0].worker_starts > 1).await;
    assert!(matches!(hsm.random(8).await, Err(HsmError::Stopped(_))));
    eventually("no worker", async || workers(&site).is_empty()).await;

    // Nor by another process, after a restart.
    let mut config = site.hsm_config();
    config.pin = PinSource::File(site.path("hsm/wrong.pin"));
    drop(hsm);
    let hsm = Hsm::start(config.clone());
    let Err(HsmError::Stopped(again)) = hsm.ready(LIMIT).await else { panic!("not stopped") };
    assert_eq!(again, why);
    never("a start makes a second attempt", A_MOMENT, async || hsm.status().members[0].worker_starts > 0).await;

    // An officer puts the right one into its file: service goes on without a restart.
    write_private(&site.path("hsm/wrong.pin"), "482910375566");
    eventually("it serves", async || hsm.status().ready).await;
    hsm.random(8).await.unwrap();
    assert_eq!(hsm.status().members[0].worker_starts, 1);

    // Another way: an officer says so. The PIN is still wrong, so one attempt is made, and no more.
    drop(hsm);
    eventually("no worker", async || workers(&site).is_empty()).await;
    write_private(&site.path("hsm/wrong.pin"), "000000");
    let hsm = Hsm::start(config.clone());
    assert!(matches!(hsm.ready(LIMIT).await, Err(HsmError::Stopped(_))));
    assert_eq!(hsm.status().members[0].worker_starts, 1);
    assert!(PinAttempts::new(config.pin_refused).allow().unwrap().unwrap().contains("CKR_PIN_INCORRECT"));
    eventually("one more attempt", async || hsm.status().members[0].worker_starts == 2).await;
    never("there is a third attempt", A_MOMENT, async || hsm.status().members[0].worker_starts > 2).await;
    assert!(matches!(hsm.random(8).await, Err(HsmError::Stopped(_))));
}

/// A full disk, say: what cannot be remembered is not tried again by this process either.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_pin_is_tried_once_even_if_that_cannot_be_written_down() {
    let site = Site::new();
    write_private(&site.path("hsm/wrong.pin"), "000000");
    let mut config = site.hsm_config();
    config.pin = PinSource::File(site.path("hsm/wrong.pin"));
    config.pin_refused = site.path("no-such-directory/pin-refused.json");
    let hsm = Hsm::start(config);
    assert!(matches!(hsm.ready(LIMIT).await, Err(HsmError::Stopped(_))));
    never("there is a second attempt", A_MOMENT, async || hsm.status().members[0].worker_starts > 1).await;
    std::fs::create_dir(site.path("no-such-directory")).unwrap();
    eventually("it is remembered", async || site.path("no-such-directory/pin-refused.json").exists()).await;
    never("there is a second attempt", A_MOMENT, async || hsm.status().members[0].worker_starts > 1).await;
}

/// A wrong key is the one thing that nobody notices: its device has it for life.
#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_sometimes_answers_wrongly_never_gives_a_wrong_key_or_an_unreadable_pair() {
    let site = Site::new();
    site.use_faulty_module();
    let hsm = serving(site.hsm_config()).await;
    let derive =
        async |number| hsm.derive(vec![derivation(number)]).await.map(|mut keys| keys.remove(0).expose().clone());
    let mut right = Vec::new();
    for number in 0..40 {
        right.push(derive(number).await.unwrap());
    }
    let starts = hsm.status().members[0].worker_starts;
    site.fail("C_Sign every=23 flip");
    for (number, right) in right.iter().enumerate() {
        assert_eq!(derive(number).await.as_ref(), Ok(right), "{number}");
    }
    assert!(hsm.status().members[0].worker_starts > starts, "no answer was wrong");

    let starts = hsm.status().members[0].worker_starts;
    site.fail("C_WrapKey every=17 flip");
    let mut pairs = Vec::new();
    for number in 0..20 {
        pairs.push(pair(&hsm, KeyKind::P256, number).await.unwrap());
    }
    assert!(hsm.status().members[0].worker_starts > starts, "no pair was wrapped wrongly");
    site.fail("");
    for pair in pairs {
        let order = HeldKeyOrder { pair: Some((pair.private.public().clone(), pair.kept)), derivations: Vec::new() };
        let held = hsm.held_keys(&order).await.expect("it can be delivered again").pair.unwrap();
        assert_eq!(held.secrets()[0].expose(), pair.private.secrets()[0].expose());
    }
}

/// Fails a verb for as long as the worker lives, and calls until there is another worker.
async fn until_replaced(rules: &str, verb: impl AsyncFn(&Hsm, usize) -> Result<(), HsmError>) {
    let site = Site::new();
    site.use_faulty_module();
    let mut config = site.hsm_config();
    config.call_timeout = Duration::from_secs(2);
    let hsm = serving(config).await;
    site.fail(rules);
    eventually("the worker is replaced", async || {
        let call = |number| verb(&hsm, number);
        let _ = tokio::join!(call(0), call(1), call(2), call(3), call(4), call(5));
        let status = hsm.status();
        if status.members[0].worker_starts < 2 { Err(status) } else { Ok(()) }
    })
    .await;
    verb(&hsm, 6).await.unwrap();
    assert_eq!(hsm.status().members[0].worker_starts, 2);
}

/// It says that it may be tried again, and never gets well: only another process helps.
#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_does_nothing_but_fail_is_replaced() {
    let derived = async |hsm: &Hsm, number| hsm.derive(vec![derivation(number)]).await.map(drop);
    until_replaced("C_Sign times=1 lasts=1 return CKR_GENERAL_ERROR", derived).await;
}

/// What the supervisor looks at works, and what the line needs does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_module_whose_one_verb_does_nothing_but_fail_is_replaced() {
    let made = async |hsm: &Hsm, number| pair(hsm, KeyKind::P256, number).await.map(drop);
    until_replaced("C_GenerateKeyPair times=1 lasts=1 return CKR_DEVICE_MEMORY", made).await;
}

/// Modules end sessions that nobody uses, and with the session of the transport key that key.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_used_before_the_module_ends_them() {
    let site = Site::new();
    site.use_faulty_module();
    let mut config = site.hsm_config();
    config.module.keep_alive = Duration::from_millis(100);
    site.fail("* idle 1500");
    let hsm = serving(config).await;
    // The fault is that time passes, so time has to pass.
    tokio::time::sleep(Duration::from_secs(4)).await;
    mixed(&hsm, 2).await.unwrap();
    // Those of the background have had nothing to do at all.
    for _ in 0..4 {
        let looks = tokio::join!(hsm.own_objects(), hsm.own_objects(), hsm.own_objects(), hsm.own_objects());
        assert!(looks.0.is_ok() && looks.1.is_ok() && looks.2.is_ok() && looks.3.is_ok());
    }
    // A busy line uses the sessions of its threads, and neither the login's nor the transport key's.
    let load = Load::start(&hsm, 4);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(load.end().await > 100);
    let status = hsm.status();
    assert_eq!(status.members[0].worker_starts, 1, "{}", status.trouble);
    let lost: Vec<_> = status.members[0].calls.iter().filter(|call| call.outcome != "ok").collect();
    assert!(lost.is_empty(), "{lost:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_hsm_that_loses_its_token_is_noticed() {
    let site = Site::new();
    let mut config = site.hsm_config();
    config.module.keep_alive = Duration::from_millis(100);
    let hsm = serving(config).await;
    never("an idle worker is replaced", A_MOMENT, async || hsm.status().members[0].worker_starts > 1).await;
    let (there, away) = (site.path("hsm/tokens"), site.path("hsm/tokens-away"));
    std::fs::rename(&there, &away).unwrap();
    eventually("not ready", async || !hsm.status().ready).await;
    std::fs::rename(&away, &there).unwrap();
    eventually("ready", async || hsm.status().ready).await;
    mixed(&hsm, 3).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_went_away_and_came_back_serves_again() {
    let site = Site::new();
    let mut config = site.hsm_config();
    config.call_timeout = Duration::from_millis(1500);
    let hsm = serving(config).await;
    let (there, away) = (site.path("hsm/tokens"), site.path("hsm/tokens-away"));
    std::fs::rename(&there, &away).unwrap();
    // Cached keys may serve a while longer; a new worker does not get past C_Initialize.
    send(worker(&site), Signal::KILL);
    eventually("away", async || hsm.status().trouble.contains("initialising")).await;
    let error = hsm.random(8).await.unwrap_err();
    assert!(matches!(&error, HsmError::Unavailable { why, .. } if why.contains("CKR_GENERAL_ERROR")), "{error}");
    // The wait between two attempts has grown to its longest.
    let starts = hsm.status().members[0].worker_starts;
    eventually("it was tried again and again", async || hsm.status().members[0].worker_starts >= starts + 6).await;
    std::fs::rename(&away, &there).unwrap();
    hsm.ready(LIMIT).await.unwrap();
    mixed(&hsm, 3).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_vanishes_under_a_serving_worker_heals_itself() {
    let site = Site::new();
    let mut config = site.hsm_config();
    config.call_timeout = Duration::from_secs(8);
    let hsm = serving(config).await;
    let (there, away) = (site.path("hsm/tokens"), site.path("hsm/tokens-away"));
    std::fs::rename(&there, &away).unwrap();
    let load = Load::start(&hsm, 8);
    tokio::time::sleep(Duration::from_millis(500)).await;
    std::fs::rename(&away, &there).unwrap();
    let answered = hsm.status().members[0].calls_answered;
    eventually("it works", async || hsm.status().members[0].calls_answered > answered + 50).await;
    load.end().await;
    mixed(&hsm, 2).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destroyed_key_is_gone_and_the_others_serve_on() {
    let site = Site::new();
    let hsm = serving(site.hsm_config()).await;
    pair(&hsm, KeyKind::P256, 0).await.unwrap();
    let unknown = hsm.destroy(&"unheard-of".parse().unwrap()).await;
    assert!(matches!(unknown, Err(HsmError::Refused(why)) if why.contains("not in the register")));
    hsm.destroy(&"access".parse().unwrap()).await.unwrap();
    for number in 0..50 {
        hsm.derive(vec![derivation(number)]).await.unwrap();
    }
    assert_eq!(hsm.status().members[0].worker_starts, 1);
    drop(hsm);
    let hsm = Hsm::start(site.hsm_config());
    eventually("it says why", async || hsm.status().trouble.contains("is not on the token")).await;
    let why = hsm.ready(A_MOMENT).await.unwrap_err().to_string();
    assert!(why.contains("the key access") && why.contains("is not on the token"), "{why}");
}
