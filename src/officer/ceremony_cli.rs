//! `sppctl ceremony`: a look before, the ceremony itself, and its transcript afterwards.

use std::path::{Path, PathBuf};

use clap::Subcommand;

use super::OfficerError;
use super::access_client::OfficerClient;
use super::ceremony::{CeremonyPlan, Held, PlannedAct};
use super::hsm_file::HsmFile;
use super::permit::Permit;
use super::text::{table, trimmed};
use super::transcript::verify_transcript;
use crate::access::{ProtectedAction, RequestId};
use crate::audit::{OfflineEvent, Outcome};
use crate::config::AuditConfig;
use crate::hsm::{Ceremony, KeyManifest, PinSource};
use crate::keys::sha256;
use crate::names::OfficerName;
use crate::proto;
use crate::tlog::{LogKey, TlogError};

const RUN_HELP: &str = "Look first, then hold it:
    sppctl ceremony plan ceremony.toml --hsm hsm.toml --out keys
    sppctl ceremony run ceremony.toml --hsm hsm.toml --out keys --officer o-1

One that destroys or rotates keys, or restores them to others, is approved by another officer before:
    sppctl approvals request ceremony rotate.toml --server https://HOST:7444 --tls tls/o-1
    sppctl approvals approve ID --server https://HOST:7444 --tls tls/o-2
    sppctl ceremony run rotate.toml --hsm hsm.toml --out keys --server https://HOST:7444 --tls tls/o-1

What may stand in the file: hsm-config/README.md, Ceremonies.";

/// Key ceremonies: what is done to keys inside the HSM, from a strict file, with a signed transcript.
#[derive(Subcommand)]
pub enum CeremonyCommand {
    /// Do what the file says: make keys, back them up, import certificates, rotate, restore, check and destroy keys.
    ///
    /// All of it is looked at before anything is done. Nothing is overwritten; attributes are read back; a transcript is written, of a
    /// ceremony that fails half-way too.
    #[command(after_help = RUN_HELP)]
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
        /// The officer listener of the running daemon, https://HOST:PORT: it has the approval of a ceremony that destroys, rotates
        /// or restores keys, and records in its audit log what the ceremony did.
        #[arg(long, value_name = "URL", requires = "tls")]
        server: Option<String>,
        /// The officer's directory with certificate.pem, key.pem and ca.pem, for --server.
        #[arg(long, value_name = "DIR", requires = "server")]
        tls: Option<PathBuf>,
        /// The daemon's configuration, where --server is not given: it names the audit log, beside which is written down what is done.
        #[arg(long, value_name = "FILE", conflicts_with = "server")]
        config: Option<PathBuf>,
        /// Tell the transcript as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Tell what a ceremony would make, back up, import, rotate, restore, check and destroy. Nothing is changed; with --hsm and --out it
    /// is looked whether all of it could be done.
    #[command(after_help = RUN_HELP)]
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
            Self::Run { file, hsm, out, so_pin_file, pin_file, officer, server, tls, config, json } => {
                let plan = CeremonyPlan::load(&file).map_err(|e| e.to_string())?;
                let desk = match server.zip(tls) {
                    Some((server, tls)) => {
                        Some(OfficerClient::connect(&server, &tls).await.map_err(|e| e.to_string())?)
                    }
                    None => None,
                };
                let audit = config.as_deref().map(AuditConfig::load).transpose().map_err(|e| e.to_string())?;
                if desk.is_none() && audit.is_none() && out.join("keys.toml").exists() {
                    eprintln!("sppctl: what it does will be in no audit log: give --server and --tls, or --config");
                }
                let token = open_token(&plan, &hsm, &out, Pins { user: pin_file, so: so_pin_file })?;
                let audit = audit.map(|audit| audit.directory);
                hold(&plan, &token, &out, &officer, (desk, audit), json).await
            }
            Self::Plan { file, hsm, out, json } => ceremony_plan(&file, hsm.as_deref().zip(out.as_deref()), json),
            Self::Verify { file, log, json } => ceremony_verify(&file, &log, json),
        }
    }
}

/// The act that officers approve, for a ceremony that one alone may not hold.
pub(super) fn act_of(path: &Path) -> Result<ProtectedAction, String> {
    if !CeremonyPlan::load(path).map_err(|e| e.to_string())?.may_need_approval() {
        return Err(format!("{} neither destroys, rotates nor restores keys: one officer may hold it", path.display()));
    }
    let file = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(ProtectedAction::ceremony(file))
}

