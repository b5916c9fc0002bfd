//! `sppctl ceremony`: plans and runs key ceremonies and verifies their transcripts.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use spp_format::approval::{ProtectedAction, RequestId};
use spp_format::keys::sha256;
use spp_format::names::OfficerName;
use spp_format::tlog::{LogKey, TlogError};
use spp_proto as proto;

use super::OfficerError;
use super::access_client::OfficerClient;
use super::ceremony::{CeremonyOutcome, CeremonyPlan, PlannedStep};
use super::hsm_file::HsmFile;
use super::permit::Permit;
use super::text::{render, table};
use super::transcript::verify_transcript;
use crate::audit::{OfflineEvent, Outcome};
use crate::config::AuditConfig;
use crate::hsm::{Ceremony, KeyManifest, PinSource};

const RUN_HELP: &str = "Plan, then run:
    sppctl ceremony plan ceremony.toml --hsm hsm.toml --out keys
    sppctl ceremony run ceremony.toml --hsm hsm.toml --out keys --officer o-1

A ceremony that destroys or rotates keys, or restores keys to a token that has keys, needs the approval of another officer:
    sppctl approvals request ceremony rotate.toml --server https://HOST:7444 --tls tls/o-1
    sppctl approvals approve ID --server https://HOST:7444 --tls tls/o-2
    sppctl ceremony run rotate.toml --hsm hsm.toml --out keys --server https://HOST:7444 --tls tls/o-1

Format of the ceremony file: hsm-config/README.md, Ceremonies.";

