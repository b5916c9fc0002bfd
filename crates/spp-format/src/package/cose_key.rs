//! Private and symmetric keys as COSE_Key (RFC 9052 §7, RFC 9053 §7, RFC 8230 §4), encoded and decoded without extra copies.

use super::symmetric_key::SymmetricKey;
use super::{PackageError, package_error};
use crate::cbor::{MapReader, Reader, Writer};
use crate::keys::{DevicePrivateKey, KeyError, KeyType, PrivateParts, PublicKey, RsaPrivateParts};
use crate::secret::SecretBytes;

/// `kty`, RFC 9052 Table 4.
const KTY: i64 = 1;
/// `kid`, RFC 9052 Table 4.
const KID: i64 = 2;
/// Key types, RFC 9053 Table 17 and RFC 8230 Table 3.
const OKP: i64 = 1;
const EC2: i64 = 2;
const RSA: i64 = 3;
const SYMMETRIC: i64 = 4;
/// Curves, RFC 9053 Table 18.
const CRV_P256: i64 = 1;
const CRV_P384: i64 = 2;
const CRV_ED25519: i64 = 6;

const PRIVATE_KEY: &str = "private key (9)";
const SYMMETRIC_KEYS: &str = "symmetric keys (10)";

/// Encodes a key pair including its private key.
pub(super) fn write_pair(out: &mut Writer, pair: &DevicePrivateKey) -> Result<(), PackageError> {
    let public = pair.public().key_bits();
    // Exposed to write into the package, whose buffer is wiped.
    match pair.parts() {
        PrivateParts::Ec(d) => {
            let (curve, size) = if pair.public().kind() == KeyType::P384 { (CRV_P384, 48) } else { (CRV_P256, 32) };
            let (x, y) = public.get(1..).and_then(|xy| xy.split_at_checked(size)).ok_or_else(mismatch)?;
            if d.expose().len() > size || y.len() != size {
                return Err(mismatch());
            }
            out.map(5).int(KTY).int(EC2).int(-1).int(curve).int(-2).bytes(x).int(-3).bytes(y);
            out.int(-4).padded_bytes(d.expose(), size);
        }
        PrivateParts::Ed25519(seed) => {
            out.map(4).int(KTY).int(OKP).int(-1).int(CRV_ED25519).int(-2).bytes(public).int(-4).bytes(seed.expose());
        }
        PrivateParts::Rsa(rsa) => {
            let (n, e) = pair.public().rsa_components().ok_or_else(mismatch)?;
            out.map(9).int(KTY).int(RSA).int(-1).bytes(&n).int(-2).bytes(&e);
            for (label, number) in (3..).zip([&rsa.d, &rsa.p, &rsa.q, &rsa.dp, &rsa.dq, &rsa.qinv]) {
                out.int(-label).bytes(without_leading_zeros(number.expose()));
            }
        }
    }
    Ok(())
}

/// Decodes a key pair; rejects a private key that does not match the public key.
pub(super) fn read_pair(reader: &mut Reader<'_>) -> Result<DevicePrivateKey, PackageError> {
    let mut map = reader.map().map_err(package_error(PRIVATE_KEY))?;
    let kty = map.required_int(KTY).map_err(package_error(PRIVATE_KEY))?;
    let key = match kty {
        EC2 => read_ec(&mut map),
        OKP => read_okp(&mut map),
        RSA => read_rsa(&mut map),
        other => {
            return Err(package_error(PRIVATE_KEY)(format!(
                "unsupported key type {other}: expected 1 (OKP), 2 (EC2) or 3 (RSA)"
            )));
        }
    }?;
    map.end().map_err(package_error(PRIVATE_KEY))?;
    Ok(key)
}

/// Encodes a symmetric key; its purpose is the `kid`.
pub(super) fn write_symmetric(out: &mut Writer, key: &SymmetricKey) {
    // Exposed to write into the package, whose buffer is wiped.
    out.map(3).int(KTY).int(SYMMETRIC).int(KID).bytes(key.purpose().as_bytes()).int(-1).bytes(key.key().expose());
}

