//! What anybody may ask over HTTP: records, proofs, the log's tiles, and pages for people.
//!
//! | path | is |
//! |---|---|
//! | `/` , `/devices?chip=…`, `/devices/{chip}`… | pages, without JavaScript |
//! | `/v1/devices/{chip}` | the record: JSON, CBOR or PEM, as `Accept` says |
//! | `/v1/devices/{chip}/proof` | C2SP tlog-proof |
//! | `/checkpoint`, `/tile/…` | the log, as C2SP tlog-tiles says |
//! | `/chip/{shard}/{file}`, `/log.vkey` | what a mirror has besides, in the same places |
//!
//! There is no list of chips and no search by a beginning: whoever asks must know the whole chip ID. (The entries are public, too:
//! who wants all of them reads the log.)

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Extension, Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::transport::server::TcpConnectInfo;
use tower::ServiceExt as _;
use tower_http::compression::CompressionLayer;

use super::pages;
use super::rate::Rate;
use super::serve::{Limits, Peer, serve};
use crate::config::{PublicConfig, RegistryConfig};
use crate::connections::Tls;
use crate::names::ChipId;
use crate::provisioning::{ProvisionError, Provisioner};
use crate::registry::shard;
use crate::rpc;
use crate::store::PublishedRecord;
use crate::tlog::{LogKey, TileId, WitnessKey};

/// A reader comes, reads and goes.
const LIMITS: Limits = Limits {
    places: 1024,
    of_one_address: 64,
    age: Duration::from_secs(120),
    grace: Duration::from_secs(30),
    keep_alive: true,
};
/// KiB of entry bundles that are on their way to slow readers at once, and of how many a request is counted as one more.
const BUNDLES_ON_THE_WAY: usize = 128 * 1024;
const KIB_OF_A_REQUEST: usize = 128;
/// Requests that are answered at once; the rest is told to come again.
const INSIDE: usize = 256;
/// No request takes longer.
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// What never changes under its name (C2SP tlog-tiles: long-lived).
const IMMUTABLE: &str = "public, max-age=31536000, immutable";
/// What changes with each batch (C2SP tlog-tiles: a few seconds).
const MOMENT: &str = "public, max-age=2";
/// A record stays as it is until it is superseded; then the chip's new one should be seen soon.
const MINUTE: &str = "public, max-age=60";

/// What the handlers share.
pub(super) struct Site {
    pub(super) provisioner: Arc<Provisioner>,
    pub(super) title: String,
    pub(super) key: LogKey,
    /// Whose cosignatures are told.
    pub(super) witnesses: Vec<WitnessKey>,
    rate: Rate,
    inside: Semaphore,
    bundles: Arc<Semaphore>,
}

/// The public listener's side of HTTP.
pub struct Public(Arc<Site>);

impl Public {
    /// The pages and resources of that log.
    pub fn new(provisioner: Arc<Provisioner>, config: &PublicConfig, registry: &RegistryConfig) -> Self {
        let (title, rate, inside) = (config.title.clone(), Rate::new(config), Semaphore::new(INSIDE));
        let witnesses = registry.settings.witnesses.iter().map(|witness| witness.key.clone()).collect();
        let key = registry.key.key.clone();
        let bundles = Arc::new(Semaphore::new(BUNDLES_ON_THE_WAY));
        Self(Arc::new(Site { provisioner, title, key, witnesses, rate, inside, bundles }))
    }

    /// Serves HTTP and, beside it on the same listener, gRPC until `stop` is true; then drains.
    pub(crate) async fn serve(self, listener: TcpListener, tls: Tls, grpc: Router, stop: watch::Receiver<bool>) {
        let router = router(&self.0, grpc);
        serve(listener, Some(tls), router, LIMITS, stop).await;
    }
}

