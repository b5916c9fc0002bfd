//! Metrics in the OpenMetrics text format, which Prometheus reads. They are what the rooms know at the moment of the scrape, so
//! that no counter is kept twice.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::{Registry, Unit};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::serve::serve;
use crate::provisioning::Provisioner;
use crate::rpc::line_trouble;
use crate::store::StoreError;

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
    pub async fn serve(self, provisioner: Arc<Provisioner>, stop: watch::Receiver<bool>) {
        let router = Router::new().route("/metrics", get(scrape)).with_state(provisioner);
        serve(self.0, router, stop).await;
    }
}

async fn scrape(State(provisioner): State<Arc<Provisioner>>) -> Response {
    let mut text = String::new();
    match encode(&mut text, &families(&provisioner).await) {
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
    hsm(told, provisioner);
    // A store that cannot tell is a gap in the answer, not the end of it.
    for trouble in [room(told, provisioner), sessions(told, provisioner).await, records(told, provisioner).await] {
        if let Err(error) = trouble {
            tracing::warn!(%error, "metrics are missing from a scrape");
        }
    }
    registry
}

fn hsm(told: &mut Registry, provisioner: &Provisioner) {
    let status = provisioner.hsm().status();
    gauge(told, "hsm_up", "Whether the HSM serves calls", status.ready.into());
    gauge(told, "hsm_calls_in_flight", "Calls that wait or are with the HSM", status.calls_in_flight);
    counter(told, "hsm_calls", "Calls that the HSM answered", status.calls_answered);
    counter(told, "hsm_worker_starts", "How often the HSM worker was started", status.worker_starts);
}

fn room(told: &mut Registry, provisioner: &Provisioner) -> Result<(), StoreError> {
    let (free, floor) = provisioner.journal().room()?;
    told.register_with_unit("store_free", "Free octets where the state store is", Unit::Bytes, ConstGauge::new(free));
    gauge(told, "store_free_bytes_floor", "Free octets below which no new device is taken", floor);
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
    counter(told, "records", "Records in the public database", provisioner.registry().count().await?);
    Ok(())
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
