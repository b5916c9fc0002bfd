//! The book of a run: journal, report, figures and progress bar, kept by one thread.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::LineError;
use super::device_flow::{DeviceFlow, Failure, Outcome, Times};
use super::journal::{Entry, Journal};
use super::orders::Order;
use super::report::{Report, ReportFile, Summary, Tally};
use crate::names::ChipId;

/// Failures that are listed for people; the report has all.
const LISTED: usize = 20;

/// Where what happens is written down.
pub(super) struct RunLog {
    journal: Journal,
    report: Option<Report>,
    known: HashMap<ChipId, Entry>,
    /// Chips whose flash is not empty.
    flashes: HashSet<ChipId>,
    tally: Tally,
    failures: Vec<String>,
    bar: ProgressBar,
}

/// What a run came to.
pub(super) struct Ended {
    pub(super) summary: Summary,
    /// The first failures: chip, identity, step and error.
    pub(super) failures: Vec<String>,
}

impl RunLog {
    /// Opens the book of the devices in the directory, for one run at a time.
    pub(super) fn open(devices: &Path, report: Option<&ReportFile>) -> Result<Self, LineError> {
        let (journal, known) = Journal::open(devices)?;
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

    /// What an earlier run wrote down of this order; `None` if the device needs work.
    pub(super) fn remembered(&mut self, order: &Order) -> Option<DeviceFlow> {
        let entry = self.known.get(&order.chip).filter(|entry| entry.answers(order))?;
        let outcome = if self.flashes.contains(&order.chip) {
            Ok(Outcome::Skipped(entry.receipt.clone()))
        } else {
            Err(Failure::flash_lost(order, "its flash is empty"))
        };
        Some(DeviceFlow { outcome, times: Times::default() })
    }

    /// Shows what was entered and will be, of `devices` in all, if standard error is a terminal.
    pub(super) fn show_progress(&mut self, devices: usize) {
        self.bar = ProgressBar::new(devices as u64);
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} devices, {per_sec}, {eta} left{msg}");
        if let Ok(style) = style {
            self.bar.set_style(style);
        }
        self.bar.set_position(self.tally.told() as u64);
        self.bar.reset_eta();
        self.show_failures();
    }

    /// Writes down what became of a device.
    pub(super) fn enter(&mut self, order: &Order, way: DeviceFlow) -> Result<(), LineError> {
        self.tally.add(&way);
        if let Some(report) = &mut self.report {
            report.add(order, &way)?;
        }
        match way.outcome {
            Ok(Outcome::Done(receipt) | Outcome::Found(receipt)) => {
                self.journal.add(&Entry::new(order, receipt))?;
            }
            Ok(Outcome::Skipped(_)) => {}
            Err(failure) => {
                if self.failures.len() < LISTED {
                    let (chip, identity) = (&order.chip, &order.identity);
                    self.failures.push(format!("{chip} {identity}, {}: {failure}", failure.step()));
                }
                self.show_failures();
            }
        }
        self.bar.inc(1);
        Ok(())
    }

    /// Hands journal and report to the system.
    pub(super) fn flush(&mut self) -> Result<(), LineError> {
        self.journal.flush()?;
        self.report.as_mut().map_or(Ok(()), Report::flush)
    }

    /// Ends the run.
    pub(super) fn close(mut self, devices: usize, took: Duration) -> Result<Ended, LineError> {
        self.bar.finish_and_clear();
        self.flush()?;
        self.journal.close()?;
        let mut failures = self.failures;
        let unlisted = self.tally.failed.saturating_sub(failures.len());
        if unlisted > 0 {
            let place = match &self.report {
                Some(report) => format!("{} has all", report.path().display()),
                None => "--report FILE.csv would have all".to_owned(),
            };
            failures.push(format!("and {unlisted} more; {place}"));
        }
        Ok(Ended { summary: self.tally.sum_up(devices, took), failures })
    }

    fn show_failures(&self) {
        if self.tally.failed > 0 {
            self.bar.set_message(format!(", {} failed", self.tally.failed));
        }
    }
}

/// The chips that have something in their flash.
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
