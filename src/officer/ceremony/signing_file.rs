//! The sections of a ceremony file that make signing keys.

use serde::Deserialize;

use super::file::Check;
use super::signing::{NewSigningKey, Route, Work};
use crate::certificate::{SubjectFields, SubjectName};
use crate::hsm::SigningUse;
use crate::keys::{KeyKind, SignatureAlgorithm};
use crate::names::KeyName;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SigningShape {
    pub(super) name: KeyName,
    #[serde(default = "device_use", rename = "use")]
    pub(super) use_: SigningUse,
    kind: KeyKind,
    signature: Option<SignatureAlgorithm>,
    pub(super) certificate: RouteShape,
    pub(super) issuer: Option<KeyName>,
    subject: SubjectFields,
    pub(super) backup: Option<KeyName>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RotateSigningShape {
    pub(super) key: KeyName,
    pub(super) name: KeyName,
    kind: KeyKind,
    signature: Option<SignatureAlgorithm>,
    pub(super) certificate: RouteShape,
    pub(super) issuer: Option<KeyName>,
    subject: SubjectFields,
    pub(super) backup: Option<KeyName>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RouteShape {
    SelfSigned,
    Csr,
    Issued,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AccessShape {
    pub(super) name: KeyName,
    #[serde(default = "access_kind")]
    kind: KeyKind,
    subject: SubjectFields,
    pub(super) backup: Option<KeyName>,
}

const fn device_use() -> SigningUse {
    SigningUse::Device
}

const fn access_kind() -> KeyKind {
    KeyKind::P256
}

/// What the sections with signing keys have in common.
pub(super) struct SigningCommon {
    section: &'static str,
    name: KeyName,
    work: Work,
    kind: KeyKind,
    signature: Option<SignatureAlgorithm>,
    certificate: RouteShape,
    issuer: Option<KeyName>,
    subject: SubjectFields,
    backup: Option<KeyName>,
}

impl SigningShape {
    pub(super) fn common(self) -> SigningCommon {
        let Self { name, use_, kind, signature, certificate, issuer, subject, backup } = self;
        let (section, work) = ("signing_key", Work::Begins(use_));
        SigningCommon { section, name, work, kind, signature, certificate, issuer, subject, backup }
    }
}

impl RotateSigningShape {
    pub(super) fn common(self) -> SigningCommon {
        let Self { key, name, kind, signature, certificate, issuer, subject, backup } = self;
        let (section, work) = ("rotate_signing_key", Work::GoesOn(key));
        SigningCommon { section, name, work, kind, signature, certificate, issuer, subject, backup }
    }
}

impl AccessShape {
    pub(super) fn common(self) -> SigningCommon {
        let Self { name, kind, subject, backup } = self;
        let (section, work) = ("access_ca", Work::Begins(SigningUse::Access));
        let (signature, certificate, issuer) = (None, RouteShape::SelfSigned, None);
        SigningCommon { section, name, work, kind, signature, certificate, issuer, subject, backup }
    }
}

impl SigningCommon {
    pub(super) fn check(self, check: &mut Check<'_>) -> Option<NewSigningKey> {
        let at = format!("{} {}", self.section, self.name);
        let Self { name, work, kind, subject, backup, .. } = self;
        let algorithm = self.signature.unwrap_or(SignatureAlgorithm::default_for(kind));
        if !algorithm.fits(kind) {
            check.fault(format!("{at}: signature"), format!("a {kind} key cannot sign with it"));
        }
        let certificate = match (self.certificate, self.issuer) {
            (RouteShape::SelfSigned, None) => Some(Route::SelfSigned),
            (RouteShape::Csr, None) => Some(Route::Csr),
            (RouteShape::Issued, Some(_)) if self.signature.is_some() => {
                check.fault(
                    format!("{at}: signature"),
                    "has no effect: the issuer signs the certificate, in its own way",
                );
                None
            }
            (RouteShape::Issued, Some(issuer)) => Some(Route::Issued(issuer)),
            (RouteShape::Issued, None) => {
                check.fault(format!("{at}: issuer"), "must name the root that issues the certificate");
                None
            }
            (RouteShape::SelfSigned | RouteShape::Csr, Some(_)) => {
                check.fault(format!("{at}: issuer"), "goes with certificate = \"issued\" alone");
                None
            }
        };
        if matches!((&work, &certificate), (Work::Begins(SigningUse::Root), Some(Route::Issued(_)))) {
            check.fault(format!("{at}: certificate"), "a root is self-signed, or has a csr for another one above it");
        }
        let subject = SubjectName::from_fields(&format!("{}: {at}: subject", check.place), subject);
        let (subject, certificate) = (check.faults.keep(subject)?, certificate?);
        Some(NewSigningKey { name, work, kind, algorithm, subject, certificate, backup })
    }
}
