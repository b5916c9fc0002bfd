//! Contract tests for production statistics and session listings of every storage engine. `production_contract!(module, Factory)`
//! instantiates them.

use std::collections::BTreeMap;
use std::ops::Range;

use proptest::prelude::*;
use spp_format::record::Publication;

use super::contract::{Factory, chip, finish, id, identity, issued, session};
use super::*;

macro_rules! production_contract {
    ($module:ident, $factory:ty) => {
        mod $module {
            use super::*;
            production_contract!(@tests $factory:
                event_counts_once_in_its_hour,
                production_is_listed_by_hour_in_pages,
                sessions_are_listed_once_for_any_page_size,
                sessions_of_chip_are_listed_newest_first);

            #[test]
            fn production_counts_match_sessions() {
                $crate::store::contract_production::production_counts_match_sessions::<$factory>();
            }
        }
    };
    (@tests $factory:ty: $($test:ident),+) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            $crate::store::contract_production::$test(&<$factory as $crate::store::contract::Factory>::new()).await;
        }
    )+};
}
pub(super) use production_contract;

const ALL_HOURS: Range<u64> = 0..u64::MAX;

/// Session `n`, opened in an hour at a station for a profile.
fn opened(n: u64, hour: u64, station: &str, profile: &str) -> Session {
    let (station, profile) = (station.parse().unwrap(), profile.parse().unwrap());
    Session { created: hour * SECONDS_PER_HOUR + 7, station, profile, ..session(n) }
}

fn slot(hour: u64, station: &str, profile: &str) -> ProductionSlot {
    ProductionSlot { hour, station: station.parse().unwrap(), profile: profile.parse().unwrap() }
}

const fn counts(begun: u64, completed: u64, aborted: u64) -> ProductionCounts {
    ProductionCounts { begun, completed, aborted }
}

fn public_at(n: u64, published: u64) -> Publication {
    Publication { index: n, record_hash: [9; 32], published }
}

fn aborted_at(at: u64) -> SessionState {
    SessionState::Aborted { at, reason: "expired".into() }
}

/// Reads all rows in pages of a size.
async fn read(store: &dyn StateStore, hours: Range<u64>, page: usize) -> Vec<(ProductionSlot, ProductionCounts)> {
    let mut rows: Vec<(ProductionSlot, ProductionCounts)> = Vec::new();
    loop {
        let after = rows.last().map(|(slot, _)| slot);
        let more = store.production(hours.clone(), after, page).await.unwrap();
        assert!(more.len() <= page);
        let is_last = more.len() < page;
        rows.extend(more);
        if is_last {
            return rows;
        }
    }
}

pub(super) async fn event_counts_once_in_its_hour(engine: &impl Factory) {
    let store = engine.state();
    let (first, second) = (opened(1, 10, "line-1/a", "phone"), opened(2, 10, "line-1/a", "phone"));
    for session in [&first, &first, &second] {
        store.reserve(session, None).await.unwrap();
    }
    assert!(store.reserve(&Session { chip: chip(1), ..opened(3, 10, "line-1/a", "phone") }, None).await.is_err());
    let publication = public_at(1, 12 * SECONDS_PER_HOUR);
    let transitions = [
        (StateName::Reserved, issued(1)),
        (StateName::Issued, SessionState::Published { publication }),
        (StateName::Published, SessionState::Erased { publication }),
    ];
    for (from, to) in transitions {
        for _ in 0..3 {
            store.advance(&id(1), from, to.clone()).await.unwrap();
        }
    }
    for _ in 0..2 {
        store.advance(&id(2), StateName::Reserved, aborted_at(11 * SECONDS_PER_HOUR + 3599)).await.unwrap();
        assert!(store.advance(&id(2), StateName::Reserved, aborted_at(13 * SECONDS_PER_HOUR)).await.is_err());
    }
    let row_key = |hour| slot(hour, "line-1/a", "phone");
    let expected = vec![(row_key(10), counts(2, 0, 0)), (row_key(11), counts(0, 0, 1)), (row_key(12), counts(0, 1, 0))];
    assert_eq!(read(&*store, ALL_HOURS, 100).await, expected);
    drop(store);
    assert_eq!(read(&*engine.state(), ALL_HOURS, 100).await, expected, "after reopening");
}

pub(super) async fn production_is_listed_by_hour_in_pages(engine: &impl Factory) {
    let store = engine.state();
    let mut expected = BTreeMap::new();
    let names = [("line-1", "phone"), ("line-1", "phone-s"), ("line-1/a", "p"), ("line-10", "phone")];
    // From 255 to 256 the bytes of the hour carry.
    for (n, hour) in [0, 1, 254, 255, 256, 1000].into_iter().enumerate() {
        for (m, (station, profile)) in names.into_iter().enumerate() {
            store.reserve(&opened((n * 10 + m) as u64, hour, station, profile), None).await.unwrap();
            expected.insert(slot(hour, station, profile), counts(1, 0, 0));
        }
    }
    for hours in [ALL_HOURS, 0..1, 1..1, 1..255, 255..256, 256..257, 257..1000, 257..1001] {
        let within: Vec<_> = expected.clone().into_iter().filter(|(slot, _)| hours.contains(&slot.hour)).collect();
        for page in [1, 2, 3, 5, 100] {
            assert_eq!(read(&*store, hours.clone(), page).await, within, "{hours:?} in pages of {page}");
        }
    }
}

