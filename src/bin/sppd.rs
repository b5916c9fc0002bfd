//! `sppd`: the daemon.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{CommandFactory as _, Parser};
use clap_complete::Shell;
use sd_notify::NotifyState;
use spp::access::AccessControl;
use spp::audit::{self, AuditCheckpointer, AuditLog, Auditor, CheckpointRules, Entry, Outcome, Trust};
use spp::cli_docs;
use spp::clock::Clock;
use spp::config::DaemonConfig;
use spp::connections::TlsInForce;
use spp::hsm::{Hsm, PinAgent, PinSource, pin_agent, worker};
use spp::keypool::KeyPool;
use spp::logging::{self, LogLevel};
use spp::provisioning::{Policy, Provisioner, recovery_loop};
use spp::registry::{HsmSigner, TransparencyLog, published_checkpoints};
use spp::reload::{Exchanged, Reloader};
use spp::rpc::{House, Listening, NodeInfo};
use spp::store::{Batch, Journal, Purpose, Registry, SecretStore, SledStateStore};
use spp::web::{Metrics, Public, Told};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The secure processing point: gives every device on the line its identity and its keys.
#[derive(Parser)]
#[command(
    name = "sppd",
    version,
    after_help = "A configuration that is not usable ends it with status 78 (EX_CONFIG) before a socket is opened, anything else with 1."
)]
struct Cli {
    /// The configuration file, sppd.toml.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["completions", "man"])]
    config: Option<PathBuf>,
    /// Look at everything, the HSM and its keys included, tell what was found, and end.
    #[arg(long)]
    check: bool,
    /// Print the completions for a shell, and end.
    #[arg(long, value_name = "SHELL", exclusive = true)]
    completions: Option<Shell>,
    /// Write the man page into a directory, and end.
    #[arg(long, value_name = "DIR", exclusive = true)]
    man: Option<PathBuf>,
}

/// How long `--check` waits for the HSM.
const CHECK_LIMIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    match std::env::args_os().nth(1) {
        Some(argument) if argument == worker::ARGUMENT => return ended(worker::run()),
        Some(argument) if argument == pin_agent::ARGUMENT => return ended(pin_agent::run()),
        _ => {}
    }
    let cli = Cli::parse();
    let undumpable = spp::hardening::forbid_core_dumps();
    let locked = spp::hardening::lock_memory();
    if let Some(shell) = cli.completions {
        return ended(cli_docs::completions(shell, Cli::command()).map_err(|e| e.to_string()));
    }
    if let Some(dir) = cli.man {
        return ended(cli_docs::man(&dir, Cli::command()).map_err(|e| e.to_string()));
    }
    let Some(path) = cli.config else { return ended(Err("give --config".to_owned())) };
    let mut config = match DaemonConfig::load(&path) {
        Ok(config) => config,
        Err(faults) => {
            eprint!("sppd: the configuration is not usable:\n{faults}");
            return ExitCode::from(78);
        }
    };
    let log = logging::start(&config.log);
    if let Err(message) = ask_for_pins(&mut config) {
        return ended(Err(message));
    }
    if !undumpable {
        tracing::warn!("core dumps could not be switched off: set LimitCORE=0, or ulimit -c 0");
    }
    if !locked {
        tracing::debug!("memory is not locked: set LimitMEMLOCK=infinity where there is swap");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let result = runtime.map_err(|e| e.to_string()).and_then(|runtime| {
        let result = runtime
            .block_on(async { if cli.check { check(config).await } else { serve(Start { path, config, log }).await } });
        runtime.shutdown_timeout(Duration::from_secs(5));
        result
    });
    ended(result)
}

/// Has the PINs typed that are nowhere else.
fn ask_for_pins(config: &mut DaemonConfig) -> Result<(), String> {
    let several = config.hsms.members().len() > 1;
    for hsm in config.hsms.members_mut().iter_mut().filter(|hsm| hsm.pin == PinSource::Prompt) {
        if several {
            eprintln!("HSM {}:", hsm.name);
        }
        let keeper = PinAgent::ask(&hsm.worker_program).map_err(|e| e.to_string())?;
        hsm.pin_keeper = Some(Arc::new(keeper));
    }
    Ok(())
}

