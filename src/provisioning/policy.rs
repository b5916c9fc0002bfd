//! What the configuration says of devices. It may be exchanged while devices are made: a story takes it once, at its start, and goes by
//! it to its end.

use std::collections::BTreeMap;

use super::admit::{misfits, misfits_beside_identity};
use super::{Issuer, Order, Product, ProvisionError, Wanted};
use crate::certificate::{IssuerCertificate, Profile};
use crate::config::{DaemonConfig, NotPermitted, Stations};
use crate::names::{DeviceIdentity, KeyName, ProfileName, StationName};
use crate::store::{Intent, Session};

/// Who gets what, and who may give it.
pub struct Policy {
    products: BTreeMap<ProfileName, Product>,
    stations: Stations,
    /// Every key that signs devices, also one that no profile names any more: a session may have begun under it.
    signers: BTreeMap<KeyName, Issuer>,
}

impl Policy {
    /// As the configuration says, which is valid only if every profile has its issuer.
    pub fn new(config: &DaemonConfig) -> Self {
        let product = |(name, profile): (&ProfileName, &Profile)| {
            let issuer = Issuer::new(profile.issuer().clone(), config.issuers.get(name)?.clone());
            Some((name.clone(), Product { profile: profile.clone(), issuer }))
        };
        let products = config.profiles.iter().filter_map(product).collect();
        let signer = |(key, certificate): (&KeyName, &IssuerCertificate)| {
            (key.clone(), Issuer::new(key.clone(), certificate.clone()))
        };
        let signers = config.signers.iter().map(signer).collect();
        Self { products, stations: config.stations.clone(), signers }
    }

    /// The same, with the signing keys of earlier rules that are not among its own: what was intended under those is still signed.
    pub(super) fn after(mut self, earlier: &Self) -> Self {
        for (key, issuer) in &earlier.signers {
            self.signers.entry(key.clone()).or_insert_with(|| issuer.clone());
        }
        self
    }

    /// The profiles' names.
    pub fn profiles(&self) -> impl Iterator<Item = &ProfileName> {
        self.products.keys()
    }

    /// The profiles and identity prefixes of a station; none if it is not configured.
    pub fn confinement(&self, station: &StationName) -> Option<(Vec<ProfileName>, Vec<String>)> {
        self.stations.confinement(station)
    }

    /// Checks everything of an order that has no identity yet, so that none is given out in vain; and tells what those begin with that the
    /// station may give out.
    pub(super) fn admit_unnamed(&self, wanted: &Wanted) -> Result<Vec<String>, ProvisionError> {
        let Wanted { station, profile: name, own_key, transport_key, .. } = wanted;
        let product = self.product(name)?;
        let (profiles, identities) = self.confinement(station).ok_or_else(|| NotPermitted::Unknown(station.clone()))?;
        if !profiles.contains(name) {
            return Err(NotPermitted::Profile(station.clone(), name.clone()).into());
        }
        let misfits = misfits_beside_identity(&product.profile, name, own_key.as_ref(), transport_key.is_some());
        if misfits.is_empty() { Ok(identities) } else { Err(ProvisionError::Invalid(misfits)) }
    }

    fn product(&self, name: &ProfileName) -> Result<&Product, ProvisionError> {
        self.products.get(name).ok_or_else(|| {
            let known: Vec<_> = self.profiles().map(ToString::to_string).collect();
            let problem = format!("there is no profile {name}; there are: {}", known.join(", "));
            ProvisionError::invalid("profile", problem)
        })
    }

    /// Whether there is such a profile, and it takes such an identity.
    pub fn takes(&self, profile: &ProfileName, identity: &DeviceIdentity) -> bool {
        self.products.get(profile).is_some_and(|product| product.profile.allows(identity))
    }

    /// Checks the order against the station's confinement and the profile.
    pub(super) fn admit_order(&self, order: &Order) -> Result<&Product, ProvisionError> {
        let product = self.product(&order.profile)?;
        self.stations.permit(&order.station, &order.profile, &order.identity)?;
        let misfits = misfits(&product.profile, order);
        if misfits.is_empty() { Ok(product) } else { Err(ProvisionError::Invalid(misfits)) }
    }

    /// The session's product, if the station may work on it.
    pub(super) fn permitted_product(
        &self,
        station: &StationName,
        session: &Session,
    ) -> Result<&Product, ProvisionError> {
        self.permit(station, session)?;
        self.products.get(&session.profile).ok_or_else(|| {
            let problem = format!(
                "the profile {} of this session is no longer configured: put it back, or abort the session",
                session.profile
            );
            ProvisionError::not_accepted("session_id", problem)
        })
    }

    /// Whether the station may work on the session. No station can list a profile that is gone; then the identity alone decides, so that
    /// such a session can be looked at and aborted.
    pub(super) fn permit(&self, station: &StationName, session: &Session) -> Result<(), ProvisionError> {
        match self.products.contains_key(&session.profile) {
            true => self.stations.permit(station, &session.profile, &session.identity)?,
            false => self.stations.permit_identity(station, &session.identity)?,
        }
        Ok(())
    }

    /// Who signs what was intended, whatever the profile says by now.
    pub(super) fn signer_of(&self, intent: &Intent) -> Result<&Issuer, ProvisionError> {
        let key = &intent.session().certificate.issuer;
        self.signers.get(key).ok_or_else(|| {
            let problem = format!(
                "the certificate of the key {key}, which signs this session, is not there: put it back where keys.toml says, or abort the \
                 session"
            );
            ProvisionError::not_accepted("chip_id", problem)
        })
    }
}
