//! Metrics, as Prometheus would read them: plain HTTP, on this machine alone, and only where they are wanted.

use std::io::Read as _;
use std::net::TcpListener;

use spp_testkit::floor::{Floor, phone, provision};
use spp_testkit::metrics::*;
use spp_testkit::ports::free_port;
use spp_testkit::site::Site;

fn said(site: &Site) -> (Option<i32>, String) {
    let output = site.run("sppd", "--config sppd.toml");
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrape_tells_of_the_device_that_was_made() {
    let port = free_port();
    let mut site = told_on(&format!("127.0.0.1:{port}"));
    site.start();
    provision(&mut site.station().await, &mut Floor::new(&site).device(1), &phone(1)).await;
    tokio::task::block_in_place(|| {
        let answer = ask(port, "GET /metrics");
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("application/openmetrics-text"), "{answer}");
        for line in [
            "spp_line_served 1",
            "spp_hsm_up 1",
            "spp_hsm_worker_starts_total{hsm=\"main\"} 1",
            "spp_sessions{state=\"reserved\"} 0",
            "spp_sessions{state=\"erased\"} 1",
            "spp_records_total 1",
            "spp_store_free_bytes_floor 1048576",
            "# TYPE spp_hsm_calls counter",
            "# EOF",
        ] {
            assert!(answer.lines().any(|told| told == line), "{line} is missing in {answer}");
        }
        let value = |name: &str| -> u64 {
            let line = answer.lines().find_map(|line| line.strip_prefix(name)).expect(name);
            line.trim().parse().unwrap()
        };
        assert!(value("spp_hsm_calls_total{hsm=\"main\"}") > 0 && value("spp_store_free_bytes ") > 1_048_576);
        assert!(value("spp_hsm_calls_in_flight ") < 1024, "there is a number");
        for nothing in ["GET /", "GET /metrics/more", "GET /debug"] {
            assert!(ask(port, nothing).starts_with("HTTP/1.1 404"), "{nothing}");
        }
        assert!(ask(port, "POST /metrics").starts_with("HTTP/1.1 405"));
        assert!(site.stop().success());
    });
}

#[test]
fn whoever_says_nothing_is_sent_away_and_delays_no_stop() {
    let port = free_port();
    let mut site = told_on(&format!("127.0.0.1:{port}"));
    site.start();
    // More than there are places for.
    let mut silent: Vec<_> = (0..40).map(|_| connect(port)).collect();
    assert!(ask(port, "GET /metrics").starts_with("HTTP/1.1 200"), "those who were first have gone");
    silent[0].read_to_end(&mut Vec::new()).expect("the connection is closed");
    assert!(site.stop().success());
    assert!(!site.log().contains("still in flight"), "{}", site.log());
}

#[test]
fn it_is_told_to_this_machine_alone_and_a_taken_port_is_a_failed_start() {
    let site = told_on("0.0.0.0:7446");
    let (status, text) = said(&site);
    assert_eq!(status, Some(78), "{text}");
    assert!(text.contains("listen.metrics: must be an address of this machine alone"), "{text}");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (status, text) = said(&told_on(&address));
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains(&format!("listening on {address} for metrics")), "{text}");
}
