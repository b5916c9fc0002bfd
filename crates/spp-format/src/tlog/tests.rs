use std::collections::HashMap;

use ct_merkle::mem_backed_tree::MemoryBackedTree;
use proptest::prelude::*;
use sha2::Sha256;

use super::testing::LocalSigner;
use super::*;

/// A tree and its full tiles.
struct TestTree {
    tree: Tree,
    full: HashMap<TileId, Vec<u8>>,
}

impl HashSource for TestTree {
    fn tile(&self, tile: TileId) -> Result<Vec<u8>, String> {
        let partial = || self.tree.partial(tile).map(<[u8]>::to_vec);
        self.full.get(&tile.as_full()).cloned().or_else(partial).ok_or_else(|| format!("{tile} not found"))
    }
}

fn entry(n: u64) -> Vec<u8> {
    format!("entry {n}").into_bytes()
}

fn grown(size: u64) -> TestTree {
    let mut grown = TestTree { tree: Tree::default(), full: HashMap::new() };
    for n in 0..size {
        grown.full.extend(grown.tree.push(leaf_hash(&entry(n))).into_iter().map(|full| (full.id, full.hashes)));
    }
    grown
}

/// The same tree by an independent implementation.
fn oracle(size: u64) -> MemoryBackedTree<Sha256, Vec<u8>> {
    let mut tree = MemoryBackedTree::new();
    (0..size).for_each(|n| tree.push(entry(n)));
    tree
}

#[test]
fn root_matches_rfc_6962() {
    let mut tree = Tree::default();
    let mut other = MemoryBackedTree::<Sha256, Vec<u8>>::new();
    for n in 0..1100 {
        assert_eq!(tree.root().as_slice(), other.root().as_bytes().as_slice(), "of {n}");
        tree.push(leaf_hash(&entry(n)));
        other.push(entry(n));
    }
}

#[test]
fn tile_widths_match_specification() {
    // 70,000 entries: 273 full tiles and one of 112, one full and one of 17, one of 1.
    let grown = grown(70_000);
    let full = |level| grown.full.keys().filter(|tile| tile.kind() == TileKind::Hashes(level)).count();
    assert_eq!((full(0), full(1), full(2)), (273, 1, 0));
    assert!(grown.full.values().all(|hashes| hashes.len() == 8192));
    let width = |level, index| TileId::in_tree(TileKind::Hashes(level), index, 70_000).map(|tile| tile.width());
    assert_eq!((width(0, 273), width(1, 1), width(2, 0)), (Some(112), Some(17), Some(1)));
    assert_eq!((width(0, 274), width(1, 2), width(3, 0)), (None, None, None));
    assert_eq!(TileId::in_tree(TileKind::Hashes(1), 0, 256).unwrap().width(), 1);
    for (level, index, width) in [(0, 273, 112), (1, 1, 17), (2, 0, 1)] {
        let tile = TileId::in_tree(TileKind::Hashes(level), index, 70_000).unwrap();
        assert_eq!(grown.tree.partial(tile).unwrap().len(), width * 32);
    }
}

#[test]
fn tile_path_has_one_form() {
    for path in
        ["tile/0/000", "tile/0/x001/x234/067.p/8", "tile/63/255", "tile/entries/x001/000", "tile/entries/000.p/255"]
    {
        assert_eq!(path.parse::<TileId>().unwrap().to_string(), path);
    }
    for wrong in [
        "",
        "tile",
        "tile/0",
        "tile/64/000",
        "tile/256/000",
        "tile/0/0",
        "tile/0/000.p/0",
        "tile/0/000.p/00",
        "tile/0/000.p/256",
        "tile/0/000.p/08",
        "tile/0/001/000",
        "tile/0/x000/001",
        "tile/00/001",
        "tile/0/1000",
        "tile/data/000",
        "tile/8/0/000",
        "/tile/0/000",
        "tile/0/000/",
        "tile/0/../000",
        "tile/-1/000",
        "tile/0/+01",
        "tile/0/x999/x999/x999/x999/x999/x999/x999/x999/x999/x999/999",
    ] {
        assert!(wrong.parse::<TileId>().is_err(), "{wrong}");
    }
}

