//! Black-box tests of the daemon: real processes, sockets, HSM module and files.

mod approvals;
mod audit;
mod callers;
mod ceremonies;
mod ceremonies_keys;
mod configuration;
mod crash;
mod device_path;
mod faults;
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
mod starts;
mod station;
mod web;
