//! Reference station with simulated devices; implemented in `spp_line`.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    // This process handles data packages that contain keys.
    spp_program::hardening::forbid_core_dumps();
    spp_line::run(spp_line::Arguments::parse())
}
