//! The reference station with simulated devices; what it does is in `spp::line`.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    // Packages with keys in them pass through this process.
    spp::hardening::forbid_core_dumps();
    spp::line::run(spp::line::Arguments::parse())
}