pub(super) async fn sessions_are_listed_once_for_any_page_size(engine: &impl Factory) {
    let store = engine.state();
    for n in 0..7 {
        let mut new = Session { created: 300 - n, ..session(n) };
        // Some are stored in several pieces.
        new.certificate = super::contract::unsigned(vec![7; 6000 * usize::from(n % 3 == 0)]);
        store.reserve(&new, None).await.unwrap();
    }
    store.advance(&id(3), StateName::Reserved, aborted_at(400)).await.unwrap();
    finish(&*store, 8).await;
    for (set, expected) in
        [(SessionSet::All, vec![0, 1, 2, 3, 4, 5, 6, 8]), (SessionSet::Unfinished, vec![6, 5, 4, 2, 1, 0])]
    {
        for page in [1, 2, 3, 100] {
            let mut listed: Vec<Session> = Vec::new();
            loop {
                let more = store.sessions(set, listed.last().map(Session::cursor), page).await.unwrap();
                let is_last = more.len() < page;
                listed.extend(more);
                if is_last {
                    break;
                }
            }
            let ids: Vec<_> = listed.iter().map(|session| session.id).collect();
            assert_eq!(ids, expected.iter().copied().map(id).collect::<Vec<_>>(), "{set:?} in pages of {page}");
        }
    }
}

pub(super) async fn sessions_of_chip_are_listed_newest_first(engine: &impl Factory) {
    let store = engine.state();
    for n in [5, 2, 9] {
        store.reserve(&Session { chip: chip(1), ..session(n) }, None).await.unwrap();
        store.advance(&id(n), StateName::Reserved, aborted_at(400)).await.unwrap();
    }
    store.reserve(&Session { chip: chip(1), ..session(1) }, None).await.unwrap();
    store.reserve(&session(7), None).await.unwrap();
    let ids = async |n, limit| -> Vec<_> {
        let found = store.sessions_of_chip(&chip(n), limit).await.unwrap();
        found.into_iter().map(|session| session.id).collect()
    };
    assert_eq!(ids(1, 100).await, [1, 9, 2, 5].map(id));
    assert_eq!(ids(1, 2).await, [1, 9].map(id));
    assert_eq!(ids(7, 100).await, [id(7)]);
    assert_eq!(ids(3, 100).await, []);
}

/// A random call on one of a few sessions at one of a few times, including invalid and repeated calls.
#[derive(Debug, Clone)]
enum Step {
    Reserve { n: u64, hour: u64 },
    Advance { n: u64, from: StateName, to: SessionState },
    Reopen,
}

fn any_step() -> impl Strategy<Value = Step> {
    let reserve = (0..6u64, 0..3u64).prop_map(|(n, hour)| Step::Reserve { n, hour });
    let advance = (0..6u64, 0..6usize, 0..3u64).prop_map(|(n, step, hour)| {
        // A record is published once, so the erasure names the same publication.
        let publication = public_at(n, n % 3 * SECONDS_PER_HOUR);
        let (from, to) = match step {
            0 | 1 => (StateName::Reserved, issued(n)),
            2 => (StateName::Issued, SessionState::Published { publication }),
            3 => (StateName::Published, SessionState::Erased { publication }),
            4 => (StateName::Reserved, aborted_at(hour * SECONDS_PER_HOUR)),
            _ => (StateName::Issued, aborted_at(hour * SECONDS_PER_HOUR)),
        };
        Step::Advance { n, from, to }
    });
    prop_oneof![6 => reserve, 12 => advance, 1 => Just(Step::Reopen)]
}

pub(super) fn production_counts_match_sessions<F: Factory>() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let config = spp_testkit::random::cases(12, 400);
    proptest!(config, |(steps in proptest::collection::vec(any_step(), 1..50))| {
        runtime.block_on(run_steps::<F>(steps));
    });
}

async fn run_steps<F: Factory>(steps: Vec<Step>) {
    let engine = F::new();
    let mut store = engine.state();
    for step in steps {
        match step {
            Step::Reserve { n, hour } => {
                let (station, profile) = [("line-1", "phone"), ("line-2", "sensor")][usize::from(n % 2 == 0)];
                let (chip, identity) = (chip(n % 3), identity(n % 3));
                let new = Session { chip, identity, ..opened(n, hour, station, profile) };
                let _ = store.reserve(&new, None).await;
            }
            Step::Advance { n, from, to } => drop(store.advance(&id(n), from, to).await),
            Step::Reopen => {
                drop(store);
                store = engine.state();
            }
        }
    }
    let mut expected: BTreeMap<ProductionSlot, ProductionCounts> = BTreeMap::new();
    for session in store.sessions(SessionSet::All, None, 100).await.unwrap() {
        let mut count = |at: u64, reached| {
            let slot = ProductionSlot {
                hour: at / SECONDS_PER_HOUR,
                station: session.station.clone(),
                profile: session.profile.clone(),
            };
            expected.entry(slot).or_default().add(reached);
        };
        count(session.created, counts(1, 0, 0));
        match &session.state {
            SessionState::Published { publication } | SessionState::Erased { publication } => {
                count(publication.published, counts(0, 1, 0));
            }
            SessionState::Aborted { at, .. } => count(*at, counts(0, 0, 1)),
            SessionState::Reserved | SessionState::Issued { .. } => {}
        }
    }
    let rows = read(&*store, ALL_HOURS, 3).await;
    assert_eq!(rows, expected.into_iter().collect::<Vec<_>>());
    assert_production_matches_counts(&*store).await;
}

/// Checks that the sums of all production rows match the session counts.
pub(super) async fn assert_production_matches_counts(store: &dyn StateStore) {
    let mut sum = ProductionCounts::default();
    read(store, ALL_HOURS, 100).await.iter().for_each(|(_, counts)| sum.add(*counts));
    let SessionCounts { reserved, issued, published, erased, aborted } = store.counts().await.unwrap();
    assert_eq!(sum, counts(reserved + issued + published + erased + aborted, published + erased, aborted));
}
