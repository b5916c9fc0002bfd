//! Officers: what they ask of the daemon, and what they decide.

use std::process::Output;

use serde_json::Value;

use crate::site::Site;

/// A site with three officers, o-1 in `tls/officer`, and a daemon that serves.
pub fn site_of_three() -> Site {
    let mut site = Site::new();
    for name in ["o-2", "o-3"] {
        site.sppctl(&format!("officer enroll {name} --config sppd.toml --out tls/{name}"));
    }
    site.start();
    site
}

/// What sppctl says to the daemon, with the certificate in that directory.
pub fn ask(site: &Site, tls: &str, words: &str) -> Output {
    site.try_sppctl(&format!("{words} --server https://127.0.0.1:{} --tls {tls}", site.officer))
}

/// The same as JSON; it must succeed.
pub fn told(site: &Site, tls: &str, words: &str) -> Value {
    let output = ask(site, tls, &format!("{words} --json"));
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Decides as a person does: reads what is shown and types how its hash begins.
pub fn decide(site: &Site, tls: &str, words: &str) -> Output {
    let id = words.split_whitespace().nth(1).unwrap();
    let shown = String::from_utf8(ask(site, tls, &format!("approvals show {id}")).stdout).unwrap();
    let hash = shown.lines().find_map(|line| line.strip_prefix("hash")).map(|hash| hash.trim()[..8].to_owned());
    typed(site, tls, words, &hash.unwrap_or_default())
}

/// A decision with that text typed at the prompt.
pub fn typed(site: &Site, tls: &str, words: &str, text: &str) -> Output {
    let words = format!("approvals {words} --server https://127.0.0.1:{} --tls {tls}", site.officer);
    site.run_typing("sppctl", &words, &format!("{text}\n"))
}

/// Officer o-2 approves; it must succeed.
pub fn approve(site: &Site, id: &str) {
    let output = decide(site, "tls/o-2", &format!("approve {id}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
