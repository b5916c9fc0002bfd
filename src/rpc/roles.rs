//! Who may call what: ONE table. What is not in it serves nobody.

use std::sync::Arc;

use tonic::codegen::http;
use tonic::{Code, Status};

use super::callers;
use super::status::refusal;
use crate::access::RevocationList;
use crate::audit::{Auditor, Entry, Outcome};
use crate::certificate::{Caller, Role};

/// Whom a method serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whom {
    /// Whoever can reach the public listener.
    Anybody,
    /// Callers of these roles.
    These(&'static [Role]),
}

/// Every method of every listener.
const TABLE: &[(&str, Whom)] = {
    use Role::{Auditor, BackOffice, Monitor, Officer, Station};
    use Whom::{Anybody, These};
    &[
        ("/spp.v1.Access/RenewCertificate", These(&[Station, Officer, Auditor, BackOffice, Monitor])),
        ("/spp.v1.Access/EnrollCaller", These(&[Officer])),
        ("/spp.v1.Access/ListCallers", These(&[Officer, Auditor])),
        ("/spp.v1.Access/RequestApproval", These(&[Officer])),
        ("/spp.v1.Access/ListApprovals", These(&[Officer, Auditor])),
        ("/spp.v1.Access/GetApproval", These(&[Officer, Auditor])),
        ("/spp.v1.Access/DecideApproval", These(&[Officer])),
        ("/spp.v1.Access/UseApproval", These(&[Officer])),
        ("/spp.v1.Access/RecordCeremony", These(&[Officer])),
        ("/spp.v1.Access/ReadAuditLog", These(&[Officer, Auditor])),
        ("/spp.v1.Access/LoadIdentities", These(&[Officer])),
        ("/spp.v1.Access/ListIdentities", These(&[Officer, Auditor])),
        ("/spp.v1.Line/Assemble", These(&[Station])),
        ("/spp.v1.Line/Complete", These(&[Station])),
        ("/spp.v1.Line/Abort", These(&[Station])),
        ("/spp.v1.Line/GetSession", These(&[Station])),
        ("/spp.v1.Officer/GetStatus", These(&[Officer, Auditor, Monitor])),
        ("/spp.v1.Officer/GetPoolStatus", These(&[Officer, Auditor, Monitor])),
        ("/spp.v1.Officer/FillPool", These(&[Officer])),
        ("/spp.v1.Officer/ShredPool", These(&[Officer])),
        ("/spp.v1.Officer/Reload", These(&[Officer])),
        ("/spp.v1.Production/GetProduction", These(&[Officer, Auditor, Monitor])),
        ("/spp.v1.Production/GetDevice", These(&[Officer, Auditor])),
        ("/spp.v1.Production/ListSessions", These(&[Officer, Auditor])),
        ("/spp.v1.Production/AbortSession", These(&[Officer])),
        ("/spp.v1.Recovery/GetRecord", Anybody),
        ("/spp.v1.Recovery/GetProof", Anybody),
        ("/spp.v1.Recovery/GetCheckpoint", Anybody),
        ("/grpc.health.v1.Health/Check", Anybody),
        ("/grpc.health.v1.Health/Watch", Anybody),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Anybody),
    ]
};

/// The door of the listeners with mutual TLS: a request goes on with its caller, or ends here and is recorded. TLS has seen to it
/// that there is a certificate, also where anybody is served.
#[derive(Clone)]
pub(super) struct Guard {
    pub(super) standing: Arc<RevocationList>,
    pub(super) auditor: Arc<Auditor>,
}

