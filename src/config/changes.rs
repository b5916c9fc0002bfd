//! What is another in a new configuration, in words; and what cannot be while the daemon runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use super::{DaemonConfig, Faults};
use crate::names::KeyName;

impl DaemonConfig {
    /// What takes effect when `new` takes this one's place, `profile phone: changed`. Refused, with every setting that stands against it,
    /// if something is another that the daemon has built upon since its start.
    pub fn changes(&self, new: &Self) -> Result<Vec<String>, Faults> {
        let mut faults = Faults::default();
        for setting in self.fixed_changes(new) {
            let problem = "cannot be changed while the daemon runs; put back what was there, or restart sppd";
            faults.add(setting, problem);
        }
        let mut changes = compared("profile ", &self.profiles, &new.profiles);
        changes.extend(compared("issuer certificate ", &self.chains(), &new.chains()));
        changes.extend(compared("station ", self.stations.each(), new.stations.each()));
        changes.extend(compared("", &self.tls.files, &new.tls.files));
        if self.log.level != new.log.level {
            changes.push(format!("log.level: {} -> {}", self.log.level, new.log.level));
        }
        faults.ok_or_all(Some(changes))
    }

    fn fixed_changes(&self, new: &Self) -> BTreeSet<String> {
        let mut fixed: BTreeSet<_> = self.settings.fixed_changes(&new.settings).map(str::to_owned).collect();
        // The settings may be the same and the files that they name others.
        let members = self.hsms.members();
        for (old, new) in members.iter().zip(new.hsms.members()) {
            let at = if members.len() == 1 { "hsm".to_owned() } else { format!("hsm {}", old.name) };
            for (file, changed) in [("module", old.module != new.module), ("keys", old.keys != new.keys)] {
                fixed.extend(changed.then(|| format!("{at}.{file}")));
            }
        }
        fixed
    }

    fn chains(&self) -> BTreeMap<&KeyName, &[Vec<u8>]> {
        self.signers.iter().map(|(key, certificate)| (key, certificate.chain())).collect()
    }
}

fn compared<K: Ord + Display, V: PartialEq>(what: &str, old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) -> Vec<String> {
    let names: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    let how = |name: &K| match (old.get(name), new.get(name)) {
        (None, _) => Some("new"),
        (_, None) => Some("removed"),
        (old, new) => (old != new).then_some("changed"),
    };
    names.into_iter().filter_map(|name| how(name).map(|how| format!("{what}{name}: {how}"))).collect()
}
