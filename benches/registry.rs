//! Benchmarks of the log: `cargo bench --bench registry [-- log N | reads]`.
//!
//! `log N`: a log of N real records (default 100,000) with an in-memory key: publication, proofs, index rebuild, verification and
//! export of a mirror. No HSM.
//! `reads`: gRPC look-ups of records, proofs and unknown chips against a running daemon with its own SoftHSM.

#[path = "common/load.rs"]
mod load;
#[path = "common/signer.rs"]
mod signer;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use spp::registry::{LogSettings, LogSigner as _, TransparencyLog, reindex};
use spp::store::{PublicDatabase, StoreOptions};
use spp_format::certificate::{
    AuthorityCertificate, CertificateRequest, CertificateSerial, IssuedCertificate, IssuerCertificate, Profile,
    SubjectName, authority_certificate, prepare,
};
use spp_format::keys::{DevicePrivateKey, SignatureAlgorithm, generate_p256, sha256};
use spp_format::names::{ChipId, SessionId};
use spp_format::record::{DeviceRecord, UniqueKey};
use spp_log::registry::{StoreDirectory, VerifyOptions, export, verify};
use spp_proto::get_proof_request::Record;
use spp_proto::recovery_client::RecoveryClient;
use spp_proto::{GetProofRequest, GetRecordRequest};
use spp_testkit::site::Site;

use load::{measure, percentile};
use signer::Signer;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const P256: SignatureAlgorithm = SignatureAlgorithm::EcdsaP256Sha256;
const PROFILE: &str = r#"
identities = ["serial"]
hardware_type = "1.3.6.1.4.1.32473.1.7"
issuer = "manufacturer"
key_pair.source = "generate"
key_pair.kind = "p256"
"#;
const RUN: Duration = Duration::from_secs(10);
/// Devices in the daemon's database.
const DEVICES: u32 = 1000;

fn main() -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    // cargo adds `--bench`.
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with('-'));
    let benchmark = arguments.next();
    if benchmark.as_deref() != Some("reads") {
        let count = arguments.next().map_or(Ok(100_000), |count| count.parse())?;
        runtime.block_on(log(count))?;
    }
    if benchmark.as_deref() != Some("log") {
        runtime.block_on(reads())?;
    }
    Ok(())
}

async fn log(count: u64) -> Result<(), Failure> {
    let base = tempfile::tempdir()?;
    let (dir, options) = (base.path().join("public"), StoreOptions::default());
    TransparencyLog::create(&dir, &options)?;
    let signer = Arc::new(Signer::new()?);
    let log = TransparencyLog::open(&dir, &options, signer.clone(), LogSettings::default()).await?;
    let log = Arc::new(log);
    let factory = Arc::new(RecordFactory::new()?);
    let started = Instant::now();
    fill(&log, &factory, count).await?;
    println!("published {count} records in {:.0?}, including certificate issuance", started.elapsed());
    proofs(&*log, count).await?;
    drop(log);

    let started = Instant::now();
    let report = reindex(&dir, &options, signer.key(), false, |_, _| {}).await?;
    println!("index rebuilt, {} entries: {:.1?}", report.entries, started.elapsed());
    let started = Instant::now();
    drop(TransparencyLog::open(&dir, &options, signer.clone(), LogSettings::default()).await?);
    println!("opened in {:.1?}", started.elapsed());
    tokio::time::sleep(Duration::from_secs(1)).await;

    let issuers = [factory.issuer.clone()];
    let verify_options = VerifyOptions { key: signer.key(), issuers: &issuers, seen: None };
    let started = Instant::now();
    let found = verify(&mut StoreDirectory::new(&dir, signer.key()), &verify_options, &mut |_, _| {});
    println!(
        "verified {} entries on one core: {:.1?}, {} findings",
        found.entries,
        started.elapsed(),
        found.findings.len()
    );
    let started = Instant::now();
    let mirror = base.path().join("mirror");
    let exported = export(&mut StoreDirectory::new(&dir, signer.key()), signer.key(), &mirror, &mut |_, _| {})?;
    println!("mirrored {} entries: {:.1?}", exported.entries, started.elapsed());
    println!("disk: {} MB, including {} MB of index", size_of(&dir)? >> 20, size_of(&dir.join("index"))? >> 20);
    Ok(())
}

