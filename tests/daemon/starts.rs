//! The daemon starts on a fresh site, tells what it is, and stops when asked.

use crate::site::Site;

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
