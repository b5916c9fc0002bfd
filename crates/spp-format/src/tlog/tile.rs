//! Identifiers and paths of tiles and entry bundles (C2SP tlog-tiles, APIs).

use std::fmt;
use std::str::FromStr;

use super::TlogError;

/// Number of hashes in a full tile and of entries in a full bundle.
pub const FULL_WIDTH: u16 = 256;

/// Maximum index of a tile or bundle: no log has more than 2^56 entries.
const MAX_INDEX: u64 = 1 << 48;

/// The content of a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TileKind {
    /// Hashes of a tile level. Level 0 has the leaf hashes.
    Hashes(u8),
    /// Entries.
    Entries,
}

/// A tile of hashes, or a bundle of entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TileId {
    kind: TileKind,
    index: u64,
    width: u16,
}

impl TileId {
    /// The ID of a full tile.
    pub const fn full(kind: TileKind, index: u64) -> Self {
        Self { kind, index, width: FULL_WIDTH }
    }

    /// The tile in a tree of this size: full, partial, or `None`.
    pub fn in_tree(kind: TileKind, index: u64, size: u64) -> Option<Self> {
        let of_level = match kind {
            TileKind::Hashes(level) => size.checked_shr(8 * u32::from(level)).unwrap_or(0),
            TileKind::Entries => size,
        };
        let left = of_level.checked_sub(index.checked_mul(u64::from(FULL_WIDTH))?)?;
        let width = u16::try_from(left).unwrap_or(FULL_WIDTH).min(FULL_WIDTH);
        (width > 0).then_some(Self { kind, index, width })
    }

    /// The content of the tile.
    pub const fn kind(&self) -> TileKind {
        self.kind
    }

    /// The tile's index within its kind, from 0.
    pub const fn index(&self) -> u64 {
        self.index
    }

    /// Number of hashes or entries, 1 to 256.
    pub const fn width(&self) -> u16 {
        self.width
    }

    /// Whether the tile is full; full tiles never change.
    pub const fn is_full(&self) -> bool {
        self.width == FULL_WIDTH
    }

    /// The full tile with the same index.
    #[must_use]
    pub const fn as_full(&self) -> Self {
        Self::full(self.kind, self.index)
    }
}

/// The path below the log's prefix: `tile/0/x001/x234/067.p/8`.
impl fmt::Display for TileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            TileKind::Hashes(level) => write!(f, "tile/{level}/")?,
            TileKind::Entries => f.write_str("tile/entries/")?,
        }
        let mut groups = vec![format!("{:03}", self.index % 1000)];
        let mut rest = self.index / 1000;
        while rest > 0 {
            groups.push(format!("x{:03}", rest % 1000));
            rest /= 1000;
        }
        groups.reverse();
        f.write_str(&groups.join("/"))?;
        if self.is_full() { Ok(()) } else { write!(f, ".p/{}", self.width) }
    }
}

impl FromStr for TileId {
    type Err = TlogError;
    /// Accepts only the form that [`fmt::Display`] writes.
    fn from_str(path: &str) -> Result<Self, TlogError> {
        let wrong = || TlogError::malformed("tile path", "expected tile/LEVEL/INDEX or tile/entries/INDEX");
        let rest = path.strip_prefix("tile/").filter(|rest| rest.len() <= 64).ok_or_else(wrong)?;
        let (kind, rest) = rest.split_once('/').ok_or_else(wrong)?;
        let kind = match kind {
            "entries" => TileKind::Entries,
            level => TileKind::Hashes(level.parse().ok().filter(|level| *level < 64).ok_or_else(wrong)?),
        };
        let (groups, width) = match rest.split_once(".p/") {
            Some((groups, width)) => (groups, width.parse().map_err(|_| wrong())?),
            None => (rest, FULL_WIDTH),
        };
        let mut index = 0u64;
        for group in groups.split('/') {
            let digits: u64 = group.strip_prefix('x').unwrap_or(group).parse().map_err(|_| wrong())?;
            index = index.checked_mul(1000).and_then(|index| index.checked_add(digits)).ok_or_else(wrong)?;
        }
        let tile = Self { kind, index, width };
        let fits = index <= MAX_INDEX && (1..=FULL_WIDTH).contains(&width) && tile.to_string() == path;
        if fits { Ok(tile) } else { Err(wrong()) }
    }
}
