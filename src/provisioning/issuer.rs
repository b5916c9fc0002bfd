//! Signs device certificates with the manufacturer's key. A signature requires an [`Intent`].

use spp_format::certificate::{IssuedCertificate, IssuerCertificate};
use spp_format::names::KeyName;

use super::ProvisionError;
use crate::hsm::Hsm;
use crate::store::{Intent, Signed};

/// A manufacturer's signing key with its certificate.
#[derive(Clone)]
pub(super) struct Issuer {
    key: KeyName,
    certificate: IssuerCertificate,
}

impl Issuer {
    /// The key and its certificate. The worker has verified that they match.
    pub(super) const fn new(key: KeyName, certificate: IssuerCertificate) -> Self {
        Self { key, certificate }
    }

    /// The issuer certificate with its chain and signature algorithm.
    pub(super) const fn certificate(&self) -> &IssuerCertificate {
        &self.certificate
    }

    /// Signs the bytes of the intent, and verifies the signature before returning it.
    pub(super) async fn sign(&self, hsm: &Hsm, intent: Intent) -> Result<Signed, ProvisionError> {
        let to_sign = &intent.session().certificate;
        let signature = hsm.certificate_signer(self.key.clone()).sign(to_sign).await?;
        let certificate = IssuedCertificate::assemble(to_sign, &self.certificate, &signature)
            .map_err(ProvisionError::internal("verifying a new certificate"))?;
        Ok(intent.into_signed(certificate.into_bytes()))
    }
}
