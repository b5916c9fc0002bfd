//! Measures the fill rate of a pool.

use std::time::{Duration, Instant};

/// A pause of this length ends a measurement.
const GAP: Duration = Duration::from_secs(10);
/// After this time, earlier pairs count half.
const WINDOW: Duration = Duration::from_secs(60);

/// Pairs per second of the current filling, or of the last one.
#[derive(Debug, Default)]
pub(super) struct FillRate(Option<Run>);

#[derive(Debug)]
struct Run {
    begun: Instant,
    last: Instant,
    made: f64,
}

impl FillRate {
    /// Starts a measurement, unless one is running.
    pub(super) fn begin(&mut self, now: Instant) {
        if self.0.as_ref().is_none_or(|run| now.duration_since(run.last) > GAP) {
            self.0 = Some(Run { begun: now, last: now, made: 0.0 });
        }
    }

    /// Records `pairs` new pairs.
    pub(super) fn note(&mut self, now: Instant, pairs: u64) {
        let run = self.0.get_or_insert(Run { begun: now, last: now, made: 0.0 });
        run.made += pairs as f64;
        run.last = now;
        let elapsed = now.duration_since(run.begun);
        if elapsed > WINDOW {
            run.begun += elapsed / 2;
            run.made /= 2.0;
        }
    }

    /// The rate; 0 before the first pair.
    pub(super) fn per_second(&self) -> f64 {
        self.0.as_ref().map_or(0.0, |run| {
            let elapsed = run.last.duration_since(run.begun).as_secs_f64();
            if elapsed > 0.0 { run.made / elapsed } else { 0.0 }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fill_rate_is_pairs_per_elapsed_time() {
        let (mut rate, begun) = (FillRate::default(), Instant::now());
        assert_eq!(rate.per_second(), 0.0);
        rate.begin(begun);
        for second in 1..=300 {
            rate.note(begun + Duration::from_secs(second), 10);
        }
        assert!((rate.per_second() - 10.0).abs() < 0.5, "{}", rate.per_second());
        for minute in 1..=20 {
            rate.note(begun + Duration::from_secs(300 + 60 * minute), 1);
        }
        assert!((0.01..0.05).contains(&rate.per_second()), "slow is not nothing: {}", rate.per_second());
        let later = begun + Duration::from_secs(10_000);
        rate.begin(later);
        rate.note(later + Duration::from_secs(1), 3);
        assert!((rate.per_second() - 3.0).abs() < 0.01, "a pause is no slow filling: {}", rate.per_second());
    }
}