fn ended(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("sppd: {message}");
            ExitCode::FAILURE
        }
    }
}

/// What was read at the start, and may be read again.
struct Start {
    path: PathBuf,
    config: DaemonConfig,
    log: LogLevel,
}

/// Opens the audit log and the listeners, serves, and records both ends of it.
async fn serve(start: Start) -> Result<(), String> {
    let config = &start.config;
    let state = open_state(config)?;
    let audit = Arc::new(AuditLog::open(&config.audit.directory, &config.node).map_err(|e| e.to_string())?);
    let listening = Listening::bind(&config.listen).await.map_err(|e| e.to_string())?;
    let metrics = match config.listen.metrics {
        Some(address) => Some(Metrics::bind(address).await.map_err(|e| e.to_string())?),
        None => None,
    };
    let served = run(start, state, &audit, listening, metrics).await;
    tracing::info!("drained; goodbye");
    served
}

/// Starts the HSM's worker, opens the public database, takes up what a crash left, serves, drains.
async fn run(
    Start { path, config, log }: Start,
    state: Arc<SledStateStore>,
    audit: &Arc<AuditLog>,
    listening: Listening,
    metrics: Option<Metrics>,
) -> Result<(), String> {
    let hsm = Hsm::start(config.hsms.clone());
    let journal = Journal::new(state.clone());
    let registry = open_registry(&config, &hsm, &journal).await?;
    let auditor = Arc::new(Auditor::new(Arc::clone(audit)));
    let keeper = Arc::new(audit_keeper(&config, &auditor, &hsm, &registry));
    keeper.compare(config.audit.accepted_loss).await?;
    keeper.import_offline_events().await.map_err(|e| e.to_string())?;
    // Not before: each start that is refused would make a log that was cut off longer, until it had as many entries as it should.
    record_start(audit, &config).await?;
    let desk = AccessControl::open(state.clone(), hsm.clone(), config.authority.clone(), &config.node).await;
    let desk = Arc::new(desk.map_err(|e| e.to_string())?);
    settle(&desk, &config, audit).await?;
    let (rules, clock) = (config.key_pool.clone(), Clock::system());
    let pool = KeyPool::new(hsm.clone(), state.clone(), journal.clone(), registry.clone(), rules, clock);
    let keeping = tokio::spawn(Arc::clone(&pool).run());
    let lifetime = config.session_lifetime;
    let provisioner = Arc::new(Provisioner::new(hsm, journal, registry, pool, state, Policy::new(&config), lifetime));
    let tidying = tokio::spawn({
        let provisioner = Arc::clone(&provisioner);
        async move { recovery_loop(&provisioner).await }
    });
    let stop = stop_on_signal()?;
    let public = Public::new(Arc::clone(&provisioner), &config.public, &config.registry);
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let node = NodeInfo { name: config.node.clone(), started };
    let (tls, listen) = (TlsInForce::new(&config.tls), config.listen);
    let (devices, recorded) = (Arc::clone(&provisioner), Arc::clone(audit));
    let exchanged = Exchanged { provisioner: devices, desk: Arc::clone(&desk), tls: tls.clone(), log };
    let reloader = Arc::new(Reloader::new(path, config, exchanged, recorded));
    let reloading = reload_on_signal(Arc::clone(&reloader))?;
    tracing::info!(line = %listen.line, officer = %listen.officer, public = %listen.public, node = %node.name, "listening");
    notify(&[NotifyState::Ready]);
    let watching = tokio::spawn({
        let (keeper, stop) = (Arc::clone(&keeper), stop.clone());
        async move { keeper.run(stop).await }
    });
    let told = Told { provisioner: Arc::clone(&provisioner), auditor: Arc::clone(&auditor) };
    let scraping = metrics.map(|metrics| tokio::spawn(metrics.serve(told, stop.clone())));
    let house = House { node, auditor, desk, reloader };
    let served = listening.serve(&tls, public, &provisioner, house, stop.clone()).await;
    reloading.abort();
    tidying.abort();
    keeping.abort();
    if let Some(scraping) = scraping {
        // A listener that ended without a stop ends everything.
        if !*stop.borrow() {
            scraping.abort();
        }
        let _ = scraping.await;
    }
    // What it waits for may never answer; the last checkpoint has a limit of its own.
    watching.abort();
    let served = served.map_err(|e| e.to_string());
    record_stop(audit, &served).await;
    keeper.close().await;
    served
}

