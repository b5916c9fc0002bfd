//! The public database from an officer's, an auditor's or a mirror keeper's side.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};

use super::files::replace;
use crate::certificate::IssuerCertificate;
use crate::config::RegistryAccess;
use crate::keys::sha256;
use crate::registry::{Verification, VerifyOptions, export, open_source, reindex, verify};
use crate::tlog::{LogKey, SignedCheckpoint};

/// What can be done with the public database. None of it needs the HSM.
#[derive(Subcommand)]
pub enum RegistryCommand {
    /// Make the index anew from the log's files. The daemon must be stopped; it does the same by itself when its index is missing
    /// or damaged.
    Reindex {
        /// The daemon's configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Go on although entries are gone that the old index knows. Their devices can be restored from a mirror alone.
        #[arg(long)]
        accept_loss: bool,
    },
    /// Make a mirror, or bring it up to date: files that any web server or object store can carry. The daemon may run meanwhile.
    Export {
        /// The mirror's directory; made if it is missing.
        dir: PathBuf,
        /// The log that is mirrored: a directory or a web address; without it the one of --config.
        #[arg(long, value_name = "URL|DIR")]
        from: Option<String>,
        /// What is believed.
        #[command(flatten)]
        trust: Trust,
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Walk the whole log as a stranger would: hashes, the checkpoint's signature, that it continues the checkpoint that was seen
    /// last, every certificate, and that nothing unique is there twice. The daemon may run meanwhile.
    Verify {
        /// Where the log is: the daemon's directory, a mirror's, or a web address; without it the one of --config.
        #[arg(value_name = "DIR|URL")]
        place: Option<String>,
        /// What is believed.
        #[command(flatten)]
        trust: Trust,
        /// A manufacturer's CA certificate, PEM; may be given more than once. Without it those of --config.
        #[arg(long, value_name = "FILE")]
        issuer: Vec<PathBuf>,
        /// Where the checkpoint is that was seen last, and where this one is put if all is well [default: a file of this user's for each
        /// log and place].
        #[arg(long, value_name = "FILE")]
        seen: Option<PathBuf>,
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
}

/// What is believed, and how a log is reached.
#[derive(Args)]
pub struct Trust {
    /// The daemon's configuration: its register of keys says who signs.
    #[arg(long, value_name = "FILE", required_unless_present = "log")]
    config: Option<PathBuf>,
    /// The log's public key instead, a vkey file.
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// The CA certificate of a web server that this system does not know.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
}

impl RegistryCommand {
    /// Does it.
    pub fn run(self) -> Result<(), String> {
        match self {
            Self::Reindex { config, accept_loss } => make_index(&config, accept_loss),
            Self::Export { dir, from, trust, json } => mirror(&dir, from, &trust, json),
            Self::Verify { place, trust, issuer, seen, json } => look(place, &trust, &issuer, seen, json),
        }
    }
}

fn make_index(config: &Path, accept_loss: bool) -> Result<(), String> {
    let access = RegistryAccess::load(config).map_err(|e| e.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    let bar = progress();
    let made = reindex(&access.directory, &access.options, &access.key, accept_loss, |done, of| {
        bar.set_length(of);
        bar.set_position(done);
    });
    let made = runtime.block_on(made);
    bar.finish_and_clear();
    let made = made.map_err(|e| e.to_string())?;
    println!("made the index of {} entries of {}", HumanCount(made.entries), access.directory.display());
    if made.lost > 0 {
        println!("{} entries that the old index knew are gone", HumanCount(made.lost));
    }
    Ok(())
}

fn mirror(dir: &Path, from: Option<String>, trust: &Trust, json: bool) -> Result<(), String> {
    let (access, key) = trust.load()?;
    let place = from.or_else(|| access.map(|access| access.directory.display().to_string()));
    let place = place.ok_or("say which log: --from URL|DIR, or --config FILE")?;
    let mut source = open_source(&place, &key, trust.ca.as_deref()).map_err(|e| e.to_string())?;
    let bar = progress();
    let exported = export(&mut *source, &key, dir, &mut |done, of| {
        bar.set_length(of);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let exported = exported.map_err(|e| e.to_string())?;
    let new = exported.now - exported.before;
    if json {
        let told = serde_json::json!({ "directory": dir, "entries": exported.now, "new": new });
        println!("{told:#}");
    } else {
        println!("{}: {} entries, {} of them new", dir.display(), HumanCount(exported.now), HumanCount(new));
    }
    Ok(())
}

fn look(
    place: Option<String>,
    trust: &Trust,
    issuers: &[PathBuf],
    seen: Option<PathBuf>,
    json: bool,
) -> Result<(), String> {
    let (access, key) = trust.load()?;
    let of_config = access.as_ref().map(|access| access.issuers.as_slice()).unwrap_or_default();
    let issuers = if issuers.is_empty() { of_config } else { issuers };
    if issuers.is_empty() {
        return Err("say who signs certificates: --issuer FILE.pem, or --config FILE".to_owned());
    }
    let issuers = issuers.iter().map(|path| issuer(path)).collect::<Result<Vec<_>, _>>()?;
    let place = place.or_else(|| access.map(|access| access.directory.display().to_string()));
    let place = place.ok_or("say which log: DIR or URL, or --config FILE")?;
    let seen = seen.or_else(|| usual_place(&key, &place));
    let known = seen.as_deref().map(seen_before).transpose()?.flatten();
    let mut source = open_source(&place, &key, trust.ca.as_deref()).map_err(|e| e.to_string())?;
    let bar = progress();
    let options = VerifyOptions { key: &key, issuers: &issuers, seen: known.as_deref() };
    let found = verify(&mut *source, &options, &mut |done, of| {
        bar.set_length(of);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    if json {
        println!("{:#}", serde_json::to_value(&found).map_err(|e| e.to_string())?);
    } else {
        tell(&found, &key, known.is_some());
    }
    if let Some(why) = &found.unreachable {
        return Err(format!("{why}; the log was not read to its end, which says nothing against it: try again"));
    }
    if !found.is_good() {
        let count = found.findings.len() as u64 + found.more_findings;
        return Err(format!("{place} is not the log that it should be: {} findings", HumanCount(count)));
    }
    if let (Some(path), Some(checkpoint)) = (&seen, &found.checkpoint) {
        remember(path, checkpoint)?;
    }
    Ok(())
}

fn tell(found: &Verification, key: &LogKey, continued: bool) {
    let mut out = std::io::stdout().lock();
    for finding in &found.findings {
        let _ = writeln!(out, "{}: {}", finding.at, finding.problem);
    }
    if found.more_findings > 0 {
        let _ = writeln!(out, "and {} more", HumanCount(found.more_findings));
    }
    if found.is_good() {
        let since = if continued { ", and it continues what was seen before" } else { "" };
        let _ = writeln!(out, "{}: {} entries, all of them right{since}", key.origin(), HumanCount(found.entries));
        let (records, audits) = (HumanCount(found.records), HumanCount(found.audit_checkpoints));
        let _ = writeln!(out, "device records {records}, audit checkpoints {audits}");
        let _ = writeln!(out, "root {}", found.root);
    }
}

fn remember(path: &Path, checkpoint: &SignedCheckpoint) -> Result<(), String> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(|e| format!("{}: {e}", directory.display()))?;
    }
    replace(path, checkpoint.note()).map_err(|e| e.to_string())
}

/// The checkpoint of the last look, if there was one. One that cannot be read is not taken for none.
fn seen_before(path: &Path) -> Result<Option<Vec<u8>>, String> {
    match std::fs::read(path) {
        Ok(note) => Ok(Some(note)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// Where this user's last look at a log in that place is remembered (XDG base directories). A mirror may be behind the log itself, so
/// each place has a memory of its own.
fn usual_place(key: &LogKey, place: &str) -> Option<PathBuf> {
    let of_user = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = of_user("XDG_STATE_HOME").or_else(|| Some(of_user("HOME")?.join(".local/state")))?;
    let place = std::fs::canonicalize(place).map_or_else(|_| place.to_owned(), |path| path.display().to_string());
    let name = hex::encode(sha256(format!("{key}\n{place}").as_bytes()).get(..16)?);
    Some(state.join("spp/seen").join(name))
}

fn issuer(path: &Path) -> Result<IssuerCertificate, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    IssuerCertificate::from_pem_alone(&text).map_err(|e| format!("{}: {e}", path.display()))
}

fn progress() -> ProgressBar {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{wide_bar} {human_pos}/{human_len}, {per_sec}, {eta} left");
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

impl Trust {
    /// The configuration, if there is one, and the log's key.
    fn load(&self) -> Result<(Option<RegistryAccess>, LogKey), String> {
        let access = self.config.as_deref().map(RegistryAccess::load).transpose().map_err(|e| e.to_string())?;
        let given = self.log.as_deref().map(|path| {
            let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
            text.parse().map_err(|e| format!("{}: {e}", path.display()))
        });
        let key = match (given, &access) {
            (Some(given), _) => given?,
            (None, Some(access)) => access.key.clone(),
            (None, None) => return Err("say which log: --config FILE or --log FILE.vkey".to_owned()),
        };
        Ok((access, key))
    }
}
