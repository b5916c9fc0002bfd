//! Arguments of `sppctl report`, `sppctl device` and `sppctl sessions`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use spp_format::names::{ProfileName, SessionId, StationName};
use spp_log::audit::RecordedEntry;
use spp_proto as proto;

use super::audit_cli::log_directory;
use super::device::{self, DeviceName, entries_about};
use super::now;
use super::pool_cli::DaemonArgs;
use super::production::{self, GroupBy, ProductionQuery};
use super::sessions::{self, State};
use super::text::parse_time;
use crate::store::SECONDS_PER_HOUR;

const DAY: u64 = 24 * SECONDS_PER_HOUR;

/// Report production numbers.
#[derive(Subcommand)]
pub enum ReportCommand {
    /// Show how many devices were begun, completed and aborted. Times are UTC [default: today].
    Production {
        /// Start (inclusive, UTC): 2026-01-31 or 2026-01-31T12:00:00Z [default: 00:00 today].
        #[arg(long, value_name = "TIME", value_parser = parse_time)]
        from: Option<u64>,
        /// End (exclusive, UTC): 2026-01-31 or 2026-01-31T12:00:00Z [default: the next full hour].
        #[arg(long, value_name = "TIME", value_parser = parse_time)]
        to: Option<u64>,
        /// Group the rows by station, profile or hour.
        #[arg(long, value_enum, default_value_t = GroupBy::Station)]
        by: GroupBy,
        /// Print comma-separated values.
        #[arg(long, conflicts_with = "json")]
        csv: bool,
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
}

/// Show one device.
#[derive(Subcommand)]
pub enum DeviceCommand {
    /// Show all data about a device: sessions, record, certificate and timeline.
    Show {
        /// Chip ID in hex, or device identity, for example imei:490154203237518.
        #[arg(value_name = "CHIP|IDENTITY")]
        device: DeviceName,
        /// Configuration file of the daemon: also show the device's entries in the audit log that it names.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
}

/// List and abort sessions.
#[derive(Subcommand)]
pub enum SessionsCommand {
    /// List sessions, oldest first [default: unfinished sessions].
    List {
        /// Only sessions in this state.
        #[arg(long, value_enum)]
        state: Option<State>,
        /// Only sessions of this station.
        #[arg(long, value_name = "NAME")]
        station: Option<StationName>,
        /// Only sessions of this profile.
        #[arg(long, value_name = "NAME")]
        profile: Option<ProfileName>,
        /// Only sessions begun at least this long ago, for example 1h.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        older_than: Option<Duration>,
        /// Maximum number of sessions to list.
        #[arg(long, value_name = "COUNT", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Abort a session: destroy its key pair and release its chip ID and identity. A published device cannot be aborted.
    Abort {
        /// Session ID, 32 hex digits.
        session: SessionId,
        /// Reason, recorded in the audit log.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Connection to the daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
}

impl ReportCommand {
    /// Runs the command.
    pub async fn run(self) -> Result<(), String> {
        let Self::Production { from, to, by, csv, daemon } = self;
        let now = now();
        let query = ProductionQuery {
            from: from.unwrap_or(now / DAY * DAY),
            to: to.unwrap_or((now / SECONDS_PER_HOUR + 1) * SECONDS_PER_HOUR),
            by,
        };
        let response = production::production(&daemon.server, &daemon.tls, &query).await.map_err(|e| e.to_string())?;
        match (daemon.json, csv) {
            (true, _) => println!("{:#}", production::as_json(&query, &response)),
            (false, true) => print!("{}", production::as_csv(&query, &response).map_err(|e| e.to_string())?),
            (false, false) => print!("{}", production::as_table(&query, &response)),
        }
        Ok(())
    }
}

impl DeviceCommand {
    /// Runs the command.
    pub async fn run(self) -> Result<(), String> {
        let Self::Show { device, config, daemon } = self;
        let response = device::device(&daemon.server, &daemon.tls, device).await.map_err(|e| e.to_string())?;
        let audit = config.map(|config| audit_entries(&config, &response)).transpose()?;
        match daemon.json {
            true => println!("{:#}", device::as_json(&response, audit.as_deref())),
            false => print!("{}", device::as_text(&response, audit.as_deref())),
        }
        Ok(())
    }
}

fn audit_entries(config: &Path, device: &proto::GetDeviceResponse) -> Result<Vec<RecordedEntry>, String> {
    entries_about(&log_directory(config)?, device).map_err(|e| e.to_string())
}

impl SessionsCommand {
    /// Runs the command.
    pub async fn run(self) -> Result<(), String> {
        match self {
            Self::List { state, station, profile, older_than, limit, daemon } => {
                let older_than = older_than.map(|time| prost_types::Duration {
                    seconds: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
                    nanos: 0,
                });
                let request = proto::ListSessionsRequest {
                    state: state.map_or(proto::SessionState::Unspecified, State::message).into(),
                    station: station.map(|name| name.to_string()).unwrap_or_default(),
                    profile: profile.map(|name| name.to_string()).unwrap_or_default(),
                    older_than,
                    ..Default::default()
                };
                list(request, limit as usize, &daemon).await
            }
            Self::Abort { session, reason, daemon } => {
                let aborted = sessions::abort(&daemon.server, &daemon.tls, &session, reason).await;
                let aborted = aborted.map_err(|e| e.to_string())?;
                match daemon.json {
                    true => println!("{:#}", sessions::session_json(&aborted)),
                    false => println!("{}", sessions::describe_abort(&aborted)),
                }
                Ok(())
            }
        }
    }
}

async fn list(request: proto::ListSessionsRequest, limit: usize, daemon: &DaemonArgs) -> Result<(), String> {
    let found = sessions::list(&daemon.server, &daemon.tls, request, limit).await;
    let (found, more) = found.map_err(|e| e.to_string())?;
    if daemon.json {
        println!("{:#}", serde_json::Value::from_iter(found.iter().map(sessions::session_json)));
    } else {
        println!("{}", sessions::as_table(&found, now()));
    }
    if more {
        eprintln!("sppctl: list cut at {limit} sessions; there may be more: add filters or raise --limit");
    }
    Ok(())
}
