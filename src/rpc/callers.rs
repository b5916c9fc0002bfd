//! Who calls: the role and name in the client certificate, which the door has looked at ([`super::roles`]).

use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use tonic::codegen::http;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Code, Request, Status};

use super::status::refusal;
use crate::certificate::{Caller, caller_of};
use crate::names::{OfficerName, StationName};

/// The caller of a request.
pub(super) fn any<T>(request: &Request<T>) -> Result<Caller, Status> {
    request.extensions().get::<Caller>().cloned().ok_or_else(|| nobody(None, "no door was passed".to_owned()))
}

/// The station of a request; the table lets nobody else come here.
pub(super) fn station<T>(request: &Request<T>) -> Result<StationName, Status> {
    match any(request)? {
        Caller::Station(name) => Ok(name),
        other => Err(nobody(None, format!("the {other} is no station"))),
    }
}

/// The officer of a request, likewise.
pub(super) fn officer<T>(request: &Request<T>) -> Result<OfficerName, Status> {
    match any(request)? {
        Caller::Officer(name) => Ok(name),
        other => Err(nobody(None, format!("the {other} is no officer"))),
    }
}

/// TLS has verified the chain when the connection was made; a connection may outlive its certificate, so the time is
/// looked at with each call.
pub(super) fn of_connection(extensions: &http::Extensions) -> Result<Caller, Status> {
    let connection = extensions.get::<TlsConnectInfo<TcpConnectInfo>>();
    let certificates = connection.and_then(TlsConnectInfo::peer_certs);
    let certificate = certificates.as_ref().and_then(|chain| chain.first());
    let nobody = |message| nobody(connection.and_then(|connection| connection.get_ref().remote_addr()), message);
    let certificate = certificate.ok_or_else(|| nobody("this service needs a client certificate".to_owned()))?;
    let (caller, not_after) = caller_of(certificate).map_err(|e| nobody(e.to_string()))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    if not_after < now {
        return Err(nobody("the client certificate has expired; enrol again".to_owned()));
    }
    Ok(caller)
}

fn nobody(from: Option<SocketAddr>, message: String) -> Status {
    tracing::info!(?from, why = %message, "refused: no caller");
    refusal(Code::Unauthenticated, "NO_CALLER", message)
}
