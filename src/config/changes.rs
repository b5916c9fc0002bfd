//! Compares two configurations and rejects changes that need a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use spp_format::file_format::Faults;
use spp_format::names::KeyName;

use super::DaemonConfig;

impl DaemonConfig {
    /// The changes that take effect when `new` replaces this configuration, for example `profile phone: changed`. Fails with all
    /// changed settings that need a restart, if there are any.
    pub fn changes(&self, new: &Self) -> Result<Vec<String>, Faults> {
        let mut faults = Faults::default();
        for setting in self.fixed_changes(new) {
            let problem = "cannot be changed while the daemon runs; restore the earlier value, or restart sppd";
            faults.add(setting, problem);
        }
        let mut changes = diff("profile ", &self.profiles, &new.profiles);
        changes.extend(diff("issuer certificate ", &self.chains(), &new.chains()));
        changes.extend(diff("station ", self.stations.by_name(), new.stations.by_name()));
        changes.extend(diff("", &self.tls.files, &new.tls.files));
        if self.log.level != new.log.level {
            changes.push(format!("log.level: {} -> {}", self.log.level, new.log.level));
        }
        faults.into_result(Some(changes))
    }

    fn fixed_changes(&self, new: &Self) -> BTreeSet<String> {
        let mut fixed: BTreeSet<_> = self.settings.fixed_changes(&new.settings).map(str::to_owned).collect();
        // The content of the named files may have changed although the settings are the same.
        let members = self.hsms.members();
        for (old, new) in members.iter().zip(new.hsms.members()) {
            let table = if members.len() == 1 { "hsm".to_owned() } else { format!("hsm {}", old.name) };
            for (file, changed) in [("module", old.module != new.module), ("keys", old.keys != new.keys)] {
                fixed.extend(changed.then(|| format!("{table}.{file}")));
            }
        }
        fixed
    }

    fn chains(&self) -> BTreeMap<&KeyName, &[Vec<u8>]> {
        self.signers.iter().map(|(key, certificate)| (key, certificate.chain())).collect()
    }
}

fn diff<K: Ord + Display, V: PartialEq>(prefix: &str, old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) -> Vec<String> {
    let names: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    let change = |name: &K| match (old.get(name), new.get(name)) {
        (None, _) => Some("new"),
        (_, None) => Some("removed"),
        (old, new) => (old != new).then_some("changed"),
    };
    names.into_iter().filter_map(|name| change(name).map(|change| format!("{prefix}{name}: {change}"))).collect()
}
