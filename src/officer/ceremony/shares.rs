//! Shamir secret sharing of backup keys: one share file per officer.

use std::convert::Infallible;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use blahaj::Sharks;
use rand_core::{TryCryptoRng, TryRng};
use spp_format::file_format::open_private;
use spp_format::keys::sha256;
use spp_format::names::{KeyName, OfficerName};
use spp_format::secret::SecretBytes;

use crate::hsm::{BACKUP_KEY_LEN, BackupKey, Ceremony, backup_check_value};
use crate::officer::OfficerError;

const TITLE: &str = "spp key share v1";
/// Length of a share in bytes: the x coordinate and one y coordinate per key byte.
const SHARE_LEN: usize = 1 + BACKUP_KEY_LEN as usize;
/// Maximum length of a share file in bytes; enough for all valid names.
const MAX_FILE_LEN: usize = 2048;
const HEX: &[u8; 16] = b"0123456789abcdef";

/// The share of one officer.
pub(super) struct Share {
    key: KeyName,
    /// Check value of the key, to detect shares of another key.
    check_value: Vec<u8>,
    pub(super) officer: OfficerName,
    pub(super) number: u8,
    bytes: SecretBytes,
}

/// File name of an officer's share. An officer's name may contain `/`, which becomes `-`.
pub(super) fn file_name(key: &KeyName, officer: &OfficerName) -> PathBuf {
    PathBuf::from(format!("{key}-{}.share", officer.as_str().replace('/', "-")))
}

/// Splits a key into shares with random numbers from the HSM. Recombines the first and the last `threshold` shares, so that
/// faulty shares are detected before anything is wrapped under the key.
pub(super) fn split(
    token: &Ceremony,
    key: &SecretBytes,
    backup_key: &BackupKey,
    officers: &[OfficerName],
) -> Result<Vec<Share>, OfficerError> {
    // One 32-bit random number per coefficient.
    let coefficients = BACKUP_KEY_LEN * u32::from(backup_key.threshold - 1);
    let mut random = HsmRandom { bytes: token.random_secret(4 * coefficients)?, used: 0, exhausted: false };
    // Exposed to be split; the dealer zeroizes its polynomials.
    let points: Vec<_> =
        Sharks(backup_key.threshold).dealer_rng(key.expose(), &mut random).take(officers.len()).collect();
    if random.exhausted {
        return Err(OfficerError::Other("the HSM returned too few random bytes".to_owned()));
    }
    let shares = officers.iter().zip(1..).zip(&points).map(|((officer, number), share)| Share {
        key: backup_key.name.clone(),
        check_value: backup_key.check_value.clone(),
        officer: officer.clone(),
        number,
        bytes: SecretBytes::new(share.into()),
    });
    let shares: Vec<_> = shares.collect();
    let threshold = usize::from(backup_key.threshold);
    for subset in [&shares[..threshold], &shares[shares.len() - threshold..]] {
        let recovered = recover(backup_key.threshold, subset.iter().map(|share| &share.bytes))?;
        if backup_check_value(&recovered)? != backup_key.check_value {
            return Err(OfficerError::Other("the shares do not reproduce the key; run the ceremony again".to_owned()));
        }
    }
    Ok(shares)
}

/// Recovers a backup key from at least `threshold` share files.
pub(super) fn combine(backup_key: &BackupKey, files: &[PathBuf]) -> Result<SecretBytes, OfficerError> {
    let mut shares: Vec<Share> = Vec::new();
    for path in files {
        let share = Share::load(path)?;
        let file = path.display();
        if share.key != backup_key.name || share.check_value != backup_key.check_value {
            let message = format!("{file}: share of another key; this backup needs shares of {}", backup_key.name);
            return Err(OfficerError::Other(message));
        }
        if shares.iter().any(|other| other.bytes.expose().first() == share.bytes.expose().first()) {
            let message = format!("{file}: duplicate of share {}; each share counts once", share.number);
            return Err(OfficerError::Other(message));
        }
        shares.push(share);
    }
    if shares.len() < usize::from(backup_key.threshold) {
        let message = format!(
            "{} needs {} of its {} shares, {} given; add more share files to `shares`",
            backup_key.name,
            backup_key.threshold,
            backup_key.shares,
            shares.len()
        );
        return Err(OfficerError::Other(message));
    }
    let key = recover(backup_key.threshold, shares.iter().map(|share| &share.bytes))?;
    if backup_check_value(&key)? != backup_key.check_value {
        let numbers: Vec<_> = shares.iter().map(|share| format!("{} ({})", share.number, share.officer)).collect();
        let message = format!(
            "shares {} do not reproduce key {}: at least one was changed; try other shares",
            numbers.join(", "),
            backup_key.name
        );
        return Err(OfficerError::Other(message));
    }
    Ok(key)
}

