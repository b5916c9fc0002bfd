//! `sppctl ceremony`: a look before, the ceremony itself, and its transcript afterwards.

use std::path::{Path, PathBuf};

use clap::Subcommand;

use super::ceremony::{CeremonyPlan, Held};
use super::desk::AtDesk;
use super::hsm_file::HsmFile;
use super::permit::Permit;
use super::text::{table, trimmed};
use super::transcript::verify_transcript;
use crate::access::{Act, RequestId};
use crate::hsm::{Ceremony, PinSource};
use crate::keys::sha256;
use crate::names::OfficerName;
use crate::proto;
use crate::tlog::{LogKey, TlogError};

/// Key ceremonies: keys made inside the HSM.
#[derive(Subcommand)]
pub enum CeremonyCommand {
    /// Make the keys that the file names. Nothing is overwritten; attributes are read back; a transcript is written.
    Run {
        /// The ceremony file.
        file: PathBuf,
        /// Which token: hsm.toml.
        #[arg(long, value_name = "FILE")]
        hsm: PathBuf,
        /// Where keys.toml, the certificates or CSRs and the transcript go.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// File with the security officer's PIN, for a ceremony that initialises its token.
        #[arg(long, value_name = "FILE")]
        so_pin_file: Option<PathBuf>,
        /// File with the user PIN, instead of the one that hsm.toml names.
        #[arg(long, value_name = "FILE")]
        pin_file: Option<PathBuf>,
        /// An officer who holds the ceremony, for the transcript; may be given more than once.
        #[arg(long, value_name = "NAME")]
        officer: Vec<OfficerName>,
        /// The officer listener of the running daemon, https://HOST:PORT: it has the approval of a ceremony that destroys or rotates
        /// keys, and records in its audit log what the ceremony did.
        #[arg(long, value_name = "URL", requires = "tls")]
        server: Option<String>,
        /// The officer's directory with certificate.pem, key.pem and ca.pem, for --server.
        #[arg(long, value_name = "DIR", requires = "server")]
        tls: Option<PathBuf>,
        /// Tell the transcript as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Tell what a ceremony would make. Nothing is changed; with --hsm and --out it is looked whether all names are free.
    Plan {
        /// The ceremony file.
        file: PathBuf,
        /// Which token: hsm.toml.
        #[arg(long, value_name = "FILE", requires = "out")]
        hsm: Option<PathBuf>,
        /// Where the files would go.
        #[arg(long, value_name = "DIR", requires = "hsm")]
        out: Option<PathBuf>,
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Verify the transcript of a ceremony against the log's public key, and the JSON beside it.
    Verify {
        /// transcript.txt.
        file: PathBuf,
        /// The log's public key, NAME.vkey of the ceremony.
        #[arg(long, value_name = "FILE")]
        log: PathBuf,
        /// Tell it as JSON.
        #[arg(long)]
        json: bool,
    },
}

impl CeremonyCommand {
    /// Does it.
    pub async fn run(self) -> Result<(), String> {
        match self {
            Self::Run { file, hsm, out, so_pin_file, pin_file, officer, server, tls, json } => {
                let plan = CeremonyPlan::load(&file).map_err(|e| e.to_string())?;
                let desk = match server.zip(tls) {
                    Some((server, tls)) => Some(AtDesk::connect(&server, &tls).await.map_err(|e| e.to_string())?),
                    None => None,
                };
                let token = token_of(&plan, &hsm, so_pin_file, pin_file)?;
                hold(&plan, &token, &out, &officer, desk, json).await
            }
            Self::Plan { file, hsm, out, json } => ceremony_plan(&file, hsm.as_deref().zip(out.as_deref()), json),
            Self::Verify { file, log, json } => ceremony_verify(&file, &log, json),
        }
    }
}

/// The act that officers approve, for a ceremony that one alone may not hold.
pub(super) fn act_of(path: &Path) -> Result<Act, String> {
    let needed = CeremonyPlan::load(path).map_err(|e| e.to_string())?.needs_approval();
    if needed.is_empty() {
        return Err(format!("{} neither destroys nor rotates keys: one officer may hold it", path.display()));
    }
    let file = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(Act::ceremony(file))
}

/// Holds it: looked at, approved where that is needed, done, and on record where there is a daemon.
async fn hold(
    plan: &CeremonyPlan,
    token: &Ceremony,
    out: &Path,
    officers: &[OfficerName],
    mut desk: Option<AtDesk>,
    json: bool,
) -> Result<(), String> {
    if desk.is_some() {
        // An approval is used up at the last moment: not by a ceremony that could not begin.
        plan.look(token, out).map_err(|e| e.to_string())?;
    }
    let (permit, request) = match &mut desk {
        Some(desk) if !plan.needs_approval().is_empty() => {
            let (permit, request) = use_approval(desk, plan).await?;
            (Some(permit), Some(request))
        }
        _ => (None, None),
    };
    let held = plan.run(token, out, officers, permit).map_err(|e| e.to_string());
    if let Some(desk) = &mut desk {
        let recorded = desk.record_ceremony(record_of(plan, request, &held)?).await;
        recorded.map_err(|e| format!("the ceremony was held, and is not in the audit log: {e}"))?;
    }
    let Held { transcript: report, signed } = held?;
    if !signed {
        eprintln!("sppctl: the transcript is not signed: the token has no log key");
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(|e| e.to_string())?);
        return Ok(());
    }
    println!("token {} (serial {}), {}", report.token_label, report.token_serial, report.module);
    let mut acts = table([], []);
    for key in &report.keys {
        acts.add_row([key.act.to_owned(), key.name.to_string(), key.fingerprint.clone()]);
    }
    if !report.keys.is_empty() {
        println!("{}", trimmed(&acts));
    }
    for path in &report.files {
        println!("  wrote {}", path.display());
    }
    Ok(())
}

/// The approval of this very file, used up by this.
async fn use_approval(desk: &mut AtDesk, plan: &CeremonyPlan) -> Result<(Permit, RequestId), String> {
    let hash = plan.file_sha256();
    let known = desk.approvals().await.map_err(|e| e.to_string())?.approvals;
    let is_of_it = |approval: &&proto::Approval| {
        let act = Act::from_json(&approval.act).ok();
        approval.state == "approved" && act.and_then(|act| act.ceremony_hash()).as_ref() == Some(hash)
    };
    let found = known.iter().find(is_of_it).ok_or_else(|| {
        "no approval of this file waits to be used: sppctl approvals request ceremony FILE, and another officer approves it".to_owned()
    })?;
    let id: RequestId = found.id.parse().map_err(|e: crate::names::NameError| e.to_string())?;
    let used = desk.use_approval(id, hash).await.map_err(|e| e.to_string())?;
    let signers = used.requested.iter().chain(&used.approvals);
    let officers = signers.map(|signed| signed.officer.parse()).collect::<Result<Vec<OfficerName>, _>>();
    Ok((Permit::new(used.id, *hash, officers.map_err(|e| e.to_string())?), id))
}

fn record_of(
    plan: &CeremonyPlan,
    request: Option<RequestId>,
    held: &Result<Held, String>,
) -> Result<proto::RecordCeremonyRequest, String> {
    let mut record = proto::RecordCeremonyRequest {
        file_sha256: plan.file_sha256().to_vec(),
        approval: request.map(|id| id.as_bytes().to_vec()).unwrap_or_default(),
        ..Default::default()
    };
    match held {
        Ok(Held { transcript, .. }) => {
            let json = transcript.files.iter().rfind(|path| path.extension().is_some_and(|ext| ext == "json"));
            let json = json.map(std::fs::read).transpose().map_err(|e| e.to_string())?;
            record.transcript_sha256 = json.map(|json| sha256(&json).to_vec()).unwrap_or_default();
            record.acts =
                transcript.keys.iter().map(|key| format!("{} {} {}", key.act, key.name, key.fingerprint)).collect();
        }
        Err(why) => record.failure.clone_from(why),
    }
    Ok(record)
}

fn open_token(hsm: &Path) -> Result<Ceremony, String> {
    let hsm = HsmFile::load(hsm).map_err(|e| e.to_string())?;
    hsm.module.enter_environment().map_err(|e| e.to_string())?;
    Ceremony::open(&hsm.module, &hsm.token, &hsm.pin).map_err(|e| e.to_string())
}

/// The token of a ceremony, initialised if its file says so.
fn token_of(
    plan: &CeremonyPlan,
    hsm: &Path,
    so_pin_file: Option<PathBuf>,
    pin_file: Option<PathBuf>,
) -> Result<Ceremony, String> {
    let hsm = HsmFile::load(hsm).map_err(|e| e.to_string())?;
    let pin = pin_file.map_or(hsm.pin, PinSource::File);
    hsm.module.enter_environment().map_err(|e| e.to_string())?;
    let opened = match (plan.token_label(), so_pin_file) {
        (None, None) => Ceremony::open(&hsm.module, &hsm.token, &pin),
        (None, Some(_)) => return Err("--so-pin-file is for a ceremony that has a [token]; leave it out".to_owned()),
        (Some(_), None) => return Err("the ceremony initialises its token: give --so-pin-file".to_owned()),
        (Some(label), Some(_)) if label != hsm.token.label => {
            return Err(format!("the ceremony is for a token {label}, hsm.toml for {}", hsm.token.label));
        }
        (Some(label), Some(so_pin)) => Ceremony::initialise(&hsm.module, label, &PinSource::File(so_pin), &pin),
    };
    opened.map_err(|e| e.to_string())
}

fn ceremony_plan(file: &Path, on: Option<(&Path, &Path)>, json: bool) -> Result<(), String> {
    let plan = CeremonyPlan::load(file).map_err(|e| e.to_string())?;
    if let Some((hsm, out)) = on {
        if plan.token_label().is_some() {
            return Err(
                "the ceremony initialises its token, which is not there yet; leave --hsm and --out out".to_owned()
            );
        }
        plan.look(&open_token(hsm)?, out).map_err(|e| e.to_string())?;
    }
    let acts = plan.acts(on.map(|(_, out)| out)).map_err(|e| e.to_string())?;
    if json {
        let told = serde_json::json!({
            "token": plan.token_label(),
            "keys": acts,
            "needs_approval": plan.needs_approval(),
            "looked_at_the_token": on.is_some(),
        });
        println!("{told:#}");
        return Ok(());
    }
    if let Some(label) = plan.token_label() {
        println!("  would initialise the token {label}");
    }
    let mut planned = table([], []);
    for act in &acts {
        let files: String = act.files.iter().map(|file| format!(", {}", file.display())).collect();
        let (what, name) = (format!("would {}", act.act), act.name.to_string());
        planned.add_row([what, name, act.kind.clone(), format!("{}{files}", act.what)]);
    }
    if !acts.is_empty() {
        println!("{}", trimmed(&planned));
    }
    if !plan.needs_approval().is_empty() {
        println!("it {}: a second officer must approve it", plan.needs_approval().join(" and "));
    }
    match on {
        Some(_) => println!("all names and files are free; nothing was changed"),
        None => println!("nothing was looked at but the file; add --hsm and --out to see whether all names are free"),
    }
    Ok(())
}

fn ceremony_verify(file: &Path, log: &Path, json: bool) -> Result<(), String> {
    let key = std::fs::read_to_string(log).map_err(|e| format!("{}: {e}", log.display()))?;
    let key: LogKey = key.trim().parse().map_err(|e: TlogError| format!("{}: {e}", log.display()))?;
    let verified = verify_transcript(file, &key).map_err(|e| e.to_string())?;
    match json {
        true => println!("{}", serde_json::to_string_pretty(&verified).map_err(|e| e.to_string())?),
        false => print!("{}", verified.text),
    }
    let beside = file.with_extension("json");
    if verified.json_fits == Some(false) {
        return Err(format!("{} is not the file that the signed text names: it was changed", beside.display()));
    }
    if !json {
        let beside = if verified.json_fits.is_some() { format!("; {} fits", beside.display()) } else { String::new() };
        println!("signed by the key of {}{beside}", verified.signed_by);
    }
    Ok(())
}
