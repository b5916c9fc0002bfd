//! `sppd`: the daemon.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{CommandFactory as _, Parser};
use clap_complete::Shell;
use sd_notify::NotifyState;
use spp::access::AccessControl;
use spp::audit::{AuditCheckpointer, AuditLog, Auditor, CheckpointRules, Entry, Outcome};
use spp::clock::Clock;
use spp::config::DaemonConfig;
use spp::hsm::{Hsm, PinAgent, PinSource, pin_agent, worker};
use spp::keypool::KeyPool;
use spp::logging::{self, LogLevel};
use spp::provisioning::{Policy, Provisioner, recovery_loop};
use spp::registry::{HsmSigner, TransparencyLog};
use spp::server::{
    ActiveTls, Listening, Metrics, MetricsSources, NodeInfo, OfficerContext, Public, ReloadTargets, Reloader,
};
use spp::store::{Batch, Journal, Purpose, Registry, SecretStore, SledStateStore};
use spp_log::audit::Trust;
use spp_log::registry::published_checkpoints;
use spp_program::cli_docs;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Secure processing point: provisions devices on an assembly line with identity and keys.
#[derive(Parser)]
#[command(
    name = "sppd",
    version,
    after_help = "Exit status: 78 (EX_CONFIG) if the configuration is invalid, before any socket is opened; 1 for other errors."
)]
struct Cli {
    /// Path of the configuration file, sppd.toml.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["completions", "man"])]
    config: Option<PathBuf>,
    /// Check the configuration, the HSM with its keys and the stores, print the findings, and exit.
    #[arg(long)]
    check: bool,
    /// Print shell completions and exit.
    #[arg(long, value_name = "SHELL", exclusive = true)]
    completions: Option<Shell>,
    /// Write the man page to a directory and exit.
    #[arg(long, value_name = "DIR", exclusive = true)]
    man: Option<PathBuf>,
}

/// How long `--check` waits for the HSM.
const CHECK_LIMIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    match std::env::args_os().nth(1) {
        Some(argument) if argument == worker::ARGUMENT => return exit_code(worker::run()),
        Some(argument) if argument == pin_agent::ARGUMENT => return exit_code(pin_agent::run()),
        _ => {}
    }
    let cli = Cli::parse();
    let undumpable = spp_program::hardening::forbid_core_dumps();
    let locked = spp_program::hardening::lock_memory();
    if let Some(shell) = cli.completions {
        return exit_code(cli_docs::completions(shell, Cli::command()).map_err(|e| e.to_string()));
    }
    if let Some(dir) = cli.man {
        return exit_code(cli_docs::man(&dir, Cli::command()).map_err(|e| e.to_string()));
    }
    let Some(path) = cli.config else { return exit_code(Err("missing option: --config FILE".to_owned())) };
    let mut config = match DaemonConfig::load(&path) {
        Ok(config) => config,
        Err(faults) => {
            eprint!("sppd: invalid configuration:\n{faults}");
            return ExitCode::from(78);
        }
    };
    let log = logging::start(&config.log);
    if let Err(message) = ask_for_pins(&mut config) {
        return exit_code(Err(message));
    }
    if !undumpable {
        tracing::warn!("core dumps not disabled: set LimitCORE=0, or ulimit -c 0");
    }
    if !locked {
        tracing::debug!("memory not locked: set LimitMEMLOCK=infinity if the host has swap");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let result = runtime.map_err(|e| e.to_string()).and_then(|runtime| {
        let result = runtime
            .block_on(async { if cli.check { check(config).await } else { serve(Start { path, config, log }).await } });
        runtime.shutdown_timeout(Duration::from_secs(5));
        result
    });
    exit_code(result)
}

/// Prompts for the PINs that are not configured.
fn ask_for_pins(config: &mut DaemonConfig) -> Result<(), String> {
    let several = config.hsms.members().len() > 1;
    for hsm in config.hsms.members_mut().iter_mut().filter(|hsm| hsm.pin == PinSource::Prompt) {
        if several {
            eprintln!("HSM {}:", hsm.name);
        }
        let agent = PinAgent::start(&hsm.worker_program).map_err(|e| e.to_string())?;
        hsm.pin_agent = Some(Arc::new(agent));
    }
    Ok(())
}

fn exit_code(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("sppd: {message}");
            ExitCode::FAILURE
        }
    }
}

/// The configuration read at startup, and what a reload needs.
struct Start {
    path: PathBuf,
    config: DaemonConfig,
    log: LogLevel,
}

/// Opens the audit log and the listeners, then serves until shutdown.
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
    tracing::info!("drained, exiting");
    served
}

