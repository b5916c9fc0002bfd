//! Command line of spp-line.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{ArgGroup, Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use spp_device::SimulatedFab;
use spp_format::names::{ChipId, ProfileName};
use spp_format::package::TransportCurve;
use spp_program::cli_docs::CliDocs;
use tonic::transport::Uri;

use super::connection::parse_server;
use super::orders::Numbering;
use super::provision::{ProvisionOptions, Source, log_key, provision};
use super::public_database::{RecordReader, RecordSource};
use super::recover::recover;
use super::report::ReportFile;
use super::retry::RetryPolicy;
use super::run_log::RunResult;
use super::show::{ShowOptions, show};
use super::{LineError, devices};

/// Station of an assembly line: provisions, shows, wipes and recovers devices.
///
/// The devices are simulated: a chip's ROM and secret key come from DIR/fab.cbor, its flash is a file in DIR. A device is
/// provisioned in two calls to sppd: Assemble returns its certificate and keys, Complete publishes its backup. After any
/// interruption, the same command resumes the device where it stopped.
#[derive(Parser)]
#[command(name = "spp-line", version, after_help = EXAMPLES)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  Provision a hundred simulated phones, 32 in parallel:
    spp-line provision --simulate 100 --profile phone --parallel 32 \\
        --server https://localhost:7443 --tls tls/line-1-a \\
        --devices devices --manufacturer keys/manufacturer-ca.pem --log keys/log-1.vkey --report report.csv
  List them:
    spp-line devices --devices devices
  Wipe the flash of one and recover it from the public database:
    spp-line wipe --chip CHIP --devices devices
    spp-line recover --chip CHIP --devices devices --server https://localhost:7445 --ca tls/server/ca.pem
  Recover it from a mirror, without the daemon:
    spp-line recover --chip CHIP --devices devices --from mirror
  Write its certificate to a file for openssl:
    spp-line show --chip CHIP --server https://localhost:7445 --ca tls/server/ca.pem --certificate-out one.pem

Exit codes: 0 success, 1 a device failed or the daemon rejected a call, 2 invalid usage or setup.";

