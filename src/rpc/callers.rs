//! Who calls: the role and name in the client certificate, which the door has looked at ([`super::roles`]).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tonic::codegen::http;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Code, Request, Status};

use super::status::refusal;
use crate::access::RevocationList;
use crate::certificate::{Caller, CallerCertificate, caller_of};
use crate::names::{OfficerName, StationName};

/// The caller of a request.
pub(super) fn any<T>(request: &Request<T>) -> Result<Caller, Status> {
    certificate(request).map(|certificate| certificate.caller)
}

/// What its certificate says.
pub(super) fn certificate<T>(request: &Request<T>) -> Result<CallerCertificate, Status> {
    let (certificate, standing) =
        (request.extensions().get::<CallerCertificate>(), request.extensions().get::<Arc<RevocationList>>());
    let (certificate, standing) = certificate.zip(standing).ok_or_else(|| nobody("no door was passed".to_owned()))?;
    // A message may end long after its head, which the door has looked at.
    if standing.is_revoked(certificate) {
        let revoked = NoCaller::Revoked(certificate.caller.clone());
        return Err(refusal(Code::Unauthenticated, revoked.reason(), revoked.to_string()));
    }
    Ok(certificate.clone())
}

/// The certificate itself.
pub(super) fn certificate_der<T>(request: &Request<T>) -> Result<Vec<u8>, Status> {
    let certificate = peer_certificate(request.extensions());
    certificate.ok_or_else(|| nobody("this service needs a client certificate".to_owned()))
}

/// The station of a request; the table lets nobody else come here.
pub(super) fn station<T>(request: &Request<T>) -> Result<StationName, Status> {
    match any(request)? {
        Caller::Station(name) => Ok(name),
        other => Err(nobody(format!("the {other} is no station"))),
    }
}

/// The officer of a request, likewise.
pub(super) fn officer<T>(request: &Request<T>) -> Result<OfficerName, Status> {
    match any(request)? {
        Caller::Officer(name) => Ok(name),
        other => Err(nobody(format!("the {other} is no officer"))),
    }
}

/// TLS has verified the chain when the connection was made; a connection may outlive its certificate, so time and revocation are
/// looked at with each call.
pub(super) fn of_connection(
    extensions: &http::Extensions,
    standing: &RevocationList,
) -> Result<CallerCertificate, NoCaller> {
    let der = peer_certificate(extensions).ok_or(NoCaller::None)?;
    let certificate = caller_of(&der).map_err(|e| NoCaller::Unreadable(e.to_string()))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    if certificate.not_after < now {
        return Err(NoCaller::Expired(certificate.caller));
    }
    if standing.is_revoked(&certificate) {
        return Err(NoCaller::Revoked(certificate.caller));
    }
    Ok(certificate)
}

/// Where a request comes from.
pub(super) fn address(extensions: &http::Extensions) -> Option<SocketAddr> {
    extensions.get::<TlsConnectInfo<TcpConnectInfo>>().and_then(|connection| connection.get_ref().remote_addr())
}

fn peer_certificate(extensions: &http::Extensions) -> Option<Vec<u8>> {
    let chain = extensions.get::<TlsConnectInfo<TcpConnectInfo>>().and_then(TlsConnectInfo::peer_certs)?;
    chain.first().map(|certificate| certificate.to_vec())
}

/// Why nobody is served.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoCaller {
    /// There is no certificate.
    #[error("this service needs a client certificate")]
    None,
    /// It names nobody.
    #[error("{0}")]
    Unreadable(String),
    /// Its time is over.
    #[error("the client certificate of the {0} has expired; enrol again")]
    Expired(Caller),
    /// Two officers have agreed that it is of no use any more.
    #[error("the client certificate of the {0} is revoked; ask an officer, and enrol again")]
    Revoked(Caller),
}

impl NoCaller {
    /// The stable word for it.
    pub(super) const fn reason(&self) -> &'static str {
        match self {
            Self::Revoked(_) => "REVOKED",
            Self::None | Self::Unreadable(_) | Self::Expired(_) => "NO_CALLER",
        }
    }

    /// Who it would be.
    pub(super) const fn caller(&self) -> Option<&Caller> {
        match self {
            Self::Expired(caller) | Self::Revoked(caller) => Some(caller),
            Self::None | Self::Unreadable(_) => None,
        }
    }
}

fn nobody(message: String) -> Status {
    refusal(Code::Unauthenticated, "NO_CALLER", message)
}
