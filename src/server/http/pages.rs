//! HTML pages: look up a device, show its record, certificate and inclusion proof, and download its files.

use std::sync::Arc;

use askama::Template;
use axum::Router;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Redirect, Response};
use axum::routing::get;
use indicatif::HumanCount;
use serde::Deserialize;
use spp_format::certificate::{CertificateField, describe};
use spp_format::keys::sha256;
use spp_format::names::{ChipId, DeviceIdentity};
use spp_format::record::{DeviceRecord, PublishedRecord};
use spp_format::tlog::{ProofStep, SignedCheckpoint, VerifiedProof};
use time::OffsetDateTime;
use time::macros::format_description;

use super::response::{problem, tagged};
use super::site::Site;
use crate::provisioning::ProvisionError;
use crate::server::call_error::CallError;

const STYLE: &str = include_str!("pages/style.css");
/// Maximum length of rejected input that the form shows again, in characters.
const MAX_ECHOED_LEN: usize = 200;
const NO_CACHE: &str = "no-cache";

#[derive(Template)]
#[template(path = "front.html")]
struct Front {
    site: String,
    origin: String,
    vkey: String,
    chip: String,
    problem: Option<String>,
    log: Option<LogView>,
}

struct LogView {
    size: String,
    root: String,
    cosigners: Vec<String>,
    note: String,
    newest: Option<String>,
}

#[derive(Template)]
#[template(path = "device.html")]
struct Device {
    site: String,
    origin: String,
    vkey: String,
    chip: String,
    record: RecordView,
    certificate: CertificateView,
    proof: Option<ProofView>,
    proof_problem: Option<String>,
}

struct RecordView {
    identity_kind: String,
    identity_value: String,
    profile: String,
    published: String,
    index: String,
    session: String,
    master_key_version: Option<u32>,
    record_hash: String,
    record_size: String,
    backup_size: String,
}

struct CertificateView {
    kind: String,
    rows: Vec<Row>,
    pem: Option<String>,
}

struct Row {
    name: String,
    value: String,
    mono: bool,
}

struct ProofView {
    leaf: String,
    steps: Vec<StepView>,
    root: String,
    size: String,
    cosigners: Vec<String>,
    note: String,
}

struct StepView {
    number: usize,
    side: String,
    sibling: String,
    hash: String,
}

#[derive(Template)]
#[template(path = "message.html")]
struct Message {
    site: String,
    origin: String,
    heading: String,
    text: String,
    hint: Option<String>,
}

pub(super) fn routes() -> Router<Arc<Site>> {
    Router::new()
        .route("/", get(front))
        .route("/style.css", get(style))
        .route("/devices", get(look_up))
        .route("/devices/{chip}", get(device))
        .route("/devices/{chip}/backup", get(backup))
        .route("/devices/{chip}/certificate", get(certificate))
        .route("/devices/{chip}/record", get(record))
        .route("/devices/{chip}/proof", get(proof))
}

async fn style(headers: HeaderMap) -> Response {
    let tag = format!("W/\"{}\"", hex::encode(sha256(STYLE.as_bytes())));
    tagged(&headers, &tag, "public, max-age=300", "text/css; charset=utf-8", STYLE.into())
}

async fn front(State(site): State<Arc<Site>>) -> Response {
    front_with(&site, StatusCode::OK, String::new(), None).await
}

async fn front_with(site: &Site, status: StatusCode, chip: String, problem: Option<String>) -> Response {
    let registry = site.provisioner.registry();
    let checkpoint = registry.checkpoint().await.ok().flatten();
    let log = match checkpoint {
        None => None,
        Some(checkpoint) => {
            let newest = registry.newest().await.ok().flatten();
            Some(LogView {
                size: HumanCount(checkpoint.size()).to_string(),
                root: hex::encode(checkpoint.root()),
                cosigners: site.cosigners(&checkpoint),
                note: String::from_utf8_lossy(checkpoint.note()).into_owned(),
                newest: newest.map(|newest| time_text(newest.record.published)),
            })
        }
    };
    let (site, origin, vkey) = site.names();
    page(status, &Front { site, origin, vkey, chip, problem, log })
}

#[derive(Deserialize)]
struct LookUp {
    #[serde(default)]
    chip: String,
}

