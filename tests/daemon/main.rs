//! The daemon as its users meet it: real processes, real sockets, a real HSM module, real files.
#![allow(missing_docs, unreachable_pub, reason = "tests are named by what must be true")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helpers are part of the test")]
#![expect(clippy::disallowed_types, reason = "tests are gRPC clients: they read statuses")]

mod approvals;
mod audit;
mod callers;
mod ceremonies;
mod ceremonies_keys;
mod configuration;
mod crash;
mod faults;
mod floor;
mod metrics;
mod mirror;
mod outside;
mod pool;
mod pool_crash;
mod pool_officer;
mod quotas;
mod refusals;
mod reload;
mod reports;
mod secrets;
mod several;
mod site;
mod starts;
mod station;
mod tls;
mod way;
mod web;
