//! `sppctl audit`: reads, exports, copies and verifies the audit log. The daemon may be running or stopped.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use spp_format::certificate::IssuerCertificate;
use spp_format::tlog::{LogKey, TlogError};
use spp_log::audit::{Entries, RecordedEntry, Trust};
use spp_log::registry::published_checkpoints;

use super::access_client::OfficerClient;
use super::files::make_directory;
use super::pool_cli::DaemonArgs;
use super::status::StatusError;
use super::text::{escape_controls, format_time, parse_time};
use crate::config::{AuditConfig, RegistryAccess};

/// Interval between two reads of `tail --follow`.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Maximum number of characters of one value in a one-line entry.
const MAX_VALUE_CHARS: usize = 120;

/// Commands that read the audit log.
#[derive(Subcommand)]
pub enum ReadAuditCommand {
    /// Print the last entries.
    Tail {
        /// Audit log to read.
        #[command(flatten)]
        log: LogArgs,
        /// Number of entries.
        #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 20)]
        lines: usize,
        /// Keep running and print new entries until interrupted.
        #[arg(long, short)]
        follow: bool,
        /// Print one JSON object per line.
        #[arg(long)]
        json: bool,
    },
    /// Show one entry in full.
    Show {
        /// Sequence number of the entry.
        sequence: u64,
        /// Audit log to read.
        #[command(flatten)]
        log: LogArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Export entries to a file, as JSON lines or CSV.
    Export {
        /// Audit log to read.
        #[command(flatten)]
        log: LogArgs,
        /// Output file; must not exist [default: standard output].
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Export entries from this time on (inclusive, UTC): 2026-01-31 or 2026-01-31T12:00:00Z.
        #[arg(long, value_name = "TIME", value_parser = parse_time)]
        from: Option<u64>,
        /// Export entries before this time (exclusive, UTC): 2026-01-31 or 2026-01-31T12:00:00Z.
        #[arg(long, value_name = "TIME", value_parser = parse_time)]
        to: Option<u64>,
        /// Output format.
        #[arg(long, value_enum, default_value_t = ExportFormat::Json)]
        format: ExportFormat,
    },
}

/// Selects the audit log by configuration file or by directory.
#[derive(Args)]
pub struct LogArgs {
    /// Configuration file of the daemon, which names the audit log.
    #[arg(long, value_name = "FILE", required_unless_present = "directory")]
    config: Option<PathBuf>,
    /// Directory of the audit log, for example of a copy, instead of --config.
    #[arg(long, value_name = "DIR", conflicts_with = "config")]
    directory: Option<PathBuf>,
}

impl LogArgs {
    fn directory(self) -> Result<PathBuf, String> {
        match (self.directory, self.config) {
            (Some(directory), _) => Ok(directory),
            (None, Some(config)) => log_directory(&config),
            (None, None) => Err("no audit log given: use --config FILE or --directory DIR".to_owned()),
        }
    }
}

/// Selects the audit log to verify and the trust anchors.
#[derive(Args)]
pub struct VerifyAuditArgs {
    /// Configuration file of the daemon, which names the audit log, the public database and its key.
    #[arg(long, value_name = "FILE", required_unless_present = "directory")]
    config: Option<PathBuf>,
    /// Directory of the audit log, for example of a copy [default: from --config].
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Public database: directory of a mirror or URL of the public listener [default: from --config].
    #[arg(long, value_name = "DIR|URL", requires = "key")]
    log: Option<String>,
    /// Public key of the public database, NAME.vkey of the ceremony [default: from --config].
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// Certificate of an access CA that certifies officers, access-ca.pem of the ceremony; repeatable. With --config the access
    /// CAs of keys.toml are trusted too.
    #[arg(long, value_name = "FILE")]
    access_ca: Vec<PathBuf>,
    /// Confirm a loss that the officers accepted: index of the public database entry that covers the lost audit entries;
    /// repeatable.
    #[arg(long = "accepted-loss", value_name = "INDEX")]
    accepted_losses: Vec<u64>,
    /// Verify only the hash chain, no signatures and no checkpoints in the public database.
    #[arg(long, conflicts_with_all = ["log", "key", "access_ca", "accepted_losses"])]
    chain_only: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl VerifyAuditArgs {
    /// Verifies the log and fails on any finding.
    pub fn run(self) -> Result<(), String> {
        let config = self.config.as_deref().map(AuditConfig::load).transpose().map_err(|e| e.to_string())?;
        let directory = self.directory.clone().or_else(|| config.as_ref().map(|config| config.directory.clone()));
        let directory = directory.ok_or("no audit log given: use --config FILE or --directory DIR")?;
        let result = match self.trust(config.as_ref(), &directory)? {
            None => spp_log::audit::verify(&directory),
            Some(trust) => spp_log::audit::verify_with(&directory, &trust),
        };
        if self.json {
            println!("{:#}", spp_log::audit::verified_json(&result));
        }
        let verified = result.map_err(|e| e.to_string())?;
        if !self.json {
            println!("{verified}");
        }
        Ok(())
    }

    /// Trust anchors for the verification; `None` with `--chain-only`.
    fn trust(&self, config: Option<&AuditConfig>, directory: &Path) -> Result<Option<Trust>, String> {
        if self.chain_only {
            return Ok(None);
        }
        let access = self.config.as_deref().map(RegistryAccess::load).transpose().map_err(|e| e.to_string())?;
        let key = match &self.key {
            Some(path) => {
                let key = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
                Some(key.trim().parse().map_err(|e: TlogError| format!("{}: {e}", path.display()))?)
            }
            None => access.as_ref().map(|access| access.key.clone()),
        };
        let key: LogKey =
            key.ok_or("no public key for the checkpoints: give --key FILE or --config FILE, or use --chain-only")?;
        let source = self.log.clone().or_else(|| access.as_ref().map(|access| access.directory.display().to_string()));
        let published = match source {
            Some(source) => {
                let node = match config {
                    Some(config) => Some(config.node.clone()),
                    None => first_node(directory)?,
                };
                let node = node.ok_or("the audit log is empty, so its node name is unknown: give --config FILE")?;
                Some(published_checkpoints(&source, &key, &node)?)
            }
            None => None,
        };
        let mut authorities = access.map(|access| access.callers).unwrap_or_default();
        for path in &self.access_ca {
            let pem = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
            let authority = IssuerCertificate::from_pem_with_default_algorithm(&pem)
                .map_err(|e| format!("{}: {e}", path.display()))?;
            authorities.push(authority.public_key().clone());
        }
        Ok(Some(Trust { key: Some(key), authorities, published, accepted_losses: self.accepted_losses.clone() }))
    }
}

/// Node name of the first entry; `None` if the log is empty.
fn first_node(directory: &Path) -> Result<Option<String>, String> {
    let mut entries = Entries::open(directory).map_err(|e| e.to_string())?;
    // The verification reports an invalid first entry in more detail.
    Ok(entries.next_entry().ok().flatten().map(|entry| entry.node))
}

/// Copies the daemon's audit log, or appends new entries to an existing copy.
pub async fn fetch_audit(out: &Path, daemon: &DaemonArgs) -> Result<(), StatusError> {
    let failed = |e: io::Error| StatusError::Invalid(format!("{}: {e}", out.display()));
    make_directory(out).map_err(|e| StatusError::Invalid(e.to_string()))?;
    let opened = OpenOptions::new().append(true).create(true).mode(0o600).open(out.join(spp_log::audit::FILE));
    let mut file = opened.map_err(failed)?;
    let before = file.metadata().map_err(failed)?.len();
    let mut client = OfficerClient::connect(&daemon.server, &daemon.tls).await?;
    client.read_audit_log(before, |bytes| file.write_all(bytes)).await?;
    file.sync_all().map_err(failed)?;
    let (now, place) = (file.metadata().map_err(failed)?.len(), out.display());
    let new = now - before;
    match daemon.json {
        true => println!("{:#}", serde_json::json!({ "directory": out, "bytes": now, "new": new })),
        false => println!(
            "{now} bytes in {place}, {new} new; verify with: sppctl audit verify --directory {place} --key LOG.vkey"
        ),
    }
    Ok(())
}

/// Output format of `audit export`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// One JSON object per line.
    Json,
    /// Comma-separated values with a header.
    Csv,
}

impl ReadAuditCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), String> {
        match self {
            Self::Tail { log, lines, follow, json } => tail(&log.directory()?, lines, follow, json),
            Self::Show { sequence, log, json } => show(&log.directory()?, sequence, json),
            Self::Export { log, out, from, to, format } => {
                let filter = |entry: &RecordedEntry| {
                    from.is_none_or(|from| entry.time >= from) && to.is_none_or(|to| entry.time < to)
                };
                export(&log.directory()?, out.as_deref(), filter, format)
            }
        }
    }
}

