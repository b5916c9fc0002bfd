//! Serves metrics in the OpenMetrics text format for Prometheus. Each scrape reads the values from the modules that own them, so
//! no counter exists twice.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::{Registry, Unit};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::serve::{Limits, serve};
use crate::audit::Auditor;
use crate::hsm::{LATENCY_BOUNDS_US, MemberStatus};
use crate::keypool::{KindStatus, PoolError};
use crate::provisioning::Provisioner;
use crate::server::grpc::{line_unavailable_reason, missing_dependencies};
use crate::store::StoreError;

/// Limits of the metrics listener. Scrapes are short.
const LIMITS: Limits = Limits {
    connections: 16,
    connections_per_address: 16,
    max_age: Duration::from_secs(10),
    grace: Duration::from_secs(1),
    keep_alive: false,
};
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why metrics cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The address is in use or not local.
    #[error("cannot listen on {address} for metrics: {cause}; choose another address in [listen] metrics")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The operating system's error.
        #[source]
        cause: std::io::Error,
    },
}

/// The bound metrics listener; it does not accept connections yet. It has no TLS and no authentication, so the configuration
/// allows only loopback addresses.
pub struct Metrics(TcpListener);

impl Metrics {
    /// Binds the listener.
    pub async fn bind(address: SocketAddr) -> Result<Self, HttpError> {
        TcpListener::bind(address).await.map(Self).map_err(|cause| HttpError::Bind { address, cause })
    }

    /// Answers `GET /metrics`, and other requests with 404 or 405, until `stop` is true; then drains.
    pub async fn serve(self, sources: MetricsSources, stop: watch::Receiver<bool>) {
        let router = Router::new().route("/metrics", get(scrape)).with_state(sources);
        serve(self.0, None, router, LIMITS, stop).await;
    }
}

/// The sources of all metrics.
#[derive(Clone)]
pub struct MetricsSources {
    /// Provisioning, and through it HSM, stores, pools and registry.
    pub provisioner: Arc<Provisioner>,
    /// The audit log and the refusal counters.
    pub auditor: Arc<Auditor>,
}

