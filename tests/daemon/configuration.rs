//! What is wrong with a configuration is said at once and before anything is opened; what is wrong with an HSM is said in
//! the status, and the PIN is not tried twice.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Output;
use std::time::Duration;

use spp::keys::sha256;
use tonic::Code;
use tonic_types::StatusExt as _;

use spp_testkit::files::write_private;
use spp_testkit::floor::{Refusal, assemble, phone};
use spp_testkit::process::{output, tethered};
use spp_testkit::site::Site;
use spp_testkit::wait::{eventually, never};

fn sppd(site: &Site, words: &str) -> Output {
    site.run("sppd", words)
}

/// What it said on both channels.
fn said(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat()
}

fn pin(site: &Site) -> String {
    String::from_utf8(site.read("hsm/user.pin")).unwrap()
}

#[test]
fn all_faults_are_reported_together_before_a_socket_is_opened() {
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
    // A daemon that bound its sockets first would complain of these.
    let _taken = [site.line, site.officer, site.public].map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap());
    for words in ["--config sppd.toml", "--config sppd.toml --check"] {
        let output = sppd(&site, words);
        let text = said(&output);
        assert_eq!(output.status.code(), Some(78), "{text}");
        for fault in [
            "unknown field `colour`",
            "unknown field `lifetimes`",
            "there is no profile toaster",
            "\"colour:\" is not a prefix of an identity",
            "sessions.lifetime: must be",
            "profile sensor: issuer: the signing key nobody",
            "the master key master-9 is not in the register",
            "p257",
            "unknown field `speed`",
            "tls/server/certificate.pem",
            "user.pin may be read by others (mode 0644): chmod",
            "key.pem may be read by others (mode 0640): chmod",
        ] {
            assert!(text.contains(fault), "{fault} is missing in: {text}");
        }
        assert!(!text.contains("no profile phone"), "a faulty profile is no unknown one: {text}");
        assert!(!text.contains(&pin(&site)) && !text.contains("Address already in use"), "{text}");
    }
}

#[test]
fn a_profile_names_keys_that_exist() {
    let site = Site::new();
    site.edit("profiles/sensor.toml", "issuer = \"manufacturer\"", "issuer = \"nobody\"");
    site.edit("profiles/gateway.toml", "master_key = \"master-1\"", "master_key = \"master-9\"");
    // The access key signs no devices.
    site.edit("profiles/phone.toml", "issuer = \"manufacturer\"", "issuer = \"access\"");
    let output = sppd(&site, "--config sppd.toml");
    let text = said(&output);
    assert_eq!(output.status.code(), Some(78), "{text}");
    for fault in ["profile sensor: issuer: the signing key nobody", "master key master-9", "profile phone: issuer"] {
        assert!(text.contains(fault), "{fault} is missing in: {text}");
    }
}

#[test]
fn a_configuration_that_is_not_there_or_no_toml_is_said_so() {
    let site = Site::new();
    let output = sppd(&site, "--config nowhere.toml");
    assert!(output.status.code() == Some(78) && said(&output).contains("nowhere.toml"), "{}", said(&output));
    std::fs::write(site.path("bad.toml"), "[node\n").unwrap();
    let output = sppd(&site, "--config bad.toml");
    assert!(output.status.code() == Some(78) && said(&output).contains("line 1"), "{}", said(&output));
    assert_eq!(sppd(&site, "").status.code(), Some(2), "no --config is a wrong command line");
}

#[test]
fn check_tells_what_a_healthy_site_has() {
    let site = Site::new();
    let output = sppd(&site, "--config sppd.toml --check");
    let text = said(&output);
    assert!(output.status.success(), "{text}");
    for found in
        ["manufacturer", "access", "master-1", "spp-demo", "phone", "ed25519", "0 records", "everything is right"]
    {
        assert!(text.contains(found), "{found} is missing in: {text}");
    }
    assert!(!text.contains(&pin(&site)));
}

#[test]
fn a_store_that_is_missing_is_not_made_by_the_daemon() {
    for directory in ["state", "public"] {
        let site = Site::new();
        std::fs::remove_dir_all(site.path(directory)).unwrap();
        for words in ["--config sppd.toml", "--config sppd.toml --check"] {
            let output = sppd(&site, words);
            let text = said(&output);
            assert!(!output.status.success() && text.contains("sppctl init"), "{text}");
            assert!(!text.contains("listening") && !site.path(directory).exists(), "{text}");
        }
    }
}

#[test]
fn nothing_that_exists_is_made_again() {
    let site = Site::new();
    for words in [
        "init --config sppd.toml",
        "ceremony run ceremony.toml --hsm hsm.toml --out keys",
        "ceremony run ceremony.toml --hsm hsm.toml --out keys-2",
        "station enroll line-1/a --config sppd.toml --out tls/line-1-a",
    ] {
        let before = sha256(&site.read("keys/keys.toml"));
        let output = site.try_sppctl(words);
        assert!(!output.status.success(), "{words}: {}", said(&output));
        assert_eq!(sha256(&site.read("keys/keys.toml")), before);
    }
    let output = sppd(&site, "--config sppd.toml --check");
    assert!(output.status.success(), "everything is still right: {}", said(&output));
}

/// Waits until the running daemon says this of its HSM.
async fn trouble_with(site: &Site, words: &str) -> spp::proto::HsmStatus {
    eventually(&format!("the HSM's trouble is {words:?}"), async || {
        let hsm = site.status().await.hsm.unwrap();
        if !hsm.trouble.contains(words) {
            return Err((hsm, site.log()));
        }
        assert!(!hsm.ready);
        Ok(hsm)
    })
    .await
}