/// Directory of the audit log named by the configuration. Needs neither the daemon nor the HSM.
pub(super) fn log_directory(config: &Path) -> Result<PathBuf, String> {
    AuditConfig::load(config).map(|audit| audit.directory).map_err(|e| e.to_string())
}

fn tail(directory: &Path, lines: usize, follow: bool, json: bool) -> Result<(), String> {
    let mut entries = Entries::open(directory).map_err(|e| e.to_string())?;
    let mut last = VecDeque::with_capacity(lines.min(1024));
    while let Some(entry) = entries.next_entry().map_err(|e| e.to_string())? {
        if last.len() == lines {
            last.pop_front();
        }
        if lines > 0 {
            last.push_back(entry);
        }
    }
    last.iter().try_for_each(|entry| print_entry(entry, json))?;
    if !follow {
        return Ok(());
    }
    loop {
        match entries.next_entry().map_err(|e| e.to_string())? {
            Some(entry) => print_entry(&entry, json)?,
            None => std::thread::sleep(POLL_INTERVAL),
        }
    }
}

fn print_entry(entry: &RecordedEntry, json: bool) -> Result<(), String> {
    let line = if json { to_json(entry)? } else { format_entry(entry) };
    match writeln!(io::stdout(), "{line}") {
        // The reader closed the pipe, for example `head`.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.map_err(|e| e.to_string()),
    }
}

