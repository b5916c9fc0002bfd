//! Who calls: the role and name in the client certificate. Each service lists the role it serves; nothing else gets in.

use std::time::{SystemTime, UNIX_EPOCH};

use tonic::{Code, Request, Status};

use super::status::refusal;
use crate::certificate::{Caller, caller_of};
use crate::names::{OfficerName, StationName};

/// The station of a request, or why it is none.
pub(super) fn station<T>(request: &Request<T>) -> Result<StationName, Status> {
    match caller(request)? {
        Caller::Station(name) => Ok(name),
        Caller::Officer(name) => Err(wrong_role(&format!("the officer {name}"), "stations")),
    }
}

/// The officer of a request, or why it is none.
pub(super) fn officer<T>(request: &Request<T>) -> Result<OfficerName, Status> {
    match caller(request)? {
        Caller::Officer(name) => Ok(name),
        Caller::Station(name) => Err(wrong_role(&format!("the station {name}"), "officers")),
    }
}

fn wrong_role(who: &str, whom: &str) -> Status {
    tracing::info!(caller = %who, serves = whom, "refused: wrong role");
    refusal(Code::PermissionDenied, "WRONG_ROLE", format!("{who} may not call this service; it serves {whom}"))
}

/// TLS has verified the chain when the connection was made; a connection may outlive its certificate, so the time is
/// looked at with each call.
fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let unauthenticated = |message: String| {
        tracing::info!(from = ?request.remote_addr(), why = %message, "refused: no caller");
        refusal(Code::Unauthenticated, "NO_CALLER", message)
    };
    let certificates = request.peer_certs();
    let certificate = certificates.as_ref().and_then(|chain| chain.first());
    let certificate =
        certificate.ok_or_else(|| unauthenticated("this service needs a client certificate".to_owned()))?;
    let (caller, not_after) = caller_of(certificate).map_err(|e| unauthenticated(e.to_string()))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    if not_after < now {
        return Err(unauthenticated("the client certificate has expired; enrol again".to_owned()));
    }
    Ok(caller)
}
