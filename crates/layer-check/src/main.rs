//! Checks the layers of a crate: `layer-check ARCHITECTURE.md SOURCE_DIRECTORY`.
//!
//! The first block of the document that is fenced as `layers` lists the layers from the bottom, one a line: the names of top-level
//! modules, separated by spaces; what follows `#` is a comment. A module may use itself, the modules of its own line and those of
//! the lines above it in the block. Prints every use of a higher layer, every circle between files and every module without a
//! layer, and exits with status 1 if there is any. A third argument names a file of known faults, one a line: these are not printed,
//! and one that is mended must be removed from it, so that the list can only shrink.

mod graph;
mod modules;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (document, sources, known) = match &arguments[..] {
        [document, sources] => (document, sources, None),
        [document, sources, known] => (document, sources, Some(Path::new(known))),
        _ => {
            eprintln!("usage: layer-check ARCHITECTURE.md SOURCE_DIRECTORY [KNOWN_FAULTS]");
            return ExitCode::from(2);
        }
    };
    match check(Path::new(document), Path::new(sources)).and_then(|faults| unexpected(faults, known)) {
        Ok(problems) if problems.is_empty() => {
            println!("layer-check: {sources} has no unexpected use of a higher layer and no unexpected circle");
            ExitCode::SUCCESS
        }
        Ok(problems) => {
            problems.iter().for_each(|problem| eprintln!("{problem}"));
            eprintln!("layer-check: {} problems; {document} says which module may use which", problems.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("layer-check: {error}");
            ExitCode::from(2)
        }
    }
}

/// What is wrong, in one line that does not change with the names that are used, and the names.
struct Fault {
    line: String,
    details: Vec<String>,
}

/// The faults that are not in the list of known ones, and the known ones that are mended: their lines are to be removed.
fn unexpected(faults: Vec<Fault>, known: Option<&Path>) -> Result<Vec<String>, String> {
    let text = match known {
        Some(path) => std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?,
        None => String::new(),
    };
    let known: BTreeSet<&str> = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let found: BTreeSet<String> = faults.iter().map(|fault| fault.line.clone()).collect();
    let new = faults.into_iter().filter(|fault| !known.contains(fault.line.as_str()));
    let mut problems: Vec<String> = new.flat_map(|fault| [vec![fault.line], fault.details].concat()).collect();
    for line in known.into_iter().filter(|line| !found.contains(*line)) {
        problems.push(format!("mended, remove it from the list of known faults: {line}"));
    }
    Ok(problems)
}

fn check(document: &Path, sources: &Path) -> Result<Vec<Fault>, String> {
    let text = std::fs::read_to_string(document).map_err(|e| format!("{}: {e}", document.display()))?;
    let layers = layers_of(&text)?;
    let modules = modules::Modules::read(sources)?;
    let uses = modules.uses();
    let mut faults = Vec::new();
    for name in modules.top_level() {
        if !layers.contains_key(name.as_str()) {
            faults.push(Fault { line: format!("module without a layer: {name}"), details: Vec::new() });
        }
    }
    let names = |user: usize, target: usize| {
        let names = uses.get(&user).and_then(|used| used.get(&target))?;
        Some(names.iter().cloned().collect::<Vec<_>>().join(", "))
    };
    for (user, used) in &uses {
        for target in used.keys() {
            let (from, to) = (modules.top_of(*user), modules.top_of(*target));
            if let (Some(below), Some(above)) = (layers.get(from), layers.get(to))
                && below < above
            {
                let line = format!("upward use: {} -> {}", modules.file(*user), modules.file(*target));
                faults.push(Fault {
                    line,
                    details: names(*user, *target).map(|names| format!("  {names}")).into_iter().collect(),
                });
            }
        }
    }
    for circle in graph::circles(&uses) {
        let files: Vec<&str> = circle.iter().map(|file| modules.file(*file)).collect();
        let mut sorted = files.clone();
        sorted.sort_unstable();
        let pairs = circle.iter().flat_map(|user| circle.iter().map(move |target| (*user, *target)));
        let details = pairs.filter_map(|(user, target)| {
            let names = names(user, target)?;
            Some(format!("  {} -> {}: {names}", modules.file(user), modules.file(target)))
        });
        faults.push(Fault { line: format!("circle: {}", sorted.join(", ")), details: details.collect() });
    }
    Ok(faults)
}

