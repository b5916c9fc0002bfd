//! Certificates of callers and servers, and what is none.

use super::*;
use crate::certificate::testing::{NOW, SignWith, authority_of, openssl, serial};

struct Access {
    authority: SignWith,
    issuer: IssuerCertificate,
}

impl Access {
    fn new() -> Self {
        let authority = SignWith::p256();
        let issuer = IssuerCertificate::from_pem(&authority_of(&authority), authority.algorithm()).unwrap();
        Self { authority, issuer }
    }

    fn unsigned(&self, name: &AccessName) -> Result<UnsignedDocument, CertificateError> {
        let key = SignWith::p256();
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
fn a_caller_is_read_back_from_its_certificate() {
    let access = Access::new();
    for role in Role::ALL {
        let caller = Caller::new(role, "line-3/a").unwrap();
        assert_eq!((caller.role(), caller.to_string()), (role, format!("{role} line-3/a")));
        let made = access.issue(&AccessName::Client(caller.clone()));
        let wanted = CallerCertificate { caller, not_before: NOW, not_after: NOW + 86_400 * 365 };
        assert_eq!(caller_of(made.as_der()).unwrap(), wanted);
    }
}

#[test]
fn openssl_accepts_a_station_as_client_and_a_server_as_server() {
    let access = Access::new();
    let ca = authority_of(&access.authority);
    let check = |name: &AccessName, purpose: &str| {
        let pem = access.issue(name).to_pem().unwrap();
        let at = (NOW + 60).to_string();
        let line = ["verify", "-x509_strict", "-attime", &at, "-purpose", purpose, "-CAfile", "ca.pem", "x.pem"];
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
    assert!(caller_of(access.issue(&server).as_der()).is_err(), "a server is no caller");
}

#[test]
fn two_callers_in_one_certificate_are_nobody() {
    let access = Access::new();
    let key = SignWith::p256();
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
    assert!(caller_of(document.assemble(&signature).unwrap().as_der()).is_err());
}

#[test]
fn a_caller_is_believed_whom_one_of_the_authorities_has_certified_as_a_client() {
    let (access, stranger) = (Access::new(), Access::new());
    let officer = AccessName::Client(Caller::Officer("o-1".parse().unwrap()));
    let made = access.issue(&officer);
    let [own, other] = [&access, &stranger].map(|access| access.authority.public().clone());
    for authorities in [vec![own.clone()], vec![other.clone(), own.clone()]] {
        let known = verify_caller(made.as_der(), &authorities).unwrap();
        assert_eq!(known, caller_of(made.as_der()).unwrap());
    }
    assert!(verify_caller(made.as_der(), &[]).is_err());
    let error = verify_caller(made.as_der(), &[other]).unwrap_err().to_string();
    assert!(error.contains("none of the authorities"), "{error}");
    for position in 0..made.as_der().len() {
        let mut changed = made.as_der().to_vec();
        changed[position] ^= 1;
        assert!(verify_caller(&changed, std::slice::from_ref(&own)).is_err(), "byte {position}");
    }
    let server = access.issue(&AccessName::Server { dns: vec!["spp.example".into()], ips: vec![] });
    assert!(verify_caller(server.as_der(), &[own]).unwrap_err().to_string().contains("not for a client"));
}

#[test]
fn names_that_are_none_are_refused() {
    for path in ["", "station", "station/", "station/A", "auditors/x", "officer/a//b", "station/../x"] {
        assert!(parse_caller(path).is_err(), "{path}");
    }
    let access = Access::new();
    for dns in ["", "a..b", "-a", "*.example", "a b"] {
        assert!(access.unsigned(&AccessName::Server { dns: vec![dns.into()], ips: vec![] }).is_err(), "{dns}");
    }
    assert!(access.unsigned(&AccessName::Server { dns: vec![], ips: vec![] }).is_err());
}
