//! Configuration faults are reported together and before stores or sockets are opened. HSM errors are reported in the status,
//! and a wrong PIN is not tried twice.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Output;
use std::time::Duration;

use spp_format::keys::sha256;
use tonic::Code;
use tonic_types::StatusExt as _;

use spp_testkit::devices::{Refusal, assemble, phone};
use spp_testkit::files::write_private;
use spp_testkit::process::{child_command, output};
use spp_testkit::site::Site;
use spp_testkit::wait::{eventually, never};

fn sppd(site: &Site, arguments: &str) -> Output {
    site.run("sppd", arguments)
}

/// Standard output and standard error.
fn output_text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat()
}

fn pin(site: &Site) -> String {
    String::from_utf8(site.read("hsm/user.pin")).unwrap()
}

#[test]
fn faults_are_reported_together_before_sockets_open() {
    let site = Site::new();
    site.edit("sppd.toml", "name = \"demo\"", "name = \"demo\"\ncolour = \"blue\"");
    site.edit("sppd.toml", "[sessions]", "[sessions]\nlifetimes = 3");
    site.edit("sppd.toml", "profiles = [\"phone\"", "profiles = [\"toaster\", \"phone\"");
    site.edit("sppd.toml", "\"serial:\"", "\"colour:\"");
    site.edit("sppd.toml", "\"24h\"", "\"1s\"");
    site.edit("profiles/phone.toml", "kind = \"p256\"", "kind = \"p257\"");
    site.edit("profiles/sensor.toml", "issuer = \"manufacturer\"", "issuer = \"nobody\"");
    site.edit("profiles/gateway.toml", "master_key = \"master-1\"", "master_key = \"master-9\"");
    site.edit("hsm-config/softhsm2.toml", "[worker]", "[worker]\nspeed = 3");
    std::fs::remove_file(site.path("tls/server/certificate.pem")).unwrap();
    std::fs::set_permissions(site.path("hsm/user.pin"), std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::set_permissions(site.path("tls/server/key.pem"), std::fs::Permissions::from_mode(0o640)).unwrap();
    // A daemon that bound its sockets first would fail because the ports are in use.
    let _taken = [site.line, site.officer, site.public].map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap());
    for command in ["--config sppd.toml", "--config sppd.toml --check"] {
        let output = sppd(&site, command);
        let text = output_text(&output);
        assert_eq!(output.status.code(), Some(78), "{text}");
        for fault in [
            "unknown field `colour`",
            "unknown field `lifetimes`",
            "unknown profile toaster",
            "\"colour:\" is not an identity prefix",
            "sessions.lifetime: must be",
            "profile sensor: issuer: signing key nobody",
            "master key master-9 is not in the key manifest",
            "p257",
            "unknown field `speed`",
            "tls/server/certificate.pem",
            "user.pin is readable by other users (mode 0644): run chmod",
            "key.pem is readable by other users (mode 0640): run chmod",
        ] {
            assert!(text.contains(fault), "{fault} is missing in: {text}");
        }
        assert!(!text.contains("unknown profile phone"), "a profile with faults is not unknown: {text}");
        assert!(!text.contains(&pin(&site)) && !text.contains("Address already in use"), "{text}");
    }
}

#[test]
fn profile_with_unknown_keys_is_refused() {
    let site = Site::new();
    site.edit("profiles/sensor.toml", "issuer = \"manufacturer\"", "issuer = \"nobody\"");
    site.edit("profiles/gateway.toml", "master_key = \"master-1\"", "master_key = \"master-9\"");
    // The access key must not sign devices.
    site.edit("profiles/phone.toml", "issuer = \"manufacturer\"", "issuer = \"access\"");
    let output = sppd(&site, "--config sppd.toml");
    let text = output_text(&output);
    assert_eq!(output.status.code(), Some(78), "{text}");
    for fault in ["profile sensor: issuer: signing key nobody", "master key master-9", "profile phone: issuer"] {
        assert!(text.contains(fault), "{fault} is missing in: {text}");
    }
}

/// A serial number of one product could equal the IMEI of another, and the second device would be refused on the line.
#[test]
fn profiles_whose_subjects_can_meet_are_refused() {
    let site = Site::new();
    site.edit("profiles/gateway.toml", "Example Gateway", "example  phone");
    let output = sppd(&site, "--config sppd.toml --check");
    let text = output_text(&output);
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("profile phone: subject") && text.contains("identity of profile gateway"), "{text}");
}

