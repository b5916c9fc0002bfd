//! What each station may do: profiles and identity ranges. Nothing listed means nothing allowed.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::Faults;
use crate::access::Quota;
use crate::names::{DeviceIdentity, ProfileName, StationName};

/// The confinement of every station.
#[derive(Debug, Clone, Default)]
pub struct Stations(BTreeMap<StationName, Station>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Station {
    profiles: Vec<ProfileName>,
    identities: Vec<String>,
    quota: Quota,
}

/// Why a station may not do what it asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotPermitted {
    /// It is in no configuration.
    #[error("the station {0} is not configured; an officer must add a [[station]] for it")]
    Unknown(StationName),
    /// The profile is not in its list.
    #[error("the station {0} may not use the profile {1}")]
    Profile(StationName, ProfileName),
    /// No range of its own has the identity.
    #[error("the station {0} may not provision {1}: it is in none of its identity ranges")]
    Identity(StationName, DeviceIdentity),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StationShape {
    name: StationName,
    profiles: Vec<ProfileName>,
    identities: Vec<String>,
    devices_per_hour: Option<u64>,
    devices_total: Option<u64>,
}

impl Stations {
    pub(super) fn check(shapes: Vec<StationShape>, place: &str, known: &[ProfileName], faults: &mut Faults) -> Self {
        let mut stations = BTreeMap::new();
        for shape in shapes {
            let at = format!("{place}: station {}", shape.name);
            for profile in &shape.profiles {
                if !known.contains(profile) {
                    faults.add(format!("{at}: profiles"), format!("there is no profile {profile}"));
                }
            }
            for range in &shape.identities {
                let kind = range.split_once(':').map(|(kind, _)| kind);
                if !kind.is_some_and(|kind| ["imei", "meid", "eui48", "eui64", "serial"].contains(&kind)) {
                    let problem = format!("{range:?} is not a prefix of an identity; write imei:49015420 or serial:");
                    faults.add(format!("{at}: identities"), problem);
                }
            }
            let quota = Quota { devices_per_hour: shape.devices_per_hour, devices_total: shape.devices_total };
            let station = Station { profiles: shape.profiles, identities: shape.identities, quota };
            if stations.insert(shape.name.clone(), station).is_some() {
                faults.add(at, "is there twice");
            }
        }
        Self(stations)
    }

    /// Whether the station may give this profile to this identity.
    pub fn permit(
        &self,
        name: &StationName,
        profile: &ProfileName,
        identity: &DeviceIdentity,
    ) -> Result<(), NotPermitted> {
        let station = self.find(name)?;
        if !station.profiles.contains(profile) {
            return Err(NotPermitted::Profile(name.clone(), profile.clone()));
        }
        self.permit_identity(name, identity)
    }

    /// Whether the station may work on this identity, whatever the profile.
    pub fn permit_identity(&self, name: &StationName, identity: &DeviceIdentity) -> Result<(), NotPermitted> {
        let station = self.find(name)?;
        let text = identity.to_string();
        if !station.identities.iter().any(|range| text.starts_with(range)) {
            return Err(NotPermitted::Identity(name.clone(), identity.clone()));
        }
        Ok(())
    }

    /// The profiles and identity prefixes of a station; none if it is not configured.
    pub fn confinement(&self, name: &StationName) -> Option<(Vec<ProfileName>, Vec<String>)> {
        self.0.get(name).map(|station| (station.profiles.clone(), station.identities.clone()))
    }

    /// The quota of each.
    pub fn quotas(&self) -> Vec<(StationName, Quota)> {
        self.0.iter().map(|(name, station)| (name.clone(), station.quota)).collect()
    }

    fn find(&self, name: &StationName) -> Result<&Station, NotPermitted> {
        self.0.get(name).ok_or_else(|| NotPermitted::Unknown(name.clone()))
    }

    /// Each with what it may do.
    pub(super) const fn each(&self) -> &BTreeMap<StationName, Station> {
        &self.0
    }

    /// How many are configured.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}
