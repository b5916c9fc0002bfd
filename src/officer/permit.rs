//! Verifies the approval of a ceremony that needs a second officer.

use spp_format::certificate::{Caller, certificate_pem, verify_caller_certificate};
use spp_format::keys::PublicKey;
use spp_proto as proto;

use super::access_client::VerifiedRequest;
use super::now;
use super::transcript::{Approval, OfficerStatement};
use crate::hsm::KeyManifest;

/// Proof that other officers approved a ceremony file. Running the ceremony consumes it, so it allows one run.
#[derive(Debug)]
pub struct Permit {
    file_sha256: [u8; 32],
    approval: Approval,
}

impl Permit {
    /// Verifies an approval received from the daemon, which is not trusted: the officers' signatures must be for this file, by
    /// keys that an access CA in keys.toml certified. The daemon decides how many approvals are needed, at least one.
    pub(super) fn verified(
        node: &str,
        shown: &proto::Approval,
        file_sha256: &[u8; 32],
        manifest: &KeyManifest,
    ) -> Result<Self, String> {
        let invalid = |reason: String| format!("request {}: {reason}; nothing was done", shown.id);
        let authorities = manifest.access_keys();
        let request = VerifiedRequest::verify(node, shown, &authorities).map_err(|e| e.to_string())?;
        if request.action.ceremony_hash().as_ref() != Some(file_sha256) {
            return Err(invalid("it is not an approval of this file".to_owned()));
        }
        if request.expires <= now() {
            return Err(invalid("it has expired; submit a new request".to_owned()));
        }
        let mut statements = Vec::new();
        for signed in shown.requested.iter().chain(&shown.approvals) {
            statements.push(statement(signed, &authorities).map_err(invalid)?);
        }
        let mut approved_by = Vec::new();
        for signed in &shown.approvals {
            let officer = request.approved_by(signed).map_err(invalid)?;
            if officer == request.officer || approved_by.contains(&officer) {
                return Err(invalid(format!("{officer} approved twice or approved their own request")));
            }
            approved_by.push(officer);
        }
        let needed = shown.needed.max(1);
        if approved_by.len() < usize::try_from(needed).unwrap_or(usize::MAX) {
            return Err(invalid(format!("not enough approvals: {} of {needed}", approved_by.len())));
        }
        let (requested_by, request) = (request.officer, shown.id.clone());
        Ok(Self::new(*file_sha256, Approval { request, requested_by, approved_by, statements }))
    }

    pub(super) const fn new(file_sha256: [u8; 32], approval: Approval) -> Self {
        Self { file_sha256, approval }
    }

    /// SHA-256 of the approved file.
    pub(super) const fn file_sha256(&self) -> &[u8; 32] {
        &self.file_sha256
    }

    /// The approval, for the transcript.
    pub(super) fn into_approval(self) -> Approval {
        self.approval
    }
}

/// The statement with everything needed to verify it later. The officer's certificate must be authentic and valid now.
fn statement(signed: &proto::OfficerSignature, authorities: &[PublicKey]) -> Result<OfficerStatement, String> {
    let known = verify_caller_certificate(&signed.certificate, authorities)
        .map_err(|e| format!("the certificate of {} is not accepted: {e}", signed.officer))?;
    let now = now();
    if now < known.not_before || known.not_after <= now {
        return Err(format!("the certificate of {} is not valid now; renew it first", known.caller));
    }
    let Caller::Officer(officer) = known.caller else {
        return Err(format!("signed by the {}, which is not an officer", known.caller));
    };
    let certificate = certificate_pem(&signed.certificate).map_err(|e| e.to_string())?;
    let (statement, signature) = (signed.statement.clone(), hex::encode(&signed.signature));
    Ok(OfficerStatement { officer, statement, signature, certificate })
}

