//! A processing point in the test's process: the real rooms, wired as `sppd` wires them, with breakable stores.

pub mod breaking;
pub mod device;
mod pool;

pub use self::pool::assert_pool_is_whole;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use spp::config::DaemonConfig;
use spp::device::SimulatedFab;
use spp::hsm::Hsm;
use spp::keypool::{KeyPool, KindStatus, Marks, PoolPacing, PoolRules};
use spp::keys::KeyKind;
use spp::names::{ChipId, StationName};
use spp::provisioning::{Clock, Policy, Provisioner};
use spp::registry::{HsmSigner, TransparencyLog};
use spp::store::{
    Batch, BatchState, Journal, PublicDatabase as _, PublishedRecord, Purpose, Registry, SecretStore as _,
    SledStateStore, StoreOptions, UniqueKey,
};
use spp::tlog::LogKey;

use self::breaking::{Breaking, BreakingPool, Faults, PoolFaults};
use crate::files::copy_directory;
use crate::process::{Signal, program, send_if_running};
use crate::site::Site;
use crate::wait::eventually;

/// Stores of tests are small, and a full disk is not what is tested here.
pub const SMALL: StoreOptions = StoreOptions { floor_bytes: 1 << 20, reserve_bytes: 0, cache_bytes: 1 << 20 };
const LIFETIME: Duration = Duration::from_secs(3600);

/// A token with its keys and one worker, for many processing points one after the other; and a fab for their devices.
pub struct House {
    site: Site,
    pub hsm: Hsm,
    pub fab: SimulatedFab,
    points: AtomicU32,
}

impl House {
    pub async fn new() -> Self {
        Self::with_call_timeout(Duration::from_secs(30)).await
    }

    pub async fn with_call_timeout(call_timeout: Duration) -> Self {
        let site = Site::new();
        add_pooled_profiles(&site);
        let mut config = DaemonConfig::load(&site.path("sppd.toml")).unwrap().hsms.members()[0].clone();
        config.call_timeout = call_timeout;
        config.worker_program = worker_that_tells_its_pid(&site);
        let manufacturer = config.keys.signing_key(&"manufacturer".parse().unwrap()).unwrap().public_key.clone();
        let fab = SimulatedFab::create(site.path("fab"), manufacturer, None).unwrap();
        let hsm = Hsm::start(config);
        hsm.ready(Duration::from_secs(60)).await.unwrap();
        Self { site, hsm, fab, points: AtomicU32::new(0) }
    }

    /// A processing point with empty stores.
    pub fn point(&self) -> Point<'_> {
        let pools = [(KeyKind::P256, Marks { low: 4, high: 8 })].into();
        self.point_with(PoolRules { pools, ..PoolRules::default() })
    }

    /// The same with other pools.
    pub fn point_with(&self, rules: PoolRules) -> Point<'_> {
        let directory = self.site.path(&format!("point-{}", self.points.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&directory).unwrap();
        let (time, faults, pool_faults) = (Arc::default(), Arc::default(), Arc::default());
        let mut point = Point { house: self, directory, time, faults, pool_faults, rules, running: None };
        let state = SledStateStore::create(&point.state_directory(), &SMALL).unwrap();
        TransparencyLog::create(&point.public_directory(), &SMALL).unwrap();
        let public = point.open_log();
        point.run(state, public);
        point
    }

    /// What `sppd.toml` and the profiles say, as `sppd` reads them.
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

/// The HSM's worker process, whichever it is by then.
pub struct Worker {
    pid_file: PathBuf,
}

impl Worker {
    /// kill -9. One that noticed that its token is gone may have ended by itself.
    pub fn kill(&self) {
        let pid = std::fs::read_to_string(&self.pid_file).unwrap();
        send_if_running(pid.trim().parse().unwrap(), Signal::KILL);
    }
}

