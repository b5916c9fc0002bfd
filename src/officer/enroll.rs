//! Enrolment: issues TLS certificates for callers and the daemon, signed on the token by the access key.

use std::path::{Path, PathBuf};

use spp_format::certificate::{
    AccessCertificate, AccessName, IssuerCertificate, access_certificate, access_request, verify_csr_pem,
};
use spp_format::keys::{SignatureAlgorithm, TlsKey};

use super::ceremony::random_serial;
use super::files::{make_directory, must_be_new, write_new, write_new_private};
use super::{OfficerError, now};
use crate::audit::{OfflineEvent, Outcome};
use crate::config::HsmAccess;
use crate::hsm::{Ceremony, KeyManifest, SigningUse};

/// Parameters of one enrolment.
pub struct Enrolment {
    /// Subject of the certificate.
    pub name: AccessName,
    /// Validity in days.
    pub days: u32,
    /// Output directory; `certificate.pem`, `key.pem` and `ca.pem` must not exist in it.
    pub out: PathBuf,
    /// File with a certificate request; `None` generates a key.
    pub csr: Option<PathBuf>,
}

impl Enrolment {
    /// The audit event of this enrolment.
    pub fn describe(&self) -> OfflineEvent {
        let (act, name) = match &self.name {
            AccessName::Client(caller) => (format!("{}.enroll", caller.role()), caller.name().to_owned()),
            AccessName::Server { dns, ips } => {
                let ips = ips.iter().map(ToString::to_string);
                ("server.enroll".to_owned(), dns.iter().cloned().chain(ips).collect::<Vec<_>>().join(" "))
            }
        };
        let details = [("name", name), ("days", self.days.to_string()), ("out", self.out.display().to_string())];
        let details = details.map(|(name, value)| (name.to_owned(), value)).into();
        OfflineEvent { act, details, outcome: Outcome::Begun }
    }
}

/// Runs `work` and records its start and outcome beside the audit log. The daemon imports both records into the log.
pub fn record_offline<T>(
    audit: &Path,
    act: OfflineEvent,
    work: impl FnOnce() -> Result<T, String>,
) -> Result<T, String> {
    act.persist(audit).map_err(|e| e.to_string())?;
    let result = work();
    let outcome = result.as_ref().map_or_else(|cause| Outcome::Failed(cause.clone()), |_| Outcome::Done);
    OfflineEvent { outcome, ..act }.persist(audit).map_err(|e| match &result {
        Ok(_) => format!("the command succeeded, but recording it failed: {e}"),
        Err(cause) => format!("{cause}; recording it failed, too: {e}"),
    })?;
    result
}

/// Generates a key pair and a certificate request and writes both, so that the private key never leaves this machine.
pub fn request(out: &Path) -> Result<Vec<PathBuf>, OfficerError> {
    let paths = ["key.pem", "request.pem"].map(|name| out.join(name));
    paths.iter().try_for_each(|path| must_be_new(path))?;
    let key = TlsKey::generate()?;
    let document = access_request(&key)?;
    let signature = key.sign(document.to_be_signed())?;
    let request = document.assemble(&signature)?.to_pem()?;
    make_directory(out)?;
    let [key_path, request_path] = &paths;
    // Exposed to be written to a file with mode 0600.
    write_new_private(key_path, key.pem().expose())?;
    write_new(request_path, request.as_bytes())?;
    Ok(paths.to_vec())
}

/// Issues a certificate signed on the token, for the key of a request or for a key generated here, and writes the files.
pub fn enroll(access: &HsmAccess, manifest: &KeyManifest, enrolment: &Enrolment) -> Result<Vec<PathBuf>, OfficerError> {
    let key = manifest.current(SigningUse::Access).ok_or_else(|| {
        OfficerError::Other("keys.toml has no access key; run a ceremony with [access_ca]".to_owned())
    })?;
    let [certificate_path, ca_path, key_path] =
        ["certificate.pem", "ca.pem", "key.pem"].map(|name| enrolment.out.join(name));
    let mut paths = vec![certificate_path.clone(), ca_path.clone()];
    if enrolment.csr.is_none() {
        paths.push(key_path.clone());
    }
    paths.iter().try_for_each(|path| must_be_new(path))?;
    let (public, generated) = match &enrolment.csr {
        Some(path) => {
            let pem = std::fs::read(path).map_err(|e| OfficerError::Other(format!("{}: {e}", path.display())))?;
            let verified = verify_csr_pem(&pem);
            (verified.map_err(|e| OfficerError::Other(format!("{}: {e}", path.display())))?, None)
        }
        None => {
            let key = TlsKey::generate()?;
            (key.public().clone(), Some(key))
        }
    };
    let kind = key.public_key.kind();
    let algorithm = SignatureAlgorithm::default_for(kind);
    let ca_pem = read(&key.certificate)?;
    let issuer = IssuerCertificate::from_pem(&ca_pem, algorithm)?;

    let token = Ceremony::open(&access.module, &manifest.token, &access.pin)?;
    let not_before = now();
    let document = access_certificate(&AccessCertificate {
        name: &enrolment.name,
        public_key: &public,
        issuer: &issuer,
        serial: random_serial(&token)?,
        not_before,
        not_after: not_before + u64::from(enrolment.days) * 24 * 60 * 60,
    })?;
    let signature = token.sign_document(key, &document)?;
    let certificate = document.assemble(&signature)?.to_pem()?;

    make_directory(&enrolment.out)?;
    if let Some(key) = generated {
        // Exposed to be written to a file with mode 0600.
        write_new_private(&key_path, key.pem().expose())?;
    }
    write_new(&certificate_path, certificate.as_bytes())?;
    write_new(&ca_path, ca_pem.as_bytes())?;
    Ok(paths)
}

fn read(path: &Path) -> Result<String, OfficerError> {
    std::fs::read_to_string(path).map_err(|e| OfficerError::Other(format!("{}: {e}", path.display())))
}
