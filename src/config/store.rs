//! `[store]` of `sppd.toml`: the state store and the public database.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use serde::Deserialize;
use spp_format::file_format::Faults;

use crate::store::StoreOptions;

/// Directories and disk options of the stores.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// The state store's directory.
    pub state: PathBuf,
    /// The public database's directory.
    pub public: PathBuf,
    /// Options of the state store.
    pub state_options: StoreOptions,
    /// Options of the public database. Its free-space floor is half of the state store's, so that reserved sessions can still be
    /// published when no new session is admitted.
    pub public_options: StoreOptions,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StoreShape {
    state: PathBuf,
    public: PathBuf,
    #[serde(default = "default_floor")]
    free_space_floor: ByteSize,
    #[serde(default = "default_reserve")]
    reserve: ByteSize,
    #[serde(default = "default_cache")]
    cache: ByteSize,
}

const fn default_floor() -> ByteSize {
    ByteSize::mib(256)
}

const fn default_reserve() -> ByteSize {
    ByteSize::mib(64)
}

const fn default_cache() -> ByteSize {
    ByteSize::mib(16)
}

impl StoreConfig {
    /// Path of the file that records a PIN refused by an HSM. `hsm` is its name, `None` for the first one. The file is in the
    /// directory of the state store, which the daemon can write in any case.
    pub fn pin_refused(&self, hsm: Option<&str>) -> PathBuf {
        self.state.join(hsm.map_or_else(|| "pin-refused.json".to_owned(), |name| format!("pin-refused-{name}.json")))
    }
}

pub(super) fn check(shape: &StoreShape, place: &str, base: &Path, faults: &mut Faults) -> StoreConfig {
    let (state, public) = (base.join(&shape.state), base.join(&shape.public));
    if state == public {
        faults.add(format!("{place}: store"), "state and public must be different directories");
    }
    let options = |floor_bytes| StoreOptions {
        floor_bytes,
        reserve_bytes: shape.reserve.as_u64(),
        cache_bytes: shape.cache.as_u64(),
    };
    let floor = shape.free_space_floor.as_u64();
    StoreConfig { state, public, state_options: options(floor), public_options: options(floor / 2) }
}
