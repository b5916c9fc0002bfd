//! Reports that exceed one read transaction.

use std::collections::BTreeSet;

use spp::provisioning::{ProductionBy, SessionFilter};
use spp::store::{ProductionCounts, SECONDS_PER_HOUR, Session, SessionState, StateName, StateStore as _};
use spp_format::certificate::CertificateToSign;
use spp_format::names::{ChipId, SessionId};

use spp_testkit::point::device::{Kind, TestDevice, identity_of};
use spp_testkit::point::{Point, TestBed};

const MANY: u32 = 1100;

/// Opens many sessions, each in its own hour, and one more now.
async fn open_many_sessions(testbed: &TestBed, point: &Point<'_>) {
    let mut first = TestDevice::new(testbed, Kind::Phone, 0);
    first.assemble(point).await.unwrap();
    let known = first.session(point).await.unwrap();
    for n in 1..=MANY {
        let new = Session {
            id: SessionId::from_bytes(&n.to_be_bytes().repeat(4)).unwrap(),
            chip: ChipId::from_bytes(&[[0xC5; 8].as_slice(), &n.to_be_bytes()].concat()).unwrap(),
            identity: identity_of(Kind::Phone, n),
            created: u64::from(n) * SECONDS_PER_HOUR,
            certificate: CertificateToSign::of_bytes(
                known.certificate.issuer().clone(),
                vec![1; 16],
                n.to_be_bytes().to_vec(),
            ),
            state: SessionState::Reserved,
            ..known.clone()
        };
        point.state().reserve(&new, None).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_report_is_complete_and_page_scan_is_bounded() {
    let testbed = TestBed::new().await;
    let point = testbed.point();
    open_many_sessions(&testbed, &point).await;
    let counts_by_group = point.provisioner().production(1..u64::from(MANY) + 1, ProductionBy::Hour).await.unwrap();
    let one = ProductionCounts { begun: 1, ..ProductionCounts::default() };
    assert!(counts_by_group.len() == MANY as usize && counts_by_group.values().all(|counts| *counts == one));
    let counts_by_group = point.provisioner().production(0..u64::MAX, ProductionBy::Profile).await.unwrap();
    assert_eq!(counts_by_group.into_values().map(|counts| counts.begun).collect::<Vec<_>>(), [u64::from(MANY) + 1]);

    let pages = async |filter: &SessionFilter, limit| {
        let (mut pages, mut after) = (Vec::new(), None);
        loop {
            let page = point.provisioner().sessions(filter, after, limit).await.unwrap();
            pages.push(page.sessions.into_iter().map(|session| session.id).collect::<Vec<_>>());
            after = page.next;
            if after.is_none() {
                return pages;
            }
        }
    };
    for state in [None, Some(StateName::Reserved)] {
        let filter = SessionFilter { state, ..SessionFilter::default() };
        let wanted = MANY as usize + usize::from(state.is_none());
        for limit in [99, 100, 101, 1000, 5000] {
            let listed = pages(&filter, limit).await;
            assert!(listed.iter().all(|page| page.len() <= limit.min(1000)));
            let ids: Vec<_> = listed.concat();
            assert_eq!((ids.len(), BTreeSet::from_iter(&ids).len()), (wanted, wanted), "{state:?}, {limit}");
        }
    }
    let unknown_station = SessionFilter { station: Some("line-9".parse().unwrap()), ..SessionFilter::default() };
    assert_eq!(pages(&unknown_station, 10).await, [vec![], vec![]], "two page scans without a match");
    let old = SessionFilter { older_than: 24 * SECONDS_PER_HOUR, ..SessionFilter::default() };
    assert_eq!(pages(&old, 5000).await.concat().len(), MANY as usize);
}
