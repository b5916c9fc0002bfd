//! Simulated fab: derives the keys of all its chips from one silicon seed, so that one secret file serves a whole wafer.
//!
//! For tests, trials and load generation. In real silicon each chip key is random or comes from a PUF.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use spp_format::cbor::{CborError, Reader, Writer};
use spp_format::keys::PublicKey;
use spp_format::names::ChipId;
use spp_format::package::{TransportCurve, TransportPrivateKey};
use spp_format::secret::{Secret, SecretBytes};
use spp_format::tlog::LogKey;

use super::chip::{derive, derive_p256};
use super::{Chip, ChipKey, Device, DeviceError, Flash, Rom};

const FILE: &str = "fab.cbor";
const MAX_FILE_LEN: usize = 2048;

/// A simulated fab: the silicon seed and the ROM content, which is the manufacturer's public key and the log key.
pub struct SimulatedFab {
    directory: PathBuf,
    seed: Secret<[u8; 32]>,
    manufacturer: PublicKey,
    log: Option<LogKey>,
}

impl SimulatedFab {
    /// Creates a fab with a new seed in a directory that has none.
    ///
    /// # Errors
    /// If a fab exists (overwriting it would make its devices unrecoverable), or the file cannot be written.
    pub fn create(
        directory: impl Into<PathBuf>,
        manufacturer: PublicKey,
        log: Option<LogKey>,
    ) -> Result<Self, DeviceError> {
        let directory = directory.into();
        let path = directory.join(FILE);
        let mut seed = Secret::new([0; 32]);
        aws_lc_rs::rand::fill(seed.expose_mut())
            .map_err(|_| DeviceError::Derivation("the provider's random number generator failed".into()))?;
        let fab = Self { directory, seed, manufacturer, log };
        let bytes = fab.encode().ok_or_else(|| fab_error(&path, "the manufacturer's key is too large"))?;
        std::fs::create_dir_all(&fab.directory).map_err(file_error("creating the directory of", &path))?;
        let mut file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(fab_error(&path, "already exists; open it, or choose another directory"));
            }
            opened => opened.map_err(file_error("creating", &path))?,
        };
        // Exposed to write it to a file that only its owner can read.
        file.write_all(bytes.expose()).and_then(|()| file.sync_all()).map_err(file_error("writing", &path))?;
        Ok(fab)
    }

    /// Opens a fab.
    ///
    /// # Errors
    /// If there is none, other users can read the file, or it is damaged.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, DeviceError> {
        let directory = directory.into();
        let path = directory.join(FILE);
        let file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(fab_error(&path, "not found; create it first"));
            }
            opened => opened.map_err(file_error("opening", &path))?,
        };
        let mode = file.metadata().map_err(file_error("reading", &path))?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(fab_error(&path, &format!("readable by other users (mode {:o}); run chmod 600", mode & 0o777)));
        }
        let mut bytes = SecretBytes::new(Vec::with_capacity(MAX_FILE_LEN + 1));
        // Exposed to append; within its capacity, so it is never reallocated.
        file.take(MAX_FILE_LEN as u64).read_to_end(bytes.expose_mut()).map_err(file_error("reading", &path))?;
        let (seed, spki, vkey) = decode(bytes.expose()).map_err(|e| fab_error(&path, &format!("damaged: {e}")))?;
        let manufacturer = PublicKey::from_spki_der(spki).map_err(|e| fab_error(&path, &format!("damaged: {e}")))?;
        let log = vkey.map(str::parse).transpose().map_err(|e| fab_error(&path, &format!("damaged: {e}")))?;
        Ok(Self { directory, seed, manufacturer, log })
    }

    /// The chip with this ID; deterministic. `curve` is the curve of its transport key, if it has one.
    ///
    /// # Errors
    /// If the provider fails.
    pub fn chip(&self, chip: &ChipId, curve: Option<TransportCurve>) -> Result<Chip, DeviceError> {
        let key = ChipKey::burn_in(derive(&self.seed, "chip key", chip, 0)?);
        let transport = curve.map(|curve| self.transport_key(chip, curve)).transpose()?;
        let rom = Rom { chip: chip.clone(), manufacturer: self.manufacturer.clone(), log: self.log.clone() };
        Ok(Chip::new(rom, key, transport))
    }

    /// The chip with this ID and its flash, `<chip ID>.flash` in the fab's directory.
    ///
    /// # Errors
    /// If the provider fails.
    pub fn device(&self, chip: &ChipId, curve: Option<TransportCurve>) -> Result<Device, DeviceError> {
        let flash = Flash::new(self.directory.join(format!("{chip}.flash")));
        Ok(Device::new(self.chip(chip, curve)?, flash))
    }

    fn transport_key(&self, chip: &ChipId, curve: TransportCurve) -> Result<TransportPrivateKey, DeviceError> {
        let bytes = match curve {
            TransportCurve::P256 => derive_p256(&self.seed, "transport key P-256", chip)?.0,
            // Exposed to copy it into another type.
            TransportCurve::X25519 => {
                SecretBytes::copy_of(derive(&self.seed, "transport key X25519", chip, 0)?.expose())
            }
        };
        Ok(TransportPrivateKey::from_bytes(curve, &bytes)?)
    }

    /// The keys in the ROM of its chips.
    pub const fn rom_keys(&self) -> (&PublicKey, Option<&LogKey>) {
        (&self.manufacturer, self.log.as_ref())
    }

    /// The file of a chip's receipt, next to its flash.
    pub fn receipt_path(&self, chip: &ChipId) -> PathBuf {
        self.directory.join(format!("{chip}.tlog-proof"))
    }

    /// `{1: seed, 2: SubjectPublicKeyInfo, ? 3: vkey of the log}`.
    fn encode(&self) -> Option<SecretBytes> {
        let mut out = Writer::with_limit(MAX_FILE_LEN);
        // Exposed to write into a buffer that is wiped.
        let vkey = self.log.as_ref().map(ToString::to_string);
        out.map(if vkey.is_some() { 3 } else { 2 });
        out.int(1).bytes(self.seed.expose()).int(2).bytes(self.manufacturer.spki_der());
        if let Some(vkey) = &vkey {
            out.int(3).text(vkey);
        }
        out.finish()
    }
}

type FabFile<'a> = (Secret<[u8; 32]>, &'a [u8], Option<&'a str>);

fn decode(bytes: &[u8]) -> Result<FabFile<'_>, CborError> {
    let mut reader = Reader::new(bytes);
    let mut map = reader.map()?;
    let bytes = map.required_bytes(1)?;
    let mut seed = Secret::new([0; 32]);
    if bytes.len() != seed.expose().len() {
        return Err(CborError::OutOfRange);
    }
    seed.expose_mut().copy_from_slice(bytes);
    let spki = map.required_bytes(2)?;
    let vkey = if map.key(3)? { Some(map.reader.text()?) } else { None };
    map.end()?;
    reader.end()?;
    Ok((seed, spki, vkey))
}

fn fab_error(path: &Path, problem: &str) -> DeviceError {
    DeviceError::SimulatedFab { path: path.to_owned(), problem: problem.to_owned() }
}

fn file_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DeviceError {
    let path = path.to_owned();
    move |source| DeviceError::File { operation, path, source }
}
