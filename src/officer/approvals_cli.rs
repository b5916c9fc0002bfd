//! `sppctl approvals`: requests, lists and decides actions that need the approval of other officers.

use std::fmt::Write as _;
use std::io::{BufRead as _, Write as _};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use spp_format::approval::{ApprovalRules, ProtectedAction, Quota, RequestId, Verdict};
use spp_format::certificate::{Caller, Role};
use spp_format::keys::sha256;
use spp_format::names::StationName;
use spp_proto as proto;

use super::access_client::{OfficerClient, VerifiedRequest, load_authority, load_csr, now};
use super::ceremony_cli::ceremony_action;
use super::pool_cli::DaemonArgs;
use super::status::StatusError;
use super::text::{escape_controls, format_time, render, table};

/// Request, list, approve and reject actions that need more than one officer. Every request and decision is signed, is bound to
/// the exact content and expires.
#[derive(Subcommand)]
pub enum ApprovalsCommand {
    /// List open requests, newest first, and the approval rules in force.
    List {
        /// Include requests that are decided or expired.
        #[arg(long)]
        all: bool,
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Show one request with its signatures.
    Show {
        /// Request ID.
        id: RequestId,
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Approve a request of another officer. The command shows the request and asks for the first 8 digits of its hash.
    Approve {
        /// Request ID.
        id: RequestId,
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Reject a request, your own or another officer's.
    Reject {
        /// Request ID.
        id: RequestId,
        /// Reason, recorded in the audit log.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Request an action that other officers must approve.
    #[command(subcommand)]
    Request(RequestCommand),
}

/// Actions that need approval.
#[derive(Subcommand)]
pub enum RequestCommand {
    /// Request the revocation of all current certificates of a caller.
    Revoke {
        /// Role of the caller: station, officer, auditor, back-office or monitor.
        role: Role,
        /// Name of the caller.
        name: String,
        /// Reason, recorded in the audit log.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Validity of the request and connection to the daemon.
        #[command(flatten)]
        ask: RequestArgs,
    },
    /// Request the enrolment of an officer or of a revoked caller, for a key that they generated with `sppctl request`.
    Enroll {
        /// Role of the caller: station, officer, auditor, back-office or monitor.
        role: Role,
        /// Name of the caller.
        name: String,
        /// Certificate request (PKCS#10, PEM).
        #[arg(long, value_name = "FILE")]
        csr: PathBuf,
        /// Validity of the certificate in days.
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
        /// Validity of the request and connection to the daemon.
        #[command(flatten)]
        ask: RequestArgs,
    },
    /// Request a higher quota for a station.
    Quota {
        /// Name of the station.
        station: StationName,
        /// Devices in any 60 minutes, or "none" for no limit [default: unchanged].
        #[arg(long, value_name = "N|none", required_unless_present = "devices_total")]
        devices_per_hour: Option<Limit>,
        /// Devices in total, or "none" for no limit [default: unchanged].
        #[arg(long, value_name = "N|none")]
        devices_total: Option<Limit>,
        /// Validity of the request and connection to the daemon.
        #[command(flatten)]
        ask: RequestArgs,
    },
    /// Request new approval rules. Rules that are not given stay unchanged.
    Rules {
        /// Number of approvals to revoke a caller, not counting the requester (1 to 9).
        #[arg(long, value_name = "N")]
        revoke: Option<u8>,
        /// Number of approvals to enrol an officer or a revoked caller, not counting the requester (1 to 9).
        #[arg(long, value_name = "N")]
        enroll: Option<u8>,
        /// Number of approvals to raise a quota, not counting the requester (1 to 9).
        #[arg(long, value_name = "N")]
        raise_quota: Option<u8>,
        /// Number of approvals to change these rules, not counting the requester (1 to 9).
        #[arg(long, value_name = "N")]
        change_rules: Option<u8>,
        /// Number of approvals for a ceremony that destroys keys, not counting the requester (1 to 9).
        #[arg(long, value_name = "N")]
        destroy: Option<u8>,
        /// Number of approvals for a ceremony that rotates or restores keys, not counting the requester (1 to 9).
        #[arg(long, value_name = "N")]
        rotate: Option<u8>,
        /// Longest validity of a request, for example 24h.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        longest: Option<Duration>,
        /// Validity of the request and connection to the daemon.
        #[command(flatten)]
        ask: RequestArgs,
    },
    /// Request one run of a ceremony that destroys, rotates or restores keys.
    Ceremony {
        /// Ceremony file (TOML).
        file: PathBuf,
        /// Validity of the request and connection to the daemon.
        #[command(flatten)]
        ask: RequestArgs,
    },
}

/// A limit on the number of devices; `None` means unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit(Option<u64>);

impl FromStr for Limit {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self(None)),
            _ => {
                text.parse().map(|number| Self(Some(number))).map_err(|e| format!("{e}; expected a number or \"none\""))
            }
        }
    }
}

/// Validity of a request and the daemon that receives it.
#[derive(Args)]
pub struct RequestArgs {
    /// Validity of the request, for example 2h [default: the longest that the rules allow].
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    valid_for: Option<Duration>,
    /// Connection to the daemon.
    #[command(flatten)]
    daemon: DaemonArgs,
}

impl ApprovalsCommand {
    /// Runs the command.
    pub async fn run(self) -> Result<(), StatusError> {
        match self {
            Self::List { all, daemon } => list(&daemon, all).await,
            Self::Show { id, daemon } => show(id, &daemon).await,
            Self::Approve { id, daemon } => decide(id, Verdict::Approve, &daemon).await,
            Self::Reject { id, reason, daemon } => decide(id, Verdict::Reject(reason), &daemon).await,
            Self::Request(command) => command.run().await,
        }
    }
}

impl RequestCommand {
    async fn run(self) -> Result<(), StatusError> {
        match self {
            Self::Revoke { role, name, reason, ask } => revoke(role, &name, reason, &ask).await,
            Self::Enroll { role, name, csr, days, ask } => {
                let csr_sha256 = hex::encode(sha256(&load_csr(&csr)?));
                request(&ProtectedAction::Enroll { role, name, days, csr_sha256 }, &ask).await
            }
            Self::Quota { station, devices_per_hour, devices_total, ask } => {
                let known = ask.connect().await?.callers().await?.stations;
                let known = known.into_iter().find(|known| known.station == station.as_str()).unwrap_or_default();
                let quota = Quota {
                    devices_per_hour: devices_per_hour.map_or(known.devices_per_hour, |limit| limit.0),
                    devices_total: devices_total.map_or(known.devices_total, |limit| limit.0),
                };
                request(&ProtectedAction::RaiseQuota { station, quota }, &ask).await
            }
            Self::Rules { revoke, enroll, raise_quota, change_rules, destroy, rotate, longest, ask } => {
                if [revoke, enroll, raise_quota, change_rules, destroy, rotate].iter().all(Option::is_none)
                    && longest.is_none()
                {
                    return Err(StatusError::Invalid(
                        "no rule to change: give at least one, for example --destroy 2".into(),
                    ));
                }
                let known = ask.connect().await?.approvals().await?.rules.unwrap_or_default();
                let count = |new: Option<u8>, known: u32| new.unwrap_or(u8::try_from(known).unwrap_or(u8::MAX));
                let rules = ApprovalRules {
                    revoke: count(revoke, known.revoke),
                    enroll: count(enroll, known.enroll),
                    raise_quota: count(raise_quota, known.raise_quota),
                    change_rules: count(change_rules, known.change_rules),
                    destroy: count(destroy, known.destroy),
                    rotate: count(rotate, known.rotate),
                    valid_for: longest.map_or(known.valid_for_seconds, |longest| longest.as_secs()),
                };
                request(&ProtectedAction::ChangeRules { rules }, &ask).await
            }
            Self::Ceremony { file, ask } => {
                let action = ceremony_action(&file).map_err(StatusError::Invalid)?;
                request(&action, &ask).await
            }
        }
    }
}

impl RequestArgs {
    async fn connect(&self) -> Result<OfficerClient, StatusError> {
        OfficerClient::connect(&self.daemon.server, &self.daemon.tls).await
    }
}

/// Requests the revocation of a caller.
pub async fn revoke(role: Role, name: &str, reason: String, ask: &RequestArgs) -> Result<(), StatusError> {
    Caller::new(role, name).map_err(|e| StatusError::Invalid(e.to_string()))?;
    request(&ProtectedAction::Revoke { role, name: name.to_owned(), reason }, ask).await
}

async fn request(action: &ProtectedAction, ask: &RequestArgs) -> Result<(), StatusError> {
    // Parse it as the daemon does, so that invalid content is reported before anything is signed.
    ProtectedAction::from_json(&action.to_json()).map_err(StatusError::Invalid)?;
    let filed = ask.connect().await?.request(action, ask.valid_for).await?;
    if ask.daemon.json {
        println!("{:#}", approval_json(&filed));
        return Ok(());
    }
    println!("request {}: {}", filed.id, escape_controls(&filed.description));
    let until = filed.expires.map(seconds).map_or_else(String::new, format_time);
    println!("needs approval by {} other officer(s) before {until}:", filed.needed);
    println!("  sppctl approvals approve {} --server {} --tls DIR", filed.id, ask.daemon.server);
    Ok(())
}

async fn list(daemon: &DaemonArgs, all: bool) -> Result<(), StatusError> {
    let listed = OfficerClient::connect(&daemon.server, &daemon.tls).await?.approvals().await?;
    let open = |approval: &&proto::Approval| all || matches!(approval.state.as_str(), "pending" | "approved");
    let shown: Vec<_> = listed.approvals.iter().filter(open).collect();
    if daemon.json {
        let approvals: Vec<_> = shown.into_iter().map(approval_json).collect();
        let rules = listed.rules.map(|rules| rules_json(&rules));
        println!("{:#}", json!({ "node": listed.node, "rules": rules, "approvals": approvals }));
        return Ok(());
    }
    let mut table = table(["request", "state", "approvals", "requested by", "expires", "action"], []);
    for approval in &shown {
        let expires = approval.expires.map(seconds).map_or_else(String::new, format_time);
        let by = approval.requested.as_ref().map(|signed| escape_controls(&signed.officer)).unwrap_or_default();
        table.add_row([
            approval.id.clone(),
            approval.state.clone(),
            format!("{} of {}", approval.approvals.len(), approval.needed),
            by,
            expires,
            escape_controls(&approval.description),
        ]);
    }
    match shown.is_empty() {
        true => println!("no open requests{}", if all { "" } else { "; --all lists decided and expired ones" }),
        false => println!("{}", render(&table)),
    }
    if let Some(rules) = listed.rules {
        println!("{}", rules_text(&rules));
    }
    Ok(())
}

async fn show(id: RequestId, daemon: &DaemonArgs) -> Result<(), StatusError> {
    let mut client = OfficerClient::connect(&daemon.server, &daemon.tls).await?;
    let (node, approval) = (client.approvals().await?.node, client.approval(id).await?);
    let verified = VerifiedRequest::verify(&node, &approval, &[load_authority(&daemon.tls)?])?;
    match daemon.json {
        true => println!("{:#}", approval_json(&approval)),
        false => print!("{}", describe(&approval, &verified)),
    }
    Ok(())
}

async fn decide(id: RequestId, verdict: Verdict, daemon: &DaemonArgs) -> Result<(), StatusError> {
    let mut client = OfficerClient::connect(&daemon.server, &daemon.tls).await?;
    let (node, approval) = (client.approvals().await?.node, client.approval(id).await?);
    let verified = VerifiedRequest::verify(&node, &approval, &[load_authority(&daemon.tls)?])?;
    eprint!("{}", describe(&approval, &verified));
    confirm_decision(&verdict, &verified)?;
    let decided = client.decide(&verified, &verdict).await?;
    match daemon.json {
        true => println!("{:#}", approval_json(&decided)),
        false => println!("request {} is {}: {}", decided.id, decided.state, escape_controls(&decided.description)),
    }
    Ok(())
}

/// Asks the officer to type the beginning of the hash. No option skips this, so every decision follows a look at the request.
fn confirm_decision(verdict: &Verdict, request: &VerifiedRequest) -> Result<(), StatusError> {
    let hash = request.hash();
    let (prefix, verb) = (hash.get(..8).unwrap_or_default(), verdict.verb());
    eprint!("type the first 8 digits of the hash to {verb} this request: ");
    let _ = std::io::stderr().flush();
    let mut typed = String::new();
    let read = std::io::stdin().lock().read_line(&mut typed);
    read.map_err(|e| StatusError::Invalid(format!("reading the typed hash: {e}")))?;
    if typed.trim() == prefix {
        return Ok(());
    }
    Err(StatusError::Invalid(format!(
        "typed digits do not match the hash; nothing was done, request {} is unchanged",
        request.id
    )))
}

fn describe(approval: &proto::Approval, request: &VerifiedRequest) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<10} {value}");
    };
    row("request", &approval.id);
    row("action", &escape_controls(&request.action.to_string()));
    let left = approval.expires.map(seconds).map_or(0, |expires| expires.saturating_sub(now()));
    let expires = approval.expires.map(seconds).map_or_else(String::new, format_time);
    let left = humantime::format_duration(Duration::from_secs(left - left % 60));
    row("state", &format!("{}, {} of {} approvals", approval.state, approval.approvals.len(), approval.needed));
    row("expires", &format!("{expires}, in {left}"));
    if let Some(signed) = &approval.requested {
        row("requester", &signer(signed));
    }
    for signed in &approval.approvals {
        row("approved", &signer(signed));
    }
    if let Some(signed) = &approval.rejected {
        row("rejected", &format!("{}: {}", signer(signed), escape_controls(&approval.reason)));
    }
    row("hash", &request.hash());
    if let ProtectedAction::Ceremony { file, .. } = &request.action {
        row("file", "");
        for line in file.lines() {
            row("", &escape_controls(line));
        }
    }
    text
}

