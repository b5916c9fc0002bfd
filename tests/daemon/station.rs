//! `spp-line` against a real daemon: complete runs, killed runs, and runs that fail.

use std::process::{Output, Stdio};
use std::time::Duration;

use spp_testkit::process::Process;
use spp_testkit::site::Site;

fn provision(site: &Site, more: &str) -> Output {
    site.spp_line(&provision_words(site, more))
}

fn provision_words(site: &Site, more: &str) -> String {
    let (line, manufacturer) = (site.line, "keys/manufacturer-ca.pem");
    format!(
        "provision --server https://127.0.0.1:{line} --tls tls/line-1-a --devices devices --manufacturer {manufacturer} {more}"
    )
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn records(site: &Site) -> u64 {
    let words = format!("status --json --server https://127.0.0.1:{} --tls tls/officer", site.officer);
    let status: serde_json::Value = serde_json::from_str(&site.sppctl(&words)).unwrap();
    status["records"].as_u64().unwrap()
}

#[test]
fn run_completes_devices_and_recovers_a_wiped_one() {
    let site = Site::running();
    let output = provision(&site, "--simulate 12 --profile phone --parallel 4 --report report.csv");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("12 of 12 devices are complete"), "{}", text(&output));
    assert_eq!(records(&site), 12);

    let report = String::from_utf8(site.read("report.csv")).unwrap();
    let column = report.lines().next().unwrap().split(',').position(|name| name == "chip_id").unwrap();
    let chip = report.lines().nth(1).unwrap().split(',').nth(column).unwrap().to_owned();
    let public = format!("--server https://127.0.0.1:{} --ca tls/server/ca.pem", site.public);
    let flash = site.read(&format!("devices/{chip}.flash"));
    assert!(site.spp_line(&format!("wipe --chip {chip} --devices devices")).status.success());
    let recovered = site.spp_line(&format!("recover --chip {chip} --devices devices {public}"));
    assert!(recovered.status.success(), "{}", text(&recovered));
    assert_eq!(site.read(&format!("devices/{chip}.flash")), flash);
    let shown = site.spp_line(&format!("show --json --chip {chip} {public}"));
    assert!(text(&shown).contains(&chip), "{}", text(&shown));
}

#[test]
fn killed_station_resumes_without_duplicates() {
    let site = Site::running();
    let words = provision_words(&site, "--simulate 60 --profile phone --parallel 4");
    for pause in [150, 250, 350] {
        let mut station = site.command("spp-line", &words);
        station.stdout(Stdio::null()).stderr(Stdio::null());
        let station = Process::spawn(station);
        std::thread::sleep(Duration::from_millis(pause));
        station.kill();
    }
    let output = site.spp_line(&words);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(records(&site), 60);
}

#[test]
fn failed_devices_listed_with_exit_code_1() {
    let site = Site::running();
    let file = "chip_id,identity,profile\n\
        00112233445566778899aabbccddee01,imei:490154203237518,phone\n\
        00112233445566778899aabbccddee02,imei:353456780000011,phone\n";
    std::fs::write(site.path("orders.csv"), file).unwrap();
    let output = provision(&site, "--identities orders.csv --report report.jsonl");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("00112233445566778899aabbccddee02"), "{}", text(&output));
    assert!(
        text(&output).contains("none of its identity prefixes matches"),
        "the reason is printed: {}",
        text(&output)
    );
    assert_eq!(String::from_utf8(site.read("report.jsonl")).unwrap().lines().count(), 2);
    assert_eq!(records(&site), 1);
}

#[test]
fn run_that_cannot_start_prints_remedy() {
    let mut site = Site::running();
    let output = provision(&site, "--simulate 1 --profile phone --tls tls/missing");
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    let words = provision_words(&site, "--simulate 1 --profile phone").replace("tls/line-1-a", "tls/missing");
    let output = site.spp_line(&words);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output).contains("station enroll"), "{}", text(&output));
    site.stop();
    let output = provision(&site, "--simulate 1 --profile phone --retry-for 1s");
    assert_ne!(output.status.code(), Some(0));
    assert!(!text(&output).is_empty());
}

#[test]
fn example_of_client_library_provisions_one_device() {
    let site = Site::running();
    let words = |identity: &str| {
        let server = format!("https://127.0.0.1:{}", site.line);
        format!("{server} tls/line-1-a keys/manufacturer-ca.pem phone {identity} devices")
    };
    let output = site.run("examples/provision_device", &words("imei:490154203237518"));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("record 0 of the public database"), "{}", text(&output));
    let again = site.run("examples/provision_device", &words("imei:490154203237518"));
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again).contains("is complete"), "{}", text(&again));
    assert_eq!(records(&site), 1);
}
