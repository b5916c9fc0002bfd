//! The pages for people: look a device up, see what is known of it and that it is in the log, take its files along.

use std::sync::Arc;

use askama::Template;
use axum::Router;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Redirect, Response};
use axum::routing::get;
use indicatif::HumanCount;
use serde::Deserialize;
use time::OffsetDateTime;
use time::macros::format_description;

use super::public::{Site, problem, tagged};
use crate::certificate::{Statement, describe};
use crate::keys::sha256;
use crate::names::{ChipId, DeviceIdentity};
use crate::provisioning::ProvisionError;
use crate::store::{DeviceRecord, PublishedRecord};
use crate::tlog::{ProofStep, SignedCheckpoint, VerifiedProof};

const STYLE: &str = include_str!("pages/style.css");
/// Longest text that is shown again in the form.
const TYPED: usize = 200;
const PAGE: &str = "no-cache";

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

/// What was typed: to the device's page, or back to the form with what is wrong.
async fn look_up(State(site): State<Arc<Site>>, Query(asked): Query<LookUp>) -> Response {
    // People copy IDs with spaces, colons and dashes in them.
    let digits: String = asked.chip.chars().filter(|c| !c.is_whitespace() && !":-".contains(*c)).collect();
    match digits.to_ascii_lowercase().parse::<ChipId>() {
        Ok(chip) => Redirect::to(&format!("/devices/{chip}")).into_response(),
        Err(_) => {
            let wrong = digits.chars().find(|c| !c.is_ascii_hexdigit());
            let problem = match wrong {
                Some(c) => format!("{c:?} is no hex digit; a chip ID has the digits 0 to 9 and a to f alone"),
                None => format!("it has {} digits; a chip ID has 16 to 128, two for each of its bytes", digits.len()),
            };
            let typed = asked.chip.chars().take(TYPED).collect();
            front_with(&site, StatusCode::BAD_REQUEST, typed, Some(problem)).await
        }
    }
}

async fn device(State(site): State<Arc<Site>>, Path(chip): Path<String>) -> Response {
    let found = match site.find(&chip).await {
        Ok(found) => found,
        Err(error) => return site.refused(&error),
    };
    let proven = match site.provisioner.prove(found.publication.index).await {
        Ok(proof) => proof.verify(&found.bytes, &site.key).map_err(|error| {
            tracing::error!(chip, %error, "a record's proof does not verify");
            error.to_string()
        }),
        Err(error) => {
            tracing::warn!(chip, %error, "a record could not be proven");
            Err("the log could not be read".to_owned())
        }
    };
    let (proof, proof_problem) = match proven {
        Ok(proven) => (Some(site.proof_view(&proven)), None),
        Err(problem) => (None, Some(problem)),
    };
    let (name, origin, vkey) = site.names();
    let certificate = certificate_view(&found.record);
    let (record, chip) = (record_view(&found), found.record.chip.to_string());
    page(StatusCode::OK, &Device { site: name, origin, vkey, chip, record, certificate, proof, proof_problem })
}

async fn backup(State(site): State<Arc<Site>>, Path(chip): Path<String>) -> Response {
    let content = |found: PublishedRecord| (found.record.backup, "application/byte-stream", "backup");
    site.file(&chip, content).await
}

async fn certificate(State(site): State<Arc<Site>>, Path(chip): Path<String>) -> Response {
    let content = |found: PublishedRecord| match found.record.certificate_pem() {
        Some(pem) => (pem.into_bytes(), "application/x-pem-file", "pem"),
        None => (found.record.certificate, "application/cwt", "cwt"),
    };
    site.file(&chip, content).await
}

async fn record(State(site): State<Arc<Site>>, Path(chip): Path<String>) -> Response {
    site.file(&chip, |found| (found.bytes, "application/cbor", "cbor")).await
}

