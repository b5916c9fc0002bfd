//! Results of a run: a report with a row per device, and a summary.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::LineError;
use super::device_flow::{DeviceResult, Failure, Outcome};
use super::orders::Order;

/// The report file and its format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReportFile {
    path: PathBuf,
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Csv,
    Jsonl,
}

impl ReportFile {
    /// Derives the format from the file extension.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let path = PathBuf::from(text);
        let format = match path.extension().and_then(|extension| extension.to_str()) {
            Some("csv") => Format::Csv,
            Some("jsonl") => Format::Jsonl,
            _ => return Err("expected a file name that ends in .csv or .jsonl".to_owned()),
        };
        Ok(Self { path, format })
    }
}

/// A report, written as the devices finish.
pub(super) struct Report {
    path: PathBuf,
    rows: Rows,
}

enum Rows {
    Csv(Box<csv::Writer<File>>),
    Jsonl(BufWriter<File>),
}

/// One device. Times in milliseconds, including retries and pauses; empty if the step was not reached.
#[derive(Serialize)]
struct Row<'a> {
    chip_id: String,
    identity: String,
    profile: &'a str,
    /// `done`, `found` (completed earlier, according to the daemon), `skipped` (completed earlier, according to the journal) or
    /// `failed`.
    outcome: &'static str,
    session: Option<String>,
    record_index: Option<u64>,
    record_hash: Option<&'a str>,
    published: Option<&'a str>,
    assemble_ms: Option<f64>,
    device_ms: Option<f64>,
    complete_ms: Option<f64>,
    total_ms: f64,
    retries: u32,
    /// The step that failed: `Assemble`, `GetSession`, `Complete`, `device` or `station`.
    step: Option<&'static str>,
    error: Option<String>,
}

impl Report {
    pub(super) fn create(file: &ReportFile) -> Result<Self, LineError> {
        let path = file.path.clone();
        let created = File::create(&path).map_err(LineError::file("creating the report", &path))?;
        let rows = match file.format {
            Format::Csv => Rows::Csv(Box::new(csv::Writer::from_writer(created))),
            Format::Jsonl => Rows::Jsonl(BufWriter::new(created)),
        };
        Ok(Self { path, rows })
    }

    pub(super) fn add(&mut self, order: &Order, result: &DeviceResult) -> Result<(), LineError> {
        let row = row(order, result);
        let written = match &mut self.rows {
            Rows::Csv(writer) => writer.serialize(row).map_err(std::io::Error::other),
            Rows::Jsonl(file) => serde_json::to_writer(&mut *file, &row)
                .map_err(std::io::Error::other)
                .and_then(|()| file.write_all(b"\n")),
        };
        written.map_err(LineError::file("writing the report", &self.path))
    }

