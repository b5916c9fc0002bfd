//! Enrolment: TLS certificates of stations, officers and the daemon itself, signed by the access key in the HSM.

use std::path::{Path, PathBuf};

use super::ceremony::random_serial;
use super::files::{make_directory, must_be_new, write_new, write_new_private};
use super::{OfficerError, now};
use crate::certificate::{AccessCertificate, AccessName, IssuerCertificate, access_certificate};
use crate::config::HsmAccess;
use crate::hsm::{Ceremony, KeyRegister, SigningUse};
use crate::keys::{SignatureAlgorithm, generate_p256_pkcs8};

/// Who is enrolled, for how long, and where the files go.
pub struct Enrolment {
    /// Who.
    pub name: AccessName,
    /// Days until the certificate ends.
    pub days: u32,
    /// A directory; `certificate.pem`, `key.pem` and `ca.pem` in it must not exist.
    pub out: PathBuf,
}

/// Makes a key pair in this process and a certificate signed in the HSM, and writes both.
pub fn enroll(access: &HsmAccess, register: &KeyRegister, enrolment: &Enrolment) -> Result<Vec<PathBuf>, OfficerError> {
    let key = register.signing.iter().find(|key| key.use_ == SigningUse::Access).ok_or_else(|| {
        OfficerError::Other("the register has no access key; run a ceremony with [access_ca]".to_owned())
    })?;
    let paths = ["certificate.pem", "key.pem", "ca.pem"].map(|name| enrolment.out.join(name));
    paths.iter().try_for_each(|path| must_be_new(path))?;
    let kind = key.public_key.kind();
    let algorithm = SignatureAlgorithm::default_for(kind);
    let ca_pem = read(&key.certificate)?;
    let issuer = IssuerCertificate::from_pem(&ca_pem, algorithm)?;

    let (public, private_pem) = generate_p256_pkcs8()?;
    let token = Ceremony::open(&access.module, &register.token, &access.pin)?;
    let not_before = now();
    let document = access_certificate(&AccessCertificate {
        name: &enrolment.name,
        public_key: &public,
        issuer: &issuer,
        serial: random_serial(&token)?,
        not_before,
        not_after: not_before + u64::from(enrolment.days) * 24 * 60 * 60,
    })?;
    let signature = token.sign(&key.name, &key.id, kind, document.algorithm(), document.to_be_signed())?;
    let certificate = document.assemble(&signature)?.to_pem()?;

    make_directory(&enrolment.out)?;
    let [certificate_path, key_path, ca_path] = &paths;
    // Exposed to be written where only its owner may read it.
    write_new_private(key_path, private_pem.expose())?;
    write_new(certificate_path, certificate.as_bytes())?;
    write_new(ca_path, ca_pem.as_bytes())?;
    Ok(paths.to_vec())
}

fn read(path: &Path) -> Result<String, OfficerError> {
    std::fs::read_to_string(path).map_err(|e| OfficerError::Other(format!("{}: {e}", path.display())))
}
