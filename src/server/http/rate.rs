//! Limits the request rate per address.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};

use super::serve::rate_key;
use crate::config::PublicConfig;

/// Maximum number of tracked addresses; idle addresses are evicted first.
const MAX_ADDRESSES: usize = 100_000;

/// Counts the requests of each address.
pub(super) struct RateLimit {
    limiter: DefaultKeyedRateLimiter<IpAddr>,
    clock: DefaultClock,
}

impl RateLimit {
    pub(super) fn new(config: &PublicConfig) -> Self {
        // The configuration rejects zero.
        let number = |value: u32| NonZeroU32::new(value).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::per_second(number(config.requests_per_second)).allow_burst(number(config.burst));
        Self { limiter: RateLimiter::keyed(quota), clock: DefaultClock::default() }
    }

    /// Counts a request, or returns the delay after which it may be repeated.
    pub(super) fn admit(&self, address: IpAddr) -> Result<(), Duration> {
        self.charge(address, NonZeroU32::MIN)
    }

    /// Counts an expensive request as several.
    pub(super) fn charge(&self, address: IpAddr, requests: NonZeroU32) -> Result<(), Duration> {
        if self.limiter.len() >= MAX_ADDRESSES {
            self.limiter.retain_recent();
            if self.limiter.len() >= MAX_ADDRESSES {
                return Err(Duration::from_secs(1));
            }
        }
        match self.limiter.check_key_n(&rate_key(address), requests) {
            // A charge above the burst could never succeed, so it counts as one request.
            Err(_) => self.limiter.check_key(&rate_key(address)).map_err(|e| e.wait_time_from(self.clock.now())),
            Ok(counted) => counted.map_err(|not_until| not_until.wait_time_from(self.clock.now())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_limit_delays_address_after_its_burst_only() {
        let mut config = PublicConfig::default();
        (config.requests_per_second, config.burst) = (1, 3);
        let rate = RateLimit::new(&config);
        let greedy: IpAddr = "192.0.2.1".parse().unwrap();
        for _ in 0..3 {
            assert!(rate.admit(greedy).is_ok());
        }
        let pause = rate.admit(greedy).unwrap_err();
        assert!(pause > Duration::ZERO && pause <= Duration::from_secs(1), "{pause:?}");
        assert!(rate.admit("192.0.2.2".parse().unwrap()).is_ok());
    }

    #[test]
    fn ipv6_addresses_of_one_64_share_a_limit() {
        let rate_key = |text: &str| rate_key(text.parse().unwrap());
        assert_eq!(rate_key("2001:db8::1"), rate_key("2001:db8::ffff:1"));
        assert_ne!(rate_key("2001:db8::1"), rate_key("2001:db8:0:1::1"));
        assert_eq!(rate_key("::ffff:192.0.2.1"), rate_key("192.0.2.1"));
    }
}