/// The number of each module's layer, from the bottom.
fn layers_of(document: &str) -> Result<BTreeMap<&str, usize>, String> {
    let (_, rest) = document.split_once("```layers\n").ok_or("the document has no block ```layers")?;
    let (block, _) = rest.split_once("```").ok_or("the block ```layers does not end")?;
    let mut layers = BTreeMap::new();
    for (number, line) in block.lines().enumerate() {
        for name in line.split('#').next().unwrap_or_default().split_whitespace() {
            if layers.insert(name, number).is_some() {
                return Err(format!("module {name} is listed twice"));
            }
        }
    }
    Ok(layers)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{check, unexpected};

    /// The faults of a crate with these files and the layers `low`, then `high`.
    fn faults(files: &[(&str, &str)]) -> Vec<String> {
        let name = format!("layer-check-{}-{:?}", std::process::id(), std::thread::current().id());
        let dir = std::env::temp_dir().join(name);
        let document = dir.join("architecture.md");
        fs::create_dir_all(dir.join("src/low")).unwrap();
        fs::create_dir_all(dir.join("src/high")).unwrap();
        fs::write(&document, "```layers\nlow # the bottom\nhigh\n```\n").unwrap();
        fs::write(dir.join("src/lib.rs"), "pub mod low; pub mod high;").unwrap();
        for (file, text) in files {
            fs::write(dir.join("src").join(file), text).unwrap();
        }
        let found = unexpected(check(&document, &dir.join("src")).unwrap(), None).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        found
    }

    #[test]
    fn downward_use_has_no_fault() {
        let high = "mod one; pub use one::One; fn f() { crate::low::Low::new(); }";
        let one = "use super::super::low::Low; pub struct One(Low);";
        let found = faults(&[("low/mod.rs", "pub struct Low;"), ("high/mod.rs", high), ("high/one.rs", one)]);
        assert_eq!(found, [""; 0]);
    }

    #[test]
    fn upward_use_is_reported_however_it_is_written() {
        for low in [
            "use crate::high::High;",
            "use crate::{high::{High as Other}};",
            "fn f() { crate::high::High::new(); }",
            "fn f() { println!(\"{}\", crate::high::High::NAME); }",
            "use crate::high; fn f(_: high::High) {}",
        ] {
            let found = faults(&[("low/mod.rs", low), ("high/mod.rs", "pub struct High;")]);
            assert_eq!(found[0], "upward use: low/mod.rs -> high/mod.rs", "{low}");
            assert!(found.len() == 2 && found[1].contains("High"), "{low}: {found:?}");
        }
    }

    #[test]
    fn circle_through_a_re_export_is_reported() {
        let found = faults(&[
            ("low/mod.rs", "mod a; mod b; pub use a::A; pub use b::B;"),
            ("low/a.rs", "use super::B; pub struct A(B);"),
            ("low/b.rs", "pub struct B; fn f(_: super::a::A) {}"),
            ("high/mod.rs", ""),
        ]);
        assert_eq!(found[0], "circle: low/a.rs, low/b.rs");
        assert_eq!(found.len(), 3, "{found:?}");
    }

    #[test]
    fn use_in_test_code_is_not_counted() {
        let low = "#[cfg(test)] mod tests { use crate::high::High; }";
        assert_eq!(faults(&[("low/mod.rs", low), ("high/mod.rs", "pub struct High;")]), [""; 0]);
    }

    #[test]
    fn visibility_is_not_a_use() {
        let one = "pub(in crate::high) struct One;";
        assert_eq!(
            faults(&[("low/mod.rs", ""), ("high/mod.rs", "mod one; use one::One;"), ("high/one.rs", one)]),
            [""; 0]
        );
    }

    #[test]
    fn module_without_a_layer_is_reported() {
        let found = faults(&[("lib.rs", "mod other;"), ("other.rs", ""), ("low/mod.rs", ""), ("high/mod.rs", "")]);
        assert_eq!(found[0], "module without a layer: other");
    }

    #[test]
    fn known_fault_is_expected_until_it_is_mended() {
        let file = std::env::temp_dir().join(format!("layer-check-known-{}", std::process::id()));
        fs::write(&file, "# why\nupward use: a.rs -> b.rs\n").unwrap();
        let fault = || super::Fault { line: "upward use: a.rs -> b.rs".to_owned(), details: vec!["  B".to_owned()] };
        assert_eq!(unexpected(vec![fault()], Some(&file)).unwrap(), [""; 0]);
        assert!(unexpected(Vec::new(), Some(&file)).unwrap()[0].starts_with("mended, remove it"));
        fs::remove_file(&file).unwrap();
        assert_eq!(unexpected(vec![fault()], None).unwrap(), ["upward use: a.rs -> b.rs", "  B"]);
    }
}
