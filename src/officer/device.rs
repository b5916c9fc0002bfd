//! One device, as the running daemon and the audit log know it.

use std::path::Path;
use std::str::FromStr;

use serde_json::{Value, json};

use super::audit_cli::in_a_line;
use super::sessions::{receipt_json, seconds, session_json, state_name};
use super::status::{StatusError, channel, refused, with_deadline};
use super::text::{at, lines, printable};
use crate::audit::{AuditError, Entries, Recorded};
use crate::names::{ChipId, DeviceIdentity};
use crate::proto;
use crate::proto::get_device_request::Device;
use crate::proto::production_client::ProductionClient;

/// A chip in hex, or an identity with its kind.
#[derive(Debug, Clone)]
pub enum DeviceName {
    /// The chip.
    Chip(ChipId),
    /// The identity.
    Identity(DeviceIdentity),
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // No hex has a colon, and no identity is without one.
        if text.contains(':') {
            return text.parse().map(Self::Identity).map_err(|e: crate::names::NameError| e.to_string());
        }
        text.parse().map(Self::Chip).map_err(|e| format!("{e}; or give an identity, for example imei:490154203237518"))
    }
}

/// Asks the daemon.
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
    Ok(answer.map_err(|status| refused(server, &status))?.into_inner())
}

/// What the audit log says of the device: entries with a detail that names its chip or one of its sessions.
pub(super) fn entries_about(directory: &Path, device: &proto::GetDeviceResponse) -> Result<Vec<Recorded>, AuditError> {
    let sessions = device.sessions.iter().map(|session| hex::encode(&session.session_id));
    let names: Vec<_> = sessions.chain([hex::encode(&device.chip_id)]).collect();
    // Whole words: a shorter chip ID may be a part of a longer one.
    let is_about = |value: &String| value.split_whitespace().any(|word| names.iter().any(|name| name == word));
    let (mut entries, mut found) = (Entries::open(directory)?, Vec::new());
    while let Some(entry) = entries.next_entry()? {
        if entry.details.values().any(is_about) {
            found.push(entry);
        }
    }
    Ok(found)
}

/// For people.
pub(super) fn as_text(device: &proto::GetDeviceResponse, audit: Option<&[Recorded]>) -> String {
    let mut rows = vec![("chip", hex::encode(&device.chip_id))];
    if let Some(session) = device.sessions.first() {
        rows.extend([
            ("identity", session.identity.clone()),
            ("state", state_name(session.state()).to_owned()),
            ("profile", session.profile.clone()),
            ("station", session.station.clone()),
            ("session", hex::encode(&session.session_id)),
            ("begun", at(seconds(session.created.as_ref()))),
            ("key pair", key_pair(device.key_pair()).to_owned()),
            ("master key", master_key(session.master_key_version)),
        ]);
    }
    match &device.published {
        None => rows.push(("record", "none: it is not published".to_owned())),
        Some(published) => rows.extend(published_rows(published, device.sessions.is_empty())),
    }
    let mut text = lines(&rows);
    if !device.certificate.is_empty() {
        let said: Vec<_> = device.certificate.iter().map(|one| (one.name.as_str(), one.value.clone())).collect();
        text.push_str(&format!("\nCertificate\n{}", indented(&lines(&said))));
    }
    let what: String = device.timeline.iter().map(event).collect();
    text.push_str(&format!("\nTimeline\n{}", indented(&what)));
    if let Some(entries) = audit {
        let told: String = entries.iter().map(|entry| format!("{}\n", in_a_line(entry))).collect();
        let told = if told.is_empty() { "nothing\n".to_owned() } else { told };
        text.push_str(&format!("\nAudit log\n{}", indented(&told)));
    }
    text
}

fn published_rows(published: &proto::PublishedDevice, alone: bool) -> Vec<(&'static str, String)> {
    let receipt = published.receipt.clone().unwrap_or_default();
    let place = format!("{}, sha256:{}", receipt.record_index, hex::encode(&receipt.record_hash));
    let mut rows = Vec::new();
    if alone {
        rows.extend([
            ("identity", published.identity.clone()),
            ("profile", published.profile.clone()),
            ("session", format!("{}, which the state store does not know", hex::encode(&published.session_id))),
            ("master key", master_key(published.master_key_version)),
        ]);
    }
    rows.extend([
        ("record", place),
        ("published", at(seconds(receipt.published.as_ref()))),
        ("backup", format!("{} bytes", published.backup_bytes)),
    ]);
    rows
}

fn event(event: &proto::DeviceEvent) -> String {
    let (when, session) = (at(seconds(event.at.as_ref())), hex::encode(&event.session_id));
    format!("{when}  {session}  {}\n", printable(&event.what))
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
        proto::KeyPair::None => "the profile has none",
        proto::KeyPair::OfDevice => "made by the device, never here",
        proto::KeyPair::Wrapped => "in the secret store, wrapped by the HSM",
        proto::KeyPair::OnToken => "in the secret store, on the token",
        proto::KeyPair::Gone => "erased here",
    }
}

const fn key_pair_word(place: proto::KeyPair) -> &'static str {
    match place {
        proto::KeyPair::Unspecified => "unknown",
        proto::KeyPair::None => "none",
        proto::KeyPair::OfDevice => "of-device",
        proto::KeyPair::Wrapped => "wrapped",
        proto::KeyPair::OnToken => "on-token",
        proto::KeyPair::Gone => "gone",
    }
}

/// For programs.
pub(super) fn as_json(device: &proto::GetDeviceResponse, audit: Option<&[Recorded]>) -> Value {
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
    let said = |one: &proto::CertificateStatement| json!({ "name": one.name, "value": one.value });
    let event = |event: &proto::DeviceEvent| {
        json!({
            "at": event.at.map(|time| time.seconds),
            "session": hex::encode(&event.session_id),
            "what": event.what,
        })
    };
    let mut told = json!({
        "chip": hex::encode(&device.chip_id),
        "sessions": device.sessions.iter().map(session_json).collect::<Vec<_>>(),
        "key_pair": key_pair_word(device.key_pair()),
        "published": device.published.as_ref().map(published),
        "certificate": device.certificate.iter().map(said).collect::<Vec<_>>(),
        "timeline": device.timeline.iter().map(event).collect::<Vec<_>>(),
    });
    if let Some(entries) = audit {
        told["audit"] = json!(entries);
    }
    told
}
