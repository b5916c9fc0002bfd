//! Production numbers from the daemon, as a table, CSV or JSON.

use std::path::Path;

use clap::ValueEnum;
use prost_types::Timestamp;
use serde_json::{Value, json};
use spp_proto as proto;
use spp_proto::production_client::ProductionClient;
use spp_proto::production_row::Of;

use super::status::{StatusError, call_error, channel, with_deadline};
use super::text::{escape_controls, format_time, render, table};

/// Grouping of the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GroupBy {
    /// One row per station that began the devices.
    Station,
    /// One row per profile.
    Profile,
    /// One row per hour (UTC).
    Hour,
}

impl GroupBy {
    const fn name(self) -> &'static str {
        match self {
            Self::Station => "station",
            Self::Profile => "profile",
            Self::Hour => "hour",
        }
    }
}

/// Time range (seconds since the Unix epoch, end exclusive) and grouping of a report.
pub(super) struct ProductionQuery {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) by: GroupBy,
}

/// Requests the numbers from the daemon.
pub(super) async fn production(
    server: &str,
    tls: &Path,
    query: &ProductionQuery,
) -> Result<proto::GetProductionResponse, StatusError> {
    let by = match query.by {
        GroupBy::Station => proto::ProductionBy::Station,
        GroupBy::Profile => proto::ProductionBy::Profile,
        GroupBy::Hour => proto::ProductionBy::Hour,
    };
    let time = |seconds| Some(Timestamp { seconds: i64::try_from(seconds).unwrap_or(i64::MAX), nanos: 0 });
    let request = proto::GetProductionRequest { from: time(query.from), to: time(query.to), by: by.into() };
    let mut client = ProductionClient::new(channel(server, tls).await?);
    let answer = client.get_production(with_deadline(request)).await;
    Ok(answer.map_err(|status| call_error(server, &status))?.into_inner())
}

/// Formats the report as a table with a row of totals.
pub(super) fn as_table(query: &ProductionQuery, response: &proto::GetProductionResponse) -> String {
    let mut table = table([query.by.name(), "begun", "completed", "aborted"], 1..=3);
    for row in &response.rows {
        table.add_row(cells(&escape_controls(&row_name(row)), row.counts));
    }
    table.add_row(cells("total", response.total));
    format!("from {} to {}\n{}\n", format_time(query.from), format_time(query.to), render(&table))
}

fn cells(name: &str, counts: Option<proto::ProductionCounts>) -> [String; 4] {
    let proto::ProductionCounts { begun, completed, aborted } = counts.unwrap_or_default();
    [name.to_owned(), begun.to_string(), completed.to_string(), aborted.to_string()]
}

/// Formats the report as CSV, without totals.
pub(super) fn as_csv(query: &ProductionQuery, response: &proto::GetProductionResponse) -> Result<String, csv::Error> {
    let mut csv = csv::Writer::from_writer(Vec::new());
    csv.write_record([query.by.name(), "begun", "completed", "aborted"])?;
    for row in &response.rows {
        csv.write_record(cells(&row_name(row), row.counts))?;
    }
    let bytes = csv.into_inner().map_err(|e| e.into_error())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Formats the report as JSON.
pub(super) fn as_json(query: &ProductionQuery, response: &proto::GetProductionResponse) -> Value {
    let counts = |counts: Option<proto::ProductionCounts>| {
        let proto::ProductionCounts { begun, completed, aborted } = counts.unwrap_or_default();
        json!({ "begun": begun, "completed": completed, "aborted": aborted })
    };
    let row = |row: &proto::ProductionRow| {
        let mut object = counts(row.counts);
        object[query.by.name()] = row_name(row).into();
        object
    };
    json!({
        "from": format_time(query.from),
        "to": format_time(query.to),
        "by": query.by.name(),
        "rows": response.rows.iter().map(row).collect::<Vec<_>>(),
        "total": counts(response.total),
    })
}

fn row_name(row: &proto::ProductionRow) -> String {
    match &row.of {
        Some(Of::Station(name) | Of::Profile(name)) => name.clone(),
        Some(Of::Hour(time)) => format_time(u64::try_from(time.seconds).unwrap_or(0)),
        None => String::new(),
    }
}