fn router(site: &Arc<Site>, grpc: Router) -> Router {
    let compressed = Router::new()
        .route("/v1/devices/{chip}", get(record))
        .route("/v1/devices/{chip}/proof", get(proof))
        .route("/checkpoint", get(checkpoint))
        .route("/tile/entries/{*path}", get(entries))
        .route("/log.vkey", get(vkey))
        .merge(pages::routes())
        .layer(CompressionLayer::new());
    // Hashes do not get smaller, and files of a mirror are as they are on its disk.
    let plain = Router::new()
        .route("/tile/{level}/{*path}", get(hashes))
        .route("/chip/{shard}/{file}", get(chip_file))
        .fallback(pages::nothing_here);
    let http = compressed.merge(plain).layer(middleware::map_response(harden)).with_state(Arc::clone(site));
    let either = tower::service_fn(move |request: Request| {
        let router = if is_grpc(request.headers()) { grpc.clone() } else { http.clone() };
        router.oneshot(request)
    });
    Router::new().fallback_service(either).layer(middleware::from_fn_with_state(Arc::clone(site), admit))
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// At the door: not too fast, not too many, not for too long.
async fn admit(State(site): State<Arc<Site>>, mut request: Request, next: Next) -> Response {
    let is_grpc = is_grpc(request.headers());
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0);
    if let Some(peer) = peer {
        request.extensions_mut().insert(TcpConnectInfo { local_addr: None, remote_addr: Some(peer) });
        if let Err(after) = site.rate.admit(peer.ip()) {
            return too_fast(is_grpc, after);
        }
    }
    let Ok(_place) = site.inside.try_acquire() else { return busy(is_grpc) };
    tokio::time::timeout(CALL_LIMIT, next.run(request)).await.unwrap_or_else(|_| busy(is_grpc))
}

fn busy(is_grpc: bool) -> Response {
    if is_grpc {
        return rpc::busy(INSIDE).into_http();
    }
    let mut refused = problem(StatusCode::SERVICE_UNAVAILABLE, "the server has too much to do; try again");
    refused.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    refused
}

fn too_fast(is_grpc: bool, after: Duration) -> Response {
    if is_grpc {
        return rpc::too_fast(after).into_http();
    }
    let mut refused = problem(StatusCode::TOO_MANY_REQUESTS, "this address asks too often; try again later");
    let seconds = after.as_secs().saturating_add(1);
    refused.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    refused
}

/// What a browser must not do with any of this.
async fn harden(mut response: Response) -> Response {
    const HEADERS: [(HeaderName, &str); 3] = [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        ),
    ];
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// An answer for programs that something is wrong. It says nothing of what was asked for, so that all are of one size.
pub(super) fn problem(status: StatusCode, detail: &'static str) -> Response {
    let title = status.canonical_reason().unwrap_or("error");
    let body = serde_json::json!({ "title": title, "status": status.as_u16(), "detail": detail });
    let head = [(header::CONTENT_TYPE, "application/problem+json"), (header::CACHE_CONTROL, "no-store")];
    (status, head, body.to_string()).into_response()
}

/// The one table from errors to HTTP, as `rpc` has one for gRPC.
pub(super) fn refused(error: &ProvisionError) -> Response {
    match error {
        ProvisionError::NoRecord => problem(StatusCode::NOT_FOUND, "there is no such record"),
        ProvisionError::Invalid(_) => {
            problem(StatusCode::BAD_REQUEST, "a chip ID is written in hex, 16 to 128 digits for its 8 to 64 bytes")
        }
        other => {
            tracing::warn!(error = %other, "a public request could not be answered");
            let mut away =
                problem(StatusCode::SERVICE_UNAVAILABLE, "the public database is not available now; try again");
            away.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
            away
        }
    }
}

impl Site {
    /// The newest record of the chip that is named in the path.
    pub(super) async fn find(&self, chip: &str) -> Result<PublishedRecord, ProvisionError> {
        let chip: ChipId = chip.parse().map_err(|e| ProvisionError::invalid("chip_id", e))?;
        self.provisioner.recover(&chip).await
    }

