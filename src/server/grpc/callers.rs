//! Caller authentication: role and name from the client certificate. [`super::roles`] authenticates every request before
//! its service runs.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use spp_format::certificate::{Caller, CallerCertificate, parse_caller_certificate};
use spp_format::names::{OfficerName, StationName};
use tonic::codegen::http;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Code, Request, Status};

use super::status::refusal;
use crate::access::RevocationList;

/// Returns the caller of a request.
pub(super) fn any<T>(request: &Request<T>) -> Result<Caller, Status> {
    certificate(request).map(|certificate| certificate.caller)
}

/// Returns the parsed certificate of the caller.
pub(super) fn certificate<T>(request: &Request<T>) -> Result<CallerCertificate, Status> {
    let (certificate, revocations) =
        (request.extensions().get::<CallerCertificate>(), request.extensions().get::<Arc<RevocationList>>());
    let (certificate, revocations) =
        certificate.zip(revocations).ok_or_else(|| unauthenticated("the caller was not authenticated".to_owned()))?;
    // The authorizer has checked the request's header; the message may end much later, so check revocation again.
    if revocations.is_revoked(certificate) {
        let revoked = AuthenticationError::Revoked(certificate.caller.clone());
        return Err(refusal(Code::Unauthenticated, revoked.reason(), revoked.to_string()));
    }
    Ok(certificate.clone())
}

/// Returns the caller's certificate in DER.
pub(super) fn certificate_der<T>(request: &Request<T>) -> Result<Vec<u8>, Status> {
    let certificate = peer_certificate(request.extensions());
    certificate.ok_or_else(|| unauthenticated("client certificate required".to_owned()))
}

/// Returns the station of a request. The role table has already rejected other roles.
pub(super) fn station<T>(request: &Request<T>) -> Result<StationName, Status> {
    match any(request)? {
        Caller::Station(name) => Ok(name),
        other => Err(unauthenticated(format!("{other} is not a station"))),
    }
}

/// Returns the officer of a request. The role table has already rejected other roles.
pub(super) fn officer<T>(request: &Request<T>) -> Result<OfficerName, Status> {
    match any(request)? {
        Caller::Officer(name) => Ok(name),
        other => Err(unauthenticated(format!("{other} is not an officer"))),
    }
}

/// Authenticates the caller of a connection. TLS verified the chain during the handshake; a connection may outlive its
/// certificate, so each call checks expiry and revocation.
pub(super) fn authenticate(
    extensions: &http::Extensions,
    revocations: &RevocationList,
) -> Result<CallerCertificate, AuthenticationError> {
    let der = peer_certificate(extensions).ok_or(AuthenticationError::None)?;
    let certificate = parse_caller_certificate(&der).map_err(|e| AuthenticationError::Unreadable(e.to_string()))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    if certificate.not_after < now {
        return Err(AuthenticationError::Expired(certificate.caller));
    }
    if revocations.is_revoked(&certificate) {
        return Err(AuthenticationError::Revoked(certificate.caller));
    }
    Ok(certificate)
}

/// Returns the peer address of a request.
pub(super) fn address(extensions: &http::Extensions) -> Option<SocketAddr> {
    extensions.get::<TlsConnectInfo<TcpConnectInfo>>().and_then(|connection| connection.get_ref().remote_addr())
}

fn peer_certificate(extensions: &http::Extensions) -> Option<Vec<u8>> {
    let chain = extensions.get::<TlsConnectInfo<TcpConnectInfo>>().and_then(TlsConnectInfo::peer_certs)?;
    chain.first().map(|certificate| certificate.to_vec())
}

/// Why a caller could not be authenticated.
#[derive(Debug, thiserror::Error)]
pub(super) enum AuthenticationError {
    /// The client presented no certificate.
    #[error("client certificate required")]
    None,
    /// The certificate does not name exactly one caller.
    #[error("{0}")]
    Unreadable(String),
    /// The certificate has expired.
    #[error("the client certificate of the {0} has expired; enrol again")]
    Expired(Caller),
    /// Officers have revoked this certificate.
    #[error("the client certificate of the {0} is revoked; ask an officer, and enrol again")]
    Revoked(Caller),
}

impl AuthenticationError {
    /// Returns the stable reason for programs.
    pub(super) const fn reason(&self) -> &'static str {
        match self {
            Self::Revoked(_) => "REVOKED",
            Self::None | Self::Unreadable(_) | Self::Expired(_) => "UNAUTHENTICATED_CALLER",
        }
    }

    /// Returns the caller that the certificate names, if it could be read.
    pub(super) const fn caller(&self) -> Option<&Caller> {
        match self {
            Self::Expired(caller) | Self::Revoked(caller) => Some(caller),
            Self::None | Self::Unreadable(_) => None,
        }
    }
}

fn unauthenticated(message: String) -> Status {
    refusal(Code::Unauthenticated, "UNAUTHENTICATED_CALLER", message)
}