/// Decodes a symmetric key.
pub(super) fn read_symmetric(reader: &mut Reader<'_>) -> Result<SymmetricKey, PackageError> {
    let field = SYMMETRIC_KEYS;
    let mut map = reader.map().map_err(package_error(field))?;
    if map.required_int(KTY).map_err(package_error(field))? != SYMMETRIC {
        return Err(package_error(field)("unsupported key type: expected 4 (symmetric)"));
    }
    let purpose = map.required_bytes(KID).map_err(package_error(field))?;
    let purpose = std::str::from_utf8(purpose).map_err(|_| package_error(field)("a purpose (kid) is not text"))?;
    let key = SecretBytes::copy_of(map.required_bytes(-1).map_err(package_error(field))?);
    map.end().map_err(package_error(field))?;
    SymmetricKey::new(purpose, key)
}

fn read_ec(map: &mut MapReader<'_, '_>) -> Result<DevicePrivateKey, PackageError> {
    let (kind, size) = match map.required_int(-1).map_err(package_error(PRIVATE_KEY))? {
        CRV_P256 => (KeyType::P256, 32),
        CRV_P384 => (KeyType::P384, 48),
        other => {
            return Err(package_error(PRIVATE_KEY)(format!(
                "unsupported curve {other}: expected 1 (P-256) or 2 (P-384)"
            )));
        }
    };
    let mut number = |label| {
        let bytes = map.required_bytes(label).map_err(package_error(PRIVATE_KEY))?;
        if bytes.len() == size {
            Ok(bytes)
        } else {
            Err(package_error(PRIVATE_KEY)(format!("{label} is not {size} bytes long")))
        }
    };
    let (x, y, d) = (number(-2)?, number(-3)?, number(-4)?);
    let public = PublicKey::from_ec_point(kind, &[&[4], x, y].concat()).map_err(key_error)?;
    DevicePrivateKey::from_parts(public, PrivateParts::Ec(SecretBytes::copy_of(d))).map_err(key_error)
}

fn read_okp(map: &mut MapReader<'_, '_>) -> Result<DevicePrivateKey, PackageError> {
    if map.required_int(-1).map_err(package_error(PRIVATE_KEY))? != CRV_ED25519 {
        return Err(package_error(PRIVATE_KEY)("unsupported OKP curve: expected 6 (Ed25519)"));
    }
    let x = map.required_bytes(-2).map_err(package_error(PRIVATE_KEY))?;
    let seed = SecretBytes::copy_of(map.required_bytes(-4).map_err(package_error(PRIVATE_KEY))?);
    let public = PublicKey::from_ed25519(x).map_err(key_error)?;
    DevicePrivateKey::from_parts(public, PrivateParts::Ed25519(seed)).map_err(key_error)
}

fn read_rsa(map: &mut MapReader<'_, '_>) -> Result<DevicePrivateKey, PackageError> {
    // RFC 8230 §4: minimal length, so no leading zeros.
    let mut number = |label| match map.required_bytes(label).map_err(package_error(PRIVATE_KEY))? {
        bytes @ [first, ..] if *first != 0 => Ok(bytes),
        _ => Err(package_error(PRIVATE_KEY)(format!("{label} is zero or has leading zeros"))),
    };
    let public = PublicKey::from_rsa(number(-1)?, number(-2)?).map_err(key_error)?;
    let mut secret = |label| number(label).map(SecretBytes::copy_of);
    let parts = RsaPrivateParts {
        d: secret(-3)?,
        p: secret(-4)?,
        q: secret(-5)?,
        dp: secret(-6)?,
        dq: secret(-7)?,
        qinv: secret(-8)?,
    };
    DevicePrivateKey::from_parts(public, PrivateParts::Rsa(Box::new(parts))).map_err(key_error)
}

fn without_leading_zeros(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    &number[zeros..]
}

fn key_error(source: KeyError) -> PackageError {
    PackageError::Key { field: PRIVATE_KEY, source }
}

fn mismatch() -> PackageError {
    key_error(KeyError::Mismatch)
}
