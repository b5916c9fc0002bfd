//! `[[station]]` of `sppd.toml`: the permissions of each station. An unlisted profile or identity is not permitted.

use std::collections::BTreeMap;

use serde::Deserialize;
use spp_format::approval::Quota;
use spp_format::file_format::Faults;
use spp_format::names::{DeviceIdentity, ProfileName, StationName};

/// The default maximum of a station's sessions that are not final: far above what a line has in progress, far below what would
/// slow a start of the daemon down.
const DEFAULT_OPEN_SESSIONS: u64 = 1000;

/// The permitted profiles, identity prefixes, quota and number of open sessions of every station.
#[derive(Debug, Clone, Default)]
pub struct Stations(BTreeMap<StationName, Station>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Station {
    profiles: Vec<ProfileName>,
    identities: Vec<String>,
    quota: Quota,
    open_sessions: u64,
}

/// A request that a station may not make.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotPermitted {
    /// The station is not configured.
    #[error("station {0} is not configured; ask an officer to add a [[station]] for it")]
    Unknown(StationName),
    /// The station's list does not contain the profile.
    #[error("station {0} may not use profile {1}")]
    Profile(StationName, ProfileName),
    /// None of the station's prefixes matches the identity.
    #[error("station {0} may not provision {1}: none of its identity prefixes matches")]
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
    open_sessions: Option<u64>,
}

impl Stations {
    pub(super) fn check(shapes: Vec<StationShape>, place: &str, known: &[ProfileName], faults: &mut Faults) -> Self {
        let mut stations = BTreeMap::new();
        for shape in shapes {
            let place = format!("{place}: station {}", shape.name);
            for profile in &shape.profiles {
                if !known.contains(profile) {
                    faults.add(format!("{place}: profiles"), format!("unknown profile {profile}"));
                }
            }
            for prefix in &shape.identities {
                let kind = prefix.split_once(':').map(|(kind, _)| kind);
                if !kind.is_some_and(|kind| ["imei", "meid", "eui48", "eui64", "serial"].contains(&kind)) {
                    let problem =
                        format!("{prefix:?} is not an identity prefix; expected for example imei:49015420 or serial:");
                    faults.add(format!("{place}: identities"), problem);
                }
            }
            let quota = Quota { devices_per_hour: shape.devices_per_hour, devices_total: shape.devices_total };
            let open_sessions = shape.open_sessions.unwrap_or(DEFAULT_OPEN_SESSIONS);
            if open_sessions == 0 {
                faults.add(format!("{place}: open_sessions"), "must be at least 1");
            }
            let station = Station { profiles: shape.profiles, identities: shape.identities, quota, open_sessions };
            if stations.insert(shape.name.clone(), station).is_some() {
                faults.add(place, "is configured twice");
            }
        }
        Self(stations)
    }

    /// Checks that the station may provision this identity with this profile.
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

    /// Checks that the station may provision this identity with any profile.
    pub fn permit_identity(&self, name: &StationName, identity: &DeviceIdentity) -> Result<(), NotPermitted> {
        let station = self.find(name)?;
        let text = identity.to_string();
        if !station.identities.iter().any(|prefix| text.starts_with(prefix)) {
            return Err(NotPermitted::Identity(name.clone(), identity.clone()));
        }
        Ok(())
    }

    /// The profiles and identity prefixes of a station; `None` if it is not configured.
    pub fn confinement(&self, name: &StationName) -> Option<(Vec<ProfileName>, Vec<String>)> {
        self.0.get(name).map(|station| (station.profiles.clone(), station.identities.clone()))
    }

    /// The maximum number of a station's sessions that are not final.
    pub fn open_sessions(&self, name: &StationName) -> Result<u64, NotPermitted> {
        Ok(self.find(name)?.open_sessions)
    }

    /// The quotas of all stations.
    pub fn quotas(&self) -> Vec<(StationName, Quota)> {
        self.0.iter().map(|(name, station)| (name.clone(), station.quota)).collect()
    }

    fn find(&self, name: &StationName) -> Result<&Station, NotPermitted> {
        self.0.get(name).ok_or_else(|| NotPermitted::Unknown(name.clone()))
    }

    /// The stations by name.
    pub(super) const fn by_name(&self) -> &BTreeMap<StationName, Station> {
        &self.0
    }

    /// Number of configured stations.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}