#[cfg(test)]
pub(super) mod tests {
    use spp_format::approval::{ApprovalStatement, ProtectedAction, RequestId, Verdict};
    use spp_format::certificate::{
        AccessCertificate, AccessName, AuthorityCertificate, CertificateSerial, IssuerCertificate, SubjectName,
        access_certificate, authority_certificate,
    };
    use spp_format::keys::{SignatureAlgorithm, TlsKey, sha256};
    use spp_format::names::OfficerName;

    use super::*;
    use crate::hsm::{Provenance, SigningKey, SigningUse, TokenIdentity};

    const FILE: &str = "[[destroy]]\nkey = \"a\"\ncheck_value = \"00\"\n";

    impl Permit {
        /// An approval by o-2, for tests of ceremonies.
        pub(crate) fn approved_by_o2(file_sha256: [u8; 32]) -> Self {
            let (requested_by, approved_by) = ("o-1".parse().unwrap(), vec!["o-2".parse().unwrap()]);
            let (request, statements) = ("r-7".to_owned(), Vec::new());
            Self::new(file_sha256, Approval { request, requested_by, approved_by, statements })
        }
    }

    fn serial() -> CertificateSerial {
        CertificateSerial::from_random([5; 20])
    }

    /// An access CA.
    struct Authority {
        key: TlsKey,
        issuer: IssuerCertificate,
    }

    impl Authority {
        fn new() -> Self {
            let key = TlsKey::generate().unwrap();
            let unsigned = authority_certificate(&AuthorityCertificate {
                subject: &SubjectName::with_common_name("access").unwrap(),
                public_key: key.public(),
                algorithm: SignatureAlgorithm::EcdsaP256Sha256,
                serial: serial(),
                not_before: 0,
                not_after: None,
            });
            let unsigned = unsigned.unwrap();
            let signature = key.sign(unsigned.to_be_signed()).unwrap();
            let pem = unsigned.assemble(&signature).unwrap().to_pem().unwrap();
            Self { issuer: IssuerCertificate::from_pem_with_default_algorithm(&pem).unwrap(), key }
        }

        fn certify(&self, caller: &Caller, not_after: u64) -> (TlsKey, Vec<u8>) {
            let key = TlsKey::generate().unwrap();
            let (name, public_key, issuer) = (&AccessName::Client(caller.clone()), key.public(), &self.issuer);
            let wanted = AccessCertificate { name, public_key, issuer, serial: serial(), not_before: 1, not_after };
            let unsigned = access_certificate(&wanted).unwrap();
            let signature = self.key.sign(unsigned.to_be_signed()).unwrap();
            let der = unsigned.assemble(&signature).unwrap().as_der().to_vec();
            (key, der)
        }

        fn manifest(&self) -> KeyManifest {
            let mut manifest = KeyManifest::empty(TokenIdentity { label: "t".to_owned(), serial: String::new() });
            manifest.signing.push(SigningKey {
                name: "access".parse().unwrap(),
                id: vec![1],
                use_: SigningUse::Access,
                public_key: self.key.public().clone(),
                certificate: "access-ca.pem".into(),
                replaces: None,
                provenance: Provenance::Made,
            });
            manifest
        }
    }

    fn signed(
        by: &Authority,
        caller: &Caller,
        until: u64,
        statement_for: impl Fn(&OfficerName) -> ApprovalStatement,
    ) -> proto::OfficerSignature {
        let name: OfficerName = caller.name().parse().unwrap();
        let (key, certificate) = by.certify(caller, until);
        let statement = statement_for(&name);
        let signature = key.sign(statement.as_bytes()).unwrap();
        let (officer, statement) = (name.to_string(), statement.as_str().to_owned());
        proto::OfficerSignature { officer, received_at: None, statement, signature, certificate }
    }

    fn officer(name: &str) -> Caller {
        Caller::Officer(name.parse().unwrap())
    }

