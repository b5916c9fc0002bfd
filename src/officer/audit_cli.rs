//! `sppctl audit tail|show|export`: reading the audit log. The daemon may run meanwhile, and need not.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::access_client::OfficerClient;
use super::files::make_directory;
use super::pool_cli::DaemonArgs;
use super::status::StatusError;
use super::text::{at, moment, printable};
use crate::audit::{self, Entries, Recorded, Trust};
use crate::certificate::IssuerCertificate;
use crate::config::{AuditConfig, RegistryAccess};
use crate::registry::published_checkpoints;
use crate::tlog::{LogKey, TlogError};

/// How often it is looked for new entries.
const LOOK: Duration = Duration::from_millis(500);

/// Most characters of a value in a line.
const LONGEST: usize = 120;

/// Reading the audit log.
#[derive(Subcommand)]
pub enum ReadAuditCommand {
    /// Tell the last entries.
    Tail {
        /// Which log.
        #[command(flatten)]
        log: LogArgs,
        /// How many.
        #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 20)]
        lines: usize,
        /// Go on with those to come, until it is interrupted.
        #[arg(long, short)]
        follow: bool,
        /// Tell each as a line of JSON.
        #[arg(long)]
        json: bool,
    },
    /// Tell all of one entry.
    Show {
        /// Its number in the log.
        sequence: u64,
        /// Which log.
        #[command(flatten)]
        log: LogArgs,
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write entries into a file, for auditors and their programs.
    Export {
        /// Which log.
        #[command(flatten)]
        log: LogArgs,
        /// The file, which must not exist; standard output without it.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// The first moment, 2026-01-31 or 2026-01-31T12:00:00Z.
        #[arg(long, value_name = "TIME", value_parser = moment)]
        from: Option<u64>,
        /// The first moment that is not wanted any more.
        #[arg(long, value_name = "TIME", value_parser = moment)]
        to: Option<u64>,
        /// In which form.
        #[arg(long, value_enum, default_value_t = Form::Json)]
        format: Form,
    },
}

/// Which log is read.
#[derive(Args)]
pub struct LogArgs {
    /// The daemon's configuration, which names the log.
    #[arg(long, value_name = "FILE", required_unless_present = "directory")]
    config: Option<PathBuf>,
    /// The log's directory, a copy of it for example, instead.
    #[arg(long, value_name = "DIR", conflicts_with = "config")]
    directory: Option<PathBuf>,
}

impl LogArgs {
    fn directory(self) -> Result<PathBuf, String> {
        match (self.directory, self.config) {
            (Some(directory), _) => Ok(directory),
            (None, Some(config)) => log_directory(&config),
            (None, None) => Err("say which log: --config FILE or --directory DIR".to_owned()),
        }
    }
}

/// Which log is verified, and against what.
#[derive(Args)]
pub struct VerifyAuditArgs {
    /// The daemon's configuration: it names the log, the public database and its key.
    #[arg(long, value_name = "FILE", required_unless_present = "directory")]
    config: Option<PathBuf>,
    /// The log's directory, a copy of it for example, instead of the configuration's.
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// The public database: a mirror's directory or the daemon's web address, instead of the configuration's.
    #[arg(long, value_name = "DIR|URL", requires = "key")]
    log: Option<String>,
    /// The public key of the public database, NAME.vkey of the ceremony, instead of the configuration's.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The certificate of an access key, access-ca.pem of the ceremony: whoever it certifies is an officer. With --config those of its
    /// register are known; may be given more than once.
    #[arg(long, value_name = "FILE")]
    access_ca: Vec<PathBuf>,
    /// A loss that the officers have accepted, by the entry of the public database that knows of what is lost; may be given more than once.
    #[arg(long, value_name = "INDEX")]
    given_up: Vec<u64>,
    /// Look at the chain alone, not at signatures and the public database.
    #[arg(long, conflicts_with_all = ["log", "key", "access_ca", "given_up"])]
    chain_only: bool,
    /// Tell it as JSON.
    #[arg(long)]
    json: bool,
}

impl VerifyAuditArgs {
    /// Verifies, and fails if anything is not as it should be.
    pub fn run(self) -> Result<(), String> {
        let config = self.config.as_deref().map(AuditConfig::load).transpose().map_err(|e| e.to_string())?;
        let directory = self.directory.clone().or_else(|| config.as_ref().map(|config| config.directory.clone()));
        let directory = directory.ok_or("say which log: --config FILE or --directory DIR")?;
        let found = match self.trust(config.as_ref(), &directory)? {
            None => audit::verify(&directory),
            Some(trust) => audit::verify_with(&directory, &trust),
        };
        if self.json {
            println!("{:#}", audit::verified_json(&found));
        }
        let verified = found.map_err(|e| e.to_string())?;
        if !self.json {
            println!("{verified}");
        }
        Ok(())
    }