fn signer(signed: &proto::OfficerSignature) -> String {
    format!(
        "{} at {}",
        escape_controls(&signed.officer),
        signed.received_at.map(seconds).map_or_else(String::new, format_time)
    )
}

fn seconds(time: prost_types::Timestamp) -> u64 {
    u64::try_from(time.seconds).unwrap_or_default()
}

fn rules_text(rules: &proto::ApprovalRules) -> String {
    let valid = humantime::format_duration(Duration::from_secs(rules.valid_for_seconds));
    format!(
        "approvals needed besides the requester: revoke {}, enroll {}, raise-quota {}, change-rules {}, destroy {}, rotate {}; requests are valid for {valid}",
        rules.revoke, rules.enroll, rules.raise_quota, rules.change_rules, rules.destroy, rules.rotate
    )
}

fn rules_json(rules: &proto::ApprovalRules) -> serde_json::Value {
    json!({
        "revoke": rules.revoke,
        "enroll": rules.enroll,
        "raise_quota": rules.raise_quota,
        "change_rules": rules.change_rules,
        "destroy": rules.destroy,
        "rotate": rules.rotate,
        "valid_for_seconds": rules.valid_for_seconds,
    })
}

fn approval_json(approval: &proto::Approval) -> serde_json::Value {
    let signed = |signed: &proto::OfficerSignature| {
        json!({
            "officer": signed.officer,
            "received_at": signed.received_at.map(seconds),
            "statement": signed.statement,
            "signature": hex::encode(&signed.signature),
            "certificate": hex::encode(&signed.certificate),
        })
    };
    json!({
        "id": approval.id,
        "state": approval.state,
        "description": approval.description,
        "action": serde_json::from_str::<serde_json::Value>(&approval.action).unwrap_or_default(),
        "expires": approval.expires.map(seconds),
        "needed": approval.needed,
        "requested": approval.requested.as_ref().map(signed),
        "approvals": approval.approvals.iter().map(signed).collect::<Vec<_>>(),
        "rejected": approval.rejected.as_ref().map(signed),
        "reason": approval.reason,
    })
}