async fn proof(State(site): State<Arc<Site>>, Path(chip): Path<String>) -> Response {
    let proven = async {
        let found = site.find(&chip).await?;
        let proof = site.provisioner.prove(found.publication.index).await?;
        Ok((found.record.chip, proof.to_bytes()))
    };
    match proven.await {
        Ok((chip, proof)) => download(&chip, proof, "text/plain; charset=utf-8", "tlog-proof"),
        Err(error) => site.refused(&error),
    }
}

/// Anything that has no page. Programs get it in their form.
pub(super) async fn nothing_here(State(site): State<Arc<Site>>, headers: HeaderMap) -> Response {
    let accepts = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !accepts.contains("text/html") {
        return problem(StatusCode::NOT_FOUND, "there is nothing here");
    }
    site.message(StatusCode::NOT_FOUND, "There is nothing here", "This address leads nowhere.", None)
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
        let step = |(at, step): (usize, &ProofStep)| StepView {
            number: at + 1,
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
            Ok(found) => {
                let chip = found.record.chip.clone();
                let (bytes, kind, ending) = content(found);
                download(&chip, bytes, kind, ending)
            }
            Err(error) => self.refused(&error),
        }
    }

    /// The same table as for programs, in words for people.
    fn refused(&self, error: &ProvisionError) -> Response {
        match error {
            ProvisionError::NoRecord => self.message(
                StatusCode::NOT_FOUND,
                "No such device",
                "There is no record of a device with this chip ID.",
                Some(
                    "Check the ID: one wrong digit makes another one. A device that left the line only now is here as soon as its \
                     station has its receipt. Else ask its manufacturer.",
                ),
            ),
            ProvisionError::Invalid(_) => self.message(
                StatusCode::BAD_REQUEST,
                "That is no chip ID",
                "A chip ID has 16 to 128 hex digits: 0 to 9 and a to f.",
                None,
            ),
            other => {
                tracing::warn!(error = %other, "a page could not be made");
                let mut away = self.message(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "Not available now",
                    "The database cannot be read at this moment. Nothing is lost.",
                    Some("Try again in a minute, or use a mirror."),
                );
                away.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("10"));
                away
            }
        }
    }

    fn message(&self, status: StatusCode, heading: &str, text: &str, hint: Option<&str>) -> Response {
        let (site, origin, _) = self.names();
        let (heading, text, hint) = (heading.to_owned(), text.to_owned(), hint.map(str::to_owned));
        page(status, &Message { site, origin, heading, text, hint })
    }
}

fn record_view(found: &PublishedRecord) -> RecordView {
    let PublishedRecord { record, bytes, publication } = found;
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
    let said = describe(&record.certificate, record.certificate_is_cwt);
    let said =
        said.unwrap_or_else(|error| vec![Statement { name: "Problem", value: error.to_string(), is_bytes: false }]);
    let row = |said: Statement| Row { name: said.name.to_owned(), value: said.value, mono: said.is_bytes };
    CertificateView { kind: kind.to_owned(), rows: said.into_iter().map(row).collect(), pem: record.certificate_pem() }
}

fn time_text(seconds: u64) -> String {
    let form = format_description!("[year]-[month]-[day] [hour]:[minute]:[second] UTC");
    let time = i64::try_from(seconds).ok().and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    time.and_then(|time| time.format(&form).ok()).unwrap_or_else(|| format!("{seconds} s after 1970"))
}

fn page(status: StatusCode, template: &impl Template) -> Response {
    match template.render() {
        Ok(html) => {
            let head = [(header::CONTENT_TYPE, "text/html; charset=utf-8"), (header::CACHE_CONTROL, PAGE)];
            (status, head, html).into_response()
        }
        Err(error) => {
            tracing::error!(%error, "a page could not be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// A file to be kept, named after its chip.
fn download(chip: &ChipId, bytes: Vec<u8>, kind: &'static str, ending: &str) -> Response {
    let mut response = ([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, PAGE)], bytes).into_response();
    let name = format!("attachment; filename=\"{chip}.{ending}\"");
    if let Ok(name) = HeaderValue::from_str(&name) {
        response.headers_mut().insert(header::CONTENT_DISPOSITION, name);
    }
    response
}
