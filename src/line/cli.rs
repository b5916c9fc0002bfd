//! What people type.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{ArgGroup, Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use tonic::transport::Uri;

use super::LineError;
use super::connection::parse_server;
use super::devices;
use super::orders::Numbering;
use super::provision::{Provision, Source, log_key, provision};
use super::recover::{Place, Public, recover};
use super::report::ReportFile;
use super::retry::Patience;
use super::run_log::Ended;
use super::show::{Show, show};
use crate::cli_docs::CliDocs;
use crate::device::SimulatedFab;
use crate::names::{ChipId, ProfileName};
use crate::package::TransportCurve;

/// The station of an assembly line: gives devices their identity and keys, and shows, wipes and recovers them.
///
/// The devices are simulated: a chip's ROM and secret key come from DIR/fab.cbor, its flash is a file in DIR.
/// A device goes from bare chip to receipt in two calls to sppd: Assemble gives it certificate and keys, Complete publishes
/// its backup. Whatever happens in between, the same command again takes it up where it stopped.
#[derive(Parser)]
#[command(name = "spp-line", version, after_help = EXAMPLES)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  A hundred simulated phones, 32 at a time:
    spp-line provision --simulate 100 --profile phone --parallel 32 \\
        --server https://localhost:7443 --tls tls/line-1-a \\
        --devices devices --manufacturer keys/manufacturer-ca.pem --log keys/log-1.vkey --report report.csv
  What became of them:
    spp-line devices --devices devices
  One loses its flash, and gets everything back from the public database:
    spp-line wipe --chip CHIP --devices devices
    spp-line recover --chip CHIP --devices devices --server https://localhost:7445 --ca tls/server/ca.pem
  The same from a mirror, with the daemon down:
    spp-line recover --chip CHIP --devices devices --from mirror
  Its certificate, as a file for openssl:
    spp-line show --chip CHIP --server https://localhost:7445 --ca tls/server/ca.pem --certificate-out one.pem

Exit codes: 0 all went well, 1 a device failed or the daemon refused, 2 wrong usage or set-up.";

#[derive(Subcommand)]
enum Command {
    /// Bring devices from bare chip to receipt, many at a time
    Provision(Box<ProvisionArguments>),
    /// Restore a wiped device from the public database
    Recover(RecoverArguments),
    /// Empty a device's flash, as an accident would
    Wipe(WipeArguments),
    /// Show what the public database has of a chip
    Show(ShowArguments),
    /// List the simulated devices and their state
    Devices(DevicesArguments),
    #[command(flatten)]
    CliDocs(CliDocs),
}

#[derive(Args)]
#[command(after_help = PROVISION_HELP)]
#[command(group(ArgGroup::new("source").required(true).args(["simulate", "identities"])))]
struct ProvisionArguments {
    /// Make up N chips and identities. DIR/orders.csv remembers them: the same command again works on the same devices, a
    /// larger N adds to them
    #[arg(long, value_name = "N", requires = "profile", value_parser = clap::value_parser!(u32).range(1..))]
    simulate: Option<u32>,
    /// Take the orders from a CSV file with the columns chip_id (hex), identity (imei:490154203237518, say) and profile
    #[arg(long, value_name = "FILE.csv", conflicts_with_all = ["profile", "identity_prefix"])]
    identities: Option<PathBuf>,
    /// What the simulated devices get: a profile of the daemon's configuration
    #[arg(long, value_name = "NAME")]
    profile: Option<ProfileName>,
    /// How made-up identities start; the rest is a running number. KIND is imei, meid, eui48, eui64 or serial; without START
    /// a usual one is taken
    #[arg(long, value_name = "KIND[:START]", default_value = "imei:49015420")]
    identity_prefix: Numbering,
    /// The daemon's listener for stations
    #[arg(long, value_name = "https://HOST:PORT", value_parser = parse_server)]
    server: Uri,
    /// The station's TLS files certificate.pem, key.pem and ca.pem, as `sppctl station enroll` makes them
    #[arg(long, value_name = "DIR")]
    tls: PathBuf,
    /// Where the simulated devices live; made if it is missing
    #[arg(long, value_name = "DIR")]
    devices: PathBuf,
    /// The manufacturer's CA certificate, whose public key goes into the chips' ROM; needed the first time
    #[arg(long, value_name = "FILE.pem")]
    manufacturer: Option<PathBuf>,
    /// The log's public key, log-1.vkey of the ceremony: it goes into the chips' ROM, too, and every device verifies with it that it
    /// is in the public database. Without it receipts are kept unverified
    #[arg(long, value_name = "FILE.vkey")]
    log: Option<PathBuf>,
    /// Devices that are worked on at the same time
    #[arg(long, value_name = "P", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=4096))]
    parallel: u16,
    /// HTTP/2 connections that carry them [default: one for every 16 devices, at most 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    connections: Option<u16>,
    /// Ask for packages sealed to the chip's transport key of this curve, so that the station sees no secret
    #[arg(long, value_name = "CURVE")]
    sealed: Option<Curve>,
    /// Let the device make its own P-256 key pair and send a certificate request; for profiles that want one
    #[arg(long)]
    csr: bool,
    /// Write a row for each device: chip, identity, outcome, receipt, times, error. The ending chooses the format
    #[arg(long, value_name = "FILE.csv|FILE.jsonl", value_parser = ReportFile::parse)]
    report: Option<ReportFile>,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    /// How long a call is repeated while the daemon or its HSM is away; then the run stops
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    retry_for: Duration,
    /// The deadline of each call
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    deadline: Duration,
}