fn audit_keeper(config: &DaemonConfig, auditor: &Arc<Auditor>, hsm: &Hsm, registry: &Registry) -> AuditCheckpointer {
    let rules = CheckpointRules { entries: config.audit.checkpoint_entries, every: config.audit.checkpoint_every };
    AuditCheckpointer::new(Arc::clone(auditor), hsm.clone(), config.registry.key.clone(), registry.clone(), rules)
}

/// Takes over what the configuration says of rules and quotas. What needs the approval of another officer stays as it was, and is
/// said: a daemon that did not start for it could not be asked for that approval.
async fn settle(desk: &AccessControl, config: &DaemonConfig, audit: &AuditLog) -> Result<(), String> {
    let settled = desk.settle(config.approvals, config.stations.quotas(), false).await;
    for kept in settled.map_err(|e| e.to_string())? {
        tracing::warn!(%kept, "the configuration is not in force as a whole");
        let entry = Entry::new("sppd", "config.settle", Outcome::Refused(kept));
        audit.record(entry).await.map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// A daemon whose start cannot be recorded does not start: nothing that it does could be.
async fn record_start(audit: &AuditLog, config: &DaemonConfig) -> Result<(), String> {
    let entry = Entry::new("sppd", "start", Outcome::Done)
        .with("version", env!("CARGO_PKG_VERSION"))
        .with("configuration", hex::encode(config.fingerprint))
        .with("keys", hex::encode(config.hsms.keys().fingerprint()))
        .with("profiles", config.profiles.keys().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        .with("stations", config.stations.count());
    audit.record(entry).await.map(drop).map_err(|e| e.to_string())
}

async fn record_stop(audit: &AuditLog, served: &Result<(), String>) {
    let outcome = served.clone().map_or_else(Outcome::Failed, |()| Outcome::Done);
    if let Err(error) = audit.record(Entry::new("sppd", "stop", outcome)).await {
        tracing::error!(%error, "the stop is not in the audit log");
    }
}

fn open_state(config: &DaemonConfig) -> Result<Arc<SledStateStore>, String> {
    let store = &config.store;
    SledStateStore::open(&store.state, &store.state_options).map(Arc::new).map_err(|e| e.to_string())
}

/// Opens the public database. One with fewer records than the state store knows to be published is an old copy as a whole, with an
/// index that fits it: nothing is put on top of it.
async fn open_registry(config: &DaemonConfig, hsm: &Hsm, journal: &Journal) -> Result<Registry, String> {
    let (store, registry) = (&config.store, &config.registry);
    let signer = HsmSigner::new(hsm.clone(), registry.key.name.clone(), registry.key.key.clone());
    let settings = registry.settings.clone();
    let log = TransparencyLog::open(&store.public, &store.public_options, Arc::new(signer), settings).await;
    let registry = Registry::new(Arc::new(log.map_err(|e| e.to_string())?));
    let records = registry.count().await.map_err(|e| e.to_string())?;
    let sessions = journal.counts().await.map_err(|e| e.to_string())?;
    let published = sessions.published + sessions.erased;
    match published.saturating_sub(records) {
        lost if lost > config.registry.accepted_loss => Err(format!(
            "the public database in {} has {records} records, and {published} devices were published: it is an old copy; put the \
             newest one in its place, or accept the loss with accepted_loss = {lost} in [registry]",
            store.public.display()
        )),
        _ => Ok(registry),
    }
}

/// True once SIGTERM or SIGINT came.
fn stop_on_signal() -> Result<watch::Receiver<bool>, String> {
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| e.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| e.to_string())?;
    let (sender, stop) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: calls in flight are finished, nothing new is accepted");
        notify(&[NotifyState::Stopping]);
        let _ = sender.send(true);
    });
    Ok(stop)
}

