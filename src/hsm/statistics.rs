//! Call statistics of an HSM per operation and outcome, for status and metrics.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::failure_class::FailureClass;
use super::wire::Reply;

/// Upper bounds of the latency buckets in microseconds. One more bucket counts the slower calls.
pub const LATENCY_BOUNDS_US: [u32; 12] =
    [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000, 100_000, 500_000, 2_500_000];

/// The outcome of an operation: `ok`, or the class of its failure.
type Outcome = &'static str;

/// Statistics since the start of the daemon, over all workers.
#[derive(Default)]
pub(crate) struct CallStatistics(Mutex<BTreeMap<(&'static str, Outcome), CallStatistic>>);

/// The statistics of one operation with one outcome.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CallStatistic {
    /// The operation.
    pub operation: &'static str,
    /// `ok`, or the class of its failure.
    pub outcome: &'static str,
    /// Number of operations.
    pub count: u64,
    /// Total time in the HSM, without waiting for a thread.
    pub took: Duration,
    /// Number of operations per latency bucket of [`LATENCY_BOUNDS_US`]; the last bucket has no upper bound.
    pub by_latency: [u64; LATENCY_BOUNDS_US.len() + 1],
}

impl CallStatistic {
    /// The median latency, rounded up to a bucket bound.
    pub fn median(&self) -> Option<Duration> {
        let mut seen = 0;
        let found = self.by_latency.iter().position(|count| {
            seen += count;
            seen * 2 >= self.count
        });
        let bound = LATENCY_BOUNDS_US.get(found.filter(|_| self.count > 0)?);
        Some(Duration::from_micros(bound.copied().unwrap_or(u32::MAX).into()))
    }
}

impl CallStatistics {
    /// Counts the operations that the worker started.
    pub(super) fn count(&self, names: &[&'static str], reply: &Reply) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, (operation, took_us)) in names.iter().zip(&reply.took_us).enumerate() {
            let failed = reply.result.as_ref().err().filter(|_| index + 1 == reply.took_us.len());
            let outcome = failed.map_or("ok", |failure| class_name(failure.class));
            let statistic = all.entry((operation, outcome)).or_default();
            (statistic.operation, statistic.outcome) = (operation, outcome);
            statistic.count += 1;
            statistic.took += Duration::from_micros((*took_us).into());
            let bucket = LATENCY_BOUNDS_US.iter().position(|bound| took_us <= bound);
            if let Some(count) = statistic.by_latency.get_mut(bucket.unwrap_or(LATENCY_BOUNDS_US.len())) {
                *count += 1;
            }
        }
    }

    pub(super) fn all(&self) -> Vec<CallStatistic> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

const fn class_name(class: FailureClass) -> Outcome {
    match class {
        FailureClass::Transient => "transient",
        FailureClass::SessionLost => "session-lost",
        FailureClass::ModuleLost => "module-lost",
        FailureClass::Permanent => "permanent",
        FailureClass::Rejected => "rejected",
        FailureClass::Absent => "absent",
    }
}

#[cfg(test)]
mod tests {
    use super::super::failure::Failure;
    use super::*;

    #[test]
    fn failed_request_counts_only_its_last_operation_as_failed() {
        let statistics = CallStatistics::default();
        let names = ["generate_pair", "derive", "random"];
        let failure = Failure::new(FailureClass::Transient, "CKR_GENERAL_ERROR");
        statistics.count(&names, &Reply { id: 1, took_us: vec![900, 40], result: Err(failure) });
        statistics.count(&names, &Reply { id: 2, took_us: vec![800, 60, 5], result: Ok(Vec::new()) });
        let all = statistics.all();
        let counted: Vec<_> =
            all.iter().map(|one| (one.operation, one.outcome, one.count, one.took.as_micros())).collect();
        assert_eq!(
            counted,
            [
                ("derive", "ok", 1, 60),
                ("derive", "transient", 1, 40),
                ("generate_pair", "ok", 2, 1700),
                ("random", "ok", 1, 5)
            ]
        );
        assert_eq!(all[2].median(), Some(Duration::from_millis(1)));
        assert_eq!(all[2].by_latency.iter().sum::<u64>(), 2);
    }
}
