//! Metrics in the OpenMetrics text format, which Prometheus reads. They are what the rooms know at the moment of the scrape, so
//! that no counter is kept twice.

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
use crate::rpc::{line_trouble, missing};
use crate::store::StoreError;

/// A scrape is short.
const LIMITS: Limits = Limits {
    places: 16,
    of_one_address: 16,
    age: Duration::from_secs(10),
    grace: Duration::from_secs(1),
    keep_alive: false,
};
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why HTTP cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum WebError {
    /// An address is taken or not ours.
    #[error("listening on {address} for metrics: {cause}; choose another address in [listen] metrics")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        cause: std::io::Error,
    },
}

/// The listener for metrics, bound; nothing is accepted yet. There is no TLS and no caller: it belongs on a loopback address,
/// which the configuration sees to.
pub struct Metrics(TcpListener);

impl Metrics {
    /// Binds it.
    pub async fn bind(address: SocketAddr) -> Result<Self, WebError> {
        TcpListener::bind(address).await.map(Self).map_err(|cause| WebError::Bind { address, cause })
    }

    /// Answers `GET /metrics`, and anything else with 404 or 405, until `stop` is true; then drains.
    pub async fn serve(self, told: Told, stop: watch::Receiver<bool>) {
        let router = Router::new().route("/metrics", get(scrape)).with_state(told);
        serve(self.0, None, router, LIMITS, stop).await;
    }
}

/// Who knows what is told.
#[derive(Clone)]
pub struct Told {
    /// The line.
    pub provisioner: Arc<Provisioner>,
    /// What was done and refused.
    pub auditor: Arc<Auditor>,
}