/// Publishes many records concurrently, as a production line does, so that batches are full.
async fn fill(log: &Arc<TransparencyLog>, factory: &Arc<RecordFactory>, count: u64) -> Result<(), Failure> {
    let next = Arc::new(AtomicU64::new(0));
    let tasks = (0..512).map(|_| {
        let (log, factory, next) = (Arc::clone(log), Arc::clone(factory), Arc::clone(&next));
        tokio::spawn(async move {
            loop {
                let n = next.fetch_add(1, Relaxed);
                if n >= count {
                    return Ok::<_, Failure>(());
                }
                let record = factory.record(n)?;
                let slot = log.reserve_slot();
                log.publish(&record).await?;
                drop(slot);
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await??;
    }
    Ok(())
}

async fn proofs(log: &dyn PublicDatabase, count: u64) -> Result<(), Failure> {
    let (mut proofs, mut receipts, mut finds) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..2000u64 {
        let index = n.wrapping_mul(0x9E37_79B9_7F4A_7C15) % count;
        for (times, prove) in [(&mut proofs, false), (&mut receipts, true)] {
            let started = Instant::now();
            let proof = if prove { log.receipt(index).await? } else { log.prove(index).await? };
            proof.ok_or("no proof")?;
            times.push(started.elapsed());
        }
        let started = Instant::now();
        let found = log.find(&UniqueKey::of_chip(&RecordFactory::chip(index)?)).await?;
        found.ok_or("not found")?;
        finds.push(started.elapsed());
    }
    for (what, mut times) in [("proof", proofs), ("receipt", receipts), ("record by chip", finds)] {
        times.sort_unstable();
        println!("{what:15} p50 {:.0?}, p99 {:.0?}", percentile(&times, 50), percentile(&times, 99));
    }
    Ok(())
}

/// Creates records with real certificates.
struct RecordFactory {
    manufacturer: DevicePrivateKey,
    issuer: IssuerCertificate,
    profile: Profile,
}

impl RecordFactory {
    fn new() -> Result<Self, Failure> {
        let manufacturer = generate_p256()?;
        let unsigned = authority_certificate(&AuthorityCertificate {
            subject: &SubjectName::with_common_name("Manufacturer")?,
            public_key: manufacturer.public(),
            algorithm: P256,
            serial: CertificateSerial::from_random([7; 20]),
            not_before: 1_700_000_000,
            not_after: None,
        })?;
        let signature = manufacturer.sign(P256, unsigned.to_be_signed())?;
        let issuer = IssuerCertificate::from_pem(&unsigned.assemble(&signature)?.to_pem()?, P256)?;
        let profile = Profile::from_toml("bench".parse()?, "profile.toml", PROFILE).map_err(|e| e.to_string())?;
        Ok(Self { manufacturer, issuer, profile })
    }

    fn chip(n: u64) -> Result<ChipId, Failure> {
        Ok(ChipId::from_bytes(sha256(&n.to_be_bytes()).get(..16).unwrap_or_default())?)
    }

    fn record(&self, n: u64) -> Result<DeviceRecord, Failure> {
        let (chip, identity) = (Self::chip(n)?, format!("serial:SN-{n:012}").parse()?);
        let pair = generate_p256()?;
        let mut random = [0; 20];
        random.copy_from_slice(sha256(chip.as_bytes()).get(..20).unwrap_or_default());
        let serial = CertificateSerial::from_random(random);
        let request = CertificateRequest {
            profile: &self.profile,
            issuer: &self.issuer,
            chip: &chip,
            identity: &identity,
            public_key: Some(pair.public()),
            serial,
            not_before: 1_700_000_000,
        };
        let to_sign = prepare(&request)?.lint().map_err(|e| e.to_string())?.into_to_sign();
        let signature = self.manufacturer.sign(P256, to_sign.to_be_signed())?;
        let certificate = IssuedCertificate::assemble(&to_sign, &self.issuer, &signature)?.as_bytes().to_vec();
        let session = SessionId::from_bytes(chip.as_bytes())?;
        Ok(DeviceRecord {
            chip,
            identity,
            profile: "bench".parse()?,
            certificate,
            certificate_is_cwt: false,
            serial: to_sign.serial().to_vec(),
            public_key: Some(pair.public().spki_der().to_vec()),
            backup: vec![3; 1400],
            master_key_version: 1,
            session,
            published: 1_700_000_000 + n,
        })
    }
}

async fn reads() -> Result<(), Failure> {
    let mut site = Site::new();
    // Measure the daemon, not its rate limit per address.
    site.edit("sppd.toml", "requests_per_second = 100\nburst = 400", "requests_per_second = 1000000\nburst = 1000000");
    site.start();
    let command = format!(
        "provision --simulate {DEVICES} --profile phone --parallel 64 --server https://127.0.0.1:{} --tls tls/line-1-a --devices \
         simulated --manufacturer keys/manufacturer-ca.pem --log keys/log-1.vkey --report report.csv",
        site.line
    );
    let provisioned = site.spp_line(&command);
    if !provisioned.status.success() {
        return Err(String::from_utf8_lossy(&provisioned.stderr).into_owned().into());
    }
    let report = String::from_utf8(site.read("report.csv"))?;
    let column = report.lines().next().and_then(|head| head.split(',').position(|name| name == "chip_id"));
    let column = column.ok_or("the report has no chip_id")?;
    let chips =
        report.lines().skip(1).filter_map(|line| hex::decode(line.split(',').nth(column)?.trim_matches('"')).ok());
    let chips: Arc<Vec<Vec<u8>>> = Arc::new(chips.collect());
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(RecoveryClient::new(site.connect(site.public, site.public_tls()).await?));
    }
    println!("daemon, SoftHSM and client on one machine; {} devices, 8 connections, 64 calls in flight", chips.len());
    let client = move |n: u64| clients[n as usize % clients.len()].clone();
    let (client_of, known_chips) = (client.clone(), Arc::clone(&chips));
    read("GetRecord", move |n| {
        let (mut client, chip_id) = (client_of(n), known_chips[n as usize % known_chips.len()].clone());
        async move { Ok(client.get_record(GetRecordRequest { chip_id }).await.map(drop)?) }
    })
    .await?;
    let client_of = client.clone();
    read("GetProof", move |n| {
        let (mut client, record) = (client_of(n), Some(Record::RecordIndex(n % u64::from(DEVICES))));
        async move { Ok(client.get_proof(GetProofRequest { record }).await.map(drop)?) }
    })
    .await?;
    read("unknown chip", move |n| {
        let (mut client, chip_id) = (client(n), [&[9; 8][..], &n.to_be_bytes()].concat());
        async move {
            match client.get_record(GetRecordRequest { chip_id }).await {
                Err(status) if status.code() == tonic::Code::NotFound => Ok(()),
                other => Err(format!("unknown chip: expected NOT_FOUND, got {other:?}").into()),
            }
        }
    })
    .await
}

async fn read<F, O>(what: &str, call: F) -> Result<(), Failure>
where
    F: Fn(u64) -> O + Clone + Send + 'static,
    O: Future<Output = Result<(), Failure>> + Send,
{
    let times = measure(64, RUN, call).await?;
    let (per_second, latency) = (times.len() as f64 / RUN.as_secs_f64(), |percent| percentile(&times, percent));
    println!("{what:15} {per_second:6.0}/s, p50 {:.1?}, p99 {:.1?}", latency(50), latency(99));
    Ok(())
}

fn size_of(dir: &Path) -> Result<u64, Failure> {
    let mut size = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        size += if entry.file_type()?.is_dir() { size_of(&entry.path())? } else { entry.metadata()?.len() };
    }
    Ok(size)
}
