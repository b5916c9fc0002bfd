//! Callers of the daemon (certificates, quotas, revocations, renewal) and the device identities that it assigns.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::Table;
use serde_json::json;
use spp_format::certificate::{Caller, Role};
use spp_format::names::{DeviceIdentity, ProfileName};
use spp_proto as proto;

use super::access_client::{OfficerClient, certificate_seconds_left, now};
use super::pool_cli::DaemonArgs;
use super::status::StatusError;
use super::text::{escape_controls, format_duration, format_time, print_written, render, table};

/// Load and list device identities that the daemon assigns, each once, to devices ordered without an identity.
#[derive(Subcommand)]
pub enum IdentitiesCommand {
    /// Load a range of consecutive identities.
    Load {
        /// Profile whose devices get these identities.
        #[arg(long, value_name = "NAME")]
        profile: ProfileName,
        /// First identity of the range, for example imei:490154203237518.
        #[arg(long, value_name = "IDENTITY")]
        first: DeviceIdentity,
        /// Number of identities.
        #[arg(long, value_name = "N", required_unless_present = "last", conflicts_with = "last")]
        count: Option<u64>,
        /// Last identity of the range, instead of --count.
        #[arg(long, value_name = "IDENTITY")]
        last: Option<DeviceIdentity>,
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// List loaded ranges and the number of unassigned identities.
    List {
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
}

impl IdentitiesCommand {
    /// Runs the command.
    pub async fn run(self) -> Result<(), StatusError> {
        match self {
            Self::Load { profile, first, count, last, daemon } => {
                let (profile, first) = (profile.to_string(), first.to_string());
                let last = last.map(|last| last.to_string()).unwrap_or_default();
                let request = proto::LoadIdentitiesRequest { profile, first, count: count.unwrap_or_default(), last };
                let loaded =
                    OfficerClient::connect(&daemon.server, &daemon.tls).await?.load_identities(request).await?;
                match daemon.json {
                    true => println!("{:#}", range_json(&loaded)),
                    false => println!(
                        "range {}: {} identities for {}, {} to {}",
                        loaded.number, loaded.count, loaded.profile, loaded.first, loaded.last
                    ),
                }
                Ok(())
            }
            Self::List { daemon } => {
                let ranges = OfficerClient::connect(&daemon.server, &daemon.tls).await?.identities().await?;
                match daemon.json {
                    true => println!("{:#}", ranges.iter().map(range_json).collect::<serde_json::Value>()),
                    false if ranges.is_empty() => {
                        println!("no identities loaded; load them with sppctl identities load")
                    }
                    false => println!("{}", render(&ranges_table(&ranges))),
                }
                Ok(())
            }
        }
    }
}

fn ranges_table(ranges: &[proto::IdentityRange]) -> Table {
    let mut table = table(["profile", "first", "last", "loaded by", "at", "range", "count", "left"], 5..=7);
    for range in ranges {
        table.add_row([
            range.profile.clone(),
            range.first.clone(),
            range.last.clone(),
            escape_controls(&range.loaded_by),
            range.loaded_at.map(seconds).map_or_else(String::new, format_time),
            range.number.to_string(),
            range.count.to_string(),
            range.count.saturating_sub(range.used).to_string(),
        ]);
    }
    table
}

fn range_json(range: &proto::IdentityRange) -> serde_json::Value {
    json!({
        "number": range.number,
        "profile": range.profile,
        "first": range.first,
        "last": range.last,
        "count": range.count,
        "used": range.used,
        "loaded_by": range.loaded_by,
        "loaded_at": range.loaded_at.map(seconds),
    })
}

/// The certificate to renew and the output directory.
#[derive(Args)]
pub struct RenewArgs {
    /// URL of a listener with mutual TLS (station or officer), https://HOST:PORT.
    #[arg(long, value_name = "URL")]
    server: String,
    /// Directory with the caller's certificate.pem, key.pem and ca.pem.
    #[arg(long, value_name = "DIR")]
    tls: PathBuf,
    /// Generate a new key and write all files to this directory [default: keep the key and replace certificate.pem].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Renew only if the certificate expires within this time, for example 30d.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    within: Option<Duration>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Renews the caller's own certificate.
pub async fn renew(args: RenewArgs) -> Result<(), StatusError> {
    let left = certificate_seconds_left(&args.tls)?;
    if args.within.is_some_and(|within| left > within.as_secs()) {
        let time = format_duration(i64::try_from(left).unwrap_or(i64::MAX));
        match args.json {
            true => println!("{:#}", json!({ "wrote": [], "seconds_left": left })),
            false => println!("certificate expires in {time}; not renewed"),
        }
        return Ok(());
    }
    let (paths, until) = OfficerClient::connect(&args.server, &args.tls).await?.renew(args.out.as_deref()).await?;
    if args.json {
        println!("{:#}", json!({ "wrote": paths, "not_after": until }));
        return Ok(());
    }
    print_written(&paths, false);
    println!("certificate expires at {}", format_time(until));
    Ok(())
}

/// Enrols a caller through the running daemon.
pub async fn enroll_via_daemon(
    server: &str,
    tls: &Path,
    caller: &Caller,
    csr: Option<&Path>,
    days: u32,
    out: &Path,
) -> Result<Vec<PathBuf>, StatusError> {
    OfficerClient::connect(server, tls).await?.enroll(caller, csr, days, out).await
}

/// Lists the callers of a role: stations with their quotas, other roles with their certificates.
pub async fn list_callers(role: Role, daemon: &DaemonArgs) -> Result<(), StatusError> {
    let known = OfficerClient::connect(&daemon.server, &daemon.tls).await?.callers().await?;
    if daemon.json {
        println!("{:#}", callers_json(role, &known));
        return Ok(());
    }
    if role == Role::Station {
        println!("{}", render(&stations_table(&known)));
    } else {
        println!("{}", render(&certificates_table(role, &known)));
        println!("certificates issued on the token are listed after their first renewal (sppctl renew)");
    }
    Ok(())
}

fn stations_table(known: &proto::ListCallersResponse) -> Table {
    let header = ["station", "per hour", "quota", "total", "quota", "profiles", "identities", "certificate ends", ""];
    let mut table = table(header, 1..=4);
    let quota = |limit: Option<u64>| limit.map_or_else(|| "-".to_owned(), |limit| limit.to_string());
    for station in &known.stations {
        let certificate = newest_certificate(Role::Station, &station.station, known);
        let status = match (revocation(Role::Station, &station.station, known), station.configured) {
            (Some(revoked), _) => revoked,
            (None, false) => "not configured".to_owned(),
            (None, true) => String::new(),
        };
        table.add_row([
            station.station.clone(),
            station.begun_in_last_hour.to_string(),
            quota(station.devices_per_hour),
            station.begun_total.to_string(),
            quota(station.devices_total),
            station.profiles.join(" "),
            station.identities.join(" "),
            certificate.and_then(|known| known.not_after).map(seconds).map_or_else(|| "?".to_owned(), format_time),
            status,
        ]);
    }
    table
}

fn certificates_table(role: Role, known: &proto::ListCallersResponse) -> Table {
    let mut table = table(["name", "certificate", "begins", "ends", "made for", ""], []);
    for certificate in known.certificates.iter().filter(|known| known.role == role.as_str()) {
        table.add_row([
            certificate.name.clone(),
            hex::encode(&certificate.serial),
            certificate.not_before.map(seconds).map_or_else(String::new, format_time),
            certificate.not_after.map(seconds).map_or_else(String::new, format_time),
            escape_controls(&certificate.requested_by),
            revocation(role, &certificate.name, known).unwrap_or_default(),
        ]);
    }
    let revocations = known.revocations.iter().filter(|revoked| revoked.role == role.as_str());
    for revoked in revocations.filter(|revoked| newest_certificate(role, &revoked.name, known).is_none()) {
        let status = revocation(role, &revoked.name, known).unwrap_or_default();
        table.add_row([revoked.name.clone(), "?".into(), "?".into(), "?".into(), String::new(), status]);
    }
    table
}

fn newest_certificate<'a>(
    role: Role,
    name: &str,
    known: &'a proto::ListCallersResponse,
) -> Option<&'a proto::KnownCertificate> {
    known.certificates.iter().find(|known| known.role == role.as_str() && known.name == name)
}

/// The revocation of a caller, unless the newest certificate was issued after it and is valid again.
fn revocation(role: Role, name: &str, known: &proto::ListCallersResponse) -> Option<String> {
    let revoked = known.revocations.iter().find(|revoked| revoked.role == role.as_str() && revoked.name == name)?;
    let revoked_at = revoked.revoked_at.map(seconds).unwrap_or_default();
    let newer = newest_certificate(role, name, known)
        .and_then(|known| known.not_before)
        .map(seconds)
        .is_some_and(|at| at > revoked_at);
    match newer {
        true => None,
        false => Some(format!("revoked {}: {}", format_time(revoked_at), escape_controls(&revoked.reason))),
    }
}

fn callers_json(role: Role, known: &proto::ListCallersResponse) -> serde_json::Value {
    let certificate = |certificate: &proto::KnownCertificate| {
        let (begins, ends) = (certificate.not_before.map(seconds), certificate.not_after.map(seconds));
        let serial = hex::encode(&certificate.serial);
        json!({ "name": certificate.name, "serial": serial, "not_before": begins, "not_after": ends, "requested_by": certificate.requested_by })
    };
    let station = |station: &proto::StationUse| {
        json!({
            "name": station.station,
            "configured": station.configured,
            "devices_per_hour": station.devices_per_hour,
            "devices_total": station.devices_total,
            "begun_in_last_hour": station.begun_in_last_hour,
            "begun_total": station.begun_total,
            "profiles": station.profiles,
            "identities": station.identities,
        })
    };
    let revocation = |revoked: &proto::Revocation| {
        let at = revoked.revoked_at.map(seconds);
        json!({ "name": revoked.name, "at": at, "reason": revoked.reason, "request": revoked.request })
    };
    let has_role = |name: &str| name == role.as_str();
    let certificates: Vec<_> = known.certificates.iter().filter(|c| has_role(&c.role)).map(certificate).collect();
    let revocations: Vec<_> = known.revocations.iter().filter(|r| has_role(&r.role)).map(revocation).collect();
    let stations: Vec<_> =
        if role == Role::Station { known.stations.iter().map(station).collect() } else { Vec::new() };
    json!({ "at": now(), "stations": stations, "certificates": certificates, "revocations": revocations })
}

fn seconds(time: prost_types::Timestamp) -> u64 {
    u64::try_from(time.seconds).unwrap_or_default()
}
