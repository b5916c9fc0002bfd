//! However the daemon is killed, a pair of the pool goes to one chip, none is lost, and what is on the token, in the store and
//! in its files belongs together.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use spp::device::Device;
use spp::hsm::{HeldKeyOrder, Hsm};
use spp::keys::{KeyKind, PublicKey, SignatureAlgorithm, StoredKey};
use spp::proto::{AssembleRequest, AssembleResponse};
use spp::store::{HeldPair, KeyStorage, PairCounts, SecretStore as _, SledStateStore, StateStore as _};

use spp_testkit::floor::{Floor, Line, install, package, phone};
use spp_testkit::load::{Done, Shift, at_least, end_shift, everything_is_public_once, persistent, start_shift};
use spp_testkit::pools::{
    all_pairs, answered, is_quiet, open_store, pooled, pooled_site, public_key, ready_keys, until_pools,
};
use spp_testkit::random::{Random, scaled};
use spp_testkit::site::Site;
use spp_testkit::wait::{LIMIT, eventually};

/// Devices and kills, in `make test` and in `make soak`.
const SHORT: (u64, u64) = (800, 3);
const FULL: (u64, u64) = (10_000, 8);
const TASKS: usize = 64;

/// Many chips, each of which takes a pair and keeps it.
struct Takers {
    devices: u64,
    floor: Floor,
    next: AtomicU64,
    /// The chip that has it, by public key.
    taken: Mutex<BTreeMap<Vec<u8>, u64>>,
    count: AtomicU64,
}

impl Takers {
    async fn work(self: Arc<Self>, mut line: Line) {
        loop {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            if n > self.devices {
                return;
            }
            let answer = answered(&mut line, &pooled(n)).await;
            let other = self.taken.lock().unwrap().insert(public_key(&answer.certificate), n);
            assert_eq!(other, None, "device {n} has the key of another one");
            self.count.fetch_add(1, Ordering::Relaxed);
            if n.is_multiple_of(100) {
                // The device finds the private key to its certificate in the package; and a repeat gets the same one.
                install(&mut self.floor.device(n), &answer);
                assert_eq!(answered(&mut line, &pooled(n)).await.certificate, answer.certificate, "device {n}");
            }
        }
    }

