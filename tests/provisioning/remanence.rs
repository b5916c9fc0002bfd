//! Data remanence: after a device is complete and its batch is shredded, the test searches all remaining bytes for the key, and
//! tries the old disk with the current HSM. Without shredding the same search must find the key; otherwise the search proves
//! nothing.

use std::path::Path;

use spp::hsm::{HsmError, KeyReloadRequest, StoredKey};
use spp::keypool::{Marks, PoolRules, ShredOrder};
use spp::store::{KeyStorage, SessionReader as _, SledStateStore};
use spp_format::keys::{DevicePrivateKey, KeyType};

use spp_testkit::point::device::{Kind, TestDevice};
use spp_testkit::point::{SMALL, TestBed};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pooled_pair_is_unrecoverable_only_after_shredding() {
    unrecoverable_after_shredding(Kind::Pooled, KeyStorage::Wrapped).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_pair_is_unrecoverable_only_after_shredding() {
    unrecoverable_after_shredding(Kind::Phone, KeyStorage::Wrapped).await;
}

async fn unrecoverable_after_shredding(kind: Kind, storage: KeyStorage) {
    let testbed = TestBed::new().await;
    for shreds in [false, true] {
        let pools = [(KeyType::P256, Marks { low: 1, high: 4 })].into();
        let mut point = testbed.point_with(PoolRules { storage, pools, ..PoolRules::default() });
        point.wait_until_filled(4).await;
        let mut device = TestDevice::new(&testbed, kind, 1);
        let session = device.assemble(&point).await.unwrap().session;
        // A copy of the disk, as a thief or a backup has it, from before completion.
        let old = point.copy_state("old");
        let Some(StoredKey::Wrapped(stored_key)) = point.state().stored_key(&session).await.unwrap() else {
            panic!("not wrapped")
        };
        let package = device.device.package().unwrap();
        let private = package.key_pair.as_ref().unwrap();
        device.complete(&point).await.unwrap();
        if shreds {
            let shredded = point.pool().shred(&ShredOrder::default(), |_, _| ()).await.unwrap();
            assert_eq!(shredded.batches, 1);
        }

        point.stop();
        let places = [point.state_directory(), point.public_directory(), testbed.tokens()];
        for (what, bytes) in [("scalar", scalar(private)), ("PKCS#8", pkcs8(private))] {
            assert!(places.iter().all(|place| !is_below(place, &bytes)), "its {what} is on the disk in clear");
        }
        let found = places.iter().any(|place| is_below(place, &stored_key.blob));
        assert_eq!(found, !shreds, "its wrapped form, after shredding: {shreds}");
        assert!(is_below(&old, &stored_key.blob), "the old copy has it");

        let old = SledStateStore::open(&old, &SMALL).unwrap();
        let of_old = old.stored_key(&session).await.unwrap().unwrap();
        let order = KeyReloadRequest { pair: Some((private.public().clone(), of_old)), derivations: Vec::new() };
        match testbed.hsm.reload_keys(&order).await {
            Ok(held) => {
                assert!(!shreds, "the HSM has opened what was shredded");
                assert_eq!(scalar(&held.pair.unwrap()), scalar(private));
            }
            Err(HsmError::Absent(why)) => assert!(shreds && why.contains("was destroyed"), "{why}"),
            Err(error) => panic!("{error}"),
        }
        point.start();
    }
}

/// On-token pairs: after C_DestroyObject the old copy of the store refers to a missing object.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_token_pair_is_destroyed_after_completion() {
    let testbed = TestBed::new().await;
    let pools = [(KeyType::P256, Marks { low: 1, high: 4 })].into();
    let mut point = testbed.point_with(PoolRules { storage: KeyStorage::Hsm, pools, ..PoolRules::default() });
    point.wait_until_filled(4).await;
    let mut device = TestDevice::new(&testbed, Kind::Pooled, 1);
    let session = device.assemble(&point).await.unwrap().session;
    let stored_key = point.state().stored_key(&session).await.unwrap().unwrap();
    let package = device.device.package().unwrap();
    let private = package.key_pair.as_ref().unwrap();
    let order = KeyReloadRequest { pair: Some((private.public().clone(), stored_key)), derivations: Vec::new() };
    testbed.hsm.reload_keys(&order).await.expect("it is there as long as the device is on the line");
    device.complete(&point).await.unwrap();
    point.wait_until("it is destroyed", async || point.pool().status().await.unwrap().pairs_to_destroy == 0).await;
    let refused = testbed.hsm.reload_keys(&order).await.err().unwrap();
    assert!(matches!(refused, HsmError::Absent(_)), "{refused}");
    point.stop();
    for place in [point.state_directory(), point.public_directory(), testbed.tokens()] {
        assert!(!is_below(&place, &scalar(private)) && !is_below(&place, &pkcs8(private)));
    }
    point.start();
}

fn scalar(private: &DevicePrivateKey) -> Vec<u8> {
    private.secrets()[0].expose().clone()
}

/// PrivateKeyInfo (RFC 5958) of a P-256 scalar without its public key, as HSMs wrap it.
fn pkcs8(private: &DevicePrivateKey) -> Vec<u8> {
    let head = "3041020100301306072a8648ce3d020106082a8648ce3d030107042730250201010420";
    [hex::decode(head).unwrap(), scalar(private)].concat()
}

/// Whether a file below the directory contains the bytes.
fn is_below(directory: &Path, bytes: &[u8]) -> bool {
    std::fs::read_dir(directory).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => is_below(&path, bytes),
            false => memchr::memmem::find(&std::fs::read(&path).unwrap(), bytes).is_some(),
        }
    })
}
