//! Nothing that was acknowledged is lost and nothing is given twice, whatever is killed when.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use der::Decode as _;
use spp::device::Device;
use spp::package::TransportCurve;
use spp::proto::{AssembleRequest, AssembleResponse, CompleteRequest, GetRecordRequest, Receipt, SessionState};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_types::StatusExt as _;

use crate::floor::{
    Floor, Line, Refusal, assemble, assert_proven, chip, complete, install, may_be_repeated, package, phone, provision,
    sensor, session_of, state_of, unproven,
};
use crate::site::Site;

/// A client that connects again by itself.
pub fn persistent(site: &Site) -> Channel {
    let endpoint = Endpoint::from_shared(format!("https://127.0.0.1:{}", site.line)).unwrap();
    let endpoint = endpoint.tls_config(site.tls("tls/line-1-a")).unwrap();
    endpoint.connect_timeout(Duration::from_secs(5)).timeout(Duration::from_secs(30)).connect_lazy()
}

#[tokio::test]
async fn every_answer_is_the_same_before_and_after_a_kill() {
    let mut site = Site::running();
    let floor = Floor::new(&site);
    let before = assemble(&mut site.station().await, &phone(1)).await.unwrap();
    site.kill();
    site.start();
    assert_eq!(assemble(&mut site.station().await, &phone(1)).await.unwrap(), before);
    let request = install(&mut floor.device(1), &before);
    site.kill();
    site.start();
    let receipt = complete(&mut site.station().await, &request).await.expect("a kill between the calls costs nothing");
    site.kill();
    site.start();
    let mut line = site.station().await;
    assert_eq!(complete(&mut line, &request).await.unwrap(), receipt);
    assert_eq!(session_of(&mut line, &chip(1)).await.unwrap().receipt, unproven(&receipt));
    let refused = Refusal::of(&assemble(&mut line, &phone(1)).await.unwrap_err());
    assert!(refused.is(Code::AlreadyExists, "ALREADY_COMPLETE"), "{refused:?}");
}

/// What a station knows of a device that went the whole way.
pub struct Done {
    pub order: AssembleRequest,
    pub answer: AssembleResponse,
    pub receipt: Receipt,
}

/// Takes devices on until it is told to stop.
pub struct Shift {
    pub floor: Floor,
    /// What device `n` is and orders.
    orders: fn(&Floor, u64) -> (Device, AssembleRequest),
    next: AtomicU64,
    stop: AtomicBool,
    done: Mutex<BTreeMap<u64, Done>>,
    /// Calls that had to be repeated.
    repeats: AtomicU64,
}

pub const AT_LEAST: u64 = 150;

impl Shift {
    /// A shift of phones and sensors.
    pub fn new(site: &Site) -> Arc<Self> {
        Self::of(site, |floor, n| {
            if !n.is_multiple_of(4) {
                return (floor.device(n), phone(n));
            }
            let device = floor.sealing(n, TransportCurve::P256);
            let order = sensor(n, &device);
            (device, order)
        })
    }

    pub fn of(site: &Site, orders: fn(&Floor, u64) -> (Device, AssembleRequest)) -> Arc<Self> {
        Arc::new(Self {
            floor: Floor::new(site),
            orders,
            next: AtomicU64::new(1),
            stop: AtomicBool::new(false),
            done: Mutex::default(),
            repeats: AtomicU64::new(0),
        })
    }

    /// How many devices went the whole way.
    pub fn count(&self) -> usize {
        self.done.lock().unwrap().len()
    }

    /// Calls that had to be repeated.
    pub fn repeated(&self) -> u64 {
        self.repeats.load(Ordering::Relaxed)
    }

    /// The devices that went the whole way.
    pub fn done(&self) -> BTreeMap<u64, Done> {
        std::mem::take(&mut *self.done.lock().unwrap())
    }

    async fn work(self: Arc<Self>, mut line: Line) {
        loop {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            if n > AT_LEAST && self.stop.load(Ordering::Relaxed) {
                return;
            }
            let done = self.one_device(&mut line, n).await;
            self.done.lock().unwrap().insert(n, done);
        }
    }

