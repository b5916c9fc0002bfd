//! Load generator: stations that provision devices while a test injects faults, and the check that no device was lost.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use der::Decode as _;
use spp_device::Device;
use spp_format::package::TransportCurve;
use spp_proto::{AssembleRequest, AssembleResponse, CompleteRequest, GetRecordRequest, Receipt, SessionState};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::devices::{
    Line, Refusal, TestFab, assemble, assert_inclusion, chip, complete, install, is_retryable, package, phone, sensor,
    state_of, without_proof,
};
use crate::random::scaled;
use crate::site::Site;

/// A channel that reconnects automatically.
pub fn reconnecting_channel(site: &Site) -> Channel {
    let endpoint = Endpoint::from_shared(format!("https://127.0.0.1:{}", site.line)).unwrap();
    let endpoint = endpoint.tls_config(site.tls("tls/line-1-a")).unwrap();
    endpoint.connect_timeout(Duration::from_secs(5)).timeout(Duration::from_secs(30)).connect_lazy()
}

/// A completed device as the station knows it.
pub struct CompletedDevice {
    pub order: AssembleRequest,
    pub answer: AssembleResponse,
    pub receipt: Receipt,
}

/// Provisions devices until it is stopped.
pub struct ProvisioningLoad {
    pub fab: TestFab,
    /// Creates device `n` and its order.
    device_and_order: fn(&TestFab, u64) -> (Device, AssembleRequest),
    next: AtomicU64,
    stop: AtomicBool,
    done: Mutex<BTreeMap<u64, CompletedDevice>>,
    /// Calls that had to be repeated.
    repeats: AtomicU64,
}

/// Minimum number of devices to complete.
pub fn min_devices() -> u64 {
    scaled(50, 400)
}

impl ProvisioningLoad {
    /// Creates a load of phones and sensors.
    pub fn new(site: &Site) -> Arc<Self> {
        Self::of(site, |fab, n| {
            if !n.is_multiple_of(4) {
                return (fab.device(n), phone(n));
            }
            let device = fab.sealing_device(n, TransportCurve::P256);
            let order = sensor(n, &device);
            (device, order)
        })
    }

    pub fn of(site: &Site, device_and_order: fn(&TestFab, u64) -> (Device, AssembleRequest)) -> Arc<Self> {
        Arc::new(Self {
            fab: TestFab::new(site),
            device_and_order,
            next: AtomicU64::new(1),
            stop: AtomicBool::new(false),
            done: Mutex::default(),
            repeats: AtomicU64::new(0),
        })
    }

    /// The number of completed devices.
    pub fn count(&self) -> usize {
        self.done.lock().unwrap().len()
    }

    /// Calls that had to be repeated.
    pub fn repeated(&self) -> u64 {
        self.repeats.load(Ordering::Relaxed)
    }

    /// Takes the completed devices.
    pub fn done(&self) -> BTreeMap<u64, CompletedDevice> {
        std::mem::take(&mut *self.done.lock().unwrap())
    }

    async fn work(self: Arc<Self>, mut line: Line) {
        loop {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            if n > min_devices() && self.stop.load(Ordering::Relaxed) {
                return;
            }
            let done = self.provision_device(&mut line, n).await;
            self.done.lock().unwrap().insert(n, done);
        }
    }

    /// Provisions one device. It gets its package at least twice, and its receipt twice.
    async fn provision_device(&self, line: &mut Line, n: u64) -> CompletedDevice {
        let (mut device, order) = (self.device_and_order)(&self.fab, n);
        let answer = self.assemble_with_retries(line, &order).await.unwrap();
        let mut request = install(&mut device, &answer);
        let installed = package(&device);
        let mut completing = false;
        loop {
            let again = self.assemble_with_retries(line, &order).await;
            match again {
                Ok(again) => {
                    assert_eq!((&again.session_id, &again.certificate), (&answer.session_id, &answer.certificate));
                    request = install(&mut device, &again);
                    assert_eq!(package(&device), installed, "device {n} received two packages");
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
                    let again = self.complete_with_retries(line, &request).await;
                    assert_eq!(again, receipt);
                    return CompletedDevice { order, answer, receipt };
                }
                Err(status) => self.pause_before_retry(&status).await,
            }
        }
    }

    /// Repeats the call as long as the refusal is retryable.
    pub async fn assemble_with_retries(
        &self,
        line: &mut Line,
        order: &AssembleRequest,
    ) -> Result<AssembleResponse, tonic::Status> {
        loop {
            match assemble(line, order).await {
                Err(status) if is_retryable(&status) => self.pause_before_retry(&status).await,
                answer => return answer,
            }
        }
    }

    pub async fn complete_with_retries(&self, line: &mut Line, request: &CompleteRequest) -> Receipt {
        loop {
            match complete(line, request).await {
                Ok(receipt) => return receipt,
                Err(status) => self.pause_before_retry(&status).await,
            }
        }
    }

    async fn pause_before_retry(&self, status: &tonic::Status) {
        assert!(is_retryable(status), "failed for good: {status:?}");
        self.repeats.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

pub fn start_load(load: &Arc<ProvisioningLoad>, line: &Line, tasks: usize) -> Vec<tokio::task::JoinHandle<()>> {
    (0..tasks).map(|_| tokio::spawn(Arc::clone(load).work(line.clone()))).collect()
}

pub async fn stop_load(load: &ProvisioningLoad, tasks: Vec<tokio::task::JoinHandle<()>>) {
    load.stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
}

/// Asserts that everything acknowledged to a station is in the public database exactly once.
pub async fn assert_all_published_once(site: &Site, line: &mut Line, done: &BTreeMap<u64, CompletedDevice>) {
    let mut recovery = site.recovery().await;
    let (mut serials, mut keys, mut indexes) = (HashSet::new(), HashSet::new(), HashSet::new());
    let (mut chips, mut identities) = (HashSet::new(), HashSet::new());
    for (n, CompletedDevice { order, answer, receipt }) in done {
        let known = loop {
            match recovery.get_record(GetRecordRequest { chip_id: order.chip_id.clone() }).await {
                Ok(known) => break known.into_inner(),
                // The daemon limits the request rate per address.
                Err(status) if Refusal::of(&status).is(Code::ResourceExhausted, "RATE_LIMITED") => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(status) => panic!("device {n}: {status}"),
            }
        };
        let record = known.record.unwrap();
        assert_eq!(known.receipt, without_proof(receipt), "device {n}");
        assert_inclusion(site, receipt, &known.record_bytes);
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
