//! The approval of a ceremony that one officer alone may not hold.

use super::access_client::Seen;
use super::now;
use super::transcript::{Approval, OfficerStatement};
use crate::certificate::{Caller, certificate_pem, verify_caller};
use crate::hsm::KeyManifest;
use crate::keys::PublicKey;
use crate::proto;

/// That a ceremony file was approved by other officers. Whoever holds such a ceremony gives it up: it is good for one time.
#[derive(Debug)]
pub struct Permit {
    file_sha256: [u8; 32],
    approval: Approval,
}

impl Permit {
    /// Of what the daemon shows, which is not believed: the officers have signed it with keys that the register's authorities for access
    /// certificates have certified, for this very file. How many must approve is the daemon's to know; one other officer is the least.
    pub(super) fn verified(
        node: &str,
        shown: &proto::Approval,
        file_sha256: &[u8; 32],
        register: &KeyManifest,
    ) -> Result<Self, String> {
        let wrong = |why: String| format!("the request {}: {why}; nothing was done", shown.id);
        let authorities = register.access_keys();
        let seen = Seen::of(node, shown, &authorities).map_err(|e| e.to_string())?;
        if seen.act.ceremony_hash().as_ref() != Some(file_sha256) {
            return Err(wrong("it is not of this file".to_owned()));
        }
        if seen.expires <= now() {
            return Err(wrong("it has expired; ask for it anew".to_owned()));
        }
        let mut statements = Vec::new();
        for signed in shown.requested.iter().chain(&shown.approvals) {
            statements.push(statement(signed, &authorities).map_err(wrong)?);
        }
        let mut approved_by = Vec::new();
        for signed in &shown.approvals {
            let officer = seen.approved_by(signed).map_err(wrong)?;
            if officer == seen.officer || approved_by.contains(&officer) {
                return Err(wrong(format!("{officer} counts once, and not for what he has asked for himself")));
            }
            approved_by.push(officer);
        }
        if approved_by.len() < usize::try_from(shown.needed.max(1)).unwrap_or(usize::MAX) {
            return Err(wrong(format!("{} other officers have approved it, which is not enough", approved_by.len())));
        }
        let (request, requested_by) = (shown.id.clone(), seen.officer);
        Ok(Self::new(*file_sha256, Approval { request, requested_by, approved_by, statements }))
    }

    pub(super) const fn new(file_sha256: [u8; 32], approval: Approval) -> Self {
        Self { file_sha256, approval }
    }

    /// The SHA-256 of the file that was approved.
    pub(super) const fn file_sha256(&self) -> &[u8; 32] {
        &self.file_sha256
    }

    /// For the transcript.
    pub(super) fn into_approval(self) -> Approval {
        self.approval
    }
}