fn recover<'a>(threshold: u8, shares: impl Iterator<Item = &'a SecretBytes>) -> Result<SecretBytes, OfficerError> {
    // Exposed to be combined; both copies are zeroized.
    let shares: Result<Vec<_>, _> = shares.map(|share| blahaj::Share::try_from(share.expose().as_slice())).collect();
    let shares = shares.map_err(|e| OfficerError::Other(e.to_owned()))?;
    let scheme = Sharks(threshold);
    let key = scheme.recover(&shares).map_err(|e| OfficerError::Other(e.to_owned()))?;
    Ok(SecretBytes::new(key))
}

impl Share {
    /// The content of the share file. The last line is a checksum against copying errors.
    pub(super) fn to_text(&self) -> SecretBytes {
        // Exposed to be formatted. The capacity is sufficient: growing the buffer would leave an unzeroized copy behind.
        let mut text = SecretBytes::new(Vec::with_capacity(MAX_FILE_LEN));
        let body = text.expose_mut();
        let (key, check_value) = (&self.key, hex::encode(&self.check_value));
        let head = format!(
            "{TITLE}\nkey {key}\ncheck-value {check_value}\nofficer {}\nnumber {}\nshare ",
            self.officer, self.number
        );
        body.extend_from_slice(head.as_bytes());
        for byte in self.bytes.expose() {
            body.extend([byte >> 4, byte & 15].map(|digit| HEX[usize::from(digit)]));
        }
        body.push(b'\n');
        let sum = checksum(body);
        body.extend_from_slice(format!("checksum {sum}\n").as_bytes());
        text
    }

    fn load(path: &Path) -> Result<Self, OfficerError> {
        let failed = |problem: &str| OfficerError::Other(format!("{}: {problem}", path.display()));
        let file = open_private(path).map_err(|e| OfficerError::Other(e.to_string()))?;
        let mut text = SecretBytes::new(Vec::with_capacity(2 * MAX_FILE_LEN));
        let limit = u64::try_from(MAX_FILE_LEN).unwrap_or(u64::MAX) + 1;
        file.take(limit).read_to_end(text.expose_mut()).map_err(|e| failed(&e.to_string()))?;
        // Exposed to be parsed.
        let text = std::str::from_utf8(text.expose()).ok().filter(|text| text.len() <= MAX_FILE_LEN);
        let text = text.filter(|text| text.lines().next() == Some(TITLE)).ok_or_else(|| failed("not a key share"))?;
        let damaged = || failed("damaged share: wrong checksum; ask the officer for the original file");
        let (body, sum) = text.split_once("checksum ").ok_or_else(damaged)?;
        if checksum(body.as_bytes()) != sum.trim_end() {
            return Err(damaged());
        }
        let field = |name: &str| {
            let line = body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.ok_or_else(|| failed(&format!("missing line {name:?}")))
        };
        let invalid = |name: &str| failed(&format!("invalid line {name:?}"));
        let mut bytes = SecretBytes::new(vec![0; SHARE_LEN]);
        hex::decode_to_slice(field("share")?, bytes.expose_mut()).map_err(|_| invalid("share"))?;
        Ok(Self {
            key: field("key")?.parse().map_err(|_| invalid("key"))?,
            check_value: hex::decode(field("check-value")?).map_err(|_| invalid("check-value"))?,
            officer: field("officer")?.parse().map_err(|_| invalid("officer"))?,
            number: field("number")?.parse().map_err(|_| invalid("number"))?,
            bytes,
        })
    }
}

/// Detects copying errors. The key's check value detects forged shares.
fn checksum(body: &[u8]) -> String {
    hex::encode(&sha256(body)[..8])
}

/// Random bytes prefetched from the HSM.
struct HsmRandom {
    bytes: SecretBytes,
    used: usize,
    exhausted: bool,
}

impl HsmRandom {
    fn next<const N: usize>(&mut self) -> [u8; N] {
        // Exposed to become a polynomial.
        let next = self.bytes.expose().get(self.used..self.used + N).and_then(|bytes| bytes.try_into().ok());
        self.used += N;
        self.exhausted |= next.is_none();
        next.unwrap_or([0; N])
    }
}

impl TryRng for HsmRandom {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(u32::from_le_bytes(self.next()))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(u64::from_le_bytes(self.next()))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        bytes.iter_mut().for_each(|byte| [*byte] = self.next());
        Ok(())
    }
}

impl TryCryptoRng for HsmRandom {}