#[test]
fn tree_read_from_tiles_is_equal() {
    for size in [0, 1, 255, 256, 257, 511, 512, 65_535, 65_536, 65_537] {
        let grown = grown(size);
        assert_eq!(Tree::read(size, &grown).unwrap(), grown.tree, "of {size}");
    }
}

/// A source that has full tiles only, like a log's directory.
struct FullTilesOnly(TestTree);

impl HashSource for FullTilesOnly {
    fn tile(&self, tile: TileId) -> Result<Vec<u8>, String> {
        self.0.full.get(&tile.as_full()).cloned().ok_or_else(|| format!("{tile} not found"))
    }
}

#[test]
fn tree_of_full_bundles_is_read_from_full_tiles() {
    for size in [256, 512, 65_536 - 256, 65_536, 65_536 + 512] {
        let full = FullTilesOnly(grown(size));
        assert_eq!(Tree::read(size, &full).unwrap(), full.0.tree, "of {size}");
    }
}

#[test]
fn inclusion_proof_verifies_for_each_tree_size() {
    let signer = LocalSigner::new("log.example/test");
    for size in [1, 2, 3, 7, 8, 9, 255, 256, 257, 600] {
        let grown = grown(size);
        let checkpoint = signer.checkpoint(&grown.tree);
        for index in [0, 1, size / 2, size.saturating_sub(2), size - 1].into_iter().filter(|index| *index < size) {
            let proof = LogProof::new(index, prove_inclusion(&grown.tree, index, &grown).unwrap(), &checkpoint);
            let read = LogProof::from_bytes(&proof.to_bytes()).unwrap();
            assert_eq!(read, proof);
            let verified = read.verify(&entry(index), signer.key()).unwrap();
            let last = verified.steps.last().map_or(verified.leaf, |step| step.hash);
            assert_eq!(last, checkpoint.root(), "steps of {index} in {size} do not end in the root");
            assert!(read.verify(&entry(index + 1), signer.key()).is_err());
        }
    }
}

#[test]
fn proof_of_older_tree_is_created_from_newer_tiles() {
    let (newer, old) = (grown(700), grown(300));
    let tree = Tree::read(300, &newer).unwrap();
    assert_eq!(tree, old.tree);
    let hashes = prove_inclusion(&tree, 17, &newer).unwrap();
    let other = oracle(300).prove_inclusion(17);
    assert_eq!(hashes.concat(), other.as_bytes());
}

#[test]
fn forged_checkpoint_is_rejected() {
    let (signer, other) = (LocalSigner::new("log.example/test"), LocalSigner::new("log.example/test"));
    let elsewhere = LocalSigner::new("log.example/other");
    let grown = grown(10);
    let note = signer.checkpoint(&grown.tree).note().to_vec();
    assert!(SignedCheckpoint::verify(&note, signer.key()).is_ok());
    assert!(matches!(SignedCheckpoint::verify(&note, other.key()), Err(TlogError::NotSigned(_))));
    assert!(matches!(SignedCheckpoint::verify(&note, elsewhere.key()), Err(TlogError::OtherLog { .. })));
    let text = String::from_utf8(note.clone()).unwrap();
    let enlarged = text.replacen("\n10\n", "\n11\n", 1);
    assert!(matches!(SignedCheckpoint::verify(enlarged.as_bytes(), signer.key()), Err(TlogError::BadSignature(_))));
    for at in 0..note.len() {
        let mut flipped = note.clone();
        flipped[at] ^= 1;
        assert!(SignedCheckpoint::verify(&flipped, signer.key()).is_err(), "byte {at}");
    }
}

