//! How much one address may ask.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};

use super::serve::holder;
use crate::config::PublicConfig;

/// Addresses that are remembered; those that are at rest are forgotten first.
const MOST: usize = 100_000;

/// Counts the requests of each address.
pub(super) struct Rate {
    limiter: DefaultKeyedRateLimiter<IpAddr>,
    clock: DefaultClock,
}

impl Rate {
    pub(super) fn new(config: &PublicConfig) -> Self {
        // The configuration has no zero.
        let number = |value: u32| NonZeroU32::new(value).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::per_second(number(config.requests_per_second)).allow_burst(number(config.burst));
        Self { limiter: RateLimiter::keyed(quota), clock: DefaultClock::default() }
    }

    /// Counts a request; or tells after how long it may come again.
    pub(super) fn admit(&self, address: IpAddr) -> Result<(), Duration> {
        self.charge(address, NonZeroU32::MIN)
    }

    /// Counts a request as several, since it costs as much.
    pub(super) fn charge(&self, address: IpAddr, requests: NonZeroU32) -> Result<(), Duration> {
        if self.limiter.len() >= MOST {
            self.limiter.retain_recent();
            if self.limiter.len() >= MOST {
                return Err(Duration::from_secs(1));
            }
        }
        match self.limiter.check_key_n(&holder(address), requests) {
            // More at once than the burst would never be let in: it counts as the burst.
            Err(_) => self.limiter.check_key(&holder(address)).map_err(|e| e.wait_time_from(self.clock.now())),
            Ok(counted) => counted.map_err(|not_until| not_until.wait_time_from(self.clock.now())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_gets_its_burst_and_then_a_pause_and_others_do_not_suffer() {
        let mut config = PublicConfig::default();
        (config.requests_per_second, config.burst) = (1, 3);
        let rate = Rate::new(&config);
        let greedy: IpAddr = "192.0.2.1".parse().unwrap();
        for _ in 0..3 {
            assert!(rate.admit(greedy).is_ok());
        }
        let pause = rate.admit(greedy).unwrap_err();
        assert!(pause > Duration::ZERO && pause <= Duration::from_secs(1), "{pause:?}");
        assert!(rate.admit("192.0.2.2".parse().unwrap()).is_ok());
    }

    #[test]
    fn an_ipv6_network_counts_as_one() {
        let holder = |text: &str| holder(text.parse().unwrap());
        assert_eq!(holder("2001:db8::1"), holder("2001:db8::ffff:1"));
        assert_ne!(holder("2001:db8::1"), holder("2001:db8:0:1::1"));
        assert_eq!(holder("::ffff:192.0.2.1"), holder("192.0.2.1"));
    }
}
