//! `sppctl`: what a security officer does.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use spp::audit::AuditLog;
use spp::certificate::{AccessName, Caller, Role};
use spp::cli_docs::CliDocs;
use spp::config::{AuditConfig, HsmAccess, StoreConfig};
use spp::hsm::{KeyManifest, ModuleProfile, PinSource, initialise_token};
use spp::names::{AuditorName, BackOfficeName, MonitorName, NameError, OfficerName, StationName};
use spp::officer::{
    self, ApprovalsCommand, AskArgs, CeremonyCommand, DaemonArgs, DeviceCommand, Enrolment, HsmCommand,
    IdentitiesCommand, PoolCommand, ReadAuditCommand, RegistryCommand, RenewArgs, ReportCommand, SessionsCommand,
    StatusError, VerifyAuditArgs,
};
use spp::registry::TransparencyLog;
use spp::store::SledStateStore;

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
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// The audit log of officers' acts.
    #[command(subcommand)]
    Audit(AuditCommand),
    /// What one officer asks for and others approve.
    #[command(subcommand)]
    Approvals(ApprovalsCommand),
    /// Identities that the daemon gives out.
    #[command(subcommand)]
    Identities(IdentitiesCommand),
    /// Renew the certificate of whoever calls, before it ends: stations, officers, everybody.
    Renew(RenewArgs),
    /// Assembly-line stations.
    #[command(subcommand)]
    Station(CallerCommand<StationName>),
    /// Security officers.
    #[command(subcommand)]
    Officer(CallerCommand<OfficerName>),
    /// Make a TLS key where it will be used, and a request for its certificate: the key need not travel. Needs no HSM.
    Request {
        /// Where key.pem and request.pem go, and later certificate.pem and ca.pem.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Auditors: they read everything and change nothing.
    #[command(subcommand)]
    Auditor(CallerCommand<AuditorName>),
    /// Systems of the back office.
    #[command(subcommand)]
    BackOffice(CallerCommand<BackOfficeName>),
    /// Monitors: they see whether everything is well.
    #[command(subcommand)]
    Monitor(CallerCommand<MonitorName>),
    /// The daemon's own TLS certificate.
    #[command(subcommand)]
    Server(ServerCommand),
    /// Key pairs that are made in advance.
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Numbers: what was produced.
    #[command(subcommand)]
    Report(ReportCommand),
    /// One device.
    #[command(subcommand)]
    Device(DeviceCommand),
    /// Sessions: devices on their way.
    #[command(subcommand)]
    Sessions(SessionsCommand),
    /// The public database: its index, mirrors of it, and looking at it as a stranger would.
    #[command(subcommand)]
    Registry(RegistryCommand),
    /// The HSM: what it has, whether it is fit, how fast it is.
    #[command(subcommand)]
    Hsm(HsmCommand),
    #[command(flatten)]
    CliDocs(CliDocs),
    /// Have the running daemon read its configuration again: profiles, stations, TLS, log level. All of it takes effect, or nothing.
    Reload {
        /// Which daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
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
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
    #[command(flatten)]
    Read(ReadAuditCommand),
    /// Copy the log of the running daemon, to be read and verified elsewhere; the same again goes on with the copy.
    Fetch {
        /// The copy's directory.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Read the whole log and tell whether its chain is whole and all of it is there: as it was signed, and as the public database
    /// knows it. The daemon may run meanwhile.
    Verify(VerifyAuditArgs),
}

/// What is done with the callers of one role, whose names are of that type.
#[derive(Subcommand)]
enum CallerCommand<N>
where
    N: FromStr<Err = NameError> + Clone + Send + Sync + 'static,
{
    /// Make a key and TLS certificate (URI SAN spp://ROLE/NAME).
    Enroll {
        /// The caller's name: line-3/a for a station, o-17 for an officer, for example.
        name: N,
        #[command(flatten)]
        common: EnrollArgs,
    },
    /// Tell who is known: certificates and revocations; of stations the quotas, too, and what they have begun.
    List {
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Ask other officers to approve that all certificates so far are of no use any more, on open connections too.
    Revoke {
        /// The caller's name.
        name: String,
        /// Why.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        #[command(flatten)]
        ask: AskArgs,
    },
}

impl<N> CallerCommand<N>
where
    N: FromStr<Err = NameError> + Clone + Send + Sync + 'static,
{
    fn run(self, role: Role, caller: fn(N) -> Caller) -> Result<(), String> {
        match self {
            Self::Enroll { name, common } => enroll(AccessName::Client(caller(name)), common),
            Self::List { daemon } => at_daemon(officer::list_callers(role, &daemon)),
            Self::Revoke { name, reason, ask } => at_daemon(officer::revoke(role, &name, reason, &ask)),
        }
    }
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
    /// The daemon's configuration; its hsm section says where the access key is. The certificate is signed here, on the token.
    #[arg(long, value_name = "FILE", required_unless_present = "server", conflicts_with = "server")]
    config: Option<PathBuf>,
    /// The officer listener of the running daemon, https://HOST:PORT, which signs, instead of the token here.
    #[arg(long, value_name = "URL", requires = "tls")]
    server: Option<String>,
    /// The officer's directory with certificate.pem, key.pem and ca.pem, for --server.
    #[arg(long, value_name = "DIR", requires = "server")]
    tls: Option<PathBuf>,
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
    /// Tell it as JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    spp::hardening::forbid_core_dumps();
    // Shares of backup keys and PINs pass through it.
    spp::hardening::lock_memory();
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
        Command::Ceremony(command) => wait(command.run())?,
        Command::Init { config, json } => init(&config, json),
        Command::Audit(AuditCommand::Init { config, json }) => audit_init(&config, json),
        Command::Audit(AuditCommand::Read(what)) => what.run(),
        Command::Audit(AuditCommand::Fetch { out, daemon }) => at_daemon(officer::fetch_audit(&out, &daemon)),
        Command::Audit(AuditCommand::Verify(args)) => args.run(),
        Command::Station(command) => command.run(Role::Station, Caller::Station),
        Command::Request { out, json } => request(&out, json),
        Command::CliDocs(what) => what.run(Cli::command()),
        Command::Auditor(command) => command.run(Role::Auditor, Caller::Auditor),
        Command::BackOffice(command) => command.run(Role::BackOffice, Caller::BackOffice),
        Command::Monitor(command) => command.run(Role::Monitor, Caller::Monitor),
        Command::Officer(command) => command.run(Role::Officer, Caller::Officer),
        Command::Server(ServerCommand::Enroll { dns, ip, common }) => {
            if dns.is_empty() && ip.is_empty() {
                return Err("give at least one --dns or --ip, else no client can verify the daemon".to_owned());
            }
            enroll(AccessName::Server { dns, ips: ip }, common)
        }
        Command::Approvals(command) => at_daemon(command.run()),
        Command::Identities(command) => at_daemon(command.run()),
        Command::Renew(args) => at_daemon(officer::renew(args)),
        Command::Pool(command) => at_daemon(command.run()),
        Command::Reload { daemon } => at_daemon(officer::reload(daemon)),
        Command::Report(command) => wait(command.run())?,
        Command::Device(command) => wait(command.run())?,
        Command::Sessions(command) => wait(command.run())?,
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
        false => println!("initialised the token {} (serial {})", token.label, token.serial),
    }
    Ok(())
}

fn init(config: &Path, json: bool) -> Result<(), String> {
    let store = StoreConfig::load(config).map_err(|e| e.to_string())?;
    SledStateStore::create(&store.state, &store.state_options).map_err(|e| e.to_string())?;
    made("state store", &store.state, json);
    TransparencyLog::create(&store.public, &store.public_options).map_err(|e| e.to_string())?;
    made("public database", &store.public, json);
    audit_init(config, json)
}

fn audit_init(config: &Path, json: bool) -> Result<(), String> {
    let audit = AuditConfig::load(config).map_err(|e| e.to_string())?;
    AuditLog::create(&audit.directory).map_err(|e| e.to_string())?;
    made("audit log", &audit.directory, json);
    Ok(())
}

/// Told one by one, since a later one may fail.
fn made(what: &str, directory: &Path, json: bool) {
    match json {
        true => println!("{}", serde_json::json!({ "made": what, "directory": directory })),
        false => println!("made the {what} {}", directory.display()),
    }
}

fn request(out: &Path, json: bool) -> Result<(), String> {
    let paths = officer::request(out).map_err(|e| e.to_string())?;
    officer::tell_written(&paths, json);
    if !json {
        println!(
            "an officer makes the certificate: sppctl station enroll NAME --csr request.pem …; put certificate.pem and ca.pem beside key.pem"
        );
    }
    Ok(())
}

fn enroll(name: AccessName, args: EnrollArgs) -> Result<(), String> {
    if let (AccessName::Client(caller), Some(server), Some(tls)) = (&name, &args.server, &args.tls) {
        return at_daemon(async {
            let csr = args.csr.as_deref();
            let paths = officer::enroll_at_desk(server, tls, caller, csr, args.days, &args.out).await?;
            officer::tell_written(&paths, args.json);
            Ok(())
        });
    }
    let config = args.config.ok_or("the daemon's own certificate is made on the token: give --config")?;
    let audit = AuditConfig::load(&config).map_err(|e| e.to_string())?;
    let access = HsmAccess::load(&config, args.hsm.as_deref(), args.pin_file).map_err(|e| e.to_string())?;
    let register = KeyManifest::load(&access.keys).map_err(|e| e.to_string())?;
    access.module.enter_environment().map_err(|e| e.to_string())?;
    let enrolment = Enrolment { name, days: args.days, out: args.out, csr: args.csr };
    let made = officer::on_record(&audit.directory, enrolment.describe(), || {
        officer::enroll(&access, &register, &enrolment).map_err(|e| e.to_string())
    });
    officer::tell_written(&made?, args.json);
    Ok(())
}

/// Asks the running daemon.
fn at_daemon(work: impl Future<Output = Result<(), StatusError>>) -> Result<(), String> {
    wait(work)?.map_err(|e| e.to_string())
}

/// Waits for what is asked of the running daemon.
fn wait<T>(asking: impl Future<Output = T>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    Ok(runtime.block_on(asking))
}

fn status(server: &str, tls: &Path, patience: Option<Duration>, json: bool) -> Result<(), String> {
    let status = wait(officer::connect_and_ask(server, tls, patience))?.map_err(|e| e.to_string())?;
    if json {
        println!("{:#}", officer::status_json(&status));
    } else {
        print!("{}", officer::describe_status(&status));
    }
    Ok(())
}