/// Starts a daemon whose HSM will not be ready, and waits until it listens.
async fn start_in_trouble(site: &mut Site) {
    site.spawn();
    site.until_listening().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_pin_is_tried_once_and_an_officer_is_asked_for() {
    let mut site = Site::new();
    let right = pin(&site);
    write_private(&site.path("hsm/user.pin"), "000000000000");
    start_in_trouble(&mut site).await;
    trouble_with(&site, "the user PIN is wrong; it is not tried again").await;
    let mut line = site.station().await;
    for _ in 0..3 {
        let refused = assemble(&mut line, &phone(1)).await.unwrap_err();
        assert!(Refusal::of(&refused).is(Code::Unavailable, "HSM_NEEDS_OFFICER"), "{refused:?}");
        assert!(refused.get_error_details().retry_info().is_some());
    }
    // Told once by the HSM, the pools and the health service, and with each refusal; and that is all, for longer than the first
    // waits between starts.
    let told = || site.log().matches("CKR_PIN_INCORRECT").count();
    eventually("all have told", async || if told() < 3 + 3 { Err(site.log()) } else { Ok(()) }).await;
    never("it is told or tried again", Duration::from_secs(1), async || told() > 3 + 3).await;
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
async fn a_token_that_is_not_there_is_named_and_served_when_it_comes() {
    let mut site = Site::new();
    std::fs::rename(site.path("hsm/tokens"), site.path("hsm/elsewhere")).unwrap();
    std::fs::create_dir(site.path("hsm/tokens")).unwrap();
    start_in_trouble(&mut site).await;
    trouble_with(&site, "no token named spp-demo").await;
    std::fs::remove_dir(site.path("hsm/tokens")).unwrap();
    std::fs::rename(site.path("hsm/elsewhere"), site.path("hsm/tokens")).unwrap();
    site.wait_ready();
    assemble(&mut site.station().await, &phone(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_key_under_a_known_name_is_refused() {
    let mut site = Site::new();
    let keys = String::from_utf8(site.read("keys/keys.toml")).unwrap();
    let value = |name: &str| {
        let line = keys.lines().find(|line| line.starts_with(name)).unwrap();
        line.split('"').nth(1).unwrap().to_owned()
    };
    site.edit("sppd.toml", "[hsm]\n", "[hsm]\ncall_timeout = \"1s\"\n");
    site.edit("keys/keys.toml", &value("check_value"), "0011223344556677");
    start_in_trouble(&mut site).await;
    trouble_with(&site, "the master key master-1 has another check value than the register").await;
    let refused = assemble(&mut site.station().await, &phone(1)).await.unwrap_err();
    assert!(Refusal::of(&refused).is(Code::Unavailable, "HSM_UNAVAILABLE"), "{refused:?}");
    assert!(refused.get_error_details().retry_info().is_some());
    tokio::task::block_in_place(|| site.stop());

    // Another site's manufacturer under the same name: certificate and register agree, the token does not.
    let other = Site::with_own_keys();
    let theirs = String::from_utf8(other.read("keys/keys.toml")).unwrap();
    let public_key = theirs.lines().find(|line| line.starts_with("public_key")).unwrap().split('"').nth(1).unwrap();
    site.edit("keys/keys.toml", "0011223344556677", &value("check_value"));
    site.edit("keys/keys.toml", &value("public_key"), public_key);
    std::fs::copy(other.path("keys/manufacturer-ca.pem"), site.path("keys/manufacturer-ca.pem")).unwrap();
    start_in_trouble(&mut site).await;
    trouble_with(&site, "the key manufacturer is not the one of the register").await;
}

#[tokio::test]
async fn a_certificate_of_another_key_is_refused_before_anything_is_opened() {
    let (site, other) = (Site::new(), Site::with_own_keys());
    std::fs::copy(other.path("keys/manufacturer-ca.pem"), site.path("keys/manufacturer-ca.pem")).unwrap();
    let output = sppd(&site, "--config sppd.toml");
    let text = said(&output);
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("is not the certificate of the key manufacturer"), "{text}");
}

#[test]
fn help_leads_to_every_command() {
    assert!(help("sppd", &[]).contains("--check"));
    for (program, commands) in [
        ("sppctl", &["token", "ceremony", "init", "station", "officer", "server", "status"][..]),
        ("spp-line", &["provision", "recover", "show"][..]),
    ] {
        let text = help(program, &[]);
        for command in commands {
            assert!(text.contains(&format!("\n  {command}")), "{program} does not tell of {command}: {text}");
        }
        help_of_each(program, &[]);
    }
}

/// Every command that a help names has a help of its own, and every command and option is explained.
fn help_of_each(program: &str, words: &[&str]) {
    let text = help(program, words);
    let listed = text.lines().skip_while(|line| !line.starts_with("Commands:")).skip(1);
    for line in listed.take_while(|line| !line.is_empty()) {
        // A line that is indented further goes on with the explanation of the command before.
        let Some(entry) = line.strip_prefix("  ").filter(|entry| !entry.starts_with(' ')) else { continue };
        let (command, explained) = entry.split_once(' ').unwrap_or((entry, ""));
        assert!(!explained.trim().is_empty(), "{program} {words:?} {command} is not explained");
        if command != "help" {
            help_of_each(program, &[words, &[command]].concat());
        }
    }
}

fn help(program: &str, words: &[&str]) -> String {
    let mut command = tethered(spp_testkit::process::program(program));
    command.args(words).arg("--help");
    let output = output(command);
    let text = said(&output);
    assert!(output.status.success() && text.contains("Usage:"), "{program} {words:?}: {text}");
    text
}
