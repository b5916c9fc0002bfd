//! The program without a daemon: usage, man pages, completions. Other tests of the workspace start it as well; cargo builds the
//! programs of a package together with its integration tests, so do not delete this file.
#![allow(clippy::unwrap_used, reason = "test helpers may panic")]

use std::path::Path;
use std::process::{Command, Output};

fn spp_line(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_spp-line")).args(words).output().unwrap()
}

#[test]
fn usage_error_exits_with_2() {
    let output = spp_line(&["provision"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--server"), "{output:?}");
}

#[test]
fn man_pages_and_completions_are_generated() {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("man");
    assert!(spp_line(&["man", directory.to_str().unwrap()]).status.success());
    assert!(directory.join("spp-line-provision.1").exists());
    let completions = spp_line(&["completions", "bash"]);
    assert!(String::from_utf8_lossy(&completions.stdout).contains("spp-line"));
}
