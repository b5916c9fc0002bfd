//! `sppctl device show`: data about one device from the daemon and the audit log.

use std::path::Path;
use std::str::FromStr;

use serde_json::{Value, json};
use spp_format::names::{ChipId, DeviceIdentity};
use spp_log::audit::{Entries, RecordedEntry};
use spp_proto as proto;
use spp_proto::get_device_request::Device;
use spp_proto::production_client::ProductionClient;

use super::audit_cli::format_entry;
use super::sessions::{receipt_json, seconds, session_json, state_name};
use super::status::{StatusError, call_error, channel, with_deadline};
use super::text::{aligned_lines, escape_controls, format_time};
use crate::audit::AuditError;

/// A chip ID in hex or a device identity with its type prefix.
#[derive(Debug, Clone)]
pub enum DeviceName {
    /// Chip ID.
    Chip(ChipId),
    /// Device identity.
    Identity(DeviceIdentity),
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Every identity contains a colon; hex does not.
        if text.contains(':') {
            return text.parse().map(Self::Identity).map_err(|e: spp_format::names::NameError| e.to_string());
        }
        text.parse()
            .map(Self::Chip)
            .map_err(|e| format!("{e}; expected a chip ID in hex or an identity, for example imei:490154203237518"))
    }
}

/// Requests the device from the daemon.
pub(super) async fn device(
    server: &str,
    tls: &Path,
    name: DeviceName,
) -> Result<proto::GetDeviceResponse, StatusError> {
    let device = Some(match name {
        DeviceName::Chip(chip) => Device::ChipId(chip.as_bytes().to_vec()),
        DeviceName::Identity(identity) => Device::Identity(identity.to_string()),
    });
    let mut client = ProductionClient::new(channel(server, tls).await?);
    let answer = client.get_device(with_deadline(proto::GetDeviceRequest { device })).await;
    Ok(answer.map_err(|status| call_error(server, &status))?.into_inner())
}

/// Audit entries about the device: those with a detail that contains its chip ID or one of its session IDs.
pub(super) fn entries_about(
    directory: &Path,
    device: &proto::GetDeviceResponse,
) -> Result<Vec<RecordedEntry>, AuditError> {
    let sessions = device.sessions.iter().map(|session| hex::encode(&session.session_id));
    let names: Vec<_> = sessions.chain([hex::encode(&device.chip_id)]).collect();
    // Compare whole words: a short chip ID may be a substring of a longer one.
    let is_about = |value: &String| value.split_whitespace().any(|word| names.iter().any(|name| name == word));
    let (mut entries, mut found) = (Entries::open(directory)?, Vec::new());
    while let Some(entry) = entries.next_entry()? {
        if entry.details.values().any(is_about) {
            found.push(entry);
        }
    }
    Ok(found)
}

/// Formats the device as text.
pub(super) fn as_text(device: &proto::GetDeviceResponse, audit: Option<&[RecordedEntry]>) -> String {
    let mut rows = vec![("chip", hex::encode(&device.chip_id))];
    if let Some(session) = device.sessions.first() {
        rows.extend([
            ("identity", session.identity.clone()),
            ("state", state_name(session.state()).to_owned()),
            ("profile", session.profile.clone()),
            ("station", session.station.clone()),
            ("session", hex::encode(&session.session_id)),
            ("begun", format_time(seconds(session.created.as_ref()))),
            ("key pair", key_pair(device.key_pair()).to_owned()),
            ("master key", master_key(session.master_key_version)),
        ]);
    }
    match &device.published {
        None => rows.push(("record", "none: not published".to_owned())),
        Some(published) => rows.extend(published_rows(published, device.sessions.is_empty())),
    }
    let mut text = aligned_lines(&rows);
    if !device.certificate.is_empty() {
        let fields: Vec<_> =
            device.certificate.iter().map(|field| (field.name.as_str(), field.value.clone())).collect();
        text.push_str(&format!("\nCertificate\n{}", indented(&aligned_lines(&fields))));
    }
    let timeline: String = device.timeline.iter().map(event).collect();
    text.push_str(&format!("\nTimeline\n{}", indented(&timeline)));
    if let Some(entries) = audit {
        let lines: String = entries.iter().map(|entry| format!("{}\n", format_entry(entry))).collect();
        let lines = if lines.is_empty() { "no entries\n".to_owned() } else { lines };
        text.push_str(&format!("\nAudit log\n{}", indented(&lines)));
    }
    text
}