/// Starts the HSM workers, opens the public database, recovers from a crash, serves, and drains.
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
    let checkpointer = Arc::new(audit_checkpointer(&config, &auditor, &hsm, &registry));
    checkpointer.compare(config.audit.accepted_loss).await?;
    checkpointer.import_offline_events().await.map_err(|e| e.to_string())?;
    // Only now: otherwise each refused start would lengthen a truncated log, until it had its expected number of entries again.
    record_start(audit, &config).await?;
    let access = AccessControl::open(state.clone(), hsm.clone(), config.authority.clone(), &config.node).await;
    let access = Arc::new(access.map_err(|e| e.to_string())?);
    apply_configured_limits(&access, &config, audit).await?;
    let (rules, clock) = (config.key_pool.clone(), Clock::system());
    let pool = KeyPool::new(hsm.clone(), state.clone(), journal.clone(), registry.clone(), rules, clock);
    let pool_task = tokio::spawn(Arc::clone(&pool).run());
    let lifetime = config.session_lifetime;
    let provisioner = Arc::new(Provisioner::new(hsm, journal, registry, pool, state, Policy::new(&config), lifetime));
    let recovery_task = tokio::spawn({
        let provisioner = Arc::clone(&provisioner);
        async move { recovery_loop(&provisioner).await }
    });
    let stop = stop_on_signal()?;
    let public = Public::new(Arc::clone(&provisioner), &config.public, &config.registry);
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let node = NodeInfo { name: config.node.clone(), started };
    let (tls, listen) = (ActiveTls::new(&config.tls), config.listen);
    let (devices, recorded) = (Arc::clone(&provisioner), Arc::clone(audit));
    let targets = ReloadTargets { provisioner: devices, access: Arc::clone(&access), tls: tls.clone(), log };
    let reloader = Arc::new(Reloader::new(path, config, targets, recorded));
    let reload_task = reload_on_signal(Arc::clone(&reloader))?;
    tracing::info!(line = %listen.line, officer = %listen.officer, public = %listen.public, node = %node.name, "listening");
    notify(&[NotifyState::Ready]);
    let checkpoint_task = tokio::spawn({
        let (checkpointer, stop) = (Arc::clone(&checkpointer), stop.clone());
        async move { checkpointer.run(stop).await }
    });
    let sources = MetricsSources { provisioner: Arc::clone(&provisioner), auditor: Arc::clone(&auditor) };
    let metrics_task = metrics.map(|metrics| tokio::spawn(metrics.serve(sources, stop.clone())));
    let context = OfficerContext { node, auditor, access_control: access, reloader };
    let served = listening.serve(&tls, public, &provisioner, context, stop.clone()).await;
    reload_task.abort();
    recovery_task.abort();
    pool_task.abort();
    if let Some(metrics_task) = metrics_task {
        // A listener that fails stops the daemon.
        if !*stop.borrow() {
            metrics_task.abort();
        }
        let _ = metrics_task.await;
    }
    // Abort, because the HSM may never answer; the last checkpoint has its own time limit.
    checkpoint_task.abort();
    let served = served.map_err(|e| e.to_string());
    record_stop(audit, &served).await;
    checkpointer.close().await;
    served
}

fn audit_checkpointer(
    config: &DaemonConfig,
    auditor: &Arc<Auditor>,
    hsm: &Hsm,
    registry: &Registry,
) -> AuditCheckpointer {
    let rules = CheckpointRules { entries: config.audit.checkpoint_entries, every: config.audit.checkpoint_every };
    AuditCheckpointer::new(Arc::clone(auditor), hsm, config.registry.key.clone(), registry.clone(), rules)
}

/// Applies the configured approval rules and quotas. A change that needs another officer's approval is logged and not applied.
/// The daemon starts all the same, because officers need it to give that approval.
async fn apply_configured_limits(
    access: &AccessControl,
    config: &DaemonConfig,
    audit: &AuditLog,
) -> Result<(), String> {
    let applied = access.apply(config.approvals, config.stations.quotas(), false).await;
    for refusal in applied.map_err(|e| e.to_string())? {
        tracing::warn!(%refusal, "configured rule or quota not applied");
        let entry = Entry::new("sppd", "config.apply", Outcome::Refused(refusal));
        audit.record(entry).await.map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Records the start. If this fails, the daemon does not start, because it could not record any action.
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
        tracing::error!(%error, "stop not recorded in the audit log");
    }
}

fn open_state(config: &DaemonConfig) -> Result<Arc<SledStateStore>, String> {
    let store = &config.store;
    SledStateStore::open(&store.state, &store.state_options).map(Arc::new).map_err(|e| e.to_string())
}

