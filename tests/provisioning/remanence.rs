//! Deleted means gone: after a device is complete and its batch is shredded, every byte that is left anywhere is looked at, and
//! the old disk is tried with the HSM of today. The same without the shredding must find the key: else the search is worth nothing.

use std::path::Path;

use spp::hsm::{HeldKeyOrder, HsmError};
use spp::keypool::{Marks, PoolRules, ShredOrder};
use spp::keys::{DevicePrivateKey, KeyKind, StoredKey};
use spp::store::{KeyStorage, SledStateStore, StateStore as _};

use spp_testkit::point::device::{Kind, OnTheLine};
use spp_testkit::point::{House, SMALL};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_made_in_advance_is_gone_after_its_shredding_and_not_before() {
    gone_after_shredding(Kind::Pooled, KeyStorage::Wrapped).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_made_on_the_spot_is_gone_after_its_shredding_and_not_before() {
    gone_after_shredding(Kind::Phone, KeyStorage::Wrapped).await;
}

async fn gone_after_shredding(kind: Kind, keeping: KeyStorage) {
    let house = House::new().await;
    for shreds in [false, true] {
        let pools = [(KeyKind::P256, Marks { low: 1, high: 4 })].into();
        let mut point = house.point_with(PoolRules { keeping, pools, ..PoolRules::default() });
        point.filled(4).await;
        let mut device = OnTheLine::new(&house, kind, 1);
        let session = device.assemble(&point).await.unwrap().session;
        // The disk as a thief or a backup has it: while the device was on the line.
        let old = point.copy_of_state("old");
        let Some(StoredKey::Wrapped(kept)) = point.state().kept_key(&session).await.unwrap() else {
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
        let places = [point.state_directory(), point.public_directory(), house.tokens()];
        for (what, bytes) in [("scalar", scalar(private)), ("PKCS#8", pkcs8(private))] {
            assert!(places.iter().all(|place| !is_below(place, &bytes)), "its {what} is on the disk in clear");
        }
        let found = places.iter().any(|place| is_below(place, &kept.blob));
        assert_eq!(found, !shreds, "its wrapped form, after shredding: {shreds}");
        assert!(is_below(&old, &kept.blob), "the old copy has it");

        let old = SledStateStore::open(&old, &SMALL).unwrap();
        let of_old = old.kept_key(&session).await.unwrap().unwrap();
        let order = HeldKeyOrder { pair: Some((private.public().clone(), of_old)), derivations: Vec::new() };
        match house.hsm.held_keys(&order).await {
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

/// On the token: C_DestroyObject, and the old copy of the store names what is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_on_the_token_is_gone_once_its_device_is_complete() {
    let house = House::new().await;
    let pools = [(KeyKind::P256, Marks { low: 1, high: 4 })].into();
    let mut point = house.point_with(PoolRules { keeping: KeyStorage::Hsm, pools, ..PoolRules::default() });
    point.filled(4).await;
    let mut device = OnTheLine::new(&house, Kind::Pooled, 1);
    let session = device.assemble(&point).await.unwrap().session;
    let kept = point.state().kept_key(&session).await.unwrap().unwrap();
    let package = device.device.package().unwrap();
    let private = package.key_pair.as_ref().unwrap();
    let order = HeldKeyOrder { pair: Some((private.public().clone(), kept)), derivations: Vec::new() };
    house.hsm.held_keys(&order).await.expect("it is there as long as the device is on the line");
    device.complete(&point).await.unwrap();
    point.until("it is destroyed", async || point.pool().status().await.unwrap().condemned == 0).await;
    let refused = house.hsm.held_keys(&order).await.err().unwrap();
    assert!(matches!(refused, HsmError::Absent(_)), "{refused}");
    point.stop();
    for place in [point.state_directory(), point.public_directory(), house.tokens()] {
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

/// Whether the bytes are in any file below the directory.
fn is_below(directory: &Path, bytes: &[u8]) -> bool {
    std::fs::read_dir(directory).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => is_below(&path, bytes),
            false => memchr::memmem::find(&std::fs::read(&path).unwrap(), bytes).is_some(),
        }
    })
}
