//! Pool operations of the `Officer` service: status, filling and shredding, with progress streams.

use std::sync::Arc;
use std::time::Duration;

use spp_format::keys::KeyType;
use spp_format::names::OfficerName;
use spp_proto as proto;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::messages::timestamp;
use super::status::status_of;
use crate::audit::{AuditLog, Entry, Outcome};
use crate::keypool::{KeyPool, KindStatus, PoolStatus, ShredOrder, ShredReport};
use crate::server::call_error::CallError;
use crate::store::KeyStorage;

/// How often a stream reports the progress of a fill.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);
/// Number of progress messages to buffer for a slow reader. When the buffer is full, further messages are dropped, except the
/// last one.
const PROGRESS_BUFFER: usize = 16;

pub(super) type ProgressStream<T> = ReceiverStream<Result<T, Status>>;

/// Parses an optional key type.
pub(super) fn kind(text: &str) -> Result<Option<KeyType>, CallError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|e| CallError::invalid("kind", e))
}

/// Records and orders a fill, and streams its progress until it is complete. The fill continues if the client disconnects.
pub(super) async fn fill(
    pool: Arc<KeyPool>,
    audit: Arc<AuditLog>,
    officer: OfficerName,
    request: proto::FillPoolRequest,
) -> Result<ProgressStream<proto::FillPoolResponse>, CallError> {
    let kinds = match kind(&request.kind)? {
        Some(kind) => vec![kind],
        None => pool.kinds().collect(),
    };
    let to = (request.to > 0).then_some(request.to);
    let names = kinds.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let entry = Entry::new(format!("officer {officer}"), "pool.fill", Outcome::Begun).with("kinds", names);
    let entry = entry.with("to", to.map_or_else(|| "high mark".to_owned(), |to| to.to_string()));
    audit.record(entry.clone()).await?;
    let ordered = kinds.iter().map(|kind| Ok((*kind, pool.order_fill(*kind, to)?))).collect::<Result<Vec<_>, _>>();
    audit.record(entry.ended(outcome(&ordered))).await?;
    let ordered = ordered?;
    let (sender, stream) = mpsc::channel(PROGRESS_BUFFER);
    tokio::spawn(async move { report_fill_progress(&pool, ordered, sender).await });
    Ok(ReceiverStream::new(stream))
}

async fn report_fill_progress(
    pool: &KeyPool,
    mut ordered: Vec<(KeyType, u64)>,
    sender: mpsc::Sender<Result<proto::FillPoolResponse, Status>>,
) {
    if ordered.is_empty() {
        let _ = sender.send(Ok(proto::FillPoolResponse { done: true, ..Default::default() })).await;
    }
    while !ordered.is_empty() {
        // Read before the pool status, so that the last message has the numbers after the fill.
        let outstanding: Vec<_> = pool.kinds().filter(|kind| pool.is_ordered(*kind)).collect();
        let status = match pool.status().await {
            Ok(status) => status,
            Err(error) => {
                let _ = sender.send(Err(status_of(&error.into()))).await;
                return;
            }
        };
        for kind in status.kinds {
            let Some(target) = ordered.iter().find(|(ordered, _)| *ordered == kind.kind).map(|(_, to)| *to) else {
                continue;
            };
            if !outstanding.contains(&kind.kind) {
                ordered.retain(|(ordered, _)| *ordered != kind.kind);
            }
            let message = proto::FillPoolResponse {
                kind: kind.kind.to_string(),
                ready: kind.ready,
                target,
                fill_rate_per_second: kind.fill_rate,
                paused: kind.paused.unwrap_or_default(),
                done: ordered.is_empty(),
            };
            if sender.send(Ok(message)).await.is_err() {
                return;
            }
        }
        tokio::time::sleep(PROGRESS_INTERVAL).await;
    }
}

/// Records and starts a shredding, and streams its progress. The shredding continues if the client disconnects.
pub(super) async fn shred(
    pool: Arc<KeyPool>,
    audit: Arc<AuditLog>,
    officer: OfficerName,
    request: proto::ShredPoolRequest,
) -> Result<ProgressStream<proto::ShredPoolResponse>, CallError> {
    let order = ShredOrder { kind: kind(&request.kind)?, quarantined: request.quarantined };
    let entry = Entry::new(format!("officer {officer}"), "pool.shred", Outcome::Begun)
        .with("kind", order.kind.map_or("all", KeyType::name))
        .with("quarantined", order.quarantined);
    audit.record(entry.clone()).await?;
    let (sender, stream) = mpsc::channel(PROGRESS_BUFFER);
    tokio::spawn(async move {
        let progress_sender = sender.clone();
        let progress = move |done: usize, all: usize| {
            let message = message(ShredReport::default(), done as u64, all as u64, false);
            // A slow reader misses progress messages.
            let _ = progress_sender.try_send(Ok(message));
        };
        let shredded = pool.shred(&order, progress).await.map_err(CallError::from);
        let mut ended = entry.ended(outcome(&shredded));
        if let Ok(shredded) = &shredded {
            ended = ended.with("batches", shredded.batches).with("moved", shredded.moved);
            ended = ended.with("discarded", shredded.discarded);
        }
        let recorded = audit.record(ended).await.map_err(CallError::from);
        let last = shredded.and_then(|shredded| recorded.map(|_| shredded));
        let last = last.map(|shredded| message(shredded, shredded.batches, shredded.batches, true));
        let _ = sender.send(last.map_err(|error| status_of(&error))).await;
    });
    Ok(ReceiverStream::new(stream))
}

const fn message(shredded: ShredReport, batches_done: u64, batches: u64, done: bool) -> proto::ShredPoolResponse {
    let ShredReport { moved, discarded, .. } = shredded;
    proto::ShredPoolResponse { batches_done, batches, moved, discarded, done }
}

/// Returns the audit outcome of a result.
pub(super) fn outcome<T>(result: &Result<T, CallError>) -> Outcome {
    match result {
        Ok(_) => Outcome::Done,
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

pub(super) fn status(status: PoolStatus) -> proto::GetPoolStatusResponse {
    proto::GetPoolStatusResponse {
        store: match status.storage {
            KeyStorage::Wrapped => "wrapped",
            KeyStorage::Hsm => "hsm",
        }
        .to_owned(),
        serving: status.serving,
        kinds: status.kinds.into_iter().map(kind_status).collect(),
        session_batches: status.session_batches,
        session_pairs: status.session_pairs,
        session_next_shred: status.session_next_shred.map(timestamp),
        pairs_to_destroy: status.pairs_to_destroy,
        rolled_back: status.rolled_back.unwrap_or_default(),
        error: status.last_error.unwrap_or_default(),
    }
}

fn kind_status(status: KindStatus) -> proto::PoolKind {
    proto::PoolKind {
        kind: status.kind.to_string(),
        low: status.low,
        high: status.high,
        ready: status.ready,
        reserved: status.reserved,
        quarantined: status.quarantined,
        unavailable: status.unavailable,
        filling: status.filling,
        fill_rate_per_second: status.fill_rate,
        paused: status.paused.unwrap_or_default(),
        oldest: status.oldest.map(timestamp),
        batches: status.batches,
        next_shred: status.next_shred.map(timestamp),
        made_total: status.counts.made,
        reserved_total: status.counts.reserved,
        discarded_total: status.counts.discarded,
    }
}
