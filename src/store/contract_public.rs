//! Contract tests for every public database. `public_database_contract!(module, Factory)` instantiates them.

use std::sync::Arc;

use async_trait::async_trait;
use spp_format::keys::sha256;
use spp_format::record::{AuditCheckpoint, DeviceRecord, Publication, PublishedRecord, UniqueKey, UniquenessConflict};
use spp_format::tlog::{TileId, TileKind};

use super::contract::{chip, id, identity};
use super::*;

/// A public database, initially empty. Each call reopens it; drop the previous handle first.
#[async_trait]
pub(crate) trait PublicFactory: Send + Sync {
    fn new() -> Self;
    async fn public(&self) -> Arc<dyn PublicDatabase>;
}

macro_rules! public_database_contract {
    ($module:ident, $factory:ty) => {
        mod $module {
            use super::*;
            public_database_contract!(@tests $factory:
                published_records_survive_reopening,
                record_is_found_by_every_key,
                duplicate_unique_value_is_refused,
                repeated_publication_returns_first_answer,
                concurrent_repeated_publications_create_one_entry,
                concurrent_publications_of_a_chip_one_wins,
                record_of_maximum_size_is_accepted,
                audit_checkpoint_is_an_entry_but_not_a_record,
                newest_audit_checkpoint_survives_reopening,
                audit_checkpoint_with_other_note_is_refused,
                concurrent_audit_checkpoints_one_wins);
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
pub(crate) use public_database_contract;

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

pub(crate) fn audit_checkpoint(node: &str, entries: u64) -> AuditCheckpoint {
    let note = format!("{node}\n{entries}\n\n\u{2014} {node} AAAA\n").into_bytes();
    AuditCheckpoint { node: node.to_owned(), entries, note, recorded: 3000 + entries }
}

async fn by_chip(public: &dyn PublicDatabase, n: u64) -> Option<PublishedRecord> {
    public.find(&UniqueKey::of_chip(&chip(n))).await.unwrap()
}

pub(crate) async fn published_records_survive_reopening(engine: &impl PublicFactory) {
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

pub(crate) async fn record_is_found_by_every_key(engine: &impl PublicFactory) {
    let public = engine.public().await;
    assert_eq!(by_chip(&*public, 0).await, None);
    for n in 0..3 {
        let bytes = record(n).to_bytes().unwrap();
        let publication = Publication { index: n, record_hash: sha256(&bytes), published: 2000 + n };
        assert_eq!(public.publish(&record(n)).await.unwrap(), publication);
        let published = PublishedRecord { record: record(n), bytes, publication };
        let keys = UniqueKey::of_record(&record(n));
        assert_eq!(keys.len(), 5);
        for key in keys {
            assert_eq!(public.find(&key).await.unwrap().as_ref(), Some(&published), "{}", key.field());
        }
        assert_eq!(public.record(n).await.unwrap().as_ref(), Some(&published));
    }
    assert_eq!(public.find(&UniqueKey::of_identity(&identity(7))).await.unwrap(), None);
    assert_eq!(public.record(3).await.unwrap(), None);
    assert_eq!(public.len().await.unwrap(), 3);
}

pub(crate) async fn duplicate_unique_value_is_refused(engine: &impl PublicFactory) {
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
    for (field, rival) in rivals {
        match public.publish(&rival).await.unwrap_err() {
            PublishError::Conflict(taken) => {
                assert_eq!(taken, UniquenessConflict { field, index: 0, session: Some(id(1)) })
            }
            other => panic!("{field}: {other}"),
        }
    }
    assert_eq!(public.len().await.unwrap(), 1);
    let keyless = |n| DeviceRecord { public_key: None, ..record(n) };
    public.publish(&keyless(2)).await.unwrap();
    public.publish(&keyless(3)).await.unwrap();
}

pub(crate) async fn repeated_publication_returns_first_answer(engine: &impl PublicFactory) {
    let public = engine.public().await;
    let first = public.publish(&record(1)).await.unwrap();
    let later = DeviceRecord { published: 9_999, ..record(1) };
    assert_eq!(public.publish(&later).await.unwrap(), first);
    drop(public);
    let public = engine.public().await;
    assert_eq!(public.publish(&later).await.unwrap(), first);
    assert_eq!(public.len().await.unwrap(), 1);
}

pub(crate) async fn concurrent_repeated_publications_create_one_entry(engine: &impl PublicFactory) {
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

pub(crate) async fn concurrent_publications_of_a_chip_one_wins(engine: &impl PublicFactory) {
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
            Err(error) => assert!(matches!(error, PublishError::Conflict(_)), "{error}"),
        }
    }
    assert_eq!((won, public.len().await.unwrap()), (1, 1));
}

pub(crate) async fn record_of_maximum_size_is_accepted(engine: &impl PublicFactory) {
    let public = engine.public().await;
    for n in 0..40 {
        let mut large = record(n);
        let missing = DeviceRecord::MAX_LEN - large.to_bytes().unwrap().len();
        large.backup.resize(large.backup.len() + missing, 5);
        assert_eq!(large.to_bytes().unwrap().len(), DeviceRecord::MAX_LEN);
        public.publish(&large).await.unwrap();
        assert_eq!(by_chip(&*public, n).await.unwrap().record, large);
        large.backup.push(5);
        assert!(matches!(public.publish(&large).await, Err(PublishError::Record(_))));
    }
}

pub(crate) async fn audit_checkpoint_is_an_entry_but_not_a_record(engine: &impl PublicFactory) {
    let public = engine.public().await;
    assert_eq!((public.newest().await.unwrap(), public.newest_audit("a").await.unwrap()), (None, None));
    let bytes = audit_checkpoint("a", 7).to_bytes().unwrap();
    let publication = Publication { index: 0, record_hash: sha256(&bytes), published: 3007 };
    assert_eq!(public.append_audit(&audit_checkpoint("a", 7)).await.unwrap(), publication);
    assert_eq!((public.newest().await.unwrap(), public.len().await.unwrap()), (None, 0));
    assert_eq!(public.publish(&record(1)).await.unwrap().index, 1);
    assert_eq!(public.append_audit(&audit_checkpoint("a", 9)).await.unwrap().index, 2);
    assert_eq!(public.len().await.unwrap(), 1);
    for index in [0, 2, 3] {
        assert_eq!(public.record(index).await.unwrap(), None, "{index}");
    }
    let device_record = public.record(1).await.unwrap();
    assert_eq!(device_record.as_ref().map(|found| &found.record), Some(&record(1)));
    assert_eq!(public.newest().await.unwrap(), device_record);
    for (index, bytes) in
        [bytes, record(1).to_bytes().unwrap(), audit_checkpoint("a", 9).to_bytes().unwrap()].iter().enumerate()
    {
        for proof in [public.prove(index as u64).await.unwrap(), public.receipt(index as u64).await.unwrap()] {
            assert_eq!(proof.unwrap().index(), index as u64);
        }
        let bundle = public.tile(TileId::in_tree(TileKind::Entries, 0, 3).unwrap()).await.unwrap().unwrap();
        assert_eq!(spp_format::tlog::bundle::entries(&bundle).nth(index).unwrap().unwrap(), bytes);
    }
}

pub(crate) async fn newest_audit_checkpoint_survives_reopening(engine: &impl PublicFactory) {
    let public = engine.public().await;
    for (node, entries) in [("a", 1), ("b", 5), ("a", 300), ("a", 20)] {
        public.append_audit(&audit_checkpoint(node, entries)).await.unwrap();
    }
    let known = [
        ("a", Some((3, audit_checkpoint("a", 20)))),
        ("b", Some((1, audit_checkpoint("b", 5)))),
        ("", None),
        ("ab", None),
    ];
    for (node, newest) in &known {
        assert_eq!(public.newest_audit(node).await.unwrap(), *newest, "{node}");
    }
    drop(public);
    let public = engine.public().await;
    for (node, newest) in &known {
        assert_eq!(public.newest_audit(node).await.unwrap(), *newest, "{node}");
    }
}

pub(crate) async fn audit_checkpoint_with_other_note_is_refused(engine: &impl PublicFactory) {
    let public = engine.public().await;
    let first = public.append_audit(&audit_checkpoint("a", 7)).await.unwrap();
    assert_eq!(public.append_audit(&audit_checkpoint("a", 7)).await.unwrap(), first);
    public.append_audit(&audit_checkpoint("a", 8)).await.unwrap();
    drop(public);
    for _ in 0..2 {
        let public = engine.public().await;
        assert_eq!(public.append_audit(&audit_checkpoint("a", 7)).await.unwrap(), first);
        let later = AuditCheckpoint { recorded: 9_999, ..audit_checkpoint("a", 7) };
        assert_eq!(public.append_audit(&later).await.unwrap(), first);
        let other = AuditCheckpoint { note: b"another".to_vec(), ..audit_checkpoint("a", 7) };
        let refused = public.append_audit(&other).await.unwrap_err();
        assert!(
            refused.to_string().contains("the number of audit entries of this node is already in entry 0"),
            "{refused}"
        );
        let taken = UniquenessConflict { field: "number of audit entries", index: 0, session: None };
        assert!(matches!(refused, PublishError::Conflict(found) if found == taken));
        let refused = public.append_audit(&AuditCheckpoint { note: Vec::new(), ..audit_checkpoint("a", 9) }).await;
        assert!(matches!(refused, Err(PublishError::Record(_))), "{refused:?}");
        assert_eq!(public.newest_audit("a").await.unwrap(), Some((1, audit_checkpoint("a", 8))));
    }
}

pub(crate) async fn concurrent_audit_checkpoints_one_wins(engine: &impl PublicFactory) {
    let public = engine.public().await;
    let rivals = (0..64u64).map(|n| {
        let public = public.clone();
        let rival = AuditCheckpoint { note: vec![(n % 2) as u8], recorded: n, ..audit_checkpoint("a", 7) };
        tokio::spawn(async move { (rival.note.clone(), public.append_audit(&rival).await) })
    });
    let (mut won, mut lost) = (Vec::new(), Vec::new());
    for rival in rivals.collect::<Vec<_>>() {
        match rival.await.unwrap() {
            (note, Ok(publication)) => won.push((note, publication)),
            (note, Err(PublishError::Conflict(taken))) => lost.push((note, taken.index)),
            (_, Err(error)) => panic!("{error}"),
        }
    }
    won.dedup();
    lost.dedup();
    assert_eq!((won.len(), lost.len(), won[0].1.index), (1, 1, 0), "{won:?} {lost:?}");
    assert_ne!(won[0].0, lost[0].0);
    assert_eq!(public.newest_audit("a").await.unwrap().unwrap().1.note, won[0].0);
}
