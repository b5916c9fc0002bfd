//! Public HTTP: records, proofs, the log's tiles, and HTML pages.
//!
//! | path | content |
//! |---|---|
//! | `/` , `/devices?chip=…`, `/devices/{chip}`… | pages, without JavaScript |
//! | `/v1/devices/{chip}` | the record: JSON, CBOR or PEM, selected by `Accept` |
//! | `/v1/devices/{chip}/proof` | C2SP tlog-proof |
//! | `/checkpoint`, `/tile/…` | the log (C2SP tlog-tiles) |
//! | `/chip/{shard}/{file}`, `/log.vkey` | the other files of a mirror, at the same paths |
//!
//! There is no list of chips and no prefix search: a client must know the complete chip ID. (The log's entries are public, so a
//! client that wants all of them reads the log.)

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
use spp_format::names::ChipId;
use spp_format::tlog::TileId;
use spp_log::registry::shard;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::transport::server::TcpConnectInfo;
use tower::ServiceExt as _;
use tower_http::compression::CompressionLayer;

use super::pages;
use super::rate::RateLimit;
use super::response::{problem, tagged};
use super::serve::{Limits, Peer, serve};
use super::site::Site;
use crate::config::{PublicConfig, RegistryConfig};
use crate::provisioning::{ProvisionError, Provisioner};
use crate::server::call_error::CallError;
use crate::server::connections::Tls;
use crate::server::grpc;

/// Limits of the public listener.
const LIMITS: Limits = Limits {
    connections: 1024,
    connections_per_address: 64,
    max_age: Duration::from_secs(120),
    grace: Duration::from_secs(30),
    keep_alive: true,
};
/// Maximum size of all entry bundles in flight to clients, in KiB.
const MAX_BUNDLES_IN_FLIGHT_KIB: usize = 128 * 1024;
/// Size of a bundle for which the rate limit charges one additional request, in KiB.
const KIB_PER_REQUEST: usize = 128;
/// Maximum number of requests in progress; further requests are rejected and must be retried.
const MAX_REQUESTS: usize = 256;
/// Time limit of a request.
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// Cache control for content that never changes (C2SP tlog-tiles: long-lived).
const IMMUTABLE: &str = "public, max-age=31536000, immutable";
/// Cache control for content that changes with each batch (C2SP tlog-tiles: a few seconds).
const TWO_SECONDS: &str = "public, max-age=2";
/// Cache control for records. A record changes only if a newer one supersedes it, which should become visible soon.
const ONE_MINUTE: &str = "public, max-age=60";

/// The HTTP service of the public listener.
pub struct Public(Arc<Site>);

impl Public {
    /// Creates the service for a log.
    pub fn new(provisioner: Arc<Provisioner>, config: &PublicConfig, registry: &RegistryConfig) -> Self {
        let (title, rate, requests) = (config.title.clone(), RateLimit::new(config), Semaphore::new(MAX_REQUESTS));
        let witnesses = registry.settings.witnesses.iter().map(|witness| witness.key.clone()).collect();
        let key = registry.key.key.clone();
        let bundles = Arc::new(Semaphore::new(MAX_BUNDLES_IN_FLIGHT_KIB));
        Self(Arc::new(Site { provisioner, title, key, witnesses, rate, requests, bundles }))
    }

    /// Serves HTTP and gRPC on one listener until `stop` is true; then drains.
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
    // Hashes do not compress, and mirror files are served exactly as they are on disk.
    let uncompressed = Router::new()
        .route("/tile/{level}/{*path}", get(hashes))
        .route("/chip/{shard}/{file}", get(chip_file))
        .fallback(pages::not_found);
    let http = compressed
        .merge(uncompressed)
        .layer(middleware::map_response(add_security_headers))
        .with_state(Arc::clone(site));
    let dispatch = tower::service_fn(move |request: Request| {
        let router = if is_grpc(request.headers()) { grpc.clone() } else { http.clone() };
        router.oneshot(request)
    });
    Router::new().fallback_service(dispatch).layer(middleware::from_fn_with_state(Arc::clone(site), admit))
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// Enforces the request rate per address, the number of requests in progress and the time limit.
async fn admit(State(site): State<Arc<Site>>, mut request: Request, next: Next) -> Response {
    let is_grpc = is_grpc(request.headers());
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0);
    if let Some(peer) = peer {
        request.extensions_mut().insert(TcpConnectInfo { local_addr: None, remote_addr: Some(peer) });
        if let Err(after) = site.rate.admit(peer.ip()) {
            return rate_limited(is_grpc, after);
        }
    }
    let Ok(_permit) = site.requests.try_acquire() else { return overloaded(is_grpc) };
    tokio::time::timeout(CALL_LIMIT, next.run(request)).await.unwrap_or_else(|_| overloaded(is_grpc))
}

