//! Measures commits per second of the embedded stores by number of concurrent callers: `cargo bench --bench store [-- DIR]`.
//!
//! DIR should be on the daemon's disk: syncs dominate the results.

#[path = "common/load.rs"]
mod load;
#[path = "common/signer.rs"]
mod signer;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use spp::registry::{LogSettings, TransparencyLog};
use spp::store::{
    BatchStep, KeyStorage, PairToReserve, PublicDatabase, Purpose, SecretStore, Session, SessionState, SledStateStore,
    StateName, StateStore, StoreOptions,
};
use spp_format::certificate::CertificateToSign;
use spp_format::names::{ChipId, SessionId};
use spp_format::record::{DeviceRecord, Publication};

use load::{measure, percentile};
use signer::Signer;

const RUN: Duration = Duration::from_secs(5);

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Failure> {
    // cargo passes `--bench` itself.
    let dir = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let base = dir.map_or_else(tempfile::tempdir, |dir| tempfile::Builder::new().tempdir_in(dir))?;
    for callers in [1, 8, 64] {
        let dir = base.path().join(format!("state-{callers}"));
        let store = Arc::new(SledStateStore::create(&dir, &StoreOptions::default())?);
        store.plan_batch(Purpose::Sessions, KeyStorage::Wrapped, 0, 0).await?;
        store.step_batch(1, BatchStep::Open).await?;
        let devices = measure(callers, RUN, move |n| {
            let store = store.clone();
            async move { process_device(&*store, n).await }
        });
        report("full session (4 commits)", callers, 4, devices.await?);

        let public: Arc<dyn PublicDatabase> = Arc::new(open_public(base.path(), callers).await?);
        let records = measure(callers, RUN, move |n| {
            let public = public.clone();
            async move { Ok(public.publish(&record(n)?).await.map(drop)?) }
        });
        report("publish (1 commit)", callers, 1, records.await?);
    }
    Ok(())
}

fn report(label: &str, callers: u64, commits: u32, times: Vec<Duration>) {
    let per_second = f64::from(u32::try_from(times.len()).unwrap_or(u32::MAX)) / RUN.as_secs_f64();
    let percentile_of = |percent| percentile(&times, percent);
    println!(
        "{label:32} {callers:3} callers: {per_second:8.0}/s, {:8.0} commits/s, p50 {:.2?}, p99 {:.2?}",
        per_second * f64::from(commits),
        percentile_of(50),
        percentile_of(99)
    );
}

async fn process_device(store: &dyn StateStore, n: u64) -> Result<(), Failure> {
    let session = session(n)?;
    let pair = PairToReserve::OnDemand { batch: 1, blob: vec![5; 80] };
    let publication = Publication { index: n, record_hash: [9; 32], published: n };
    store.reserve(&session, Some(&pair)).await?;
    let steps = [
        (StateName::Reserved, SessionState::Issued { certificate: vec![6; 700] }),
        (StateName::Issued, SessionState::Published { publication }),
        (StateName::Published, SessionState::Erased { publication }),
    ];
    for (from, to) in steps {
        store.advance(&session.id, from, to).await?;
    }
    Ok(())
}

fn session(n: u64) -> Result<Session, Failure> {
    Ok(Session {
        id: SessionId::from_bytes(&name_of(n))?,
        chip: ChipId::from_bytes(&name_of(n))?,
        identity: format!("serial:SN-{n:012}").parse()?,
        profile: "phone".parse()?,
        station: "line-1/a".parse()?,
        created: n,
        expires: n,
        public_key: Some(vec![4; 91]),
        own_key_pair: false,
        sealed_to: None,
        recipe: [0; 32],
        master_key: None,
        certificate: CertificateToSign::of_bytes("issuer".parse()?, name_of(n).to_vec(), vec![7; 600]),
        state: SessionState::Reserved,
    })
}

async fn open_public(base: &Path, callers: u64) -> Result<TransparencyLog, Failure> {
    let (dir, options) = (base.join(format!("public-{callers}")), StoreOptions::default());
    TransparencyLog::create(&dir, &options)?;
    Ok(TransparencyLog::open(&dir, &options, Arc::new(Signer::new()?), LogSettings::default()).await?)
}

fn record(n: u64) -> Result<DeviceRecord, Failure> {
    Ok(DeviceRecord {
        chip: ChipId::from_bytes(&name_of(n))?,
        identity: format!("serial:SN-{n:012}").parse()?,
        profile: "phone".parse()?,
        certificate: vec![6; 700],
        certificate_is_cwt: false,
        serial: name_of(n).to_vec(),
        public_key: Some([&[4; 83], n.to_be_bytes().as_slice()].concat()),
        backup: vec![3; 1000],
        master_key_version: 1,
        session: SessionId::from_bytes(&name_of(n))?,
        published: n,
    })
}

/// A deterministic name, distributed like a random one: consecutive names are not neighbors in the tree.
fn name_of(n: u64) -> [u8; 16] {
    let mut name = [0; 16];
    name[..8].copy_from_slice(&n.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
    name[8..].copy_from_slice(&n.to_be_bytes());
    name
}