/// Profiles that take a P-256 pair from the pool.
fn add_pooled_profiles(site: &Site) {
    let router = std::fs::read_to_string(site.path("profiles/router.toml")).unwrap().replace("ed25519", "p256");
    std::fs::write(site.path("profiles/pooled.toml"), &router).unwrap();
    let either = router.replace("source = \"pool\"", "source = \"pool-or-generate\"");
    std::fs::write(site.path("profiles/pooled-or-made.toml"), either).unwrap();
    site.edit("sppd.toml", "\"router\"]", "\"router\", \"pooled\", \"pooled-or-made\"]");
    site.edit(
        "sppd.toml",
        "[[keypool.pool]]\n",
        "[[keypool.pool]]\nkind = \"p256\"\nlow = 1\nhigh = 1\n[[keypool.pool]]\n",
    );
}

/// The worker that a test can find and kill.
fn worker_that_tells_its_pid(site: &Site) -> PathBuf {
    let (script, pid) = (site.path("worker.sh"), site.path("worker.pid"));
    std::fs::write(
        &script,
        format!("#!/bin/sh\necho $$ > {}\nexec {} \"$@\"\n", pid.display(), program("sppd").display()),
    )
    .unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o700)).unwrap();
    script
}

/// A processing point, running or stopped. What it keeps is in two directories.
pub struct Point<'a> {
    pub house: &'a House,
    directory: PathBuf,
    /// Seconds by which its clock is ahead.
    time: Arc<AtomicU64>,
    pub faults: Arc<Faults>,
    pub pool_faults: Arc<PoolFaults>,
    pub rules: PoolRules,
    running: Option<Running>,
}

struct Running {
    /// The pool's tasks; dropping them is a kill.
    pool: tokio::task::JoinHandle<()>,
    provisioner: Arc<Provisioner>,
    state: Arc<SledStateStore>,
    public: Arc<TransparencyLog>,
}

