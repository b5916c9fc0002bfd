//! Killing the daemon at any time: a pooled pair goes to one chip, no pair is lost, and token, store and files stay consistent.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use spp::hsm::{Hsm, KeyReloadRequest, StoredKey};
use spp::store::{BatchPair, KeyStorage, PairCounts, SecretStore as _, SessionReader as _, SledStateStore};
use spp_device::Device;
use spp_format::keys::{KeyType, PublicKey, SignatureAlgorithm};
use spp_proto::{AssembleRequest, AssembleResponse};

use spp_testkit::devices::{Line, TestFab, install, package, phone};
use spp_testkit::load::{
    CompletedDevice, ProvisioningLoad, assert_all_published_once, min_devices, reconnecting_channel, start_load,
    stop_load,
};
use spp_testkit::pools::{
    all_pairs, assemble_with_retries, is_idle, open_store, pooled, pooled_site, public_key, ready_keys, wait_for_pools,
};
use spp_testkit::random::{Random, scaled};
use spp_testkit::site::Site;
use spp_testkit::wait::{LIMIT, eventually};

/// Number of devices and kills, in `make test` and in `make soak`.
const SHORT: (u64, u64) = (800, 3);
const FULL: (u64, u64) = (10_000, 8);
const TASKS: usize = 64;

/// Devices that each take one pair.
struct PairConsumers {
    devices: u64,
    fab: TestFab,
    next: AtomicU64,
    /// Chips by public key of their pair.
    taken: Mutex<BTreeMap<Vec<u8>, u64>>,
    count: AtomicU64,
}

impl PairConsumers {
    async fn work(self: Arc<Self>, mut line: Line) {
        loop {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            if n > self.devices {
                return;
            }
            let answer = assemble_with_retries(&mut line, &pooled(n)).await;
            let other = self.taken.lock().unwrap().insert(public_key(&answer.certificate), n);
            assert_eq!(other, None, "device {n} has the key of another one");
            self.count.fetch_add(1, Ordering::Relaxed);
            if n.is_multiple_of(100) {
                // The package contains the private key of the certificate, and a repeated call returns the same package.
                install(&mut self.fab.device(n), &answer);
                assert_eq!(
                    assemble_with_retries(&mut line, &pooled(n)).await.certificate,
                    answer.certificate,
                    "device {n}"
                );
            }
        }
    }

