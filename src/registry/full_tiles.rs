//! Reads the full tiles and entry bundles of a directory.

use std::path::Path;
use std::{fs, io};

use spp_format::tlog::{FULL_WIDTH, HashSource, TileId, TreeHash};

/// Entries of a full bundle.
pub(super) const BUNDLE: u64 = FULL_WIDTH as u64;

/// The full tiles of a directory.
pub(super) struct FullTiles<'a>(pub(super) &'a Path);

impl FullTiles<'_> {
    pub(super) fn read(&self, tile: TileId) -> io::Result<Vec<u8>> {
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
