//! `sppctl`: what a security officer does.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use spp::audit::{self, AuditLog};
use spp::certificate::{AccessName, Caller};
use spp::config::{AuditConfig, HsmAccess, StoreConfig};
use spp::description::Describe;
use spp::hsm::{Ceremony, KeyRegister, ModuleProfile, PinSource, initialise_token};
use spp::names::{AuditorName, BackOfficeName, MonitorName, OfficerName, StationName};
use spp::officer::{
    self, CeremonyPlan, Enrolment, Held, HsmCommand, HsmFile, PoolCommand, ReadAuditCommand, RegistryCommand,
};
use spp::registry::TransparencyLog;
use spp::store::SledStateStore;
use spp::tlog::{LogKey, TlogError};

/// The security officer's tool: tokens, key ceremonies, stores, enrolment, status.
#[derive(Parser)]
#[command(
    name = "sppctl",
    version,
    after_help = "From nothing to a running daemon:\n  \
    sppctl token init --module hsm-config/softhsm2.toml --directory hsm --label spp --so-pin-file so.pin --pin-file user.pin\n  \
    sppctl ceremony run ceremony.toml --hsm hsm.toml --out keys\n  \
    sppctl init --config sppd.toml\n  \
    sppctl server enroll --config sppd.toml --dns spp.example --out tls/server\n  \
    sppctl station enroll line-1/a --config sppd.toml --out tls/line-1-a\n  \
    sppctl officer enroll o-1 --config sppd.toml --out tls/officer\n  \
    sppd --config sppd.toml\n  \
    sppctl status --server https://127.0.0.1:7444 --tls tls/officer"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tokens of an HSM.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Key ceremonies: keys made inside the HSM.
    #[command(subcommand)]
    Ceremony(CeremonyCommand),
    /// Make the state store, the public database and the audit log. The daemon never does, so that a wrong path cannot start a second truth.
    Init {
        /// The daemon's configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// The audit log of officers' acts.
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Assembly-line stations.
    #[command(subcommand)]
    Station(StationCommand),
    /// Security officers.
    #[command(subcommand)]
    Officer(OfficerCommand),
    /// Make a TLS key where it will be used, and a request for its certificate: the key need not travel. Needs no HSM.
    Request {
        /// Where key.pem and request.pem go, and later certificate.pem and ca.pem.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Auditors: they read everything and change nothing.
    #[command(subcommand)]
    Auditor(AuditorCommand),
    /// Systems of the back office.
    #[command(subcommand)]
    BackOffice(BackOfficeCommand),
    /// Monitors: they see whether everything is well.
    #[command(subcommand)]
    Monitor(MonitorCommand),
    /// The daemon's own TLS certificate.
    #[command(subcommand)]
    Server(ServerCommand),
    /// Key pairs that are made in advance.
    #[command(subcommand)]
    Pool(PoolCommand),
    /// The public database: its index, mirrors of it, and looking at it as a stranger would.
    #[command(subcommand)]
    Registry(RegistryCommand),
    /// The HSM: what it has, whether it is fit, how fast it is.
    #[command(subcommand)]
    Hsm(HsmCommand),
    #[command(flatten)]
    Describe(Describe),
    /// Tell how the running daemon is.
    Status {
        /// The officer listener, https://HOST:PORT.
        #[arg(long, value_name = "URL")]
        server: String,
        /// The officer's directory with certificate.pem, key.pem and ca.pem.
        #[arg(long, value_name = "DIR")]
        tls: PathBuf,
        /// Wait so long until the line is served, for example 30s.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        wait: Option<Duration>,
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand)]
enum TokenCommand {
    /// Initialise a free token: label, security officer's PIN, user PIN. The PINs are read from files.
    Init {
        /// The module's profile, hsm-config/*.toml.
        #[arg(long, value_name = "FILE")]
        module: PathBuf,
        /// The module's own directory: {directory} in its profile.
        #[arg(long, value_name = "DIR", default_value = ".")]
        directory: PathBuf,
        /// The new token's label, 1 to 32 characters.
        #[arg(long)]
        label: String,
        /// File with the security officer's PIN, readable by nobody else.
        #[arg(long, value_name = "FILE")]
        so_pin_file: PathBuf,
        /// File with the user PIN, readable by nobody else.
        #[arg(long, value_name = "FILE")]
        pin_file: PathBuf,
    },
}

#[derive(Subcommand)]
enum CeremonyCommand {
    /// Make the keys that the file names. Nothing is overwritten; attributes are read back; a transcript is written.
    Run {
        /// The ceremony file.
        file: PathBuf,
        /// Which token: hsm.toml.
        #[arg(long, value_name = "FILE")]
        hsm: PathBuf,
        /// Where keys.toml, the certificates or CSRs and the transcript go.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// File with the security officer's PIN, for a ceremony that initialises its token.
        #[arg(long, value_name = "FILE")]
        so_pin_file: Option<PathBuf>,
        /// File with the user PIN, instead of the one that hsm.toml names.
        #[arg(long, value_name = "FILE")]
        pin_file: Option<PathBuf>,
        /// An officer who holds the ceremony, for the transcript; may be given more than once.
        #[arg(long, value_name = "NAME")]
        officer: Vec<OfficerName>,
        /// Tell the transcript as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Tell what a ceremony would make. Nothing is changed; with --hsm and --out it is looked whether all names are free.
    Plan {
        /// The ceremony file.
        file: PathBuf,
        /// Which token: hsm.toml.
        #[arg(long, value_name = "FILE", requires = "out")]
        hsm: Option<PathBuf>,
        /// Where the files would go.
        #[arg(long, value_name = "DIR", requires = "hsm")]
        out: Option<PathBuf>,
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Verify the transcript of a ceremony against the log's public key, and the JSON beside it.
    Verify {
        /// transcript.txt.
        file: PathBuf,
        /// The log's public key, NAME.vkey of the ceremony.
        #[arg(long, value_name = "FILE")]
        log: PathBuf,
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand)]
enum AuditCommand {
    /// Make the audit log alone, for a site whose stores exist already. `sppctl init` makes it together with them.
    Init {
        /// The daemon's configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    #[command(flatten)]
    Read(ReadAuditCommand),
    /// Read the whole log and tell whether its chain is whole, or where it breaks. The daemon may run meanwhile.
    Verify {
        /// The daemon's configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand)]
enum StationCommand {
    /// Make a station's key and TLS certificate (URI SAN spp://station/NAME).
    Enroll {
        /// The station's name, line-3/a for example.
        name: StationName,
        #[command(flatten)]
        common: EnrollArgs,
    },
}

#[derive(Subcommand)]
enum OfficerCommand {
    /// Make an officer's key and TLS certificate (URI SAN spp://officer/NAME).
    Enroll {
        /// The officer's name, o-17 for example.
        name: OfficerName,
        #[command(flatten)]
        common: EnrollArgs,
    },
}

#[derive(Subcommand)]
enum AuditorCommand {
    /// Make an auditor's key and TLS certificate (URI SAN spp://auditor/NAME).
    Enroll {
        /// The auditor's name.
        name: AuditorName,
        #[command(flatten)]
        common: EnrollArgs,
    },
}

#[derive(Subcommand)]
enum BackOfficeCommand {
    /// Make the key and TLS certificate of a system of the back office (URI SAN spp://back-office/NAME).
    Enroll {
        /// The system's name.
        name: BackOfficeName,
        #[command(flatten)]
        common: EnrollArgs,
    },
}

#[derive(Subcommand)]
enum MonitorCommand {
    /// Make a monitor's key and TLS certificate (URI SAN spp://monitor/NAME).
    Enroll {
        /// The monitor's name.
        name: MonitorName,
        #[command(flatten)]
        common: EnrollArgs,
    },
}

#[derive(Subcommand)]
enum ServerCommand {
    /// Make the daemon's key and TLS certificate.
    Enroll {
        /// A DNS name of the daemon; may be given more than once.
        #[arg(long, value_name = "NAME")]
        dns: Vec<String>,
        /// An IP address of the daemon; may be given more than once.
        #[arg(long, value_name = "ADDRESS")]
        ip: Vec<IpAddr>,
        #[command(flatten)]
        common: EnrollArgs,
    },
}

#[derive(Args)]
struct EnrollArgs {
    /// The daemon's configuration; its hsm section says where the access key is.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Where certificate.pem, key.pem and ca.pem go.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// A certificate request (PKCS#10, PEM) of whoever has made the key, by `sppctl request` for example; without it a key is made here.
    #[arg(long, value_name = "FILE")]
    csr: Option<PathBuf>,
    /// Which of several HSMs signs; the first one without it.
    #[arg(long, value_name = "NAME")]
    hsm: Option<String>,
    /// File with the user PIN, instead of the daemon's own source of it.
    #[arg(long, value_name = "FILE")]
    pin_file: Option<PathBuf>,
    /// Days until the certificate ends.
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    days: u32,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    spp::process::forbid_core_dumps();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("sppctl: {}", message.trim_end());
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), String> {
    match command {
        Command::Token(TokenCommand::Init { module, directory, label, so_pin_file, pin_file }) => {
            token_init(&module, &directory, &label, so_pin_file, pin_file)
        }
        Command::Ceremony(CeremonyCommand::Run { file, hsm, out, so_pin_file, pin_file, officer, json }) => {
            ceremony(&file, (&hsm, so_pin_file, pin_file), &out, &officer, json)
        }
        Command::Ceremony(CeremonyCommand::Plan { file, hsm, out, json }) => {
            ceremony_plan(&file, hsm.as_deref().zip(out.as_deref()), json)
        }
        Command::Ceremony(CeremonyCommand::Verify { file, log, json }) => ceremony_verify(&file, &log, json),
        Command::Init { config } => init(&config),
        Command::Audit(AuditCommand::Init { config }) => audit_init(&config),
        Command::Audit(AuditCommand::Read(what)) => what.run(),
        Command::Audit(AuditCommand::Verify { config, json }) => audit_verify(&config, json),
        Command::Station(StationCommand::Enroll { name, common }) => {
            enroll(AccessName::Client(Caller::Station(name)), common)
        }
        Command::Request { out } => request(&out),
        Command::Describe(what) => what.run(Cli::command()),
        Command::Auditor(AuditorCommand::Enroll { name, common }) => {
            enroll(AccessName::Client(Caller::Auditor(name)), common)
        }
        Command::BackOffice(BackOfficeCommand::Enroll { name, common }) => {
            enroll(AccessName::Client(Caller::BackOffice(name)), common)
        }
        Command::Monitor(MonitorCommand::Enroll { name, common }) => {
            enroll(AccessName::Client(Caller::Monitor(name)), common)
        }
        Command::Officer(OfficerCommand::Enroll { name, common }) => {
            enroll(AccessName::Client(Caller::Officer(name)), common)
        }
        Command::Server(ServerCommand::Enroll { dns, ip, common }) => {
            if dns.is_empty() && ip.is_empty() {
                return Err("give at least one --dns or --ip, else no client can verify the daemon".to_owned());
            }
            enroll(AccessName::Server { dns, ips: ip }, common)
        }
        Command::Pool(command) => pool(command),
        Command::Registry(command) => command.run(),
        Command::Hsm(command) => command.run(),
        Command::Status { server, tls, wait, json } => status(&server, &tls, wait, json),
    }
}

fn token_init(
    module: &Path,
    directory: &Path,
    label: &str,
    so_pin_file: PathBuf,
    pin_file: PathBuf,
) -> Result<(), String> {
    let directory = std::path::absolute(directory).map_err(|e| e.to_string())?;
    let profile = ModuleProfile::load(module, &directory).map_err(|e| e.to_string())?;
    profile.enter_environment().map_err(|e| e.to_string())?;
    let token = initialise_token(&profile, label, &PinSource::File(so_pin_file), &PinSource::File(pin_file))?;
    println!("initialised the token {} (serial {})", token.label, token.serial);
    Ok(())
}

fn open_token(hsm: &Path) -> Result<Ceremony, String> {
    let hsm = HsmFile::load(hsm).map_err(|e| e.to_string())?;
    hsm.module.enter_environment().map_err(|e| e.to_string())?;
    Ceremony::open(&hsm.module, &hsm.token, &hsm.pin).map_err(|e| e.to_string())
}

/// The token of a ceremony, initialised if its file says so.
fn token_of(
    plan: &CeremonyPlan,
    hsm: &Path,
    so_pin_file: Option<PathBuf>,
    pin_file: Option<PathBuf>,
) -> Result<Ceremony, String> {
    let hsm = HsmFile::load(hsm).map_err(|e| e.to_string())?;
    let pin = pin_file.map_or(hsm.pin, PinSource::File);
    hsm.module.enter_environment().map_err(|e| e.to_string())?;
    let opened = match (plan.token_label(), so_pin_file) {
        (None, None) => Ceremony::open(&hsm.module, &hsm.token, &pin),
        (None, Some(_)) => return Err("--so-pin-file is for a ceremony that has a [token]; leave it out".to_owned()),
        (Some(_), None) => return Err("the ceremony initialises its token: give --so-pin-file".to_owned()),
        (Some(label), Some(_)) if label != hsm.token.label => {
            return Err(format!("the ceremony is for a token {label}, hsm.toml for {}", hsm.token.label));
        }
        (Some(label), Some(so_pin)) => Ceremony::initialise(&hsm.module, label, &PinSource::File(so_pin), &pin),
    };
    opened.map_err(|e| e.to_string())
}

fn ceremony_plan(file: &Path, on: Option<(&Path, &Path)>, json: bool) -> Result<(), String> {
    let plan = CeremonyPlan::load(file).map_err(|e| e.to_string())?;
    if let Some((hsm, out)) = on {
        if plan.token_label().is_some() {
            return Err(
                "the ceremony initialises its token, which is not there yet; leave --hsm and --out out".to_owned()
            );
        }
        plan.look(&open_token(hsm)?, out).map_err(|e| e.to_string())?;
    }
    let acts = plan.acts(on.map(|(_, out)| out)).map_err(|e| e.to_string())?;
    if json {
        let told = serde_json::json!({
            "token": plan.token_label(),
            "keys": acts,
            "needs_approval": plan.needs_approval(),
            "looked_at_the_token": on.is_some(),
        });
        println!("{told:#}");
        return Ok(());
    }
    if let Some(label) = plan.token_label() {
        println!("  would initialise the token {label}");
    }
    for act in &acts {
        let files: String = act.files.iter().map(|file| format!(", {}", file.display())).collect();
        println!("  would {} {:<16} {:<14} {}{files}", act.act, act.name, act.kind, act.what);
    }
    if !plan.needs_approval().is_empty() {
        println!("it {}: a second officer must approve it", plan.needs_approval().join(" and "));
    }
    match on {
        Some(_) => println!("all names and files are free; nothing was changed"),
        None => println!("nothing was looked at but the file; add --hsm and --out to see whether all names are free"),
    }
    Ok(())
}

fn ceremony_verify(file: &Path, log: &Path, json: bool) -> Result<(), String> {
    let key = std::fs::read_to_string(log).map_err(|e| format!("{}: {e}", log.display()))?;
    let key: LogKey = key.trim().parse().map_err(|e: TlogError| format!("{}: {e}", log.display()))?;
    let verified = officer::verify_transcript(file, &key).map_err(|e| e.to_string())?;
    match json {
        true => println!("{}", serde_json::to_string_pretty(&verified).map_err(|e| e.to_string())?),
        false => print!("{}", verified.text),
    }
    let beside = file.with_extension("json");
    if verified.json_fits == Some(false) {
        return Err(format!("{} is not the file that the signed text names: it was changed", beside.display()));
    }
    if !json {
        let beside = if verified.json_fits.is_some() { format!("; {} fits", beside.display()) } else { String::new() };
        println!("signed by the key of {}{beside}", verified.signed_by);
    }
    Ok(())
}

fn ceremony(
    file: &Path,
    (hsm, so_pin_file, pin_file): (&Path, Option<PathBuf>, Option<PathBuf>),
    out: &Path,
    officers: &[OfficerName],
    json: bool,
) -> Result<(), String> {
    let plan = CeremonyPlan::load(file).map_err(|e| e.to_string())?;
    let token = token_of(&plan, hsm, so_pin_file, pin_file)?;
    let Held { transcript: report, signed } = plan.run(&token, out, officers, None).map_err(|e| e.to_string())?;
    if !signed {
        eprintln!("sppctl: the transcript is not signed: the token has no log key");
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(|e| e.to_string())?);
        return Ok(());
    }
    println!("token {} (serial {}), {}", report.token_label, report.token_serial, report.module);
    for key in &report.keys {
        println!("  {} {:<16} {}", key.act, key.name, key.fingerprint);
    }
    for path in &report.files {
        println!("  wrote {}", path.display());
    }
    Ok(())
}

fn init(config: &Path) -> Result<(), String> {
    let store = StoreConfig::load(config).map_err(|e| e.to_string())?;
    SledStateStore::create(&store.state, &store.state_options).map_err(|e| e.to_string())?;
    println!("made the state store {}", store.state.display());
    TransparencyLog::create(&store.public, &store.public_options).map_err(|e| e.to_string())?;
    println!("made the public database {}", store.public.display());
    audit_init(config)
}

fn audit_init(config: &Path) -> Result<(), String> {
    let audit = AuditConfig::load(config).map_err(|e| e.to_string())?;
    AuditLog::create(&audit.directory).map_err(|e| e.to_string())?;
    println!("made the audit log {}", audit.directory.display());
    Ok(())
}

fn audit_verify(config: &Path, json: bool) -> Result<(), String> {
    let audit = AuditConfig::load(config).map_err(|e| e.to_string())?;
    let found = audit::verify(&audit.directory);
    if json {
        println!("{:#}", audit::verified_json(&found));
    }
    let verified = found.map_err(|e| e.to_string())?;
    if !json {
        println!("{verified}");
    }
    Ok(())
}

fn request(out: &Path) -> Result<(), String> {
    for path in officer::request(out).map_err(|e| e.to_string())? {
        println!("wrote {}", path.display());
    }
    println!(
        "an officer makes the certificate: sppctl station enroll NAME --csr request.pem …; put certificate.pem and ca.pem beside key.pem"
    );
    Ok(())
}

fn enroll(name: AccessName, args: EnrollArgs) -> Result<(), String> {
    let access = HsmAccess::load(&args.config, args.hsm.as_deref(), args.pin_file).map_err(|e| e.to_string())?;
    let register = KeyRegister::load(&access.keys).map_err(|e| e.to_string())?;
    access.module.enter_environment().map_err(|e| e.to_string())?;
    let enrolment = Enrolment { name, days: args.days, out: args.out, csr: args.csr };
    for path in officer::enroll(&access, &register, &enrolment).map_err(|e| e.to_string())? {
        println!("wrote {}", path.display());
    }
    Ok(())
}

fn pool(command: PoolCommand) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    runtime.block_on(command.run()).map_err(|e| e.to_string())
}

fn status(server: &str, tls: &Path, wait: Option<Duration>, json: bool) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    let status = runtime.block_on(officer::connect_and_ask(server, tls, wait)).map_err(|e| e.to_string())?;
    if json {
        println!("{:#}", officer::status_json(&status));
    } else {
        print!("{}", officer::describe_status(&status));
    }
    Ok(())
}
