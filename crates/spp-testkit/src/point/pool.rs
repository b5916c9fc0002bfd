//! What must be true of a pool of key pairs at rest.

use std::collections::BTreeSet;

use spp::hsm::HeldKeyOrder;
use spp::keys::{PublicKey, StoreId, StoredKey};
use spp::store::{Batch, BatchState, HeldPair, Holder, KeyStorage, SecretStore as _};

use super::Point;
use super::device::OnTheLine;

/// Everything that must be true of a pool at rest: store and token name the same, every pair can be opened and belongs to its
/// public half, none is in two places, none was ever made that is not accounted for.
pub async fn assert_pool_is_whole(point: &Point<'_>, delivered: &[&OnTheLine]) {
    let hsm = &point.house.hsm;
    let (store, _) = point.state().origin().await.unwrap();
    // The pool's own task may be in the middle of ending a batch.
    point
        .until("store and token agree", async || {
            let own = hsm.own_objects().await.unwrap();
            let batches = point.state().batches().await.unwrap();
            let on_token: BTreeSet<_> =
                own.keys.iter().filter(|key| key.store == store).map(|key| key.number).collect();
            let wrapped = batches.iter().filter(|batch| batch.keeping == KeyStorage::Wrapped);
            let destroyed = point.state().condemned(1).await.unwrap().is_empty();
            let settled = destroyed && batches.iter().all(|b| matches!(b.state, BatchState::Open | BatchState::Sealed));
            settled && on_token == wrapped.map(|batch| batch.number).collect::<BTreeSet<_>>()
        })
        .await;
    // Its tasks may also be rewrapping: what was looked at then is looked at again.
    let ready = loop {
        let before = point.state().batches().await.unwrap();
        let looked = ready_keys(point, store).await;
        match looked {
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

/// The public keys of ready pairs, after each pair was opened and found to be in one place.
async fn ready_keys(point: &Point<'_>, store: StoreId) -> Result<BTreeSet<Vec<u8>>, String> {
    let hsm = &point.house.hsm;
    let own = hsm.own_objects().await.unwrap();
    let mut pairs_on_token: BTreeSet<_> =
        own.pairs.into_iter().filter(|(batch, _)| batch.store == store).map(|(_, pair)| pair).collect();
    let (mut public_keys, mut ready) = (BTreeSet::new(), BTreeSet::new());
    for (batch, held) in at_one_moment(point).await {
        assert_eq!(held.len() as u64, batch.ready + batch.reserved);
        for pair in held {
            let public = PublicKey::from_spki_der(&pair.public_key).unwrap();
            if !public_keys.insert(pair.public_key.clone()) {
                return Err("a pair is in two places".to_owned());
            }
            if matches!(pair.holder, Holder::Ready(_)) {
                ready.insert(pair.public_key);
            }
            if let StoredKey::OnToken(on_token) = &pair.kept
                && !pairs_on_token.remove(on_token)
            {
                return Err(format!("{on_token:?} is not on the token"));
            }
            let order = HeldKeyOrder { pair: Some((public.clone(), pair.kept)), derivations: Vec::new() };
            let opened = hsm.held_keys(&order).await.map_err(|error| error.to_string())?;
            assert_eq!(opened.pair.unwrap().public(), &public);
        }
    }
    if pairs_on_token.is_empty() { Ok(ready) } else { Err(format!("nothing names these pairs: {pairs_on_token:?}")) }
}

/// All batches with their pairs, looked at while nothing was changed: the pool's tasks may be moving some.
async fn at_one_moment(point: &Point<'_>) -> Vec<(Batch, Vec<HeldPair>)> {
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
