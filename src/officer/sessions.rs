//! gRPC client for the daemon's sessions: list and abort.

use std::path::Path;

use clap::ValueEnum;
use prost_types::Timestamp;
use serde_json::{Value, json};
use spp_format::names::SessionId;
use spp_proto as proto;
use spp_proto::production_client::ProductionClient;

use super::status::{StatusError, call_error, channel, with_deadline};
use super::text::{escape_controls, format_duration, format_time, render, table};

/// States of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum State {
    /// Keys are reserved; nothing is signed yet.
    Reserved,
    /// The certificate is signed; the backup package is not received yet.
    Issued,
    /// The record is published; the key pair is not erased yet.
    Published,
    /// Complete.
    Erased,
    /// Aborted or expired.
    Aborted,
}

impl State {
    pub(super) const fn message(self) -> proto::SessionState {
        match self {
            Self::Reserved => proto::SessionState::Reserved,
            Self::Issued => proto::SessionState::Issued,
            Self::Published => proto::SessionState::Published,
            Self::Erased => proto::SessionState::Erased,
            Self::Aborted => proto::SessionState::Aborted,
        }
    }
}

/// Up to `limit` matching sessions, and whether there may be more.
pub(super) async fn list(
    server: &str,
    tls: &Path,
    mut request: proto::ListSessionsRequest,
    limit: usize,
) -> Result<(Vec<proto::SessionReport>, bool), StatusError> {
    let mut client = ProductionClient::new(channel(server, tls).await?);
    let mut found = Vec::new();
    while found.len() < limit {
        request.page_size = u32::try_from(limit - found.len()).unwrap_or(u32::MAX).min(1000);
        let answer = client.list_sessions(with_deadline(request.clone())).await;
        let page = answer.map_err(|status| call_error(server, &status))?.into_inner();
        found.extend(page.sessions);
        if page.next_page_token.is_empty() {
            return Ok((found, false));
        }
        request.page_token = page.next_page_token;
    }
    Ok((found, true))
}

/// Aborts a session and returns its new state.
pub(super) async fn abort(
    server: &str,
    tls: &Path,
    session: &SessionId,
    reason: String,
) -> Result<proto::SessionReport, StatusError> {
    let mut client = ProductionClient::new(channel(server, tls).await?);
    let request = proto::AbortSessionRequest { session_id: session.as_bytes().to_vec(), reason };
    let answer = client.abort_session(with_deadline(request)).await;
    Ok(answer.map_err(|status| call_error(server, &status))?.into_inner().session.unwrap_or_default())
}

/// Describes an aborted session. It may have been aborted by an earlier call.
pub(super) fn describe_abort(session: &proto::SessionReport) -> String {
    let (id, chip) = (hex::encode(&session.session_id), hex::encode(&session.chip_id));
    let (when, why) = (format_time(seconds(session.aborted.as_ref())), escape_controls(&session.reason));
    format!("session {id} of chip {chip} aborted at {when}: {why}")
}

/// Formats sessions as a table.
pub(super) fn as_table(sessions: &[proto::SessionReport], now: u64) -> String {
    if sessions.is_empty() {
        return "no sessions".to_owned();
    }
    let mut table = table(["session", "chip", "identity", "profile", "station", "state", "age", ""], 6..=6);
    for session in sessions {
        let age = now.saturating_sub(seconds(session.created.as_ref()));
        table.add_row([
            hex::encode(&session.session_id),
            hex::encode(&session.chip_id),
            escape_controls(&session.identity),
            escape_controls(&session.profile),
            escape_controls(&session.station),
            state_name(session.state()).to_owned(),
            format_duration(i64::try_from(age).unwrap_or(i64::MAX)),
            escape_controls(&session.reason),
        ]);
    }
    render(&table)
}

/// A session as JSON; times in seconds since the Unix epoch.
pub(super) fn session_json(session: &proto::SessionReport) -> Value {
    let time = |time: &Option<Timestamp>| time.as_ref().map(|time| time.seconds);
    json!({
        "session": hex::encode(&session.session_id),
        "chip": hex::encode(&session.chip_id),
        "identity": session.identity,
        "profile": session.profile,
        "station": session.station,
        "state": state_name(session.state()),
        "created": time(&session.created),
        "expires": time(&session.expires),
        "aborted": time(&session.aborted),
        "reason": session.reason,
        "record": session.receipt.as_ref().map(receipt_json),
        "certificate_serial": hex::encode(&session.certificate_serial),
        "master_key_version": session.master_key_version,
    })
}

/// The record's index and hash as JSON.
pub(super) fn receipt_json(receipt: &proto::Receipt) -> Value {
    json!({
        "index": receipt.record_index,
        "sha256": hex::encode(&receipt.record_hash),
        "published": receipt.published.map(|time| time.seconds),
    })
}

pub(super) const fn state_name(state: proto::SessionState) -> &'static str {
    match state {
        proto::SessionState::Unspecified => "unknown",
        proto::SessionState::Reserved => "reserved",
        proto::SessionState::Issued => "issued",
        proto::SessionState::Published => "published",
        proto::SessionState::Erased => "erased",
        proto::SessionState::Aborted => "aborted",
    }
}

pub(super) fn seconds(time: Option<&Timestamp>) -> u64 {
    time.map_or(0, |time| u64::try_from(time.seconds).unwrap_or(0))
}
