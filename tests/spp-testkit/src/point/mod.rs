//! An in-process processing point: the real modules, connected as in `sppd`, with stores that can fail.

pub mod device;
pub mod faulty_stores;
mod pool;

pub use self::pool::assert_pool_is_consistent;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use spp::config::DaemonConfig;
use spp::hsm::Hsm;
use spp::keypool::{KeyPool, KindStatus, Marks, PoolPacing, PoolRules};
use spp::provisioning::{Clock, Policy, Provisioner};
use spp::registry::{HsmSigner, TransparencyLog};
use spp::store::{
    Batch, BatchState, Journal, LogReader as _, Purpose, Registry, SecretStore as _, SledStateStore, StoreOptions,
};
use spp_device::SimulatedFab;
use spp_format::keys::KeyType;
use spp_format::names::{ChipId, StationName};
use spp_format::record::{PublishedRecord, UniqueKey};
use spp_format::tlog::LogKey;

use self::faulty_stores::{Faults, FaultySecretStore, FaultyStore, PoolFaults};
use crate::files::copy_directory;
use crate::process::{Signal, program, send_if_running};
use crate::site::Site;
use crate::wait::eventually;

/// Small stores without a reserve. A full disk is simulated by [`Faults`].
pub const SMALL: StoreOptions = StoreOptions { floor_bytes: 1 << 20, reserve_bytes: 0, cache_bytes: 1 << 20 };
const LIFETIME: Duration = Duration::from_secs(3600);

/// A token with its keys, one worker, and a fab for the devices. Several processing points use it one after the other.
pub struct TestBed {
    site: Site,
    pub hsm: Hsm,
    pub fab: SimulatedFab,
    points: AtomicU32,
}

impl TestBed {
    pub async fn new() -> Self {
        Self::with_call_timeout(Duration::from_secs(30)).await
    }

    pub async fn with_call_timeout(call_timeout: Duration) -> Self {
        let site = Site::new();
        add_pooled_profiles(&site);
        let mut config = DaemonConfig::load(&site.path("sppd.toml")).unwrap().hsms.members()[0].clone();
        config.call_timeout = call_timeout;
        config.worker_program = worker_with_pid_file(&site);
        let manufacturer = config.keys.signing_key(&"manufacturer".parse().unwrap()).unwrap().public_key.clone();
        let fab = SimulatedFab::create(site.path("fab"), manufacturer, None).unwrap();
        let hsm = Hsm::start(config);
        hsm.ready(Duration::from_secs(60)).await.unwrap();
        Self { site, hsm, fab, points: AtomicU32::new(0) }
    }

    /// A processing point with empty stores.
    pub fn point(&self) -> Point<'_> {
        let pools = [(KeyType::P256, Marks { low: 4, high: 8 })].into();
        self.point_with(PoolRules { pools, ..PoolRules::default() })
    }

    /// Creates a processing point with these pools.
    pub fn point_with(&self, rules: PoolRules) -> Point<'_> {
        let directory = self.site.path(&format!("point-{}", self.points.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&directory).unwrap();
        let (time, faults, pool_faults) = (Arc::default(), Arc::default(), Arc::default());
        let mut point = Point { testbed: self, directory, time, faults, pool_faults, rules, running: None };
        let state = SledStateStore::create(&point.state_directory(), &SMALL).unwrap();
        TransparencyLog::create(&point.public_directory(), &SMALL).unwrap();
        let public = point.open_log();
        point.run(state, public);
        point
    }

    /// The configuration, read as `sppd` reads it.
    fn config(&self) -> DaemonConfig {
        DaemonConfig::load(&self.site.path("sppd.toml")).unwrap()
    }

    pub fn tokens(&self) -> PathBuf {
        self.site.path("hsm/tokens")
    }

    pub fn worker(&self) -> Worker {
        Worker { pid_file: self.site.path("worker.pid") }
    }
}

/// The current HSM worker process.
pub struct Worker {
    pid_file: PathBuf,
}

impl Worker {
    /// Sends SIGKILL. A worker whose token is missing may have ended already.
    pub fn kill(&self) {
        let pid = std::fs::read_to_string(&self.pid_file).unwrap();
        send_if_running(pid.trim().parse().unwrap(), Signal::KILL);
    }
}

