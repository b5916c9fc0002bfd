//! The door of every call: a request identifier, a span, a log line, and a task of its own.

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Semaphore;
use tonic::metadata::MetadataValue;
use tonic::{Code, Response, Status};
use tracing::Instrument as _;

use super::status::status_of;
use crate::provisioning::ProvisionError;

/// The header that names a request in logs and answers.
const REQUEST_ID: &str = "x-request-id";

/// The door of one listener: so many calls may be inside at once, more are told to come again. Each costs memory, and the rooms
/// behind have queues of about the line's length. The public has a door of its own, so that it cannot crowd out the line.
#[derive(Clone)]
pub(super) struct Door {
    places: usize,
    free: Arc<Semaphore>,
}

impl Door {
    /// For stations.
    pub(super) fn line() -> Self {
        Self::with_places(1024)
    }

    /// For officers.
    pub(super) fn officer() -> Self {
        Self::with_places(64)
    }

    /// For anybody.
    pub(super) fn public() -> Self {
        Self::with_places(128)
    }

    fn with_places(places: usize) -> Self {
        Self { places, free: Arc::new(Semaphore::new(places)) }
    }
}

impl Door {
    /// See [`call`]; refused at once when the house is full.
    pub(super) async fn call<T, F>(&self, method: &'static str, caller: String, work: F) -> Result<Response<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ProvisionError>> + Send + 'static,
    {
        let place = Arc::clone(&self.free).try_acquire_owned();
        let places = self.places;
        call(method, caller, async move {
            let _place = place.map_err(|_| ProvisionError::HouseFull(places))?;
            work.await
        })
        .await
    }
}

/// Runs a call in a task of its own, so that a caller who hangs up does not stop a story between two steps, and tells how
/// it ended.
async fn call<T, F>(method: &'static str, caller: String, work: F) -> Result<Response<T>, Status>
where
    T: Send + 'static,
    F: Future<Output = Result<T, ProvisionError>> + Send + 'static,
{
    let id = request_id();
    let span = tracing::info_span!("rpc", method, request_id = %id, %caller);
    let began = Instant::now();
    let task = tokio::spawn(work.instrument(span.clone()));
    let result =
        task.await.unwrap_or_else(|e| Err(ProvisionError::Internal { doing: "answering", cause: e.to_string() }));
    let _in_span = span.enter();
    let milliseconds = began.elapsed().as_millis();
    let header = MetadataValue::try_from(&id).ok();
    match result {
        Ok(message) => {
            tracing::debug!(milliseconds, "answered");
            let mut response = Response::new(message);
            header.map(|value| response.metadata_mut().insert(REQUEST_ID, value));
            Ok(response)
        }
        Err(error) => {
            let mut status = status_of(&error);
            if status.code() == Code::Internal {
                tracing::error!(milliseconds, %error, "failed");
            } else {
                tracing::info!(milliseconds, code = ?status.code(), %error, "refused");
            }
            header.map(|value| status.metadata_mut().insert(REQUEST_ID, value));
            Err(status)
        }
    }
}

/// 8 random octets in hex: enough to find a request in a day's log.
fn request_id() -> String {
    let mut octets = [0; 8];
    // A failure of the random source leaves zeros: the request is served, its name is not unique.
    let _ = aws_lc_rs::rand::fill(&mut octets);
    hex::encode(octets)
}
