//! Seeds and sizes: random values of a test can be reproduced, and long runs have a short form.
//!
//! `SPP_SEED=N` fixes every seed; without it each run draws one and prints it. `SPP_SOAK=1` (set by `make soak`) selects the full
//! sizes.

use std::time::UNIX_EPOCH;

use proptest::test_runner::{Config, FileFailurePersistence, RngSeed};

/// The seed of this run: `SPP_SEED`, or a new one. It is printed; the test runner shows it if the test fails.
pub fn seed() -> u64 {
    let seed = match std::env::var("SPP_SEED") {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("SPP_SEED must be a decimal number below 2^64: {text:?}")),
        Err(_) => {
            let now = UNIX_EPOCH.elapsed().expect("the clock is after 1970");
            now.as_nanos() as u64 ^ u64::from(std::process::id()).rotate_left(32)
        }
    };
    println!("seed {seed}; to repeat this run: SPP_SEED={seed}");
    seed
}

/// A pseudo-random sequence (xorshift64) for test decisions; not for keys.
pub struct Random(u64);

impl Random {
    /// The sequence of this run's [`seed`].
    pub fn new() -> Self {
        Self::of(seed())
    }

    /// The sequence of that seed.
    pub fn of(seed: u64) -> Self {
        // The state must not be zero, and similar seeds should give different sequences from the first value on.
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

impl Default for Random {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether full sizes are selected.
pub fn is_soak() -> bool {
    std::env::var_os("SPP_SOAK").is_some()
}

/// The size of a long run: `short` in `make test`, `full` in `make soak`.
pub fn scaled<T>(short: T, full: T) -> T {
    if is_soak() { full } else { short }
}

/// The configuration of a property test with this number of cases, from this run's [`seed`]. Past failures are in
/// `proptest-regressions/` of the test's crate, which is committed, and are tried first.
pub fn cases(short: u32, full: u32) -> Config {
    Config {
        cases: scaled(short, full),
        rng_seed: RngSeed::Fixed(seed()),
        failure_persistence: Some(Box::new(FileFailurePersistence::SourceParallel("proptest-regressions"))),
        ..Config::default()
    }
}
