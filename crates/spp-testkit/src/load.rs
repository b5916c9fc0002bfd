//! Load on a line: stations that provision device after device while a test breaks something, and the check that nothing was lost.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use der::Decode as _;
use spp::device::Device;
use spp::package::TransportCurve;
use spp::proto::{AssembleRequest, AssembleResponse, CompleteRequest, GetRecordRequest, Receipt, SessionState};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::floor::{
    Floor, Line, Refusal, assemble, assert_proven, chip, complete, install, may_be_repeated, package, phone, sensor,
    state_of, unproven,
};
use crate::random::scaled;
use crate::site::Site;

/// A client that connects again by itself.
pub fn persistent(site: &Site) -> Channel {
    let endpoint = Endpoint::from_shared(format!("https://127.0.0.1:{}", site.line)).unwrap();
    let endpoint = endpoint.tls_config(site.tls("tls/line-1-a")).unwrap();
    endpoint.connect_timeout(Duration::from_secs(5)).timeout(Duration::from_secs(30)).connect_lazy()
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

/// So many devices go the whole way at least.
pub fn at_least() -> u64 {
    scaled(50, 400)
}

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
            if n > at_least() && self.stop.load(Ordering::Relaxed) {
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
