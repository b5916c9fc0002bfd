//! Reference station with simulated devices; implemented in `spp::line`.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    // This process handles data packages that contain keys.
    spp::hardening::forbid_core_dumps();
    spp::line::run(spp::line::Arguments::parse())
}