    async fn until(&self, count: u64) {
        eventually("so many devices were answered", async || {
            let answered = self.count.load(Ordering::Relaxed);
            if answered < count { Err(answered) } else { Ok(()) }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reservations_with_kills_give_each_pair_to_one_chip() {
    let (devices, kills) = scaled(SHORT, FULL);
    let mut moments = Random::new();
    let (low, high) = scaled((200, 400), (2000, 4000));
    let mut site = pooled_site(low, high);
    site.edit("sppd.toml", "batch_size = 1000", scaled("batch_size = 50", "batch_size = 500"));
    site.start();
    let (begun, line) = (Instant::now(), Line::new(persistent(&site)));
    let takers = Arc::new(Takers {
        devices,
        floor: Floor::new(&site),
        next: AtomicU64::new(1),
        taken: Mutex::default(),
        count: AtomicU64::new(0),
    });
    let tasks: Vec<_> = (0..TASKS).map(|_| tokio::spawn(Arc::clone(&takers).work(line.clone()))).collect();
    for kill in 0..kills {
        // Somewhere in its share of the way.
        let share = devices / kills;
        takers.until(kill * share + moments.below(share)).await;
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
    let taken: BTreeSet<_> = takers.taken.lock().unwrap().keys().cloned().collect();
    assert_eq!(taken.len() as u64, devices);
    every_pair_is_ready_or_a_chips(&open_store(&site), &taken).await;
}

async fn every_pair_is_ready_or_a_chips(store: &SledStateStore, taken: &BTreeSet<Vec<u8>>) {
    let pairs = all_pairs(store).await.into_iter().filter(|pair| kind_of(pair) == KeyKind::P256).collect::<Vec<_>>();
    let ready = ready_keys(&pairs);
    let offered = store.ready_pairs(KeyKind::P256, None, 1_000_000).await.unwrap();
    assert_eq!(offered.into_iter().map(|(_, pair)| pair.public_key).collect::<BTreeSet<_>>(), ready);
    let sessions: BTreeSet<_> = store.unfinished().await.unwrap().into_iter().filter_map(|s| s.public_key).collect();
    assert_eq!(sessions, *taken, "what was delivered is what sessions have");
    assert!(ready.is_disjoint(taken), "a delivered key is ready again");
    let (made, reserved) = ((ready.len() + taken.len()) as u64, taken.len() as u64);
    println!("{made} pairs were made: {reserved} are taken, {} are ready", ready.len());
    assert_eq!(store.pair_counts(KeyKind::P256).await.unwrap(), PairCounts { made, reserved, discarded: 0 });
    assert_eq!(pairs.len() as u64, made);
}

fn kind_of(pair: &HeldPair) -> KeyKind {
    PublicKey::from_spki_der(&pair.public_key).unwrap().kind()
}

/// Two of three devices with a pair of the pool, one with a pair made on the spot.
fn pooled_or_phone(floor: &Floor, n: u64) -> (Device, AssembleRequest) {
    (floor.device(n), if n.is_multiple_of(3) { phone(n) } else { pooled(n) })
}

/// Devices that are assembled between the kills and completed after all of them.
struct HalfWay(Vec<(u64, AssembleRequest, AssembleResponse)>);

impl HalfWay {
    async fn one_more(&mut self, shift: &Shift, line: &mut Line) {
        let n = 1_000_000 + self.0.len() as u64;
        let (_, order) = pooled_or_phone(&shift.floor, n);
        let answer = shift.assembled(line, &order).await.unwrap();
        self.0.push((n, order, answer));
    }

    /// They get the same packages again, wherever their pairs have been moved.
    async fn completed(self, shift: &Shift, line: &mut Line, done: &mut BTreeMap<u64, Done>) {
        for (n, order, answer) in self.0 {
            let mut device = shift.floor.device(n);
            install(&mut device, &answer);
            let before = package(&device);
            let again = shift.assembled(line, &order).await.unwrap();
            assert_eq!(again.certificate, answer.certificate);
            let request = install(&mut device, &again);
            assert_eq!(package(&device), before, "device {n} was given two packages");
            let receipt = shift.completed(line, &request).await;
            done.insert(n, Done { order, answer, receipt });
        }
    }
}

/// Devices go the whole way while batches are used up and shredded, and the daemon is killed again and again.
async fn a_killed_day(mut site: Site, keeping: KeyStorage, kills: u64) {
    let mut moments = Random::new();
    site.edit("sppd.toml", "batch_size = 1000", "batch_size = 20");
    site.edit("sppd.toml", "shred_after = \"1h\"", "shred_after = \"1s\"");
    site.start();
    let shift = Shift::of(&site, pooled_or_phone);
    let mut line = Line::new(persistent(&site));
    let tasks = start_shift(&shift, &line, 16);
    let mut half_way = HalfWay(Vec::new());
    for _ in 0..kills {
        half_way.one_more(&shift, &mut line).await;
        half_way.one_more(&shift, &mut line).await;
        tokio::time::sleep(Duration::from_millis(40 + moments.below(1500))).await;
        site.kill();
        site.spawn();
    }
    end_shift(&shift, tasks).await;
    let mut done = shift.done();
    println!("{} devices, {} calls repeated", done.len(), shift.repeated());
    assert!(done.len() as u64 >= at_least());
    let status = until_pools(&site, "everything is shredded", is_quiet).await;
    assert!(status.rolled_back.is_empty(), "{status:?}");
    assert!(tokio::task::block_in_place(|| site.stop()).success());
    let pairs = store_and_token_agree(&site, keeping).await;
    let delivered: HashSet<_> = done.values().map(|done| public_key(&done.answer.certificate)).collect();
    assert!(
        pairs.iter().all(|pair| !delivered.contains(&pair.public_key)),
        "the pair of a finished device is still here"
    );

    site.start();
    half_way.completed(&shift, &mut line, &mut done).await;
    everything_is_public_once(&site, &mut line, &done).await;
    until_pools(&site, "these are shredded, too", is_quiet).await;
    assert!(tokio::task::block_in_place(|| site.stop()).success());
    store_and_token_agree(&site, keeping).await;
}

/// What is on the token, in the store and in its files is the same, and every private half can be opened.
async fn store_and_token_agree(site: &Site, keeping: KeyStorage) -> Vec<HeldPair> {
    let store = open_store(site);
    let (id, _) = store.origin().await.unwrap();
    let batches = store.batches().await.unwrap();
    let pairs = all_pairs(&store).await;
    let sessions: BTreeSet<_> = store.unfinished().await.unwrap().into_iter().filter_map(|s| s.public_key).collect();
    let reserved: BTreeSet<_> = pairs.iter().map(|pair| pair.public_key.clone()).collect();
    let reserved: BTreeSet<_> = reserved.difference(&ready_keys(&pairs)).cloned().collect();
    assert_eq!(reserved, sessions, "each unfinished session has its pair, and nobody else has one");
    let hsm = Hsm::start(site.hsm_config());
    hsm.ready(LIMIT).await.unwrap();
    let own = hsm.own_objects().await.unwrap();

    let with_key = batches.iter().filter(|batch| batch.keeping == KeyStorage::Wrapped).map(|batch| batch.number);
    let on_token: Vec<_> = own.keys.iter().filter(|key| key.store == id).map(|key| key.number).collect();
    assert_eq!(on_token.len(), own.keys.len(), "nobody else makes batch keys here");
    assert_eq!(on_token.iter().copied().collect::<BTreeSet<_>>(), with_key.collect(), "batch keys on the token");
    assert_eq!(on_token.len(), own.keys.iter().map(|key| key.number).collect::<BTreeSet<_>>().len());

    let named: BTreeSet<_> = pairs.iter().filter_map(|pair| on_token_as(&pair.kept)).collect();
    let there: BTreeSet<_> = own.pairs.iter().map(|(_, pair)| pair.clone()).collect();
    assert_eq!(there, named, "pairs on the token");
    assert_eq!((there.len(), named.is_empty()), (own.pairs.len(), keeping == KeyStorage::Wrapped));

    let known: BTreeSet<_> = batches.iter().map(|batch| batch.number.to_string()).collect();
    for file in std::fs::read_dir(site.path("state/pairs")).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        assert!(known.contains(&name), "pairs/{name} belongs to no batch");
    }
    for pair in &pairs {
        can_be_opened(&hsm, pair).await;
    }
    println!("{} pairs in {} batches, {} of sessions", pairs.len(), batches.len(), sessions.len());
    pairs
}

fn on_token_as(kept: &StoredKey) -> Option<spp::keys::TokenPair> {
    match kept {
        StoredKey::OnToken(pair) => Some(pair.clone()),
        StoredKey::Wrapped(_) => None,
    }
}

/// Its private half signs what its public half verifies.
async fn can_be_opened(hsm: &Hsm, pair: &HeldPair) {
    let public = PublicKey::from_spki_der(&pair.public_key).unwrap();
    let order = HeldKeyOrder { pair: Some((public.clone(), pair.kept.clone())), derivations: Vec::new() };
    let held = hsm.held_keys(&order).await.unwrap_or_else(|e| panic!("the pair of {:?}: {e}", pair.holder));
    let algorithm = SignatureAlgorithm::default_for(public.kind());
    let signature = held.pair.unwrap().sign(algorithm, b"whose?").unwrap();
    public.verify(algorithm, b"whose?", &signature).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_while_batches_are_shredded_it_loses_no_pair_and_keeps_no_key_too_many() {
    a_killed_day(pooled_site(40, 80), KeyStorage::Wrapped, scaled(3, 12)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_with_pairs_on_the_token_it_leaves_none_there_that_nobody_knows() {
    let site = pooled_site(30, 60);
    site.edit("sppd.toml", "store = \"wrapped\"", "store = \"hsm\"");
    a_killed_day(site, KeyStorage::Hsm, scaled(2, 6)).await;
}