    /// A tile or a bundle by its path.
    async fn tile(&self, path: &str) -> Result<Vec<u8>, Response> {
        let nothing = || problem(StatusCode::NOT_FOUND, "there is no such tile");
        let tile = path.parse::<TileId>().map_err(|_| nothing())?;
        let found = self.provisioner.registry().tile(tile).await.map_err(|error| refused(&error.into()))?;
        found.ok_or_else(nothing)
    }
}

/// The forms of a record.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Json,
    Cbor,
    Pem,
}

impl Form {
    /// Each with the media ranges that it fits, the most specific first.
    const ALL: [(Self, &'static [&'static str]); 3] = [
        (Self::Json, &["application/json", "application/*", "*/*"]),
        (Self::Cbor, &["application/cbor", "application/*", "*/*"]),
        (Self::Pem, &["application/x-pem-file", "application/pem-certificate-chain", "text/plain", "text/*", "*/*"]),
    ];

    /// The best of those that are accepted (RFC 9110 §12.5.1); JSON where it is all the same.
    fn accepted(headers: &HeaderMap) -> Option<Self> {
        let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let ranges: Vec<_> = values.flat_map(|value| value.split(',')).take(32).map(media_range).collect();
        if ranges.is_empty() {
            return Some(Self::Json);
        }
        let mut best: Option<(f32, Self)> = None;
        for (form, names) in Self::ALL {
            // The most specific range that fits says how much it is wanted.
            let weight =
                names.iter().find_map(|name| ranges.iter().find(|(range, _)| range == name).map(|(_, weight)| *weight));
            if let Some(weight) = weight.filter(|weight| *weight > 0.0)
                && best.is_none_or(|(known, _)| weight > known)
            {
                best = Some((weight, form));
            }
        }
        best.map(|(_, form)| form)
    }
}

/// A media range and its weight.
fn media_range(text: &str) -> (String, f32) {
    let mut parts = text.split(';').map(|part| part.trim().to_ascii_lowercase());
    let range = parts.next().unwrap_or_default();
    let weight = parts.find_map(|part| part.strip_prefix("q=").map(|q| q.parse().unwrap_or(0.0)));
    (range, weight.unwrap_or(1.0))
}

async fn record(State(site): State<Arc<Site>>, Path(chip): Path<String>, headers: HeaderMap) -> Response {
    let Some(form) = Form::accepted(&headers) else {
        return problem(
            StatusCode::NOT_ACCEPTABLE,
            "a record is to be had as application/json, application/cbor or application/x-pem-file",
        );
    };
    let found = match site.find(&chip).await {
        Ok(found) => found,
        Err(error) => return refused(&error),
    };
    let hash = hex::encode(found.publication.record_hash);
    let (kind, tag, body) = match form {
        Form::Json => {
            let json = found.record.to_json(found.publication.index, &found.publication.record_hash);
            ("application/json", "json", format!("{json:#}\n").into_bytes())
        }
        Form::Cbor => ("application/cbor", "cbor", found.bytes),
        Form::Pem => match found.record.certificate_pem() {
            Some(pem) => ("application/x-pem-file", "pem", pem.into_bytes()),
            None => {
                return problem(
                    StatusCode::NOT_ACCEPTABLE,
                    "this device's certificate is a CWT, which has no PEM form",
                );
            }
        },
    };
    tagged(&headers, &format!("W/\"{hash}-{tag}\""), MINUTE, kind, body)
}

/// A body with an entity tag; or that the asker has it already (RFC 9110 §13.1.2).
pub(super) fn tagged(asked: &HeaderMap, tag: &str, cache: &'static str, kind: &'static str, body: Vec<u8>) -> Response {
    let known = asked.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let is_known = known.flat_map(|value| value.split(',')).any(|known| {
        let bare = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
        known.trim() == "*" || bare(known) == bare(tag)
    });
    let mut response = match is_known {
        true => StatusCode::NOT_MODIFIED.into_response(),
        false => ([(header::CONTENT_TYPE, kind)], body).into_response(),
    };
    let headers = response.headers_mut();
    if let Ok(tag) = HeaderValue::from_str(tag) {
        headers.insert(header::ETAG, tag);
    }
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(cache));
    headers.insert(header::VARY, HeaderValue::from_static("accept, accept-encoding"));
    response
}

