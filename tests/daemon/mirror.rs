//! Mirrors: made, verified, and a device restored from one with the daemon down; and the index that is made from the files.

use std::process::{Output, Stdio};

use spp::proto::GetRecordRequest;

use spp_testkit::files::copy_directory;
use spp_testkit::floor::{Floor, chip, phone, provision};
use spp_testkit::ports::free_port;
use spp_testkit::process::{Process, tethered};
use spp_testkit::site::Site;
use spp_testkit::wait::eventually_blocking;

const VERIFY: &str = "registry verify --config sppd.toml --seen seen";

/// Provisions simulated devices with the reference station, whose chips know the log's key.
fn provision_simulated(site: &Site, count: u32) {
    let words = format!(
        "provision --simulate {count} --profile phone --parallel 8 --server https://127.0.0.1:{} --tls tls/line-1-a --devices \
         simulated --manufacturer keys/manufacturer-ca.pem --log keys/log-1.vkey --report report.csv",
        site.line
    );
    fine(&site.spp_line(&words));
}

/// The chips that were provisioned.
fn chips(site: &Site) -> Vec<String> {
    let report = String::from_utf8(site.read("report.csv")).unwrap();
    let mut lines = report.lines();
    let column = lines.next().unwrap().split(',').position(|name| name == "chip_id").unwrap();
    lines.map(|line| line.split(',').nth(column).unwrap().trim_matches('"').to_owned()).collect()
}

fn fine(output: &Output) -> String {
    let said = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    assert!(output.status.success(), "{said}");
    said
}

fn refused(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "it was accepted");
    said
}

