//! The Merkle tree (RFC 6962 §2.1): appends entries, and creates and verifies proofs from tiles.

use std::cell::RefCell;

use tlog_tiles::tile::Tile;
use tlog_tiles::tlog::{self, EMPTY_HASH, HASH_SIZE, Hash, HashReader};

use super::{FULL_WIDTH, TileId, TileKind, TlogError, TreeHash};

/// Number of tree levels in a tile.
const HEIGHT: u8 = 8;

/// A Merkle tree, represented by its right edge: per tile level the hashes that do not fill a tile yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    size: u64,
    /// Per level fewer than 256 hashes of 32 bytes.
    edge: Vec<Vec<u8>>,
}

/// A tile that became full by an append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FullTile {
    /// The tile.
    pub id: TileId,
    /// 256 hashes.
    pub hashes: Vec<u8>,
}

/// A source of tiles. For a partial tile, the source may return a wider one.
pub trait HashSource {
    /// The hashes of a tile, at least as many as its width.
    fn tile(&self, tile: TileId) -> Result<Vec<u8>, String>;
}

impl Tree {
    /// Reads the right edge of a tree of this size from tiles: from partial tiles where the source has them, otherwise from the
    /// full tiles below.
    pub fn read(size: u64, tiles: &impl HashSource) -> Result<Self, TlogError> {
        let mut tree = Self { size, edge: Vec::new() };
        for level in 0.. {
            let of_level = size.checked_shr(u32::from(HEIGHT) * u32::from(level)).unwrap_or(0);
            if of_level == 0 {
                break;
            }
            let width = usize::try_from(of_level % u64::from(FULL_WIDTH)).unwrap_or(0);
            let mut hashes = Vec::new();
            if let Some(tile) = TileId::in_tree(TileKind::Hashes(level), of_level / u64::from(FULL_WIDTH), size) {
                hashes = match tiles.tile(tile) {
                    Err(_) if level > 0 => hashes_of_full(level - 1, tile, tiles),
                    read => read,
                }
                .map_err(TlogError::Unreadable)?;
                if hashes.len() < width * HASH_SIZE {
                    return Err(TlogError::Unreadable(format!(
                        "{tile}: {} bytes found, {} expected",
                        hashes.len(),
                        width * HASH_SIZE
                    )));
                }
                hashes.truncate(width * HASH_SIZE);
            }
            tree.edge.push(hashes);
        }
        Ok(tree)
    }

    /// Number of entries.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Appends a leaf hash; returns the tiles that become full, lowest level first.
    pub fn push(&mut self, leaf: TreeHash) -> Vec<FullTile> {
        let mut full = Vec::new();
        let mut carry = Some(leaf);
        let mut level = 0;
        while let Some(hash) = carry.take() {
            if self.edge.len() == level {
                self.edge.push(Vec::new());
            }
            // The level exists: it was created above if it was missing.
            let Some(hashes) = self.edge.get_mut(level) else { break };
            hashes.extend_from_slice(&hash);
            if hashes.len() == usize::from(FULL_WIDTH) * HASH_SIZE {
                let hashes = std::mem::take(hashes);
                carry = Some(Tile::subtree_hash(&hashes).0);
                let kind = TileKind::Hashes(u8::try_from(level).unwrap_or(u8::MAX));
                let index = self.size >> (8 * (level + 1));
                full.push(FullTile { id: TileId::full(kind, index), hashes });
            }
            level += 1;
        }
        self.size += 1;
        full
    }

    /// The root hash; SHA-256 of the empty string for the empty tree.
    pub fn root(&self) -> TreeHash {
        // The maximal complete subtrees lie in the partial tiles of the right edge. Their hashes, combined from right to left,
        // yield the root (RFC 6962 §2.1).
        let no_tiles = |_| Err("not in the right edge".to_owned());
        let reader = Reader { tree: self, tiles: &no_tiles, problem: RefCell::default() };
        tlog::tree_hash(self.size, &reader).unwrap_or(EMPTY_HASH).0
    }

    /// The hashes of a partial tile in the right edge.
    pub fn partial(&self, tile: TileId) -> Option<&[u8]> {
        let TileKind::Hashes(level) = tile.kind() else { return None };
        let of_level = self.size.checked_shr(u32::from(HEIGHT) * u32::from(level))?;
        let hashes = self.edge.get(usize::from(level))?;
        (tile.index() == of_level / u64::from(FULL_WIDTH)).then_some(hashes)
    }
}