/// Adds profiles that take a P-256 pair from the pool.
fn add_pooled_profiles(site: &Site) {
    let router = std::fs::read_to_string(site.path("profiles/router.toml")).unwrap().replace("ed25519", "p256");
    // Products of their own: two with the same constant attributes could give two devices one subject.
    let named = |profile: &str, name: &str| profile.replace("Example Router", name);
    std::fs::write(site.path("profiles/pooled.toml"), named(&router, "Pooled")).unwrap();
    let either = router.replace("source = \"pool\"", "source = \"pool-or-generate\"");
    std::fs::write(site.path("profiles/pooled-or-made.toml"), named(&either, "Pooled or made")).unwrap();
    site.edit("sppd.toml", "\"router\"]", "\"router\", \"pooled\", \"pooled-or-made\"]");
    site.edit(
        "sppd.toml",
        "[[keypool.pool]]\n",
        "[[keypool.pool]]\nkind = \"p256\"\nlow = 1\nhigh = 1\n[[keypool.pool]]\n",
    );
}

/// Creates a worker program that writes its PID to a file, so that a test can kill it.
fn worker_with_pid_file(site: &Site) -> PathBuf {
    let (script, pid) = (site.path("worker.sh"), site.path("worker.pid"));
    std::fs::write(
        &script,
        format!("#!/bin/sh\necho $$ > {}\nexec {} \"$@\"\n", pid.display(), program("sppd").display()),
    )
    .unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o700)).unwrap();
    script
}

/// A processing point, running or stopped. Its data is in two directories.
pub struct Point<'a> {
    pub testbed: &'a TestBed,
    directory: PathBuf,
    /// Offset of its clock in seconds.
    time: Arc<AtomicU64>,
    pub faults: Arc<Faults>,
    pub pool_faults: Arc<PoolFaults>,
    pub rules: PoolRules,
    running: Option<Running>,
}

struct Running {
    /// The pool's tasks. Aborting them simulates a kill.
    pool: tokio::task::JoinHandle<()>,
    provisioner: Arc<Provisioner>,
    state: Arc<SledStateStore>,
    public: Arc<TransparencyLog>,
}

impl Drop for Running {
    /// The pool's tasks hold the stores, whose threads and files would outlive a point that is not stopped.
    fn drop(&mut self) {
        self.pool.abort();
    }
}

