//! Access certificates of callers and servers.

use super::*;
use crate::certificate::testing::{NOW, SoftwareKey, authority_of, openssl, serial};

struct Access {
    authority: SoftwareKey,
    issuer: IssuerCertificate,
}

impl Access {
    fn new() -> Self {
        let authority = SoftwareKey::p256();
        let issuer = IssuerCertificate::from_pem(&authority_of(&authority), authority.algorithm()).unwrap();
        Self { authority, issuer }
    }

    fn unsigned(&self, name: &AccessName) -> Result<UnsignedDocument, CertificateError> {
        let key = SoftwareKey::p256();
        access_certificate(&AccessCertificate {
            name,
            public_key: key.public(),
            issuer: &self.issuer,
            serial: serial(9),
            not_before: NOW,
            not_after: NOW + 86_400 * 365,
        })
    }

    fn issue(&self, name: &AccessName) -> crate::certificate::SignedDocument {
        let unsigned = self.unsigned(name).unwrap();
        let signature = self.authority.sign(unsigned.to_be_signed());
        unsigned.assemble(&signature).unwrap()
    }
}

#[test]
fn issued_client_certificate_names_its_caller() {
    let access = Access::new();
    for role in Role::ALL {
        let caller = Caller::new(role, "line-3/a").unwrap();
        assert_eq!((caller.role(), caller.to_string()), (role, format!("{role} line-3/a")));
        let issued = access.issue(&AccessName::Client(caller.clone()));
        let expected = CallerCertificate { caller, not_before: NOW, not_after: NOW + 86_400 * 365 };
        assert_eq!(parse_caller_certificate(issued.as_der()).unwrap(), expected);
    }
}

#[test]
fn access_certificates_have_right_purpose_for_openssl() {
    let access = Access::new();
    let ca = authority_of(&access.authority);
    let check = |name: &AccessName, purpose: &str| {
        let pem = access.issue(name).to_pem().unwrap();
        let time = (NOW + 60).to_string();
        let line = ["verify", "-x509_strict", "-attime", &time, "-purpose", purpose, "-CAfile", "ca.pem", "x.pem"];
        openssl(&line, &[("ca.pem", &ca), ("x.pem", &pem)])
    };
    let station = AccessName::Client(Caller::Station("line-3/a".parse().unwrap()));
    let server = AccessName::Server { dns: vec!["spp.example".into()], ips: vec![IpAddr::from([127, 0, 0, 1])] };
    for (name, purpose, accepted) in [
        (&station, "sslclient", true),
        (&station, "sslserver", false),
        (&server, "sslserver", true),
        (&server, "sslclient", false),
    ] {
        let text = check(name, purpose);
        assert_eq!(text.contains("x.pem: OK"), accepted, "{purpose}: {text}");
    }
    assert!(parse_caller_certificate(access.issue(&server).as_der()).is_err(), "a server certificate names no caller");
}

#[test]
fn certificate_with_two_callers_rejected() {
    let access = Access::new();
    let key = SoftwareKey::p256();
    let names = ["spp://station/a", "spp://officer/o-1"].map(|uri| tbs::uri(uri).unwrap());
    let to_be_signed = tbs::encode(TbsFields {
        serial: serial(1),
        algorithm: access.authority.algorithm(),
        issuer: access.issuer.subject().clone(),
        not_before: NOW,
        not_after: NOW + 1,
        subject: SubjectName::with_common_name("a").unwrap().to_name(None).unwrap(),
        public_key: key.public(),
        extensions: vec![tbs::extension(false, &SubjectAltName(names.to_vec())).unwrap()],
    })
    .unwrap();
    let signature = access.authority.sign(&to_be_signed);
    let document =
        UnsignedDocument::new("CERTIFICATE", to_be_signed, access.authority.algorithm(), access.authority.public());
    assert!(parse_caller_certificate(document.assemble(&signature).unwrap().as_der()).is_err());
}

#[test]
fn caller_certificate_must_be_issued_by_known_access_ca() {
    let (access, other) = (Access::new(), Access::new());
    let officer = AccessName::Client(Caller::Officer("o-1".parse().unwrap()));
    let issued = access.issue(&officer);
    let [own_ca, other_ca] = [&access, &other].map(|access| access.authority.public().clone());
    for authorities in [vec![own_ca.clone()], vec![other_ca.clone(), own_ca.clone()]] {
        let caller = verify_caller_certificate(issued.as_der(), &authorities).unwrap();
        assert_eq!(caller, parse_caller_certificate(issued.as_der()).unwrap());
    }
    assert!(verify_caller_certificate(issued.as_der(), &[]).is_err());
    let error = verify_caller_certificate(issued.as_der(), &[other_ca]).unwrap_err().to_string();
    assert!(error.contains("not issued by a known access CA"), "{error}");
    for position in 0..issued.as_der().len() {
        let mut changed = issued.as_der().to_vec();
        changed[position] ^= 1;
        assert!(verify_caller_certificate(&changed, std::slice::from_ref(&own_ca)).is_err(), "byte {position}");
    }
    let server = access.issue(&AccessName::Server { dns: vec!["spp.example".into()], ips: vec![] });
    assert!(
        verify_caller_certificate(server.as_der(), &[own_ca])
            .unwrap_err()
            .to_string()
            .contains("extendedKeyUsage is not clientAuth")
    );
}

#[test]
fn invalid_caller_and_dns_names_rejected() {
    for path in ["", "station", "station/", "station/A", "auditors/x", "officer/a//b", "station/../x"] {
        assert!(parse_caller(path).is_err(), "{path}");
    }
    let access = Access::new();
    for dns in ["", "a..b", "-a", "*.example", "a b"] {
        assert!(access.unsigned(&AccessName::Server { dns: vec![dns.into()], ips: vec![] }).is_err(), "{dns}");
    }
    assert!(access.unsigned(&AccessName::Server { dns: vec![], ips: vec![] }).is_err());
}
