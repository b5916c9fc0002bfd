//! What every public database must do, told once: `contract_of_publication!(module, Factory)` makes the tests for one of them.

use std::sync::Arc;

use async_trait::async_trait;

use super::contract::{chip, id, identity};
use super::*;
use crate::keys::sha256;

/// A public database, empty at first. Each call opens it anew; the handle before must be dropped.
#[async_trait]
pub(crate) trait PublicFactory: Send + Sync {
    fn new() -> Self;
    async fn public(&self) -> Arc<dyn PublicDatabase>;
}

macro_rules! contract_of_publication {
    ($module:ident, $factory:ty) => {
        mod $module {
            use super::*;
            contract_of_publication!(@tests $factory:
                what_was_published_is_there_after_reopening,
                a_record_is_found_as_it_was_published,
                each_unique_value_is_published_once,
                a_repeated_publication_gives_the_first_answer,
                a_publication_repeated_at_once_is_one_entry,
                of_many_racing_to_publish_a_chip_one_wins,
                the_largest_record_fits);
        }
    };
    (@tests $factory:ty: $($test:ident),+) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            let factory = <$factory as $crate::store::contract_public::PublicFactory>::new();
            $crate::store::contract_public::$test(&factory).await;
        }
    )+};
}
pub(crate) use contract_of_publication;

pub(crate) fn record(n: u64) -> DeviceRecord {
    DeviceRecord {
        chip: chip(n),
        identity: identity(n),
        profile: "phone".parse().unwrap(),
        certificate: n.to_be_bytes().repeat(80),
        certificate_is_cwt: false,
        serial: [[1; 8], n.to_be_bytes()].concat(),
        public_key: Some([&[4; 83], n.to_be_bytes().as_slice()].concat()),
        backup: vec![3; 900],
        master_key_version: 1,
        session: id(n),
        published: 2000 + n,
    }
}

async fn by_chip(public: &dyn PublicDatabase, n: u64) -> Option<PublishedRecord> {
    public.find(&UniqueKey::of_chip(&chip(n))).await.unwrap()
}

pub(crate) async fn what_was_published_is_there_after_reopening(engine: &impl PublicFactory) {
    let public = engine.public().await;
    for n in 0..50 {
        public.publish(&record(n)).await.unwrap();
    }
    drop(public);
    let public = engine.public().await;
    for n in 0..50 {
        assert_eq!(by_chip(&*public, n).await.unwrap().record, record(n));
    }
    assert_eq!(public.len().await.unwrap(), 50);
}

pub(crate) async fn a_record_is_found_as_it_was_published(engine: &impl PublicFactory) {
    let public = engine.public().await;
    assert_eq!(by_chip(&*public, 0).await, None);
    for n in 0..3 {
        let octets = record(n).to_bytes().unwrap();
        let publication = Publication { index: n, record_hash: sha256(&octets), published: 2000 + n };
        assert_eq!(public.publish(&record(n)).await.unwrap(), publication);
        let published = PublishedRecord { record: record(n), octets, publication };
        let keys = UniqueKey::of_record(&record(n));
        assert_eq!(keys.len(), 5);
        for key in keys {
            assert_eq!(public.find(&key).await.unwrap().as_ref(), Some(&published), "{}", key.what());
        }
        assert_eq!(public.record(n).await.unwrap().as_ref(), Some(&published));
    }
    assert_eq!(public.find(&UniqueKey::of_identity(&identity(7))).await.unwrap(), None);
    assert_eq!(public.record(3).await.unwrap(), None);
    assert_eq!(public.len().await.unwrap(), 3);
}

pub(crate) async fn each_unique_value_is_published_once(engine: &impl PublicFactory) {
    let public = engine.public().await;
    public.publish(&record(1)).await.unwrap();
    let rivals = [
        ("chip ID", DeviceRecord { chip: chip(1), ..record(2) }),
        ("identity", DeviceRecord { identity: identity(1), ..record(2) }),
        ("certificate serial", DeviceRecord { serial: record(1).serial, ..record(2) }),
        ("public key", DeviceRecord { public_key: record(1).public_key, ..record(2) }),
        ("session", DeviceRecord { session: id(1), ..record(2) }),
        ("chip ID", DeviceRecord { backup: vec![8; 900], ..record(1) }),
    ];
    for (what, rival) in rivals {
        match public.publish(&rival).await.unwrap_err() {
            PublishError::Taken(taken) => assert_eq!(taken, Taken { what, index: 0, session: id(1) }),
            other => panic!("{what}: {other}"),
        }
    }
    assert_eq!(public.len().await.unwrap(), 1);
    let keyless = |n| DeviceRecord { public_key: None, ..record(n) };
    public.publish(&keyless(2)).await.unwrap();
    public.publish(&keyless(3)).await.unwrap();
}

pub(crate) async fn a_repeated_publication_gives_the_first_answer(engine: &impl PublicFactory) {
    let public = engine.public().await;
    let first = public.publish(&record(1)).await.unwrap();
    let later = DeviceRecord { published: 9_999, ..record(1) };
    assert_eq!(public.publish(&later).await.unwrap(), first);
    drop(public);
    let public = engine.public().await;
    assert_eq!(public.publish(&later).await.unwrap(), first);
    assert_eq!(public.len().await.unwrap(), 1);
}

pub(crate) async fn a_publication_repeated_at_once_is_one_entry(engine: &impl PublicFactory) {
    let public = engine.public().await;
    let repeats = (0..64).map(|n| {
        let public = public.clone();
        tokio::spawn(async move { public.publish(&DeviceRecord { published: n, ..record(1) }).await.unwrap() })
    });
    let mut answers = Vec::new();
    for repeat in repeats.collect::<Vec<_>>() {
        answers.push(repeat.await.unwrap());
    }
    answers.dedup();
    assert_eq!((answers.len(), public.len().await.unwrap()), (1, 1));
}

pub(crate) async fn of_many_racing_to_publish_a_chip_one_wins(engine: &impl PublicFactory) {
    let public = engine.public().await;
    let rivals: Vec<_> = (0..64)
        .map(|n| {
            let public = public.clone();
            tokio::spawn(async move { public.publish(&DeviceRecord { chip: chip(1), ..record(n) }).await })
        })
        .collect();
    let mut won = 0;
    for rival in rivals {
        match rival.await.unwrap() {
            Ok(_) => won += 1,
            Err(error) => assert!(matches!(error, PublishError::Taken(_)), "{error}"),
        }
    }
    assert_eq!((won, public.len().await.unwrap()), (1, 1));
}

pub(crate) async fn the_largest_record_fits(engine: &impl PublicFactory) {
    let public = engine.public().await;
    for n in 0..40 {
        let mut large = record(n);
        let more = DeviceRecord::MAX_LEN - large.to_bytes().unwrap().len();
        large.backup.resize(large.backup.len() + more, 5);
        assert_eq!(large.to_bytes().unwrap().len(), DeviceRecord::MAX_LEN);
        public.publish(&large).await.unwrap();
        assert_eq!(by_chip(&*public, n).await.unwrap().record, large);
        large.backup.push(5);
        assert!(matches!(public.publish(&large).await, Err(PublishError::Record(_))));
    }
}