fn to_json(entry: &RecordedEntry) -> Result<String, String> {
    serde_json::to_string(entry).map_err(|e| e.to_string())
}

/// Formats an entry as one line of text.
pub(super) fn format_entry(entry: &RecordedEntry) -> String {
    let mut line = format!(
        "{:>6}  {}  {:<20} {:<18} {}",
        entry.sequence,
        format_time(entry.time),
        escape_controls(&entry.caller),
        entry.act,
        escape_controls(&entry.outcome.to_string())
    );
    for (name, value) in &entry.details {
        // Writing to a String cannot fail.
        let _ = write!(line, "  {name}={}", truncate(escape_controls(value)));
    }
    line
}

/// Truncates long values such as certificates and signatures; `show` and `export` print them in full.
fn truncate(value: String) -> String {
    match value.char_indices().nth(MAX_VALUE_CHARS) {
        Some((end, _)) => format!("{}…", value.get(..end).unwrap_or_default()),
        None => value,
    }
}

fn show(directory: &Path, sequence: u64, json: bool) -> Result<(), String> {
    let mut entries = Entries::open(directory).map_err(|e| e.to_string())?;
    while let Some(entry) = entries.next_entry().map_err(|e| e.to_string())? {
        if entry.sequence != sequence {
            continue;
        }
        if json {
            println!("{}", serde_json::to_string_pretty(&entry).map_err(|e| e.to_string())?);
            return Ok(());
        }
        println!("entry    {} of node {}", entry.sequence, escape_controls(&entry.node));
        println!("time     {}", format_time(entry.time));
        println!("caller   {}", escape_controls(&entry.caller));
        println!("act      {}", escape_controls(&entry.act));
        println!("outcome  {}", escape_controls(&entry.outcome.to_string()));
        for (name, value) in &entry.details {
            println!("  {name:<16} {}", escape_controls(value));
        }
        return Ok(());
    }
    Err(format!("audit log has no entry {sequence}; sppctl audit tail lists the last entries"))
}

fn export(
    directory: &Path,
    out: Option<&Path>,
    filter: impl Fn(&RecordedEntry) -> bool,
    format: ExportFormat,
) -> Result<(), String> {
    let mut entries = Entries::open(directory).map_err(|e| e.to_string())?;
    let file = |path: &Path| -> Result<File, String> {
        let opened = OpenOptions::new().write(true).create_new(true).open(path);
        opened.map_err(|e| format!("{}: {e}; audit export never overwrites a file", path.display()))
    };
    let sink: Box<dyn Write> = match out {
        Some(path) => Box::new(io::BufWriter::new(file(path)?)),
        None => Box::new(io::BufWriter::new(io::stdout())),
    };
    let failed = |e: io::Error| format!("writing the export: {e}");
    let mut writer = EntryWriter::new(format, sink).map_err(failed)?;
    let mut count = 0_u64;
    while let Some(entry) = entries.next_entry().map_err(|e| e.to_string())? {
        if filter(&entry) {
            writer.write(&entry).map_err(failed)?;
            count += 1;
        }
    }
    writer.finish().map_err(failed)?;
    if let Some(path) = out {
        println!("wrote {count} entries to {}", path.display());
    }
    Ok(())
}

/// Writes exported entries in the selected format.
enum EntryWriter {
    Json(Box<dyn Write>),
    Csv(Box<csv::Writer<Box<dyn Write>>>),
}

impl EntryWriter {
    fn new(format: ExportFormat, sink: Box<dyn Write>) -> io::Result<Self> {
        Ok(match format {
            ExportFormat::Json => Self::Json(sink),
            ExportFormat::Csv => {
                let mut csv = csv::Writer::from_writer(sink);
                csv.write_record(["sequence", "time", "node", "caller", "act", "outcome", "details"])?;
                Self::Csv(Box::new(csv))
            }
        })
    }

    fn write(&mut self, entry: &RecordedEntry) -> io::Result<()> {
        match self {
            Self::Json(sink) => {
                serde_json::to_writer(&mut *sink, entry)?;
                sink.write_all(b"\n")
            }
            Self::Csv(csv) => {
                let (sequence, outcome) = (entry.sequence.to_string(), entry.outcome.to_string());
                let (time, details) = (format_time(entry.time), serde_json::to_string(&entry.details)?);
                csv.write_record([&sequence, &time, &entry.node, &entry.caller, &entry.act, &outcome, &details])?;
                Ok(())
            }
        }
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Self::Json(mut sink) => sink.flush(),
            Self::Csv(mut csv) => csv.flush(),
        }
    }
}
