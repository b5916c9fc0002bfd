//! Waits for conditions instead of durations.
//!
//! A test on a busy machine may be slow, but must not fail for that reason. No limit here can be reached by a healthy system:
//! [`LIMIT`] is how long a broken system is observed before the test fails with the last observation.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// Maximum time to wait for a condition.
pub const LIMIT: Duration = Duration::from_secs(120);
/// The first and the longest pause between two checks. Each pause is 1.5 times the previous one, because a check may be a TLS
/// connection, and checks must not load a busy machine.
const POLL_INTERVAL: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(150));

fn next_pause(pause: Duration) -> Duration {
    POLL_INTERVAL.1.min(pause * 3 / 2)
}

/// The outcome of one check. `true`, `Some` and `Ok` end the wait; the last other value is shown when the limit is reached.
pub trait Check {
    /// The value that the condition yields.
    type Value;

    /// The value, or a description of the unmet condition.
    fn outcome(self) -> Result<Self::Value, String>;
}

impl Check for bool {
    type Value = ();

    fn outcome(self) -> Result<(), String> {
        if self { Ok(()) } else { Err("false".to_owned()) }
    }
}

impl<T> Check for Option<T> {
    type Value = T;

    fn outcome(self) -> Result<T, String> {
        self.ok_or_else(|| "none".to_owned())
    }
}

impl<T, E: Debug> Check for Result<T, E> {
    type Value = T;

    fn outcome(self) -> Result<T, String> {
        self.map_err(|seen| format!("{seen:?}"))
    }
}

/// Checks until the condition holds. `what` completes the sentence "waiting until …".
pub async fn eventually<L: Check>(what: &str, mut check: impl AsyncFnMut() -> L) -> L::Value {
    let (begun, mut pause) = (Instant::now(), POLL_INTERVAL.0);
    loop {
        match check().await.outcome() {
            Ok(value) => return value,
            Err(seen) => assert!(begun.elapsed() < LIMIT, "waiting until {what}; last seen: {seen}"),
        }
        tokio::time::sleep(pause).await;
        pause = next_pause(pause);
    }
}

/// [`eventually`] without an async runtime.
pub fn eventually_blocking<L: Check>(what: &str, mut check: impl FnMut() -> L) -> L::Value {
    let (begun, mut pause) = (Instant::now(), POLL_INTERVAL.0);
    loop {
        match check().outcome() {
            Ok(value) => return value,
            Err(seen) => assert!(begun.elapsed() < LIMIT, "waiting until {what}; last seen: {seen}"),
        }
        std::thread::sleep(pause);
        pause = next_pause(pause);
    }
}

/// Checks during `time` that a condition does **not** become true. On a slow machine this can only pass, never fail. Use a `time`
/// in which the fault would certainly show, and only where no event proves its absence.
pub async fn never<L: Check>(what: &str, time: Duration, mut check: impl AsyncFnMut() -> L) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        assert!(check().await.outcome().is_err(), "unexpected: {what}");
        tokio::time::sleep(POLL_INTERVAL.0).await;
    }
}