#[derive(Subcommand)]
enum Command {
    /// Provision devices, many in parallel
    Provision(Box<ProvisionArguments>),
    /// Restore a wiped device from the public database
    Recover(RecoverArguments),
    /// Erase a device's flash
    Wipe(WipeArguments),
    /// Show a chip's record in the public database
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
    /// Simulate N chips and identities. DIR/orders.csv stores them: repeating the command continues with the same devices, a
    /// larger N adds devices
    #[arg(long, value_name = "N", requires = "profile", value_parser = clap::value_parser!(u32).range(1..))]
    simulate: Option<u32>,
    /// Read the orders from a CSV file with the columns chip_id (hex), identity (such as imei:490154203237518) and profile
    #[arg(long, value_name = "FILE.csv", conflicts_with_all = ["profile", "identity_prefix"])]
    identities: Option<PathBuf>,
    /// Profile of the simulated devices, as configured in the daemon
    #[arg(long, value_name = "NAME")]
    profile: Option<ProfileName>,
    /// Set the prefix of simulated identities; a serial number follows it. KIND is imei, meid, eui48, eui64 or serial; without
    /// START a default prefix is used
    #[arg(long, value_name = "KIND[:START]", default_value = "imei:49015420")]
    identity_prefix: Numbering,
    /// Address of the daemon's station listener
    #[arg(long, value_name = "https://HOST:PORT", value_parser = parse_server)]
    server: Uri,
    /// Directory with the station's TLS files certificate.pem, key.pem and ca.pem, as `sppctl station enroll` creates them
    #[arg(long, value_name = "DIR")]
    tls: PathBuf,
    /// Directory of the simulated devices; created if missing
    #[arg(long, value_name = "DIR")]
    devices: PathBuf,
    /// Manufacturer's CA certificate, whose public key is written to the chips' ROM; required on first use
    #[arg(long, value_name = "FILE.pem")]
    manufacturer: Option<PathBuf>,
    /// Log's public key, log-1.vkey of the ceremony. It is written to the chips' ROM, and every device uses it to verify its
    /// receipt. Without it, receipts are stored unverified
    #[arg(long, value_name = "FILE.vkey")]
    log: Option<PathBuf>,
    /// Number of devices in progress at the same time
    #[arg(long, value_name = "P", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=4096))]
    parallel: u16,
    /// Number of HTTP/2 connections [default: one per 16 devices, at most 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    connections: Option<u16>,
    /// Request packages sealed to the chip's transport key of this curve, so that the station sees no secret
    #[arg(long, value_name = "CURVE")]
    sealed: Option<Curve>,
    /// Let the device generate its own P-256 key pair and send a certificate request; for profiles with source = "csr"
    #[arg(long)]
    csr: bool,
    /// Write a row for each device: chip, identity, outcome, receipt, times, error. The file extension selects the format
    #[arg(long, value_name = "FILE.csv|FILE.jsonl", value_parser = ReportFile::parse)]
    report: Option<ReportFile>,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    /// Retry a call for this long while the daemon or its HSM is unavailable; then stop the run
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    retry_for: Duration,
    /// Deadline of each call
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

Repeating the command resumes the run: complete devices are skipped, incomplete ones are continued.
No device is lost or duplicated, even if the process is killed. Ctrl-C finishes the devices in progress.";

#[derive(Args)]
struct RecoverArguments {
    /// Chip ID in hex
    #[arg(long, value_name = "HEX")]
    chip: ChipId,
    /// Directory of the simulated devices
    #[arg(long, value_name = "DIR")]
    devices: PathBuf,
    #[command(flatten)]
    public: PublicArguments,
}

#[derive(Args)]
struct WipeArguments {
    /// Chip ID in hex
    #[arg(long, value_name = "HEX")]
    chip: ChipId,
    /// Directory of the simulated devices
    #[arg(long, value_name = "DIR")]
    devices: PathBuf,
}

#[derive(Args)]
struct ShowArguments {
    /// Chip ID in hex
    #[arg(long, value_name = "HEX")]
    chip: ChipId,
    #[command(flatten)]
    public: PublicArguments,
    /// Also write the certificate to a file: X.509 as PEM, a CWT as binary
    #[arg(long, value_name = "FILE.pem")]
    certificate_out: Option<PathBuf>,
    /// Print JSON, including certificate and backup package
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct DevicesArguments {
    /// Directory of the simulated devices
    #[arg(long, value_name = "DIR")]
    devices: PathBuf,
}

#[derive(Args)]
#[command(group(ArgGroup::new("where").required(true).args(["server", "from"])))]
struct PublicArguments {
    /// Address of the daemon's public listener; requires no client certificate
    #[arg(long, value_name = "https://HOST:PORT", value_parser = parse_server, requires = "ca")]
    server: Option<Uri>,
    /// Read from a mirror instead, without the daemon: a directory or the URL of a web server with its files
    #[arg(long, value_name = "URL|DIR")]
    from: Option<String>,
    /// CA certificate of the server; for a mirror, only if the system does not trust it
    #[arg(long, value_name = "FILE.pem")]
    ca: Option<PathBuf>,
    /// Log's public key: the record must be proven to be in that log [default: the key in the chips' ROM]
    #[arg(long, value_name = "FILE.vkey")]
    log: Option<PathBuf>,
}

impl PublicArguments {
    fn database(&self, devices: Option<&Path>) -> Result<RecordReader, LineError> {
        let key = match (&self.log, devices) {
            (Some(path), _) => Some(log_key(path)?),
            (None, Some(devices)) => SimulatedFab::open(devices)?.rom_keys().1.cloned(),
            (None, None) => None,
        };
        let authority = self.ca.clone();
        let source = match (&self.server, &self.from, authority) {
            // clap requires one of the two, and --ca with --server.
            (Some(server), _, Some(authority)) => RecordSource::Daemon { server: server.clone(), authority },
            (_, from, authority) => RecordSource::Mirror { place: from.clone().unwrap_or_default(), authority },
        };
        if matches!(source, RecordSource::Mirror { .. }) && key.is_none() {
            let hint = "reading from a mirror requires the log's public key; add --log FILE.vkey";
            return Err(LineError::Usage(hint.to_owned()));
        }
        Ok(RecordReader { source, key })
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Curve {
    X25519,
    P256,
}

/// Runs the command. Errors are printed to standard error with the next step.
pub fn run(arguments: Arguments) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return failed(&LineError::Usage(format!("cannot start threads: {e}"))),
    };
    runtime.block_on(dispatch(arguments.command)).unwrap_or_else(|error| failed(&error))
}

async fn dispatch(command: Command) -> Result<ExitCode, LineError> {
    let text = match command {
        Command::Provision(arguments) => {
            let json = arguments.json;
            return Ok(print_result(&provision((*arguments).into()).await?, json));
        }
        Command::Recover(RecoverArguments { chip, devices, public }) => {
            recover(&chip, &devices, &public.database(Some(&devices))?).await?
        }
        Command::Wipe(WipeArguments { chip, devices }) => devices::wipe(&chip, &devices)?,
        Command::Show(ShowArguments { chip, public, certificate_out, json }) => {
            let certificate_out = certificate_out.as_deref();
            show(&ShowOptions { chip: &chip, database: public.database(None)?, certificate_out, json }).await?
        }
        Command::Devices(DevicesArguments { devices }) => devices::table(&devices)?,
        Command::CliDocs(what) => {
            what.run(Arguments::command()).map_err(LineError::Usage)?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    print(&text);
    Ok(ExitCode::SUCCESS)
}

impl From<ProvisionArguments> for ProvisionOptions {
    fn from(arguments: ProvisionArguments) -> Self {
        let source = match (arguments.identities, arguments.simulate, arguments.profile) {
            (None, Some(count), Some(profile)) => {
                Source::Simulate { count: count as usize, profile, numbering: arguments.identity_prefix }
            }
            // clap requires one of the two, and --profile with --simulate.
            (list, ..) => Source::List(list.unwrap_or_default()),
        };
        Self {
            source,
            server: arguments.server,
            tls: arguments.tls,
            devices: arguments.devices,
            manufacturer: arguments.manufacturer,
            log: arguments.log,
            parallel: arguments.parallel.into(),
            connections: arguments.connections.map(usize::from),
            sealed: arguments.sealed.map(|curve| match curve {
                Curve::X25519 => TransportCurve::X25519,
                Curve::P256 => TransportCurve::P256,
            }),
            own_key_pair: arguments.csr,
            report: arguments.report,
            retry_policy: RetryPolicy { deadline: arguments.deadline, retry_for: arguments.retry_for },
        }
    }
}

fn print_result(result: &RunResult, json: bool) -> ExitCode {
    let RunResult { summary, failures } = result;
    if json {
        print(&format!("{}\n", serde_json::to_string(summary).unwrap_or_default()));
    } else {
        print(&summary.text());
    }
    if !failures.is_empty() {
        eprintln!("failed:");
        failures.iter().for_each(|failure| eprintln!("  {failure}"));
    }
    if summary.not_begun > 0 {
        eprintln!("{} devices were not started; repeat the command to continue", summary.not_begun);
    }
    if summary.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Prints to standard output; a closed pipe is not an error.
fn print(text: &str) {
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

    fn parses(arguments: &[&str]) -> bool {
        let arguments = ["spp-line", "provision"].iter().chain(arguments).chain(&SERVER);
        Arguments::try_parse_from(arguments).is_ok()
    }

    #[test]
    fn command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn provision_requires_simulated_profile_or_order_list() {
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
