//! What was produced, as the running daemon tells it: a table, CSV, JSON.

use std::path::Path;

use clap::ValueEnum;
use prost_types::Timestamp;
use serde_json::{Value, json};

use super::status::{StatusError, channel, refused, with_deadline};
use super::text::{at, printable, table, trimmed};
use crate::proto;
use crate::proto::production_client::ProductionClient;
use crate::proto::production_row::Of;

/// What a row stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum By {
    /// A station: the one that began the devices.
    Station,
    /// A profile.
    Profile,
    /// An hour, in UTC.
    Hour,
}

impl By {
    const fn name(self) -> &'static str {
        match self {
            Self::Station => "station",
            Self::Profile => "profile",
            Self::Hour => "hour",
        }
    }
}

/// What is asked for, in seconds since the Unix epoch.
pub(super) struct Asked {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) by: By,
}

/// Asks the daemon.
pub(super) async fn production(
    server: &str,
    tls: &Path,
    asked: &Asked,
) -> Result<proto::GetProductionResponse, StatusError> {
    let by = match asked.by {
        By::Station => proto::ProductionBy::Station,
        By::Profile => proto::ProductionBy::Profile,
        By::Hour => proto::ProductionBy::Hour,
    };
    let time = |seconds| Some(Timestamp { seconds: i64::try_from(seconds).unwrap_or(i64::MAX), nanos: 0 });
    let request = proto::GetProductionRequest { from: time(asked.from), to: time(asked.to), by: by.into() };
    let mut client = ProductionClient::new(channel(server, tls).await?);
    let answer = client.get_production(with_deadline(request)).await;
    Ok(answer.map_err(|status| refused(server, &status))?.into_inner())
}

/// For people, with a row of totals.
pub(super) fn as_table(asked: &Asked, told: &proto::GetProductionResponse) -> String {
    let mut table = table([asked.by.name(), "begun", "completed", "aborted"], 1..=3);
    for row in &told.rows {
        table.add_row(cells(&printable(&name(row)), row.counts));
    }
    table.add_row(cells("total", told.total));
    format!("from {} to {}\n{}\n", at(asked.from), at(asked.to), trimmed(&table))
}

fn cells(name: &str, counts: Option<proto::ProductionCounts>) -> [String; 4] {
    let proto::ProductionCounts { begun, completed, aborted } = counts.unwrap_or_default();
    [name.to_owned(), begun.to_string(), completed.to_string(), aborted.to_string()]
}

/// For spreadsheets; they add up themselves.
pub(super) fn as_csv(asked: &Asked, told: &proto::GetProductionResponse) -> Result<String, csv::Error> {
    let mut csv = csv::Writer::from_writer(Vec::new());
    csv.write_record([asked.by.name(), "begun", "completed", "aborted"])?;
    for row in &told.rows {
        csv.write_record(cells(&name(row), row.counts))?;
    }
    let bytes = csv.into_inner().map_err(|e| e.into_error())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// For programs.
pub(super) fn as_json(asked: &Asked, told: &proto::GetProductionResponse) -> Value {
    let counts = |counts: Option<proto::ProductionCounts>| {
        let proto::ProductionCounts { begun, completed, aborted } = counts.unwrap_or_default();
        json!({ "begun": begun, "completed": completed, "aborted": aborted })
    };
    let row = |row: &proto::ProductionRow| {
        let mut told = counts(row.counts);
        told[asked.by.name()] = name(row).into();
        told
    };
    json!({
        "from": at(asked.from),
        "to": at(asked.to),
        "by": asked.by.name(),
        "rows": told.rows.iter().map(row).collect::<Vec<_>>(),
        "total": counts(told.total),
    })
}

fn name(row: &proto::ProductionRow) -> String {
    match &row.of {
        Some(Of::Station(name) | Of::Profile(name)) => name.clone(),
        Some(Of::Hour(time)) => at(u64::try_from(time.seconds).unwrap_or(0)),
        None => String::new(),
    }
}
