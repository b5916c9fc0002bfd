//! Authorization: one table lists the roles of every method. Methods that are not in it are not served.

use std::sync::Arc;

use spp_format::certificate::{Caller, Role};
use tonic::codegen::http;
use tonic::{Code, Status};

use super::callers;
use super::status::refusal;
use crate::access::RevocationList;
use crate::audit::{Auditor, Entry, Outcome};

/// Who may call a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Permission {
    /// Any client.
    Public,
    /// Callers with one of these roles.
    Roles(&'static [Role]),
}

/// Every method of every listener.
const TABLE: &[(&str, Permission)] = {
    use Permission::{Public, Roles};
    use Role::{Auditor, BackOffice, Monitor, Officer, Station};
    &[
        ("/spp.v1.Access/RenewCertificate", Roles(&[Station, Officer, Auditor, BackOffice, Monitor])),
        ("/spp.v1.Access/EnrollCaller", Roles(&[Officer])),
        ("/spp.v1.Access/ListCallers", Roles(&[Officer, Auditor])),
        ("/spp.v1.Access/RequestApproval", Roles(&[Officer])),
        ("/spp.v1.Access/ListApprovals", Roles(&[Officer, Auditor])),
        ("/spp.v1.Access/GetApproval", Roles(&[Officer, Auditor])),
        ("/spp.v1.Access/DecideApproval", Roles(&[Officer])),
        ("/spp.v1.Access/UseApproval", Roles(&[Officer])),
        ("/spp.v1.Access/RecordCeremony", Roles(&[Officer])),
        ("/spp.v1.Access/ReadAuditLog", Roles(&[Officer, Auditor])),
        ("/spp.v1.Access/LoadIdentities", Roles(&[Officer])),
        ("/spp.v1.Access/ListIdentities", Roles(&[Officer, Auditor])),
        ("/spp.v1.Line/Assemble", Roles(&[Station])),
        ("/spp.v1.Line/Complete", Roles(&[Station])),
        ("/spp.v1.Line/Abort", Roles(&[Station])),
        ("/spp.v1.Line/GetSession", Roles(&[Station])),
        ("/spp.v1.Officer/GetStatus", Roles(&[Officer, Auditor, Monitor])),
        ("/spp.v1.Officer/GetPoolStatus", Roles(&[Officer, Auditor, Monitor])),
        ("/spp.v1.Officer/FillPool", Roles(&[Officer])),
        ("/spp.v1.Officer/ShredPool", Roles(&[Officer])),
        ("/spp.v1.Officer/Reload", Roles(&[Officer])),
        ("/spp.v1.Production/GetProduction", Roles(&[Officer, Auditor, Monitor])),
        ("/spp.v1.Production/GetDevice", Roles(&[Officer, Auditor])),
        ("/spp.v1.Production/ListSessions", Roles(&[Officer, Auditor])),
        ("/spp.v1.Production/AbortSession", Roles(&[Officer])),
        ("/spp.v1.Recovery/GetRecord", Public),
        ("/spp.v1.Recovery/GetProof", Public),
        ("/spp.v1.Recovery/GetCheckpoint", Public),
        ("/grpc.health.v1.Health/Check", Public),
        ("/grpc.health.v1.Health/Watch", Public),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Public),
    ]
};

/// Authenticates and authorizes every request of the mutual-TLS listeners, and records the requests that it rejects. TLS
/// requires a client certificate on these listeners, also for public methods.
#[derive(Clone)]
pub(super) struct Authorizer {
    pub(super) revocations: Arc<RevocationList>,
    pub(super) auditor: Arc<Auditor>,
}

impl Authorizer {
    /// Adds the caller to the request, or rejects it.
    pub(super) fn authorize<B>(&self, mut request: http::Request<B>) -> Result<http::Request<B>, Status> {
        let (method, address) = (request.uri().path().to_owned(), callers::address(request.extensions()));
        let certificate = callers::authenticate(request.extensions(), &self.revocations).map_err(|error| {
            let address = address.map(|address| address.ip().to_string()).unwrap_or_default();
            let caller = error.caller().map_or_else(|| format!("unauthenticated ({address})"), ToString::to_string);
            self.reject(caller, &method, Code::Unauthenticated, error.reason(), error.to_string())
        })?;
        check_role(&method, &certificate.caller).map_err(|error| match error {
            AuthorizationError::WrongRole(message) => {
                let caller = certificate.caller.to_string();
                self.reject(caller, &method, Code::PermissionDenied, "WRONG_ROLE", message)
            }
            AuthorizationError::UnknownMethod => Status::unimplemented(format!("unknown method {method}")),
        })?;
        request.extensions_mut().insert(certificate);
        request.extensions_mut().insert(Arc::clone(&self.revocations));
        Ok(request)
    }

    /// Rejects a request. No work has started, so the answer does not wait for the audit entry.
    fn reject(&self, caller: String, method: &str, code: Code, reason: &'static str, message: String) -> Status {
        tracing::info!(%caller, method, reason = %message, "call refused");
        let method = TABLE.iter().find(|(name, _)| *name == method).map_or("an unknown method", |(name, _)| name);
        let entry = Entry::new(caller, "call", Outcome::Refused(message.clone())).with("method", method);
        let auditor = Arc::clone(&self.auditor);
        tokio::spawn(async move { auditor.refused(entry, reason).await });
        refusal(code, reason, message)
    }
}

/// Why a request is not authorized.
enum AuthorizationError {
    /// The caller does not have a role that may call the method.
    WrongRole(String),
    /// The method does not exist.
    UnknownMethod,
}

fn check_role(method: &str, caller: &Caller) -> Result<(), AuthorizationError> {
    match TABLE.iter().find(|(name, _)| *name == method) {
        Some((_, Permission::Public)) => Ok(()),
        Some((_, Permission::Roles(roles))) if roles.contains(&caller.role()) => Ok(()),
        Some((_, Permission::Roles(roles))) => {
            let roles = roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(", ");
            Err(AuthorizationError::WrongRole(format!("the {caller} may not call {method}; allowed roles: {roles}")))
        }
        None => Err(AuthorizationError::UnknownMethod),
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
    fn role_table_lists_each_served_method_once() {
        let reflection = tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET;
        let all = [spp_proto::DESCRIPTORS, tonic_health::pb::FILE_DESCRIPTOR_SET, reflection];
        let served: BTreeSet<_> = all.into_iter().flat_map(methods).collect();
        let listed: Vec<_> = TABLE.iter().map(|(method, _)| (*method).to_owned()).collect();
        assert_eq!(listed.iter().cloned().collect::<BTreeSet<_>>(), served);
        assert_eq!(listed.len(), served.len(), "a method is listed twice");
    }

    #[test]
    fn read_only_roles_may_not_call_state_changing_methods() {
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
        for (method, permission) in TABLE {
            let Permission::Roles(roles) = permission else { continue };
            let changes = changes.iter().any(|name| method.ends_with(&format!("/{name}")));
            let only_reads = [Role::Auditor, Role::BackOffice, Role::Monitor].iter().any(|role| roles.contains(role));
            assert!(!(changes && only_reads), "{method}");
        }
    }
}
