//! Defines the paths of the files that a mirror has for each chip.

use spp_format::keys::sha256;
use spp_format::names::ChipId;

/// The name of the directory below `chip/` that has the files of a chip.
pub fn shard(chip: &ChipId) -> String {
    let mut shard = hex::encode(sha256(chip.as_bytes()));
    shard.truncate(3);
    shard
}

/// The directory of a mirror with the files of each chip.
pub(super) const CHIPS: &str = "chip";

/// The paths of a chip's record and proof in a mirror.
pub fn chip_files(chip: &ChipId) -> (String, String) {
    let shard = shard(chip);
    (format!("{CHIPS}/{shard}/{chip}.cbor"), format!("{CHIPS}/{shard}/{chip}.tlog-proof"))
}