/// SIGHUP: the configuration is read again. How that ended is in the log and on record.
fn reload_on_signal(reloader: Arc<Reloader>) -> Result<JoinHandle<()>, String> {
    let mut hang_up = signal(SignalKind::hangup()).map_err(|e| e.to_string())?;
    Ok(tokio::spawn(async move {
        while hang_up.recv().await.is_some() {
            notify(&[NotifyState::Reloading]);
            if let Err(error) = reloader.reload("sppd").await {
                tracing::error!(%error, "SIGHUP changed nothing");
            }
            notify(&[NotifyState::Ready]);
        }
    }))
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd could not be told");
    }
}

/// What `--check` tells: everything that serving would need, without listening.
async fn check(config: DaemonConfig) -> Result<(), String> {
    println!("configuration  valid: {} profiles, {} stations", config.profiles.len(), config.stations.count());
    for (name, profile) in &config.profiles {
        println!("profile        {name}: {}", profile.description());
    }
    let keys = config.hsms.keys();
    let hsm = Hsm::start(config.hsms.clone());
    for (member, of) in hsm.each().zip(config.hsms.members()) {
        println!("module         {} ({})", of.module.name, of.module.library.display());
        // Served would be with any of them; what is to be checked is that all are as they should be.
        hsm.at(member).ready(CHECK_LIMIT).await.map_err(|e| e.to_string())?;
    }
    for status in hsm.status().members {
        println!("HSM            {}, token {} ({})", status.module, status.token_label, status.token_serial);
    }
    for key in &keys.signing {
        // That of an offline root is imported later.
        let fits =
            if key.certificate.exists() { "signs and fits its certificate" } else { "signs, has no certificate yet" };
        println!("signing key    {}: {}, {fits}", key.name, key.public_key.kind());
    }
    for key in &keys.log {
        println!("log key        {}: signs the checkpoints of {}", key.name, key.key.origin());
    }
    for key in &keys.master {
        println!("master key     {}: version {}, check value right", key.name, key.version);
    }
    let secrets = open_state(&config)?;
    let journal = Journal::new(secrets.clone());
    let registry = open_registry(&config, &hsm, &journal).await?;
    let (free, floor) = journal.room().map_err(|e| e.to_string())?;
    let unfinished = journal.unfinished().await.map_err(|e| e.to_string())?.len();
    let records = registry.count().await.map_err(|e| e.to_string())?;
    println!("state store    {}: {unfinished} unfinished sessions", config.store.state.display());
    println!("public         {}: {records} records", config.store.public.display());
    let (node, key) = (config.node.clone(), config.registry.key.key.clone());
    let published = published_checkpoints(&config.store.public.display().to_string(), &key, &node)?;
    let trust = Trust {
        key: Some(key),
        authorities: keys.access_keys(),
        published: Some(published),
        given_up: config.audit.accepted_loss.into_iter().collect(),
    };
    let verified = audit::verify_with(&config.audit.directory, &trust).map_err(|e| e.to_string())?;
    println!("audit log      {}: {verified}", config.audit.directory.display());
    let batches = secrets.batches().await.map_err(|e| e.to_string())?;
    for (kind, marks) in &config.key_pool.pools {
        let of_kind = batches.iter().filter(|batch| batch.purpose == Purpose::Pool(*kind));
        let ready: u64 = of_kind.map(Batch::offered).sum();
        println!("pool           {kind}: {ready} pairs ready, kept between {} and {}", marks.low, marks.high);
    }
    println!("disk           {free} bytes free, new devices need {floor}");
    if free < floor {
        return Err("the disk has less room than the floor: no new device would be accepted".to_owned());
    }
    println!("everything is right");
    Ok(())
}
