//! First half of provisioning: from the order to the data package.

use spp_format::certificate::{CertificateRequest, CertificateToSign, prepare};
use spp_format::package::TransportPublicKey;

use crate::store::{Intent, MasterKeyVersion, Session, SessionState};

use super::admit::{AdmittedOrder, Progress};
use super::deliver::package;
use super::pair_supplier::{NewKeys, UnstoredPair};
use super::product::Product;
use super::request::{AssembleRequest, Assembled};
use super::{ProvisionError, Provisioner};

impl Provisioner {
    /// Assembles a device's certificate and keys. A repeated call returns the same ones until the device is complete.
    pub async fn assemble(&self, request: AssembleRequest) -> Result<Assembled, ProvisionError> {
        // 1. Admit: the station is permitted, the chip and the identity are free. A repeated call waits here for the first one.
        let policy = self.policy();
        let _chip = self.chip_locks.lock(&request.chip).await?;
        let (order, progress) = self.admit(request, &policy).await?;
        let (issued, keys) = match progress {
            Progress::Issued(issued) => (issued, None),
            // A crash or an HSM failure occurred between the intent and the journaled signature: the same bytes are signed again.
            Progress::Intended(intent) => {
                let signed = policy.signer_of(&intent)?.sign(&self.hsm, intent).await?;
                (self.journal.issue(signed).await?, None)
            }
            Progress::New => {
                // 2. Keys: generated in the HSM, or taken from the pool. Nothing is written yet, so a crash leaves nothing
                // behind.
                let keys = self.pairs.new_keys(&order.keys()).await?;
                // 3. Prepare and lint the certificate: the types prevent signing bytes that were not linted.
                let session = self.prepare_session(&order, &keys)?;
                // 4. Journal the intent. After a crash from here on, the journal has the session, its pair and the bytes to be
                // signed. The same transaction assigns a pooled pair to this session.
                let intent = self.journal_intent(session, keys.pair).await?;
                // 5. Sign: consumes the intent and verifies the signature.
                let signed = order.product.issuer.sign(&self.hsm, intent).await?;
                // 6. Issue: the certificate is durable before it leaves, so every repeated call returns this one.
                (self.journal.issue(signed).await?, Some(keys.package_keys))
            }
        };
        // 7. Deliver: a repeated call reads its keys from the secret store and the HSM; the package has the same bytes.
        let package = match keys {
            Some(keys) => package(&issued, order.product, keys)?,
            None => self.take_or_rebuild_package(&issued, order.product).await?,
        };
        self.deliver(&issued, package, order.transport_key.as_ref())
    }

    fn prepare_session(&self, order: &AdmittedOrder<'_>, keys: &NewKeys) -> Result<Session, ProvisionError> {
        let created = self.clock.now();
        let request = CertificateRequest {
            profile: &order.product.profile,
            issuer: order.product.issuer.certificate(),
            chip: &order.chip,
            identity: &order.identity,
            public_key: keys.public_key.as_ref(),
            serial: keys.serial,
            not_before: created,
        };
        let linted = prepare(&request)
            .map_err(ProvisionError::internal("preparing a certificate"))?
            .lint()
            .map_err(ProvisionError::internal("linting a certificate"))?;
        let certificate: CertificateToSign = linted.into_to_sign();
        Ok(Session {
            id: keys.session,
            chip: order.chip.clone(),
            identity: order.identity.clone(),
            profile: order.profile.clone(),
            station: order.station.clone(),
            created,
            expires: created.saturating_add(self.session_lifetime.as_secs()),
            public_key: keys.public_key.as_ref().map(|key| key.spki_der().to_vec()),
            own_key_pair: order.own_key.is_some(),
            sealed_to: order.transport_key.as_ref().map(TransportPublicKey::fingerprint),
            recipe: order.product.recipe(),
            master_key: self.master_key_use(order.product),
            certificate,
            state: SessionState::Reserved,
        })
    }

    /// The profile's master key and its version. All symmetric keys of a profile are derived from one master key.
    fn master_key_use(&self, product: &Product) -> Option<MasterKeyVersion> {
        let key = product.profile.master_key()?;
        let version = self.hsm.keys().master_key(key)?.version;
        Some(MasterKeyVersion { key: key.clone(), version })
    }

    async fn journal_intent(&self, session: Session, pair: Option<UnstoredPair>) -> Result<Intent, ProvisionError> {
        let reserved = self.journal.intend(session, pair.as_ref().map(UnstoredPair::reservation)).await;
        if let Some(pair) = pair {
            pair.end_lease(&reserved);
        }
        Ok(reserved?)
    }
}
