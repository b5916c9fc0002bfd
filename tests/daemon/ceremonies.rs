//! Ceremonies as an officer holds them: looked at before, never overwriting, with a transcript that cannot be changed unnoticed.

use serde_json::Value;

use spp_testkit::ceremony::CeremonyFile;
use spp_testkit::site::Site;

const VERIFY: &str = "ceremony verify keys/transcript.txt --log keys/log-1.vkey";

#[test]
fn a_transcript_is_signed_and_whoever_changes_it_is_found() {
    let site = Site::new();
    let text = site.sppctl(VERIFY);
    assert!(text.starts_with("spp ceremony transcript v1\n") && text.contains("transcript.json fits"), "{text}");
    assert!(
        text.contains("officers    not named") && text.contains("key master-1") && text.contains("Sensitive"),
        "{text}"
    );
    let json: Value = serde_json::from_slice(&site.read("keys/transcript.json")).unwrap();
    assert_eq!(json["token_label"], "spp-demo");
    assert!(json["begun"].as_u64() <= json["ended"].as_u64());

    let refused = |what: &str| {
        let output = site.try_sppctl(VERIFY);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && told.contains(what), "{told}");
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
    refused("it is not signed by the key of spp.example/demo");
    std::fs::write(site.path("keys/transcript.txt"), &right).unwrap();
    let text = String::from_utf8(site.read("keys/transcript.json")).unwrap();
    std::fs::write(site.path("keys/transcript.json"), text.replacen("spp-demo", "spp-demp", 1)).unwrap();
    refused("is not the file that the signed text names");
    std::fs::remove_file(site.path("keys/transcript.json")).unwrap();
    site.sppctl(VERIFY);
}

#[test]
fn a_plan_says_what_a_run_would_do_and_changes_nothing() {
    let site = Site::new();
    let before = site.read("keys/keys.toml");
    let told = site.sppctl("ceremony plan ceremony.toml");
    for key in ["manufacturer", "log-1", "master-1", "access"] {
        assert!(told.contains(&format!("\n make   {key}")), "{told}");
    }
    let rows: Vec<_> = told.lines().filter(|line| line.starts_with(" make ")).collect();
    let column = |row: &&str| row.find("p256").or(row.find("ed25519")).or(row.find("hmac"));
    assert!(rows.len() == 4 && rows.iter().all(|row| column(row) == column(&rows[0])), "{told}");
    let taken = site.try_sppctl("ceremony plan ceremony.toml --hsm hsm.toml --out keys");
    let why = String::from_utf8_lossy(&taken.stderr).into_owned();
    assert!(!taken.status.success() && why.contains("has an object named manufacturer already"), "{why}");
    std::fs::write(site.path("second.toml"), CeremonyFile::new().master_key("master-2", 2, "aes-cmac").text()).unwrap();
    let told = site.sppctl("ceremony plan second.toml --hsm hsm.toml --out keys --json");
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&told["looked_at_the_token"], &told["keys"][0]["kind"]), (&true.into(), &"aes-cmac".into()));
    assert_eq!(site.read("keys/keys.toml"), before);
    // What was planned is what is made, by whom it says; the log's key of the first ceremony signs.
    let told = site.sppctl("ceremony run second.toml --hsm hsm.toml --out keys --officer o-1 --officer o-2");
    assert!(told.contains(" made  master-2") && told.contains("restart sppd"), "{told}");
    let text = site.sppctl("ceremony verify keys/transcript-2.txt --log keys/log-1.vkey");
    assert!(text.contains("officers    o-1, o-2") && text.contains("key master-2"), "{text}");
    let again = site.try_sppctl("ceremony plan second.toml --hsm hsm.toml --out keys");
    assert!(String::from_utf8_lossy(&again.stderr).contains("has an object named master-2 already"), "{again:?}");
}
