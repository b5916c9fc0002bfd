//! Sites with pools of key pairs, and inspection of their stores.

use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use der::{Decode as _, Encode as _};
use spp::config::StoreConfig;
use spp::store::{BatchPair, PairAssignment, SecretStore as _, SledStateStore};
use spp_proto::{AssembleRequest, AssembleResponse, GetPoolStatusRequest, GetPoolStatusResponse};
use tonic::Status;
use tonic_types::StatusExt as _;

use crate::devices::{Line, assemble, is_retryable, phone};
use crate::site::Site;
use crate::wait::eventually;

/// The `sppctl` options for the officer listener.
pub fn officer(site: &Site) -> String {
    format!("--server https://127.0.0.1:{} --tls tls/officer", site.officer)
}

/// Creates a site with an additional profile `pooled`: a phone whose P-256 pair comes from a pool with these marks.
pub fn pooled_site(low: u64, high: u64) -> Site {
    let site = Site::new();
    add_profile(&site, "pooled", "phone", &[("source = \"generate\"", "source = \"pool\"")]);
    add_pool(&site, "p256", low, high);
    site
}

/// Adds a copy of the profile `like` with these edits; line-1/a may use it.
pub fn add_profile(site: &Site, name: &str, like: &str, edits: &[(&str, &str)]) {
    let file = format!("profiles/{name}.toml");
    std::fs::copy(site.path(&format!("profiles/{like}.toml")), site.path(&file)).unwrap();
    // A product of its own: two with the same constant attributes could give two devices one subject.
    site.edit(&file, "common_name = \"Example", &format!("common_name = \"{name}"));
    edits.iter().for_each(|(from, to)| site.edit(&file, from, to));
    site.edit("sppd.toml", "\"router\"", &format!("\"router\", \"{name}\""));
}

/// Makes the profile `router` take RSA pairs from its pool, as in the demo; RSA pairs are slow to generate.
pub fn use_rsa_routers(site: &Site) {
    site.edit("profiles/router.toml", "ed25519", "rsa-2048");
    site.edit("sppd.toml", "ed25519", "rsa-2048");
}

pub fn add_pool(site: &Site, kind: &str, low: u64, high: u64) {
    let pool = format!("[[keypool.pool]]\nkind = \"{kind}\"\nlow = {low}\nhigh = {high}\n\n[[station]]");
    site.edit("sppd.toml", "[[station]]", &pool);
}

/// The order for device `n` with a pooled pair.
pub fn pooled(n: u64) -> AssembleRequest {
    AssembleRequest { profile: "pooled".to_owned(), ..phone(n) }
}

/// Repeats the order while the refusal is retryable, with the delay of the refusal.
pub async fn assemble_with_retries(line: &mut Line, order: &AssembleRequest) -> AssembleResponse {
    loop {
        match assemble(line, order).await {
            Ok(answer) => return answer,
            Err(status) => {
                assert!(is_retryable(&status), "failed for good: {status:?}");
                tokio::time::sleep(retry_delay(&status).unwrap_or(Duration::from_millis(50))).await;
            }
        }
    }
}

/// The retry delay of a refusal.
pub fn retry_delay(status: &Status) -> Option<Duration> {
    status.get_error_details().retry_info().and_then(|retry| retry.retry_delay)
}

/// The public key of an X.509 certificate, SubjectPublicKeyInfo in DER.
pub fn public_key(certificate: &[u8]) -> Vec<u8> {
    let certificate = x509_cert::Certificate::from_der(certificate).unwrap();
    certificate.tbs_certificate().subject_public_key_info().to_der().unwrap()
}

/// Waits until the pool status meets the condition.
pub async fn wait_for_pools(
    site: &Site,
    what: &str,
    condition: impl Fn(&GetPoolStatusResponse) -> bool,
) -> GetPoolStatusResponse {
    let mut officer = site.officer().await;
    eventually(what, async || {
        let status = officer.get_pool_status(GetPoolStatusRequest {}).await.unwrap().into_inner();
        if condition(&status) { Ok(status) } else { Err((status, site.log())) }
    })
    .await
}

/// Whether every pool has enough pairs and is not being filled.
pub fn is_full(status: &GetPoolStatusResponse) -> bool {
    status.serving && status.kinds.iter().all(|kind| !kind.filling && kind.ready >= kind.low)
}

/// Whether nothing remains to be filled, shredded or destroyed.
pub fn is_idle(status: &GetPoolStatusResponse) -> bool {
    let kinds = status.kinds.iter().all(|kind| kind.next_shred.is_none());
    let sessions = status.session_next_shred.is_none() && status.pairs_to_destroy == 0;
    is_full(status) && kinds && sessions && status.error.is_empty()
}

/// Opens the state store of a stopped daemon.
pub fn open_store(site: &Site) -> SledStateStore {
    let store = StoreConfig::load(&site.path("sppd.toml")).unwrap();
    SledStateStore::open(&store.state, &store.state_options).unwrap()
}

/// All pairs of a store with their assignments.
pub async fn all_pairs(store: &SledStateStore) -> Vec<BatchPair> {
    let mut all = Vec::new();
    for batch in store.batches().await.unwrap() {
        let held = store.pairs_of_batch(batch.number, 1_000_000).await.unwrap();
        let ready = held.iter().filter(|pair| matches!(pair.assignment, PairAssignment::Ready(_))).count() as u64;
        assert_eq!((batch.ready, batch.reserved), (ready, held.len() as u64 - ready), "{batch:?}");
        all.extend(held);
    }
    let keys: HashSet<_> = all.iter().map(|pair| &pair.public_key).collect();
    assert_eq!(keys.len(), all.len(), "a pair is in the store twice");
    all
}

/// The public keys of ready pairs.
pub fn ready_keys(pairs: &[BatchPair]) -> BTreeSet<Vec<u8>> {
    let ready = pairs.iter().filter(|pair| matches!(pair.assignment, PairAssignment::Ready(_)));
    ready.map(|pair| pair.public_key.clone()).collect()
}
