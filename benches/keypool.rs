//! Benchmarks of the key pool: `cargo bench --bench keypool [-- store|fill]`.
//!
//! `store`: pools of 100 and 100,000 pairs: opening, reservation latency, disk usage. Without an HSM. `fill`: pairs per second
//! that the module generates, single-threaded and on all worker threads, compared with the fill rate of an idle line's pool. On
//! its own SoftHSM.
#![expect(clippy::disallowed_types, reason = "measures the module's rate without this program in between")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::Attribute;
use cryptoki::session::UserType;
use cryptoki::types::AuthPin;
use spp::clock::Clock;
use spp::config::DaemonConfig;
use spp::hsm::{BatchName, Hsm, StoredKey, WrappedKey};
use spp::keypool::{KeyPool, Marks, PoolRules};
use spp::registry::{HsmSigner, TransparencyLog};
use spp::store::{
    BatchStep, Journal, KeyStorage, PairToReserve, PooledPair, Purpose, Registry, SecretStore, Session, SessionState,
    SledStateStore, StateStore, StoreOptions,
};
use spp_format::certificate::CertificateToSign;
use spp_format::keys::KeyType;
use spp_format::names::{ChipId, SessionId};
use spp_testkit::site::Site;

/// Set for the child process that measures the module without this program.
const RAW: &str = "SPP_BENCH_RAW";
const RUN: Duration = Duration::from_secs(20);
const KINDS: [KeyType; 3] = [KeyType::P256, KeyType::Rsa2048, KeyType::Rsa3072];

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    if let Ok(kind) = std::env::var(RAW) {
        println!("{}", raw_rate(kind.parse()?)?);
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    // cargo passes `--bench`.
    let selected = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    if selected.as_deref() != Some("fill") {
        runtime.block_on(store())?;
    }
    if selected.as_deref() != Some("store") {
        for kind in KINDS {
            runtime.block_on(fill(kind))?;
        }
    }
    Ok(())
}

async fn store() -> Result<(), Failure> {
    let base = tempfile::tempdir()?;
    for (kind, spki, blob) in [(KeyType::P256, 91, 80), (KeyType::Rsa2048, 294, 1232)] {
        for pairs in [100, 100_000] {
            let dir = base.path().join(format!("{kind}-{pairs}"));
            let store = SledStateStore::create(&dir, &StoreOptions::default())?;
            let begun = Instant::now();
            make_pool(&store, kind, pairs, (spki, blob)).await?;
            let filled = begun.elapsed();
            drop(store);
            let begun = Instant::now();
            let store = Arc::new(SledStateStore::open(&dir, &StoreOptions::default())?);
            let first = store.ready_pairs(kind, None, 1).await?.len();
            let opened = begun.elapsed();
            let disk = size_of(&dir)?;
            let mut alone = reserve(&store, kind, 50, 1).await?;
            let mut many = reserve(&store, kind, 50, 64).await?;
            alone.sort_unstable();
            many.sort_unstable();
            println!(
                "{kind:9} pool of {pairs:6}: made in {filled:.1?}, opened with its first pair in {opened:.1?} ({first}), {:.1} MB on \
                 the disk, a reservation {:.0?} (p50 of 50 alone), {:.0?} (p50 of 64 at once)",
                disk as f64 / 1e6,
                alone[alone.len() / 2],
                many[many.len() / 2],
            );
        }
    }
    Ok(())
}

async fn make_pool(
    store: &SledStateStore,
    kind: KeyType,
    pairs: usize,
    (spki, blob): (usize, usize),
) -> Result<(), Failure> {
    let (id, _) = store.origin().await?;
    let mut left = pairs;
    while left > 0 {
        let batch = store.plan_batch(Purpose::Pool(kind), KeyStorage::Wrapped, 0, 0).await?;
        store.step_batch(batch.number, BatchStep::Open).await?;
        let wrapping_key = BatchName { store: id, number: batch.number }.key();
        for _ in 0..8 {
            let count = left.min(125);
            left -= count;
            let pair = |n: usize| PooledPair {
                public_key: bytes(left + n, spki),
                private_key: StoredKey::Wrapped(WrappedKey {
                    wrapping_key: wrapping_key.clone(),
                    blob: bytes(left + n, blob),
                }),
            };
            store.add_pairs(batch.number, (0..count).map(pair).collect()).await?;
        }
        store.step_batch(batch.number, BatchStep::Seal).await?;
    }
    Ok(())
}

/// Pseudo-random bytes.
fn bytes(n: usize, len: usize) -> Vec<u8> {
    let mut state = n as u64 ^ 0x9E37_79B9_7F4A_7C15;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..len).map(|_| next()).collect()
}

/// Durations of `count` reservations, `at_once` of them concurrently.
async fn reserve(
    store: &Arc<SledStateStore>,
    kind: KeyType,
    count: usize,
    at_once: usize,
) -> Result<Vec<Duration>, Failure> {
    let mut times = Vec::new();
    while times.len() < count.min(50) {
        let pairs = store.ready_pairs(kind, None, at_once.min(count - times.len())).await?;
        let calls = pairs.into_iter().map(|(id, pair)| {
            let store = store.clone();
            tokio::spawn(async move {
                let session = session(pair.public_key)?;
                let begun = Instant::now();
                store.reserve(&session, Some(&PairToReserve::Pooled(id))).await?;
                Ok::<_, Failure>(begun.elapsed())
            })
        });
        for call in calls.collect::<Vec<_>>() {
            times.push(call.await??);
        }
    }
    Ok(times)
}

