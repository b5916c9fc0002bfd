//! The command that provisions devices: from its options to the exit code.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tonic::transport::Uri;

use super::LineError;
use super::connection::{Tls, connect, greet};
use super::device_flow::Station;
use super::orders::{self, Numbering, Order};
use super::pipeline;
use super::report::ReportFile;
use super::retry::Patience;
use super::run_log::{Ended, RunLog};
use crate::certificate::IssuerCertificate;
use crate::device::SimulatedFab;
use crate::keys::PublicKey;
use crate::names::ProfileName;
use crate::package::TransportCurve;
use crate::tlog::LogKey;

/// Which devices.
pub(super) enum Source {
    /// Made up, as many, and remembered in the directory.
    Simulate { count: usize, profile: ProfileName, numbering: Numbering },
    /// From a list.
    List(PathBuf),
}

/// What was asked for.
pub(super) struct Provision {
    pub(super) source: Source,
    pub(super) server: Uri,
    pub(super) tls: PathBuf,
    pub(super) devices: PathBuf,
    pub(super) manufacturer: Option<PathBuf>,
    pub(super) log: Option<PathBuf>,
    pub(super) parallel: usize,
    /// `None`: as many as fit the devices in flight.
    pub(super) connections: Option<usize>,
    pub(super) sealed: Option<TransportCurve>,
    pub(super) own_pair: bool,
    pub(super) report: Option<ReportFile>,
    pub(super) patience: Patience,
}

/// Provisions. An error means that nothing was begun, or that journal or report could not be written on the way.
pub(super) async fn provision(asked: Provision) -> Result<Ended, LineError> {
    // 1. Everything that can be wrong here is found before the first device is begun.
    let tls = Tls::mutual(&asked.tls)?;
    let endpoint = tls.endpoint(&asked.server)?;
    let fab = open_fab(&asked.devices, asked.manufacturer.as_deref(), asked.log.as_deref())?;
    if fab.rom_keys().1.is_none() {
        eprintln!(
            "spp-line: the chips know no log, so receipts are kept unverified; give --log FILE.vkey with new chips"
        );
    }
    let book = RunLog::open(&asked.devices, asked.report.as_ref())?;
    // 2. The orders, on the disk before a chip of them is known to anybody else.
    let orders = orders(&asked.devices, &asked.source)?;
    // 3. A few connections carry all devices in flight.
    let parallel = asked.parallel.min(orders.len());
    let connections = asked.connections.unwrap_or_else(|| parallel.div_ceil(16).min(8)).min(parallel);
    let channels = connect(&endpoint, connections, &asked.patience).await?;
    if let Some(channel) = channels.first() {
        greet(&asked.server, channel, &asked.patience).await?;
    }
    // 4. The devices.
    let Provision { sealed, own_pair, patience, .. } = asked;
    let station = Station { fab: Arc::new(fab), sealed, own_pair, patience };
    pipeline::run(pipeline::Run { station, channels, orders, parallel, book }).await
}

fn orders(devices: &Path, source: &Source) -> Result<Vec<Order>, LineError> {
    match source {
        Source::Simulate { count, profile, numbering } => orders::simulate(devices, *count, profile, numbering),
        Source::List(path) => orders::read(path),
    }
}

/// The directory's fab, made when there is none. One fab for a run: its devices are a function of it.
fn open_fab(devices: &Path, manufacturer: Option<&Path>, log: Option<&Path>) -> Result<SimulatedFab, LineError> {
    let manufacturer = manufacturer.map(manufacturer_key).transpose()?;
    let log = log.map(log_key).transpose()?;
    if !devices.join("fab.cbor").exists() {
        let key = manufacturer.ok_or_else(|| {
            LineError::Usage(format!(
                "{} has no simulated chips yet, and they need the manufacturer's public key in their ROM; give the CA \
                 certificate of the manufacturer with --manufacturer FILE.pem, and the log's key with --log FILE.vkey",
                devices.display()
            ))
        })?;
        return Ok(SimulatedFab::create(devices, key, log)?);
    }
    let fab = SimulatedFab::open(devices)?;
    let (known, known_log) = fab.rom_keys();
    let other = |what: &str, option: &str| {
        LineError::Usage(format!(
            "the chips in {} trust another {what} than the one given, and a ROM cannot be changed; leave {option} out, or choose \
             another directory with --devices",
            devices.display()
        ))
    };
    if manufacturer.is_some_and(|given| given != *known) {
        return Err(other("manufacturer", "--manufacturer"));
    }
    if log.is_some_and(|given| Some(&given) != known_log) {
        return Err(other("log, or none,", "--log"));
    }
    Ok(fab)
}

/// The public key of a log, as the ceremony wrote it.
pub(super) fn log_key(path: &Path) -> Result<LogKey, LineError> {
    let text = std::fs::read_to_string(path).map_err(LineError::file("reading the log's key", path))?;
    text.parse().map_err(|e| LineError::content(path, e))
}

fn manufacturer_key(path: &Path) -> Result<PublicKey, LineError> {
    let text =
        std::fs::read_to_string(path).map_err(LineError::file("reading the manufacturer's certificate", path))?;
    // With the authorities above it, or alone.
    let certificate = IssuerCertificate::from_pem_alone(&text);
    let certificate = certificate.map_err(|e| LineError::content(path, format!("not a CA certificate in PEM: {e}")))?;
    Ok(certificate.public_key().clone())
}
