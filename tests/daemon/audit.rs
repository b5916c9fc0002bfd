//! The audit log of a daemon: it is made by an officer, tells of each start and stop, and a change in it is found.

use std::process::Command;

use serde_json::Value;
use spp::keys::sha256;

use crate::site::{SPPD, Site};

const VERIFY: &str = "audit verify --config sppd.toml";

fn entries(site: &Site) -> Vec<Value> {
    let text = String::from_utf8(site.read("audit/audit.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn each_start_and_stop_is_recorded_with_what_was_in_force() {
    let mut site = Site::running();
    assert!(site.stop().success());
    site.edit("sppd.toml", "\"24h\"", "\"23h\"");
    site.start();
    site.kill();
    site.start();
    let entries = entries(&site);
    let acts: Vec<_> = entries.iter().map(|entry| entry["act"].as_str().unwrap()).collect();
    assert_eq!(acts, ["start", "stop", "start", "start"], "a daemon that was killed could not tell of its end");
    assert_eq!(entries[3]["details"]["configuration"], hex::encode(sha256(&site.read("sppd.toml"))));
    assert_ne!(entries[3]["details"]["configuration"], entries[0]["details"]["configuration"]);
    assert_eq!(entries[0]["details"]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!((&entries[0]["node"], &entries[0]["caller"]), (&"demo".into(), &"sppd".into()));
    assert_eq!(site.sppctl(VERIFY), "4 entries, chain is whole\n", "also while the daemon runs");
    assert!(site.stop().success());
    let found: Value = serde_json::from_str(&site.sppctl(&format!("{VERIFY} --json"))).unwrap();
    assert_eq!((&found["whole"], &found["entries"]), (&true.into(), &5.into()));
}

#[test]
fn a_change_is_found_and_the_line_named() {
    let mut site = Site::running();
    assert!(site.stop().success());
    site.edit("audit/audit.jsonl", "\"sppd\"", "\"nobody\"");
    let output = site.try_sppctl(&format!("{VERIFY} --json"));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.success(), &found["whole"], &found["line"]), (false, &false.into(), &2.into()));
    let output = site.try_sppctl(VERIFY);
    assert!(output.stdout.is_empty() && String::from_utf8_lossy(&output.stderr).contains("line 2: "));
}

#[test]
fn the_daemon_never_makes_the_log_and_an_officer_can_make_it_alone() {
    let mut site = Site::new();
    std::fs::remove_dir_all(site.path("audit")).unwrap();
    for words in [&["--config", "sppd.toml"][..], &["--config", "sppd.toml", "--check"]] {
        let output = Command::new(SPPD).args(words).current_dir(site.path("")).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains("sppctl audit init"), "{text}");
        assert!(!text.contains("listening") && !site.path("audit").exists(), "{text}");
    }
    site.sppctl("audit init --config sppd.toml");
    assert!(!site.try_sppctl("audit init --config sppd.toml").status.success(), "nothing is made twice");
    site.start();
    assert_eq!(site.sppctl(VERIFY), "1 entries, chain is whole\n");
}

#[test]
fn entries_are_read_by_people_and_programs_and_none_that_does_not_fit() {
    let mut site = Site::running();
    assert!(site.stop().success());
    let told = site.sppctl("audit tail --config sppd.toml");
    let lines: Vec<_> = told.lines().collect();
    assert!(lines.len() == 2 && lines[0].contains(" start ") && lines[1].contains(" stop "), "{told}");
    assert_eq!(site.sppctl("audit tail --config sppd.toml -n 1").lines().collect::<Vec<_>>(), lines[1..]);
    let one: Value = serde_json::from_str(&site.sppctl("audit show 0 --config sppd.toml --json")).unwrap();
    assert_eq!(one, without_chain(&entries(&site)[0]));
    assert!(site.sppctl("audit show 1 --config sppd.toml").contains("act      stop"));
    let none = site.try_sppctl("audit show 7 --config sppd.toml");
    assert!(String::from_utf8_lossy(&none.stderr).contains("has no entry 7"), "{none:?}");

    let exported = site.sppctl("audit export --config sppd.toml --from 2020-01-01");
    let all: Vec<Value> = exported.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(all, entries(&site).iter().map(without_chain).collect::<Vec<_>>());
    assert_eq!(site.sppctl("audit export --config sppd.toml --to 2020-01-01"), "");
    site.sppctl("audit export --config sppd.toml --format csv --out audit.csv");
    let rows = String::from_utf8(site.read("audit.csv")).unwrap();
    assert!(
        rows.starts_with("sequence,time,node,caller,act,outcome,details\n0,") && rows.lines().count() == 3,
        "{rows}"
    );
    let again = site.try_sppctl("audit export --config sppd.toml --out audit.csv");
    assert!(String::from_utf8_lossy(&again.stderr).contains("overwrites nothing"), "{again:?}");

    site.edit("audit/audit.jsonl", "\"sppd\"", "\"nobody\"");
    for words in ["tail", "export", "show 1"] {
        let output = site.try_sppctl(&format!("audit {words} --config sppd.toml"));
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && why.contains("line 2: "), "{words}: {why}");
    }
}

/// An entry as it is told: its place in the chain is the file's affair.
fn without_chain(entry: &Value) -> Value {
    let mut entry = entry.clone();
    entry.as_object_mut().unwrap().remove("previous");
    entry
}
