//! The daemon starts on a fresh site, tells what it is, and stops when asked.

use crate::site::{SPP_LINE, SPPCTL, SPPD, Site};

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
    let place = tempfile::tempdir().unwrap();
    for (program, man, completions) in [
        (SPPCTL, &["man"][..], &["completions", "bash"][..]),
        (SPP_LINE, &["man"], &["completions", "fish"]),
        (SPPD, &["--man"], &["--completions", "zsh"]),
    ] {
        let name = std::path::Path::new(program).file_name().unwrap().to_str().unwrap().to_owned();
        let run = |words: &[&str]| {
            let output = std::process::Command::new(program).args(words).current_dir(place.path()).output().unwrap();
            assert!(output.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        run(&[man, &["pages"][..]].concat());
        let page = std::fs::read_to_string(place.path().join(format!("pages/{name}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{page}");
        assert!(run(completions).contains(&name));
    }
    let of_commands = ["sppctl-hsm-check.1", "sppctl-station-enroll.1", "spp-line-provision.1"];
    for page in of_commands {
        assert!(place.path().join("pages").join(page).exists(), "{page}");
    }
}
