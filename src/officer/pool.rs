//! The pools of the running daemon, over gRPC with an officer's certificate: a look, a filling, a shredding.

use std::path::Path;

use prost_types::Timestamp;
use serde_json::json;

use super::status::{StatusError, connect, refused, with_deadline};
use super::text::{duration, table, trimmed};
use crate::proto;

/// How the pools stand.
pub(super) async fn pool_status(server: &str, tls: &Path) -> Result<proto::GetPoolStatusResponse, StatusError> {
    let mut client = connect(server, tls).await?;
    let answer = client.get_pool_status(with_deadline(proto::GetPoolStatusRequest {})).await;
    Ok(answer.map_err(|status| refused(server, &status))?.into_inner())
}

/// Fills pools and tells each step; ends when all that was ordered is there.
pub(super) async fn fill_pool(
    server: &str,
    tls: &Path,
    request: proto::FillPoolRequest,
    mut tell: impl FnMut(&proto::FillPoolResponse),
) -> Result<(), StatusError> {
    let mut client = connect(server, tls).await?;
    let answer = client.fill_pool(request).await.map_err(|status| refused(server, &status))?;
    let mut steps = answer.into_inner();
    while let Some(step) = steps.message().await.map_err(|status| refused(server, &status))? {
        tell(&step);
        if step.done {
            return Ok(());
        }
    }
    Err(cut_off(server))
}

/// Shreds and tells each step; answers with the last one.
pub(super) async fn shred_pool(
    server: &str,
    tls: &Path,
    request: proto::ShredPoolRequest,
    mut tell: impl FnMut(&proto::ShredPoolResponse),
) -> Result<proto::ShredPoolResponse, StatusError> {
    let mut client = connect(server, tls).await?;
    let answer = client.shred_pool(request).await.map_err(|status| refused(server, &status))?;
    let mut steps = answer.into_inner();
    while let Some(step) = steps.message().await.map_err(|status| refused(server, &status))? {
        tell(&step);
        if step.done {
            return Ok(step);
        }
    }
    Err(cut_off(server))
}

fn cut_off(server: &str) -> StatusError {
    let cause = "it stopped telling; what was ordered may go on there, see sppctl pool status".to_owned();
    StatusError::Connect { server: server.to_owned(), cause }
}

/// The pools as a table and what else there is to say.
pub(super) fn describe_pool(status: &proto::GetPoolStatusResponse) -> String {
    let header = ["kind", "ready", "low", "high", "reserved", "fill rate", "age", "batches", "next shred", ""];
    let mut table = table(header, 1..=8);
    for kind in &status.kinds {
        let state = match (kind.paused.as_str(), kind.filling) {
            ("", true) => "filling".to_owned(),
            ("", false) => String::new(),
            (why, _) => format!("paused: {why}"),
        };
        table.add_row([
            kind.kind.clone(),
            kind.ready.to_string(),
            kind.low.to_string(),
            kind.high.to_string(),
            kind.reserved.to_string(),
            format!("{:.1}/s", kind.fill_rate_per_second),
            since(kind.oldest.as_ref()),
            kind.batches.to_string(),
            until(kind.next_shred.as_ref()),
            state,
        ]);
    }
    let (reserved, batches) = (status.session_pairs.to_string(), status.session_batches.to_string());
    let next = until(status.session_next_shred.as_ref());
    let dash = || "-".to_owned();
    let on_the_spot = "on the spot".to_owned();
    table.add_row([on_the_spot, dash(), dash(), dash(), reserved, dash(), dash(), batches, next, String::new()]);
    let mut text = format!("pairs are kept {}\n{}\n", keeping(&status.store), trimmed(&table));
    let mut say = |line: String| text.push_str(&format!("{line}\n"));
    if !status.serving {
        say("NOT serving: the store and the token have not been compared yet".to_owned());
    }
    if !status.trouble.is_empty() {
        say(format!("trouble: {}; it is tried again", status.trouble));
    }
    let quarantined: u64 = status.kinds.iter().map(|kind| kind.quarantined).sum();
    if !status.rolled_back.is_empty() {
        say(format!("ROLLED BACK: {}", status.rolled_back));
    }
    if quarantined > 0 {
        say(format!(
            "{quarantined} pairs are in quarantine: put the right state store back, or give them up with sppctl pool shred \
             --quarantined"
        ));
    }
    let away: u64 = status.kinds.iter().map(|kind| kind.away).sum();
    if away > 0 {
        say(format!("{away} pairs wait on an HSM that is away; see sppctl hsm status"));
    }
    if status.condemned > 0 {
        say(format!("{} erased pairs are still on the token and are being destroyed", status.condemned));
    }
    text
}

fn keeping(store: &str) -> &'static str {
    match store {
        "hsm" => "as objects of the token",
        _ => "in the state store, wrapped by the HSM",
    }
}

fn since(time: Option<&Timestamp>) -> String {
    time.map_or_else(|| "-".to_owned(), |time| duration(now() - time.seconds))
}

fn until(time: Option<&Timestamp>) -> String {
    time.map_or_else(|| "-".to_owned(), |time| format!("in {}", duration(time.seconds - now())))
}

fn now() -> i64 {
    i64::try_from(super::now()).unwrap_or(i64::MAX)
}

/// The pools for programs.
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
            "away": kind.away,
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
        "condemned": status.condemned,
        "rolled_back": status.rolled_back,
        "trouble": status.trouble,
    })
}

/// A step of a shredding for programs.
pub(super) fn shredded_json(step: &proto::ShredPoolResponse) -> serde_json::Value {
    json!({ "batches": step.batches_done, "moved": step.moved, "discarded": step.discarded })
}
