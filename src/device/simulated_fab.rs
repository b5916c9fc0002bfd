//! A simulated fab: makes chips whose keys are a function of one silicon seed, so that a wafer needs one secret file.
//!
//! For tests, trials and load. In real silicon each chip key is random, or a physical function of the chip.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use super::chip::{derive, derive_p256};
use super::{Chip, ChipKey, Device, DeviceError, Flash, Rom};
use crate::keys::PublicKey;
use crate::names::ChipId;
use crate::package::cbor::{CborError, Reader, Writer};
use crate::package::{TransportCurve, TransportPrivateKey};
use crate::secret::{Secret, SecretBytes};
use crate::tlog::LogKey;

const FILE: &str = "fab.cbor";
const MAX_FILE_LEN: usize = 2048;

/// A fab: a silicon seed, and what goes into the ROMs: the manufacturer's public key, and the log's.
pub struct SimulatedFab {
    directory: PathBuf,
    seed: Secret<[u8; 32]>,
    manufacturer: PublicKey,
    log: Option<LogKey>,
}

impl SimulatedFab {
    /// Makes a fab with a new seed in a directory that has none.
    ///
    /// # Errors
    /// If there is a fab already (its devices could not be recovered any more), or the file cannot be written.
    pub fn create(
        directory: impl Into<PathBuf>,
        manufacturer: PublicKey,
        log: Option<LogKey>,
    ) -> Result<Self, DeviceError> {
        let directory = directory.into();
        let path = directory.join(FILE);
        let mut seed = Secret::new([0; 32]);
        aws_lc_rs::rand::fill(seed.expose_mut())
            .map_err(|_| DeviceError::Derivation("the provider has no random numbers".into()))?;
        let fab = Self { directory, seed, manufacturer, log };
        let bytes = fab.encoded().ok_or_else(|| trouble(&path, "the manufacturer's key is too large"))?;
        std::fs::create_dir_all(&fab.directory).map_err(file_error("creating the directory of", &path))?;
        let mut file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(trouble(&path, "it is there already; open it, or choose another directory"));
            }
            opened => opened.map_err(file_error("creating", &path))?,
        };
        // Exposed to be written to the owner's file.
        file.write_all(bytes.expose()).and_then(|()| file.sync_all()).map_err(file_error("writing", &path))?;
        Ok(fab)
    }

    /// Opens a fab.
    ///
    /// # Errors
    /// If there is none, others than its owner may read it, or it is damaged.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, DeviceError> {
        let directory = directory.into();
        let path = directory.join(FILE);
        let file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(trouble(&path, "there is none; create it first"));
            }
            opened => opened.map_err(file_error("opening", &path))?,
        };
        let mode = file.metadata().map_err(file_error("reading", &path))?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(trouble(&path, &format!("others may read it (mode {:o}); chmod 600 it", mode & 0o777)));
        }
        let mut bytes = SecretBytes::new(Vec::with_capacity(MAX_FILE_LEN + 1));
        // Exposed to be filled; within its capacity, so it is never moved.
        file.take(MAX_FILE_LEN as u64).read_to_end(bytes.expose_mut()).map_err(file_error("reading", &path))?;
        let (seed, spki, vkey) = decoded(bytes.expose()).map_err(|e| trouble(&path, &format!("damaged: {e}")))?;
        let manufacturer = PublicKey::from_spki_der(spki).map_err(|e| trouble(&path, &format!("damaged: {e}")))?;
        let log = vkey.map(str::parse).transpose().map_err(|e| trouble(&path, &format!("damaged: {e}")))?;
        Ok(Self { directory, seed, manufacturer, log })
    }

    /// The chip with this ID; always the same one. `curve` is the one of its transport key, if it has any.
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
        let flash = Flash::at(self.directory.join(format!("{chip}.flash")));
        Ok(Device::new(self.chip(chip, curve)?, flash))
    }

    fn transport_key(&self, chip: &ChipId, curve: TransportCurve) -> Result<TransportPrivateKey, DeviceError> {
        let bytes = match curve {
            TransportCurve::P256 => derive_p256(&self.seed, "transport key P-256", chip)?.0,
            // Exposed to change hands.
            TransportCurve::X25519 => {
                SecretBytes::copy_of(derive(&self.seed, "transport key X25519", chip, 0)?.expose())
            }
        };
        Ok(TransportPrivateKey::from_bytes(curve, &bytes)?)
    }

    /// What its chips have in ROM.
    pub const fn rom_keys(&self) -> (&PublicKey, Option<&LogKey>) {
        (&self.manufacturer, self.log.as_ref())
    }

    /// Where a chip's receipt is kept, beside its flash.
    pub fn receipt_file(&self, chip: &ChipId) -> PathBuf {
        self.directory.join(format!("{chip}.tlog-proof"))
    }

    /// `{1: seed, 2: SubjectPublicKeyInfo, ? 3: vkey of the log}`.
    fn encoded(&self) -> Option<SecretBytes> {
        let mut out = Writer::with_limit(MAX_FILE_LEN);
        // Exposed to be written into a buffer that is wiped.
        let vkey = self.log.as_ref().map(ToString::to_string);
        out.map(if vkey.is_some() { 3 } else { 2 });
        out.int(1).bytes(self.seed.expose()).int(2).bytes(self.manufacturer.spki_der());
        if let Some(vkey) = &vkey {
            out.int(3).text(vkey);
        }
        out.finish()
    }
}

type Decoded<'a> = (Secret<[u8; 32]>, &'a [u8], Option<&'a str>);

fn decoded(bytes: &[u8]) -> Result<Decoded<'_>, CborError> {
    let mut reader = Reader::new(bytes);
    let mut map = reader.map()?;
    let found = if map.key(1)? { map.reader.bytes()? } else { return Err(CborError::MissingKey(1)) };
    let mut seed = Secret::new([0; 32]);
    if found.len() != seed.expose().len() {
        return Err(CborError::OutOfRange);
    }
    seed.expose_mut().copy_from_slice(found);
    let spki = if map.key(2)? { map.reader.bytes()? } else { return Err(CborError::MissingKey(2)) };
    let vkey = if map.key(3)? { Some(map.reader.text()?) } else { None };
    map.end()?;
    reader.end()?;
    Ok((seed, spki, vkey))
}

fn trouble(path: &Path, problem: &str) -> DeviceError {
    DeviceError::SimulatedFab { path: path.to_owned(), problem: problem.to_owned() }
}

fn file_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DeviceError {
    let path = path.to_owned();
    move |source| DeviceError::File { doing, path, source }
}