/// Redirects to the device's page, or shows the form again with an error.
async fn look_up(State(site): State<Arc<Site>>, Query(query): Query<LookUp>) -> Response {
    // Copied IDs may contain spaces, colons and dashes.
    let digits: String = query.chip.chars().filter(|c| !c.is_whitespace() && !":-".contains(*c)).collect();
    match digits.to_ascii_lowercase().parse::<ChipId>() {
        Ok(chip) => Redirect::to(&format!("/devices/{chip}")).into_response(),
        Err(_) => {
            let invalid = digits.chars().find(|c| !c.is_ascii_hexdigit());
            let problem = match invalid {
                Some(c) => format!("{c:?} is not a hex digit; a chip ID has only the digits 0 to 9 and a to f"),
                None => format!("{} digits; a chip ID has 16 to 128 hex digits, two per byte", digits.len()),
            };
            let input = query.chip.chars().take(MAX_ECHOED_LEN).collect();
            front_with(&site, StatusCode::BAD_REQUEST, input, Some(problem)).await
        }
    }
}

async fn device(State(site): State<Arc<Site>>, Path(chip): Path<String>) -> Response {
    let published = match site.find(&chip).await {
        Ok(published) => published,
        Err(error) => return site.refused(&error),
    };
    let proven = match site.provisioner.prove(published.publication.index).await {
        Ok(proof) => proof.verify(&published.bytes, &site.key).map_err(|error| {
            tracing::error!(chip, %error, "inclusion proof does not verify");
            error.to_string()
        }),
        Err(error) => {
            tracing::warn!(chip, %error, "cannot prove a record");
            Err("the log cannot be read".to_owned())
        }
    };
    let (proof, proof_problem) = match proven {
        Ok(proven) => (Some(site.proof_view(&proven)), None),
        Err(problem) => (None, Some(problem)),
    };
    let (name, origin, vkey) = site.names();
    let certificate = certificate_view(&published.record);
    let (record, chip) = (record_view(&published), published.record.chip.to_string());
    page(StatusCode::OK, &Device { site: name, origin, vkey, chip, record, certificate, proof, proof_problem })
}

async fn backup(State(site): State<Arc<Site>>, Path(chip): Path<String>) -> Response {
    let content = |published: PublishedRecord| (published.record.backup, "application/octet-stream", "backup");
    site.file(&chip, content).await
}

async fn certificate(State(site): State<Arc<Site>>, Path(chip): Path<String>) -> Response {
    let content = |published: PublishedRecord| match published.record.certificate_pem() {
        Some(pem) => (pem.into_bytes(), "application/x-pem-file", "pem"),
        None => (published.record.certificate, "application/cwt", "cwt"),
    };
    site.file(&chip, content).await
}

async fn record(State(site): State<Arc<Site>>, Path(chip): Path<String>) -> Response {
    site.file(&chip, |published| (published.bytes, "application/cbor", "cbor")).await
}

async fn proof(State(site): State<Arc<Site>>, Path(chip): Path<String>) -> Response {
    let proven = async {
        let published = site.find(&chip).await?;
        let proof = site.provisioner.prove(published.publication.index).await?;
        Ok((published.record.chip, proof.to_bytes()))
    };
    match proven.await {
        Ok((chip, proof)) => download(&chip, proof, "text/plain; charset=utf-8", "tlog-proof"),
        Err(error) => site.refused(&error),
    }
}

/// Answers requests for unknown paths: HTML for browsers, problem details for programs.
pub(super) async fn not_found(State(site): State<Arc<Site>>, headers: HeaderMap) -> Response {
    let accepts = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !accepts.contains("text/html") {
        return problem(StatusCode::NOT_FOUND, "unknown path");
    }
    site.message(StatusCode::NOT_FOUND, "Page not found", "There is no page at this address.", None)
}

impl Site {
    fn names(&self) -> (String, String, String) {
        (self.title.clone(), self.key.origin().to_string(), self.key.to_string())
    }

    fn cosigners(&self, checkpoint: &SignedCheckpoint) -> Vec<String> {
        let witnesses: Vec<_> = self.witnesses.iter().collect();
        checkpoint.cosigners(&witnesses).into_iter().map(str::to_owned).collect()
    }

    fn proof_view(&self, proven: &VerifiedProof) -> ProofView {
        let step = |(index, step): (usize, &ProofStep)| StepView {
            number: index + 1,
            side: if step.sibling_is_left { "left" } else { "right" }.to_owned(),
            sibling: hex::encode(step.sibling),
            hash: hex::encode(step.hash),
        };
        ProofView {
            leaf: hex::encode(proven.leaf),
            steps: proven.steps.iter().enumerate().map(step).collect(),
            root: hex::encode(proven.checkpoint.root()),
            size: HumanCount(proven.checkpoint.size()).to_string(),
            cosigners: self.cosigners(&proven.checkpoint),
            note: String::from_utf8_lossy(proven.checkpoint.note()).into_owned(),
        }
    }

