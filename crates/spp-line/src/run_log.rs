//! The log of a run: journal, report, summary and progress bar, written by one thread.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use spp_format::names::ChipId;

use super::LineError;
use super::device_flow::{DeviceResult, Failure, Outcome, Times};
use super::journal::{CompletionLog, JournalEntry};
use super::orders::Order;
use super::report::{Report, ReportFile, Summary, Tally};

/// Number of failures that are printed; the report contains all.
const MAX_LISTED_FAILURES: usize = 20;

/// Writes the results of a run.
pub(super) struct RunLog {
    journal: CompletionLog,
    report: Option<Report>,
    known: HashMap<ChipId, JournalEntry>,
    /// Chips whose flash is not empty.
    flashes: HashSet<ChipId>,
    tally: Tally,
    failures: Vec<String>,
    bar: ProgressBar,
}

/// The result of a run.
pub(super) struct RunResult {
    pub(super) summary: Summary,
    /// The first failures: chip, identity, step and error.
    pub(super) failures: Vec<String>,
}

impl RunLog {
    /// Opens the run log of the directory; locks the directory for one run.
    pub(super) fn open(devices: &Path, report: Option<&ReportFile>) -> Result<Self, LineError> {
        let (journal, known) = CompletionLog::open(devices)?;
        Ok(Self {
            journal,
            report: report.map(Report::create).transpose()?,
            known,
            flashes: flashes(devices)?,
            tally: Tally::default(),
            failures: Vec::new(),
            bar: ProgressBar::hidden(),
        })
    }

    /// The result of an earlier run for this order; `None` if the device is not complete.
    pub(super) fn completed_before(&mut self, order: &Order) -> Option<DeviceResult> {
        let entry = self.known.get(&order.chip).filter(|entry| entry.matches_order(order))?;
        let outcome = if self.flashes.contains(&order.chip) {
            Ok(Outcome::Skipped(entry.receipt.clone()))
        } else {
            Err(Failure::flash_lost(order, "its flash is empty"))
        };
        Some(DeviceResult { outcome, times: Times::default() })
    }

    /// Shows the progress over all `devices` if standard error is a terminal.
    pub(super) fn show_progress(&mut self, devices: usize) {
        self.bar = ProgressBar::new(devices as u64);
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} devices, {per_sec}, {eta} left{msg}");
        if let Ok(style) = style {
            self.bar.set_style(style);
        }
        self.bar.set_position(self.tally.count() as u64);
        self.bar.reset_eta();
        self.show_failures();
    }

    /// Records the result of a device.
    pub(super) fn record(&mut self, order: &Order, result: DeviceResult) -> Result<(), LineError> {
        self.tally.add(&result);
        if let Some(report) = &mut self.report {
            report.add(order, &result)?;
        }
        match result.outcome {
            Ok(Outcome::Done(receipt) | Outcome::Found(receipt)) => {
                self.journal.add(&JournalEntry::new(order, receipt))?;
            }
            Ok(Outcome::Skipped(_)) => {}
            Err(failure) => {
                if self.failures.len() < MAX_LISTED_FAILURES {
                    let (chip, identity) = (&order.chip, &order.identity);
                    self.failures.push(format!("{chip} {identity}, {}: {failure}", failure.step()));
                }
                self.show_failures();
            }
        }
        self.bar.inc(1);
        Ok(())
    }

    /// Flushes journal and report to the operating system.
    pub(super) fn flush(&mut self) -> Result<(), LineError> {
        self.journal.flush()?;
        self.report.as_mut().map_or(Ok(()), Report::flush)
    }

    /// Ends the run.
    pub(super) fn close(mut self, devices: usize, duration: Duration) -> Result<RunResult, LineError> {
        self.bar.finish_and_clear();
        self.flush()?;
        self.journal.close()?;
        let mut failures = self.failures;
        let unlisted = self.tally.failed.saturating_sub(failures.len());
        if unlisted > 0 {
            let hint = match &self.report {
                Some(report) => format!("{} lists all", report.path().display()),
                None => "add --report FILE.csv to list all".to_owned(),
            };
            failures.push(format!("and {unlisted} more; {hint}"));
        }
        Ok(RunResult { summary: self.tally.into_summary(devices, duration), failures })
    }

    fn show_failures(&self) {
        if self.tally.failed > 0 {
            self.bar.set_message(format!(", {} failed", self.tally.failed));
        }
    }
}

/// The chips whose flash is not empty.
pub(super) fn flashes(devices: &Path) -> Result<HashSet<ChipId>, LineError> {
    let entries = std::fs::read_dir(devices).map_err(LineError::file("reading the directory", devices))?;
    let mut found = HashSet::new();
    for entry in entries {
        let name = entry.map_err(LineError::file("reading the directory", devices))?.file_name();
        let chip = name.to_str().and_then(|name| name.strip_suffix(".flash")).and_then(|chip| chip.parse().ok());
        found.extend(chip);
    }
    Ok(found)
}
