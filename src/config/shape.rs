//! Parses `sppd.toml` into its shape, which is not validated yet.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use spp_format::file_format::{Faults, read_toml};
use spp_format::keys::sha256;

use super::approvals::ApprovalsShape;
use super::audit::AuditShape;
use super::hsm::HsmShapes;
use super::key_pool::KeyPoolShape;
use super::listen::Listen;
use super::log::LogConfig;
use super::public::PublicConfig;
use super::registry::RegistryShape;
use super::settings::Settings;
use super::stations::StationShape;
use super::store::StoreShape;
use super::tls::TlsShape;

/// The file. Its sections are validated separately.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Shape {
    pub(super) profiles: PathBuf,
    pub(super) node: NodeShape,
    pub(super) listen: Listen,
    pub(super) tls: TlsShape,
    pub(super) hsm: HsmShapes,
    pub(super) store: StoreShape,
    pub(super) registry: RegistryShape,
    #[serde(default)]
    pub(super) public: PublicConfig,
    #[serde(default)]
    pub(super) sessions: SessionsShape,
    #[serde(default)]
    pub(super) keypool: KeyPoolShape,
    #[serde(default)]
    pub(super) station: Vec<StationShape>,
    #[serde(default)]
    pub(super) log: LogConfig,
    #[serde(default)]
    pub(super) audit: AuditShape,
    #[serde(default)]
    pub(super) approvals: ApprovalsShape,
    /// SHA-256 of the file.
    #[serde(skip)]
    pub(super) fingerprint: [u8; 32],
    #[serde(skip)]
    pub(super) settings: Settings,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NodeShape {
    pub(super) name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct SessionsShape {
    #[serde(with = "humantime_serde")]
    pub(super) lifetime: Duration,
}

impl Default for SessionsShape {
    fn default() -> Self {
        Self { lifetime: Duration::from_secs(24 * 60 * 60) }
    }
}

pub(super) fn read_shape(path: &Path, place: &str, faults: &mut Faults) -> Option<Shape> {
    let text = faults.note(place, std::fs::read_to_string(path))?;
    let shape: Shape = read_toml(place, &text, faults)?;
    Some(Shape { fingerprint: sha256(text.as_bytes()), settings: Settings::parse(&text), ..shape })
}

/// The directory at which relative paths of a file start.
pub(super) fn base_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