    /// Each device gets its package at least twice, and its receipt twice.
    async fn one_device(&self, line: &mut Line, n: u64) -> Done {
        let (mut device, order) = (self.orders)(&self.floor, n);
        let answer = self.assembled(line, &order).await.unwrap();
        let mut request = install(&mut device, &answer);
        let installed = package(&device);
        let mut completing = false;
        loop {
            let again = self.assembled(line, &order).await;
            match again {
                Ok(again) => {
                    assert_eq!((&again.session_id, &again.certificate), (&answer.session_id, &answer.certificate));
                    request = install(&mut device, &again);
                    assert_eq!(package(&device), installed, "device {n} was given two packages");
                }
                Err(status) => {
                    let refused = Refusal::of(&status);
                    assert!(
                        completing && refused.is(Code::AlreadyExists, "ALREADY_COMPLETE"),
                        "device {n}: {status:?}"
                    );
                }
            }
            completing = true;
            match complete(line, &request).await {
                Ok(receipt) => {
                    let again = self.completed(line, &request).await;
                    assert_eq!(again, receipt);
                    return Done { order, answer, receipt };
                }
                Err(status) => self.may_go_on(&status).await,
            }
        }
    }

    /// Repeats the call for ever while the refusal allows it.
    pub async fn assembled(&self, line: &mut Line, order: &AssembleRequest) -> Result<AssembleResponse, tonic::Status> {
        loop {
            match assemble(line, order).await {
                Err(status) if may_be_repeated(&status) => self.may_go_on(&status).await,
                answer => return answer,
            }
        }
    }

    pub async fn completed(&self, line: &mut Line, request: &CompleteRequest) -> Receipt {
        loop {
            match complete(line, request).await {
                Ok(receipt) => return receipt,
                Err(status) => self.may_go_on(&status).await,
            }
        }
    }