    /// A request by o-1 and its approval: the CA of each officer, and the expiry of the approver's certificate.
    struct Case<'a> {
        first: &'a Authority,
        second: &'a Authority,
        approver: Caller,
        verdict: Verdict,
        until: u64,
        expires: u64,
    }

    impl<'a> Case<'a> {
        fn of(authority: &'a Authority) -> Self {
            let (first, second, approver) = (authority, authority, officer("o-2"));
            let (until, expires) = (now() + 600, now() + 300);
            Self { first, second, approver, verdict: Verdict::Approve, until, expires }
        }

        fn shown(&self) -> proto::Approval {
            let (id, action) = (RequestId::from_bytes([7; 8]), ProtectedAction::ceremony(FILE.to_owned()));
            let request = |name: &OfficerName| ApprovalStatement::request("spp-a", id, name, self.expires, &action);
            let asked = request(&"o-1".parse().unwrap());
            let decision = |name: &OfficerName| ApprovalStatement::decision("spp-a", id, name, &asked, &self.verdict);
            proto::Approval {
                id: id.to_string(),
                action: action.to_json(),
                expires: Some(prost_types::Timestamp { seconds: i64::try_from(self.expires).unwrap(), nanos: 0 }),
                needed: 1,
                requested: Some(signed(self.first, &officer("o-1"), now() + 600, request)),
                approvals: vec![signed(self.second, &self.approver, self.until, decision)],
                ..Default::default()
            }
        }
    }

    #[test]
    fn permit_needs_two_valid_officer_signatures() {
        let (own, stranger) = (Authority::new(), Authority::new());
        let (manifest, hash) = (own.manifest(), sha256(FILE.as_bytes()));
        let permit = |shown: &proto::Approval| Permit::verified("spp-a", shown, &hash, &manifest);
        let right = Case::of(&own).shown();
        let approval = permit(&right).unwrap().into_approval();
        let names =
            (approval.requested_by.as_str(), approval.approved_by.iter().map(OfficerName::as_str).collect::<Vec<_>>());
        assert_eq!((names, approval.statements.len()), (("o-1", vec!["o-2"]), 2));

        let refused = |shown: &proto::Approval, reason: &str| {
            let error = permit(shown).unwrap_err();
            assert!(error.contains(reason), "{reason}: {error}");
        };
        refused(&Case { first: &stranger, ..Case::of(&own) }.shown(), "not issued by a known access CA");
        refused(&Case { second: &stranger, ..Case::of(&own) }.shown(), "not issued by a known access CA");
        refused(&Case { until: now() - 1, ..Case::of(&own) }.shown(), "is not valid now");
        refused(&Case { expires: now() - 1, ..Case::of(&own) }.shown(), "it has expired");
        refused(
            &Case { approver: officer("o-1"), ..Case::of(&own) }.shown(),
            "o-1 approved twice or approved their own request",
        );
        let station = Caller::Station("o-2".parse().unwrap());
        refused(&Case { approver: station, ..Case::of(&own) }.shown(), "which is not an officer");
        let no = Verdict::Reject("no".to_owned());
        refused(&Case { verdict: no, ..Case::of(&own) }.shown(), "is not an approval of this request");
        let change = |change: &dyn Fn(&mut proto::Approval)| {
            let mut shown = right.clone();
            change(&mut shown);
            shown
        };
        refused(&change(&|shown| shown.approvals.clear()), "not enough approvals: 0 of 1");
        refused(
            &change(&|shown| shown.approvals.push(shown.approvals[0].clone())),
            "o-2 approved twice or approved their own request",
        );
        refused(&change(&|shown| shown.needed = 2), "not enough approvals: 1 of 2");
        refused(&change(&|shown| shown.approvals[0].signature[9] ^= 1), "signature does not match the statement");
        refused(
            &change(&|shown| shown.action = ProtectedAction::ceremony(format!("{FILE}#")).to_json()),
            "does not match what its officer",
        );
        assert!(
            Permit::verified("spp-b", &right, &hash, &manifest)
                .unwrap_err()
                .contains("does not match what its officer")
        );
        assert!(
            Permit::verified("spp-a", &right, &[0; 32], &manifest)
                .unwrap_err()
                .contains("not an approval of this file")
        );
    }
}
