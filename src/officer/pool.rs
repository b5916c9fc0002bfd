//! gRPC client for the daemon's key pools: status, fill and shred.

use std::path::Path;

use prost_types::Timestamp;
use serde_json::json;
use spp_proto as proto;

use super::status::{StatusError, call_error, connect, with_deadline};
use super::text::{format_duration, render, table};

/// Requests the status of all pools.
pub(super) async fn pool_status(server: &str, tls: &Path) -> Result<proto::GetPoolStatusResponse, StatusError> {
    let mut client = connect(server, tls).await?;
    let answer = client.get_pool_status(with_deadline(proto::GetPoolStatusRequest {})).await;
    Ok(answer.map_err(|status| call_error(server, &status))?.into_inner())
}

/// Fills pools and reports each step; returns when the target is reached.
pub(super) async fn fill_pool(
    server: &str,
    tls: &Path,
    request: proto::FillPoolRequest,
    mut on_step: impl FnMut(&proto::FillPoolResponse),
) -> Result<(), StatusError> {
    let mut client = connect(server, tls).await?;
    let answer = client.fill_pool(request).await.map_err(|status| call_error(server, &status))?;
    let mut steps = answer.into_inner();
    while let Some(step) = steps.message().await.map_err(|status| call_error(server, &status))? {
        on_step(&step);
        if step.done {
            return Ok(());
        }
    }
    Err(stream_ended(server))
}

/// Shreds erased pairs and reports each step; returns the last step.
pub(super) async fn shred_pool(
    server: &str,
    tls: &Path,
    request: proto::ShredPoolRequest,
    mut on_step: impl FnMut(&proto::ShredPoolResponse),
) -> Result<proto::ShredPoolResponse, StatusError> {
    let mut client = connect(server, tls).await?;
    let answer = client.shred_pool(request).await.map_err(|status| call_error(server, &status))?;
    let mut steps = answer.into_inner();
    while let Some(step) = steps.message().await.map_err(|status| call_error(server, &status))? {
        on_step(&step);
        if step.done {
            return Ok(step);
        }
    }
    Err(stream_ended(server))
}

fn stream_ended(server: &str) -> StatusError {
    let cause = "the response stream ended early; the daemon may still be working, see sppctl pool status".to_owned();
    StatusError::Connect { server: server.to_owned(), cause }
}

/// The pools as a table, followed by warnings.
pub(super) fn describe_pool(status: &proto::GetPoolStatusResponse) -> String {
    let header = ["kind", "ready", "low", "high", "reserved", "fill rate", "age", "batches", "next shred", ""];
    let mut table = table(header, 1..=8);
    for kind in &status.kinds {
        let state = match (kind.paused.as_str(), kind.filling) {
            ("", true) => "filling".to_owned(),
            ("", false) => String::new(),
            (reason, _) => format!("paused: {reason}"),
        };
        table.add_row([
            kind.kind.clone(),
            kind.ready.to_string(),
            kind.low.to_string(),
            kind.high.to_string(),
            kind.reserved.to_string(),
            format!("{:.1}/s", kind.fill_rate_per_second),
            age(kind.oldest.as_ref()),
            kind.batches.to_string(),
            time_until(kind.next_shred.as_ref()),
            state,
        ]);
    }
    let (reserved, batches) = (status.session_pairs.to_string(), status.session_batches.to_string());
    let next = time_until(status.session_next_shred.as_ref());
    let dash = || "-".to_owned();
    let on_demand = "on demand".to_owned();
    table.add_row([on_demand, dash(), dash(), dash(), reserved, dash(), dash(), batches, next, String::new()]);
    let mut text = format!("pairs are stored {}\n{}\n", storage_text(&status.store), render(&table));
    let mut push_line = |line: String| text.push_str(&format!("{line}\n"));
    if !status.serving {
        push_line("NOT serving: the comparison of the store with the token is not finished".to_owned());
    }
    if !status.error.is_empty() {
        push_line(format!("error: {}; retrying", status.error));
    }
    let quarantined: u64 = status.kinds.iter().map(|kind| kind.quarantined).sum();
    if !status.rolled_back.is_empty() {
        push_line(format!("ROLLED BACK: {}", status.rolled_back));
    }
    if quarantined > 0 {
        push_line(format!(
            "{quarantined} pairs are in quarantine: restore the current state store, or discard them with sppctl pool shred \
             --quarantined"
        ));
    }
    let unavailable: u64 = status.kinds.iter().map(|kind| kind.unavailable).sum();
    if unavailable > 0 {
        push_line(format!("{unavailable} pairs belong to an unavailable HSM; see sppctl hsm status"));
    }
    if status.pairs_to_destroy > 0 {
        push_line(format!("{} erased pairs are still on the token; they are being destroyed", status.pairs_to_destroy));
    }
    text
}

fn storage_text(store: &str) -> &'static str {
    match store {
        "hsm" => "as objects of the token",
        _ => "in the state store, wrapped by the HSM",
    }
}

fn age(time: Option<&Timestamp>) -> String {
    time.map_or_else(|| "-".to_owned(), |time| format_duration(now() - time.seconds))
}

fn time_until(time: Option<&Timestamp>) -> String {
    time.map_or_else(|| "-".to_owned(), |time| format!("in {}", format_duration(time.seconds - now())))
}

fn now() -> i64 {
    i64::try_from(super::now()).unwrap_or(i64::MAX)
}

/// The pool status as JSON.
pub(super) fn pool_json(status: &proto::GetPoolStatusResponse) -> serde_json::Value {
    let seconds = |time: &Option<Timestamp>| time.as_ref().map(|time| time.seconds);
    let kind = |kind: &proto::PoolKind| {
        json!({
            "kind": kind.kind,
            "low": kind.low,
            "high": kind.high,
            "ready": kind.ready,
            "reserved": kind.reserved,
            "quarantined": kind.quarantined,
            "unavailable": kind.unavailable,
            "filling": kind.filling,
            "fill_rate_per_second": kind.fill_rate_per_second,
            "paused": kind.paused,
            "oldest": seconds(&kind.oldest),
            "batches": kind.batches,
            "next_shred": seconds(&kind.next_shred),
            "made_total": kind.made_total,
            "reserved_total": kind.reserved_total,
            "discarded_total": kind.discarded_total,
        })
    };
    json!({
        "store": status.store,
        "serving": status.serving,
        "kinds": status.kinds.iter().map(kind).collect::<Vec<_>>(),
        "session_batches": status.session_batches,
        "session_pairs": status.session_pairs,
        "session_next_shred": seconds(&status.session_next_shred),
        "pairs_to_destroy": status.pairs_to_destroy,
        "rolled_back": status.rolled_back,
        "error": status.error,
    })
}

/// One shredding step as JSON.
pub(super) fn shredded_json(step: &proto::ShredPoolResponse) -> serde_json::Value {
    json!({ "batches": step.batches_done, "moved": step.moved, "discarded": step.discarded })
}
