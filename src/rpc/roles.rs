//! Who may call what: ONE table. What is not in it serves nobody.

use tonic::codegen::http;
use tonic::{Code, Status};

use super::callers;
use super::status::refusal;
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
    use Role::{Auditor, Monitor, Officer, Station};
    use Whom::{Anybody, These};
    &[
        ("/spp.v1.Line/Assemble", These(&[Station])),
        ("/spp.v1.Line/Complete", These(&[Station])),
        ("/spp.v1.Line/Abort", These(&[Station])),
        ("/spp.v1.Line/GetSession", These(&[Station])),
        ("/spp.v1.Officer/GetStatus", These(&[Officer, Auditor, Monitor])),
        ("/spp.v1.Officer/GetPoolStatus", These(&[Officer, Auditor, Monitor])),
        ("/spp.v1.Officer/FillPool", These(&[Officer])),
        ("/spp.v1.Officer/ShredPool", These(&[Officer])),
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

/// The door of the listeners with mutual TLS: a request goes on with its caller, or ends here. TLS has seen to it that there is a
/// certificate, also where anybody is served.
pub(super) fn admit<B>(mut request: http::Request<B>) -> Result<http::Request<B>, Status> {
    let caller = callers::of_connection(request.extensions())?;
    permit(request.uri().path(), &caller)?;
    request.extensions_mut().insert(caller);
    Ok(request)
}

fn permit(method: &str, caller: &Caller) -> Result<(), Status> {
    match TABLE.iter().find(|(known, _)| *known == method) {
        Some((_, Whom::Anybody)) => Ok(()),
        Some((_, Whom::These(roles))) if roles.contains(&caller.role()) => Ok(()),
        Some((_, Whom::These(roles))) => {
            let serves = roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(", ");
            tracing::info!(%caller, method, %serves, "refused: wrong role");
            let message = format!("the {caller} may not call {method}; it serves: {serves}");
            Err(refusal(Code::PermissionDenied, "WRONG_ROLE", message))
        }
        None => Err(Status::unimplemented(format!("there is no method {method}"))),
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
        let changes = ["Assemble", "Complete", "Abort", "FillPool", "ShredPool", "AbortSession"];
        for (method, whom) in TABLE {
            let Whom::These(roles) = whom else { continue };
            let changes = changes.iter().any(|name| method.ends_with(&format!("/{name}")));
            let only_reads = [Role::Auditor, Role::BackOffice, Role::Monitor].iter().any(|role| roles.contains(role));
            assert!(!(changes && only_reads), "{method}");
        }
    }
}