/// Holds it: looked at, approved where that is needed, done, and on record where there is a daemon.
async fn hold(
    plan: &CeremonyPlan,
    token: &Ceremony,
    out: &Path,
    officers: &[OfficerName],
    (mut desk, audit): (Option<OfficerClient>, Option<PathBuf>),
    json: bool,
) -> Result<(), String> {
    if let Some(log) = &audit {
        token_act(plan, officers).write_down(log).map_err(|e| e.to_string())?;
    }
    if desk.is_some() {
        // An approval is used up at the last moment: not by a ceremony that could not begin.
        plan.look(token, out).map_err(|e| e.to_string())?;
    }
    let (permit, request) = match &mut desk {
        Some(desk) if !plan.needs_approval(Some(out)).map_err(|e| e.to_string())?.is_empty() => {
            let (permit, request) = use_approval(desk, plan, out).await?;
            (Some(permit), Some(request))
        }
        _ => (None, None),
    };
    let held = plan.run(token, out, officers, permit);
    let recorded = match &mut desk {
        Some(desk) => desk.record_ceremony(record_of(plan, request, &held)).await.map_err(|e| e.to_string()),
        None => audit.map_or(Ok(()), |log| {
            let act = ended(token_act(plan, officers), &record_of(plan, request, &held));
            act.write_down(&log).map_err(|e| e.to_string())
        }),
    };
    let held = match (held, &recorded) {
        (Err(why), Err(e)) => return Err(format!("{why}; and it is not in the audit log: {e}")),
        (held, _) => held.map_err(|e| e.to_string())?,
    };
    tell(held, json)?;
    recorded.map_err(|e| format!("the ceremony was held, and is not in the audit log: {e}"))
}

/// For the audit log, where no daemon is asked.
fn token_act(plan: &CeremonyPlan, officers: &[OfficerName]) -> OfflineEvent {
    let officers = officers.iter().map(OfficerName::as_str).collect::<Vec<_>>().join(" ");
    let details = [("file_sha256", hex::encode(plan.file_sha256())), ("officers", officers)];
    let details = details.map(|(name, value)| (name.to_owned(), value)).into();
    OfflineEvent { act: "ceremony".to_owned(), details, outcome: Outcome::Begun }
}

fn ended(mut act: OfflineEvent, record: &proto::RecordCeremonyRequest) -> OfflineEvent {
    act.outcome = match record.failure.as_str() {
        "" => Outcome::Done,
        why => Outcome::Failed(why.to_owned()),
    };
    act.details.insert("transcript_sha256".to_owned(), hex::encode(&record.transcript_sha256));
    let acts = (1_u32..).zip(&record.acts);
    act.details.extend(acts.map(|(n, done)| (format!("act {n:02}"), done.clone())));
    act
}

/// What was done.
fn tell(Held { transcript: report, signed }: Held, json: bool) -> Result<(), String> {
    if !signed {
        eprintln!("sppctl: the transcript is not signed: the token has no log key");
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(|e| e.to_string())?);
        return Ok(());
    }
    println!("token {} (serial {}), {}", report.token_label, report.token_serial, report.module);
    let mut acts = table(["act", "key", "known by"], []);
    for key in &report.keys {
        acts.add_row([key.act, key.name.as_str(), &key.fingerprint]);
    }
    println!("{}", trimmed(&acts));
    for path in &report.files {
        println!("wrote {}", path.display());
    }
    if report.keys.iter().any(|key| !READING.contains(&key.act)) {
        println!(
            "keys.toml has changed: restart sppd, which reads it when it starts, for it to use the keys or to forget them"
        );
    }
    Ok(())
}

/// The acts that leave keys.toml as it is.
const READING: [&str; 2] = ["checked", "certificate imported"];

/// The approval of this very file, used up by this.
async fn use_approval(
    desk: &mut OfficerClient,
    plan: &CeremonyPlan,
    out: &Path,
) -> Result<(Permit, RequestId), String> {
    let hash = plan.file_sha256();
    let register = KeyManifest::load(&out.join("keys.toml")).map_err(|e| e.to_string())?;
    let proto::ListApprovalsResponse { approvals: known, node, .. } =
        desk.approvals().await.map_err(|e| e.to_string())?;
    let is_of_it = |approval: &&proto::Approval| {
        let act = ProtectedAction::from_json(&approval.act).ok();
        approval.state == "approved" && act.and_then(|act| act.ceremony_hash()).as_ref() == Some(hash)
    };
    let found = known.iter().find(is_of_it).ok_or_else(|| {
        "no approval of this file waits to be used: sppctl approvals request ceremony FILE, and another officer approves it".to_owned()
    })?;
    let id: RequestId = found.id.parse().map_err(|e: crate::names::NameError| e.to_string())?;
    // Before it is used up, and once more what was used up: the daemon is not believed.
    Permit::verified(&node, found, hash, &register)?;
    let used = desk.use_approval(id, hash).await.map_err(|e| e.to_string())?;
    Ok((Permit::verified(&node, &used, hash, &register)?, id))
}