    async fn wait_until(&self, count: u64) {
        eventually("so many devices were answered", async || {
            let answered = self.count.load(Ordering::Relaxed);
            if answered < count { Err(answered) } else { Ok(()) }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_during_reservations_give_each_pair_to_one_chip() {
    let (devices, kills) = scaled(SHORT, FULL);
    let mut moments = Random::new();
    let (low, high) = scaled((200, 400), (2000, 4000));
    let mut site = pooled_site(low, high);
    site.edit("sppd.toml", "batch_size = 1000", scaled("batch_size = 50", "batch_size = 500"));
    site.edit("sppd.toml", "# open_sessions = 1000", &format!("open_sessions = {devices}"));
    site.start();
    let (begun, line) = (Instant::now(), Line::new(reconnecting_channel(&site)));
    let consumers = Arc::new(PairConsumers {
        devices,
        fab: TestFab::new(&site),
        next: AtomicU64::new(1),
        taken: Mutex::default(),
        count: AtomicU64::new(0),
    });
    let tasks: Vec<_> = (0..TASKS).map(|_| tokio::spawn(Arc::clone(&consumers).work(line.clone()))).collect();
    for kill in 0..kills {
        // At a random moment of this kill's share of the run.
        let share = devices / kills;
        consumers.wait_until(kill * share + moments.below(share)).await;
        tokio::time::sleep(Duration::from_millis(moments.below(50))).await;
        site.kill();
        site.spawn();
    }
    for task in tasks {
        task.await.unwrap();
    }
    println!("{devices} reservations and {kills} kills took {:?}", begun.elapsed());
    site.wait_ready();
    assert!(tokio::task::block_in_place(|| site.stop()).success());
    let taken: BTreeSet<_> = consumers.taken.lock().unwrap().keys().cloned().collect();
    assert_eq!(taken.len() as u64, devices);
    assert_pairs_are_ready_or_reserved(&open_store(&site), &taken).await;
}

async fn assert_pairs_are_ready_or_reserved(store: &SledStateStore, taken: &BTreeSet<Vec<u8>>) {
    let pairs = all_pairs(store).await.into_iter().filter(|pair| kind_of(pair) == KeyType::P256).collect::<Vec<_>>();
    let ready = ready_keys(&pairs);
    let offered = store.ready_pairs(KeyType::P256, None, 1_000_000).await.unwrap();
    assert_eq!(offered.into_iter().map(|(_, pair)| pair.public_key).collect::<BTreeSet<_>>(), ready);
    let sessions: BTreeSet<_> = store.unfinished().await.unwrap().into_iter().filter_map(|s| s.public_key).collect();
    assert_eq!(sessions, *taken, "what was delivered is what sessions have");
    assert!(ready.is_disjoint(taken), "a delivered key is ready again");
    let (made, reserved) = ((ready.len() + taken.len()) as u64, taken.len() as u64);
    println!("{made} pairs were made: {reserved} are taken, {} are ready", ready.len());
    assert_eq!(store.pair_counts(KeyType::P256).await.unwrap(), PairCounts { made, reserved, discarded: 0 });
    assert_eq!(pairs.len() as u64, made);
}

fn kind_of(pair: &BatchPair) -> KeyType {
    PublicKey::from_spki_der(&pair.public_key).unwrap().kind()
}

/// Two of three devices take a pooled pair, the third a generated one.
fn pooled_or_phone(fab: &TestFab, n: u64) -> (Device, AssembleRequest) {
    (fab.device(n), if n.is_multiple_of(3) { phone(n) } else { pooled(n) })
}

/// Devices that are assembled between kills and completed after the last one.
struct AssembledDevices(Vec<(u64, AssembleRequest, AssembleResponse)>);

impl AssembledDevices {
    async fn assemble_one(&mut self, load: &ProvisioningLoad, line: &mut Line) {
        let n = 1_000_000 + self.0.len() as u64;
        let (_, order) = pooled_or_phone(&load.fab, n);
        let answer = load.assemble_with_retries(line, &order).await.unwrap();
        self.0.push((n, order, answer));
    }

    /// Completes the devices. They get the same packages again, also if their pairs were rewrapped.
    async fn complete_all(self, load: &ProvisioningLoad, line: &mut Line, done: &mut BTreeMap<u64, CompletedDevice>) {
        for (n, order, answer) in self.0 {
            let mut device = load.fab.device(n);
            install(&mut device, &answer);
            let before = package(&device);
            let again = load.assemble_with_retries(line, &order).await.unwrap();
            assert_eq!(again.certificate, answer.certificate);
            let request = install(&mut device, &again);
            assert_eq!(package(&device), before, "device {n} was given two packages");
            let receipt = load.complete_with_retries(line, &request).await;
            done.insert(n, CompletedDevice { order, answer, receipt });
        }
    }
}

/// Provisions devices while batches are used up and shredded, and the daemon is killed repeatedly.
async fn provision_with_kills(mut site: Site, storage: KeyStorage, kills: u64) {
    let mut moments = Random::new();
    site.edit("sppd.toml", "batch_size = 1000", "batch_size = 20");
    site.edit("sppd.toml", "shred_after = \"1h\"", "shred_after = \"1s\"");
    site.start();
    let load = ProvisioningLoad::of(&site, pooled_or_phone);
    let mut line = Line::new(reconnecting_channel(&site));
    let tasks = start_load(&load, &line, 16);
    let mut assembled_devices = AssembledDevices(Vec::new());
    for _ in 0..kills {
        assembled_devices.assemble_one(&load, &mut line).await;
        assembled_devices.assemble_one(&load, &mut line).await;
        tokio::time::sleep(Duration::from_millis(40 + moments.below(1500))).await;
        site.kill();
        site.spawn();
    }
    stop_load(&load, tasks).await;
    let mut done = load.done();
    println!("{} devices, {} calls repeated", done.len(), load.repeated());
    assert!(done.len() as u64 >= min_devices());
    let status = wait_for_pools(&site, "everything is shredded", is_idle).await;
    assert!(status.rolled_back.is_empty(), "{status:?}");
    assert!(tokio::task::block_in_place(|| site.stop()).success());
    let pairs = assert_store_and_token_agree(&site, storage).await;
    let delivered: HashSet<_> = done.values().map(|done| public_key(&done.answer.certificate)).collect();
    assert!(
        pairs.iter().all(|pair| !delivered.contains(&pair.public_key)),
        "the pair of a finished device is still here"
    );

    site.start();
    assembled_devices.complete_all(&load, &mut line, &mut done).await;
    assert_all_published_once(&site, &mut line, &done).await;
    wait_for_pools(&site, "these are shredded, too", is_idle).await;
    assert!(tokio::task::block_in_place(|| site.stop()).success());
    assert_store_and_token_agree(&site, storage).await;
}

/// Asserts that token, store and files agree, and that every private key can be unwrapped.
async fn assert_store_and_token_agree(site: &Site, storage: KeyStorage) -> Vec<BatchPair> {
    let store = open_store(site);
    let (id, _) = store.origin().await.unwrap();
    let batches = store.batches().await.unwrap();
    let pairs = all_pairs(&store).await;
    let sessions: BTreeSet<_> = store.unfinished().await.unwrap().into_iter().filter_map(|s| s.public_key).collect();
    let reserved: BTreeSet<_> = pairs.iter().map(|pair| pair.public_key.clone()).collect();
    let reserved: BTreeSet<_> = reserved.difference(&ready_keys(&pairs)).cloned().collect();
    assert_eq!(reserved, sessions, "each unfinished session has its pair, and no other pair is reserved");
    let hsm = Hsm::start(site.hsm_config());
    hsm.ready(LIMIT).await.unwrap();
    let objects = hsm.daemon_objects().await.unwrap();

    let with_key = batches.iter().filter(|batch| batch.storage == KeyStorage::Wrapped).map(|batch| batch.number);
    let on_token: Vec<_> = objects.keys.iter().filter(|key| key.store == id).map(|key| key.number).collect();
    assert_eq!(on_token.len(), objects.keys.len(), "no other store has batch keys here");
    assert_eq!(on_token.iter().copied().collect::<BTreeSet<_>>(), with_key.collect(), "batch keys on the token");
    assert_eq!(on_token.len(), objects.keys.iter().map(|key| key.number).collect::<BTreeSet<_>>().len());

    let referenced: BTreeSet<_> = pairs.iter().filter_map(|pair| token_pair_of(&pair.private_key)).collect();
    let on_token_pairs: BTreeSet<_> = objects.pairs.iter().map(|(_, pair)| pair.clone()).collect();
    assert_eq!(on_token_pairs, referenced, "pairs on the token");
    assert_eq!((on_token_pairs.len(), referenced.is_empty()), (objects.pairs.len(), storage == KeyStorage::Wrapped));

    let known: BTreeSet<_> = batches.iter().map(|batch| batch.number.to_string()).collect();
    for file in std::fs::read_dir(site.path("state/pairs")).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        assert!(known.contains(&name), "pairs/{name} belongs to no batch");
    }
    for pair in &pairs {
        assert_unwrappable(&hsm, pair).await;
    }
    println!("{} pairs in {} batches, {} of sessions", pairs.len(), batches.len(), sessions.len());
    pairs
}

fn token_pair_of(stored_key: &StoredKey) -> Option<spp::hsm::TokenPair> {
    match stored_key {
        StoredKey::OnToken(pair) => Some(pair.clone()),
        StoredKey::Wrapped(_) => None,
    }
}

/// Asserts that the private key matches the public key.
async fn assert_unwrappable(hsm: &Hsm, pair: &BatchPair) {
    let public = PublicKey::from_spki_der(&pair.public_key).unwrap();
    let order = KeyReloadRequest { pair: Some((public.clone(), pair.private_key.clone())), derivations: Vec::new() };
    let held = hsm.reload_keys(&order).await.unwrap_or_else(|e| panic!("the pair of {:?}: {e}", pair.assignment));
    let algorithm = SignatureAlgorithm::default_for(public.kind());
    let signature = held.pair.unwrap().sign(algorithm, b"whose?").unwrap();
    public.verify(algorithm, b"whose?", &signature).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_during_shredding_lose_no_pair_and_leave_no_key() {
    provision_with_kills(pooled_site(40, 80), KeyStorage::Wrapped, scaled(3, 12)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_with_on_token_pairs_leave_no_orphans() {
    let site = pooled_site(30, 60);
    site.edit("sppd.toml", "store = \"wrapped\"", "store = \"hsm\"");
    provision_with_kills(site, KeyStorage::Hsm, scaled(2, 6)).await;
}
