//! `sppctl registry`: rebuilds the index of the public database, exports mirrors and verifies logs.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use spp_format::certificate::IssuerCertificate;
use spp_format::keys::sha256;
use spp_format::tlog::{LogKey, SignedCheckpoint};
use spp_log::registry::{Verification, VerifyOptions, export, open_source, verify};

use super::files::replace;
use crate::config::RegistryAccess;
use crate::registry::reindex;

/// Reindex, mirror and verify the public database. Needs no HSM.
#[derive(Subcommand)]
pub enum RegistryCommand {
    /// Rebuild the index from the log files. Stop the daemon first. The daemon rebuilds a missing or damaged index itself when it
    /// starts.
    Reindex {
        /// Configuration file of the daemon.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Continue even if the log has lost entries that the old index contains. Only a mirror can restore them.
        #[arg(long)]
        accept_loss: bool,
    },
    /// Create or update a mirror: static files for any web server or object store. The daemon may be running.
    Export {
        /// Directory of the mirror; created if missing.
        dir: PathBuf,
        /// Log to mirror: URL or directory [default: from --config].
        #[arg(long, value_name = "URL|DIR")]
        from: Option<String>,
        /// Trust anchors.
        #[command(flatten)]
        trust: TrustArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Verify the whole log without trusting the server: hashes, checkpoint signature, consistency with the last seen checkpoint,
    /// certificates, and uniqueness of chip IDs, identities, serial numbers, public keys and sessions. The daemon may be running.
    Verify {
        /// Log to verify: directory of the daemon or of a mirror, or URL [default: from --config].
        #[arg(value_name = "DIR|URL")]
        location: Option<String>,
        /// Trust anchors.
        #[command(flatten)]
        trust: TrustArgs,
        /// Manufacturer CA certificate (PEM); repeatable [default: from --config].
        #[arg(long, value_name = "FILE")]
        issuer: Vec<PathBuf>,
        /// File with the last seen checkpoint; replaced after a successful verification [default: a per-user file for each log
        /// and location].
        #[arg(long, value_name = "FILE")]
        seen: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Trust anchors for a log and its server.
#[derive(Args)]
pub struct TrustArgs {
    /// Configuration file of the daemon: trust the keys in its keys.toml.
    #[arg(long, value_name = "FILE", required_unless_present = "log")]
    config: Option<PathBuf>,
    /// Public key of the log, a vkey file, instead of --config.
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// CA certificate (PEM) of the web server, if the system does not trust it.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
}

impl RegistryCommand {
    /// Runs the command.
    pub fn run(self) -> Result<(), String> {
        match self {
            Self::Reindex { config, accept_loss } => rebuild_index(&config, accept_loss),
            Self::Export { dir, from, trust, json } => export_mirror(&dir, from, &trust, json),
            Self::Verify { location, trust, issuer, seen, json } => verify_log(location, &trust, &issuer, seen, json),
        }
    }
}

fn rebuild_index(config: &Path, accept_loss: bool) -> Result<(), String> {
    let access = RegistryAccess::load(config).map_err(|e| e.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    let bar = progress_bar();
    let result = reindex(&access.directory, &access.options, &access.key, accept_loss, |done, of| {
        bar.set_length(of);
        bar.set_position(done);
    });
    let result = runtime.block_on(result);
    bar.finish_and_clear();
    let reindexed = result.map_err(|e| e.to_string())?;
    println!("rebuilt the index of {} entries in {}", HumanCount(reindexed.entries), access.directory.display());
    if reindexed.lost > 0 {
        println!("{} entries of the old index are lost", HumanCount(reindexed.lost));
    }
    Ok(())
}

fn export_mirror(dir: &Path, from: Option<String>, trust: &TrustArgs, json: bool) -> Result<(), String> {
    let (access, key) = trust.load()?;
    let location = from.or_else(|| access.map(|access| access.directory.display().to_string()));
    let location = location.ok_or("no log given: use --from URL|DIR or --config FILE")?;
    let mut source = open_source(&location, &key, trust.ca.as_deref()).map_err(|e| e.to_string())?;
    let bar = progress_bar();
    let exported = export(&mut *source, &key, dir, &mut |done, of| {
        bar.set_length(of);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let exported = exported.map_err(|e| e.to_string())?;
    let new = exported.entries - exported.entries_before;
    if json {
        let document = serde_json::json!({ "directory": dir, "entries": exported.entries, "new": new });
        println!("{document:#}");
    } else {
        println!("{}: {} entries, {} new", dir.display(), HumanCount(exported.entries), HumanCount(new));
    }
    Ok(())
}

fn verify_log(
    location: Option<String>,
    trust: &TrustArgs,
    issuers: &[PathBuf],
    seen: Option<PathBuf>,
    json: bool,
) -> Result<(), String> {
    let (access, key) = trust.load()?;
    let configured = access.as_ref().map(|access| access.issuers.as_slice()).unwrap_or_default();
    let issuers = if issuers.is_empty() { configured } else { issuers };
    if issuers.is_empty() {
        return Err("no manufacturer CA given: use --issuer FILE.pem or --config FILE".to_owned());
    }
    let issuers = issuers.iter().map(|path| load_issuer(path)).collect::<Result<Vec<_>, _>>()?;
    let location = location.or_else(|| access.map(|access| access.directory.display().to_string()));
    let location = location.ok_or("no log given: use DIR, URL or --config FILE")?;
    let seen = seen.or_else(|| default_seen_path(&key, &location));
    let known = seen.as_deref().map(load_seen).transpose()?.flatten();
    let mut source = open_source(&location, &key, trust.ca.as_deref()).map_err(|e| e.to_string())?;
    let bar = progress_bar();
    let options = VerifyOptions { key: &key, issuers: &issuers, seen: known.as_deref() };
    let found = verify(&mut *source, &options, &mut |done, of| {
        bar.set_length(of);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    if json {
        println!("{:#}", serde_json::to_value(&found).map_err(|e| e.to_string())?);
    } else {
        print_verification(&found, &key, known.is_some());
    }
    if let Some(why) = &found.unreachable {
        return Err(format!(
            "{why}; the log could not be read completely, so the verification is inconclusive: try again"
        ));
    }
    if !found.is_good() {
        let count = found.findings.len() as u64 + found.more_findings;
        return Err(format!("verification of {location} failed: {} findings", HumanCount(count)));
    }
    if let (Some(path), Some(checkpoint)) = (&seen, &found.checkpoint) {
        save_seen(path, checkpoint)?;
    }
    Ok(())
}

fn print_verification(found: &Verification, key: &LogKey, continued: bool) {
    let mut out = std::io::stdout().lock();
    for finding in &found.findings {
        let _ = writeln!(out, "{}: {}", finding.at, finding.problem);
    }
    if found.more_findings > 0 {
        let _ = writeln!(out, "and {} more", HumanCount(found.more_findings));
    }
    if found.is_good() {
        let consistency = if continued { ", consistent with the last seen checkpoint" } else { "" };
        let _ = writeln!(out, "{}: {} entries, all valid{consistency}", key.origin(), HumanCount(found.entries));
        let (records, audits) = (HumanCount(found.records), HumanCount(found.audit_checkpoints));
        let _ = writeln!(out, "device records {records}, audit checkpoints {audits}");
        let _ = writeln!(out, "root {}", found.root);
    }
}

fn save_seen(path: &Path, checkpoint: &SignedCheckpoint) -> Result<(), String> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(|e| format!("{}: {e}", directory.display()))?;
    }
    replace(path, checkpoint.note()).map_err(|e| e.to_string())
}

/// Reads the last seen checkpoint; `None` if the file does not exist. Any other read error is reported.
fn load_seen(path: &Path) -> Result<Option<Vec<u8>>, String> {
    match std::fs::read(path) {
        Ok(note) => Ok(Some(note)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// Default file for the last seen checkpoint of a log at one location (XDG base directories). A mirror may be behind the log, so
/// each location has its own file.
fn default_seen_path(key: &LogKey, location: &str) -> Option<PathBuf> {
    let env_dir = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = env_dir("XDG_STATE_HOME").or_else(|| Some(env_dir("HOME")?.join(".local/state")))?;
    let location =
        std::fs::canonicalize(location).map_or_else(|_| location.to_owned(), |path| path.display().to_string());
    let name = hex::encode(sha256(format!("{key}\n{location}").as_bytes()).get(..16)?);
    Some(state.join("spp/seen").join(name))
}

fn load_issuer(path: &Path) -> Result<IssuerCertificate, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    IssuerCertificate::from_pem_with_default_algorithm(&text).map_err(|e| format!("{}: {e}", path.display()))
}

fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{wide_bar} {human_pos}/{human_len}, {per_sec}, {eta} left");
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

impl TrustArgs {
    /// Loads the configuration, if one is given, and the log's public key.
    fn load(&self) -> Result<(Option<RegistryAccess>, LogKey), String> {
        let access = self.config.as_deref().map(RegistryAccess::load).transpose().map_err(|e| e.to_string())?;
        let given = self.log.as_deref().map(|path| {
            let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
            text.parse().map_err(|e| format!("{}: {e}", path.display()))
        });
        let key = match (given, &access) {
            (Some(given), _) => given?,
            (None, Some(access)) => access.key.clone(),
            (None, None) => {
                return Err("no public key of the log given: use --config FILE or --log FILE.vkey".to_owned());
            }
        };
        Ok((access, key))
    }
}
