//! Mirrors: export, verification and device recovery while the daemon is stopped. Rebuilding the index from the files.

use std::process::{Output, Stdio};

use spp_proto::GetRecordRequest;

use spp_testkit::devices::{TestFab, chip, phone, provision};
use spp_testkit::files::copy_directory;
use spp_testkit::ports::free_port;
use spp_testkit::process::{Process, child_command};
use spp_testkit::site::Site;
use spp_testkit::wait::eventually_blocking;

const VERIFY: &str = "registry verify --config sppd.toml --seen seen";

/// Provisions simulated devices, whose chips have the log's key, with the reference station.
fn provision_simulated(site: &Site, count: u32) {
    let command = format!(
        "provision --simulate {count} --profile phone --parallel 8 --server https://127.0.0.1:{} --tls tls/line-1-a --devices \
         simulated --manufacturer keys/manufacturer-ca.pem --log keys/log-1.vkey --report report.csv",
        site.line
    );
    success_output(&site.spp_line(&command));
}

/// The provisioned chips.
fn chips(site: &Site) -> Vec<String> {
    let report = String::from_utf8(site.read("report.csv")).unwrap();
    let mut lines = report.lines();
    let column = lines.next().unwrap().split(',').position(|name| name == "chip_id").unwrap();
    lines.map(|line| line.split(',').nth(column).unwrap().trim_matches('"').to_owned()).collect()
}

fn success_output(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    assert!(output.status.success(), "{text}");
    text
}

fn error_output(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "command succeeded unexpectedly");
    text
}

