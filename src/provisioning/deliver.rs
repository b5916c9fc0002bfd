//! Builds the data package of a session. It has the same bytes each time, from the journal, the secret store and the HSM.

use spp_format::keys::PublicKey;
use spp_format::package::{CertificateChain, DataPackage, SymmetricKey, TransportPublicKey, seal};
use spp_format::secret::SecretBytes;

use super::in_flight::InFlightPackage;
use super::pair_supplier::PackageKeys;
use super::product::Product;
use super::request::{Assembled, Delivery};
use super::{ProvisionError, Provisioner};
use crate::hsm::KeyReloadRequest;
use crate::store::{Issued, Session};

impl Provisioner {
    /// Step 7: seals the package if the chip gave a transport key, and caches it for the Complete that follows.
    pub(super) fn deliver(
        &self,
        issued: &Issued,
        package: InFlightPackage,
        transport_key: Option<&TransportPublicKey>,
    ) -> Result<Assembled, ProvisionError> {
        let session = issued.session();
        let delivery = match transport_key {
            Some(key) => Delivery::Sealed(seal(&package.bytes, key, &session.id, &session.chip)?),
            // Copied into the answer; both copies are wiped.
            None => Delivery::Plain(SecretBytes::copy_of(package.bytes.expose())),
        };
        self.in_flight.insert(session.id, package);
        Ok(Assembled {
            session: session.id,
            identity: session.identity.clone(),
            certificate: issued.certificate().to_vec(),
            certificate_is_cwt: session.certificate.is_cwt(),
            delivery,
            expires: session.expires,
        })
    }

    /// The package of a session that was delivered before: cached, or built again from the secret store and the HSM.
    pub(super) async fn take_or_rebuild_package(
        &self,
        issued: &Issued,
        product: &Product,
    ) -> Result<InFlightPackage, ProvisionError> {
        if let Some(package) = self.in_flight.take(&issued.session().id) {
            return Ok(package);
        }
        if issued.session().recipe != product.recipe() {
            let problem = "the profile's symmetric keys or the issuer's chain changed after this session began, so the same \
                package cannot be built again; abort the session and repeat Assemble";
            return Err(ProvisionError::not_accepted("profile", problem));
        }
        package(issued, product, self.reload_keys(issued.session(), product).await?)
    }

    /// The keys of an existing session: the pair from the secret store, and the symmetric keys derived again.
    async fn reload_keys(&self, session: &Session, product: &Product) -> Result<PackageKeys, ProvisionError> {
        // The batch key must not be destroyed between reading the pair and unwrapping it.
        let _reader = self.pool.reader_guard();
        let stored_key = if session.own_key_pair { None } else { self.journal.stored_key(&session.id).await? };
        let pair = match (&session.public_key, stored_key) {
            (Some(spki), Some(stored_key)) => Some((public_key(spki)?, stored_key)),
            (Some(_), None) if !session.own_key_pair => {
                let cause = format!("the key pair of session {} is not in the secret store", session.id);
                return Err(ProvisionError::Internal { doing: "fetching a key pair", cause });
            }
            _ => None,
        };
        let master = session.master_key.as_ref().map(|master| &master.key);
        let derivations = product.derivations(&session.identity, master);
        let held = self.hsm.reload_keys(&KeyReloadRequest { pair, derivations }).await?;
        Ok(PackageKeys { pair: held.pair, derived: held.derived })
    }
}

pub(super) fn public_key(spki: &[u8]) -> Result<PublicKey, ProvisionError> {
    PublicKey::from_spki_der(spki).map_err(ProvisionError::internal("reading a journaled public key"))
}

/// Builds the package and encodes it.
pub(super) fn package(
    issued: &Issued,
    product: &Product,
    keys: PackageKeys,
) -> Result<InFlightPackage, ProvisionError> {
    let session = issued.session();
    let certificate = if session.certificate.is_cwt() {
        CertificateChain::Cwt(issued.certificate().to_vec())
    } else {
        let issuers = product.issuer.certificate().chain().to_vec();
        CertificateChain::X509 { device: issued.certificate().to_vec(), issuers }
    };
    let specs = product.profile.symmetric_keys();
    let symmetric_keys = specs.iter().zip(keys.derived).map(|(spec, key)| SymmetricKey::new(&spec.purpose, key));
    let package = DataPackage {
        chip: session.chip.clone(),
        identity: session.identity.clone(),
        profile: session.profile.clone(),
        session: session.id,
        certificate,
        key_pair: keys.pair,
        symmetric_keys: symmetric_keys.collect::<Result<_, _>>()?,
        master_key_version: session.master_key.as_ref().map_or(0, |master| master.version),
    };
    Ok(InFlightPackage { bytes: package.encode()?, package })
}