impl Point<'_> {
    pub fn provisioner(&self) -> &Arc<Provisioner> {
        &self.running().provisioner
    }

    /// The engine behind the door, to look at.
    pub fn state(&self) -> &SledStateStore {
        &self.running().state
    }

    /// The engine behind the door, to look at.
    pub fn public(&self) -> &TransparencyLog {
        &self.running().public
    }

    pub fn state_directory(&self) -> PathBuf {
        self.directory.join("state")
    }

    pub fn public_directory(&self) -> PathBuf {
        self.directory.join("public")
    }

    /// The clock goes on until every session that is open now is over.
    pub fn let_sessions_expire(&self) {
        self.let_pass(LIFETIME + Duration::from_secs(1));
    }

    /// The clock goes on.
    pub fn let_pass(&self, time: Duration) {
        self.time.fetch_add(time.as_secs(), Ordering::Relaxed);
    }

    pub fn pool(&self) -> &Arc<KeyPool> {
        self.provisioner().pool()
    }

    /// How the pool of P-256 pairs stands.
    pub async fn p256(&self) -> KindStatus {
        let status = self.pool().status().await.unwrap();
        status.kinds.into_iter().find(|kind| kind.kind == KeyKind::P256).unwrap()
    }

    /// Waits until so many pairs are ready and no more are being made.
    pub async fn filled(&self, ready: u64) {
        self.until("the pool is filled", async || {
            let status = self.p256().await;
            let batches = self.state().batches().await.unwrap();
            let for_sessions = |b: &Batch| b.purpose == Purpose::Sessions && b.state == BatchState::Open;
            status.ready >= ready && !status.filling && batches.iter().any(for_sessions)
        })
        .await;
    }

    /// Waits until the pool has noticed that the store is an old copy, and has done what it does then.
    pub async fn found_out(&self) {
        self.until("it is found out", async || {
            let status = self.pool().status().await.unwrap();
            status.serving && status.rolled_back.is_some()
        })
        .await;
    }

    /// Waits for what the pool's tasks do by themselves.
    pub async fn until(&self, what: &str, mut done: impl AsyncFnMut() -> bool) {
        eventually(what, async || if done().await { Ok(()) } else { Err(self.pool().status().await) }).await;
    }

    /// The end of a process: everything in memory is gone, the stores are closed.
    pub fn stop(&mut self) {
        let running = self.running.take().expect("it runs");
        assert_eq!(Arc::strong_count(&running.provisioner), 1, "a call still runs");
        running.pool.abort();
        self.faults.disarm();
    }

    /// The start of a process: the stores as they are found on the disk.
    pub fn start(&mut self) {
        let state = SledStateStore::open(&self.state_directory(), &SMALL).unwrap();
        let public = self.open_log();
        self.run(state, public);
    }

    /// A new process that takes up what the old one left, as `sppd` does when it starts.
    pub async fn restart(&mut self) -> spp::provisioning::RecoveryReport {
        self.stop();
        // A worker ends with its daemon; the one of the house goes on, and what it is doing is done.
        eventually("the HSM is idle", async || self.house.hsm.status().members[0].background_calls_in_flight == 0)
            .await;
        self.start();
        self.provisioner().restart().await.unwrap()
    }

    /// A copy of a store's directory, taken while nothing runs.
    pub fn copy(&self, of: &Path, name: &str) -> PathBuf {
        assert!(self.running.is_none(), "stop it first");
        let copy = self.directory.join(name);
        copy_directory(of, &copy);
        copy
    }

    /// Somebody puts an old copy in the place of a store.
    pub fn put_back(&self, copy: &Path, place: &Path) {
        assert!(self.running.is_none(), "stop it first");
        std::fs::remove_dir_all(place).unwrap();
        copy_directory(copy, place);
    }

    /// A copy of the state store as it is now; it goes on.
    pub fn copy_of_state(&mut self, name: &str) -> PathBuf {
        self.stop();
        let copy = self.copy(&self.state_directory(), name);
        self.start();
        copy
    }

    /// Somebody puts the copy back and starts the processing point.
    pub fn put_state_back(&mut self, copy: &Path) {
        self.stop();
        self.put_back(copy, &self.state_directory());
        self.start();
    }

    /// The log, whose checkpoints the house's HSM signs.
    fn open_log(&self) -> TransparencyLog {
        let (directory, hsm) = (self.public_directory(), self.house.hsm.clone());
        let registry = self.house.config().registry;
        let signer = Arc::new(HsmSigner::new(hsm, registry.key.name, registry.key.key));
        tokio::task::block_in_place(|| {
            let opened = TransparencyLog::open(&directory, &SMALL, signer, registry.settings);
            tokio::runtime::Handle::current().block_on(opened).unwrap()
        })
    }

    /// What receipts are verified with.
    pub fn log_key(&self) -> LogKey {
        self.house.config().registry.key.key
    }

    /// The newest record of a chip.
    pub async fn record_of(&self, chip: &ChipId) -> Option<PublishedRecord> {
        self.public().find(&UniqueKey::of_chip(chip)).await.unwrap()
    }

    fn run(&mut self, state: SledStateStore, public: TransparencyLog) {
        let (state, public) = (Arc::new(state), Arc::new(public));
        let faults = &self.faults;
        let journal = Journal::new(Arc::new(Breaking { engine: state.clone(), faults: faults.clone() }));
        let registry = Registry::new(Arc::new(Breaking { engine: public.clone(), faults: faults.clone() }));
        let devices = Policy::new(&self.house.config());
        let hsm = self.house.hsm.clone();
        let ahead = Arc::clone(&self.time);
        let clock = Clock::of(move || 1_800_000_000 + ahead.load(Ordering::Relaxed));
        let secrets = Arc::new(BreakingPool { engine: state.clone(), faults: self.pool_faults.clone() });
        let pacing = PoolPacing { poll_interval: Duration::from_millis(50), pause: Duration::from_millis(50) };
        let (rules, also) = (PoolRules { pacing, ..self.rules.clone() }, (journal.clone(), registry.clone()));
        let pool = KeyPool::new(hsm.clone(), secrets, also.0, also.1, rules, clock.clone());
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