    async fn file(
        &self,
        chip: &str,
        content: impl FnOnce(PublishedRecord) -> (Vec<u8>, &'static str, &'static str),
    ) -> Response {
        match self.find(chip).await {
            Ok(published) => {
                let chip = published.record.chip.clone();
                let (bytes, media_type, extension) = content(published);
                download(&chip, bytes, media_type, extension)
            }
            Err(error) => self.refused(&error),
        }
    }

    /// Renders an error as a page. `public::refused` is the same table for programs.
    fn refused(&self, error: &CallError) -> Response {
        match error {
            CallError::Provision(ProvisionError::NoRecord) => self.message(
                StatusCode::NOT_FOUND,
                "No such device",
                "There is no record of a device with this chip ID.",
                Some(
                    "Check the ID for a wrong digit. A new device appears here as soon as its station has the receipt. \
                     Otherwise ask the manufacturer.",
                ),
            ),
            CallError::Invalid(_) => self.message(
                StatusCode::BAD_REQUEST,
                "Invalid chip ID",
                "A chip ID has 16 to 128 hex digits: 0 to 9 and a to f.",
                None,
            ),
            other => {
                tracing::warn!(error = %other, "cannot serve a page");
                let mut unavailable = self.message(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "Temporarily unavailable",
                    "The database cannot be read at the moment. No data is lost.",
                    Some("Try again in a minute, or use a mirror."),
                );
                unavailable.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("10"));
                unavailable
            }
        }
    }

    fn message(&self, status: StatusCode, heading: &str, text: &str, hint: Option<&str>) -> Response {
        let (site, origin, _) = self.names();
        let (heading, text, hint) = (heading.to_owned(), text.to_owned(), hint.map(str::to_owned));
        page(status, &Message { site, origin, heading, text, hint })
    }
}

fn record_view(published: &PublishedRecord) -> RecordView {
    let PublishedRecord { record, bytes, publication } = published;
    let kind = match &record.identity {
        DeviceIdentity::Imei(_) => "IMEI",
        DeviceIdentity::Meid(_) => "MEID",
        DeviceIdentity::Eui48(_) => "EUI-48",
        DeviceIdentity::Eui64(_) => "EUI-64",
        DeviceIdentity::Serial(_) => "Serial number",
    };
    let size = |bytes: &[u8]| format!("{} bytes", HumanCount(bytes.len() as u64));
    RecordView {
        identity_kind: kind.to_owned(),
        identity_value: record.identity.value(),
        profile: record.profile.to_string(),
        published: time_text(record.published),
        index: HumanCount(publication.index).to_string(),
        session: record.session.to_string(),
        master_key_version: Some(record.master_key_version).filter(|version| *version > 0),
        record_hash: hex::encode(publication.record_hash),
        record_size: size(bytes),
        backup_size: size(&record.backup),
    }
}

fn certificate_view(record: &DeviceRecord) -> CertificateView {
    let kind = if record.certificate_is_cwt { "CWT (RFC 8392)" } else { "X.509 certificate" };
    let fields = describe(&record.certificate, record.certificate_is_cwt);
    let fields = fields
        .unwrap_or_else(|error| vec![CertificateField { name: "Problem", value: error.to_string(), is_bytes: false }]);
    let row = |field: CertificateField| Row { name: field.name.to_owned(), value: field.value, mono: field.is_bytes };
    CertificateView {
        kind: kind.to_owned(),
        rows: fields.into_iter().map(row).collect(),
        pem: record.certificate_pem(),
    }
}

fn time_text(seconds: u64) -> String {
    let form = format_description!("[year]-[month]-[day] [hour]:[minute]:[second] UTC");
    let time = i64::try_from(seconds).ok().and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    time.and_then(|time| time.format(&form).ok()).unwrap_or_else(|| format!("{seconds} s after 1970"))
}

fn page(status: StatusCode, template: &impl Template) -> Response {
    match template.render() {
        Ok(html) => {
            let head = [(header::CONTENT_TYPE, "text/html; charset=utf-8"), (header::CACHE_CONTROL, NO_CACHE)];
            (status, head, html).into_response()
        }
        Err(error) => {
            tracing::error!(%error, "cannot render a page");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// Returns a file to download, named after the chip.
fn download(chip: &ChipId, bytes: Vec<u8>, media_type: &'static str, extension: &str) -> Response {
    let mut response = ([(header::CONTENT_TYPE, media_type), (header::CACHE_CONTROL, NO_CACHE)], bytes).into_response();
    let name = format!("attachment; filename=\"{chip}.{extension}\"");
    if let Ok(name) = HeaderValue::from_str(&name) {
        response.headers_mut().insert(header::CONTENT_DISPOSITION, name);
    }
    response
}