/// Plan and run key ceremonies: a strict file lists the changes to the keys in the HSM, and a signed transcript records them.
#[derive(Subcommand)]
pub enum CeremonyCommand {
    /// Run a ceremony: create keys, back them up, import certificates, rotate, restore, check and destroy keys.
    ///
    /// All steps are checked before the first one runs. Nothing is overwritten; key attributes are read back; a transcript is
    /// written even if a step fails.
    #[command(after_help = RUN_HELP)]
    Run {
        /// Ceremony file (TOML).
        file: PathBuf,
        /// hsm.toml, which names the module, the token and its PIN file.
        #[arg(long, value_name = "FILE")]
        hsm: PathBuf,
        /// Output directory for keys.toml, certificates or CSRs, backups and the transcript.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// File with the SO PIN, for a ceremony that initialises its token.
        #[arg(long, value_name = "FILE")]
        so_pin_file: Option<PathBuf>,
        /// File with the user PIN, instead of pin_file in hsm.toml.
        #[arg(long, value_name = "FILE")]
        pin_file: Option<PathBuf>,
        /// Name of an officer who is present, recorded in the transcript; repeatable.
        #[arg(long, value_name = "NAME")]
        officer: Vec<OfficerName>,
        /// URL of the daemon's officer listener, https://HOST:PORT: use the approval stored there and record the ceremony in the
        /// audit log.
        #[arg(long, value_name = "URL", requires = "tls")]
        server: Option<String>,
        /// Directory with the officer's certificate.pem, key.pem and ca.pem, for --server.
        #[arg(long, value_name = "DIR", requires = "server")]
        tls: Option<PathBuf>,
        /// Configuration file of the daemon, if --server is not given: record the ceremony beside the audit log that it names.
        #[arg(long, value_name = "FILE", conflicts_with = "server")]
        config: Option<PathBuf>,
        /// Print the transcript as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show what a ceremony would do, without changing anything. With --hsm and --out, also check on the token that every step
    /// can succeed.
    #[command(after_help = RUN_HELP)]
    Plan {
        /// Ceremony file (TOML).
        file: PathBuf,
        /// hsm.toml, which names the module, the token and its PIN file.
        #[arg(long, value_name = "FILE", requires = "out")]
        hsm: Option<PathBuf>,
        /// Output directory that the run will use.
        #[arg(long, value_name = "DIR", requires = "hsm")]
        out: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Verify the signature of a transcript and the hash of the JSON file beside it.
    Verify {
        /// Transcript, transcript.txt.
        file: PathBuf,
        /// Public key of the log, NAME.vkey of the ceremony.
        #[arg(long, value_name = "FILE")]
        log: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

impl CeremonyCommand {
    /// Runs the command.
    pub async fn run(self) -> Result<(), String> {
        match self {
            Self::Run { file, hsm, out, so_pin_file, pin_file, officer, server, tls, config, json } => {
                let plan = CeremonyPlan::load(&file).map_err(|e| e.to_string())?;
                let client = match server.zip(tls) {
                    Some((server, tls)) => {
                        Some(OfficerClient::connect(&server, &tls).await.map_err(|e| e.to_string())?)
                    }
                    None => None,
                };
                let audit = config.as_deref().map(AuditConfig::load).transpose().map_err(|e| e.to_string())?;
                if client.is_none() && audit.is_none() && out.join("keys.toml").exists() {
                    eprintln!(
                        "sppctl: warning: the ceremony will not be in any audit log; give --server and --tls, or --config"
                    );
                }
                let token = open_token(&plan, &hsm, &out, Pins { user: pin_file, so: so_pin_file })?;
                let audit = audit.map(|audit| audit.directory);
                run_ceremony(&plan, &token, &out, &officer, (client, audit), json).await
            }
            Self::Plan { file, hsm, out, json } => ceremony_plan(&file, hsm.as_deref().zip(out.as_deref()), json),
            Self::Verify { file, log, json } => ceremony_verify(&file, &log, json),
        }
    }
}

/// The action to approve, for a ceremony that needs approval.
pub(super) fn ceremony_action(path: &Path) -> Result<ProtectedAction, String> {
    if !CeremonyPlan::load(path).map_err(|e| e.to_string())?.may_need_approval() {
        return Err(format!("{} needs no approval: it neither destroys, rotates nor restores keys", path.display()));
    }
    let file = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(ProtectedAction::ceremony(file))
}

/// Checks the plan, uses up the approval if one is needed, runs the ceremony and records it in the audit log.
async fn run_ceremony(
    plan: &CeremonyPlan,
    token: &Ceremony,
    out: &Path,
    officers: &[OfficerName],
    (mut client, audit): (Option<OfficerClient>, Option<PathBuf>),
    json: bool,
) -> Result<(), String> {
    if let Some(log) = &audit {
        offline_event(plan, officers).persist(log).map_err(|e| e.to_string())?;
    }
    if client.is_some() {
        // Check first, so that a ceremony that cannot start does not use up its approval.
        plan.preflight(token, out).map_err(|e| e.to_string())?;
    }
    let (permit, request) = match &mut client {
        Some(client) if !plan.needs_approval(Some(out)).map_err(|e| e.to_string())?.is_empty() => {
            let (permit, request) = use_approval(client, plan, out).await?;
            (Some(permit), Some(request))
        }
        _ => (None, None),
    };
    let outcome = plan.run(token, out, officers, permit);
    let recorded = match &mut client {
        Some(client) => client.record_ceremony(audit_record(plan, request, &outcome)).await.map_err(|e| e.to_string()),
        None => audit.map_or(Ok(()), |log| {
            let act = finished_event(offline_event(plan, officers), &audit_record(plan, request, &outcome));
            act.persist(&log).map_err(|e| e.to_string())
        }),
    };
    let outcome = match (outcome, &recorded) {
        (Err(cause), Err(e)) => return Err(format!("{cause}; and recording it in the audit log failed: {e}")),
        (outcome, _) => outcome.map_err(|e| e.to_string())?,
    };
    print_outcome(outcome, json)?;
    recorded.map_err(|e| format!("the ceremony succeeded, but recording it in the audit log failed: {e}"))
}

/// The audit event for a ceremony that runs without the daemon.
fn offline_event(plan: &CeremonyPlan, officers: &[OfficerName]) -> OfflineEvent {
    let officers = officers.iter().map(OfficerName::as_str).collect::<Vec<_>>().join(" ");
    let details = [("file_sha256", hex::encode(plan.file_sha256())), ("officers", officers)];
    let details = details.map(|(name, value)| (name.to_owned(), value)).into();
    OfflineEvent { act: "ceremony".to_owned(), details, outcome: Outcome::Begun }
}

fn finished_event(mut act: OfflineEvent, record: &proto::RecordCeremonyRequest) -> OfflineEvent {
    act.outcome = match record.failure.as_str() {
        "" => Outcome::Done,
        cause => Outcome::Failed(cause.to_owned()),
    };
    act.details.insert("transcript_sha256".to_owned(), hex::encode(&record.transcript_sha256));
    let steps = (1_u32..).zip(&record.actions);
    act.details.extend(steps.map(|(n, done)| (format!("act {n:02}"), done.clone())));
    act
}

/// Prints the outcome.
fn print_outcome(CeremonyOutcome { transcript: report, signed }: CeremonyOutcome, json: bool) -> Result<(), String> {
    if !signed {
        eprintln!("sppctl: warning: transcript not signed, the token has no log key");
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(|e| e.to_string())?);
        return Ok(());
    }
    println!("token {} (serial {}), {}", report.token_label, report.token_serial, report.module);
    let mut steps = table(["step", "key", "fingerprint"], []);
    for key in &report.keys {
        steps.add_row([key.act, key.name.as_str(), &key.fingerprint]);
    }
    println!("{}", render(&steps));
    for path in &report.files {
        println!("wrote {}", path.display());
    }
    if report.keys.iter().any(|key| !READ_ONLY_ACTS.contains(&key.act)) {
        println!("keys.toml has changed: restart sppd to load it");
    }
    Ok(())
}

/// Steps that leave keys.toml unchanged, by their name in the transcript.
const READ_ONLY_ACTS: [&str; 2] = ["checked", "certificate imported"];

/// Finds the approval of this file, verifies it and uses it up.
async fn use_approval(
    client: &mut OfficerClient,
    plan: &CeremonyPlan,
    out: &Path,
) -> Result<(Permit, RequestId), String> {
    let hash = plan.file_sha256();
    let manifest = KeyManifest::load(&out.join("keys.toml")).map_err(|e| e.to_string())?;
    let proto::ListApprovalsResponse { approvals: known, node, .. } =
        client.approvals().await.map_err(|e| e.to_string())?;
    let matches_file = |approval: &&proto::Approval| {
        let action = ProtectedAction::from_json(&approval.action).ok();
        approval.state == "approved" && action.and_then(|action| action.ceremony_hash()).as_ref() == Some(hash)
    };
    let found = known.iter().find(matches_file).ok_or_else(|| {
        "no unused approval of this file: run sppctl approvals request ceremony FILE and have another officer approve it".to_owned()
    })?;
    let id: RequestId = found.id.parse().map_err(|e: spp_format::names::NameError| e.to_string())?;
    // The daemon is not trusted: verify before using the approval up, and verify the daemon's answer as well.
    Permit::verified(&node, found, hash, &manifest)?;
    let used = client.use_approval(id, hash).await.map_err(|e| e.to_string())?;
    Ok((Permit::verified(&node, &used, hash, &manifest)?, id))
}

fn audit_record(
    plan: &CeremonyPlan,
    request: Option<RequestId>,
    outcome: &Result<CeremonyOutcome, OfficerError>,
) -> proto::RecordCeremonyRequest {
    let mut record = proto::RecordCeremonyRequest {
        file_sha256: plan.file_sha256().to_vec(),
        approval: request.map(|id| id.as_bytes().to_vec()).unwrap_or_default(),
        failure: outcome.as_ref().err().map(ToString::to_string).unwrap_or_default(),
        ..Default::default()
    };
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(OfficerError::Interrupted { outcome, .. }) => outcome,
        Err(_) => return record,
    };
    let transcript = &outcome.transcript;
    let json = transcript.files.iter().rfind(|path| path.extension().is_some_and(|ext| ext == "json"));
    // If the transcript could not be written, `failure` says so.
    let json = json.and_then(|path| std::fs::read(path).ok());
    record.transcript_sha256 = json.map(|json| sha256(&json).to_vec()).unwrap_or_default();
    let steps = transcript.keys.iter().map(|key| format!("{} {} {}", key.act, key.name, key.fingerprint));
    record.actions = steps.take(MAX_RECORDED).collect();
    record
}

/// Maximum number of steps in one audit entry; the transcript has all of them.
const MAX_RECORDED: usize = 64;

/// PIN files given on the command line.
#[derive(Default)]
struct Pins {
    user: Option<PathBuf>,
    so: Option<PathBuf>,
}

/// Opens the ceremony's token. If the plan initialises the token, everything that can be checked beforehand is checked first.
fn open_token(plan: &CeremonyPlan, hsm: &Path, out: &Path, pins: Pins) -> Result<Ceremony, String> {
    let hsm = HsmFile::load(hsm).map_err(|e| e.to_string())?;
    let pin = pins.user.map_or(hsm.pin, PinSource::File);
    hsm.module.enter_environment().map_err(|e| e.to_string())?;
    let opened = match (plan.token_label(), pins.so) {
        (None, None) => Ceremony::open(&hsm.module, &hsm.token, &pin),
        (None, Some(_)) => {
            return Err("--so-pin-file is only for a ceremony with a [token] section; omit it".to_owned());
        }
        (Some(_), None) => return Err("the ceremony initialises its token: give --so-pin-file".to_owned()),
        (Some(label), Some(_)) if label != hsm.token.label => {
            return Err(format!(
                "token label mismatch: the ceremony initialises {label}, hsm.toml names {}",
                hsm.token.label
            ));
        }
        (Some(label), Some(so_pin)) => {
            plan.preflight_uninitialised(&hsm.module, out).map_err(|e| e.to_string())?;
            Ceremony::initialise(&hsm.module, label, &PinSource::File(so_pin), &pin)
        }
    };
    opened.map_err(|e| e.to_string())
}

fn ceremony_plan(file: &Path, target: Option<(&Path, &Path)>, json: bool) -> Result<(), String> {
    let plan = CeremonyPlan::load(file).map_err(|e| e.to_string())?;
    if let Some((hsm, out)) = target {
        let checked = match plan.token_label() {
            None => plan.preflight(&open_token(&plan, hsm, out, Pins::default())?, out),
            Some(_) => plan.preflight_uninitialised(&HsmFile::load(hsm).map_err(|e| e.to_string())?.module, out),
        };
        checked.map_err(|e| e.to_string())?;
    }
    let out = target.map(|(_, out)| out);
    let steps = plan.steps(out).map_err(|e| e.to_string())?;
    let needed = plan.needs_approval(out).map_err(|e| e.to_string())?;
    if json {
        let document = serde_json::json!({
            "token": plan.token_label(),
            "keys": steps,
            "needs_approval": needed,
            "looked_at_the_token": target.is_some() && plan.token_label().is_none(),
        });
        println!("{document:#}");
        return Ok(());
    }
    if let Some(label) = plan.token_label() {
        println!("would initialise token {label}");
    }
    println!("{}", planned(&steps));
    if !needed.is_empty() {
        let (actions, file) = (needed.join(" and "), file.display());
        println!("the ceremony {actions}: a second officer must approve it; sppctl approvals request ceremony {file}");
    }
    println!(
        "{}",
        match (target, plan.token_label()) {
            (Some(_), None) => "all checks passed; nothing was changed",
            (Some(_), Some(_)) =>
                "all checks passed, except on the token, which is not initialised yet; nothing was changed",
            (None, _) => "only the file was checked; add --hsm and --out to check the token and the output directory",
        }
    );
    Ok(())
}

fn planned(steps: &[PlannedStep]) -> String {
    let mut rows = table(["step", "key", "type", "purpose", "files"], []);
    for PlannedStep { act, name, kind, what, files, .. } in steps {
        let files: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
        rows.add_row([act, name.as_str(), kind, what, &files.join(", ")]);
    }
    render(&rows)
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
        return Err(format!("{} does not match the hash in the signed transcript: it was changed", beside.display()));
    }
    if !json {
        let beside =
            if verified.json_fits.is_some() { format!("; {} matches", beside.display()) } else { String::new() };
        println!("signed by the key of {}{beside}", verified.signed_by);
    }
    Ok(())
}