fn session(public_key: Vec<u8>) -> Result<Session, Failure> {
    let name = &spp_format::keys::sha256(&public_key)[..16];
    Ok(Session {
        id: SessionId::from_bytes(name)?,
        chip: ChipId::from_bytes(name)?,
        identity: format!("serial:{}", hex::encode(name)).parse()?,
        profile: "router".parse()?,
        station: "line-1/a".parse()?,
        created: 0,
        expires: u64::MAX,
        public_key: Some(public_key),
        own_key_pair: false,
        sealed_to: None,
        recipe: [0; 32],
        master_key: None,
        certificate: CertificateToSign::of_bytes("issuer".parse()?, name.to_vec(), vec![7; 600]),
        state: SessionState::Reserved,
    })
}

fn size_of(dir: &Path) -> Result<u64, Failure> {
    let mut size = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        // The reserve file has the same size for every pool.
        if entry.file_type()?.is_dir() {
            size += size_of(&entry.path())?;
        } else if entry.file_name() != "reserve" {
            size += entry.metadata()?.len();
        }
    }
    Ok(size)
}

/// Compares the fill rate of the pool with the module's rate.
async fn fill(kind: KeyType) -> Result<(), Failure> {
    let site = Site::new();
    let config = DaemonConfig::load(&site.path("sppd.toml")).map_err(|faults| faults.to_string())?;
    let mut hsms = config.hsms;
    hsms.members_mut().iter_mut().for_each(|hsm| hsm.worker_program = spp_testkit::process::program("sppd"));
    let raw = std::process::Command::new(std::env::current_exe()?)
        .env(RAW, kind.name())
        .env("SOFTHSM2_CONF", site.path("hsm/softhsm2.conf"))
        .output()?;
    let raw: f64 = String::from_utf8(raw.stdout)?.trim().parse()?;

    let hsm = Hsm::start(hsms);
    hsm.ready(Duration::from_secs(30)).await?;
    let state = Arc::new(SledStateStore::open(&site.path("state"), &config.store.state_options)?);
    let signer = HsmSigner::new(&hsm, config.registry.key.clone());
    let settings = config.registry.settings.clone();
    let options = &config.store.public_options;
    let public = TransparencyLog::open(&site.path("public"), options, Arc::new(signer), settings).await?;
    let marks = Marks { low: 10_000_000, high: 10_000_000 };
    let rules = PoolRules { pools: [(kind, marks)].into(), ..PoolRules::default() };
    let (journal, registry) = (Journal::new(state.clone()), Registry::new(Arc::new(public)));
    let pool = KeyPool::new(hsm, state, journal, registry, rules, Clock::system());
    let running = tokio::spawn(Arc::clone(&pool).run());
    let ready = async || Ok::<u64, Failure>(pool.status().await?.kinds.iter().map(|kind| kind.ready).sum());
    while ready().await? == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (begun, before) = (Instant::now(), ready().await?);
    tokio::time::sleep(RUN).await;
    let rate = (ready().await? - before) as f64 / begun.elapsed().as_secs_f64();
    running.abort();
    println!(
        "{kind:9} generated by the module alone {raw:9.1}/s, pool filled with {rate:9.1}/s: {:.0} %",
        100.0 * rate / raw
    );
    Ok(())
}

/// C_GenerateKeyPair and C_DestroyObject of session objects, on as many threads as there are cores.
fn raw_rate(kind: KeyType) -> Result<f64, Failure> {
    let module = Pkcs11::new("/usr/lib/softhsm/libsofthsm2.so")?;
    module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))?;
    let slot = module.get_slots_with_initialized_token()?.into_iter().next().ok_or("no token")?;
    let anchor = module.open_rw_session(slot)?;
    anchor.login(UserType::User, Some(&AuthPin::new("482910375566".into())))?;
    let secp256r1 = vec![0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
    let public = match kind.rsa_bits() {
        Some(bits) => vec![Attribute::ModulusBits((bits as u64).into()), Attribute::PublicExponent(vec![1, 0, 1])],
        None => vec![Attribute::EcParams(secp256r1)],
    };
    let is_rsa = kind.rsa_bits().is_some();
    let threads = std::thread::available_parallelism()?.get();
    let begun = Instant::now();
    let made = std::thread::scope(|scope| {
        let generate = || -> Result<u64, Failure> {
            let mechanism = if is_rsa { Mechanism::RsaPkcsKeyPairGen } else { Mechanism::EccKeyPairGen };
            let session = module.open_rw_session(slot)?;
            let mut made = 0;
            while begun.elapsed() < RUN {
                let private = [Attribute::Token(false), Attribute::Extractable(true), Attribute::Sensitive(true)];
                let (one, other) = session.generate_key_pair(&mechanism, &public, &private)?;
                session.destroy_object(one)?;
                session.destroy_object(other)?;
                made += 1;
            }
            Ok(made)
        };
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(generate)).collect();
        all.into_iter().map(|thread| thread.join().map_err(|_| "a thread panicked")?).sum::<Result<u64, Failure>>()
    })?;
    Ok(made as f64 / begun.elapsed().as_secs_f64())
}