    pub(super) fn flush(&mut self) -> Result<(), LineError> {
        let flushed = match &mut self.rows {
            Rows::Csv(writer) => writer.flush(),
            Rows::Jsonl(file) => file.flush(),
        };
        flushed.map_err(LineError::file("writing the report", &self.path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

fn row<'a>(order: &'a Order, result: &'a DeviceResult) -> Row<'a> {
    let receipt = result.outcome.as_ref().ok().map(Outcome::receipt);
    let failure = result.outcome.as_ref().err();
    Row {
        chip_id: order.chip.to_string(),
        identity: order.identity.to_string(),
        profile: order.profile.as_str(),
        outcome: result.outcome.as_ref().map_or("failed", Outcome::name),
        session: receipt.map(|receipt| receipt.session.to_string()),
        record_index: receipt.map(|receipt| receipt.record_index),
        record_hash: receipt.map(|receipt| receipt.record_hash.as_str()),
        published: receipt.map(|receipt| receipt.published.as_str()),
        assemble_ms: result.times.assemble.map(milliseconds),
        device_ms: result.times.device.map(milliseconds),
        complete_ms: result.times.complete.map(milliseconds),
        total_ms: milliseconds(result.times.total),
        retries: result.times.retries,
        step: failure.map(Failure::step),
        error: failure.map(ToString::to_string),
    }
}

/// Milliseconds with three decimals.
fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// The summary of a run.
#[derive(Serialize)]
pub(super) struct Summary {
    /// Number of orders.
    pub(super) devices: usize,
    /// Provisioned in this run.
    pub(super) done: usize,
    /// Completed earlier, according to the daemon.
    pub(super) found: usize,
    /// Completed earlier, according to the journal.
    pub(super) skipped: usize,
    /// Without a receipt.
    pub(super) failed: usize,
    /// Not started, because the run was stopped.
    pub(super) not_begun: usize,
    /// Number of retried calls.
    pub(super) retries: u64,
    /// Duration of the run.
    pub(super) seconds: f64,
    /// Devices provisioned in this run, per second.
    pub(super) devices_per_second: f64,
    /// Durations of the devices provisioned in this run.
    pub(super) milliseconds: StepDurations,
}

/// Durations of the provisioning steps.
#[derive(Serialize)]
pub(super) struct StepDurations {
    total: Option<Percentiles>,
    assemble: Option<Percentiles>,
    device: Option<Percentiles>,
    complete: Option<Percentiles>,
}

/// Percentiles of a duration in milliseconds.
#[derive(Debug, PartialEq, Serialize)]
struct Percentiles {
    p50: f64,
    p95: f64,
    p99: f64,
    max: f64,
}

impl Percentiles {
    /// Nearest-rank method: each percentile is a measured value.
    fn of(mut times: Vec<Duration>) -> Option<Self> {
        times.sort_unstable();
        let rank = |percent: usize| (times.len() * percent).div_ceil(100).saturating_sub(1);
        let percentile = |percent| times.get(rank(percent)).copied().map(milliseconds);
        Some(Self { p50: percentile(50)?, p95: percentile(95)?, p99: percentile(99)?, max: percentile(100)? })
    }
}

/// Counts results as the devices finish.
#[derive(Default)]
pub(super) struct Tally {
    done: usize,
    found: usize,
    skipped: usize,
    pub(super) failed: usize,
    retries: u64,
    total: Vec<Duration>,
    assemble: Vec<Duration>,
    device: Vec<Duration>,
    complete: Vec<Duration>,
}

impl Tally {
    pub(super) fn add(&mut self, result: &DeviceResult) {
        self.retries += u64::from(result.times.retries);
        match &result.outcome {
            Err(_) => self.failed += 1,
            Ok(Outcome::Skipped(_)) => self.skipped += 1,
            Ok(Outcome::Found(_)) => self.found += 1,
            Ok(Outcome::Done(_)) => {
                self.done += 1;
                self.total.push(result.times.total);
                self.assemble.extend(result.times.assemble);
                self.device.extend(result.times.device);
                self.complete.extend(result.times.complete);
            }
        }
    }

    /// Number of counted devices.
    pub(super) const fn count(&self) -> usize {
        self.done + self.found + self.skipped + self.failed
    }

    pub(super) fn into_summary(self, devices: usize, duration: Duration) -> Summary {
        let seconds = duration.as_secs_f64();
        Summary {
            devices,
            done: self.done,
            found: self.found,
            skipped: self.skipped,
            failed: self.failed,
            not_begun: devices.saturating_sub(self.count()),
            retries: self.retries,
            seconds: (seconds * 1e3).round() / 1e3,
            devices_per_second: if seconds > 0.0 { (self.done as f64 / seconds * 10.0).round() / 10.0 } else { 0.0 },
            milliseconds: StepDurations {
                total: Percentiles::of(self.total),
                assemble: Percentiles::of(self.assemble),
                device: Percentiles::of(self.device),
                complete: Percentiles::of(self.complete),
            },
        }
    }
}

impl Summary {
    pub(super) const fn is_success(&self) -> bool {
        self.failed == 0 && self.not_begun == 0
    }

    /// Formats the summary for operators.
    pub(super) fn text(&self) -> String {
        let complete = self.done + self.found + self.skipped;
        let mut text = format!("{complete} of {} devices are complete", self.devices);
        if self.done > 0 {
            let _ = write!(
                text,
                ": {} in this run in {:.1} s ({} devices/s)",
                self.done, self.seconds, self.devices_per_second
            );
        }
        let before = self.found + self.skipped;
        for (count, what) in [(before, "completed earlier"), (self.failed, "failed"), (self.not_begun, "not started")] {
            if count > 0 {
                let _ = write!(text, ", {count} {what}");
            }
        }
        if self.retries > 0 {
            let _ = write!(text, "; {} calls retried", self.retries);
        }
        text.push('\n');
        let StepDurations { total, assemble, device, complete } = &self.milliseconds;
        if total.is_some() {
            let _ = writeln!(text, "{:<16}{:>10}{:>10}{:>10}{:>10}", "milliseconds", "p50", "p95", "p99", "max");
        }
        let parts = [("total", total), ("  Assemble", assemble), ("  device", device), ("  Complete", complete)];
        for (name, percentiles) in parts {
            if let Some(Percentiles { p50, p95, p99, max }) = percentiles {
                let _ = writeln!(text, "{name:<16}{p50:>10.1}{p95:>10.1}{p99:>10.1}{max:>10.1}");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use spp_format::names::{ChipId, SessionId};

    use super::*;
    use crate::device_flow::Times;
    use crate::journal::StoredReceipt;

    fn order() -> Order {
        Order {
            chip: ChipId::from_bytes(&[7; 8]).unwrap(),
            identity: "serial:A,B".parse().unwrap(),
            profile: "phone".parse().unwrap(),
        }
    }

    fn done() -> DeviceResult {
        let receipt = StoredReceipt {
            session: SessionId::from_bytes(&[1; 16]).unwrap(),
            record_index: 4,
            record_hash: "ab".repeat(32),
            published: "2024-01-01T00:00:00Z".to_owned(),
        };
        let assemble = Some(Duration::from_micros(1_500));
        let times = Times { assemble, total: Duration::from_millis(4), ..Times::default() };
        DeviceResult { outcome: Ok(Outcome::Done(receipt)), times }
    }

    fn failed() -> DeviceResult {
        DeviceResult { outcome: Err(Failure::Station("no \"luck\"".into())), times: Times::default() }
    }

    #[test]
    fn percentiles_are_measured_values() {
        let of = |count: u64| Percentiles::of((1..=count).rev().map(Duration::from_millis).collect());
        assert_eq!(of(0), None);
        assert_eq!(of(1), Some(Percentiles { p50: 1.0, p95: 1.0, p99: 1.0, max: 1.0 }));
        assert_eq!(of(2), Some(Percentiles { p50: 1.0, p95: 2.0, p99: 2.0, max: 2.0 }));
        assert_eq!(of(200), Some(Percentiles { p50: 100.0, p95: 190.0, p99: 198.0, max: 200.0 }));
    }

    #[test]
    fn report_has_row_per_device() {
        let directory = spp_test_support::files::temp_dir();
        for ending in ["csv", "jsonl"] {
            let path = directory.path().join(format!("report.{ending}"));
            let mut report = Report::create(&ReportFile::parse(path.to_str().unwrap()).unwrap()).unwrap();
            report.add(&order(), &done()).unwrap();
            report.add(&order(), &failed()).unwrap();
            report.flush().unwrap();
        }
        let text = std::fs::read_to_string(directory.path().join("report.csv")).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("chip_id,identity,profile,outcome,"), "{text}");
        assert!(lines[1].starts_with("0707070707070707,\"serial:A,B\",phone,done,"), "{text}");
        assert!(lines[2].contains(",failed,") && lines[2].contains("station"), "{text}");
        let text = std::fs::read_to_string(directory.path().join("report.jsonl")).unwrap();
        let rows: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows[0]["assemble_ms"], 1.5);
        assert_eq!(rows[1]["error"], "no \"luck\"");
        assert!(ReportFile::parse("report.txt").is_err());
    }

    #[test]
    fn summary_counts_devices_not_started() {
        let mut tally = Tally::default();
        tally.add(&done());
        tally.add(&failed());
        let summary = tally.into_summary(5, Duration::from_secs(2));
        assert_eq!((summary.done, summary.failed, summary.not_begun), (1, 1, 3));
        assert!(!summary.is_success());
        assert!(summary.text().contains("1 failed, 3 not started"), "{}", summary.text());
        assert!(summary.text().contains("0.5 devices/s"), "{}", summary.text());
    }
}