async fn scrape(State(MetricsSources { provisioner, auditor }): State<MetricsSources>) -> Response {
    let mut text = String::new();
    let mut registry = families(&provisioner).await;
    audit(&mut registry, &auditor).await;
    match encode(&mut text, &registry) {
        Ok(()) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "cannot encode metrics");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// Collects all metric families except the audit log's. The encoder appends `_total` to counter names.
async fn families(provisioner: &Provisioner) -> Registry {
    let mut registry = Registry::with_prefix("spp");
    let families = &mut registry;
    gauge(
        families,
        "line_served",
        "Whether the Line service accepts new devices",
        line_unavailable_reason(provisioner).is_none().into(),
    );
    ready(families, provisioner);
    hsm(families, provisioner);
    // If a store cannot be read, its metrics are missing from the answer; the others are not.
    for result in
        [disk_space(families, provisioner), sessions(families, provisioner).await, records(families, provisioner).await]
    {
        if let Err(error) = result {
            tracing::warn!(%error, "metrics missing from a scrape");
        }
    }
    if let Err(error) = pools(families, provisioner).await {
        tracing::warn!(%error, "pool metrics missing from a scrape");
    }
    registry
}

/// Adds audit metrics. Alert on refusals by reason: QUOTA_PER_HOUR, QUOTA_TOTAL, NOT_PERMITTED, REVOKED.
async fn audit(families: &mut Registry, auditor: &Auditor) {
    let refusals = Family::<[(&'static str, &'static str); 1], Counter>::default();
    for (reason, count) in auditor.refusals() {
        refusals.get_or_create(&[("reason", reason)]).inc_by(count);
    }
    families.register(
        "refusals",
        "Authenticated and unauthenticated calls that were refused or failed, by reason",
        refusals,
    );
    let checkpoint = auditor.checkpoint();
    let help = "Whether the last attempt to sign and publish an audit checkpoint failed";
    gauge(families, "audit_checkpoint_failing", help, checkpoint.last_error.is_some().into());
    gauge(
        families,
        "audit_checkpoint_entries",
        "Audit log entries covered by a published checkpoint",
        checkpoint.entries,
    );
    gauge(
        families,
        "audit_writable",
        "Whether the last audit log entry could be written",
        (!auditor.log().is_broken()).into(),
    );
    counter(families, "audit_lost_refusals", "Refusals that could not be recorded in the audit log", auditor.lost());
    if let Ok(head) = auditor.log().head().await {
        gauge(families, "audit_entries", "Entries in the audit log", head.entries);
    }
}

/// Adds the values that `sppctl pool status` shows.
async fn pools(families: &mut Registry, provisioner: &Provisioner) -> Result<(), PoolError> {
    let status = provisioner.pool().status().await?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    gauge(families, "pool_serving", "Whether the pools supply pairs to sessions", status.serving.into());
    let rolled_back = u64::from(status.rolled_back.is_some());
    gauge(
        families,
        "pool_state_store_rolled_back",
        "Whether the state store was detected to be an old copy",
        rolled_back,
    );
    gauge(
        families,
        "pool_pairs_to_destroy",
        "Erased pairs that remain to be destroyed on the token",
        status.pairs_to_destroy,
    );
    gauge(
        families,
        "pool_session_batches",
        "Batches of pairs generated on demand for sessions",
        status.session_batches,
    );
    gauge(
        families,
        "pool_failing",
        "Whether the last maintenance of the batches failed",
        status.last_error.is_some().into(),
    );
    let sessions = status.session_next_shred.map(|at| ("on-the-spot", at));
    let kinds = status.kinds.iter().filter_map(|kind| Some((kind.kind.name(), kind.next_shred?)));
    let help = "Latest time of the next shredding, in seconds since the Unix epoch; absent if no pair was erased";
    labelled(families, "pool_next_shred_timestamp_seconds", help, "kind", kinds.chain(sessions));
    gauge(families, "pool_session_pairs", "Pairs of unfinished sessions in on-demand batches", status.session_pairs);
    let mut family = |name: &str, help: &str, value: &dyn Fn(&KindStatus) -> u64| {
        labelled(families, name, help, "kind", status.kinds.iter().map(|kind| (kind.kind.name(), value(kind))));
    };
    family("pool_ready_pairs", "Ready pairs", &|kind| kind.ready);
    family("pool_unavailable_pairs", "Ready pairs on an unavailable HSM", &|kind| kind.unavailable);
    family("pool_reserved_pairs", "Pairs reserved for unfinished sessions", &|kind| kind.reserved);
    family("pool_quarantined_pairs", "Pairs withdrawn because the state store was an old copy", &|kind| {
        kind.quarantined
    });
    family("pool_low_mark", "Number of ready pairs below which a fill starts", &|kind| kind.low);
    family("pool_high_mark", "Number of ready pairs at which a fill ends", &|kind| kind.high);
    family("pool_batches", "Batches; each has one key on the token", &|kind| kind.batches);
    family("pool_filling", "Whether the pool is being filled", &|kind| kind.filling.into());
    family("pool_paused", "Whether a due fill is paused", &|kind| kind.paused.is_some().into());
    family("pool_oldest_batch_age_seconds", "Age of the oldest batch with ready pairs", &|kind| {
        kind.oldest.map_or(0, |oldest| now.saturating_sub(oldest))
    });
    family("pool_made_pairs", "Pairs added to the pool since its creation", &|kind| kind.counts.made);
    family("pool_reserved_total", "Pairs reserved for a session since the pool's creation", &|kind| {
        kind.counts.reserved
    });
    family("pool_discarded_pairs", "Pairs discarded unused since the pool's creation", &|kind| kind.counts.discarded);
    let rates = Family::<[(&'static str, &'static str); 1], Gauge<f64, AtomicU64>>::default();
    for kind in &status.kinds {
        rates.get_or_create(&[("kind", kind.kind.name())]).set(kind.fill_rate);
    }
    families.register("pool_fill_rate_per_second", "Fill rate of the current or last fill, in pairs per second", rates);
    Ok(())
}

/// Adds readiness per service, and one value for each missing dependency.
fn ready(families: &mut Registry, provisioner: &Provisioner) {
    let services = Family::<[(&'static str, &'static str); 1], Gauge>::default();
    let dependencies = Family::<[(&'static str, &'static str); 2], Gauge>::default();
    for (service, missing) in missing_dependencies(provisioner) {
        services.get_or_create(&[("service", service)]).set(missing.is_empty().into());
        for missing in missing {
            dependencies.get_or_create(&[("service", service), ("dependency", missing.dependency)]).set(1);
        }
    }
    families.register("service_ready", "Whether the service is available", services);
    families.register(
        "service_missing_dependency",
        "Dependencies that a service needs and that are unavailable",
        dependencies,
    );
}

fn hsm(families: &mut Registry, provisioner: &Provisioner) {
    let status = provisioner.hsm().status();
    gauge(families, "hsm_up", "Whether at least one HSM is ready", status.ready.into());
    gauge(families, "hsm_calls_in_flight", "Calls queued or in progress at an HSM", status.calls_in_flight);
    gauge(families, "hsm_queue_places", "Maximum number of queued calls", status.queue);
    let up = Family::<[(&'static str, String); 1], Gauge>::default();
    let calls = Family::<[(&'static str, String); 1], Counter>::default();
    let starts = Family::<[(&'static str, String); 1], Counter>::default();
    for member in &status.members {
        let label = [("hsm", member.name.clone())];
        up.get_or_create(&label).set(member.ready.into());
        calls.get_or_create(&label).inc_by(member.calls_answered);
        starts.get_or_create(&label).inc_by(member.worker_starts);
    }
    families.register("hsm_ready", "Whether this HSM is ready", up);
    families.register("hsm_calls", "Calls answered by the HSM", calls);
    families.register("hsm_worker_starts", "Starts of the HSM's worker process", starts);
    let help = "Duration of calls in the HSM, by operation and result";
    families.register_with_unit("hsm_operation", help, Unit::Seconds, Latencies(status.members));
}

fn disk_space(families: &mut Registry, provisioner: &Provisioner) -> Result<(), StoreError> {
    let (free, floor) = provisioner.journal().disk_space()?;
    families.register_with_unit(
        "store_free",
        "Free bytes on the state store's file system",
        Unit::Bytes,
        ConstGauge::new(free),
    );
    gauge(families, "store_free_bytes_floor", "Minimum free bytes for accepting new devices", floor);
    Ok(())
}

async fn sessions(families: &mut Registry, provisioner: &Provisioner) -> Result<(), StoreError> {
    let counts = provisioner.journal().counts().await?;
    let by_state = [
        ("reserved", counts.reserved),
        ("issued", counts.issued),
        ("published", counts.published),
        ("erased", counts.erased),
        ("aborted", counts.aborted),
    ];
    labelled(families, "sessions", "Sessions by state", "state", by_state);
    Ok(())
}

async fn records(families: &mut Registry, provisioner: &Provisioner) -> Result<(), StoreError> {
    let log = provisioner.registry().status();
    counter(
        families,
        "log_checkpoints",
        "Log checkpoints signed since the daemon's start; concurrent entries share a checkpoint",
        log.checkpoints,
    );
    gauge(families, "log_publishing", "Whether records can be published", log.publish_error.is_none().into());
    gauge(families, "log_reading", "Whether records can be looked up", log.read_error.is_none().into());
    let witnesses = Family::<[(&'static str, String); 1], Gauge>::default();
    let failing = Family::<[(&'static str, String); 1], Gauge>::default();
    for witness in log.witnesses {
        witnesses.get_or_create(&[("witness", witness.name.clone())]).set(witness.size.try_into().unwrap_or(i64::MAX));
        failing.get_or_create(&[("witness", witness.name)]).set(witness.error.is_some().into());
    }
    families.register("log_witness_size", "Size of the largest tree that the witness has cosigned", witnesses);
    families.register("log_witness_failing", "Whether the witness failed to cosign the last checkpoint", failing);
    counter(families, "records", "Device records in the public database", provisioner.registry().len().await?);
    Ok(())
}

/// Encodes the latency histograms of the `hsm` module.
#[derive(Debug)]
struct Latencies(Vec<MemberStatus>);

impl EncodeMetric for Latencies {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> std::fmt::Result {
        let statistics =
            self.0.iter().flat_map(|member| member.calls.iter().map(|calls| (member.name.as_str(), calls)));
        for (hsm, calls) in statistics {
            let bounds = LATENCY_BOUNDS_US.iter().map(|us| f64::from(*us) / 1e6).chain([f64::MAX]);
            let buckets: Vec<_> = bounds.zip(calls.by_latency).collect();
            let labels = [("hsm", hsm), ("operation", calls.operation), ("result", calls.outcome)];
            let mut histogram = encoder.encode_family(&labels)?;
            histogram.encode_histogram::<[(&str, &str); 0]>(calls.took.as_secs_f64(), calls.count, &buckets, None)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

fn gauge(families: &mut Registry, name: &str, help: &str, value: u64) {
    families.register(name, help, ConstGauge::new(value));
}

fn counter(families: &mut Registry, name: &str, help: &str, value: u64) {
    families.register(name, help, ConstCounter::new(value));
}

/// Adds a gauge with one value per label value.
fn labelled(
    families: &mut Registry,
    name: &str,
    help: &str,
    label: &'static str,
    values: impl IntoIterator<Item = (&'static str, u64)>,
) {
    let family = Family::<[(&'static str, &'static str); 1], Gauge>::default();
    for (label_value, value) in values {
        family.get_or_create(&[(label, label_value)]).set(value.try_into().unwrap_or(i64::MAX));
    }
    families.register(name, help, family);
}
