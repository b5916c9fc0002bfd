//! Assertions on an idle pool of key pairs.

use std::collections::BTreeSet;

use spp::hsm::{KeyReloadRequest, StoreId, StoredKey};
use spp::store::{Batch, BatchPair, BatchState, KeyStorage, PairAssignment, SecretStore as _};
use spp_format::keys::PublicKey;

use super::Point;
use super::device::TestDevice;

/// Asserts that an idle pool is consistent: store and token agree, every pair can be unwrapped and matches its public key, no
/// pair is in two places, and all pairs ever generated are accounted for.
pub async fn assert_pool_is_consistent(point: &Point<'_>, delivered: &[&TestDevice]) {
    let hsm = &point.testbed.hsm;
    let (store, _) = point.state().origin().await.unwrap();
    // The pool's task may be shredding a batch now.
    point
        .wait_until("store and token agree", async || {
            let objects = hsm.daemon_objects().await.unwrap();
            let batches = point.state().batches().await.unwrap();
            let on_token: BTreeSet<_> =
                objects.keys.iter().filter(|key| key.store == store).map(|key| key.number).collect();
            let wrapped = batches.iter().filter(|batch| batch.storage == KeyStorage::Wrapped);
            let destroyed = point.state().pairs_to_destroy(1).await.unwrap().is_empty();
            let is_settled =
                destroyed && batches.iter().all(|b| matches!(b.state, BatchState::Open | BatchState::Sealed));
            is_settled && on_token == wrapped.map(|batch| batch.number).collect::<BTreeSet<_>>()
        })
        .await;
    // The pool's tasks may be rewrapping: repeat the check if the batches changed.
    let ready = loop {
        let before = point.state().batches().await.unwrap();
        let result = ready_keys(point, store).await;
        match result {
            Ok(ready) => break ready,
            Err(problem) => assert_ne!(point.state().batches().await.unwrap(), before, "{problem}"),
        }
    };
    for device in delivered {
        let session = device.session(point).await.unwrap();
        assert!(!ready.contains(&session.public_key.unwrap()), "a delivered pair is offered again");
    }
    let status = point.p256().await;
    let counts = status.counts;
    assert_eq!(counts.made, status.ready + status.quarantined + counts.reserved + counts.discarded);
}

/// The public keys of ready pairs. Unwraps each pair and checks that it is in one place only.
async fn ready_keys(point: &Point<'_>, store: StoreId) -> Result<BTreeSet<Vec<u8>>, String> {
    let hsm = &point.testbed.hsm;
    let objects = hsm.daemon_objects().await.unwrap();
    let mut pairs_on_token: BTreeSet<_> =
        objects.pairs.into_iter().filter(|(batch, _)| batch.store == store).map(|(_, pair)| pair).collect();
    let (mut public_keys, mut ready) = (BTreeSet::new(), BTreeSet::new());
    for (batch, held) in consistent_snapshot(point).await {
        assert_eq!(held.len() as u64, batch.ready + batch.reserved);
        for pair in held {
            let public = PublicKey::from_spki_der(&pair.public_key).unwrap();
            if !public_keys.insert(pair.public_key.clone()) {
                return Err("a pair is in two places".to_owned());
            }
            if matches!(pair.assignment, PairAssignment::Ready(_)) {
                ready.insert(pair.public_key);
            }
            if let StoredKey::OnToken(on_token) = &pair.private_key
                && !pairs_on_token.remove(on_token)
            {
                return Err(format!("{on_token:?} is not on the token"));
            }
            let order = KeyReloadRequest { pair: Some((public.clone(), pair.private_key)), derivations: Vec::new() };
            let opened = hsm.reload_keys(&order).await.map_err(|error| error.to_string())?;
            assert_eq!(opened.pair.unwrap().public(), &public);
        }
    }
    if pairs_on_token.is_empty() { Ok(ready) } else { Err(format!("nothing names these pairs: {pairs_on_token:?}")) }
}

/// A consistent snapshot of all batches with their pairs, although the pool's tasks may be rewrapping.
async fn consistent_snapshot(point: &Point<'_>) -> Vec<(Batch, Vec<BatchPair>)> {
    loop {
        let before = point.state().batches().await.unwrap();
        let mut held = Vec::new();
        for batch in &before {
            held.push((batch.clone(), point.state().pairs_of_batch(batch.number, 10_000).await.unwrap()));
        }
        if point.state().batches().await.unwrap() == before {
            return held;
        }
    }
}
