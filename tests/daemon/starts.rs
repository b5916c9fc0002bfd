//! The daemon starts on a fresh site, tells what it is, and stops when asked.

use spp_testkit::process::{output, program, tethered};
use spp_testkit::site::Site;

#[test]
fn a_fresh_site_serves_and_drains() {
    let mut site = Site::running();
    let words = format!("status --json --server https://127.0.0.1:{} --tls tls/officer", site.officer);
    let status: serde_json::Value = serde_json::from_str(&site.sppctl(&words)).unwrap();
    assert_eq!(status["ready"], true);
    assert_eq!(status["hsm"]["members"][0]["worker_starts"], 1);
    assert!(site.worker_pid().is_some());
    assert!(site.stop().success());
    assert!(site.log().contains("drained"));
}

/// Man pages and completions are made by the programs themselves.
#[test]
fn every_program_describes_itself_for_man_and_for_shells() {
    let place = spp_testkit::files::temp_dir();
    for (name, man, completions) in [
        ("sppctl", &["man"][..], &["completions", "bash"][..]),
        ("spp-line", &["man"], &["completions", "fish"]),
        ("sppd", &["--man"], &["--completions", "zsh"]),
    ] {
        let run = |words: &[&str]| {
            let mut command = tethered(program(name));
            command.args(words).current_dir(place.path());
            let output = output(command);
            assert!(output.status.success(), "{name} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        run(&[man, &["pages"][..]].concat());
        let page = std::fs::read_to_string(place.path().join(format!("pages/{name}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{page}");
        assert!(run(completions).contains(name));
    }
    let of_commands = ["sppctl-hsm-check.1", "sppctl-station-enroll.1", "spp-line-provision.1"];
    for page in of_commands {
        assert!(place.path().join("pages").join(page).exists(), "{page}");
    }
}