fn published_rows(published: &proto::PublishedDevice, without_session: bool) -> Vec<(&'static str, String)> {
    let receipt = published.receipt.clone().unwrap_or_default();
    let record = format!("{}, sha256:{}", receipt.record_index, hex::encode(&receipt.record_hash));
    let mut rows = Vec::new();
    if without_session {
        rows.extend([
            ("identity", published.identity.clone()),
            ("profile", published.profile.clone()),
            ("session", format!("{}, not in the state store", hex::encode(&published.session_id))),
            ("master key", master_key(published.master_key_version)),
        ]);
    }
    rows.extend([
        ("record", record),
        ("published", format_time(seconds(receipt.published.as_ref()))),
        ("backup", format!("{} bytes", published.backup_bytes)),
    ]);
    rows
}

fn event(event: &proto::DeviceEvent) -> String {
    let (when, session) = (format_time(seconds(event.time.as_ref())), hex::encode(&event.session_id));
    format!("{when}  {session}  {}\n", escape_controls(&event.description))
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

fn master_key(version: u32) -> String {
    if version == 0 { "no symmetric keys".to_owned() } else { format!("version {version}") }
}

const fn key_pair(place: proto::KeyPair) -> &'static str {
    match place {
        proto::KeyPair::Unspecified => "unknown",
        proto::KeyPair::None => "none: the profile has no key pair",
        proto::KeyPair::OfDevice => "generated by the device; the private key was never here",
        proto::KeyPair::Wrapped => "in the secret store, wrapped by the HSM",
        proto::KeyPair::OnToken => "in the secret store, on the token",
        proto::KeyPair::Erased => "erased at this site",
    }
}

const fn key_pair_word(place: proto::KeyPair) -> &'static str {
    match place {
        proto::KeyPair::Unspecified => "unknown",
        proto::KeyPair::None => "none",
        proto::KeyPair::OfDevice => "of-device",
        proto::KeyPair::Wrapped => "wrapped",
        proto::KeyPair::OnToken => "on-token",
        proto::KeyPair::Erased => "erased",
    }
}

/// Formats the device as JSON.
pub(super) fn as_json(device: &proto::GetDeviceResponse, audit: Option<&[RecordedEntry]>) -> Value {
    let published = |published: &proto::PublishedDevice| {
        json!({
            "record": published.receipt.as_ref().map(receipt_json),
            "session": hex::encode(&published.session_id),
            "identity": published.identity,
            "profile": published.profile,
            "certificate_is_cwt": published.certificate_format() == proto::CertificateFormat::Cwt,
            "master_key_version": published.master_key_version,
            "backup_bytes": published.backup_bytes,
        })
    };
    let field = |field: &proto::CertificateStatement| json!({ "name": field.name, "value": field.value });
    let event = |event: &proto::DeviceEvent| {
        json!({
            "time": event.time.map(|time| time.seconds),
            "session": hex::encode(&event.session_id),
            "description": event.description,
        })
    };
    let mut object = json!({
        "chip": hex::encode(&device.chip_id),
        "sessions": device.sessions.iter().map(session_json).collect::<Vec<_>>(),
        "key_pair": key_pair_word(device.key_pair()),
        "published": device.published.as_ref().map(published),
        "certificate": device.certificate.iter().map(field).collect::<Vec<_>>(),
        "timeline": device.timeline.iter().map(event).collect::<Vec<_>>(),
    });
    if let Some(entries) = audit {
        object["audit"] = json!(entries);
    }
    object
}