/// Any web server, which knows nothing of what it carries.
struct WebServer(#[expect(dead_code, reason = "dropping it ends the server")] Process, String);

impl WebServer {
    fn of(site: &Site, directory: &str) -> Self {
        let port = free_port();
        let mut server = tethered("python3");
        server.args(["-m", "http.server", &port.to_string(), "--bind", "127.0.0.1", "--directory"]);
        server.arg(site.path(directory)).stdout(Stdio::null()).stderr(Stdio::null());
        let server = Self(Process::spawn(server), format!("http://127.0.0.1:{port}"));
        eventually_blocking("the web server listens", || std::net::TcpStream::connect(("127.0.0.1", port)));
        server
    }
}

#[test]
fn a_wiped_device_is_restored_from_a_mirror_with_the_daemon_down() {
    let mut site = Site::running();
    provision_simulated(&site, 5);
    let chips = chips(&site);
    for chip in &chips {
        assert!(site.path(&format!("simulated/{chip}.tlog-proof")).exists(), "the receipt is kept with the device");
    }
    site.sppctl("registry export mirror --config sppd.toml");
    site.stop();

    let server = WebServer::of(&site, "mirror");
    for (chip, from) in [(&chips[0], "mirror"), (&chips[1], &*server.1)] {
        fine(&site.spp_line(&format!("wipe --chip {chip} --devices simulated")));
        let said = fine(&site.spp_line(&format!("recover --chip {chip} --devices simulated --from {from}")));
        assert!(said.contains("of 5 signed ones"), "{said}");
        let shown = fine(&site.spp_line(&format!("show --chip {chip} --from {from} --log keys/log-1.vkey")));
        assert!(shown.contains(chip), "{shown}");
    }

    // A mirror is believed in nothing: another record in this one's place, a changed one, a proof of another, another log's key.
    let shard = |chip: &str| site.path("mirror").join("chip").join(spp::registry::shard(&chip.parse().unwrap()));
    let file = |chip: &str, ending: &str| shard(chip).join(format!("{chip}.{ending}"));
    let recover = || site.spp_line(&format!("recover --chip {} --devices simulated --from mirror", chips[2]));
    fine(&site.spp_line(&format!("wipe --chip {} --devices simulated", chips[2])));
    let (record, proof) = (file(&chips[2], "cbor"), file(&chips[2], "tlog-proof"));
    let (own_record, own_proof) = (std::fs::read(&record).unwrap(), std::fs::read(&proof).unwrap());
    std::fs::copy(file(&chips[3], "cbor"), &record).unwrap();
    std::fs::copy(file(&chips[3], "tlog-proof"), &proof).unwrap();
    assert!(refused(&recover()).contains("it is of chip"));
    std::fs::write(&record, &own_record).unwrap();
    assert!(refused(&recover()).contains("does not lead from the entry to the root"));
    std::fs::write(&proof, &own_proof).unwrap();
    let mut flipped = own_record.clone();
    *flipped.last_mut().unwrap() ^= 1;
    std::fs::write(&record, flipped).unwrap();
    assert!(refused(&recover()).contains("was not believed"));
    std::fs::write(&record, &own_record).unwrap();
    let other_key = "spp.example/demo+11dd8a14+Adpymac5tkoPvEKVpMEmhyk0j31mSfs57uC6xRf4uKwA";
    std::fs::write(site.path("other.vkey"), other_key).unwrap();
    let by_other = format!("recover --chip {} --devices simulated --from mirror --log other.vkey", chips[2]);
    refused(&site.spp_line(&by_other));
    fine(&recover());
    let unknown = site.spp_line("show --chip 0011223344556677 --from mirror --log keys/log-1.vkey");
    assert!(refused(&unknown).contains("is not there"));
    let without_key = site.spp_line("show --chip 0011223344556677 --from mirror");
    assert!(refused(&without_key).contains("--log FILE.vkey"));
}

#[test]
fn a_mirror_is_brought_up_to_date_while_the_daemon_runs_and_everybody_can_verify_it() {
    let site = Site::running();
    let export = "registry export mirror --config sppd.toml --json";
    let told = |text: String| serde_json::from_str::<serde_json::Value>(&text).unwrap();
    let mut count = 0;
    for more in [3, 4, 300] {
        count += more;
        provision_simulated(&site, count);
        let exported = told(site.sppctl(export));
        assert_eq!((&exported["entries"], &exported["new"]), (&count.into(), &more.into()));
        for place in ["", "mirror"] {
            let verified = told(site.sppctl(&format!("{VERIFY}-{place} {place} --json")));
            assert_eq!((&verified["entries"], &verified["findings"]), (&count.into(), &serde_json::json!([])));
        }
        let served = format!("{VERIFY} https://localhost:{} --ca keys/access-ca.pem", site.public);
        let said = site.sppctl(&served);
        assert!(said.contains(&format!("{count} entries, all of them right")), "{said}");
        assert_eq!(said.contains("continues what was seen before"), count > 3, "{said}");
    }
    let nothing_new = told(site.sppctl(export));
    assert_eq!(nothing_new["new"], 0);
    let of_mirror = "registry export second --from mirror --log keys/log-1.vkey";
    assert!(site.sppctl(of_mirror).contains("307 entries, 307 of them new"));

    // Somebody changes one byte of one entry in the mirror.
    let bundle = site.path("mirror/tile/entries/000");
    let mut bytes = std::fs::read(&bundle).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(&bundle, bytes).unwrap();
    let found = site.try_sppctl(&format!("{VERIFY}-mirror mirror"));
    let said = String::from_utf8_lossy(&found.stdout).into_owned();
    assert!(said.contains("its hash is not the one in tile/0/000"), "{said}");
    assert!(refused(&found).contains("is not the log that it should be"));
    let of_damaged = site.try_sppctl("registry export third --from mirror --log keys/log-1.vkey");
    assert!(refused(&of_damaged).contains("damaged"));
    assert!(!site.path("third/checkpoint").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_is_lost_is_made_anew_and_nobody_is_asked() {
    let mut site = Site::running();
    let floor = Floor::new(&site);
    for n in 1..=3 {
        provision(&mut site.station().await, &mut floor.device(n), &phone(n)).await;
    }
    site.stop();
    std::fs::remove_dir_all(site.path("public/index")).unwrap();
    site.start();
    for n in 1..=3 {
        let asked = GetRecordRequest { chip_id: chip(n).as_bytes().to_vec() };
        let found = site.recovery().await.get_record(asked).await.unwrap().into_inner();
        assert_eq!(found.record.unwrap().identity, phone(n).identity);
    }
    let in_use = site.try_sppctl("registry reindex --config sppd.toml");
    assert!(refused(&in_use).contains("in use by another process"));
    site.stop();
    assert!(
        site.sppctl("registry reindex --config sppd.toml").contains("index of 5 entries"),
        "one more for each stop"
    );
    site.start();
    provision(&mut site.station().await, &mut floor.device(4), &phone(4)).await;
    assert_eq!(site.status().await.records, 4);
}

#[test]
fn an_old_copy_is_not_gone_on_with_unless_its_loss_is_accepted() {
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

    // Of the files alone: the index knows more.
    std::fs::remove_dir_all(&edge).unwrap();
    copy_directory(&old.join("edge"), &edge);
    site.spawn();
    site.until_logged("it ends with entry 4, and 7 are known");
    assert!(site.sppctl(&format!("{VERIFY} public")).contains("4 entries"), "by itself the old copy is a log");
    let few = site.try_sppctl("registry reindex --config sppd.toml");
    assert!(refused(&few).contains("sppctl registry reindex --accept-loss"));

    // Of all of it: the state store knows more.
    std::fs::remove_dir_all(&public).unwrap();
    copy_directory(&old, &public);
    site.spawn();
    site.until_logged("has 3 records, and 5 devices were published: it is an old copy");
    site.edit("sppd.toml", "[registry]\n", "[registry]\naccepted_loss = 2\n");
    site.start();
    site.stop();

    // With the newest one nothing was lost.
    std::fs::remove_dir_all(&public).unwrap();
    copy_directory(&newest, &public);
    site.edit("sppd.toml", "accepted_loss = 2\n", "");
    site.start();
    assert!(site.sppctl(&format!("{VERIFY}-newest")).contains("7 entries, all of them right"));
}