    async fn may_go_on(&self, status: &tonic::Status) {
        assert!(may_be_repeated(status), "failed for good: {status:?}");
        self.repeats.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

pub fn start_shift(shift: &Arc<Shift>, line: &Line, tasks: usize) -> Vec<tokio::task::JoinHandle<()>> {
    (0..tasks).map(|_| tokio::spawn(Arc::clone(shift).work(line.clone()))).collect()
}

pub async fn end_shift(shift: &Shift, tasks: Vec<tokio::task::JoinHandle<()>>) {
    shift.stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
}

/// Everything that every station was told is in the public database, once.
pub async fn everything_is_public_once(site: &Site, line: &mut Line, done: &BTreeMap<u64, Done>) {
    let mut recovery = site.recovery().await;
    let (mut serials, mut keys, mut indexes) = (HashSet::new(), HashSet::new(), HashSet::new());
    let (mut chips, mut identities) = (HashSet::new(), HashSet::new());
    for (n, Done { order, answer, receipt }) in done {
        let known = loop {
            match recovery.get_record(GetRecordRequest { chip_id: order.chip_id.clone() }).await {
                Ok(known) => break known.into_inner(),
                // One address asks no faster than the daemon allows.
                Err(status) if Refusal::of(&status).is(Code::ResourceExhausted, "TOO_FAST") => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(status) => panic!("device {n}: {status}"),
            }
        };
        let record = known.record.unwrap();
        assert_eq!(known.receipt, unproven(receipt), "device {n}");
        assert_proven(site, receipt, &known.record_bytes);
        assert_eq!((&record.certificate, &record.identity), (&answer.certificate, &order.identity), "device {n}");
        assert_eq!(state_of(line, &chip(*n)).await, SessionState::Erased, "device {n}");
        if order.profile != "sensor" {
            let certificate = x509_cert::Certificate::from_der(&record.certificate).unwrap();
            let tbs = certificate.tbs_certificate();
            assert!(serials.insert(tbs.serial_number().as_bytes().to_vec()), "device {n}");
            let key = tbs.subject_public_key_info().subject_public_key.raw_bytes().to_vec();
            assert!(keys.insert(key), "device {n} has a key pair that another device has");
        }
        assert!(indexes.insert(receipt.record_index) && chips.insert(record.chip_id), "device {n}");
        assert!(identities.insert(record.identity), "device {n}");
    }
    let status = site.status().await;
    let sessions = status.sessions.unwrap();
    let count = done.len() as u64;
    assert_eq!((status.records, sessions.erased), (count, count));
    assert_eq!((sessions.reserved, sessions.issued, sessions.published, sessions.aborted), (0, 0, 0, 0));
}

/// A pseudo-random number below `end` (xorshift64).
pub fn random(state: &mut u64, end: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state % end
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_again_and_again_inside_calls_it_loses_nothing_and_gives_nothing_twice() {
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos() | 1;
    println!("the moments of the kills come from seed {seed}");
    let mut moments = u64::from(seed);
    let mut site = Site::running();
    let shift = Shift::new(&site);
    let mut line = Line::new(persistent(&site));
    let tasks = start_shift(&shift, &line, 24);
    for _ in 0..8 {
        // From the moment of the start on, so that some kills come while it starts or tidies up.
        tokio::time::sleep(Duration::from_millis(40 + random(&mut moments, 1200))).await;
        site.kill();
        site.spawn();
    }
    end_shift(&shift, tasks).await;
    let done = shift.done();
    let repeats = shift.repeated();
    println!("{} devices, {repeats} calls repeated", done.len());
    assert!(done.len() as u64 >= AT_LEAST && repeats > 0);
    everything_is_public_once(&site, &mut line, &done).await;
    site.kill();
    site.start();
    everything_is_public_once(&site, &mut line, &done).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_hsm_worker_is_replaced_and_no_call_fails_for_good() {
    let site = Site::running();
    let shift = Shift::new(&site);
    let mut line = Line::new(persistent(&site));
    let tasks = start_shift(&shift, &line, 12);
    let mut workers = HashSet::new();
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let worker = worker_other_than(&site, &workers).await;
        site.signal(worker, "KILL");
        workers.insert(worker);
    }
    worker_other_than(&site, &workers).await;
    end_shift(&shift, tasks).await;
    let status = site.status().await;
    assert!(status.ready && status.hsm.unwrap().members[0].worker_starts >= 4);
    let done = shift.done();
    everything_is_public_once(&site, &mut line, &done).await;
}

#[tokio::test]
async fn a_worker_that_is_killed_while_it_starts_is_replaced_soon() {
    let site = Site::running();
    let mut known = HashSet::new();
    // Loading, login, look-ups and the check of the keys take some 100 ms together.
    for moment in [0, 30, 60, 90, 120] {
        let worker = worker_other_than(&site, &known).await;
        tokio::time::sleep(Duration::from_millis(moment)).await;
        site.signal(worker, "KILL");
        known.insert(worker);
    }
    assemble(&mut site.station().await, &phone(1)).await.expect("the call waits for the next worker");
}

/// SoftHSM rewrites a token's file in place at each login; a kill between truncation and writing leaves it empty.
#[tokio::test]
async fn a_login_that_was_cut_off_does_not_cost_the_token() {
    let mut site = Site::running();
    let before = assemble(&mut site.station().await, &phone(1)).await.unwrap();
    let token = std::fs::read_dir(site.path("hsm/tokens")).unwrap().next().unwrap().unwrap().path();
    let cut_off = || std::fs::write(token.join("token.object"), b"").unwrap();
    let worker = site.worker_pid().unwrap();
    cut_off();
    site.signal(worker, "KILL");
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
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match site.worker_pid() {
            Some(worker) if !known.contains(&worker) => return worker,
            _ => assert!(Instant::now() < until, "no new worker: {}", site.log()),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_hanging_hsm_worker_costs_calls_their_deadline_and_is_replaced() {
    let mut site = Site::new();
    site.edit("sppd.toml", "[hsm]\n", "[hsm]\ncall_timeout = \"1s\"\n");
    site.edit("hsm-config/softhsm2.toml", "[worker]\n", "[worker]\nhang_after = \"3s\"\n");
    site.start();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let answer = assemble(&mut line, &phone(1)).await.unwrap();
    let request = install(&mut floor.device(1), &answer);
    let (finished, receipt) = provision(&mut line, &mut floor.device(2), &phone(2)).await;
    let worker = site.worker_pid().unwrap();
    site.signal(worker, "STOP");

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

    let until = Instant::now() + Duration::from_secs(20);
    let new = loop {
        match assemble(&mut line, &phone(3)).await {
            Ok(answer) => break answer,
            Err(status) => assert!(may_be_repeated(&status) && Instant::now() < until, "{status:?}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    complete(&mut line, &request).await.expect("a refused Complete can be repeated");
    let request = install(&mut floor.device(3), &new);
    complete(&mut line, &request).await.unwrap();
    assert_eq!(site.status().await.hsm.unwrap().members[0].worker_starts, 2);
    assert_ne!(site.worker_pid(), Some(worker));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_lets_calls_in_flight_end_and_closes_idle_connections() {
    let mut site = Site::running();
    let shift = Shift::new(&site);
    let mut line = Line::new(persistent(&site));
    let _idle = site.station().await;
    let tasks = start_shift(&shift, &line, 8);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let began = Instant::now();
    let status = tokio::task::block_in_place(|| site.stop());
    assert!(status.success() && site.log().contains("drained"), "{status}");
    assert!(began.elapsed() < Duration::from_secs(25), "an idle connection held the drain up: {:?}", began.elapsed());
    site.start();
    end_shift(&shift, tasks).await;
    let done = shift.done();
    everything_is_public_once(&site, &mut line, &done).await;
}
