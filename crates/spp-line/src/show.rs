//! Shows a record as text or JSON.

use std::path::Path;

use der::pem::LineEnding;
use der::{Decode as _, EncodePem as _};
use spp_format::keys::{PublicKey, sha256};
use spp_format::names::ChipId;
use x509_cert::Certificate;

use super::LineError;
use super::public_database::{FetchedRecord, RecordReader};

/// Options of the show command.
pub(super) struct ShowOptions<'a> {
    pub(super) chip: &'a ChipId,
    pub(super) database: RecordReader,
    /// File to which the certificate is written as well.
    pub(super) certificate_out: Option<&'a Path>,
    pub(super) json: bool,
}

/// Shows the chip's record.
pub(super) async fn show(options: &ShowOptions<'_>) -> Result<String, LineError> {
    let fetched = options.database.fetch_record(options.chip).await?;
    let certificate = DeviceCertificate::parse(&fetched)?;
    if let Some(path) = options.certificate_out {
        std::fs::write(path, certificate.file_content(&fetched))
            .map_err(LineError::file("writing the certificate to", path))?;
    }
    Ok(match options.json {
        true => format!("{:#}\n", fetched.record.to_json(fetched.index, &fetched.hash)),
        false => text(&fetched, &certificate),
    })
}

/// Formats names and values in two columns.
pub(super) fn lines(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    lines.iter().map(|(name, value)| format!("{name:<width$}  {value}\n")).collect()
}

enum DeviceCertificate {
    X509 { pem: String, subject: String, issuer: String, not_before: String, not_after: String },
    Cwt,
}

impl DeviceCertificate {
    fn parse(fetched: &FetchedRecord) -> Result<Self, LineError> {
        let record = &fetched.record;
        if record.certificate_is_cwt {
            return Ok(Self::Cwt);
        }
        let rejected = |e: der::Error| LineError::Record {
            chip: record.chip.clone(),
            problem: format!("invalid certificate: {e}"),
        };
        let certificate = Certificate::from_der(&record.certificate).map_err(rejected)?;
        let tbs = certificate.tbs_certificate();
        Ok(Self::X509 {
            pem: certificate.to_pem(LineEnding::LF).map_err(rejected)?,
            subject: tbs.subject().to_string(),
            issuer: tbs.issuer().to_string(),
            not_before: tbs.validity().not_before.to_string(),
            not_after: tbs.validity().not_after.to_string(),
        })
    }

    fn file_content<'a>(&'a self, fetched: &'a FetchedRecord) -> &'a [u8] {
        match self {
            Self::X509 { pem, .. } => pem.as_bytes(),
            Self::Cwt => &fetched.record.certificate,
        }
    }
}

fn text(fetched: &FetchedRecord, certificate: &DeviceCertificate) -> String {
    let record = &fetched.record;
    let mut rows = vec![
        ("chip", record.chip.to_string()),
        ("identity", record.identity.to_string()),
        ("profile", record.profile.to_string()),
        ("published", record.published_text()),
        ("record", format!("{} sha256:{}", fetched.index, hex::encode(fetched.hash))),
        ("session", record.session.to_string()),
        ("certificate", format!("{} serial {}", format_name(certificate), hex::encode(&record.serial))),
    ];
    if let DeviceCertificate::X509 { subject, issuer, not_before, not_after, .. } = certificate {
        rows.push(("  subject", subject.clone()));
        rows.push(("  issuer", issuer.clone()));
        rows.push(("  valid", format!("{not_before} to {not_after}")));
    }
    rows.push(("  sha256", hex::encode(sha256(&record.certificate))));
    rows.push(("public key", public_key(fetched).unwrap_or_else(|| "none".to_owned())));
    let master = match record.master_key_version {
        0 => "no symmetric keys".to_owned(),
        version => format!("version {version}"),
    };
    rows.push(("master key", master));
    let backup = &record.backup;
    rows.push(("log", fetched.proof_text()));
    rows.push(("backup", format!("{} bytes, sha256:{}", backup.len(), hex::encode(sha256(backup)))));
    lines(&rows)
}

const fn format_name(certificate: &DeviceCertificate) -> &'static str {
    match certificate {
        DeviceCertificate::X509 { .. } => "X.509",
        DeviceCertificate::Cwt => "CWT",
    }
}

fn public_key(fetched: &FetchedRecord) -> Option<String> {
    let spki = fetched.record.public_key.as_ref()?;
    let kind = PublicKey::from_spki_der(spki).map_or_else(|e| e.to_string(), |key| key.kind().to_string());
    Some(format!("{kind} sha256:{}", hex::encode(sha256(spki))))
}
