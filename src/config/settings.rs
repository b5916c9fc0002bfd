//! Compares `sppd.toml` setting by setting, to find changes that a reload cannot apply.

use std::collections::{BTreeMap, BTreeSet};

use toml::{Table, Value};

/// The settings that a reload applies, including their subkeys. All other settings need a restart, so a new setting needs one
/// until it is listed here.
const RELOADABLE: [&str; 7] =
    ["profiles", "station", "approvals", "tls", "log.level", "public.certificate", "public.key"];

/// The settings of a file by their full name, `listen.line`, with their values as TOML text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Settings(BTreeMap<String, String>);

impl Settings {
    /// Parses a text that is known to be valid TOML.
    pub(super) fn parse(text: &str) -> Self {
        let mut all = BTreeMap::new();
        for (name, value) in text.parse::<Table>().unwrap_or_default() {
            collect(name, value, &mut all);
        }
        Self(all)
    }

    /// The settings that differ, or exist in only one of the two files, and that a reload cannot apply.
    pub(super) fn fixed_changes<'a>(&'a self, new: &'a Self) -> impl Iterator<Item = &'a str> {
        let names: BTreeSet<_> = self.0.keys().chain(new.0.keys()).collect();
        let changed = names.into_iter().filter(|name| self.0.get(*name) != new.0.get(*name));
        changed.map(String::as_str).filter(|name| !RELOADABLE.iter().any(|reloadable| is_within(name, reloadable)))
    }
}

fn is_within(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
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
        Settings::parse(old).fixed_changes(&Settings::parse(new)).map(str::to_owned).collect()
    }

    #[test]
    fn fixed_changes_lists_settings_that_need_a_restart() {
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
    fn fixed_changes_omits_reloadable_settings() {
        let old = "profiles = \"p\"\n[tls]\nkey = \"k\"\n[log]\nlevel = \"info\"\n[[station]]\nname = \"a\"\n";
        let new = "profiles = \"q\"\n[tls]\nkey = \"l\"\ncertificate = \"c\"\n[log]\nlevel = \"debug\"\n[public]\ncertificate = \"c\"\nkey = \"k\"\n";
        assert_eq!(fixed(old, new), Vec::<String>::new());
    }
}
