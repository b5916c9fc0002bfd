//! Reports that are longer than what is read at once.

use std::collections::BTreeSet;

use spp::names::{ChipId, SessionId};
use spp::provisioning::{ProductionBy, SessionFilter};
use spp::store::{HOUR, ProductionCounts, Session, SessionState, StateName, StateStore as _};

use spp_testkit::point::device::{Kind, OnTheLine, identity_of};
use spp_testkit::point::{House, Point};

const MANY: u32 = 1100;

/// So many sessions, each begun in an hour of its own, and one more now.
async fn begin_many(house: &House, point: &Point<'_>) {
    let mut first = OnTheLine::new(house, Kind::Phone, 0);
    first.assemble(point).await.unwrap();
    let known = first.session(point).await.unwrap();
    for n in 1..=MANY {
        let new = Session {
            id: SessionId::from_bytes(&n.to_be_bytes().repeat(4)).unwrap(),
            chip: ChipId::from_bytes(&[[0xC5; 8].as_slice(), &n.to_be_bytes()].concat()).unwrap(),
            identity: identity_of(Kind::Phone, n),
            created: u64::from(n) * HOUR,
            state: SessionState::Reserved,
            ..known.clone()
        };
        point.state().reserve(&new, None).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_report_is_whole_and_a_page_looks_at_so_many_sessions_and_no_more() {
    let house = House::new().await;
    let point = house.point();
    begin_many(&house, &point).await;
    let told = point.provisioner().production(1..u64::from(MANY) + 1, ProductionBy::Hour).await.unwrap();
    let one = ProductionCounts { begun: 1, ..ProductionCounts::default() };
    assert!(told.len() == MANY as usize && told.values().all(|counts| *counts == one));
    let told = point.provisioner().production(0..u64::MAX, ProductionBy::Profile).await.unwrap();
    assert_eq!(told.into_values().map(|counts| counts.begun).collect::<Vec<_>>(), [u64::from(MANY) + 1]);

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
    let nobody = SessionFilter { station: Some("line-9".parse().unwrap()), ..SessionFilter::default() };
    assert_eq!(pages(&nobody, 10).await, [vec![], vec![]], "two looks, and nothing found");
    let old = SessionFilter { older_than: 24 * HOUR, ..SessionFilter::default() };
    assert_eq!(pages(&old, 5000).await.concat().len(), MANY as usize);
}