    /// What it is held against; none if the chain alone is looked at.
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
            key.ok_or("say whose checkpoints: --key FILE, or --config FILE; or look at the --chain-only")?;
        let place = self.log.clone().or_else(|| access.as_ref().map(|access| access.directory.display().to_string()));
        let published = match place {
            Some(place) => {
                let node = match config {
                    Some(config) => Some(config.node.clone()),
                    None => first_node(directory)?,
                };
                let node = node.ok_or("the log is empty, and only --config tells whose it is")?;
                Some(published_checkpoints(&place, &key, &node)?)
            }
            None => None,
        };
        let mut authorities = access.map(|access| access.callers).unwrap_or_default();
        for path in &self.access_ca {
            let pem = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
            let authority = IssuerCertificate::from_pem_alone(&pem).map_err(|e| format!("{}: {e}", path.display()))?;
            authorities.push(authority.public_key().clone());
        }
        Ok(Some(Trust { key: Some(key), authorities, published, given_up: self.given_up.clone() }))
    }
}

/// The node whose log it is; none while it is empty.
fn first_node(directory: &Path) -> Result<Option<String>, String> {
    let mut entries = Entries::open(directory).map_err(|e| e.to_string())?;
    // A first entry that does not fit is found by the verification, which says more.
    Ok(entries.next_entry().ok().flatten().map(|entry| entry.node))
}

/// Copies the log of the running daemon, or goes on with the copy.
pub async fn fetch_audit(out: &Path, daemon: &DaemonArgs) -> Result<(), StatusError> {
    let failed = |e: io::Error| StatusError::Unfit(format!("{}: {e}", out.display()));
    make_directory(out).map_err(|e| StatusError::Unfit(e.to_string()))?;
    let opened = OpenOptions::new().append(true).create(true).mode(0o600).open(out.join(audit::FILE));
    let mut file = opened.map_err(failed)?;
    let before = file.metadata().map_err(failed)?.len();
    let mut desk = OfficerClient::connect(&daemon.server, &daemon.tls).await?;
    desk.read_audit_log(before, |bytes| file.write_all(bytes)).await?;
    file.sync_all().map_err(failed)?;
    let (now, place) = (file.metadata().map_err(failed)?.len(), out.display());
    let new = now - before;
    match daemon.json {
        true => println!("{:#}", serde_json::json!({ "directory": out, "bytes": now, "new": new })),
        false => println!(
            "{now} bytes in {place}, {new} of them new; sppctl audit verify --directory {place} --key LOG.vkey looks at them"
        ),
    }
    Ok(())
}

/// The form of exported entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// One JSON object in a line.
    Json,
    /// Comma-separated values with a header.
    Csv,
}

impl ReadAuditCommand {
    /// Does it.
    pub fn run(self) -> Result<(), String> {
        match self {
            Self::Tail { log, lines, follow, json } => tail(&log.directory()?, lines, follow, json),
            Self::Show { sequence, log, json } => show(&log.directory()?, sequence, json),
            Self::Export { log, out, from, to, format } => {
                let wanted = |entry: &Recorded| {
                    from.is_none_or(|from| entry.time >= from) && to.is_none_or(|to| entry.time < to)
                };
                export(&log.directory()?, out.as_deref(), wanted, format)
            }
        }
    }
}

/// The log's directory; there may be no daemon and no HSM.
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
    last.iter().try_for_each(|entry| say(entry, json))?;
    if !follow {
        return Ok(());
    }
    loop {
        match entries.next_entry().map_err(|e| e.to_string())? {
            Some(entry) => say(&entry, json)?,
            None => std::thread::sleep(LOOK),
        }
    }
}