fn overloaded(is_grpc: bool) -> Response {
    if is_grpc {
        return grpc::overloaded(MAX_REQUESTS).into_http();
    }
    let mut refused = problem(StatusCode::SERVICE_UNAVAILABLE, "server overloaded; retry later");
    refused.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    refused
}

fn rate_limited(is_grpc: bool, after: Duration) -> Response {
    if is_grpc {
        return grpc::rate_limited(after).into_http();
    }
    let mut refused = problem(StatusCode::TOO_MANY_REQUESTS, "request rate exceeded for this address; retry later");
    let seconds = after.as_secs().saturating_add(1);
    refused.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    refused
}

/// Adds the security headers for browsers.
async fn add_security_headers(mut response: Response) -> Response {
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

/// Maps errors to HTTP responses, as `grpc::status` does for gRPC.
pub(super) fn refused(error: &CallError) -> Response {
    match error {
        CallError::Provision(ProvisionError::NoRecord) => problem(StatusCode::NOT_FOUND, "no such record"),
        CallError::Invalid(_) => {
            problem(StatusCode::BAD_REQUEST, "invalid chip ID: expected 16 to 128 hex digits (8 to 64 bytes)")
        }
        other => {
            tracing::warn!(error = %other, "cannot answer a public request");
            let mut unavailable = problem(StatusCode::SERVICE_UNAVAILABLE, "public database unavailable; retry later");
            unavailable.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
            unavailable
        }
    }
}

impl Site {
    /// Returns a tile or an entry bundle by its path.
    async fn tile(&self, path: &str) -> Result<Vec<u8>, Response> {
        let not_found = || problem(StatusCode::NOT_FOUND, "no such tile");
        let tile = path.parse::<TileId>().map_err(|_| not_found())?;
        let bytes = self.provisioner.registry().tile(tile).await.map_err(|error| refused(&error.into()))?;
        bytes.ok_or_else(not_found)
    }
}

/// The representations of a record.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Json,
    Cbor,
    Pem,
}

impl Format {
    /// Each format with the media ranges that match it, the most specific first.
    const ALL: [(Self, &'static [&'static str]); 3] = [
        (Self::Json, &["application/json", "application/*", "*/*"]),
        (Self::Cbor, &["application/cbor", "application/*", "*/*"]),
        (Self::Pem, &["application/x-pem-file", "application/pem-certificate-chain", "text/plain", "text/*", "*/*"]),
    ];

    /// Selects the format by the `Accept` header (RFC 9110 §12.5.1); JSON if several have the same weight.
    fn accepted(headers: &HeaderMap) -> Option<Self> {
        let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let ranges: Vec<_> = values.flat_map(|value| value.split(',')).take(32).map(media_range).collect();
        if ranges.is_empty() {
            return Some(Self::Json);
        }
        let mut best: Option<(f32, Self)> = None;
        for (format, names) in Self::ALL {
            // The most specific matching range determines the weight.
            let weight =
                names.iter().find_map(|name| ranges.iter().find(|(range, _)| range == name).map(|(_, weight)| *weight));
            if let Some(weight) = weight.filter(|weight| *weight > 0.0)
                && best.is_none_or(|(known, _)| weight > known)
            {
                best = Some((weight, format));
            }
        }
        best.map(|(_, format)| format)
    }
}

/// Parses a media range and its weight.
fn media_range(text: &str) -> (String, f32) {
    let mut parts = text.split(';').map(|part| part.trim().to_ascii_lowercase());
    let range = parts.next().unwrap_or_default();
    let weight = parts.find_map(|part| part.strip_prefix("q=").map(|q| q.parse().unwrap_or(0.0)));
    (range, weight.unwrap_or(1.0))
}