impl Point<'_> {
    pub fn provisioner(&self) -> &Arc<Provisioner> {
        &self.running().provisioner
    }

    /// The underlying store, for assertions.
    pub fn state(&self) -> &SledStateStore {
        &self.running().state
    }

    /// The underlying store, for assertions.
    pub fn public(&self) -> &TransparencyLog {
        &self.running().public
    }

    pub fn state_directory(&self) -> PathBuf {
        self.directory.join("state")
    }

    pub fn public_directory(&self) -> PathBuf {
        self.directory.join("public")
    }

    /// Advances the clock until all open sessions are expired.
    pub fn expire_sessions(&self) {
        self.advance_clock(LIFETIME + Duration::from_secs(1));
    }

    /// Advances the clock.
    pub fn advance_clock(&self, time: Duration) {
        self.time.fetch_add(time.as_secs(), Ordering::Relaxed);
    }

    pub fn pool(&self) -> &Arc<KeyPool> {
        self.provisioner().pool()
    }

    /// The status of the P-256 pool.
    pub async fn p256(&self) -> KindStatus {
        let status = self.pool().status().await.unwrap();
        status.kinds.into_iter().find(|kind| kind.kind == KeyType::P256).unwrap()
    }

    /// Waits until at least `ready` pairs are ready and filling has stopped.
    pub async fn wait_until_filled(&self, ready: u64) {
        self.wait_until("the pool is filled", async || {
            let status = self.p256().await;
            let batches = self.state().batches().await.unwrap();
            let for_sessions = |b: &Batch| b.purpose == Purpose::Sessions && b.state == BatchState::Open;
            status.ready >= ready && !status.filling && batches.iter().any(for_sessions)
        })
        .await;
    }

    /// Waits until the pool has detected that the store is an old copy, and has quarantined its batches.
    pub async fn wait_for_rollback_detection(&self) {
        self.wait_until("the rollback is detected", async || {
            let status = self.pool().status().await.unwrap();
            status.serving && status.rolled_back.is_some()
        })
        .await;
    }

    /// Waits for background work of the pool.
    pub async fn wait_until(&self, what: &str, mut done: impl AsyncFnMut() -> bool) {
        eventually(what, async || if done().await { Ok(()) } else { Err(self.pool().status().await) }).await;
    }

    /// Simulates the end of a process: drops all memory state and closes the stores.
    pub fn stop(&mut self) {
        let running = self.running.take().expect("it runs");
        assert_eq!(Arc::strong_count(&running.provisioner), 1, "a call still runs");
        drop(running);
        self.faults.disarm();
    }

    /// Simulates the start of a process: opens the stores from disk.
    pub fn start(&mut self) {
        let state = SledStateStore::open(&self.state_directory(), &SMALL).unwrap();
        let public = self.open_log();
        self.run(state, public);
    }

    /// Simulates a restart, including recovery, as `sppd` does.
    pub async fn restart(&mut self) -> spp::provisioning::RecoveryReport {
        self.stop();
        // A real worker ends with its daemon. The test bed's worker continues, so wait until it is idle.
        eventually("the HSM is idle", async || self.testbed.hsm.status().members[0].background_calls_in_flight == 0)
            .await;
        self.start();
        self.provisioner().resume_sessions().await.unwrap()
    }

    /// Copies a store's directory while the point is stopped.
    pub fn copy(&self, of: &Path, name: &str) -> PathBuf {
        assert!(self.running.is_none(), "stop it first");
        let copy = self.directory.join(name);
        copy_directory(of, &copy);
        copy
    }

    /// Restores an old copy of a store while the point is stopped.
    pub fn restore_copy(&self, copy: &Path, place: &Path) {
        assert!(self.running.is_none(), "stop it first");
        std::fs::remove_dir_all(place).unwrap();
        copy_directory(copy, place);
    }

    /// Copies the state store. Stops and starts the point.
    pub fn copy_state(&mut self, name: &str) -> PathBuf {
        self.stop();
        let copy = self.copy(&self.state_directory(), name);
        self.start();
        copy
    }

    /// Restores a copy of the state store. Stops and starts the point.
    pub fn restore_state(&mut self, copy: &Path) {
        self.stop();
        self.restore_copy(copy, &self.state_directory());
        self.start();
    }

    /// Opens the log. The test bed's HSM signs its checkpoints.
    fn open_log(&self) -> TransparencyLog {
        let (directory, hsm) = (self.public_directory(), self.testbed.hsm.clone());
        let registry = self.testbed.config().registry;
        let signer = Arc::new(HsmSigner::new(&hsm, registry.key));
        tokio::task::block_in_place(|| {
            let opened = TransparencyLog::open(&directory, &SMALL, signer, registry.settings);
            tokio::runtime::Handle::current().block_on(opened).unwrap()
        })
    }

    /// The key that verifies receipts.
    pub fn log_key(&self) -> LogKey {
        self.testbed.config().registry.key.key
    }

    /// The newest record of a chip.
    pub async fn record_of(&self, chip: &ChipId) -> Option<PublishedRecord> {
        self.public().find(&UniqueKey::of_chip(chip)).await.unwrap()
    }

    fn run(&mut self, state: SledStateStore, public: TransparencyLog) {
        let (state, public) = (Arc::new(state), Arc::new(public));
        let faults = &self.faults;
        let journal = Journal::new(Arc::new(FaultyStore { engine: state.clone(), faults: faults.clone() }));
        let registry = Registry::new(Arc::new(FaultyStore { engine: public.clone(), faults: faults.clone() }));
        let devices = Policy::new(&self.testbed.config());
        let hsm = self.testbed.hsm.clone();
        let ahead = Arc::clone(&self.time);
        let clock = Clock::of(move || 1_800_000_000 + ahead.load(Ordering::Relaxed));
        let secrets = Arc::new(FaultySecretStore { engine: state.clone(), faults: self.pool_faults.clone() });
        let pacing = PoolPacing { poll_interval: Duration::from_millis(50), pause: Duration::from_millis(50) };
        let (rules, stores) = (PoolRules { pacing, ..self.rules.clone() }, (journal.clone(), registry.clone()));
        let pool = KeyPool::new(hsm.clone(), secrets, stores.0, stores.1, rules, clock.clone());
        let running = tokio::spawn(Arc::clone(&pool).run());
        let provisioner = Provisioner::new(hsm, journal, registry, pool, state.clone(), devices, LIFETIME);
        let provisioner = Arc::new(provisioner.with_clock(clock));
        self.running = Some(Running { pool: running, provisioner, state, public });
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("it runs")
    }
}

pub fn station() -> StationName {
    "line-1/a".parse().unwrap()
}
