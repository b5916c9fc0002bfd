//! Metrics as Prometheus reads them: plain HTTP, on a loopback address, if configured.

use std::io::Read as _;
use std::net::TcpListener;

use spp_testkit::devices::{TestFab, phone, provision};
use spp_testkit::metrics::*;
use spp_testkit::ports::free_port;
use spp_testkit::site::Site;

fn exit_code_and_stderr(site: &Site) -> (Option<i32>, String) {
    let output = site.run("sppd", "--config sppd.toml");
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scrape_after_provisioning_counts_the_device() {
    let port = free_port();
    let mut site = site_with_metrics(&format!("127.0.0.1:{port}"));
    site.start();
    provision(&mut site.station().await, &mut TestFab::new(&site).device(1), &phone(1)).await;
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
            assert!(answer.lines().any(|metric| metric == line), "{line} is missing in {answer}");
        }
        let value = |name: &str| -> u64 {
            let line = answer.lines().find_map(|line| line.strip_prefix(name)).expect(name);
            line.trim().parse().unwrap()
        };
        assert!(value("spp_hsm_calls_total{hsm=\"main\"}") > 0 && value("spp_store_free_bytes ") > 1_048_576);
        assert!(value("spp_hsm_calls_in_flight ") < 1024, "the value is a number below the queue length");
        for request in ["GET /", "GET /metrics/more", "GET /debug"] {
            assert!(ask(port, request).starts_with("HTTP/1.1 404"), "{request}");
        }
        assert!(ask(port, "POST /metrics").starts_with("HTTP/1.1 405"));
        assert!(site.stop().success());
    });
}

#[test]
fn silent_connections_are_closed_and_delay_no_stop() {
    let port = free_port();
    let mut site = site_with_metrics(&format!("127.0.0.1:{port}"));
    site.start();
    // More than the connection limit.
    let mut silent: Vec<_> = (0..40).map(|_| connect(port)).collect();
    assert!(ask(port, "GET /metrics").starts_with("HTTP/1.1 200"), "the earliest connections have ended");
    silent[0].read_to_end(&mut Vec::new()).expect("the connection is closed");
    assert!(site.stop().success());
    assert!(!site.log().contains("still in flight"), "{}", site.log());
}

#[test]
fn non_loopback_or_taken_metrics_address_fails_the_start() {
    let site = site_with_metrics("0.0.0.0:7446");
    let (status, text) = exit_code_and_stderr(&site);
    assert_eq!(status, Some(78), "{text}");
    assert!(text.contains("listen.metrics: must be a loopback address"), "{text}");
    let occupied = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = occupied.local_addr().unwrap().to_string();
    let (status, text) = exit_code_and_stderr(&site_with_metrics(&address));
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains(&format!("cannot listen on {address} for metrics")), "{text}");
}