fn say(entry: &Recorded, json: bool) -> Result<(), String> {
    let line = if json { to_json(entry)? } else { in_a_line(entry) };
    match writeln!(io::stdout(), "{line}") {
        // Whoever reads has had enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.map_err(|e| e.to_string()),
    }
}

fn to_json(entry: &Recorded) -> Result<String, String> {
    serde_json::to_string(entry).map_err(|e| e.to_string())
}

/// An entry in a line, for people.
pub(super) fn in_a_line(entry: &Recorded) -> String {
    let mut line = format!(
        "{:>6}  {}  {:<20} {:<18} {}",
        entry.sequence,
        at(entry.time),
        printable(&entry.caller),
        entry.act,
        printable(&entry.outcome.to_string())
    );
    for (name, value) in &entry.details {
        // Writing into a string does not fail.
        let _ = write!(line, "  {name}={}", shortened(printable(value)));
    }
    line
}

/// Certificates and signatures would hide the rest: `show` and `export` tell all of a value.
fn shortened(value: String) -> String {
    match value.char_indices().nth(LONGEST) {
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
        println!("entry    {} of node {}", entry.sequence, printable(&entry.node));
        println!("time     {}", at(entry.time));
        println!("caller   {}", printable(&entry.caller));
        println!("act      {}", printable(&entry.act));
        println!("outcome  {}", printable(&entry.outcome.to_string()));
        for (name, value) in &entry.details {
            println!("  {name:<16} {}", printable(value));
        }
        return Ok(());
    }
    Err(format!("the audit log has no entry {sequence}; sppctl audit tail tells the last ones"))
}

fn export(
    directory: &Path,
    out: Option<&Path>,
    wanted: impl Fn(&Recorded) -> bool,
    format: Form,
) -> Result<(), String> {
    let mut entries = Entries::open(directory).map_err(|e| e.to_string())?;
    let file = |path: &Path| -> Result<File, String> {
        let opened = OpenOptions::new().write(true).create_new(true).open(path);
        opened.map_err(|e| format!("{}: {e}; an export overwrites nothing", path.display()))
    };
    let sink: Box<dyn Write> = match out {
        Some(path) => Box::new(io::BufWriter::new(file(path)?)),
        None => Box::new(io::BufWriter::new(io::stdout())),
    };
    let failed = |e: io::Error| format!("writing the export: {e}");
    let mut rows = Rows::begin(format, sink).map_err(failed)?;
    let mut count = 0_u64;
    while let Some(entry) = entries.next_entry().map_err(|e| e.to_string())? {
        if wanted(&entry) {
            rows.add(&entry).map_err(failed)?;
            count += 1;
        }
    }
    rows.end().map_err(failed)?;
    if let Some(path) = out {
        println!("wrote {count} entries to {}", path.display());
    }
    Ok(())
}

/// Where exported entries go, in their form.
enum Rows {
    Json(Box<dyn Write>),
    Csv(Box<csv::Writer<Box<dyn Write>>>),
}

impl Rows {
    fn begin(form: Form, sink: Box<dyn Write>) -> io::Result<Self> {
        Ok(match form {
            Form::Json => Self::Json(sink),
            Form::Csv => {
                let mut csv = csv::Writer::from_writer(sink);
                csv.write_record(["sequence", "time", "node", "caller", "act", "outcome", "details"])?;
                Self::Csv(Box::new(csv))
            }
        })
    }

    fn add(&mut self, entry: &Recorded) -> io::Result<()> {
        match self {
            Self::Json(sink) => {
                serde_json::to_writer(&mut *sink, entry)?;
                sink.write_all(b"\n")
            }
            Self::Csv(csv) => {
                let (sequence, outcome) = (entry.sequence.to_string(), entry.outcome.to_string());
                let (time, details) = (at(entry.time), serde_json::to_string(&entry.details)?);
                csv.write_record([&sequence, &time, &entry.node, &entry.caller, &entry.act, &outcome, &details])?;
                Ok(())
            }
        }
    }

    fn end(self) -> io::Result<()> {
        match self {
            Self::Json(mut sink) => sink.flush(),
            Self::Csv(mut csv) => csv.flush(),
        }
    }
}