#[test]
fn missing_or_invalid_configuration_is_reported() {
    let site = Site::new();
    let output = sppd(&site, "--config nowhere.toml");
    assert!(
        output.status.code() == Some(78) && output_text(&output).contains("nowhere.toml"),
        "{}",
        output_text(&output)
    );
    std::fs::write(site.path("bad.toml"), "[node\n").unwrap();
    let output = sppd(&site, "--config bad.toml");
    assert!(output.status.code() == Some(78) && output_text(&output).contains("line 1"), "{}", output_text(&output));
    assert_eq!(sppd(&site, "").status.code(), Some(2), "no --config is a wrong command line");
}

#[test]
fn check_reports_keys_and_stores_of_valid_site() {
    let site = Site::new();
    let output = sppd(&site, "--config sppd.toml --check");
    let text = output_text(&output);
    assert!(output.status.success(), "{text}");
    for found in
        ["manufacturer", "access", "master-1", "spp-demo", "phone", "ed25519", "0 records", "all checks passed"]
    {
        assert!(text.contains(found), "{found} is missing in: {text}");
    }
    assert!(!text.contains(&pin(&site)));
}

#[test]
fn daemon_does_not_create_a_missing_store() {
    for directory in ["state", "public"] {
        let site = Site::new();
        std::fs::remove_dir_all(site.path(directory)).unwrap();
        for command in ["--config sppd.toml", "--config sppd.toml --check"] {
            let output = sppd(&site, command);
            let text = output_text(&output);
            assert!(!output.status.success() && text.contains("sppctl init"), "{text}");
            assert!(!text.contains("listening") && !site.path(directory).exists(), "{text}");
        }
    }
}

#[test]
fn existing_files_and_keys_are_not_overwritten() {
    let site = Site::new();
    for command in [
        "init --config sppd.toml",
        "ceremony run ceremony.toml --hsm hsm.toml --out keys",
        "ceremony run ceremony.toml --hsm hsm.toml --out keys-2",
        "station enroll line-1/a --config sppd.toml --out tls/line-1-a",
    ] {
        let before = sha256(&site.read("keys/keys.toml"));
        let output = site.try_sppctl(command);
        assert!(!output.status.success(), "{command}: {}", output_text(&output));
        assert_eq!(sha256(&site.read("keys/keys.toml")), before);
    }
    let output = sppd(&site, "--config sppd.toml --check");
    assert!(output.status.success(), "the site is still valid: {}", output_text(&output));
}

/// Waits until the running daemon reports this HSM error.
async fn wait_for_hsm_error(site: &Site, error: &str) -> spp_proto::HsmStatus {
    eventually(&format!("HSM error {error:?}"), async || {
        let hsm = site.status().await.hsm.unwrap();
        if !hsm.error.contains(error) {
            return Err((hsm, site.log()));
        }
        assert!(!hsm.ready);
        Ok(hsm)
    })
    .await
}

