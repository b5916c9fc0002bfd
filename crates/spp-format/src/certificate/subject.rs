//! Uniqueness of subjects: one issuer never certifies two devices under one subject (RFC 5280 §4.1.2.6).
//!
//! Identities of different kinds, or that differ only in case or spaces, may have one subject: `eui48:d967458e6b6c` and
//! `serial:D967458E6B6C`.

use der::Decode as _;
use x509_cert::certificate::{Raw, TbsCertificateInner};
use x509_cert::name::Name;

use super::name::normalised;
use super::profile::{IdentityKind, Profile};
use super::{CertificateError, IssuerCertificate, signed};
use crate::names::DeviceIdentity;

/// Issuer and subject of a certificate, in the form in which they are compared.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct IssuedSubject(Vec<u8>);

impl IssuedSubject {
    /// What a certificate of this profile for this identity would have; `None` for a CWT, whose subject is the identity.
    pub fn of_order(
        profile: &Profile,
        issuer: &IssuerCertificate,
        identity: &DeviceIdentity,
    ) -> Result<Option<Self>, CertificateError> {
        if profile.is_cwt() {
            return Ok(None);
        }
        let subject = profile.subject().to_name(Some(&identity.value()))?;
        Ok(Some(Self::of_names(issuer.subject(), &subject)))
    }

    /// That of a TBSCertificate in DER; `None` if it is something else, a CWT for example, or if the subject is empty, which is
    /// unique by its alternative names.
    pub fn of_to_be_signed(der: &[u8]) -> Option<Self> {
        let tbs = TbsCertificateInner::<Raw>::from_der(der).ok()?;
        (!tbs.subject().is_empty()).then(|| Self::of_names(tbs.issuer(), tbs.subject()))
    }

    /// That of a certificate in DER, as for [`Self::of_to_be_signed`].
    pub fn of_certificate(der: &[u8]) -> Option<Self> {
        Self::of_to_be_signed(signed::split("certificate", der).ok()?.to_be_signed)
    }

    fn of_names(issuer: &Name, subject: &Name) -> Self {
        let issuer = normalised(issuer);
        Self([&(issuer.len() as u64).to_be_bytes(), issuer.as_slice(), &normalised(subject)].concat())
    }

    /// The bytes to compare.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Reports whether two profiles of one issuer could give one subject to identities of different kinds. Kinds other than `serial`
/// differ in length, so only a serial number can equal an identity of another kind.
pub fn subjects_can_meet(one: &Profile, other: &Profile) -> bool {
    let constant = |profile: &Profile| profile.subject().to_name(None).map(|name| normalised(&name)).ok();
    let has_serial = |profile: &Profile| profile.identities().contains(&IdentityKind::Serial);
    let has_other = |profile: &Profile| profile.identities().iter().any(|kind| *kind != IdentityKind::Serial);
    one.issuer() == other.issuer()
        && !one.is_cwt()
        && !other.is_cwt()
        && constant(one) == constant(other)
        && ((has_serial(one) && has_other(other)) || (has_serial(other) && has_other(one)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::prepare;
    use crate::certificate::testing::{PHONE, SampleRequest, profile, symmetric_profile};
    use crate::keys::SignatureAlgorithm;

    #[test]
    fn order_and_its_certificate_have_one_subject() {
        let sample = SampleRequest::new(SignatureAlgorithm::EcdsaP256Sha256, PHONE);
        let request = sample.request();
        let of_order = |identity: &str| {
            IssuedSubject::of_order(request.profile, request.issuer, &identity.parse().unwrap()).unwrap().unwrap()
        };
        let prepared = prepare(&request).unwrap().lint().unwrap();
        let signed = IssuedSubject::of_to_be_signed(prepared.to_be_signed()).unwrap();
        assert_eq!(IssuedSubject::of_order(request.profile, request.issuer, request.identity).unwrap(), Some(signed));
        assert_eq!(of_order("eui48:d967458e6b6c"), of_order("serial:D967458E6B6C"));
        assert_eq!(of_order("serial:ab c"), of_order("serial: AB  C"));
        assert_ne!(of_order("serial:SN-1"), of_order("serial:SN-2"));
    }

    #[test]
    fn cwt_and_foreign_bytes_have_no_subject() {
        let sample = SampleRequest::new(SignatureAlgorithm::EcdsaP256Sha256, &symmetric_profile());
        let request = sample.request();
        assert_eq!(IssuedSubject::of_order(request.profile, request.issuer, request.identity).unwrap(), None);
        let prepared = prepare(&request).unwrap().lint().unwrap();
        assert_eq!(IssuedSubject::of_to_be_signed(prepared.to_be_signed()), None);
        assert_eq!(IssuedSubject::of_certificate(&[7; 600]), None);
    }

    #[test]
    fn profiles_meet_by_kind_issuer_and_constant_attributes() {
        let with = |identities: &str, rest: &str| {
            let text = PHONE.replace("[\"imei\", \"meid\", \"eui48\", \"eui64\", \"serial\"]", identities);
            profile(&(text + rest))
        };
        let imei = with("[\"imei\"]", "");
        let serial = with("[\"serial\"]", "");
        assert!(subjects_can_meet(&imei, &serial) && subjects_can_meet(&serial, &imei));
        assert!(!subjects_can_meet(&imei, &with("[\"eui48\", \"meid\"]", "")), "the lengths differ");
        assert!(!subjects_can_meet(&serial, &serial), "the identities are unique");
        let named = |name: &str| with("[\"serial\"]", &format!("subject.common_name = \"{name}\"\n"));
        assert!(!subjects_can_meet(&imei, &named("Phone")));
        let other = profile(&PHONE.replace("\"manufacturer\"", "\"manufacturer-2\""));
        assert!(!subjects_can_meet(&imei, &other));
    }
}
