//! `sppctl hsm`: what an HSM has, whether it is fit, how fast it is, and how the daemon's own is doing.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::ProgressBar;
use serde_json::json;

use super::hsm_file::HsmFile;
use super::pool_cli::DaemonArgs;
use super::status::{connect_and_ask, hsm_json};
use crate::certificate::{KeyPairRule, Profile};
use crate::config::pin_refusals;
use crate::hsm::{
    Inventory, ModuleProfile, Needs, PinAttempts, PinSource, Prf, SelfTestReport, TokenIdentity, examine,
};
use crate::keys::KeyKind;
use crate::names::ProfileName;
use crate::proto;

/// The HSM.
#[derive(Subcommand)]
pub enum HsmCommand {
    /// List slots and tokens. Nobody logs in.
    Slots {
        /// Which module.
        #[command(flatten)]
        module: ModuleArgs,
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// List the mechanisms of a token, with key sizes and uses. Nobody logs in.
    Mechanisms {
        /// Which module.
        #[command(flatten)]
        module: ModuleArgs,
        /// The token's label; the first slot without it.
        #[arg(long)]
        label: Option<String>,
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Examine an HSM: does it do what the products need, does it keep what it promises, how many devices an hour can it make? What
    /// it makes for that it takes away again. A module that has one process at a time must not serve a daemon meanwhile.
    Check {
        /// Which module.
        #[command(flatten)]
        module: ModuleArgs,
        /// The token's label.
        #[arg(long, required_unless_present = "hsm")]
        label: Option<String>,
        /// File with the user PIN, readable by nobody else. Without it the PIN is asked for.
        #[arg(long, value_name = "FILE", conflicts_with = "hsm")]
        pin_file: Option<PathBuf>,
        /// The products' profiles: a directory of NAME.toml. Without it everything is examined that any product could need.
        #[arg(long, value_name = "DIR")]
        products: Option<PathBuf>,
        /// Leave out a kind of key that no product needs, for example rsa-4096, of which a pair takes seconds. May be repeated.
        #[arg(long, value_name = "KIND", conflicts_with = "products")]
        skip: Vec<KeyKind>,
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Tell how the running daemon's HSM is, or each of several: worker, calls by verb and result, how long they take.
    Status {
        /// Which daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Let the daemon try the PIN again, after a wrong one: put the right one into its file first. The daemon may run meanwhile.
    RetryPin {
        /// The daemon's configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Which HSM, where the daemon has several.
        #[arg(long, value_name = "NAME")]
        hsm: Option<String>,
    },
}

/// A PKCS#11 module.
#[derive(Args)]
pub struct ModuleArgs {
    /// The module's profile, one of hsm-config/*.toml.
    #[arg(long, value_name = "FILE", required_unless_present = "hsm", conflicts_with = "hsm")]
    profile: Option<PathBuf>,
    /// The module's own directory: {directory} in its profile.
    #[arg(long, value_name = "DIR", default_value = ".")]
    directory: PathBuf,
    /// A ceremony's hsm.toml instead: it names module, directory, token and PIN.
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
            (None, None) => Err("give --profile or --hsm".to_owned()),
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
    /// Does it; what is told goes to standard output. Progress goes to standard error where that is a terminal.
    pub fn run(self) -> Result<(), String> {
        match self {
            Self::Slots { module, json } => slots(&entered(&module)?, json),
            Self::Mechanisms { module, label, json } => mechanisms(&entered(&module)?, label.as_deref(), json),
            Self::Check { module, label, pin_file, products, skip, json } => {
                let profile = entered(&module)?;
                let (token, pin) = module.token(label.as_deref(), pin_file)?;
                check(&profile, &token, &pin, products.as_deref(), &skip, json)
            }
            Self::Status { daemon } => status(&daemon),
            Self::RetryPin { config, hsm } => retry_pin(&config, hsm.as_deref()),
        }
    }
}

/// The module, in a process with its environment.
fn entered(module: &ModuleArgs) -> Result<ModuleProfile, String> {
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

fn right(table: &mut Table, columns: &[usize]) {
    for column in columns {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

fn slots(profile: &ModuleProfile, json: bool) -> Result<(), String> {
    let survey = Inventory::of(profile).map_err(|e| e.to_string())?;
    let slots = survey.slots().map_err(|e| e.to_string())?;
    if json {
        println!("{:#}", json!({ "module": survey.description, "slots": slots }));
        return Ok(());
    }
    println!("{}", survey.description);
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
    let survey = Inventory::of(profile).map_err(|e| e.to_string())?;
    let mechanisms = survey.mechanisms(label).map_err(|e| e.to_string())?;
    if json {
        println!("{:#}", json!({ "module": survey.description, "mechanisms": mechanisms }));
        return Ok(());
    }
    println!("{}: {} mechanisms that PKCS#11 names", survey.description, mechanisms.len());
    let mut rows = table(&["mechanism", "key sizes", "uses"]);
    for mechanism in &mechanisms {
        let sizes = match mechanism.key_sizes {
            (0, 0) => String::new(),
            (least, most) if least == most => least.to_string(),
            (least, most) => format!("{least}-{most}"),
        };
        rows.add_row([mechanism.name.clone(), sizes, mechanism.uses.join(", ")]);
    }
    right(&mut rows, &[1]);
    println!("{rows}");
    Ok(())
}

fn check(
    profile: &ModuleProfile,
    token: &TokenIdentity,
    pin: &PinSource,
    products: Option<&Path>,
    skip: &[KeyKind],
    json: bool,
) -> Result<(), String> {
    let products = products.map_or_else(|| Ok(BTreeMap::new()), load_products)?;
    let mut needs = if products.is_empty() { Needs::everything() } else { needs_of(products.values()) };
    needs.signing.retain(|kind| !skip.contains(kind));
    needs.pairs.retain(|kind| !skip.contains(kind));
    let bar = if std::io::stderr().is_terminal() && !json { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    bar.enable_steady_tick(Duration::from_millis(100));
    let found = examine(profile, token, pin, &needs, |what| bar.set_message(what.to_owned()));
    bar.finish_and_clear();
    let found = found.map_err(|e| e.to_string())?;
    let rates: Vec<_> = products.values().map(|product| (product.name().to_string(), rate(&found, product))).collect();
    if json {
        let rates: BTreeMap<_, _> = rates.iter().map(|(name, rate)| (name, rate.devices_per_hour())).collect();
        println!("{:#}", json!({ "fit": found.is_fit(), "examination": found, "devices_per_hour": rates }));
    } else {
        print_examination(&found, &rates);
    }
    match found.is_fit() {
        true => Ok(()),
        false => Err(format!(
            "{} of {} things are not as the products need them",
            found.findings.iter().filter(|finding| finding.trouble.is_some()).count(),
            found.findings.len()
        )),
    }
}

fn print_examination(found: &SelfTestReport, rates: &[(String, Rate)]) {
    println!("{}, token {}", found.module, found.token);
    let mut rows = table(&["", "what", "takes", "needed for"]);
    for finding in &found.findings {
        let took = finding.microseconds.map(|us| format!("{:.2} ms", us as f64 / 1000.0)).unwrap_or_default();
        let mark = if finding.trouble.is_none() { "ok" } else { "NO" };
        rows.add_row([mark, &finding.what, &took, finding.needed_for]);
    }
    right(&mut rows, &[2]);
    println!("{rows}");
    for finding in &found.findings {
        if let Some(trouble) = &finding.trouble {
            println!("\n{}:\n  {trouble}", finding.what);
        }
    }
    if !rates.is_empty() {
        println!("\nWith {} threads, at most:", found.threads);
        let mut rows = table(&["profile", "HSM time of a device", "devices an hour", ""]);
        for (name, rate) in rates {
            let (time, devices) = match rate.time {
                Some(time) => (format!("{:.2} ms", time.as_secs_f64() * 1e3), rate.devices_per_hour().to_string()),
                None => (String::new(), "none".to_owned()),
            };
            rows.add_row([name.clone(), time, devices, rate.of.clone()]);
        }
        right(&mut rows, &[1, 2]);
        println!("{rows}");
    }
}

/// What one device of a product takes of the HSM.
struct Rate {
    /// Missing if something that it needs does not work.
    time: Option<Duration>,
    threads: usize,
    /// In words.
    of: String,
}

impl Rate {
    fn devices_per_hour(&self) -> u64 {
        let Some(time) = self.time.filter(|time| !time.is_zero()) else { return 0 };
        (self.threads as f64 * 3600.0 / time.as_secs_f64()) as u64
    }
}

/// The verbs that one device costs: those of its assembly, and the making of a pair that came from a pool.
fn rate(found: &SelfTestReport, product: &Profile) -> Rate {
    let mut verbs = vec!["random".to_owned()];
    verbs.push(format!("sign {}", issuer_kind(product)));
    match product.key_pair() {
        KeyPairRule::Generate { kind } => verbs.push(format!("pair {kind}")),
        KeyPairRule::Pool { kind, .. } => verbs.extend([format!("pair {kind}"), format!("rewrap {kind}")]),
        KeyPairRule::Csr { .. } | KeyPairRule::None => {}
    }
    let keys = product.symmetric_keys().len();
    let derive = ["derive hmac-sha-256", "derive aes-cmac"].iter().find_map(|verb| found.took(verb));
    let derive = derive.map(|one| one * u32::try_from(keys).unwrap_or(u32::MAX));
    let time = verbs.iter().map(|verb| found.took(verb)).sum::<Option<Duration>>();
    let time = time.and_then(|time| if keys == 0 { Some(time) } else { Some(time + derive?) });
    let of = format!("{}{}", verbs.join(", "), if keys == 0 { String::new() } else { format!(", {keys} x derive") });
    Rate { time, threads: found.threads, of }
}

/// A profile says how its issuer signs, or leaves it to the issuer, which is P-256 unless a ceremony says otherwise.
fn issuer_kind(product: &Profile) -> KeyKind {
    let algorithm = product.signature();
    let fitting =
        |algorithm: crate::keys::SignatureAlgorithm| KeyKind::ALL.into_iter().find(|kind| algorithm.fits(*kind));
    algorithm.and_then(fitting).unwrap_or(KeyKind::P256)
}

fn needs_of<'a>(products: impl Iterator<Item = &'a Profile>) -> Needs {
    // Every public database has a log, and its checkpoints are signed with Ed25519.
    let mut needs = Needs { signing: [KeyKind::Ed25519].into(), prfs: vec![Prf::HmacSha256], ..Needs::default() };
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
        true => Err(format!("{} has no profile: NAME.toml", directory.display())),
        false => Ok(products),
    }
}

fn status(daemon: &DaemonArgs) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    let status = runtime.block_on(connect_and_ask(&daemon.server, &daemon.tls, None)).map_err(|e| e.to_string())?;
    let hsm = status.hsm.unwrap_or_default();
    if daemon.json {
        println!("{:#}", hsm_json(&hsm));
        return Ok(());
    }
    println!("queue     {} of {} places taken", hsm.calls_in_flight, hsm.queue);
    let several = hsm.members.len() > 1;
    for one in &hsm.members {
        if several {
            println!("\nHSM       {}", one.name);
        }
        match one.ready {
            true => println!("ready     {}, token {} ({})", one.module, one.token_label, one.token_serial),
            false => println!("NOT ready {}", one.trouble),
        }
        let (starts, answered, in_flight) = (one.worker_starts, one.calls_answered, one.calls_in_flight);
        let background = one.background_calls_in_flight;
        println!(
            "worker    {starts} starts, {answered} calls answered, {in_flight} in flight, {background} in the background"
        );
        if !one.calls.is_empty() {
            println!("{}", calls_table(&one.calls));
        }
    }
    Ok(())
}

fn calls_table(calls: &[proto::HsmCalls]) -> Table {
    let mut rows = table(&["verb", "result", "calls", "mean", "half take at most"]);
    for call in calls {
        let mean = call.microseconds as f64 / call.count.max(1) as f64 / 1000.0;
        let median = match call.median_microseconds {
            us if us == u64::from(u32::MAX) => "longer".to_owned(),
            us => format!("{:.2} ms", us as f64 / 1000.0),
        };
        rows.add_row([call.verb.clone(), call.result.clone(), call.count.to_string(), format!("{mean:.2} ms"), median]);
    }
    right(&mut rows, &[2, 3, 4]);
    rows
}

fn retry_pin(config: &Path, hsm: Option<&str>) -> Result<(), String> {
    let all = pin_refusals(config).map_err(|e| e.to_string())?;
    if let Some(name) = hsm.filter(|name| all.iter().all(|(known, _)| known != name)) {
        let known = all.into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(", ");
        return Err(format!("there is no HSM {name} in {}; it has {known}", config.display()));
    }
    let several = all.len() > 1;
    let mut allowed = false;
    for (name, path) in all.into_iter().filter(|(name, _)| hsm.is_none_or(|hsm| hsm == name)) {
        let Some(refused) = PinAttempts::new(path).allow().map_err(|e| e.to_string())? else { continue };
        allowed = true;
        println!(
            "the PIN was refused{}: {refused}",
            if several { format!(" by the HSM {name}") } else { String::new() }
        );
    }
    match allowed {
        true => println!("it may be tried once more; a PIN that was typed or is a credential needs a restart of sppd"),
        false => println!("no PIN was refused; there is nothing to do"),
    }
    Ok(())
}