/// Starts a daemon whose HSM does not become ready, and waits until it listens.
async fn start_without_hsm(site: &mut Site) {
    site.spawn();
    site.until_listening().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_pin_is_tried_once_and_needs_officer() {
    let mut site = Site::new();
    let right = pin(&site);
    write_private(&site.path("hsm/user.pin"), "000000000000");
    start_without_hsm(&mut site).await;
    wait_for_hsm_error(&site, "the user PIN is wrong; no further attempt is made").await;
    let mut line = site.station().await;
    for _ in 0..3 {
        let refused = assemble(&mut line, &phone(1)).await.unwrap_err();
        assert!(Refusal::of(&refused).is(Code::Unavailable, "HSM_OFFICER_REQUIRED"), "{refused:?}");
        assert!(refused.get_error_details().retry_info().is_some());
    }
    // Logged once by the HSM, the pools and the health service, and once per refusal. No further message for longer than the
    // first restart delays, so the PIN is not tried again.
    let count = || site.log().matches("CKR_PIN_INCORRECT").count();
    eventually("all errors are logged", async || if count() < 3 + 3 { Err(site.log()) } else { Ok(()) }).await;
    never("the error is logged again", Duration::from_secs(1), async || count() > 3 + 3).await;
    let status = site.status().await;
    assert_eq!(
        (status.ready, status.hsm.unwrap().members[0].worker_starts, status.sessions.unwrap().reserved),
        (false, 1, 0)
    );
    assert!(!site.log().contains("000000000000"));
    assert!(tokio::task::block_in_place(|| site.stop()).success());
    write_private(&site.path("hsm/user.pin"), &right);
    site.start();
    assemble(&mut site.station().await, &phone(1)).await.expect("the token was not locked");
}

#[tokio::test]
async fn missing_token_is_reported_and_used_when_it_appears() {
    let mut site = Site::new();
    std::fs::rename(site.path("hsm/tokens"), site.path("hsm/elsewhere")).unwrap();
    std::fs::create_dir(site.path("hsm/tokens")).unwrap();
    start_without_hsm(&mut site).await;
    wait_for_hsm_error(&site, "no token named spp-demo").await;
    std::fs::remove_dir(site.path("hsm/tokens")).unwrap();
    std::fs::rename(site.path("hsm/elsewhere"), site.path("hsm/tokens")).unwrap();
    site.wait_ready();
    assemble(&mut site.station().await, &phone(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn different_key_under_manifest_name_is_refused() {
    let mut site = Site::new();
    let keys = String::from_utf8(site.read("keys/keys.toml")).unwrap();
    let value = |name: &str| {
        let line = keys.lines().find(|line| line.starts_with(name)).unwrap();
        line.split('"').nth(1).unwrap().to_owned()
    };
    site.edit("sppd.toml", "[hsm]\n", "[hsm]\ncall_timeout = \"1s\"\n");
    site.edit("keys/keys.toml", &value("check_value"), "0011223344556677");
    start_without_hsm(&mut site).await;
    wait_for_hsm_error(&site, "the check value of the master key master-1 differs from the key manifest").await;
    let refused = assemble(&mut site.station().await, &phone(1)).await.unwrap_err();
    assert!(Refusal::of(&refused).is(Code::Unavailable, "HSM_UNAVAILABLE"), "{refused:?}");
    assert!(refused.get_error_details().retry_info().is_some());
    tokio::task::block_in_place(|| site.stop());

    // Another site's manufacturer key under the same name: certificate and key manifest match, the token does not.
    let other = Site::with_own_keys();
    let other_keys = String::from_utf8(other.read("keys/keys.toml")).unwrap();
    let public_key = other_keys.lines().find(|line| line.starts_with("public_key")).unwrap().split('"').nth(1).unwrap();
    site.edit("keys/keys.toml", "0011223344556677", &value("check_value"));
    site.edit("keys/keys.toml", &value("public_key"), public_key);
    std::fs::copy(other.path("keys/manufacturer-ca.pem"), site.path("keys/manufacturer-ca.pem")).unwrap();
    start_without_hsm(&mut site).await;
    wait_for_hsm_error(&site, "the key manufacturer does not match the key manifest").await;
}

#[tokio::test]
async fn certificate_of_another_key_is_refused_at_start() {
    let (site, other) = (Site::new(), Site::with_own_keys());
    std::fs::copy(other.path("keys/manufacturer-ca.pem"), site.path("keys/manufacturer-ca.pem")).unwrap();
    let output = sppd(&site, "--config sppd.toml");
    let text = output_text(&output);
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("is not the certificate of key manufacturer"), "{text}");
}

#[test]
fn help_lists_and_explains_every_command() {
    assert!(help("sppd", &[]).contains("--check"));
    for (program, commands) in [
        ("sppctl", &["token", "ceremony", "init", "station", "officer", "server", "status"][..]),
        ("spp-line", &["provision", "recover", "show"][..]),
    ] {
        let text = help(program, &[]);
        for command in commands {
            assert!(text.contains(&format!("\n  {command}")), "{program} does not list {command}: {text}");
        }
        check_help_of_commands(program, &[]);
    }
}

/// Checks that every listed command has its own help, and that every command and option is explained.
fn check_help_of_commands(program: &str, commands: &[&str]) {
    let text = help(program, commands);
    let listed = text.lines().skip_while(|line| !line.starts_with("Commands:")).skip(1);
    for line in listed.take_while(|line| !line.is_empty()) {
        // A line with more indentation continues the explanation of the previous command.
        let Some(entry) = line.strip_prefix("  ").filter(|entry| !entry.starts_with(' ')) else { continue };
        let (command, explained) = entry.split_once(' ').unwrap_or((entry, ""));
        assert!(!explained.trim().is_empty(), "{program} {commands:?} {command} is not explained");
        if command != "help" {
            check_help_of_commands(program, &[commands, &[command]].concat());
        }
    }
}

fn help(program: &str, commands: &[&str]) -> String {
    let mut command = child_command(spp_testkit::process::program(program));
    command.args(commands).arg("--help");
    let output = output(command);
    let text = output_text(&output);
    assert!(output.status.success() && text.contains("Usage:"), "{program} {commands:?}: {text}");
    text
}
