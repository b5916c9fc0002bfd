//! Reads the full tiles and entry bundles of a directory.

use std::path::Path;
use std::{fs, io};

use spp_format::tlog::{FULL_WIDTH, HashSource, TileId, TreeHash};

/// Entries of a full bundle.
pub const BUNDLE: u64 = FULL_WIDTH as u64;

/// The full tiles of a directory.
pub struct FullTiles<'a>(pub &'a Path);

impl FullTiles<'_> {
    /// Reads a full tile; for a partial tile the full one at its place.
    pub fn read(&self, tile: TileId) -> io::Result<Vec<u8>> {
        fs::read(self.0.join(tile.as_full().to_string()))
    }
}

impl HashSource for FullTiles<'_> {
    fn tile(&self, tile: TileId) -> Result<Vec<u8>, String> {
        let bytes = self.read(tile).map_err(|e| format!("{}: {e}", tile.as_full()))?;
        match bytes.len() == usize::from(FULL_WIDTH) * size_of::<TreeHash>() {
            true => Ok(bytes),
            false => Err(format!("{}: unexpected length {} bytes", tile.as_full(), bytes.len())),
        }
    }
}
