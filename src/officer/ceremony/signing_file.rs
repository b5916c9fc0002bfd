//! Parses the sections of a ceremony file that create signing keys.

use serde::Deserialize;
use spp_format::certificate::{SubjectFields, SubjectName};
use spp_format::keys::{KeyType, SignatureAlgorithm};
use spp_format::names::KeyName;

use super::parse_context::ParseContext;
use super::signing::{CertificateSource, KeyUse, NewSigningKey};
use crate::hsm::SigningUse;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SigningShape {
    pub(super) name: KeyName,
    #[serde(default = "device_use", rename = "use")]
    pub(super) use_: SigningUse,
    kind: KeyType,
    signature: Option<SignatureAlgorithm>,
    pub(super) certificate: CertificateSourceShape,
    pub(super) issuer: Option<KeyName>,
    subject: SubjectFields,
    pub(super) backup: Option<KeyName>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RotateSigningShape {
    pub(super) key: KeyName,
    pub(super) name: KeyName,
    kind: KeyType,
    signature: Option<SignatureAlgorithm>,
    pub(super) certificate: CertificateSourceShape,
    pub(super) issuer: Option<KeyName>,
    subject: SubjectFields,
    pub(super) backup: Option<KeyName>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum CertificateSourceShape {
    SelfSigned,
    Csr,
    Issued,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AccessShape {
    pub(super) name: KeyName,
    #[serde(default = "access_kind")]
    kind: KeyType,
    subject: SubjectFields,
    pub(super) backup: Option<KeyName>,
}

const fn device_use() -> SigningUse {
    SigningUse::Device
}

const fn access_kind() -> KeyType {
    KeyType::P256
}

/// Fields shared by all sections that create signing keys.
pub(super) struct SigningCommon {
    section: &'static str,
    name: KeyName,
    key_use: KeyUse,
    kind: KeyType,
    signature: Option<SignatureAlgorithm>,
    certificate: CertificateSourceShape,
    issuer: Option<KeyName>,
    subject: SubjectFields,
    backup: Option<KeyName>,
}

impl SigningShape {
    pub(super) fn common(self) -> SigningCommon {
        let Self { name, use_, kind, signature, certificate, issuer, subject, backup } = self;
        let (section, key_use) = ("signing_key", KeyUse::New(use_));
        SigningCommon { section, name, key_use, kind, signature, certificate, issuer, subject, backup }
    }
}

impl RotateSigningShape {
    pub(super) fn common(self) -> SigningCommon {
        let Self { key, name, kind, signature, certificate, issuer, subject, backup } = self;
        let (section, key_use) = ("rotate_signing_key", KeyUse::Replaces(key));
        SigningCommon { section, name, key_use, kind, signature, certificate, issuer, subject, backup }
    }
}

impl AccessShape {
    pub(super) fn common(self) -> SigningCommon {
        let Self { name, kind, subject, backup } = self;
        let (section, key_use) = ("access_ca", KeyUse::New(SigningUse::Access));
        let (signature, certificate, issuer) = (None, CertificateSourceShape::SelfSigned, None);
        SigningCommon { section, name, key_use, kind, signature, certificate, issuer, subject, backup }
    }
}

impl SigningCommon {
    pub(super) fn check(self, context: &mut ParseContext<'_>) -> Option<NewSigningKey> {
        let at = format!("{} {}", self.section, self.name);
        let Self { name, key_use, kind, subject, backup, .. } = self;
        let algorithm = self.signature.unwrap_or(SignatureAlgorithm::default_for(kind));
        if !algorithm.fits(kind) {
            context.fault(format!("{at}: signature"), format!("not supported by a {kind} key"));
        }
        let certificate = match (self.certificate, self.issuer) {
            (CertificateSourceShape::SelfSigned, None) => Some(CertificateSource::SelfSigned),
            (CertificateSourceShape::Csr, None) => Some(CertificateSource::Csr),
            (CertificateSourceShape::Issued, Some(_)) if self.signature.is_some() => {
                context.fault(
                    format!("{at}: signature"),
                    "has no effect: the issuer's key determines the signature algorithm",
                );
                None
            }
            (CertificateSourceShape::Issued, Some(issuer)) => Some(CertificateSource::Issued(issuer)),
            (CertificateSourceShape::Issued, None) => {
                context.fault(format!("{at}: issuer"), "must name the root that issues the certificate");
                None
            }
            (CertificateSourceShape::SelfSigned | CertificateSourceShape::Csr, Some(_)) => {
                context.fault(format!("{at}: issuer"), "only allowed with certificate = \"issued\"");
                None
            }
        };
        if matches!((&key_use, &certificate), (KeyUse::New(SigningUse::Root), Some(CertificateSource::Issued(_)))) {
            context.fault(format!("{at}: certificate"), "a root must be self-signed or use a csr to an offline root");
        }
        let subject = SubjectName::from_fields(&format!("{}: {at}: subject", context.place), subject);
        let (subject, certificate) = (context.faults.merge(subject)?, certificate?);
        Some(NewSigningKey { name, key_use, kind, algorithm, subject, certificate, backup })
    }
}
