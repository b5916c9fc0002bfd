//! The provisioning policy: products, stations and signing keys from the configuration. A reload may replace it at any time, so
//! each call takes the policy once at its start and uses it to its end.

use std::collections::BTreeMap;

use spp_format::certificate::{IssuerCertificate, KeyPairRule, Profile, Sealing};
use spp_format::names::{DeviceIdentity, KeyName, ProfileName, StationName};

use super::error::{FieldViolation, ProvisionError};
use super::issuer::Issuer;
use super::product::Product;
use super::request::AssembleRequest;
use crate::config::{DaemonConfig, NotPermitted, Stations};
use crate::store::{Intent, Session};

/// Products, stations and signing keys of one configuration.
pub struct Policy {
    products: BTreeMap<ProfileName, Product>,
    stations: Stations,
    /// Every key that signs devices, including keys that no profile names any more: a session may have begun under one.
    signers: BTreeMap<KeyName, Issuer>,
}

impl Policy {
    /// Builds the policy. A valid configuration has an issuer for every profile.
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

    /// Adds the signing keys of an earlier policy that this one lacks, so that intents under those keys can still be signed.
    pub(super) fn with_signers_of(mut self, earlier: &Self) -> Self {
        for (key, issuer) in &earlier.signers {
            self.signers.entry(key.clone()).or_insert_with(|| issuer.clone());
        }
        self
    }

    /// The names of the profiles.
    pub fn profiles(&self) -> impl Iterator<Item = &ProfileName> {
        self.products.keys()
    }

    /// The profiles and identity prefixes of a station; `None` if the station is not configured.
    pub fn confinement(&self, station: &StationName) -> Option<(Vec<ProfileName>, Vec<String>)> {
        self.stations.confinement(station)
    }

    /// Checks an order that has no identity yet, so that no identity is allocated for a refused order. Returns the product
    /// and the identity prefixes that the station may allocate.
    pub(super) fn permit_allocation(
        &self,
        request: &AssembleRequest,
    ) -> Result<(&Product, Vec<String>), ProvisionError> {
        let AssembleRequest { station, profile: name, .. } = request;
        let product = self.product(name)?;
        let (profiles, identities) = self.confinement(station).ok_or_else(|| NotPermitted::Unknown(station.clone()))?;
        if !profiles.contains(name) {
            return Err(NotPermitted::Profile(station.clone(), name.clone()).into());
        }
        let violations = violations(&product.profile, request);
        if violations.is_empty() { Ok((product, identities)) } else { Err(ProvisionError::Invalid(violations)) }
    }

    /// The maximum number of a station's sessions that are not final.
    pub(super) fn open_sessions(&self, station: &StationName) -> Result<u64, ProvisionError> {
        Ok(self.stations.open_sessions(station)?)
    }

    fn product(&self, name: &ProfileName) -> Result<&Product, ProvisionError> {
        self.products.get(name).ok_or_else(|| {
            let known: Vec<_> = self.profiles().map(ToString::to_string).collect();
            let problem = format!("no profile {name}; configured profiles: {}", known.join(", "));
            ProvisionError::invalid("profile", problem)
        })
    }

    /// Whether the profile exists and accepts such an identity.
    pub fn takes(&self, profile: &ProfileName, identity: &DeviceIdentity) -> bool {
        self.products.get(profile).is_some_and(|product| product.profile.allows(identity))
    }

    /// Checks the order against the station's permissions and the profile.
    pub(super) fn permit_order(
        &self,
        request: &AssembleRequest,
        identity: &DeviceIdentity,
    ) -> Result<&Product, ProvisionError> {
        let product = self.product(&request.profile)?;
        self.stations.permit(&request.station, &request.profile, identity)?;
        let mut violations = violations(&product.profile, request);
        if !product.profile.allows(identity) {
            let problem = format!("the profile {} does not accept {} identities", request.profile, identity.kind());
            violations.insert(0, FieldViolation::new("identity", problem));
        }
        if let Err(problem) = identity.check_spaces() {
            violations.insert(0, FieldViolation::new("identity", problem));
        }
        if violations.is_empty() { Ok(product) } else { Err(ProvisionError::Invalid(violations)) }
    }

    /// The session's product, if the station may work on the session.
    pub(super) fn permitted_product(
        &self,
        station: &StationName,
        session: &Session,
    ) -> Result<&Product, ProvisionError> {
        self.permit(station, session)?;
        self.products.get(&session.profile).ok_or_else(|| {
            let problem = format!(
                "the profile {} of this session is no longer configured: configure it again, or abort the session",
                session.profile
            );
            ProvisionError::not_accepted("session_id", problem)
        })
    }

    /// Checks that the station may work on the session. No station can list a profile that was removed; for such a session the
    /// identity alone decides, so that it can still be viewed and aborted.
    pub(super) fn permit(&self, station: &StationName, session: &Session) -> Result<(), ProvisionError> {
        match self.products.contains_key(&session.profile) {
            true => self.stations.permit(station, &session.profile, &session.identity)?,
            false => self.stations.permit_identity(station, &session.identity)?,
        }
        Ok(())
    }

    /// The issuer that signs an intent, independent of what the profile names now.
    pub(super) fn signer_of(&self, intent: &Intent) -> Result<&Issuer, ProvisionError> {
        let key = intent.session().certificate.issuer();
        self.signers.get(key).ok_or_else(|| {
            let problem = format!(
                "the certificate of the key {key}, which signs this session, is missing: restore it at the path in keys.toml, or \
                 abort the session"
            );
            ProvisionError::not_accepted("chip_id", problem)
        })
    }
}

/// Lists every field of the request, except the identity, that does not fit the profile.
fn violations(profile: &Profile, request: &AssembleRequest) -> Vec<FieldViolation> {
    let AssembleRequest { profile: name, own_key, transport_key, .. } = request;
    let mut violations = Vec::new();
    let mut violation = |field, problem: String| violations.push(FieldViolation::new(field, problem));
    match (profile.key_pair(), own_key) {
        (KeyPairRule::Csr { .. }, None) => {
            violation("csr", format!("the profile {name} requires a PKCS#10 request from the device"));
        }
        (KeyPairRule::Csr { accepted }, Some(key)) if !accepted.contains(&key.kind()) => {
            violation("csr", format!("the profile {name} does not accept {} keys", key.kind()));
        }
        (KeyPairRule::Generate { .. } | KeyPairRule::Pool { .. } | KeyPairRule::None, Some(_)) => {
            violation(
                "csr",
                format!("the profile {name} does not accept a PKCS#10 request: the SPP generates the key pair"),
            );
        }
        _ => {}
    }
    if profile.sealing() == Sealing::Required && transport_key.is_none() {
        violation("transport_key", format!("the profile {name} seals its packages: send the chip's transport key"));
    }
    violations
}
