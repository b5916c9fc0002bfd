//! Parses `hsm.toml`, which names the token of a ceremony. A ceremony needs no daemon configuration.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use spp_format::file_format::{Faults, read_toml};

use crate::hsm::{ModuleProfile, PinSource, TokenIdentity};

/// The token of a ceremony.
pub struct HsmFile {
    /// PKCS#11 module.
    pub module: ModuleProfile,
    /// Token label and serial number.
    pub token: TokenIdentity,
    /// Source of the user PIN.
    pub pin: PinSource,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shape {
    module: PathBuf,
    #[serde(default)]
    directory: PathBuf,
    token_label: String,
    #[serde(default)]
    token_serial: String,
    pin_file: PathBuf,
}

impl HsmFile {
    /// Reads the file; paths in it are relative to its directory.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        let place = path.display().to_string();
        let mut faults = Faults::default();
        let text = faults.note(&place, std::fs::read_to_string(path)).unwrap_or_default();
        let shape: Option<Shape> = if faults.is_empty() { read_toml(&place, &text, &mut faults) } else { None };
        let base = path.parent().unwrap_or(Path::new(""));
        let absolute = |relative: &Path| std::path::absolute(base.join(relative));
        let value = shape.and_then(|shape| {
            let directory = faults.note(&place, absolute(&shape.directory))?;
            let module = faults.merge(ModuleProfile::load(&base.join(&shape.module), &directory));
            let pin = PinSource::File(faults.note(&place, absolute(&shape.pin_file))?);
            faults.note(format!("{place}: pin_file"), pin.check());
            let token = TokenIdentity { label: shape.token_label, serial: shape.token_serial };
            Some(Self { module: module?, token, pin })
        });
        faults.into_result(value)
    }
}