fn record_of(
    plan: &CeremonyPlan,
    request: Option<RequestId>,
    held: &Result<Held, OfficerError>,
) -> proto::RecordCeremonyRequest {
    let mut record = proto::RecordCeremonyRequest {
        file_sha256: plan.file_sha256().to_vec(),
        approval: request.map(|id| id.as_bytes().to_vec()).unwrap_or_default(),
        failure: held.as_ref().err().map(ToString::to_string).unwrap_or_default(),
        ..Default::default()
    };
    let held = match held {
        Ok(held) => held,
        Err(OfficerError::CutShort { held, .. }) => held,
        Err(_) => return record,
    };
    let transcript = &held.transcript;
    let json = transcript.files.iter().rfind(|path| path.extension().is_some_and(|ext| ext == "json"));
    // Of one that could not be written the failure tells.
    let json = json.and_then(|path| std::fs::read(path).ok());
    record.transcript_sha256 = json.map(|json| sha256(&json).to_vec()).unwrap_or_default();
    let acts = transcript.keys.iter().map(|key| format!("{} {} {}", key.act, key.name, key.fingerprint));
    record.acts = acts.take(MAX_RECORDED).collect();
    record
}

/// As many acts as a record of the audit log takes; the transcript has all of them.
const MAX_RECORDED: usize = 64;

/// The files with PINs that the command line names.
#[derive(Default)]
struct Pins {
    user: Option<PathBuf>,
    so: Option<PathBuf>,
}

/// The token of a ceremony, initialised if its file says so, and nothing else that can be known before would be in its way.
fn open_token(plan: &CeremonyPlan, hsm: &Path, out: &Path, pins: Pins) -> Result<Ceremony, String> {
    let hsm = HsmFile::load(hsm).map_err(|e| e.to_string())?;
    let pin = pins.user.map_or(hsm.pin, PinSource::File);
    hsm.module.enter_environment().map_err(|e| e.to_string())?;
    let opened = match (plan.token_label(), pins.so) {
        (None, None) => Ceremony::open(&hsm.module, &hsm.token, &pin),
        (None, Some(_)) => return Err("--so-pin-file is for a ceremony that has a [token]; leave it out".to_owned()),
        (Some(_), None) => return Err("the ceremony initialises its token: give --so-pin-file".to_owned()),
        (Some(label), Some(_)) if label != hsm.token.label => {
            return Err(format!("the ceremony is for a token {label}, hsm.toml for {}", hsm.token.label));
        }
        (Some(label), Some(so_pin)) => {
            plan.look_ahead(&hsm.module, out).map_err(|e| e.to_string())?;
            Ceremony::initialise(&hsm.module, label, &PinSource::File(so_pin), &pin)
        }
    };
    opened.map_err(|e| e.to_string())
}

fn ceremony_plan(file: &Path, on: Option<(&Path, &Path)>, json: bool) -> Result<(), String> {
    let plan = CeremonyPlan::load(file).map_err(|e| e.to_string())?;
    if let Some((hsm, out)) = on {
        let looked = match plan.token_label() {
            None => plan.look(&open_token(&plan, hsm, out, Pins::default())?, out),
            Some(_) => plan.look_ahead(&HsmFile::load(hsm).map_err(|e| e.to_string())?.module, out),
        };
        looked.map_err(|e| e.to_string())?;
    }
    let out = on.map(|(_, out)| out);
    let acts = plan.acts(out).map_err(|e| e.to_string())?;
    let needed = plan.needs_approval(out).map_err(|e| e.to_string())?;
    if json {
        let told = serde_json::json!({
            "token": plan.token_label(),
            "keys": acts,
            "needs_approval": needed,
            "looked_at_the_token": on.is_some() && plan.token_label().is_none(),
        });
        println!("{told:#}");
        return Ok(());
    }
    if let Some(label) = plan.token_label() {
        println!("would initialise the token {label}");
    }
    println!("{}", planned(&acts));
    if !needed.is_empty() {
        let (acts, file) = (needed.join(" and "), file.display());
        println!("it {acts}: a second officer must approve it; sppctl approvals request ceremony {file}");
    }
    println!(
        "{}",
        match (on, plan.token_label()) {
            (Some(_), None) => "all names and files are free; nothing was changed",
            (Some(_), Some(_)) => "all files are free, and the token is still to be made; nothing was changed",
            (None, _) => "nothing was looked at but the file; add --hsm and --out to see whether all names are free",
        }
    );
    Ok(())
}

fn planned(acts: &[PlannedAct]) -> String {
    let mut rows = table(["would", "key", "kind", "what", "files"], []);
    for PlannedAct { act, name, kind, what, files, .. } in acts {
        let files: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
        rows.add_row([act, name.as_str(), kind, what, &files.join(", ")]);
    }
    trimmed(&rows)
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