#[test]
fn vkey_round_trips_and_malformed_is_rejected() {
    // The example of C2SP signed-note.
    let vkey = "example.com/foo+530d903a+Ac2sNGQ1vL8Q6qn1Vn6C/hrOLhRZXt7pj/lJHnVDl6V6";
    let signer = LocalSigner::new("log.example/test");
    let own = signer.key().to_string();
    assert_eq!(own.parse::<LogKey>().unwrap(), *signer.key());
    for wrong in [
        "",
        "a+b",
        vkey,
        &own.replace("log.example", "log.example2"),
        &own.replacen('+', "+0", 1),
        &own[..own.len() - 4],
    ] {
        assert!(wrong.parse::<LogKey>().is_err(), "{wrong}");
    }
    assert!(own.parse::<WitnessKey>().is_err(), "a log's key is not a witness's");
    for wrong in ["", "https://log.example", "log.example/", "log example", "log+example"] {
        assert!(wrong.parse::<Origin>().is_err(), "{wrong}");
    }
}

#[test]
fn bundle_decodes_exact_number_of_entries() {
    let mut bytes = Vec::new();
    for entry in [b"".as_slice(), b"one", &[7; bundle::MAX_ENTRY]] {
        bundle::push(&mut bytes, entry).unwrap();
    }
    assert!(bundle::push(&mut bytes, &vec![0; bundle::MAX_ENTRY + 1]).is_err());
    assert_eq!(bundle::decode_exactly(&bytes, 3).unwrap()[1], b"one");
    assert!(bundle::decode_exactly(&bytes, 2).is_err());
    assert!(bundle::decode_exactly(&bytes[..bytes.len() - 1], 3).is_err());
}

#[test]
fn malformed_proof_is_rejected() {
    let signer = LocalSigner::new("log.example/test");
    let grown = grown(5);
    let checkpoint = signer.checkpoint(&grown.tree);
    let proof = LogProof::new(2, prove_inclusion(&grown.tree, 2, &grown).unwrap(), &checkpoint);
    let text = String::from_utf8(proof.to_bytes()).unwrap();
    assert!(text.starts_with("c2sp.org/tlog-proof@v1\nindex 2\n"));
    let with_extra = text.replacen("\nindex", "\nextra AAAA\nindex", 1);
    assert!(LogProof::from_bytes(with_extra.as_bytes()).unwrap().verify(&entry(2), signer.key()).is_ok());
    for (from, to) in [("@v1", "@v2"), ("index 2", "index 02"), ("index 2", "index -2"), ("\n\n", "\n"), ("=", "")] {
        assert!(LogProof::from_bytes(text.replacen(from, to, 1).as_bytes()).is_err(), "{from} -> {to}");
    }
    let other_index = text.replacen("index 2", "index 3", 1);
    let refused = LogProof::from_bytes(other_index.as_bytes()).unwrap().verify(&entry(2), signer.key());
    assert!(matches!(refused, Err(TlogError::WrongProof { .. })));
}

proptest! {
    #![proptest_config(spp_test_support::random::cases(64, 3200))]

    #[test]
    fn proofs_match_independent_implementation(size in 1u64..900, at in 0.0f64..1.0, old in 0.0f64..1.0) {
        let (grown, other) = (grown(size), oracle(size));
        let index = ((size as f64) * at) as u64;
        let inclusion = prove_inclusion(&grown.tree, index, &grown).unwrap();
        let expected = other.prove_inclusion(index as usize);
        prop_assert_eq!(inclusion.concat(), expected.as_bytes());

        let old = (((size as f64) * old) as u64).max(1);
        let proof = prove_consistency(&grown.tree, old, &grown).unwrap();
        let before = Tree::read(old, &grown).unwrap();
        let (now, then) = ((size, grown.tree.root()), (old, before.root()));
        prop_assert!(check_consistency(&proof, now, then).is_ok());
        prop_assert!(check_consistency(&proof, now, (old, [7; 32])).is_err());
        prop_assert!(check_consistency(&proof, (size, [7; 32]), then).is_err());
        if let Some(first) = proof.first() {
            let mut forged = proof.clone();
            forged[0] = first.map(|byte| byte ^ 1);
            prop_assert!(check_consistency(&forged, now, then).is_err());
        }
    }

    #[test]
    fn arbitrary_bytes_are_not_a_proof(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(LogProof::from_bytes(&bytes).is_err());
        let _ = bundle::entries(&bytes).count();
        let _ = String::from_utf8_lossy(&bytes).parse::<TileId>();
    }
}
