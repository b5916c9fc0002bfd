//! A record for people, and for scripts.

use std::path::Path;

use der::pem::LineEnding;
use der::{Decode as _, EncodePem as _};
use x509_cert::Certificate;

use super::LineError;
use super::recover::{Found, Public};
use crate::keys::{PublicKey, sha256};
use crate::names::ChipId;

/// How a record is shown.
pub(super) struct Show<'a> {
    pub(super) chip: &'a ChipId,
    pub(super) public: Public,
    /// Where the certificate goes, too.
    pub(super) certificate_out: Option<&'a Path>,
    pub(super) json: bool,
}

/// The chip's record as text.
pub(super) async fn show(asked: &Show<'_>) -> Result<String, LineError> {
    let found = asked.public.record(asked.chip).await?;
    let certificate = DeviceCertificate::of(&found)?;
    if let Some(path) = asked.certificate_out {
        std::fs::write(path, certificate.file_content(&found))
            .map_err(LineError::file("writing the certificate to", path))?;
    }
    Ok(match asked.json {
        true => format!("{:#}\n", found.record.to_json(found.index, &found.hash)),
        false => text(&found, &certificate),
    })
}

/// Names and values, the values in one column.
pub(super) fn lines(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    lines.iter().map(|(name, value)| format!("{name:<width$}  {value}\n")).collect()
}

enum DeviceCertificate {
    X509 { pem: String, subject: String, issuer: String, not_before: String, not_after: String },
    Cwt,
}

impl DeviceCertificate {
    fn of(found: &Found) -> Result<Self, LineError> {
        let record = &found.record;
        if record.certificate_is_cwt {
            return Ok(Self::Cwt);
        }
        let doubt = |e: der::Error| LineError::Record {
            chip: record.chip.clone(),
            problem: format!("its certificate cannot be read: {e}"),
        };
        let certificate = Certificate::from_der(&record.certificate).map_err(doubt)?;
        let tbs = certificate.tbs_certificate();
        Ok(Self::X509 {
            pem: certificate.to_pem(LineEnding::LF).map_err(doubt)?,
            subject: tbs.subject().to_string(),
            issuer: tbs.issuer().to_string(),
            not_before: tbs.validity().not_before.to_string(),
            not_after: tbs.validity().not_after.to_string(),
        })
    }

    fn file_content<'a>(&'a self, found: &'a Found) -> &'a [u8] {
        match self {
            Self::X509 { pem, .. } => pem.as_bytes(),
            Self::Cwt => &found.record.certificate,
        }
    }
}

fn text(found: &Found, certificate: &DeviceCertificate) -> String {
    let record = &found.record;
    let mut rows = vec![
        ("chip", record.chip.to_string()),
        ("identity", record.identity.to_string()),
        ("profile", record.profile.to_string()),
        ("published", record.published_text()),
        ("record", format!("{} sha256:{}", found.index, hex::encode(found.hash))),
        ("session", record.session.to_string()),
        ("certificate", format!("{} serial {}", format_name(certificate), hex::encode(&record.serial))),
    ];
    if let DeviceCertificate::X509 { subject, issuer, not_before, not_after, .. } = certificate {
        rows.push(("  subject", subject.clone()));
        rows.push(("  issuer", issuer.clone()));
        rows.push(("  valid", format!("{not_before} to {not_after}")));
    }
    rows.push(("  sha256", hex::encode(sha256(&record.certificate))));
    rows.push(("public key", public_key(found).unwrap_or_else(|| "none".to_owned())));
    let master = match record.master_key_version {
        0 => "no symmetric keys".to_owned(),
        version => format!("version {version}"),
    };
    rows.push(("master key", master));
    let backup = &record.backup;
    rows.push(("log", found.proven_text()));
    rows.push(("backup", format!("{} bytes, sha256:{}", backup.len(), hex::encode(sha256(backup)))));
    lines(&rows)
}

const fn format_name(certificate: &DeviceCertificate) -> &'static str {
    match certificate {
        DeviceCertificate::X509 { .. } => "X.509",
        DeviceCertificate::Cwt => "CWT",
    }
}

fn public_key(found: &Found) -> Option<String> {
    let spki = found.record.public_key.as_ref()?;
    let kind = PublicKey::from_spki_der(spki).map_or_else(|e| e.to_string(), |key| key.kind().to_string());
    Some(format!("{kind} sha256:{}", hex::encode(sha256(spki))))
}