async fn proof(State(site): State<Arc<Site>>, Path(chip): Path<String>) -> Response {
    let proven = async {
        let found = site.find(&chip).await?;
        site.provisioner.prove(found.publication.index).await
    };
    match proven.await {
        Ok(proof) => text(MOMENT, proof.to_bytes()),
        Err(error) => refused(&error),
    }
}

async fn checkpoint(State(site): State<Arc<Site>>) -> Response {
    match site.provisioner.registry().checkpoint().await {
        Ok(Some(checkpoint)) => text(MOMENT, checkpoint.note().to_vec()),
        Ok(None) => refused(&ProvisionError::Unsigned("there is none yet".to_owned())),
        Err(error) => refused(&error.into()),
    }
}

async fn vkey(State(site): State<Arc<Site>>) -> Response {
    text(MINUTE, format!("{}\n", site.key).into_bytes())
}

fn text(cache: &'static str, body: Vec<u8>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8"), (header::CACHE_CONTROL, cache)], body).into_response()
}

async fn hashes(State(site): State<Arc<Site>>, Path((level, path)): Path<(String, String)>) -> Response {
    match site.tile(&format!("tile/{level}/{path}")).await {
        Ok(bytes) => immutable(Body::from(bytes)),
        Err(refused) => refused,
    }
}

async fn entries(
    State(site): State<Arc<Site>>,
    Extension(peer): Extension<Peer>,
    Path(path): Path<String>,
) -> Response {
    let bytes = match site.tile(&format!("tile/entries/{path}")).await {
        Ok(bytes) => bytes,
        Err(refused) => return refused,
    };
    // A bundle is large: it is counted as more than one request, and takes room until its reader has all of it.
    let kib = bytes.len() / 1024;
    let more = u32::try_from(kib / KIB_OF_A_REQUEST).ok().and_then(NonZeroU32::new);
    if let Some(Err(after)) = more.map(|more| site.rate.charge(peer.0.ip(), more)) {
        return too_fast(false, after);
    }
    let room = Arc::clone(&site.bundles).try_acquire_many_owned(u32::try_from(kib).unwrap_or(u32::MAX));
    let Ok(room) = room else { return busy(false) };
    immutable(Body::from(Bytes::from_owner(OnTheWay { bytes, _room: room })))
}

/// A bundle that somebody is reading.
struct OnTheWay {
    bytes: Vec<u8>,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for OnTheWay {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

fn immutable(body: Body) -> Response {
    let head = [(header::CONTENT_TYPE, "application/byte-stream"), (header::CACHE_CONTROL, IMMUTABLE)];
    (head, body).into_response()
}

/// The two files that a mirror has for each chip.
async fn chip_file(
    State(site): State<Arc<Site>>,
    Path((of, file)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    let (chip, is_proof) = match (file.strip_suffix(".cbor"), file.strip_suffix(".tlog-proof")) {
        (Some(chip), _) => (chip, false),
        (_, Some(chip)) => (chip, true),
        _ => return problem(StatusCode::NOT_FOUND, "there is no such file"),
    };
    let in_its_place = chip.parse::<ChipId>().is_ok_and(|id| shard(&id) == of && id.to_string() == chip);
    if !in_its_place {
        return refused(&ProvisionError::NoRecord);
    }
    if is_proof {
        return proof(State(site), Path(chip.to_owned())).await;
    }
    match site.find(chip).await {
        Ok(found) => {
            let tag = format!("\"{}\"", hex::encode(found.publication.record_hash));
            tagged(&headers, &tag, MINUTE, "application/cbor", found.bytes)
        }
        Err(error) => refused(&error),
    }
}