/// A static file server.
struct WebServer(#[expect(dead_code, reason = "dropping it ends the server")] Process, String);

impl WebServer {
    fn of(site: &Site, directory: &str) -> Self {
        let port = free_port();
        let mut server = child_command("python3");
        server.args(["-m", "http.server", &port.to_string(), "--bind", "127.0.0.1", "--directory"]);
        server.arg(site.path(directory)).stdout(Stdio::null()).stderr(Stdio::null());
        let server = Self(Process::spawn(server), format!("http://127.0.0.1:{port}"));
        eventually_blocking("the web server listens", || std::net::TcpStream::connect(("127.0.0.1", port)));
        server
    }
}

#[test]
fn wiped_device_recovers_from_mirror_without_daemon() {
    let mut site = Site::running();
    provision_simulated(&site, 5);
    let chips = chips(&site);
    for chip in &chips {
        assert!(site.path(&format!("simulated/{chip}.tlog-proof")).exists(), "the receipt is stored with the device");
    }
    site.sppctl("registry export mirror --config sppd.toml");
    site.stop();

    let server = WebServer::of(&site, "mirror");
    for (chip, from) in [(&chips[0], "mirror"), (&chips[1], &*server.1)] {
        success_output(&site.spp_line(&format!("wipe --chip {chip} --devices simulated")));
        let text = success_output(&site.spp_line(&format!("recover --chip {chip} --devices simulated --from {from}")));
        assert!(text.contains("of 5 signed entries"), "{text}");
        let shown = success_output(&site.spp_line(&format!("show --chip {chip} --from {from} --log keys/log-1.vkey")));
        assert!(shown.contains(chip), "{shown}");
    }

    // A mirror is not trusted: another chip's record and proof, a changed record, another log's key.
    let shard = |chip: &str| site.path("mirror").join("chip").join(spp_log::registry::shard(&chip.parse().unwrap()));
    let file = |chip: &str, ending: &str| shard(chip).join(format!("{chip}.{ending}"));
    let recover = || site.spp_line(&format!("recover --chip {} --devices simulated --from mirror", chips[2]));
    success_output(&site.spp_line(&format!("wipe --chip {} --devices simulated", chips[2])));
    let (record, proof) = (file(&chips[2], "cbor"), file(&chips[2], "tlog-proof"));
    let (own_record, own_proof) = (std::fs::read(&record).unwrap(), std::fs::read(&proof).unwrap());
    std::fs::copy(file(&chips[3], "cbor"), &record).unwrap();
    std::fs::copy(file(&chips[3], "tlog-proof"), &proof).unwrap();
    assert!(error_output(&recover()).contains("it belongs to chip"));
    std::fs::write(&record, &own_record).unwrap();
    assert!(error_output(&recover()).contains("the proof of the entry does not verify"));
    std::fs::write(&proof, &own_proof).unwrap();
    let mut flipped = own_record.clone();
    *flipped.last_mut().unwrap() ^= 1;
    std::fs::write(&record, flipped).unwrap();
    assert!(error_output(&recover()).contains("record of chip"));
    std::fs::write(&record, &own_record).unwrap();
    let other_key = "spp.example/demo+11dd8a14+Adpymac5tkoPvEKVpMEmhyk0j31mSfs57uC6xRf4uKwA";
    std::fs::write(site.path("other.vkey"), other_key).unwrap();
    let by_other = format!("recover --chip {} --devices simulated --from mirror --log other.vkey", chips[2]);
    error_output(&site.spp_line(&by_other));
    success_output(&recover());
    let unknown = site.spp_line("show --chip 0011223344556677 --from mirror --log keys/log-1.vkey");
    assert!(error_output(&unknown).contains("not found; check that it is a mirror"));
    let without_key = site.spp_line("show --chip 0011223344556677 --from mirror");
    assert!(error_output(&without_key).contains("--log FILE.vkey"));
}

#[test]
fn mirror_of_running_daemon_is_updated_and_verifies() {
    let mut site = Site::new();
    // Entries are counted: an audit checkpoint would be one more.
    site.edit("sppd.toml", "# checkpoint_every = \"60s\"", "checkpoint_every = \"1h\"");
    site.start();
    let export = "registry export mirror --config sppd.toml --json";
    let parse_json = |text: String| serde_json::from_str::<serde_json::Value>(&text).unwrap();
    let mut count = 0;
    for more in [3, 4, 300] {
        count += more;
        provision_simulated(&site, count);
        let exported = parse_json(site.sppctl(export));
        assert_eq!((&exported["entries"], &exported["new"]), (&count.into(), &more.into()));
        for place in ["", "mirror"] {
            let verified = parse_json(site.sppctl(&format!("{VERIFY}-{place} {place} --json")));
            assert_eq!((&verified["entries"], &verified["findings"]), (&count.into(), &serde_json::json!([])));
        }
        let served = format!("{VERIFY} https://localhost:{} --ca keys/access-ca.pem", site.public);
        let text = site.sppctl(&served);
        assert!(text.contains(&format!("{count} entries, all valid")), "{text}");
        assert_eq!(text.contains("consistent with the last seen checkpoint"), count > 3, "{text}");
    }
    let nothing_new = parse_json(site.sppctl(export));
    assert_eq!(nothing_new["new"], 0);
    let of_mirror = "registry export second --from mirror --log keys/log-1.vkey";
    assert!(site.sppctl(of_mirror).contains("307 entries, 307 new"));

    // Change one byte of one entry in the mirror.
    let bundle = site.path("mirror/tile/entries/000");
    let mut bytes = std::fs::read(&bundle).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(&bundle, bytes).unwrap();
    let verified = site.try_sppctl(&format!("{VERIFY}-mirror mirror"));
    let text = String::from_utf8_lossy(&verified.stdout).into_owned();
    assert!(text.contains("the hash does not match tile/0/000"), "{text}");
    assert!(error_output(&verified).contains("verification of mirror failed: "));
    let of_damaged = site.try_sppctl("registry export third --from mirror --log keys/log-1.vkey");
    assert!(error_output(&of_damaged).contains("damaged"));
    assert!(!site.path("third/checkpoint").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_index_is_rebuilt_at_start() {
    let mut site = Site::running();
    let fab = TestFab::new(&site);
    for n in 1..=3 {
        provision(&mut site.station().await, &mut fab.device(n), &phone(n)).await;
    }
    site.stop();
    std::fs::remove_dir_all(site.path("public/index")).unwrap();
    site.start();
    for n in 1..=3 {
        let request = GetRecordRequest { chip_id: chip(n).as_bytes().to_vec() };
        let found = site.recovery().await.get_record(request).await.unwrap().into_inner();
        assert_eq!(found.record.unwrap().identity, phone(n).identity);
    }
    let in_use = site.try_sppctl("registry reindex --config sppd.toml");
    assert!(error_output(&in_use).contains("in use by another process"));
    site.stop();
    assert!(
        site.sppctl("registry reindex --config sppd.toml").contains("index of 5 entries"),
        "three records, and an audit checkpoint per stop"
    );
    site.start();
    provision(&mut site.station().await, &mut fab.device(4), &phone(4)).await;
    assert_eq!(site.status().await.records, 4);
}

#[test]
fn old_copy_is_rejected_unless_loss_is_accepted() {
    let mut site = Site::running();
    provision_simulated(&site, 3);
    site.stop();
    let (public, edge) = (site.path("public"), site.path("public/edge"));
    let (old, newest) = (site.path("old"), site.path("newest"));
    copy_directory(&public, &old);
    site.start();
    provision_simulated(&site, 5);
    site.stop();
    copy_directory(&public, &newest);

    // An old copy of the files: the index has more entries.
    std::fs::remove_dir_all(&edge).unwrap();
    copy_directory(&old.join("edge"), &edge);
    site.spawn();
    site.until_logged("4 entries found, 7 expected");
    assert!(site.sppctl(&format!("{VERIFY} public")).contains("4 entries"), "the old copy alone is a valid log");
    let few = site.try_sppctl("registry reindex --config sppd.toml");
    assert!(error_output(&few).contains("sppctl registry reindex --accept-loss"));

    // An old copy of files and index: the state store has more devices.
    std::fs::remove_dir_all(&public).unwrap();
    copy_directory(&old, &public);
    site.spawn();
    site.until_logged("has 3 records, but 5 devices were published: it is an old copy");
    site.edit("sppd.toml", "[registry]\n", "[registry]\naccepted_loss = 2\n");
    site.start();
    site.stop();

    // With the newest copy nothing is lost.
    std::fs::remove_dir_all(&public).unwrap();
    copy_directory(&newest, &public);
    site.edit("sppd.toml", "accepted_loss = 2\n", "");
    site.start();
    assert!(site.sppctl(&format!("{VERIFY}-newest")).contains("7 entries, all valid"));
}