/// The statement with all that is needed to verify it again, if its officer's certificate is genuine and in time.
fn statement(signed: &proto::OfficerSignature, authorities: &[PublicKey]) -> Result<OfficerStatement, String> {
    let known = verify_caller(&signed.certificate, authorities)
        .map_err(|e| format!("the certificate of {}, by the access keys of the register: {e}", signed.officer))?;
    let now = now();
    if now < known.not_before || known.not_after <= now {
        return Err(format!("the certificate of {} is not valid now; it must be renewed first", known.caller));
    }
    let Caller::Officer(officer) = known.caller else {
        return Err(format!("the {} has signed it, who is no officer", known.caller));
    };
    let certificate = certificate_pem(&signed.certificate).map_err(|e| e.to_string())?;
    let (statement, signature) = (signed.statement.clone(), hex::encode(&signed.signature));
    Ok(OfficerStatement { officer, statement, signature, certificate })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::access::{ApprovalStatement, ProtectedAction, RequestId, Verdict};
    use crate::certificate::{
        AccessCertificate, AccessName, AuthorityCertificate, CertificateSerial, IssuerCertificate, SubjectName,
        access_certificate, authority_certificate,
    };
    use crate::hsm::SigningUse;
    use crate::hsm::{Provenance, SigningKey, TokenIdentity};
    use crate::keys::{SignatureAlgorithm, TlsKey, sha256};
    use crate::names::OfficerName;

    const FILE: &str = "[[destroy]]\nkey = \"a\"\ncheck_value = \"00\"\n";

    impl Permit {
        /// For tests of what is done with one.
        pub(crate) fn of_o_2(file_sha256: [u8; 32]) -> Self {
            let (requested_by, approved_by) = ("o-1".parse().unwrap(), vec!["o-2".parse().unwrap()]);
            let (request, statements) = ("r-7".to_owned(), Vec::new());
            Self::new(file_sha256, Approval { request, requested_by, approved_by, statements })
        }
    }

    fn serial() -> CertificateSerial {
        CertificateSerial::from_random([5; 20])
    }

    /// An authority for access certificates, and whom it certifies.
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
            Self { issuer: IssuerCertificate::from_pem_alone(&pem).unwrap(), key }
        }

        fn certifies(&self, caller: &Caller, not_after: u64) -> (TlsKey, Vec<u8>) {
            let key = TlsKey::generate().unwrap();
            let (name, public_key, issuer) = (&AccessName::Client(caller.clone()), key.public(), &self.issuer);
            let wanted = AccessCertificate { name, public_key, issuer, serial: serial(), not_before: 1, not_after };
            let unsigned = access_certificate(&wanted).unwrap();
            let signature = self.key.sign(unsigned.to_be_signed()).unwrap();
            let der = unsigned.assemble(&signature).unwrap().as_der().to_vec();
            (key, der)
        }

        fn register(&self) -> KeyManifest {
            let mut register = KeyManifest::empty(TokenIdentity { label: "t".to_owned(), serial: String::new() });
            register.signing.push(SigningKey {
                name: "access".parse().unwrap(),
                id: vec![1],
                use_: SigningUse::Access,
                public_key: self.key.public().clone(),
                certificate: "access-ca.pem".into(),
                replaces: None,
                provenance: Provenance::Made,
            });
            register
        }
    }

    fn signed(
        by: &Authority,
        caller: &Caller,
        until: u64,
        say: impl Fn(&OfficerName) -> ApprovalStatement,
    ) -> proto::OfficerSignature {
        let name: OfficerName = caller.name().parse().unwrap();
        let (key, certificate) = by.certifies(caller, until);
        let statement = say(&name);
        let signature = key.sign(statement.as_bytes()).unwrap();
        let (officer, statement) = (name.to_string(), statement.as_str().to_owned());
        proto::OfficerSignature { officer, at: None, statement, signature, certificate }
    }

    fn officer(name: &str) -> Caller {
        Caller::Officer(name.parse().unwrap())
    }

    /// A request by o-1 that o-2 has approved; the authorities of either, and until when the second one's certificate is.
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
            let (id, act) = (RequestId::from_bytes([7; 8]), ProtectedAction::ceremony(FILE.to_owned()));
            let request = |name: &OfficerName| ApprovalStatement::request("spp-a", id, name, self.expires, &act);
            let asked = request(&"o-1".parse().unwrap());
            let decision = |name: &OfficerName| ApprovalStatement::decision("spp-a", id, name, &asked, &self.verdict);
            proto::Approval {
                id: id.to_string(),
                act: act.to_json(),
                expires: Some(prost_types::Timestamp { seconds: i64::try_from(self.expires).unwrap(), nanos: 0 }),
                needed: 1,
                requested: Some(signed(self.first, &officer("o-1"), now() + 600, request)),
                approvals: vec![signed(self.second, &self.approver, self.until, decision)],
                ..Default::default()
            }
        }
    }

    #[test]
    fn what_two_officers_have_signed_is_a_permit_and_everything_else_is_none() {
        let (own, stranger) = (Authority::new(), Authority::new());
        let (register, hash) = (own.register(), sha256(FILE.as_bytes()));
        let permit = |shown: &proto::Approval| Permit::verified("spp-a", shown, &hash, &register);
        let right = Case::of(&own).shown();
        let approval = permit(&right).unwrap().into_approval();
        let names =
            (approval.requested_by.as_str(), approval.approved_by.iter().map(OfficerName::as_str).collect::<Vec<_>>());
        assert_eq!((names, approval.statements.len()), (("o-1", vec!["o-2"]), 2));

        let refused = |shown: &proto::Approval, why: &str| {
            let error = permit(shown).unwrap_err();
            assert!(error.contains(why), "{why}: {error}");
        };
        refused(&Case { first: &stranger, ..Case::of(&own) }.shown(), "none of the authorities");
        refused(&Case { second: &stranger, ..Case::of(&own) }.shown(), "none of the authorities");
        refused(&Case { until: now() - 1, ..Case::of(&own) }.shown(), "is not valid now");
        refused(&Case { expires: now() - 1, ..Case::of(&own) }.shown(), "it has expired");
        refused(&Case { approver: officer("o-1"), ..Case::of(&own) }.shown(), "o-1 counts once");
        let station = Caller::Station("o-2".parse().unwrap());
        refused(&Case { approver: station, ..Case::of(&own) }.shown(), "who is no officer");
        let no = Verdict::Reject("no".to_owned());
        refused(&Case { verdict: no, ..Case::of(&own) }.shown(), "is not an approval of this request");
        let change = |change: &dyn Fn(&mut proto::Approval)| {
            let mut shown = right.clone();
            change(&mut shown);
            shown
        };
        refused(&change(&|shown| shown.approvals.clear()), "0 other officers have approved it");
        refused(&change(&|shown| shown.approvals.push(shown.approvals[0].clone())), "o-2 counts once");
        refused(&change(&|shown| shown.needed = 2), "which is not enough");
        refused(&change(&|shown| shown.approvals[0].signature[9] ^= 1), "not signed with the key of the certificate");
        refused(
            &change(&|shown| shown.act = ProtectedAction::ceremony(format!("{FILE}#")).to_json()),
            "is not what its officer",
        );
        assert!(Permit::verified("spp-b", &right, &hash, &register).unwrap_err().contains("is not what its officer"));
        assert!(Permit::verified("spp-a", &right, &[0; 32], &register).unwrap_err().contains("not of this file"));
    }
}