async fn scrape(State(Told { provisioner, auditor }): State<Told>) -> Response {
    let mut text = String::new();
    let mut registry = families(&provisioner).await;
    audit(&mut registry, &auditor).await;
    match encode(&mut text, &registry) {
        Ok(()) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "the metrics could not be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// Everything that is told, each family by the function that knows where it comes from. The name of a counter gets `_total`
/// when it is written.
async fn families(provisioner: &Provisioner) -> Registry {
    let mut registry = Registry::with_prefix("spp");
    let told = &mut registry;
    gauge(told, "line_served", "Whether new devices are taken", line_trouble(provisioner).is_none().into());
    ready(told, provisioner);
    hsm(told, provisioner);
    // A store that cannot tell is a gap in the answer, not the end of it.
    for trouble in [room(told, provisioner), sessions(told, provisioner).await, records(told, provisioner).await] {
        if let Err(error) = trouble {
            tracing::warn!(%error, "metrics are missing from a scrape");
        }
    }
    if let Err(error) = pools(told, provisioner).await {
        tracing::warn!(%error, "the pools' metrics are missing from a scrape");
    }
    registry
}

/// The audit log. Refusals by their reason are what to be alarmed by: QUOTA_PER_HOUR, QUOTA_TOTAL, NOT_PERMITTED, REVOKED.
async fn audit(told: &mut Registry, auditor: &Auditor) {
    let refusals = Family::<[(&'static str, &'static str); 1], Counter>::default();
    for (reason, count) in auditor.refusals() {
        refusals.get_or_create(&[("reason", reason)]).inc_by(count);
    }
    told.register(
        "refusals",
        "Calls of stations, officers and others that were refused or failed, by reason",
        refusals,
    );
    let checkpoint = auditor.checkpoint();
    let help = "Whether the end of the audit log could not be signed and published at the last attempt";
    gauge(told, "audit_checkpoint_trouble", help, checkpoint.trouble.is_some().into());
    gauge(told, "audit_checkpoint_entries", "Entries that a published checkpoint covers", checkpoint.entries);
    gauge(told, "audit_writable", "Whether the last entry could be written", (!auditor.log().is_broken()).into());
    counter(told, "audit_lost_refusals", "Refusals that could not be recorded", auditor.lost());
    if let Ok(head) = auditor.log().head().await {
        gauge(told, "audit_entries", "Entries of the audit log", head.entries);
    }
}

/// The numbers of `sppctl pool status`.
async fn pools(told: &mut Registry, provisioner: &Provisioner) -> Result<(), PoolError> {
    let status = provisioner.pool().status().await?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    gauge(told, "pool_serving", "Whether pairs of the pools are given out", status.serving.into());
    let rolled_back = u64::from(status.rolled_back.is_some());
    gauge(told, "pool_state_store_rolled_back", "Whether the state store was found to be an old copy", rolled_back);
    gauge(told, "pool_condemned_pairs", "Erased pairs that are still on the token", status.condemned);
    gauge(told, "pool_session_batches", "Batches of pairs made on the spot", status.session_batches);
    gauge(told, "pool_trouble", "Whether the batches could not be looked after", status.trouble.is_some().into());
    let sessions = status.session_next_shred.map(|at| ("on-the-spot", at));
    let kinds = status.kinds.iter().filter_map(|kind| Some((kind.kind.name(), kind.next_shred?)));
    let help =
        "When the next batch is shredded at the latest, seconds since the Unix epoch; absent if nothing was erased";
    labelled(told, "pool_next_shred_timestamp_seconds", help, "kind", kinds.chain(sessions));
    gauge(told, "pool_session_pairs", "Pairs of unfinished sessions in them", status.session_pairs);
    let mut family = |name: &str, help: &str, value: &dyn Fn(&KindStatus) -> u64| {
        labelled(told, name, help, "kind", status.kinds.iter().map(|kind| (kind.kind.name(), value(kind))));
    };
    family("pool_ready_pairs", "Pairs that wait for a device", &|kind| kind.ready);
    family("pool_away_pairs", "Pairs that wait on an HSM that is away", &|kind| kind.away);
    family("pool_reserved_pairs", "Pairs of unfinished sessions", &|kind| kind.reserved);
    family("pool_quarantined_pairs", "Pairs that are not offered any more", &|kind| kind.quarantined);
    family("pool_low_mark", "Ready pairs below which the pool is filled", &|kind| kind.low);
    family("pool_high_mark", "Ready pairs up to which the pool is filled", &|kind| kind.high);
    family("pool_batches", "Batches, and with them keys on the token", &|kind| kind.batches);
    family("pool_filling", "Whether the pool is being filled", &|kind| kind.filling.into());
    family("pool_paused", "Whether the filling is held up", &|kind| kind.paused.is_some().into());
    family("pool_oldest_batch_age_seconds", "Age of the oldest batch with ready pairs", &|kind| {
        kind.oldest.map_or(0, |oldest| now.saturating_sub(oldest))
    });
    family("pool_made_pairs", "Pairs ever put into the pool", &|kind| kind.counts.made);
    family("pool_taken_pairs", "Pairs ever reserved for a session", &|kind| kind.counts.reserved);
    family("pool_discarded_pairs", "Pairs ever given up unused", &|kind| kind.counts.discarded);
    let rates = Family::<[(&'static str, &'static str); 1], Gauge<f64, AtomicU64>>::default();
    for kind in &status.kinds {
        rates.get_or_create(&[("kind", kind.kind.name())]).set(kind.fill_rate);
    }
    told.register("pool_fill_rate_per_second", "Pairs per second of this filling, or of the last one", rates);
    Ok(())
}

/// One value for each dependency that a service lacks; absent while it lacks none.
fn ready(told: &mut Registry, provisioner: &Provisioner) {
    let services = Family::<[(&'static str, &'static str); 1], Gauge>::default();
    let lacking = Family::<[(&'static str, &'static str); 2], Gauge>::default();
    for (service, missing) in missing(provisioner) {
        services.get_or_create(&[("service", service)]).set(missing.is_empty().into());
        for one in missing {
            lacking.get_or_create(&[("service", service), ("dependency", one.dependency)]).set(1);
        }
    }
    told.register("service_ready", "Whether the service is served", services);
    told.register("service_missing_dependency", "What a service needs and does not have", lacking);
}

fn hsm(told: &mut Registry, provisioner: &Provisioner) {
    let status = provisioner.hsm().status();
    gauge(told, "hsm_up", "Whether calls are served: one HSM is enough", status.ready.into());
    gauge(told, "hsm_calls_in_flight", "Calls that wait or are with an HSM", status.calls_in_flight);
    gauge(told, "hsm_queue_places", "Calls that may wait at once", status.queue);
    let up = Family::<[(&'static str, String); 1], Gauge>::default();
    let calls = Family::<[(&'static str, String); 1], Counter>::default();
    let starts = Family::<[(&'static str, String); 1], Counter>::default();
    for member in &status.members {
        let label = [("hsm", member.name.clone())];
        up.get_or_create(&label).set(member.ready.into());
        calls.get_or_create(&label).inc_by(member.calls_answered);
        starts.get_or_create(&label).inc_by(member.worker_starts);
    }
    told.register("hsm_ready", "Whether this HSM serves calls", up);
    told.register("hsm_calls", "Calls that the HSM answered", calls);
    told.register("hsm_worker_starts", "How often the HSM's worker was started", starts);
    let help = "What was asked of the HSM, by verb and result, and how long it took there";
    told.register_with_unit("hsm_operation", help, Unit::Seconds, Latencies(status.members));
}

fn room(told: &mut Registry, provisioner: &Provisioner) -> Result<(), StoreError> {
    let (free, floor) = provisioner.journal().room()?;
    told.register_with_unit("store_free", "Free bytes where the state store is", Unit::Bytes, ConstGauge::new(free));
    gauge(told, "store_free_bytes_floor", "Free bytes below which no new device is taken", floor);
    Ok(())
}

async fn sessions(told: &mut Registry, provisioner: &Provisioner) -> Result<(), StoreError> {
    let counts = provisioner.journal().counts().await?;
    let by_state = [
        ("reserved", counts.reserved),
        ("issued", counts.issued),
        ("published", counts.published),
        ("erased", counts.erased),
        ("aborted", counts.aborted),
    ];
    labelled(told, "sessions", "Sessions by state", "state", by_state);
    Ok(())
}

async fn records(told: &mut Registry, provisioner: &Provisioner) -> Result<(), StoreError> {
    let log = provisioner.registry().status();
    counter(
        told,
        "log_checkpoints",
        "Checkpoints signed since the start; entries that come together share one",
        log.batches,
    );
    gauge(told, "log_publishing", "Whether records can be published", log.publishing_trouble.is_none().into());
    gauge(told, "log_reading", "Whether records can be looked up", log.reading_trouble.is_none().into());
    let witnesses = Family::<[(&'static str, String); 1], Gauge>::default();
    let troubled = Family::<[(&'static str, String); 1], Gauge>::default();
    for witness in log.witnesses {
        witnesses.get_or_create(&[("witness", witness.name.clone())]).set(witness.size.try_into().unwrap_or(i64::MAX));
        troubled.get_or_create(&[("witness", witness.name)]).set(witness.trouble.is_some().into());
    }
    told.register("log_witness_size", "Entries of the largest tree that the witness has cosigned", witnesses);
    told.register("log_witness_trouble", "Whether the witness did not cosign the last checkpoint", troubled);
    counter(told, "records", "Device records in the public database", provisioner.registry().count().await?);
    Ok(())
}

/// Histograms that the HSM's room keeps.
#[derive(Debug)]
struct Latencies(Vec<MemberStatus>);

impl EncodeMetric for Latencies {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> std::fmt::Result {
        let all = self.0.iter().flat_map(|member| member.calls.iter().map(|calls| (member.name.as_str(), calls)));
        for (hsm, calls) in all {
            let bounds = LATENCY_BOUNDS_US.iter().map(|us| f64::from(*us) / 1e6).chain([f64::MAX]);
            let buckets: Vec<_> = bounds.zip(calls.by_latency).collect();
            let labels = [("hsm", hsm), ("verb", calls.verb), ("result", calls.outcome)];
            let mut one = encoder.encode_family(&labels)?;
            one.encode_histogram::<[(&str, &str); 0]>(calls.took.as_secs_f64(), calls.count, &buckets, None)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

fn gauge(told: &mut Registry, name: &str, help: &str, value: u64) {
    told.register(name, help, ConstGauge::new(value));
}

fn counter(told: &mut Registry, name: &str, help: &str, value: u64) {
    told.register(name, help, ConstCounter::new(value));
}

/// A gauge with one value for each of a label's.
fn labelled(
    told: &mut Registry,
    name: &str,
    help: &str,
    label: &'static str,
    values: impl IntoIterator<Item = (&'static str, u64)>,
) {
    let family = Family::<[(&'static str, &'static str); 1], Gauge>::default();
    for (of, value) in values {
        family.get_or_create(&[(label, of)]).set(value.try_into().unwrap_or(i64::MAX));
    }
    told.register(name, help, family);
}
