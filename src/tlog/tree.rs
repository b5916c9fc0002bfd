//! The Merkle tree (RFC 6962 §2.1): what appending needs of it, and proofs from its tiles.

use std::cell::RefCell;

use tlog_tiles::tile::Tile;
use tlog_tiles::tlog::{self, EMPTY_HASH, HASH_SIZE, Hash, HashReader};

use super::{FULL_WIDTH, TileId, TileKind, TlogError, TreeHash};

/// Levels of the tree that a tile spans.
const HEIGHT: u8 = 8;

/// A tree, by its right edge: of each level of tiles the hashes that do not fill a tile yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    size: u64,
    /// By level, each below 256 hashes of 32 bytes.
    edge: Vec<Vec<u8>>,
}

/// A tile that an append has filled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FullTile {
    /// Which.
    pub id: TileId,
    /// 256 hashes.
    pub hashes: Vec<u8>,
}

/// Where hashes of a tree are read: whole tiles, of which a partial one may be the beginning of a wider one.
pub trait HashSource {
    /// The hashes of a tile, at least as many as it is wide.
    fn tile(&self, tile: TileId) -> Result<Vec<u8>, String>;
}

impl Tree {
    /// The tree of that size, its right edge read from the tiles: from partial ones where the source has them, else from the full ones
    /// below.
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
                    return Err(TlogError::Unreadable(format!("{tile} has only {} bytes", hashes.len())));
                }
                hashes.truncate(width * HASH_SIZE);
            }
            tree.edge.push(hashes);
        }
        Ok(tree)
    }

    /// Entries.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Appends a leaf; gives the tiles that it fills, lowest first.
    pub fn push(&mut self, leaf: TreeHash) -> Vec<FullTile> {
        let mut full = Vec::new();
        let mut carried = Some(leaf);
        let mut level = 0;
        while let Some(hash) = carried.take() {
            if self.edge.len() == level {
                self.edge.push(Vec::new());
            }
            // The level exists: it was just made if it did not.
            let Some(hashes) = self.edge.get_mut(level) else { break };
            hashes.extend_from_slice(&hash);
            if hashes.len() == usize::from(FULL_WIDTH) * HASH_SIZE {
                let hashes = std::mem::take(hashes);
                carried = Some(Tile::subtree_hash(&hashes).0);
                let kind = TileKind::Hashes(u8::try_from(level).unwrap_or(u8::MAX));
                let index = self.size >> (8 * (level + 1));
                full.push(FullTile { id: TileId::full(kind, index), hashes });
            }
            level += 1;
        }
        self.size += 1;
        full
    }

    /// The root; that of the empty tree is SHA-256 of nothing.
    pub fn root(&self) -> TreeHash {
        // The largest complete subtrees of a tree lie in the partial tiles of its edge, and their hashes, from right to left,
        // are hashed into the root (RFC 6962 §2.1).
        let nothing = |_| Err("it is not of the edge".to_owned());
        let reader = Reader { tree: self, tiles: &nothing, problem: RefCell::default() };
        tlog::tree_hash(self.size, &reader).unwrap_or(EMPTY_HASH).0
    }

    /// The hashes of a tile that is not full yet, as far as they are there.
    pub fn partial(&self, tile: TileId) -> Option<&[u8]> {
        let TileKind::Hashes(level) = tile.kind() else { return None };
        let of_level = self.size.checked_shr(u32::from(HEIGHT) * u32::from(level))?;
        let hashes = self.edge.get(usize::from(level))?;
        (tile.index() == of_level / u64::from(FULL_WIDTH)).then_some(hashes)
    }
}

/// The hashes of a tile, each that of a full tile of the level below.
fn hashes_of_full(below: u8, tile: TileId, tiles: &impl HashSource) -> Result<Vec<u8>, String> {
    let first = tile.index() * u64::from(FULL_WIDTH);
    let hash = |index| tiles.tile(TileId::full(TileKind::Hashes(below), index)).map(|full| Tile::subtree_hash(&full).0);
    (first..first + u64::from(tile.width())).map(hash).collect::<Result<Vec<_>, _>>().map(|hashes| hashes.concat())
}

/// The proof that the tree has the entry: from its sibling up to the root's child (RFC 6962 §2.1.1).
pub fn prove_inclusion(tree: &Tree, index: u64, tiles: &impl HashSource) -> Result<Vec<TreeHash>, TlogError> {
    read_through(tree, tiles, |reader| tlog::prove_record(tree.size, index, reader))
}

/// The proof that the tree of `old` entries is the beginning of this one (RFC 6962 §2.1.2). Empty for an empty tree.
pub fn prove_consistency(tree: &Tree, old: u64, tiles: &impl HashSource) -> Result<Vec<TreeHash>, TlogError> {
    match old {
        0 => Ok(Vec::new()),
        old => read_through(tree, tiles, |reader| tlog::prove_tree(tree.size, old, reader)),
    }
}

/// Checks such a proof.
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

fn read_through<'a, T: HashSource>(
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

/// Hashes by their place in the tree: from its edge, or from tiles.
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
            let tile = TileId::in_tree(kind, needed.level_index(), self.tree.size).ok_or("it is not in the tree")?;
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
