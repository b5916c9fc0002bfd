//! The provision command.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use spp_device::SimulatedFab;
use spp_format::certificate::IssuerCertificate;
use spp_format::keys::PublicKey;
use spp_format::names::ProfileName;
use spp_format::package::TransportCurve;
use spp_format::tlog::LogKey;
use tonic::transport::Uri;

use super::client::StationClient;
use super::connection::{Tls, connect, verify_daemon};
use super::device_flow::Station;
use super::orders::{self, Numbering, Order};
use super::report::ReportFile;
use super::retry::RetryPolicy;
use super::run_log::{RunLog, RunResult};
use super::{LineError, pipeline};

/// Source of the orders.
pub(super) enum Source {
    /// Generated, and stored in the directory.
    Simulate { count: usize, profile: ProfileName, numbering: Numbering },
    /// From a list.
    List(PathBuf),
}

/// Options of the provision command.
pub(super) struct ProvisionOptions {
    pub(super) source: Source,
    pub(super) server: Uri,
    pub(super) tls: PathBuf,
    pub(super) devices: PathBuf,
    pub(super) manufacturer: Option<PathBuf>,
    pub(super) log: Option<PathBuf>,
    pub(super) parallel: usize,
    /// `None`: derived from the number of devices in progress.
    pub(super) connections: Option<usize>,
    pub(super) sealed: Option<TransportCurve>,
    pub(super) own_key_pair: bool,
    pub(super) report: Option<ReportFile>,
    pub(super) retry_policy: RetryPolicy,
}

/// Provisions the devices. An error means that no device was started, or that the journal or report could not be written.
pub(super) async fn provision(options: ProvisionOptions) -> Result<RunResult, LineError> {
    // 1. Validate all local inputs before the first device is started.
    let tls = Tls::mutual(&options.tls)?;
    let endpoint = tls.endpoint(&options.server)?;
    let fab = open_fab(&options.devices, options.manufacturer.as_deref(), options.log.as_deref())?;
    if fab.rom_keys().1.is_none() {
        eprintln!(
            "spp-line: the chips have no log key, so receipts are stored unverified; use --log FILE.vkey with new chips"
        );
    }
    let run_log = RunLog::open(&options.devices, options.report.as_ref())?;
    // 2. Sync the orders to disk before a chip is sent to the daemon.
    let orders = orders(&options.devices, &options.source)?;
    // 3. A few connections carry all devices in flight.
    let parallel = options.parallel.min(orders.len());
    let connections = options.connections.unwrap_or_else(|| parallel.div_ceil(16).min(8)).min(parallel);
    let channels = connect(&endpoint, connections, &options.retry_policy).await?;
    if let Some(channel) = channels.first() {
        verify_daemon(&options.server, channel, &options.retry_policy).await?;
    }
    // 4. Provision the devices.
    let ProvisionOptions { sealed, own_key_pair, retry_policy, .. } = options;
    let station = Station { fab: Arc::new(fab), sealed, own_key_pair };
    let clients = channels.into_iter().map(|channel| StationClient::new(channel, retry_policy)).collect();
    pipeline::run(pipeline::Run { station, clients, orders, parallel, run_log }).await
}

fn orders(devices: &Path, source: &Source) -> Result<Vec<Order>, LineError> {
    match source {
        Source::Simulate { count, profile, numbering } => orders::simulate(devices, *count, profile, numbering),
        Source::List(path) => orders::read(path),
    }
}

/// Opens the directory's fab, or creates it. A run uses one fab, from which its devices are derived.
fn open_fab(devices: &Path, manufacturer: Option<&Path>, log: Option<&Path>) -> Result<SimulatedFab, LineError> {
    let manufacturer = manufacturer.map(manufacturer_key).transpose()?;
    let log = log.map(log_key).transpose()?;
    if !devices.join("fab.cbor").exists() {
        let key = manufacturer.ok_or_else(|| {
            LineError::Usage(format!(
                "{} has no simulated chips yet; their ROM requires the manufacturer's public key: provide the manufacturer's CA \
                 certificate with --manufacturer FILE.pem and the log's key with --log FILE.vkey",
                devices.display()
            ))
        })?;
        return Ok(SimulatedFab::create(devices, key, log)?);
    }
    let fab = SimulatedFab::open(devices)?;
    let (rom_key, rom_log_key) = fab.rom_keys();
    let mismatch = |what: &str, option: &str| {
        LineError::Usage(format!(
            "the ROM of the chips in {} contains another {what} and cannot be changed; remove {option}, or choose \
             another directory with --devices",
            devices.display()
        ))
    };
    if manufacturer.is_some_and(|given| given != *rom_key) {
        return Err(mismatch("manufacturer", "--manufacturer"));
    }
    if log.is_some_and(|given| Some(&given) != rom_log_key) {
        return Err(mismatch("log key, or none,", "--log"));
    }
    Ok(fab)
}

/// Reads the public key of a log from a vkey file.
pub(super) fn log_key(path: &Path) -> Result<LogKey, LineError> {
    let text = std::fs::read_to_string(path).map_err(LineError::file("reading the log's key", path))?;
    text.parse().map_err(|e| LineError::content(path, e))
}

fn manufacturer_key(path: &Path) -> Result<PublicKey, LineError> {
    let text =
        std::fs::read_to_string(path).map_err(LineError::file("reading the manufacturer's certificate", path))?;
    // The file may contain the rest of the chain.
    let certificate = IssuerCertificate::from_pem_with_default_algorithm(&text);
    let certificate = certificate.map_err(|e| LineError::content(path, format!("not a CA certificate in PEM: {e}")))?;
    Ok(certificate.public_key().clone())
}
