//! `sppctl hsm`: lists slots and mechanisms, tests an HSM, shows the status of the daemon's HSMs.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::ProgressBar;
use serde_json::json;
use spp_format::certificate::{KeyPairRule, Profile};
use spp_format::keys::KeyType;
use spp_format::names::ProfileName;
use spp_proto as proto;

use super::hsm_file::HsmFile;
use super::pool_cli::DaemonArgs;
use super::status::{fetch_status, hsm_json};
use crate::config::pin_refusals;
use crate::hsm::{
    HsmRequirements, Inventory, ModuleProfile, PinAttempts, PinSource, Prf, SelfTestReport, TokenIdentity,
    run_self_test,
};

/// List, test and monitor the HSM.
#[derive(Subcommand)]
pub enum HsmCommand {
    /// List slots and tokens, without login.
    Slots {
        /// PKCS#11 module.
        #[command(flatten)]
        module: ModuleArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// List the mechanisms of a token with key sizes and uses, without login.
    Mechanisms {
        /// PKCS#11 module.
        #[command(flatten)]
        module: ModuleArgs,
        /// Label of the token [default: the token in the first slot].
        #[arg(long)]
        label: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Test an HSM: required mechanisms, key attributes, and the number of devices per hour. Test keys are destroyed afterwards.
    /// Stop the daemon first if the module supports only one process.
    Check {
        /// PKCS#11 module.
        #[command(flatten)]
        module: ModuleArgs,
        /// Label of the token.
        #[arg(long, required_unless_present = "hsm")]
        label: Option<String>,
        /// File with the user PIN; must be readable by its owner only (mode 0600) [default: prompt].
        #[arg(long, value_name = "FILE", conflicts_with = "hsm")]
        pin_file: Option<PathBuf>,
        /// Directory of profiles, NAME.toml: test only what they need [default: test everything that a profile can need].
        #[arg(long, value_name = "DIR")]
        products: Option<PathBuf>,
        /// Skip a key type that no profile needs, for example rsa-4096, whose generation takes seconds; repeatable.
        #[arg(long, value_name = "TYPE", conflicts_with = "products")]
        skip: Vec<KeyType>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show the status of the daemon's HSMs: worker, calls by operation and result, latency in ms.
    Status {
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Allow the daemon one more PIN attempt after a refused PIN. Correct the PIN file first. The daemon may be running.
    RetryPin {
        /// Configuration file of the daemon.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Name of the HSM, if the configuration has several [default: all].
        #[arg(long, value_name = "NAME")]
        hsm: Option<String>,
    },
}

/// Selects a PKCS#11 module.
#[derive(Args)]
pub struct ModuleArgs {
    /// PKCS#11 module profile, one of hsm-config/*.toml.
    #[arg(long, value_name = "FILE", required_unless_present = "hsm", conflicts_with = "hsm")]
    profile: Option<PathBuf>,
    /// Module directory, substituted for {directory} in the profile.
    #[arg(long, value_name = "DIR", default_value = ".")]
    directory: PathBuf,
    /// hsm.toml of a ceremony, which names module, directory, token and PIN file, instead of --profile and --directory.
    #[arg(long, value_name = "FILE")]
    hsm: Option<PathBuf>,
}

impl ModuleArgs {
    fn module(&self) -> Result<ModuleProfile, String> {
        match (&self.profile, &self.hsm) {
            (Some(profile), _) => {
                let directory = std::path::absolute(&self.directory).map_err(|e| e.to_string())?;
                ModuleProfile::load(profile, &directory).map_err(|e| e.to_string())
            }
            (None, Some(hsm)) => Ok(HsmFile::load(hsm).map_err(|e| e.to_string())?.module),
            (None, None) => Err("no PKCS#11 module given: use --profile FILE or --hsm FILE".to_owned()),
        }
    }

    fn token(&self, label: Option<&str>, pin_file: Option<PathBuf>) -> Result<(TokenIdentity, PinSource), String> {
        if let Some(hsm) = &self.hsm {
            let hsm = HsmFile::load(hsm).map_err(|e| e.to_string())?;
            return Ok((hsm.token, hsm.pin));
        }
        let token = TokenIdentity { label: label.unwrap_or_default().to_owned(), serial: String::new() };
        Ok((token, pin_file.map_or(PinSource::Prompt, PinSource::File)))
    }
}

impl HsmCommand {
    /// Runs the command. Results go to standard output; progress goes to standard error if that is a terminal.
    pub fn run(self) -> Result<(), String> {
        match self {
            Self::Slots { module, json } => slots(&load_module(&module)?, json),
            Self::Mechanisms { module, label, json } => mechanisms(&load_module(&module)?, label.as_deref(), json),
            Self::Check { module, label, pin_file, products, skip, json } => {
                let profile = load_module(&module)?;
                let (token, pin) = module.token(label.as_deref(), pin_file)?;
                check(&profile, &token, &pin, products.as_deref(), &skip, json)
            }
            Self::Status { daemon } => status(&daemon),
            Self::RetryPin { config, hsm } => retry_pin(&config, hsm.as_deref()),
        }
    }
}

/// Loads the module profile and sets its environment variables in this process.
fn load_module(module: &ModuleArgs) -> Result<ModuleProfile, String> {
    let module = module.module()?;
    module.enter_environment().map_err(|e| e.to_string())?;
    Ok(module)
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header);
    table
}

fn right_align(table: &mut Table, columns: &[usize]) {
    for column in columns {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

fn slots(profile: &ModuleProfile, json: bool) -> Result<(), String> {
    let inventory = Inventory::of(profile).map_err(|e| e.to_string())?;
    let slots = inventory.slots().map_err(|e| e.to_string())?;
    if json {
        println!("{:#}", json!({ "module": inventory.description, "slots": slots }));
        return Ok(());
    }
    println!("{}", inventory.description);
    let mut rows = table(&["slot", "label", "serial", "model", "state"]);
    for slot in &slots {
        match &slot.token {
            Some(token) => {
                let cells = [&token.label, &token.serial, &token.model, &token.state.join(", ")].map(Clone::clone);
                rows.add_row([vec![slot.slot.to_string()], cells.to_vec()].concat());
            }
            None => {
                rows.add_row([
                    slot.slot.to_string(),
                    String::new(),
                    String::new(),
                    slot.description.clone(),
                    "empty".into(),
                ]);
            }
        }
    }
    println!("{rows}");
    Ok(())
}

fn mechanisms(profile: &ModuleProfile, label: Option<&str>, json: bool) -> Result<(), String> {
    let inventory = Inventory::of(profile).map_err(|e| e.to_string())?;
    let mechanisms = inventory.mechanisms(label).map_err(|e| e.to_string())?;
    if json {
        println!("{:#}", json!({ "module": inventory.description, "mechanisms": mechanisms }));
        return Ok(());
    }
    println!("{}: {} standard PKCS#11 mechanisms", inventory.description, mechanisms.len());
    let mut rows = table(&["mechanism", "key sizes", "uses"]);
    for mechanism in &mechanisms {
        let sizes = match mechanism.key_sizes {
            (0, 0) => String::new(),
            (min, max) if min == max => min.to_string(),
            (min, max) => format!("{min}-{max}"),
        };
        rows.add_row([mechanism.name.clone(), sizes, mechanism.uses.join(", ")]);
    }
    right_align(&mut rows, &[1]);
    println!("{rows}");
    Ok(())
}

fn check(
    profile: &ModuleProfile,
    token: &TokenIdentity,
    pin: &PinSource,
    products: Option<&Path>,
    skip: &[KeyType],
    json: bool,
) -> Result<(), String> {
    let products = products.map_or_else(|| Ok(BTreeMap::new()), load_products)?;
    let mut needs = if products.is_empty() { HsmRequirements::everything() } else { needs_of(products.values()) };
    needs.signing.retain(|kind| !skip.contains(kind));
    needs.pairs.retain(|kind| !skip.contains(kind));
    let bar = if std::io::stderr().is_terminal() && !json { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    bar.enable_steady_tick(Duration::from_millis(100));
    let report = run_self_test(profile, token, pin, &needs, |what| bar.set_message(what.to_owned()));
    bar.finish_and_clear();
    let report = report.map_err(|e| e.to_string())?;
    let rates: Vec<_> = products.values().map(|product| (product.name().to_string(), rate(&report, product))).collect();
    if json {
        let rates: BTreeMap<_, _> = rates.iter().map(|(name, rate)| (name, rate.devices_per_hour())).collect();
        println!("{:#}", json!({ "fit": report.passed(), "examination": report, "devices_per_hour": rates }));
    } else {
        print_report(&report, &rates);
    }
    match report.passed() {
        true => Ok(()),
        false => Err(format!(
            "{} of {} tests failed; see the list above",
            report.findings.iter().filter(|finding| finding.error.is_some()).count(),
            report.findings.len()
        )),
    }
}

fn print_report(report: &SelfTestReport, rates: &[(String, Rate)]) {
    println!("{}, token {}", report.module, report.token);
    let mut rows = table(&["", "test", "time", "needed for"]);
    for finding in &report.findings {
        let took = finding.microseconds.map(|us| format!("{:.2} ms", us as f64 / 1000.0)).unwrap_or_default();
        let mark = if finding.error.is_none() { "ok" } else { "NO" };
        rows.add_row([mark, &finding.what, &took, finding.needed_for]);
    }
    right_align(&mut rows, &[2]);
    println!("{rows}");
    for finding in &report.findings {
        if let Some(error) = &finding.error {
            println!("\n{}:\n  {error}", finding.what);
        }
    }
    if !rates.is_empty() {
        println!("\nEstimated maximum with {} threads:", report.threads);
        let mut rows = table(&["profile", "HSM time per device", "devices per hour", "operations"]);
        for (name, rate) in rates {
            let (time, devices) = match rate.time {
                Some(time) => (format!("{:.2} ms", time.as_secs_f64() * 1e3), rate.devices_per_hour().to_string()),
                None => (String::new(), "none".to_owned()),
            };
            rows.add_row([name.clone(), time, devices, rate.operations.clone()]);
        }
        right_align(&mut rows, &[1, 2]);
        println!("{rows}");
    }
}

/// HSM time that one device of a profile needs.
struct Rate {
    /// `None` if a required operation failed its test.
    time: Option<Duration>,
    threads: usize,
    /// The operations, as text.
    operations: String,
}

impl Rate {
    fn devices_per_hour(&self) -> u64 {
        let Some(time) = self.time.filter(|time| !time.is_zero()) else { return 0 };
        (self.threads as f64 * 3600.0 / time.as_secs_f64()) as u64
    }
}

/// Estimates the HSM time per device: the operations of its assembly and the generation of its pooled key pair.
fn rate(report: &SelfTestReport, product: &Profile) -> Rate {
    let mut operations = vec!["random".to_owned()];
    operations.push(format!("sign {}", issuer_kind(product)));
    match product.key_pair() {
        KeyPairRule::Generate { kind } => operations.push(format!("pair {kind}")),
        KeyPairRule::Pool { kind, .. } => operations.extend([format!("pair {kind}"), format!("rewrap {kind}")]),
        KeyPairRule::Csr { .. } | KeyPairRule::None => {}
    }
    let keys = product.symmetric_keys().len();
    let derive = ["derive hmac-sha-256", "derive aes-cmac"].iter().find_map(|operation| report.took(operation));
    let derive = derive.map(|one| one * u32::try_from(keys).unwrap_or(u32::MAX));
    let time = operations.iter().map(|operation| report.took(operation)).sum::<Option<Duration>>();
    let time = time.and_then(|time| if keys == 0 { Some(time) } else { Some(time + derive?) });
    let operations =
        format!("{}{}", operations.join(", "), if keys == 0 { String::new() } else { format!(", {keys} x derive") });
    Rate { time, threads: report.threads, operations }
}

/// Key type of the issuer: from the profile's signature algorithm, else P-256, the usual type of an issuer.
fn issuer_kind(product: &Profile) -> KeyType {
    let algorithm = product.signature();
    let key_type_for =
        |algorithm: spp_format::keys::SignatureAlgorithm| KeyType::ALL.into_iter().find(|kind| algorithm.fits(*kind));
    algorithm.and_then(key_type_for).unwrap_or(KeyType::P256)
}

fn needs_of<'a>(products: impl Iterator<Item = &'a Profile>) -> HsmRequirements {
    // The checkpoints of every public database are signed with Ed25519.
    let mut needs = HsmRequirements {
        signing: [KeyType::Ed25519].into(),
        prfs: vec![Prf::HmacSha256],
        ..HsmRequirements::default()
    };
    for product in products {
        needs.signing.insert(issuer_kind(product));
        if let KeyPairRule::Generate { kind } | KeyPairRule::Pool { kind, .. } = product.key_pair() {
            needs.pairs.insert(*kind);
        }
    }
    needs
}

fn load_products(directory: &Path) -> Result<BTreeMap<ProfileName, Profile>, String> {
    let mut products = BTreeMap::new();
    let failed = |e: std::io::Error| format!("{}: {e}", directory.display());
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let stem =
            path.file_stem().and_then(|stem| stem.to_str()).filter(|_| path.extension().is_some_and(|e| e == "toml"));
        let Some(stem) = stem else { continue };
        let name: ProfileName = stem.parse().map_err(|e| format!("{}: {e}", path.display()))?;
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let product =
            Profile::from_toml(name.clone(), &path.display().to_string(), &text).map_err(|e| e.to_string())?;
        products.insert(name, product);
    }
    match products.is_empty() {
        true => Err(format!("no profile (NAME.toml) in {}", directory.display())),
        false => Ok(products),
    }
}

fn status(daemon: &DaemonArgs) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    let status = runtime.block_on(fetch_status(&daemon.server, &daemon.tls, None)).map_err(|e| e.to_string())?;
    let hsm = status.hsm.unwrap_or_default();
    if daemon.json {
        println!("{:#}", hsm_json(&hsm));
        return Ok(());
    }
    println!("queue     {} of {} calls in flight", hsm.calls_in_flight, hsm.queue);
    let multiple = hsm.members.len() > 1;
    for member in &hsm.members {
        if multiple {
            println!("\nHSM       {}", member.name);
        }
        match member.ready {
            true => println!("ready     {}, token {} ({})", member.module, member.token_label, member.token_serial),
            false => println!("NOT ready {}", member.error),
        }
        let (starts, answered, in_flight) = (member.worker_starts, member.calls_answered, member.calls_in_flight);
        let background = member.background_calls_in_flight;
        println!(
            "worker    {starts} starts, {answered} calls answered, {in_flight} in flight, {background} background calls"
        );
        if !member.calls.is_empty() {
            println!("{}", calls_table(&member.calls));
        }
    }
    Ok(())
}

fn calls_table(calls: &[proto::HsmCalls]) -> Table {
    let mut rows = table(&["operation", "result", "calls", "mean", "median at most"]);
    for call in calls {
        let mean = call.microseconds as f64 / call.count.max(1) as f64 / 1000.0;
        let median = match call.median_microseconds {
            us if us == u64::from(u32::MAX) => "out of range".to_owned(),
            us => format!("{:.2} ms", us as f64 / 1000.0),
        };
        rows.add_row([
            call.operation.clone(),
            call.result.clone(),
            call.count.to_string(),
            format!("{mean:.2} ms"),
            median,
        ]);
    }
    right_align(&mut rows, &[2, 3, 4]);
    rows
}

fn retry_pin(config: &Path, hsm: Option<&str>) -> Result<(), String> {
    let all = pin_refusals(config).map_err(|e| e.to_string())?;
    if let Some(name) = hsm.filter(|name| all.iter().all(|(known, _)| known != name)) {
        let known = all.into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(", ");
        return Err(format!("no HSM {name} in {}; configured: {known}", config.display()));
    }
    let multiple = all.len() > 1;
    let mut allowed = false;
    for (name, path) in all.into_iter().filter(|(name, _)| hsm.is_none_or(|hsm| hsm == name)) {
        let Some(refused) = PinAttempts::new(path).allow().map_err(|e| e.to_string())? else { continue };
        allowed = true;
        println!("PIN refused{}: {refused}", if multiple { format!(" by HSM {name}") } else { String::new() });
    }
    match allowed {
        true => println!("one more attempt allowed; restart sppd if its PIN was typed or is a systemd credential"),
        false => println!("no PIN was refused; nothing to do"),
    }
    Ok(())
}
