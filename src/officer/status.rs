//! A look at the running daemon, over gRPC with an officer's certificate.

use std::path::Path;
use std::time::{Duration, Instant};

use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::proto;
use crate::proto::access_client::AccessClient;
use crate::proto::officer_client::OfficerClient;

/// Why the daemon did not tell.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// A file of the officer's TLS directory.
    #[error("{0}; enrol an officer with sppctl officer enroll")]
    Tls(String),
    /// The server's address.
    #[error("{0} is not an address; write https://HOST:PORT of the officer listener")]
    Address(String),
    /// No connection.
    #[error("no connection to {server}: {cause}; is sppd running, and is this its officer listener?")]
    Connect {
        /// Where to.
        server: String,
        /// Why not.
        cause: String,
    },
    /// The daemon refused.
    #[error("{server} refused: {message}")]
    Refused {
        /// Who.
        server: String,
        /// Its words.
        message: String,
    },
    /// Something else is not as it should be.
    #[error("{0}")]
    Unfit(String),
    /// It answered, and does not serve the line.
    #[error("the daemon answers but does not serve the line yet: {0}")]
    NotReady(String),
}

/// Asks once, or until the line is served or the time is over.
pub async fn connect_and_ask(
    server: &str,
    tls: &Path,
    wait: Option<Duration>,
) -> Result<proto::GetStatusResponse, StatusError> {
    let endpoint = endpoint(server, tls)?;
    let until = wait.map(|wait| Instant::now() + wait);
    loop {
        let answer = ask(&endpoint, server).await;
        let answer = match (answer, until) {
            (Ok(status), Some(_)) if !status.ready => {
                Err(StatusError::NotReady(status.hsm.map(|hsm| hsm.trouble).unwrap_or_default()))
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

/// The officer listener, for a client of any of its services.
pub(super) async fn channel(server: &str, tls: &Path) -> Result<Channel, StatusError> {
    connect_to(&endpoint(server, tls)?, server).await
}

/// A client of the access service, for whoever has a certificate.
pub(super) async fn connect_access(server: &str, tls: &Path) -> Result<AccessClient<Channel>, StatusError> {
    Ok(AccessClient::new(connect_to(&endpoint(server, tls)?, server).await?))
}

async fn connect_to(endpoint: &Endpoint, server: &str) -> Result<Channel, StatusError> {
    endpoint.connect().await.map_err(|e| {
        let cause = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
        StatusError::Connect { server: server.to_owned(), cause }
    })
}

/// A request that is answered soon or not at all. It waits longer than the daemon for its HSM, so that the daemon can say what is wrong.
pub(super) fn with_deadline<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(Duration::from_secs(30));
    request
}

/// What the daemon said instead of an answer.
#[expect(clippy::disallowed_types, reason = "an officer's tool is a client: it is told a status and makes none")]
pub(super) fn refused(server: &str, status: &tonic::Status) -> StatusError {
    let (server, message) = (server.to_owned(), status.message().to_owned());
    // Not from the daemon's own services, which say why.
    let message =
        if message.is_empty() { format!("{}; is this its officer listener?", status.code()) } else { message };
    match status.code() {
        tonic::Code::Unavailable | tonic::Code::Unknown => StatusError::Connect { server, cause: message },
        _ => StatusError::Refused { server, message },
    }
}

async fn ask(endpoint: &Endpoint, server: &str) -> Result<proto::GetStatusResponse, StatusError> {
    let mut client = OfficerClient::new(connect_to(endpoint, server).await?);
    let answer = client.get_status(with_deadline(proto::GetStatusRequest {})).await;
    Ok(answer.map_err(|status| refused(server, &status))?.into_inner())
}

/// The status as aligned lines.
pub fn describe_status(status: &proto::GetStatusResponse) -> String {
    let hsm = status.hsm.clone().unwrap_or_default();
    let sessions = status.sessions.unwrap_or_default();
    let line = if status.ready { "served" } else { "NOT served" };
    let audit = status.audit.clone().unwrap_or_default();
    let log = status.log.clone().unwrap_or_default();
    let mut rows = vec![("node", format!("{} (sppd {})", status.node, status.version)), ("line", line.to_owned())];
    for one in &hsm.members {
        let name = if hsm.members.len() > 1 { format!("{} ", one.name) } else { String::new() };
        let how = match one.ready {
            true => format!("ready: {}, token {} ({})", one.module, one.token_label, one.token_serial),
            false => format!("NOT ready: {}", one.trouble),
        };
        rows.push(("HSM", format!("{name}{how}")));
        let (starts, answered, in_flight) = (one.worker_starts, one.calls_answered, one.calls_in_flight);
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
        ("records", format!("{}, {} checkpoints signed since the start", status.records, log.batches)),
        (
            "disk",
            format!(
                "{} free, new devices need {}",
                bytesize::ByteSize(status.free_bytes),
                bytesize::ByteSize(status.free_bytes_floor)
            ),
        ),
        ("profiles", status.profiles.join(", ")),
        ("audit log", format!("{} entries, {} of them under a published checkpoint", audit.entries, audit.covered)),
    ]);
    if !audit.writable {
        rows.push(("audit log", "can NOT be written: nothing that must be recorded is done".to_owned()));
    }
    if !audit.checkpoint_trouble.is_empty() {
        rows.push(("audit log", format!("its end is NOT published: {}", audit.checkpoint_trouble)));
    }
    let troubles = [("publishing", &log.publishing_trouble), ("look-ups", &log.reading_trouble)];
    for (what, trouble) in troubles.into_iter().filter(|(_, trouble)| !trouble.is_empty()) {
        rows.push((what, format!("NOT possible: {trouble}")));
    }
    for witness in &log.witnesses {
        let how = match witness.trouble.as_str() {
            "" => format!("cosigned {} entries", witness.size),
            trouble => format!("did NOT cosign: {trouble}"),
        };
        rows.push(("witness", format!("{}: {how}", witness.name)));
    }
    for service in &status.services {
        for missing in &service.missing {
            rows.push(("NOT served", format!("{} lacks {}: {}", service.service, missing.dependency, missing.why)));
        }
    }
    rows.iter().map(|(name, value)| format!("{name:<11} {value}\n")).collect()
}

/// The HSMs for programs.
pub(super) fn hsm_json(hsm: &proto::HsmStatus) -> serde_json::Value {
    let calls = |call: &proto::HsmCalls| {
        serde_json::json!({ "verb": call.verb, "result": call.result, "count": call.count,
            "microseconds": call.microseconds, "median_microseconds": call.median_microseconds })
    };
    let member = |one: &proto::HsmMember| {
        serde_json::json!({ "name": one.name, "ready": one.ready, "trouble": one.trouble, "module": one.module,
            "token_label": one.token_label, "token_serial": one.token_serial, "worker_starts": one.worker_starts,
            "calls_in_flight": one.calls_in_flight,
            "background_calls_in_flight": one.background_calls_in_flight, "calls_answered": one.calls_answered,
            "calls": one.calls.iter().map(calls).collect::<Vec<_>>() })
    };
    let members: Vec<_> = hsm.members.iter().map(member).collect();
    serde_json::json!({ "ready": hsm.ready, "trouble": hsm.trouble, "calls_in_flight": hsm.calls_in_flight,
        "queue": hsm.queue, "members": members })
}

/// The status for programs.
pub fn status_json(status: &proto::GetStatusResponse) -> serde_json::Value {
    let hsm = status.hsm.clone().unwrap_or_default();
    let sessions = status.sessions.unwrap_or_default();
    let log = status.log.clone().unwrap_or_default();
    let audit = status.audit.clone().unwrap_or_default();
    let witness = |witness: &proto::WitnessStatus| serde_json::json!({ "name": witness.name, "size": witness.size, "trouble": witness.trouble });
    let witnesses: Vec<_> = log.witnesses.iter().map(witness).collect();
    let service = |service: &proto::ServiceStatus| {
        let missing =
            |one: &proto::MissingDependency| serde_json::json!({ "dependency": one.dependency, "why": one.why });
        let missing: Vec<_> = service.missing.iter().map(missing).collect();
        serde_json::json!({ "service": service.service, "missing": missing })
    };
    let services: Vec<_> = status.services.iter().map(service).collect();
    serde_json::json!({
        "services": services,
        "audit": {
            "entries": audit.entries,
            "covered": audit.covered,
            "checkpoint_trouble": audit.checkpoint_trouble,
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
            "publishing_trouble": log.publishing_trouble,
            "reading_trouble": log.reading_trouble,
            "batches": log.batches,
            "witnesses": witnesses,
        },
        "free_bytes": status.free_bytes,
        "free_bytes_floor": status.free_bytes_floor,
        "profiles": status.profiles,
    })
}
