//! `sppctl ceremony plan`, `run` and `verify`: plans change nothing, runs never overwrite, changed transcripts are detected.

use serde_json::Value;

use spp_testkit::ceremony::CeremonyFile;
use spp_testkit::site::Site;

const VERIFY: &str = "ceremony verify keys/transcript.txt --log keys/log-1.vkey";

#[test]
fn changed_transcript_fails_verification() {
    let site = Site::new();
    let text = site.sppctl(VERIFY);
    assert!(text.starts_with("spp ceremony transcript v1\n") && text.contains("transcript.json matches"), "{text}");
    assert!(
        text.contains("officers    not named") && text.contains("key master-1") && text.contains("Sensitive"),
        "{text}"
    );
    let json: Value = serde_json::from_slice(&site.read("keys/transcript.json")).unwrap();
    assert_eq!(json["token_label"], "spp-demo");
    assert!(json["begun"].as_u64() <= json["ended"].as_u64());

    let refused = |what: &str| {
        let output = site.try_sppctl(VERIFY);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && message.contains(what), "{message}");
    };
    let right = site.read("keys/transcript.txt");
    let change = |from: &str, to: &str| {
        let text = String::from_utf8(right.clone()).unwrap();
        assert!(text.contains(from));
        std::fs::write(site.path("keys/transcript.txt"), text.replacen(from, to, 1)).unwrap();
    };
    change("master-1", "master-2");
    refused("the signature of spp.example/demo does not verify");
    change("\u{2014} spp.example/demo", "\u{2014} spp.example/demp");
    refused("not signed by the key of spp.example/demo");
    std::fs::write(site.path("keys/transcript.txt"), &right).unwrap();
    let text = String::from_utf8(site.read("keys/transcript.json")).unwrap();
    std::fs::write(site.path("keys/transcript.json"), text.replacen("spp-demo", "spp-demp", 1)).unwrap();
    refused("does not match the hash in the signed transcript");
    std::fs::remove_file(site.path("keys/transcript.json")).unwrap();
    site.sppctl(VERIFY);
}

#[test]
fn plan_describes_run_and_changes_nothing() {
    let site = Site::new();
    let before = site.read("keys/keys.toml");
    let output = site.sppctl("ceremony plan ceremony.toml");
    for key in ["manufacturer", "log-1", "master-1", "access"] {
        assert!(output.contains(&format!("\n make  {key}")), "{output}");
    }
    let rows: Vec<_> = output.lines().filter(|line| line.starts_with(" make ")).collect();
    let column = |row: &&str| row.find("p256").or(row.find("ed25519")).or(row.find("hmac"));
    assert!(rows.len() == 4 && rows.iter().all(|row| column(row) == column(&rows[0])), "{output}");
    let taken = site.try_sppctl("ceremony plan ceremony.toml --hsm hsm.toml --out keys");
    let why = String::from_utf8_lossy(&taken.stderr).into_owned();
    assert!(!taken.status.success() && why.contains("already has an object named manufacturer"), "{why}");
    std::fs::write(site.path("second.toml"), CeremonyFile::new().master_key("master-2", 2, "aes-cmac").text()).unwrap();
    let output = site.sppctl("ceremony plan second.toml --hsm hsm.toml --out keys --json");
    let output: Value = serde_json::from_str(&output).unwrap();
    assert_eq!((&output["looked_at_the_token"], &output["keys"][0]["kind"]), (&true.into(), &"aes-cmac".into()));
    assert_eq!(site.read("keys/keys.toml"), before);
    // The run matches the plan and records the officers; the log key of the first ceremony signs.
    let output = site.sppctl("ceremony run second.toml --hsm hsm.toml --out keys --officer o-1 --officer o-2");
    assert!(output.contains(" made  master-2") && output.contains("restart sppd"), "{output}");
    let text = site.sppctl("ceremony verify keys/transcript-2.txt --log keys/log-1.vkey");
    assert!(text.contains("officers    o-1, o-2") && text.contains("key master-2"), "{text}");
    let again = site.try_sppctl("ceremony plan second.toml --hsm hsm.toml --out keys");
    assert!(String::from_utf8_lossy(&again.stderr).contains("already has an object named master-2"), "{again:?}");
}