/// Computes the hashes of a tile from the full tiles of the level below.
fn hashes_of_full(below: u8, tile: TileId, tiles: &impl HashSource) -> Result<Vec<u8>, String> {
    let first = tile.index() * u64::from(FULL_WIDTH);
    let hash = |index| tiles.tile(TileId::full(TileKind::Hashes(below), index)).map(|full| Tile::subtree_hash(&full).0);
    (first..first + u64::from(tile.width())).map(hash).collect::<Result<Vec<_>, _>>().map(|hashes| hashes.concat())
}

/// Creates an inclusion proof: the hashes from the leaf's sibling to a child of the root (RFC 6962 §2.1.1).
pub fn prove_inclusion(tree: &Tree, index: u64, tiles: &impl HashSource) -> Result<Vec<TreeHash>, TlogError> {
    prove_with(tree, tiles, |reader| tlog::prove_record(tree.size, index, reader))
}

/// Creates a consistency proof that the tree of `old` entries is a prefix of this one (RFC 6962 §2.1.2). Empty if `old` is 0.
pub fn prove_consistency(tree: &Tree, old: u64, tiles: &impl HashSource) -> Result<Vec<TreeHash>, TlogError> {
    match old {
        0 => Ok(Vec::new()),
        old => prove_with(tree, tiles, |reader| tlog::prove_tree(tree.size, old, reader)),
    }
}

/// Verifies a consistency proof.
pub fn check_consistency(
    proof: &[TreeHash],
    (size, root): (u64, TreeHash),
    (old_size, old_root): (u64, TreeHash),
) -> Result<(), TlogError> {
    let wrong = TlogError::WrongProof { what: "the older tree" };
    if old_size == 0 {
        return if old_root == EMPTY_HASH.0 && proof.is_empty() { Ok(()) } else { Err(wrong) };
    }
    if proof.len() > 64 {
        return Err(wrong);
    }
    let proof = proof.iter().map(|hash| Hash(*hash)).collect();
    tlog::check_tree(&proof, size, Hash(root), old_size, Hash(old_root)).map_err(|_| wrong)
}

fn prove_with<'a, T: HashSource>(
    tree: &'a Tree,
    tiles: &'a T,
    prove: impl FnOnce(&Reader<'a, '_>) -> Result<Vec<Hash>, tlog::Error>,
) -> Result<Vec<TreeHash>, TlogError> {
    let read = |tile| tiles.tile(tile);
    let reader = Reader { tree, tiles: &read, problem: RefCell::default() };
    match prove(&reader) {
        Ok(hashes) => Ok(hashes.into_iter().map(|hash| hash.0).collect()),
        Err(error) => Err(TlogError::Unreadable(reader.problem.take().unwrap_or_else(|| error.to_string()))),
    }
}

type ReadTile<'a> = dyn Fn(TileId) -> Result<Vec<u8>, String> + 'a;

/// Reads node hashes by their stored index: from the right edge, or from tiles.
struct Reader<'a, 'b> {
    tree: &'a Tree,
    tiles: &'b ReadTile<'b>,
    problem: RefCell<Option<String>>,
}

impl Reader<'_, '_> {
    fn read(&self, indexes: &[u64]) -> Result<Vec<Hash>, String> {
        let mut found: Option<(TileId, Vec<u8>)> = None;
        let mut hashes = Vec::with_capacity(indexes.len());
        for index in indexes {
            let needed = Tile::from_index(HEIGHT, *index);
            let kind = TileKind::Hashes(needed.level());
            let tile = TileId::in_tree(kind, needed.level_index(), self.tree.size).ok_or("tile not in the tree")?;
            let bytes = match found.take() {
                Some((id, bytes)) if id == tile => bytes,
                _ => match self.tree.partial(tile) {
                    Some(hashes) => hashes.to_vec(),
                    None => (self.tiles)(tile)?,
                },
            };
            hashes.push(needed.hash_at_index(&bytes, *index).map_err(|e| format!("{tile}: {e}"))?);
            found = Some((tile, bytes));
        }
        Ok(hashes)
    }
}

impl HashReader for Reader<'_, '_> {
    fn read_hashes(&self, indexes: &[u64]) -> Result<Vec<Hash>, tlog::Error> {
        self.read(indexes).map_err(|problem| {
            self.problem.replace(Some(problem));
            tlog::Error::InvalidTile
        })
    }
}