impl Guard {
    /// The request with its caller.
    pub(super) fn admit<B>(&self, mut request: http::Request<B>) -> Result<http::Request<B>, Status> {
        let (method, from) = (request.uri().path().to_owned(), callers::address(request.extensions()));
        let certificate = callers::of_connection(request.extensions(), &self.standing).map_err(|nobody| {
            let from = from.map(|from| from.ip().to_string()).unwrap_or_default();
            let who = nobody.caller().map_or_else(|| format!("nobody at {from}"), ToString::to_string);
            self.refused(who, &method, Code::Unauthenticated, nobody.reason(), nobody.to_string())
        })?;
        permit(&method, &certificate.caller).map_err(|why| match why {
            NotServed::Role(message) => {
                let who = certificate.caller.to_string();
                self.refused(who, &method, Code::PermissionDenied, "WRONG_ROLE", message)
            }
            NotServed::Unknown => Status::unimplemented(format!("there is no method {method}")),
        })?;
        request.extensions_mut().insert(certificate);
        request.extensions_mut().insert(Arc::clone(&self.standing));
        Ok(request)
    }

    /// Nothing was begun, so the answer does not wait for the record.
    fn refused(&self, who: String, method: &str, code: Code, reason: &'static str, message: String) -> Status {
        tracing::info!(%who, method, why = %message, "refused");
        let known = TABLE.iter().find(|(known, _)| *known == method).map_or("an unknown method", |(known, _)| known);
        let entry = Entry::new(who, "call", Outcome::Refused(message.clone())).with("method", known);
        let auditor = Arc::clone(&self.auditor);
        tokio::spawn(async move { auditor.refused(entry, reason).await });
        refusal(code, reason, message)
    }
}

/// Why a caller is not served.
enum NotServed {
    /// Others are.
    Role(String),
    /// Nobody is.
    Unknown,
}

fn permit(method: &str, caller: &Caller) -> Result<(), NotServed> {
    match TABLE.iter().find(|(known, _)| *known == method) {
        Some((_, Whom::Anybody)) => Ok(()),
        Some((_, Whom::These(roles))) if roles.contains(&caller.role()) => Ok(()),
        Some((_, Whom::These(roles))) => {
            let serves = roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(", ");
            Err(NotServed::Role(format!("the {caller} may not call {method}; it serves: {serves}")))
        }
        None => Err(NotServed::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;

    fn methods(descriptors: &[u8]) -> Vec<String> {
        let files = FileDescriptorSet::decode(descriptors).unwrap().file;
        let of_file = |file: &prost_types::FileDescriptorProto| -> Vec<String> {
            let of_service = |service: &prost_types::ServiceDescriptorProto| -> Vec<String> {
                let name = format!("/{}.{}", file.package(), service.name());
                service.method.iter().map(|method| format!("{name}/{}", method.name())).collect()
            };
            file.service.iter().flat_map(of_service).collect()
        };
        files.iter().flat_map(of_file).collect()
    }

    #[test]
    fn every_method_is_in_the_table_once_and_nothing_else_is() {
        let reflection = tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET;
        let all = [crate::proto::DESCRIPTORS, tonic_health::pb::FILE_DESCRIPTOR_SET, reflection];
        let served: BTreeSet<_> = all.into_iter().flat_map(methods).collect();
        let told: Vec<_> = TABLE.iter().map(|(method, _)| (*method).to_owned()).collect();
        assert_eq!(told.iter().cloned().collect::<BTreeSet<_>>(), served);
        assert_eq!(told.len(), served.len(), "a method is there twice");
    }

    #[test]
    fn who_only_reads_changes_nothing() {
        let changes = [
            "Assemble",
            "Complete",
            "Reload",
            "Abort",
            "AbortSession",
            "FillPool",
            "ShredPool",
            "EnrollCaller",
            "RequestApproval",
            "DecideApproval",
            "UseApproval",
            "RecordCeremony",
            "LoadIdentities",
        ];
        for (method, whom) in TABLE {
            let Whom::These(roles) = whom else { continue };
            let changes = changes.iter().any(|name| method.ends_with(&format!("/{name}")));
            let only_reads = [Role::Auditor, Role::BackOffice, Role::Monitor].iter().any(|role| roles.contains(role));
            assert!(!(changes && only_reads), "{method}");
        }
    }
}
