//! The shares of a backup key: Shamir's, each in a file for one officer.

use std::convert::Infallible;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use blahaj::Sharks;
use rand_core::{TryCryptoRng, TryRng};

use super::backup::NewBackupKey;
use crate::config::open_private;
use crate::hsm::{BACKUP_KEY_LEN, BackupKey, Ceremony, backup_check_value};
use crate::keys::sha256;
use crate::names::{KeyName, OfficerName};
use crate::officer::OfficerError;
use crate::secret::SecretBytes;

const TITLE: &str = "spp key share v1";
/// Bytes of a share: the point, and the value of each byte's polynomial there.
const SHARE_LEN: usize = 1 + BACKUP_KEY_LEN as usize;
/// More than any file with a share has, whatever the names in it.
const MAX_FILE_LEN: usize = 2048;
const HEX: &[u8; 16] = b"0123456789abcdef";

/// What one officer gets.
pub(super) struct Share {
    key: KeyName,
    /// Of the key, so that shares of another one are recognised.
    check_value: Vec<u8>,
    pub(super) officer: OfficerName,
    pub(super) number: u8,
    bytes: SecretBytes,
}

/// The file with an officer's share. Names of officers may have parts.
pub(super) fn file_name(key: &KeyName, officer: &OfficerName) -> PathBuf {
    PathBuf::from(format!("{key}-{}.share", officer.as_str().replace('/', "-")))
}

/// Splits a key among the officers with random numbers of the HSM, and combines the first and the last of the shares again: whether
/// they work is known before anything is wrapped under the key.
pub(super) fn deal(
    token: &Ceremony,
    key: &SecretBytes,
    plan: &NewBackupKey,
    check_value: &[u8],
) -> Result<Vec<Share>, OfficerError> {
    // A coefficient takes a 32-bit number.
    let coefficients = BACKUP_KEY_LEN * u32::from(plan.threshold - 1);
    let mut random = Drawn { bytes: token.random_secret(4 * coefficients)?, used: 0, too_few: false };
    // Exposed to be split; the dealer wipes its polynomials.
    let dealt: Vec<_> =
        Sharks(plan.threshold).dealer_rng(key.expose(), &mut random).take(plan.officers.len()).collect();
    if random.too_few {
        return Err(OfficerError::Other("the HSM gave too few random bytes".to_owned()));
    }
    let shares = plan.officers.iter().zip(1..).zip(&dealt).map(|((officer, number), share)| Share {
        key: plan.name.clone(),
        check_value: check_value.to_vec(),
        officer: officer.clone(),
        number,
        bytes: SecretBytes::new(share.into()),
    });
    let shares: Vec<_> = shares.collect();
    let threshold = usize::from(plan.threshold);
    for some in [&shares[..threshold], &shares[shares.len() - threshold..]] {
        let again = recover(plan.threshold, some.iter().map(|share| &share.bytes))?;
        if backup_check_value(&again)? != check_value {
            return Err(OfficerError::Other(
                "the shares do not give the key again; hold the ceremony again".to_owned(),
            ));
        }
    }
    Ok(shares)
}

/// The key of a backup, of enough shares.
pub(super) fn combine(under: &BackupKey, files: &[PathBuf]) -> Result<SecretBytes, OfficerError> {
    let mut shares: Vec<Share> = Vec::new();
    for path in files {
        let share = Share::load(path)?;
        let at = path.display();
        if share.key != under.name || share.check_value != under.check_value {
            let message = format!("{at}: it is a share of another key than the {} of this backup", under.name);
            return Err(OfficerError::Other(message));
        }
        if shares.iter().any(|other| other.bytes.expose().first() == share.bytes.expose().first()) {
            let message = format!("{at}: the share {} is there twice; each counts once", share.number);
            return Err(OfficerError::Other(message));
        }
        shares.push(share);
    }
    if shares.len() < usize::from(under.threshold) {
        let message = format!(
            "{} needs {} of its {} shares, here are {}; add more of the officers' files to `shares`",
            under.name,
            under.threshold,
            under.shares,
            shares.len()
        );
        return Err(OfficerError::Other(message));
    }
    let key = recover(under.threshold, shares.iter().map(|share| &share.bytes))?;
    if backup_check_value(&key)? != under.check_value {
        let numbers: Vec<_> = shares.iter().map(|share| format!("{} ({})", share.number, share.officer)).collect();
        let message = format!(
            "the shares {} do not give the key {}: one of them is not what was given out; try others",
            numbers.join(", "),
            under.name
        );
        return Err(OfficerError::Other(message));
    }
    Ok(key)
}

fn recover<'a>(threshold: u8, shares: impl Iterator<Item = &'a SecretBytes>) -> Result<SecretBytes, OfficerError> {
    // Exposed to be combined; both copies are wiped.
    let shares: Result<Vec<_>, _> = shares.map(|share| blahaj::Share::try_from(share.expose().as_slice())).collect();
    let shares = shares.map_err(|e| OfficerError::Other(e.to_owned()))?;
    let scheme = Sharks(threshold);
    let key = scheme.recover(&shares).map_err(|e| OfficerError::Other(e.to_owned()))?;
    Ok(SecretBytes::new(key))
}

impl Share {
    /// The file's text. Its last line shows whether it was copied without a mistake.
    pub(super) fn to_text(&self) -> SecretBytes {
        // Exposed to be written down, into room that is enough: a buffer that grows leaves what was in it behind.
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
        let text =
            text.filter(|text| text.lines().next() == Some(TITLE)).ok_or_else(|| failed("is no share of a key"))?;
        let damaged = || failed("the share is damaged: its checksum does not fit; ask its officer for the original");
        let (body, sum) = text.split_once("checksum ").ok_or_else(damaged)?;
        if checksum(body.as_bytes()) != sum.trim_end() {
            return Err(damaged());
        }
        let field = |name: &str| {
            let line = body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.ok_or_else(|| failed(&format!("has no line {name}")))
        };
        let wrong = |name: &str| failed(&format!("the line {name} cannot be read"));
        let mut bytes = SecretBytes::new(vec![0; SHARE_LEN]);
        hex::decode_to_slice(field("share")?, bytes.expose_mut()).map_err(|_| wrong("share"))?;
        Ok(Self {
            key: field("key")?.parse().map_err(|_| wrong("key"))?,
            check_value: hex::decode(field("check-value")?).map_err(|_| wrong("check-value"))?,
            officer: field("officer")?.parse().map_err(|_| wrong("officer"))?,
            number: field("number")?.parse().map_err(|_| wrong("number"))?,
            bytes,
        })
    }
}

/// Against mistakes in copying, not against a forger: the key's check value finds that.
fn checksum(body: &[u8]) -> String {
    hex::encode(&sha256(body)[..8])
}

/// Random numbers that were drawn in the HSM before.
struct Drawn {
    bytes: SecretBytes,
    used: usize,
    too_few: bool,
}

impl Drawn {
    fn next<const N: usize>(&mut self) -> [u8; N] {
        // Exposed to become a polynomial.
        let next = self.bytes.expose().get(self.used..self.used + N).and_then(|bytes| bytes.try_into().ok());
        self.used += N;
        self.too_few |= next.is_none();
        next.unwrap_or([0; N])
    }
}

impl TryRng for Drawn {
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

impl TryCryptoRng for Drawn {}
