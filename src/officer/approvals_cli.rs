//! `sppctl approvals`: what one officer asks for and others approve.

use std::fmt::Write as _;
use std::io::{BufRead as _, Write as _};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;

use super::access_client::{OfficerClient, Seen, authority_of, now, request_in};
use super::ceremony_cli::act_of;
use super::pool_cli::DaemonArgs;
use super::status::StatusError;
use super::text::{at, printable, table, trimmed};
use crate::access::{ApprovalRules, ProtectedAction, Quota, RequestId, Verdict};
use crate::certificate::{Caller, Role};
use crate::keys::sha256;
use crate::names::StationName;
use crate::proto;

/// What one officer asks for and others approve: signed by each, bound to the exact content, for a time.
#[derive(Subcommand)]
pub enum ApprovalsCommand {
    /// Tell all requests, newest first, and the rules in force.
    List {
        /// Those that are decided or expired, too.
        #[arg(long)]
        all: bool,
        /// Which daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Tell all of one request, with the signatures under it.
    Show {
        /// Its name.
        id: RequestId,
        /// Which daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Approve what another officer has asked for. What it is, is shown first, and a part of its hash must be typed.
    Approve {
        /// Its name.
        id: RequestId,
        /// Which daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Reject a request, the own one or another officer's.
    Reject {
        /// Its name.
        id: RequestId,
        /// Why.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Which daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Ask for the approval of other officers.
    #[command(subcommand)]
    Request(RequestCommand),
}

/// What can be asked for.
#[derive(Subcommand)]
pub enum RequestCommand {
    /// Revoke a caller: all certificates that it has so far.
    Revoke {
        /// station, officer, auditor, back-office or monitor.
        role: Role,
        /// The caller's name.
        name: String,
        /// Why.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// How long, and which daemon.
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Let in an officer, or somebody who was revoked. Whoever it is has made the key, with `sppctl request`.
    Enroll {
        /// station, officer, auditor, back-office or monitor.
        role: Role,
        /// The caller's name.
        name: String,
        /// The certificate request (PKCS#10, PEM).
        #[arg(long, value_name = "FILE")]
        csr: PathBuf,
        /// Days until the certificate ends.
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
        /// How long, and which daemon.
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Let a station begin more devices than its quota in force.
    Quota {
        /// The station's name.
        station: StationName,
        /// Devices in any hour, or none for no limit; as it is if left out.
        #[arg(long, value_name = "N|none", required_unless_present = "devices_total")]
        devices_per_hour: Option<Limit>,
        /// Devices at all, or none for no limit; as it is if left out.
        #[arg(long, value_name = "N|none")]
        devices_total: Option<Limit>,
        /// How long, and which daemon.
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Change how many must approve what. What is left out stays as it is.
    Rules {
        /// Approvals besides the request: revoking a caller.
        #[arg(long, value_name = "N")]
        revoke: Option<u8>,
        /// Approvals besides the request: letting in an officer, or somebody who was revoked.
        #[arg(long, value_name = "N")]
        enroll: Option<u8>,
        /// Approvals besides the request: raising a quota.
        #[arg(long, value_name = "N")]
        raise_quota: Option<u8>,
        /// Approvals besides the request: changing these rules.
        #[arg(long, value_name = "N")]
        change_rules: Option<u8>,
        /// Approvals besides the request: ceremonies that destroy keys.
        #[arg(long, value_name = "N")]
        destroy: Option<u8>,
        /// Approvals besides the request: ceremonies that replace keys.
        #[arg(long, value_name = "N")]
        rotate: Option<u8>,
        /// How long a request stands at most, 24h for example.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        longest: Option<Duration>,
        /// How long, and which daemon.
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Hold a ceremony that destroys or replaces keys, once.
    Ceremony {
        /// The ceremony file.
        file: PathBuf,
        /// How long, and which daemon.
        #[command(flatten)]
        ask: AskArgs,
    },
}

/// A number of devices, or no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit(Option<u64>);

impl FromStr for Limit {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self(None)),
            _ => text.parse().map(|number| Self(Some(number))).map_err(|e| format!("{e}; write a number, or none")),
        }
    }
}

/// How long a request stands, and where it is made.
#[derive(Args)]
pub struct AskArgs {
    /// It stands for so long, 2h for example; as long as the rules allow without it.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    valid_for: Option<Duration>,
    /// Which daemon.
    #[command(flatten)]
    daemon: DaemonArgs,
}

impl ApprovalsCommand {
    /// Does it.
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
                let csr_sha256 = hex::encode(sha256(&request_in(&csr)?));
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
                    return Err(StatusError::Unfit(
                        "say which rule shall be another one, --destroy 2 for example".into(),
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
                let act = act_of(&file).map_err(StatusError::Unfit)?;
                request(&act, &ask).await
            }
        }
    }
}

impl AskArgs {
    async fn connect(&self) -> Result<OfficerClient, StatusError> {
        OfficerClient::connect(&self.daemon.server, &self.daemon.tls).await
    }
}

/// Asks other officers to approve the revocation of a caller.
pub async fn revoke(role: Role, name: &str, reason: String, ask: &AskArgs) -> Result<(), StatusError> {
    Caller::new(role, name).map_err(|e| StatusError::Unfit(e.to_string()))?;
    request(&ProtectedAction::Revoke { role, name: name.to_owned(), reason }, ask).await
}

async fn request(act: &ProtectedAction, ask: &AskArgs) -> Result<(), StatusError> {
    // Read as the daemon reads it, so that a fault is told before anything is signed.
    ProtectedAction::from_json(&act.to_json()).map_err(StatusError::Unfit)?;
    let filed = ask.connect().await?.request(act, ask.valid_for).await?;
    if ask.daemon.json {
        println!("{:#}", approval_json(&filed));
        return Ok(());
    }
    println!("request {}: {}", filed.id, printable(&filed.description));
    let until = filed.expires.map(seconds).map_or_else(String::new, at);
    println!("{} other officer(s) must approve it until {until}:", filed.needed);
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
    let mut table = table(["request", "state", "approvals", "asked by", "expires", "what"], []);
    for approval in &shown {
        let expires = approval.expires.map(seconds).map_or_else(String::new, at);
        let by = approval.requested.as_ref().map(|signed| printable(&signed.officer)).unwrap_or_default();
        table.add_row([
            approval.id.clone(),
            approval.state.clone(),
            format!("{} of {}", approval.approvals.len(), approval.needed),
            by,
            expires,
            printable(&approval.description),
        ]);
    }
    match shown.is_empty() {
        true => println!("nothing waits for an approval{}", if all { "" } else { "; --all tells what was decided" }),
        false => println!("{}", trimmed(&table)),
    }
    if let Some(rules) = listed.rules {
        println!("{}", rules_text(&rules));
    }
    Ok(())
}

async fn show(id: RequestId, daemon: &DaemonArgs) -> Result<(), StatusError> {
    let mut desk = OfficerClient::connect(&daemon.server, &daemon.tls).await?;
    let (node, approval) = (desk.approvals().await?.node, desk.approval(id).await?);
    let seen = Seen::of(&node, &approval, &[authority_of(&daemon.tls)?])?;
    match daemon.json {
        true => println!("{:#}", approval_json(&approval)),
        false => print!("{}", describe(&approval, &seen)),
    }
    Ok(())
}

async fn decide(id: RequestId, verdict: Verdict, daemon: &DaemonArgs) -> Result<(), StatusError> {
    let mut desk = OfficerClient::connect(&daemon.server, &daemon.tls).await?;
    let (node, approval) = (desk.approvals().await?.node, desk.approval(id).await?);
    let seen = Seen::of(&node, &approval, &[authority_of(&daemon.tls)?])?;
    eprint!("{}", describe(&approval, &seen));
    must_be_meant(&verdict, &seen)?;
    let decided = desk.decide(&seen, &verdict).await?;
    match daemon.json {
        true => println!("{:#}", approval_json(&decided)),
        false => println!("request {} is {}: {}", decided.id, decided.state, printable(&decided.description)),
    }
    Ok(())
}

/// There is no option that skips it: whoever decides has seen what.
fn must_be_meant(verdict: &Verdict, seen: &Seen) -> Result<(), StatusError> {
    let hash = seen.hash();
    let (begin, verb) = (hash.get(..8).unwrap_or_default(), verdict.verb());
    eprint!("type the first 8 digits of its hash to {verb} it: ");
    let _ = std::io::stderr().flush();
    let mut typed = String::new();
    let read = std::io::stdin().lock().read_line(&mut typed);
    read.map_err(|e| StatusError::Unfit(format!("reading what is typed: {e}")))?;
    if typed.trim() == begin {
        return Ok(());
    }
    Err(StatusError::Unfit(format!(
        "that is not how its hash begins; nothing was done, and {} stands as before",
        seen.id
    )))
}

fn describe(approval: &proto::Approval, seen: &Seen) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: &str| {
        // Writing into a string does not fail.
        let _ = writeln!(text, "{name:<10} {value}");
    };
    row("request", &approval.id);
    row("what", &printable(&seen.act.to_string()));
    let left = approval.expires.map(seconds).map_or(0, |expires| expires.saturating_sub(now()));
    let expires = approval.expires.map(seconds).map_or_else(String::new, at);
    let left = humantime::format_duration(Duration::from_secs(left - left % 60));
    row("state", &format!("{}, {} of {} approvals", approval.state, approval.approvals.len(), approval.needed));
    row("expires", &format!("{expires}, in {left}"));
    if let Some(signed) = &approval.requested {
        row("asked by", &signer(signed));
    }
    for signed in &approval.approvals {
        row("approved", &signer(signed));
    }
    if let Some(signed) = &approval.rejected {
        row("rejected", &format!("{}: {}", signer(signed), printable(&approval.reason)));
    }
    row("hash", &seen.hash());
    if let ProtectedAction::Ceremony { file, .. } = &seen.act {
        row("file", "");
        for line in file.lines() {
            row("", &printable(line));
        }
    }
    text
}

fn signer(signed: &proto::OfficerSignature) -> String {
    format!("{} at {}", printable(&signed.officer), signed.at.map(seconds).map_or_else(String::new, at))
}

fn seconds(time: prost_types::Timestamp) -> u64 {
    u64::try_from(time.seconds).unwrap_or_default()
}

fn rules_text(rules: &proto::ApprovalRules) -> String {
    let valid = humantime::format_duration(Duration::from_secs(rules.valid_for_seconds));
    format!(
        "approvals besides the request: revoke {}, enroll {}, raise-quota {}, change-rules {}, destroy {}, rotate {}; a request stands for {valid}",
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
            "at": signed.at.map(seconds),
            "statement": signed.statement,
            "signature": hex::encode(&signed.signature),
            "certificate": hex::encode(&signed.certificate),
        })
    };
    json!({
        "id": approval.id,
        "state": approval.state,
        "description": approval.description,
        "act": serde_json::from_str::<serde_json::Value>(&approval.act).unwrap_or_default(),
        "expires": approval.expires.map(seconds),
        "needed": approval.needed,
        "requested": approval.requested.as_ref().map(signed),
        "approvals": approval.approvals.iter().map(signed).collect::<Vec<_>>(),
        "rejected": approval.rejected.as_ref().map(signed),
        "reason": approval.reason,
    })
}
