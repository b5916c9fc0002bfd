//! Waiting for a condition instead of a duration.
//!
//! A test on a busy machine may be slow, but it must not fail for that. So nothing here has a limit that a healthy system could
//! reach: [`LIMIT`] is how long a broken one is looked at before the test fails and shows what it saw last.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// How long a condition is waited for.
pub const LIMIT: Duration = Duration::from_secs(120);
/// The pause after the first look, and the longest one: each is half as long again as the one before, because a look at a daemon
/// may be a TLS connection, and looking must not be what keeps a busy machine busy.
const POLL_INTERVAL: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(150));

fn longer(pause: Duration) -> Duration {
    POLL_INTERVAL.1.min(pause * 3 / 2)
}

/// What one look at a condition found: `true`, `Some` and `Ok` end the waiting; everything else is shown if it never ends.
pub trait Look {
    /// What the condition yields.
    type Value;

    /// The value, or a description of what is still missing.
    fn found(self) -> Result<Self::Value, String>;
}

impl Look for bool {
    type Value = ();

    fn found(self) -> Result<(), String> {
        if self { Ok(()) } else { Err("it is not".to_owned()) }
    }
}

impl<T> Look for Option<T> {
    type Value = T;

    fn found(self) -> Result<T, String> {
        self.ok_or_else(|| "there is none".to_owned())
    }
}

impl<T, E: Debug> Look for Result<T, E> {
    type Value = T;

    fn found(self) -> Result<T, String> {
        self.map_err(|seen| format!("{seen:?}"))
    }
}

/// Looks again and again until the condition holds. `what` completes the sentence "waiting until …".
pub async fn eventually<L: Look>(what: &str, mut look: impl AsyncFnMut() -> L) -> L::Value {
    let (begun, mut pause) = (Instant::now(), POLL_INTERVAL.0);
    loop {
        match look().await.found() {
            Ok(value) => return value,
            Err(seen) => assert!(begun.elapsed() < LIMIT, "waiting until {what}; last seen: {seen}"),
        }
        tokio::time::sleep(pause).await;
        pause = longer(pause);
    }
}

/// The same without an async runtime.
pub fn eventually_blocking<L: Look>(what: &str, mut look: impl FnMut() -> L) -> L::Value {
    let (begun, mut pause) = (Instant::now(), POLL_INTERVAL.0);
    loop {
        match look().found() {
            Ok(value) => return value,
            Err(seen) => assert!(begun.elapsed() < LIMIT, "waiting until {what}; last seen: {seen}"),
        }
        std::thread::sleep(pause);
        pause = longer(pause);
    }
}

/// Checks during `time` that something does **not** happen. A slow machine can only make this pass, never fail, so use it with a
/// time in which the fault would certainly show, and only where no event marks that it did not.
pub async fn never<L: Look>(what: &str, time: Duration, mut look: impl AsyncFnMut() -> L) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        assert!(look().await.found().is_err(), "it must never be that {what}");
        tokio::time::sleep(POLL_INTERVAL.0).await;
    }
}
