//! gRPC connection to the daemon, and its status as text and JSON.

use std::path::Path;
use std::time::{Duration, Instant};

use spp_proto as proto;
use spp_proto::access_client::AccessClient;
use spp_proto::officer_client::OfficerClient;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// Failure of a call to the daemon.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// A file in the caller's TLS directory is missing or invalid.
    #[error("TLS credentials: {0}; enrol an officer with sppctl officer enroll")]
    Tls(String),
    /// The server URL is invalid.
    #[error("invalid server URL {0:?}: expected https://HOST:PORT of the officer listener")]
    Address(String),
    /// The connection failed or was lost.
    #[error("no connection to {server}: {cause}; is sppd running, and is this its officer listener?")]
    Connect {
        /// Server URL.
        server: String,
        /// Cause.
        cause: String,
    },
    /// The daemon refused the call.
    #[error("{server} refused: {message}")]
    Refused {
        /// Server URL.
        server: String,
        /// Message of the daemon.
        message: String,
    },
    /// Invalid input, file or response.
    #[error("{0}")]
    Invalid(String),
    /// The daemon answers but does not serve the line yet.
    #[error("the daemon answers but does not serve the line yet: {0}")]
    NotReady(String),
}

/// Requests the status once or, with `wait`, repeatedly until the daemon serves the line or the time is over.
pub async fn fetch_status(
    server: &str,
    tls: &Path,
    wait: Option<Duration>,
) -> Result<proto::GetStatusResponse, StatusError> {
    let endpoint = endpoint(server, tls)?;
    let until = wait.map(|wait| Instant::now() + wait);
    loop {
        let answer = request_status(&endpoint, server).await;
        let answer = match (answer, until) {
            (Ok(status), Some(_)) if !status.ready => {
                Err(StatusError::NotReady(status.hsm.map(|hsm| hsm.error).unwrap_or_default()))
            }
            (answer, _) => answer,
        };
        let retry = matches!(answer, Err(StatusError::Connect { .. } | StatusError::NotReady(_)));
        if !retry || until.is_none_or(|until| Instant::now() >= until) {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn endpoint(server: &str, tls: &Path) -> Result<Endpoint, StatusError> {
    let read = |name: &str| {
        let path = tls.join(name);
        std::fs::read(&path).map_err(|e| StatusError::Tls(format!("{}: {e}", path.display())))
    };
    let config = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read("ca.pem")?))
        .identity(Identity::from_pem(read("certificate.pem")?, read("key.pem")?));
    let address = || StatusError::Address(server.to_owned());
    if !server.starts_with("https://") {
        return Err(address());
    }
    let endpoint = Endpoint::from_shared(server.to_owned()).map_err(|_| address())?;
    let endpoint = endpoint.tls_config(config).map_err(|e| StatusError::Tls(e.to_string()))?;
    Ok(endpoint.connect_timeout(Duration::from_secs(5)))
}

/// A client of the officer service.
pub(super) async fn connect(server: &str, tls: &Path) -> Result<OfficerClient<Channel>, StatusError> {
    channel(server, tls).await.map(OfficerClient::new)
}

/// Connects to the officer listener, for a client of any of its services.
pub(super) async fn channel(server: &str, tls: &Path) -> Result<Channel, StatusError> {
    connect_to(&endpoint(server, tls)?, server).await
}

/// A client of the access service, for callers of any role.
pub(super) async fn connect_access(server: &str, tls: &Path) -> Result<AccessClient<Channel>, StatusError> {
    Ok(AccessClient::new(connect_to(&endpoint(server, tls)?, server).await?))
}

async fn connect_to(endpoint: &Endpoint, server: &str) -> Result<Channel, StatusError> {
    endpoint.connect().await.map_err(|e| {
        let cause = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
        StatusError::Connect { server: server.to_owned(), cause }
    })
}

/// A request with a deadline. It is longer than the daemon's own HSM deadline, so that the daemon can report HSM errors.
pub(super) fn with_deadline<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(Duration::from_secs(30));
    request
}

/// Converts a gRPC status to an error.
#[expect(clippy::disallowed_types, reason = "a client receives statuses and creates none")]
pub(super) fn call_error(server: &str, status: &tonic::Status) -> StatusError {
    let (server, message) = (server.to_owned(), status.message().to_owned());
    // The daemon's own services always set a message.
    let message =
        if message.is_empty() { format!("{}; is this its officer listener?", status.code()) } else { message };
    match status.code() {
        tonic::Code::Unavailable | tonic::Code::Unknown => StatusError::Connect { server, cause: message },
        _ => StatusError::Refused { server, message },
    }
}

async fn request_status(endpoint: &Endpoint, server: &str) -> Result<proto::GetStatusResponse, StatusError> {
    let mut client = OfficerClient::new(connect_to(endpoint, server).await?);
    let answer = client.get_status(with_deadline(proto::GetStatusRequest {})).await;
    Ok(answer.map_err(|status| call_error(server, &status))?.into_inner())
}

