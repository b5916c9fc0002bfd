//! `sppd.toml` setting by setting: what a reload may exchange, and what the daemon has built upon since its start.

use std::collections::{BTreeMap, BTreeSet};

use toml::{Table, Value};

/// These, and what is in them, may be another at a reload. Nothing else may, so that a setting that is new to this program needs a restart
/// until somebody has thought about it.
const FREE: [&str; 7] = ["profiles", "station", "approvals", "tls", "log.level", "public.certificate", "public.key"];

/// Every setting that the file has, `listen.line`, with its value as it is written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Settings(BTreeMap<String, String>);

impl Settings {
    /// Those of a text that has been read before, so that it is TOML.
    pub(super) fn of(text: &str) -> Self {
        let mut all = BTreeMap::new();
        for (name, value) in text.parse::<Table>().unwrap_or_default() {
            collect(name, value, &mut all);
        }
        Self(all)
    }

    /// The settings that are another there, or only in one of the two, and may not be.
    pub(super) fn fixed_changes<'a>(&'a self, new: &'a Self) -> impl Iterator<Item = &'a str> {
        let names: BTreeSet<_> = self.0.keys().chain(new.0.keys()).collect();
        let changed = names.into_iter().filter(|name| self.0.get(*name) != new.0.get(*name));
        changed.map(String::as_str).filter(|name| !FREE.iter().any(|free| is_in(name, free)))
    }
}

fn is_in(name: &str, free: &str) -> bool {
    name.strip_prefix(free).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

fn collect(name: String, value: Value, all: &mut BTreeMap<String, String>) {
    match value {
        Value::Table(table) => {
            for (key, value) in table {
                collect(format!("{name}.{key}"), value, all);
            }
        }
        Value::Array(items) if items.iter().all(Value::is_table) => {
            for (number, value) in items.into_iter().enumerate() {
                collect(format!("{name}[{number}]"), value, all);
            }
        }
        value => {
            all.insert(name, value.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixed(old: &str, new: &str) -> Vec<String> {
        Settings::of(old).fixed_changes(&Settings::of(new)).map(str::to_owned).collect()
    }

    #[test]
    fn what_needs_a_restart_is_named() {
        let old = "[listen]\nline = \"a\"\npublic = \"b\"\n[[keypool.pool]]\nlow = 1\n[public]\ntitle = \"t\"\n[log]\nformat = \"human\"\n";
        assert_eq!(fixed(old, old), Vec::<String>::new());
        assert_eq!(fixed(old, &old.replace("\"a\"", "\"x\"")), ["listen.line"]);
        assert_eq!(
            fixed(old, &old.replace("low = 1", "low = 2\n[[keypool.pool]]\nlow = 1")),
            ["keypool.pool[0].low", "keypool.pool[1].low"]
        );
        assert_eq!(fixed(old, &old.replace("title = \"t\"\n", "")), ["public.title"]);
        assert_eq!(fixed(old, &old.replace("human", "json")), ["log.format"]);
        assert_eq!(fixed(old, &format!("{old}[new]\nsetting = 1\n")), ["new.setting"]);
    }

    #[test]
    fn what_may_be_exchanged_is_not_named() {
        let old = "profiles = \"p\"\n[tls]\nkey = \"k\"\n[log]\nlevel = \"info\"\n[[station]]\nname = \"a\"\n";
        let new = "profiles = \"q\"\n[tls]\nkey = \"l\"\ncertificate = \"c\"\n[log]\nlevel = \"debug\"\n[public]\ncertificate = \"c\"\nkey = \"k\"\n";
        assert_eq!(fixed(old, new), Vec::<String>::new());
    }
}
