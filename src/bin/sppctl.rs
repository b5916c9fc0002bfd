//! `sppctl`, the security officer's command-line tool: argument parsing and dispatch.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use spp::audit::AuditLog;
use spp::config::{AuditConfig, HsmAccess, StoreConfig};
use spp::hsm::{KeyManifest, ModuleProfile, PinSource, initialise_token};
use spp::officer::{
    self, ApprovalsCommand, CeremonyCommand, DaemonArgs, DeviceCommand, Enrolment, HsmCommand, IdentitiesCommand,
    PoolCommand, ReadAuditCommand, RegistryCommand, RenewArgs, ReportCommand, RequestArgs, SessionsCommand,
    StatusError, VerifyAuditArgs,
};
use spp::registry::TransparencyLog;
use spp::store::SledStateStore;
use spp_format::certificate::{AccessName, Caller, Role};
use spp_format::names::{AuditorName, BackOfficeName, MonitorName, NameError, OfficerName, StationName};
use spp_program::cli_docs::CliDocs;

/// Administer the secure processing point: tokens, key ceremonies, stores, certificates, approvals, status.
#[derive(Parser)]
#[command(
    name = "sppctl",
    version,
    after_help = "First installation, from an empty HSM to a running daemon:\n  \
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
    /// Initialise HSM tokens.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Run key ceremonies: create, back up, rotate, restore and destroy keys in the HSM.
    #[command(subcommand)]
    Ceremony(CeremonyCommand),
    /// Create the state store, the public database and the audit log. The daemon never creates them, so that a wrong path cannot
    /// start a second, empty database.
    Init {
        /// Configuration file of the daemon.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read, export, copy and verify the audit log.
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Request, list, approve and reject actions that need more than one officer.
    #[command(subcommand)]
    Approvals(ApprovalsCommand),
    /// Load and list the device identities that the daemon assigns.
    #[command(subcommand)]
    Identities(IdentitiesCommand),
    /// Renew the caller's own TLS certificate before it expires. Every role may call it.
    Renew(RenewArgs),
    /// Enrol, list and revoke assembly-line stations.
    #[command(subcommand)]
    Station(CallerCommand<StationName>),
    /// Enrol, list and revoke security officers.
    #[command(subcommand)]
    Officer(CallerCommand<OfficerName>),
    /// Generate a TLS key and a certificate request (PKCS#10) on the machine that uses the key. Needs no HSM.
    Request {
        /// Output directory for key.pem and request.pem; put certificate.pem and ca.pem there later.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Enrol, list and revoke auditors (read-only access).
    #[command(subcommand)]
    Auditor(CallerCommand<AuditorName>),
    /// Enrol, list and revoke back-office systems.
    #[command(subcommand)]
    BackOffice(CallerCommand<BackOfficeName>),
    /// Enrol, list and revoke monitors (read status, pools and production numbers).
    #[command(subcommand)]
    Monitor(CallerCommand<MonitorName>),
    /// Issue the daemon's own TLS certificate.
    #[command(subcommand)]
    Server(ServerCommand),
    /// Show, fill and shred the pools of pregenerated key pairs.
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Report production numbers.
    #[command(subcommand)]
    Report(ReportCommand),
    /// Show one device.
    #[command(subcommand)]
    Device(DeviceCommand),
    /// List and abort device sessions.
    #[command(subcommand)]
    Sessions(SessionsCommand),
    /// Reindex, mirror and verify the public database.
    #[command(subcommand)]
    Registry(RegistryCommand),
    /// List, test and monitor the HSM.
    #[command(subcommand)]
    Hsm(HsmCommand),
    #[command(flatten)]
    CliDocs(CliDocs),
    /// Reload the daemon's configuration: profiles, stations, TLS, log level. All changes take effect, or none.
    Reload {
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Show daemon status.
    Status {
        /// URL of the daemon's officer listener, https://HOST:PORT.
        #[arg(long, value_name = "URL")]
        server: String,
        /// Directory with the officer's certificate.pem, key.pem and ca.pem.
        #[arg(long, value_name = "DIR")]
        tls: PathBuf,
        /// Wait up to this long until the daemon serves the line, for example 30s.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        wait: Option<Duration>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand)]
enum TokenCommand {
    /// Initialise an uninitialised token: set its label, SO PIN and user PIN. PINs are read from files.
    Init {
        /// PKCS#11 module profile, one of hsm-config/*.toml.
        #[arg(long, value_name = "FILE")]
        module: PathBuf,
        /// Module directory, substituted for {directory} in the profile.
        #[arg(long, value_name = "DIR", default_value = ".")]
        directory: PathBuf,
        /// Label of the new token, 1 to 32 characters.
        #[arg(long)]
        label: String,
        /// File with the SO PIN; must be readable by its owner only (mode 0400 or 0600).
        #[arg(long, value_name = "FILE")]
        so_pin_file: PathBuf,
        /// File with the user PIN; must be readable by its owner only (mode 0400 or 0600).
        #[arg(long, value_name = "FILE")]
        pin_file: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand)]
enum AuditCommand {
    /// Create only the audit log, for a site whose stores already exist. `sppctl init` creates all three.
    Init {
        /// Configuration file of the daemon.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    #[command(flatten)]
    Read(ReadAuditCommand),
    /// Copy the daemon's audit log, to read and verify it elsewhere. Run it again to append new entries to the copy.
    Fetch {
        /// Directory of the copy.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Verify the whole audit log: its hash chain, its signed checkpoints and officers' statements, and its completeness against
    /// the checkpoints in the public database. The daemon may be running.
    Verify(VerifyAuditArgs),
}

/// Commands for the callers of one role; `N` is the role's name type.
#[derive(Subcommand)]
enum CallerCommand<N>
where
    N: FromStr<Err = NameError> + Clone + Send + Sync + 'static,
{
    /// Issue a TLS certificate (URI SAN spp://ROLE/NAME), for a new key or for a certificate request.
    Enroll {
        /// Name of the caller, for example line-3/a for a station, o-17 for an officer.
        name: N,
        #[command(flatten)]
        common: EnrollArgs,
    },
    /// List certificates and revocations; for stations also quotas and devices begun.
    List {
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Request approval to revoke all current certificates of a caller. Calls on open connections are refused as well.
    Revoke {
        /// Name of the caller.
        name: String,
        /// Reason, recorded in the audit log.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        #[command(flatten)]
        ask: RequestArgs,
    },
}

impl<N> CallerCommand<N>
where
    N: FromStr<Err = NameError> + Clone + Send + Sync + 'static,
{
    fn run(self, role: Role, caller: fn(N) -> Caller) -> Result<(), String> {
        match self {
            Self::Enroll { name, common } => enroll(AccessName::Client(caller(name)), common),
            Self::List { daemon } => run_call(officer::list_callers(role, &daemon)),
            Self::Revoke { name, reason, ask } => run_call(officer::revoke(role, &name, reason, &ask)),
        }
    }
}

#[derive(Subcommand)]
enum ServerCommand {
    /// Issue the daemon's TLS certificate, signed on the token.
    Enroll {
        /// DNS name of the daemon; repeatable.
        #[arg(long, value_name = "NAME")]
        dns: Vec<String>,
        /// IP address of the daemon; repeatable.
        #[arg(long, value_name = "ADDRESS")]
        ip: Vec<IpAddr>,
        #[command(flatten)]
        common: EnrollArgs,
    },
}

#[derive(Args)]
struct EnrollArgs {
    /// Configuration file of the daemon: sign on the token named in its hsm section.
    #[arg(long, value_name = "FILE", required_unless_present = "server", conflicts_with = "server")]
    config: Option<PathBuf>,
    /// URL of the daemon's officer listener, https://HOST:PORT: let the running daemon sign.
    #[arg(long, value_name = "URL", requires = "tls")]
    server: Option<String>,
    /// Directory with the officer's certificate.pem, key.pem and ca.pem, for --server.
    #[arg(long, value_name = "DIR", requires = "server")]
    tls: Option<PathBuf>,
    /// Output directory for certificate.pem, ca.pem and, without --csr, key.pem.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Certificate request (PKCS#10, PEM), for example of `sppctl request`. If omitted, a key is generated here.
    #[arg(long, value_name = "FILE")]
    csr: Option<PathBuf>,
    /// Name of the HSM that signs, if the configuration has several [default: the first].
    #[arg(long, value_name = "NAME")]
    hsm: Option<String>,
    /// File with the user PIN, instead of the PIN source in the configuration.
    #[arg(long, value_name = "FILE")]
    pin_file: Option<PathBuf>,
    /// Validity of the certificate in days.
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    days: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    spp_program::hardening::forbid_core_dumps();
    // The process handles PINs and shares of backup keys.
    spp_program::hardening::lock_memory();
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
        Command::Token(TokenCommand::Init { module, directory, label, so_pin_file, pin_file, json }) => {
            token_init(&module, &directory, &label, (so_pin_file, pin_file), json)
        }
        Command::Ceremony(command) => block_on(command.run())?,
        Command::Init { config, json } => init(&config, json),
        Command::Audit(AuditCommand::Init { config, json }) => audit_init(&config, json),
        Command::Audit(AuditCommand::Read(command)) => command.run(),
        Command::Audit(AuditCommand::Fetch { out, daemon }) => run_call(officer::fetch_audit(&out, &daemon)),
        Command::Audit(AuditCommand::Verify(args)) => args.run(),
        Command::Station(command) => command.run(Role::Station, Caller::Station),
        Command::Request { out, json } => request(&out, json),
        Command::CliDocs(docs) => docs.run(Cli::command()),
        Command::Auditor(command) => command.run(Role::Auditor, Caller::Auditor),
        Command::BackOffice(command) => command.run(Role::BackOffice, Caller::BackOffice),
        Command::Monitor(command) => command.run(Role::Monitor, Caller::Monitor),
        Command::Officer(command) => command.run(Role::Officer, Caller::Officer),
        Command::Server(ServerCommand::Enroll { dns, ip, common }) => {
            if dns.is_empty() && ip.is_empty() {
                return Err("no name for the server certificate: give at least one --dns or --ip".to_owned());
            }
            enroll(AccessName::Server { dns, ips: ip }, common)
        }
        Command::Approvals(command) => run_call(command.run()),
        Command::Identities(command) => run_call(command.run()),
        Command::Renew(args) => run_call(officer::renew(args)),
        Command::Pool(command) => run_call(command.run()),
        Command::Reload { daemon } => run_call(officer::reload(daemon)),
        Command::Report(command) => block_on(command.run())?,
        Command::Device(command) => block_on(command.run())?,
        Command::Sessions(command) => block_on(command.run())?,
        Command::Registry(command) => command.run(),
        Command::Hsm(command) => command.run(),
        Command::Status { server, tls, wait, json } => status(&server, &tls, wait, json),
    }
}

fn token_init(
    module: &Path,
    directory: &Path,
    label: &str,
    (so_pin_file, pin_file): (PathBuf, PathBuf),
    json: bool,
) -> Result<(), String> {
    let directory = std::path::absolute(directory).map_err(|e| e.to_string())?;
    let profile = ModuleProfile::load(module, &directory).map_err(|e| e.to_string())?;
    profile.enter_environment().map_err(|e| e.to_string())?;
    let token = initialise_token(&profile, label, &PinSource::File(so_pin_file), &PinSource::File(pin_file))?;
    match json {
        true => println!("{:#}", serde_json::json!({ "token_label": token.label, "token_serial": token.serial })),
        false => println!("initialised token {} (serial {})", token.label, token.serial),
    }
    Ok(())
}

fn init(config: &Path, json: bool) -> Result<(), String> {
    let store = StoreConfig::load(config).map_err(|e| e.to_string())?;
    SledStateStore::create(&store.state, &store.state_options).map_err(|e| e.to_string())?;
    print_created("state store", &store.state, json);
    TransparencyLog::create(&store.public, &store.public_options).map_err(|e| e.to_string())?;
    print_created("public database", &store.public, json);
    audit_init(config, json)
}

fn audit_init(config: &Path, json: bool) -> Result<(), String> {
    let audit = AuditConfig::load(config).map_err(|e| e.to_string())?;
    AuditLog::create(&audit.directory).map_err(|e| e.to_string())?;
    print_created("audit log", &audit.directory, json);
    Ok(())
}

/// Prints each created directory at once, because creating a later one may fail.
fn print_created(what: &str, directory: &Path, json: bool) {
    match json {
        true => println!("{}", serde_json::json!({ "made": what, "directory": directory })),
        false => println!("created {what} {}", directory.display()),
    }
}

fn request(out: &Path, json: bool) -> Result<(), String> {
    let paths = officer::request(out).map_err(|e| e.to_string())?;
    officer::print_written(&paths, json);
    if !json {
        println!(
            "next: an officer runs sppctl station enroll NAME --csr request.pem …; copy certificate.pem and ca.pem to {}",
            out.display()
        );
    }
    Ok(())
}

fn enroll(name: AccessName, args: EnrollArgs) -> Result<(), String> {
    if let (AccessName::Client(caller), Some(server), Some(tls)) = (&name, &args.server, &args.tls) {
        return run_call(async {
            let csr = args.csr.as_deref();
            let paths = officer::enroll_via_daemon(server, tls, caller, csr, args.days, &args.out).await?;
            officer::print_written(&paths, args.json);
            Ok(())
        });
    }
    let config = args.config.ok_or("the daemon's own certificate can only be signed on the token: give --config")?;
    let audit = AuditConfig::load(&config).map_err(|e| e.to_string())?;
    let access = HsmAccess::load(&config, args.hsm.as_deref(), args.pin_file).map_err(|e| e.to_string())?;
    let manifest = KeyManifest::load(&access.keys).map_err(|e| e.to_string())?;
    access.module.enter_environment().map_err(|e| e.to_string())?;
    let enrolment = Enrolment { name, days: args.days, out: args.out, csr: args.csr };
    let paths = officer::record_offline(&audit.directory, enrolment.describe(), || {
        officer::enroll(&access, &manifest, &enrolment).map_err(|e| e.to_string())
    });
    officer::print_written(&paths?, args.json);
    Ok(())
}

/// Runs a call to the daemon to completion.
fn run_call(call: impl Future<Output = Result<(), StatusError>>) -> Result<(), String> {
    block_on(call)?.map_err(|e| e.to_string())
}

/// Runs a future to completion on a single-threaded runtime.
fn block_on<T>(call: impl Future<Output = T>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    Ok(runtime.block_on(call))
}

fn status(server: &str, tls: &Path, wait: Option<Duration>, json: bool) -> Result<(), String> {
    let status = block_on(officer::fetch_status(server, tls, wait))?.map_err(|e| e.to_string())?;
    if json {
        println!("{:#}", officer::status_json(&status));
    } else {
        print!("{}", officer::describe_status(&status));
    }
    Ok(())
}
