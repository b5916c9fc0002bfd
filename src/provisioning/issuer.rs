//! The manufacturer's signature on device certificates. It is made for an [`Intent`] and for nothing else.

use super::ProvisionError;
use crate::certificate::{IssuedCertificate, IssuerCertificate};
use crate::hsm::Hsm;
use crate::names::KeyName;
use crate::store::{Intent, Signed};

/// A manufacturer's signing key with its certificate.
#[derive(Clone)]
pub(super) struct Issuer {
    key: KeyName,
    certificate: IssuerCertificate,
}

impl Issuer {
    /// The key that the certificate certifies; the worker has checked that they belong together.
    pub(super) const fn new(key: KeyName, certificate: IssuerCertificate) -> Self {
        Self { key, certificate }
    }

    /// The certificate, its chain, and how it signs.
    pub(super) const fn certificate(&self) -> &IssuerCertificate {
        &self.certificate
    }

    /// Signs what the intent says, and verifies the signature before anybody sees it.
    pub(super) async fn sign(&self, hsm: &Hsm, intent: Intent) -> Result<Signed, ProvisionError> {
        let to_sign = &intent.session().certificate;
        if to_sign.issuer != self.key {
            let cause = format!("the intent is for the key {}, not {}", to_sign.issuer, self.key);
            return Err(ProvisionError::Internal { doing: "signing a certificate", cause });
        }
        let signature = hsm.sign(&self.key, to_sign.algorithm, &to_sign.to_be_signed).await?;
        let certificate = IssuedCertificate::assemble(to_sign, &self.certificate, &signature)
            .map_err(ProvisionError::internal("verifying a new certificate"))?;
        Ok(intent.signed(certificate.into_bytes()))
    }
}
