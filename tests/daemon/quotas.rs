//! Station quotas, and allocation of identities by the daemon.

use std::collections::BTreeSet;

use serde_json::Value;
use spp_proto::{AbortRequest, AssembleRequest};
use tonic::Code;

use spp_testkit::devices::{Refusal, TestFab, assemble, complete, gateway, install, phone, provision};
use spp_testkit::metrics::site_with_metrics;
use spp_testkit::officers::{approve, site_with_three_officers, sppctl_as, sppctl_json};
use spp_testkit::ports::free_port;
use spp_testkit::site::Site;

const STATION: &str = "name = \"line-1/a\"\n";

fn quota(site: &Site, lines: &str) {
    site.edit("sppd.toml", STATION, &format!("{STATION}{lines}"));
}

/// The order for device `n` as a phone, without an identity.
fn unnamed(n: u64) -> AssembleRequest {
    AssembleRequest { identity: String::new(), allocate_identity: true, ..phone(n) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exhausted_quota_is_raised_by_two_officers() {
    let metrics = free_port();
    let mut site = site_with_metrics(&format!("127.0.0.1:{metrics}"));
    quota(&site, "devices_total = 2\ndevices_per_hour = 5\n");
    site.sppctl("officer enroll o-2 --config sppd.toml --out tls/o-2");
    site.start();
    let mut line = site.station().await;
    for n in [1, 2, 1, 2] {
        assemble(&mut line, &phone(n)).await.unwrap();
    }
    let refused = Refusal::of(&assemble(&mut line, &phone(3)).await.unwrap_err());
    assert!(refused.is(Code::PermissionDenied, "QUOTA_TOTAL"), "{refused:?}");
    let scraped = tokio::task::block_in_place(|| spp_testkit::metrics::ask(metrics, "GET /metrics"));
    assert!(scraped.contains("spp_refusals_total{reason=\"QUOTA_TOTAL\"} 1\n"), "{scraped}");
    let asked =
        sppctl_json(&site, "tls/officer", "approvals request quota line-1/a --devices-total 100 --devices-per-hour 5");
    approve(&site, asked["id"].as_str().unwrap());
    for n in 3..=5 {
        assemble(&mut line, &phone(n)).await.unwrap();
    }
    let status = assemble(&mut line, &phone(6)).await.unwrap_err();
    let refused = Refusal::of(&status);
    assert!(refused.is(Code::ResourceExhausted, "QUOTA_PER_HOUR"), "{refused:?}");
    assert!(spp_testkit::devices::is_retryable(&status), "it says when");
    let listed = sppctl_json(&site, "tls/officer", "station list");
    let station = &listed["stations"][0];
    assert_eq!((&station["begun_total"], &station["devices_total"]), (&5.into(), &100.into()));
    site.kill();
    site.start();
    let mut line = site.station().await;
    assert!(
        Refusal::of(&assemble(&mut line, &phone(6)).await.unwrap_err()).is(Code::ResourceExhausted, "QUOTA_PER_HOUR")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn configuration_lowers_quota_but_cannot_raise_it() {
    let mut site = Site::new();
    quota(&site, "devices_total = 1\n");
    site.sppctl("officer enroll o-2 --config sppd.toml --out tls/o-2");
    site.start();
    let mut line = site.station().await;
    assemble(&mut line, &phone(1)).await.unwrap();
    site.edit("sppd.toml", "devices_total = 1", "devices_total = 50");
    let output = sppctl_as(&site, "tls/officer", "reload");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("line-1/a") && said.contains("approvals request quota"),
        "{said}"
    );
    tokio::task::block_in_place(|| assert!(site.stop().success()));
    site.start();
    assert!(site.log().contains("configured rule or quota not applied"), "a restart raises nothing, and says so");
    let mut line = site.station().await;
    assert!(Refusal::of(&assemble(&mut line, &phone(2)).await.unwrap_err()).is(Code::PermissionDenied, "QUOTA_TOTAL"));
    let asked = sppctl_json(&site, "tls/officer", "approvals request quota line-1/a --devices-total 50");
    approve(&site, asked["id"].as_str().unwrap());
    assert!(sppctl_as(&site, "tls/officer", "reload").status.success(), "what was approved may be written down");
    assemble(&mut line, &phone(2)).await.unwrap();
    site.edit("sppd.toml", "[approvals]\n", "[approvals]\nrevoke = 3\n");
    let said = String::from_utf8_lossy(&sppctl_as(&site, "tls/officer", "reload").stderr).into_owned();
    assert!(said.contains("approvals request rules"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identities_are_allocated_once_across_crashes() {
    let mut site = site_with_three_officers();
    let mut line = site.station().await;
    let none = Refusal::of(&assemble(&mut line, &unnamed(1)).await.unwrap_err());
    assert!(none.is(Code::ResourceExhausted, "IDENTITIES_EXHAUSTED"), "{none:?}");
    let first = spp_testkit::devices::imei(0);
    let words = format!("identities load --profile phone --first {first} --count 40");
    assert_eq!(sppctl_json(&site, "tls/officer", &words)["number"], 1);
    assert_eq!(sppctl_json(&site, "tls/officer", &words)["number"], 1, "a repeat loads nothing twice");
    let overlapping =
        sppctl_as(&site, "tls/officer", &format!("identities load --profile phone --first {first} --count 1"));
    assert!(String::from_utf8_lossy(&overlapping.stderr).contains("loaded already"), "{overlapping:?}");
    // One of the loaded identities is requested by name.
    assemble(&mut line, &AssembleRequest { identity: spp_testkit::devices::imei(2), ..phone(900) }).await.unwrap();
    let mut given = BTreeSet::new();
    for round in 0..3_u64 {
        let calls = (0..8).map(|n| {
            let mut line = line.clone();
            tokio::spawn(async move { assemble(&mut line, &unnamed(round * 4 + n)).await })
        });
        let calls: Vec<_> = calls.collect();
        if round < 2 {
            // Kill the daemon during the calls.
            tokio::time::sleep(std::time::Duration::from_millis(15)).await;
            tokio::task::block_in_place(|| {
                site.kill();
                site.start();
            });
        }
        for call in calls {
            // Interrupted orders are repeated below.
            let _ = call.await.unwrap();
        }
        line = site.station().await;
        for n in 0..8 {
            let answer = assemble(&mut line, &unnamed(round * 4 + n)).await.unwrap();
            given.insert((round * 4 + n, answer.identity));
        }
    }
    let identities: BTreeSet<_> = given.iter().map(|(_, identity)| identity).collect();
    assert_eq!((given.len(), identities.len()), (16, 16), "each chip one and the same: {given:?}");
    assert!(!identities.contains(&spp_testkit::devices::imei(2)));
    // A complete device keeps its identity, too.
    let fab = TestFab::new(&site);
    let answer = assemble(&mut line, &unnamed(0)).await.unwrap();
    complete(&mut line, &install(&mut fab.device(0), &answer)).await.unwrap();
    let complete = Refusal::of(&assemble(&mut line, &unnamed(0)).await.unwrap_err());
    assert!(complete.is(Code::AlreadyExists, "ALREADY_COMPLETE"), "{complete:?}");
    let ranges: Value = sppctl_json(&site, "tls/officer", "identities list");
    assert!(ranges[0]["used"].as_u64().unwrap() >= 17, "{ranges}");
    let both =
        Refusal::of(&assemble(&mut line, &AssembleRequest { allocate_identity: true, ..phone(77) }).await.unwrap_err());
    assert_eq!((both.code, both.fields), (Code::InvalidArgument, vec!["identity".to_owned()]));
}

/// A station may order an identity by name that differs from a loaded one in case only: certificates would not show the difference.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn allocation_skips_identity_whose_subject_is_taken() {
    let mut site = Site::new();
    site.start();
    let mut line = site.station().await;
    let fab = TestFab::new(&site);
    sppctl_json(&site, "tls/officer", "identities load --profile gateway --first serial:GW-1 --count 5");
    let named =
        |n: u64, identity: &str| AssembleRequest { identity: identity.to_owned(), ..gateway(n, &fab.device(n)) };
    assemble(&mut line, &named(1, "serial:gw-1")).await.unwrap();
    provision(&mut line, &mut fab.device(2), &named(2, "serial:gw-2")).await;
    let unnamed = AssembleRequest { allocate_identity: true, ..named(3, "") };
    for _ in 0..2 {
        assert_eq!(assemble(&mut line, &unnamed).await.unwrap().identity, "serial:GW-3");
    }
    let taken = Refusal::of(&assemble(&mut line, &named(4, "serial:gw-3")).await.unwrap_err());
    assert!(taken.is(Code::AlreadyExists, "SUBJECT_TAKEN"), "{taken:?}");
    // A refused order uses up no identity.
    let key_of_3 = named(3, "").csr;
    for n in 10..14 {
        let order = AssembleRequest { allocate_identity: true, csr: key_of_3.clone(), ..named(n, "") };
        let taken = Refusal::of(&assemble(&mut line, &order).await.unwrap_err());
        assert!(taken.is(Code::AlreadyExists, "PUBLIC_KEY_TAKEN"), "{taken:?}");
    }
    let next = AssembleRequest { allocate_identity: true, ..named(5, "") };
    assert_eq!(assemble(&mut line, &next).await.unwrap().identity, "serial:GW-4");
}

/// Sessions that are begun and never finished would fill the state store and slow down every start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_sessions_of_station_are_limited() {
    let mut site = Site::new();
    quota(&site, "open_sessions = 2\n");
    site.start();
    let mut line = site.station().await;
    let fab = TestFab::new(&site);
    let mut sessions = Vec::new();
    for n in [1, 2] {
        sessions.push(assemble(&mut line, &phone(n)).await.unwrap());
    }
    let status = assemble(&mut line, &phone(3)).await.unwrap_err();
    assert!(Refusal::of(&status).is(Code::ResourceExhausted, "OPEN_SESSIONS"), "{status:?}");
    assemble(&mut line, &phone(2)).await.expect("a repeated order opens no session");
    site.kill();
    site.start();
    let mut line = site.station().await;
    assert!(assemble(&mut line, &phone(3)).await.is_err(), "the count survives a restart");
    let mut device = fab.device(1);
    complete(&mut line, &install(&mut device, &sessions[0])).await.unwrap();
    assemble(&mut line, &phone(3)).await.expect("a completed device has no open session");
    assert!(assemble(&mut line, &phone(4)).await.is_err());
    let abort = AbortRequest { session_id: sessions[1].session_id.clone(), reason: "left the line".to_owned() };
    line.abort(abort).await.unwrap();
    assemble(&mut line, &phone(4)).await.expect("an aborted session is not open");
}
