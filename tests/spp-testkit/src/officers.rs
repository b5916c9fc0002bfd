//! Officers: runs sppctl commands and decides on approval requests.

use std::process::Output;

use serde_json::Value;

use crate::site::Site;

/// Starts a site with three officers; o-1 is in `tls/officer`.
pub fn site_with_three_officers() -> Site {
    let mut site = Site::new();
    for name in ["o-2", "o-3"] {
        site.sppctl(&format!("officer enroll {name} --config sppd.toml --out tls/{name}"));
    }
    site.start();
    site
}

/// Runs sppctl against the daemon, with the certificate in the directory `tls`.
pub fn sppctl_as(site: &Site, tls: &str, words: &str) -> Output {
    site.try_sppctl(&format!("{words} --server https://127.0.0.1:{} --tls {tls}", site.officer))
}

/// Runs sppctl with `--json`; it must succeed.
pub fn sppctl_json(site: &Site, tls: &str, words: &str) -> Value {
    let output = sppctl_as(site, tls, &format!("{words} --json"));
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Decides interactively, as a person does: reads the request and types the start of its hash.
pub fn decide(site: &Site, tls: &str, words: &str) -> Output {
    let id = words.split_whitespace().nth(1).unwrap();
    let shown = String::from_utf8(sppctl_as(site, tls, &format!("approvals show {id}")).stdout).unwrap();
    let hash = shown.lines().find_map(|line| line.strip_prefix("hash")).map(|hash| hash.trim()[..8].to_owned());
    decide_with_input(site, tls, words, &hash.unwrap_or_default())
}

/// Decides with `text` typed at the prompt.
pub fn decide_with_input(site: &Site, tls: &str, words: &str, text: &str) -> Output {
    let words = format!("approvals {words} --server https://127.0.0.1:{} --tls {tls}", site.officer);
    site.run_with_input("sppctl", &words, &format!("{text}\n"))
}

/// Officer o-2 approves; it must succeed.
pub fn approve(site: &Site, id: &str) {
    let output = decide(site, "tls/o-2", &format!("approve {id}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