async fn record(State(site): State<Arc<Site>>, Path(chip): Path<String>, headers: HeaderMap) -> Response {
    let Some(format) = Format::accepted(&headers) else {
        return problem(
            StatusCode::NOT_ACCEPTABLE,
            "not acceptable: a record is available as application/json, application/cbor or application/x-pem-file",
        );
    };
    let published = match site.find(&chip).await {
        Ok(published) => published,
        Err(error) => return refused(&error),
    };
    let hash = hex::encode(published.publication.record_hash);
    let (kind, tag, body) = match format {
        Format::Json => {
            let json = published.record.to_json(published.publication.index, &published.publication.record_hash);
            ("application/json", "json", format!("{json:#}\n").into_bytes())
        }
        Format::Cbor => ("application/cbor", "cbor", published.bytes),
        Format::Pem => match published.record.certificate_pem() {
            Some(pem) => ("application/x-pem-file", "pem", pem.into_bytes()),
            None => {
                return problem(
                    StatusCode::NOT_ACCEPTABLE,
                    "the device's certificate is a CWT, which has no PEM encoding",
                );
            }
        },
    };
    tagged(&headers, &format!("W/\"{hash}-{tag}\""), ONE_MINUTE, kind, body)
}

async fn proof(State(site): State<Arc<Site>>, Path(chip): Path<String>) -> Response {
    let proven = async {
        let published = site.find(&chip).await?;
        Ok(site.provisioner.prove(published.publication.index).await?)
    };
    match proven.await {
        Ok(proof) => text(TWO_SECONDS, proof.to_bytes()),
        Err(error) => refused(&error),
    }
}

async fn checkpoint(State(site): State<Arc<Site>>) -> Response {
    match site.provisioner.registry().checkpoint().await {
        Ok(Some(checkpoint)) => text(TWO_SECONDS, checkpoint.note().to_vec()),
        Ok(None) => refused(&ProvisionError::Unsigned("no checkpoint yet".to_owned()).into()),
        Err(error) => refused(&error.into()),
    }
}

async fn vkey(State(site): State<Arc<Site>>) -> Response {
    text(ONE_MINUTE, format!("{}\n", site.key).into_bytes())
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
    // A bundle is large: it is charged as more than one request, and counts as in flight until the client has all of it.
    let kib = bytes.len() / 1024;
    let extra_requests = u32::try_from(kib / KIB_PER_REQUEST).ok().and_then(NonZeroU32::new);
    if let Some(Err(after)) = extra_requests.map(|requests| site.rate.charge(peer.0.ip(), requests)) {
        return rate_limited(false, after);
    }
    let permit = Arc::clone(&site.bundles).try_acquire_many_owned(u32::try_from(kib).unwrap_or(u32::MAX));
    let Ok(permit) = permit else { return overloaded(false) };
    immutable(Body::from(Bytes::from_owner(BundleInFlight { bytes, _permit: permit })))
}

/// A bundle that a client is downloading.
struct BundleInFlight {
    bytes: Vec<u8>,
    _permit: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for BundleInFlight {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

fn immutable(body: Body) -> Response {
    let head = [(header::CONTENT_TYPE, "application/octet-stream"), (header::CACHE_CONTROL, IMMUTABLE)];
    (head, body).into_response()
}

/// Serves the two files that a mirror has for each chip.
async fn chip_file(
    State(site): State<Arc<Site>>,
    Path((shard_name, file)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    let (chip, is_proof) = match (file.strip_suffix(".cbor"), file.strip_suffix(".tlog-proof")) {
        (Some(chip), _) => (chip, false),
        (_, Some(chip)) => (chip, true),
        _ => return problem(StatusCode::NOT_FOUND, "no such file"),
    };
    let is_canonical = chip.parse::<ChipId>().is_ok_and(|id| shard(&id) == shard_name && id.to_string() == chip);
    if !is_canonical {
        return refused(&ProvisionError::NoRecord.into());
    }
    if is_proof {
        return proof(State(site), Path(chip.to_owned())).await;
    }
    match site.find(chip).await {
        Ok(published) => {
            let tag = format!("\"{}\"", hex::encode(published.publication.record_hash));
            tagged(&headers, &tag, ONE_MINUTE, "application/cbor", published.bytes)
        }
        Err(error) => refused(&error),
    }
}
