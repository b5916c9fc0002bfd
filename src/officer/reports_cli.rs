//! `sppctl report`, `sppctl device`, `sppctl sessions`: their arguments.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;

use super::audit_cli::log_directory;
use super::device::{self, DeviceName, entries_about};
use super::now;
use super::pool_cli::DaemonArgs;
use super::production::{self, Asked, By};
use super::sessions::{self, State};
use super::text::moment;
use crate::audit::Recorded;
use crate::names::{ProfileName, SessionId, StationName};
use crate::proto;
use crate::store::HOUR;

const DAY: u64 = 24 * HOUR;

/// What was produced.
#[derive(Subcommand)]
pub enum ReportCommand {
    /// Tell how many devices were begun, completed and given up. All times are UTC; today, if nothing is said.
    Production {
        /// The first hour, 2026-01-31 or 2026-01-31T12:00:00Z; the beginning of this day if left out.
        #[arg(long, value_name = "TIME", value_parser = moment)]
        from: Option<u64>,
        /// The first hour that is not wanted any more; the next one from now if left out.
        #[arg(long, value_name = "TIME", value_parser = moment)]
        to: Option<u64>,
        /// What a row stands for.
        #[arg(long, value_enum, default_value_t = By::Station)]
        by: By,
        /// Tell it as comma-separated values.
        #[arg(long, conflicts_with = "json")]
        csv: bool,
        /// Which daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
}

/// One device.
#[derive(Subcommand)]
pub enum DeviceCommand {
    /// Tell everything that is known of a device.
    Show {
        /// The chip ID in hex, or the device's identity, imei:490154203237518 for example.
        #[arg(value_name = "CHIP|IDENTITY")]
        device: DeviceName,
        /// The daemon's configuration, where its audit log can be read: tell what that says of the device, too.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Which daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
}

/// Sessions.
#[derive(Subcommand)]
pub enum SessionsCommand {
    /// List sessions: those that are not finished, oldest first, unless a state is named.
    List {
        /// Those in this state.
        #[arg(long, value_enum)]
        state: Option<State>,
        /// Those of this station.
        #[arg(long, value_name = "NAME")]
        station: Option<StationName>,
        /// Those of this profile.
        #[arg(long, value_name = "NAME")]
        profile: Option<ProfileName>,
        /// Those that were begun so long ago or longer, 1h for example.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        older_than: Option<Duration>,
        /// At most so many.
        #[arg(long, value_name = "COUNT", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
        /// Which daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
    /// Give a session up: its key pair is destroyed, its chip and identity are free again. A published device cannot be given up.
    Abort {
        /// The session's identifier, from a list or from the station.
        session: SessionId,
        /// Why, for the people who read the audit log.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Which daemon.
        #[command(flatten)]
        daemon: DaemonArgs,
    },
}

impl ReportCommand {
    /// Does it.
    pub async fn run(self) -> Result<(), String> {
        let Self::Production { from, to, by, csv, daemon } = self;
        let now = now();
        let asked = Asked { from: from.unwrap_or(now / DAY * DAY), to: to.unwrap_or((now / HOUR + 1) * HOUR), by };
        let told = production::production(&daemon.server, &daemon.tls, &asked).await.map_err(|e| e.to_string())?;
        match (daemon.json, csv) {
            (true, _) => println!("{:#}", production::as_json(&asked, &told)),
            (false, true) => print!("{}", production::as_csv(&asked, &told).map_err(|e| e.to_string())?),
            (false, false) => print!("{}", production::as_table(&asked, &told)),
        }
        Ok(())
    }
}

impl DeviceCommand {
    /// Does it.
    pub async fn run(self) -> Result<(), String> {
        let Self::Show { device, config, daemon } = self;
        let told = device::device(&daemon.server, &daemon.tls, device).await.map_err(|e| e.to_string())?;
        let audit = config.map(|config| about(&config, &told)).transpose()?;
        match daemon.json {
            true => println!("{:#}", device::as_json(&told, audit.as_deref())),
            false => print!("{}", device::as_text(&told, audit.as_deref())),
        }
        Ok(())
    }
}

fn about(config: &Path, device: &proto::GetDeviceResponse) -> Result<Vec<Recorded>, String> {
    entries_about(&log_directory(config)?, device).map_err(|e| e.to_string())
}

impl SessionsCommand {
    /// Does it.
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
        eprintln!("sppctl: there may be more than these {limit}; narrow it down, or ask for more with --limit");
    }
    Ok(())
}