const PROVISION_HELP: &str = "\
Examples:
  spp-line provision --simulate 100 --profile phone --parallel 32 \\
      --server https://localhost:7443 --tls tls/line-1-a \\
      --devices devices --manufacturer keys/manufacturer-ca.pem --log keys/log-1.vkey --report report.csv
  spp-line provision --identities lot-17.csv --sealed x25519 \\
      --server https://localhost:7443 --tls tls/line-1-a --devices devices

The same command again resumes: devices that are complete are skipped, those in the middle are taken up.
Nothing is lost or doubled, wherever it was stopped or killed. Ctrl-C finishes what was begun.";

#[derive(Args)]
struct RecoverArguments {
    /// The chip ID in hex
    #[arg(long, value_name = "HEX")]
    chip: ChipId,
    /// Where the simulated devices live
    #[arg(long, value_name = "DIR")]
    devices: PathBuf,
    #[command(flatten)]
    public: PublicArguments,
}

#[derive(Args)]
struct WipeArguments {
    /// The chip ID in hex
    #[arg(long, value_name = "HEX")]
    chip: ChipId,
    /// Where the simulated devices live
    #[arg(long, value_name = "DIR")]
    devices: PathBuf,
}

#[derive(Args)]
struct ShowArguments {
    /// The chip ID in hex
    #[arg(long, value_name = "HEX")]
    chip: ChipId,
    #[command(flatten)]
    public: PublicArguments,
    /// Write the certificate to a file, too: X.509 in PEM, a CWT as it is
    #[arg(long, value_name = "FILE.pem")]
    certificate_out: Option<PathBuf>,
    /// Print JSON, with certificate and backup package
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct DevicesArguments {
    /// Where the simulated devices live
    #[arg(long, value_name = "DIR")]
    devices: PathBuf,
}

#[derive(Args)]
#[command(group(ArgGroup::new("where").required(true).args(["server", "from"])))]
struct PublicArguments {
    /// The daemon's public listener; no client certificate is needed
    #[arg(long, value_name = "https://HOST:PORT", value_parser = parse_server, requires = "ca")]
    server: Option<Uri>,
    /// A mirror instead, which needs no daemon: a directory, or the address of any web server that has its files
    #[arg(long, value_name = "URL|DIR")]
    from: Option<String>,
    /// The CA certificate of the server's certificate; for a mirror, if the system does not know it
    #[arg(long, value_name = "FILE.pem")]
    ca: Option<PathBuf>,
    /// The log's public key: the record must be proven to be in that log [default: the one in the chips' ROM]
    #[arg(long, value_name = "FILE.vkey")]
    log: Option<PathBuf>,
}

impl PublicArguments {
    fn public(&self, devices: Option<&Path>) -> Result<Public, LineError> {
        let key = match (&self.log, devices) {
            (Some(path), _) => Some(log_key(path)?),
            (None, Some(devices)) => SimulatedFab::open(devices)?.rom_keys().1.cloned(),
            (None, None) => None,
        };
        let authority = self.ca.clone();
        let place = match (&self.server, &self.from, authority) {
            // The parser demands one of the two, and the CA with --server.
            (Some(server), _, Some(authority)) => Place::Daemon { server: server.clone(), authority },
            (_, from, authority) => Place::Mirror { place: from.clone().unwrap_or_default(), authority },
        };
        if matches!(place, Place::Mirror { .. }) && key.is_none() {
            let hint = "a mirror is not believed: give the log's public key with --log FILE.vkey";
            return Err(LineError::Usage(hint.to_owned()));
        }
        Ok(Public { place, key })
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Curve {
    X25519,
    P256,
}

/// Does what was typed. What went wrong is on standard error, with what to do next.
pub fn run(arguments: Arguments) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return failed(&LineError::Usage(format!("starting threads failed: {e}"))),
    };
    runtime.block_on(dispatch(arguments.command)).unwrap_or_else(|error| failed(&error))
}

async fn dispatch(command: Command) -> Result<ExitCode, LineError> {
    let text = match command {
        Command::Provision(arguments) => {
            let json = arguments.json;
            return Ok(ended(&provision((*arguments).into()).await?, json));
        }
        Command::Recover(RecoverArguments { chip, devices, public }) => {
            recover(&chip, &devices, &public.public(Some(&devices))?).await?
        }
        Command::Wipe(WipeArguments { chip, devices }) => devices::wipe(&chip, &devices)?,
        Command::Show(ShowArguments { chip, public, certificate_out, json }) => {
            let certificate_out = certificate_out.as_deref();
            show(&Show { chip: &chip, public: public.public(None)?, certificate_out, json }).await?
        }
        Command::Devices(DevicesArguments { devices }) => devices::table(&devices)?,
        Command::CliDocs(what) => {
            what.run(Arguments::command()).map_err(LineError::Usage)?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    say(&text);
    Ok(ExitCode::SUCCESS)
}

impl From<ProvisionArguments> for Provision {
    fn from(typed: ProvisionArguments) -> Self {
        let source = match (typed.identities, typed.simulate, typed.profile) {
            (None, Some(count), Some(profile)) => {
                Source::Simulate { count: count as usize, profile, numbering: typed.identity_prefix }
            }
            // The parser demands one of the two, and the profile with --simulate.
            (list, ..) => Source::List(list.unwrap_or_default()),
        };
        Self {
            source,
            server: typed.server,
            tls: typed.tls,
            devices: typed.devices,
            manufacturer: typed.manufacturer,
            log: typed.log,
            parallel: typed.parallel.into(),
            connections: typed.connections.map(usize::from),
            sealed: typed.sealed.map(|curve| match curve {
                Curve::X25519 => TransportCurve::X25519,
                Curve::P256 => TransportCurve::P256,
            }),
            own_pair: typed.csr,
            report: typed.report,
            patience: Patience { deadline: typed.deadline, retry_for: typed.retry_for },
        }
    }
}

fn ended(ended: &Ended, json: bool) -> ExitCode {
    let Ended { summary, failures } = ended;
    if json {
        say(&format!("{}\n", serde_json::to_string(summary).unwrap_or_default()));
    } else {
        say(&summary.text());
    }
    if !failures.is_empty() {
        eprintln!("failed:");
        failures.iter().for_each(|failure| eprintln!("  {failure}"));
    }
    if summary.not_begun > 0 {
        eprintln!("{} devices were not begun; the same command again goes on", summary.not_begun);
    }
    if summary.all_fine() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Prints to standard output; whoever reads it may have gone.
fn say(text: &str) {
    use std::io::Write as _;
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn failed(error: &LineError) -> ExitCode {
    eprintln!("spp-line: {error}");
    ExitCode::from(error.exit_code())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: [&str; 6] = ["--server", "https://h:1", "--tls", "t", "--devices", "d"];

    fn parses(typed: &[&str]) -> bool {
        let typed = ["spp-line", "provision"].iter().chain(typed).chain(&SERVER);
        Arguments::try_parse_from(typed).is_ok()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn devices_are_simulated_with_a_profile_or_listed_without() {
        assert!(parses(&["--simulate", "1", "--profile", "phone"]));
        assert!(parses(&["--identities", "list.csv"]));
        assert!(!parses(&[]));
        assert!(!parses(&["--simulate", "1"]));
        assert!(!parses(&["--simulate", "0", "--profile", "phone"]));
        assert!(!parses(&["--identities", "list.csv", "--profile", "phone"]));
        assert!(!parses(&["--identities", "list.csv", "--simulate", "1", "--profile", "phone"]));
        assert!(!parses(&["--identities", "list.csv", "--report", "report.txt"]));
    }
}