/// Opens the public database. If it has fewer records than the state store has published sessions, it is an old copy: refuse to
/// append to it. The index of an old copy matches it, so only the count reveals it.
async fn open_registry(config: &DaemonConfig, hsm: &Hsm, journal: &Journal) -> Result<Registry, String> {
    let (store, registry) = (&config.store, &config.registry);
    let signer = HsmSigner::new(hsm, registry.key.clone());
    let settings = registry.settings.clone();
    let log = TransparencyLog::open(&store.public, &store.public_options, Arc::new(signer), settings).await;
    let registry = Registry::new(Arc::new(log.map_err(|e| e.to_string())?));
    let records = registry.len().await.map_err(|e| e.to_string())?;
    let sessions = journal.counts().await.map_err(|e| e.to_string())?;
    let published = sessions.published + sessions.erased;
    match published.saturating_sub(records) {
        lost if lost > config.registry.accepted_loss => Err(format!(
            "the public database in {} has {records} records, but {published} devices were published: it is an old copy; restore the \
             newest copy, or accept the loss with accepted_loss = {lost} in [registry]",
            store.public.display()
        )),
        _ => Ok(registry),
    }
}

/// Becomes true on SIGTERM or SIGINT.
fn stop_on_signal() -> Result<watch::Receiver<bool>, String> {
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| e.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| e.to_string())?;
    let (sender, stop) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: finishing calls in progress, accepting no new ones");
        notify(&[NotifyState::Stopping]);
        let _ = sender.send(true);
    });
    Ok(stop)
}

/// Reloads the configuration on SIGHUP. The result is in the log and in the audit log.
fn reload_on_signal(reloader: Arc<Reloader>) -> Result<JoinHandle<()>, String> {
    let mut hang_up = signal(SignalKind::hangup()).map_err(|e| e.to_string())?;
    Ok(tokio::spawn(async move {
        while hang_up.recv().await.is_some() {
            notify(&[NotifyState::Reloading]);
            if let Err(error) = reloader.reload("sppd").await {
                tracing::error!(%error, "reload on SIGHUP failed");
            }
            notify(&[NotifyState::Ready]);
        }
    }))
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "notifying systemd failed");
    }
}

/// Runs `--check`: verifies everything that serving needs, without listening.
async fn check(config: DaemonConfig) -> Result<(), String> {
    println!("configuration  valid: {} profiles, {} stations", config.profiles.len(), config.stations.count());
    for (name, profile) in &config.profiles {
        println!("profile        {name}: {}", profile.description());
    }
    let keys = config.hsms.keys();
    let hsm = Hsm::start(config.hsms.clone());
    for (member, config) in hsm.members().zip(config.hsms.members()) {
        println!("module         {} ({})", config.module.name, config.module.library.display());
        // Serving needs only one HSM; `--check` requires all of them.
        hsm.pinned_to(member).ready(CHECK_LIMIT).await.map_err(|e| e.to_string())?;
    }
    for status in hsm.status().members {
        println!("HSM            {}, token {} ({})", status.module, status.token_label, status.token_serial);
    }
    for key in &keys.signing {
        // The certificate of an offline root is imported later.
        let finding =
            if key.certificate.exists() { "signs, matches its certificate" } else { "signs, has no certificate yet" };
        println!("signing key    {}: {}, {finding}", key.name, key.public_key.kind());
    }
    for key in &keys.log {
        println!("log key        {}: signs the checkpoints of {}", key.name, key.key.origin());
    }
    for key in &keys.master {
        println!("master key     {}: version {}, check value matches", key.name, key.version);
    }
    let secrets = open_state(&config)?;
    let journal = Journal::new(secrets.clone());
    let registry = open_registry(&config, &hsm, &journal).await?;
    let (free, floor) = journal.disk_space().map_err(|e| e.to_string())?;
    let unfinished = journal.unfinished().await.map_err(|e| e.to_string())?.len();
    let records = registry.len().await.map_err(|e| e.to_string())?;
    println!("state store    {}: {unfinished} unfinished sessions", config.store.state.display());
    println!("public         {}: {records} records", config.store.public.display());
    let (node, key) = (config.node.clone(), config.registry.key.key.clone());
    let published = published_checkpoints(&config.store.public.display().to_string(), &key, &node)?;
    let trust = Trust {
        key: Some(key),
        authorities: keys.access_keys(),
        published: Some(published),
        accepted_losses: config.audit.accepted_loss.into_iter().collect(),
    };
    let verified = spp_log::audit::verify_with(&config.audit.directory, &trust).map_err(|e| e.to_string())?;
    println!("audit log      {}: {verified}", config.audit.directory.display());
    let batches = secrets.batches().await.map_err(|e| e.to_string())?;
    for (kind, marks) in &config.key_pool.pools {
        let of_kind = batches.iter().filter(|batch| batch.purpose == Purpose::Pool(*kind));
        let ready: u64 = of_kind.map(Batch::available).sum();
        println!("pool           {kind}: {ready} pairs ready, low mark {}, high mark {}", marks.low, marks.high);
    }
    println!("disk           {free} bytes free, new devices require {floor}");
    if free < floor {
        return Err("free disk space is below the floor: no new device would be accepted".to_owned());
    }
    println!("all checks passed");
    Ok(())
}