/// Formats the status as aligned lines.
pub fn describe_status(status: &proto::GetStatusResponse) -> String {
    let hsm = status.hsm.clone().unwrap_or_default();
    let sessions = status.sessions.unwrap_or_default();
    let line = if status.ready { "served" } else { "NOT served" };
    let audit = status.audit.clone().unwrap_or_default();
    let log = status.log.clone().unwrap_or_default();
    let mut rows = vec![("node", format!("{} (sppd {})", status.node, status.version)), ("line", line.to_owned())];
    for member in &hsm.members {
        let name = if hsm.members.len() > 1 { format!("{} ", member.name) } else { String::new() };
        let how = match member.ready {
            true => {
                format!("ready: {}, token {} ({})", member.module, member.token_label, member.token_serial)
            }
            false => format!("NOT ready: {}", member.error),
        };
        rows.push(("HSM", format!("{name}{how}")));
        let (starts, answered, in_flight) = (member.worker_starts, member.calls_answered, member.calls_in_flight);
        rows.push(("HSM worker", format!("{name}{starts} starts, {answered} calls answered, {in_flight} in flight")));
    }
    rows.extend([
        (
            "sessions",
            format!(
                "{} reserved, {} issued, {} published, {} erased, {} aborted",
                sessions.reserved, sessions.issued, sessions.published, sessions.erased, sessions.aborted
            ),
        ),
        ("records", format!("{}, {} checkpoints signed since start", status.records, log.checkpoints)),
        (
            "disk",
            format!(
                "{} free, new devices need {}",
                bytesize::ByteSize(status.free_bytes),
                bytesize::ByteSize(status.free_bytes_floor)
            ),
        ),
        ("profiles", status.profiles.join(", ")),
        ("audit log", format!("{} entries, {} covered by a published checkpoint", audit.entries, audit.covered)),
    ]);
    if !audit.writable {
        rows.push(("audit log", "NOT writable: every call that must be recorded is refused".to_owned()));
    }
    if !audit.checkpoint_error.is_empty() {
        rows.push(("audit log", format!("checkpoint NOT published: {}", audit.checkpoint_error)));
    }
    let errors = [("publishing", &log.publish_error), ("look-ups", &log.read_error)];
    for (what, error) in errors.into_iter().filter(|(_, error)| !error.is_empty()) {
        rows.push((what, format!("NOT available: {error}")));
    }
    for witness in &log.witnesses {
        let how = match witness.error.as_str() {
            "" => format!("cosigned {} entries", witness.size),
            error => format!("did NOT cosign: {error}"),
        };
        rows.push(("witness", format!("{}: {how}", witness.name)));
    }
    for service in &status.services {
        for missing in &service.missing {
            rows.push(("NOT served", format!("{} lacks {}: {}", service.service, missing.dependency, missing.reason)));
        }
    }
    rows.iter().map(|(name, value)| format!("{name:<11} {value}\n")).collect()
}

/// The HSM status as JSON.
pub(super) fn hsm_json(hsm: &proto::HsmStatus) -> serde_json::Value {
    let calls = |call: &proto::HsmCalls| {
        serde_json::json!({ "operation": call.operation, "result": call.result, "count": call.count,
            "microseconds": call.microseconds, "median_microseconds": call.median_microseconds })
    };
    let member = |member: &proto::HsmMemberStatus| {
        serde_json::json!({ "name": member.name, "ready": member.ready, "error": member.error, "module": member.module,
            "token_label": member.token_label, "token_serial": member.token_serial, "worker_starts": member.worker_starts,
            "calls_in_flight": member.calls_in_flight,
            "background_calls_in_flight": member.background_calls_in_flight, "calls_answered": member.calls_answered,
            "calls": member.calls.iter().map(calls).collect::<Vec<_>>() })
    };
    let members: Vec<_> = hsm.members.iter().map(member).collect();
    serde_json::json!({ "ready": hsm.ready, "error": hsm.error, "calls_in_flight": hsm.calls_in_flight,
        "queue": hsm.queue, "members": members })
}

/// The status as JSON.
pub fn status_json(status: &proto::GetStatusResponse) -> serde_json::Value {
    let hsm = status.hsm.clone().unwrap_or_default();
    let sessions = status.sessions.unwrap_or_default();
    let log = status.log.clone().unwrap_or_default();
    let audit = status.audit.clone().unwrap_or_default();
    let witness = |witness: &proto::WitnessStatus| serde_json::json!({ "name": witness.name, "size": witness.size, "error": witness.error });
    let witnesses: Vec<_> = log.witnesses.iter().map(witness).collect();
    let service = |service: &proto::ServiceStatus| {
        let missing = |missing: &proto::MissingDependency| serde_json::json!({ "dependency": missing.dependency, "reason": missing.reason });
        let missing: Vec<_> = service.missing.iter().map(missing).collect();
        serde_json::json!({ "service": service.service, "missing": missing })
    };
    let services: Vec<_> = status.services.iter().map(service).collect();
    serde_json::json!({
        "services": services,
        "audit": {
            "entries": audit.entries,
            "covered": audit.covered,
            "checkpoint_error": audit.checkpoint_error,
            "writable": audit.writable,
            "lost_refusals": audit.lost_refusals,
        },
        "version": status.version,
        "node": status.node,
        "started": status.started.map(|t| t.seconds),
        "ready": status.ready,
        "hsm": hsm_json(&hsm),
        "sessions": {
            "reserved": sessions.reserved,
            "issued": sessions.issued,
            "published": sessions.published,
            "erased": sessions.erased,
            "aborted": sessions.aborted,
        },
        "records": status.records,
        "log": {
            "publish_error": log.publish_error,
            "read_error": log.read_error,
            "checkpoints": log.checkpoints,
            "witnesses": witnesses,
        },
        "free_bytes": status.free_bytes,
        "free_bytes_floor": status.free_bytes_floor,
        "profiles": status.profiles,
    })
}
