//! Checks the layers of crates: `layer-check ARCHITECTURE.md`.
//!
//! Each block of the document that is fenced as `layers SOURCE_DIRECTORY` lists the layers of one crate from the bottom, one
//! a line: the names of top-level modules, separated by spaces; what follows `#` is a comment. A module may use itself, the
//! modules of its own line and those of the lines above it in the block. Prints every use of a higher layer, every cycle
//! between files and every module without a layer, and exits with status 1 if there is any.

mod graph;
mod modules;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [document] = &arguments[..] else {
        eprintln!("usage: layer-check ARCHITECTURE.md");
        return ExitCode::from(2);
    };
    match check_document(Path::new(document)) {
        Ok(faults) if faults.is_empty() => {
            println!("layer-check: no use of a higher layer and no cycle");
            ExitCode::SUCCESS
        }
        Ok(faults) => {
            faults.iter().for_each(|fault| eprintln!("{fault}"));
            eprintln!("layer-check: {} lines; {document} says which module may use which", faults.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("layer-check: {error}");
            ExitCode::from(2)
        }
    }
}

/// The faults, one a line; the lines of its uses follow a fault.
fn check_document(document: &Path) -> Result<Vec<String>, String> {
    let text = std::fs::read_to_string(document).map_err(|e| format!("{}: {e}", document.display()))?;
    let mut faults = Vec::new();
    let blocks: Vec<&str> = text.split("```layers ").skip(1).collect();
    if blocks.is_empty() {
        return Err("the document has no block ```layers SOURCE_DIRECTORY".to_owned());
    }
    for block in blocks {
        let (directory, rest) = block.split_once('\n').unwrap_or((block, ""));
        let (block, _) = rest.split_once("```").ok_or_else(|| format!("the block of {directory} does not end"))?;
        let found = check(block, Path::new(directory.trim())).map_err(|e| format!("{directory}: {e}"))?;
        faults.extend(found.into_iter().map(|fault| format!("{directory}: {fault}")));
    }
    Ok(faults)
}

fn check(block: &str, sources: &Path) -> Result<Vec<String>, String> {
    let layers = layers_of(block)?;
    let modules = modules::Modules::read(sources)?;
    let uses = modules.uses();
    let mut faults = Vec::new();
    for name in modules.top_level() {
        if !layers.contains_key(name.as_str()) {
            faults.push(format!("module without a layer: {name}"));
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
                faults.push(format!("upward use: {} -> {}", modules.file(*user), modules.file(*target)));
                faults.extend(names(*user, *target).map(|names| format!("  {names}")));
            }
        }
    }
    for cycle in graph::cycles(&uses) {
        let files: Vec<&str> = cycle.iter().map(|file| modules.file(*file)).collect();
        let mut sorted = files.clone();
        sorted.sort_unstable();
        let pairs = cycle.iter().flat_map(|user| cycle.iter().map(move |target| (*user, *target)));
        let details = pairs.filter_map(|(user, target)| {
            let names = names(user, target)?;
            Some(format!("  {} -> {}: {names}", modules.file(user), modules.file(target)))
        });
        faults.push(format!("cycle: {}", sorted.join(", ")));
        faults.extend(details);
    }
    Ok(faults)
}

/// The number of each module's layer, from the bottom.
fn layers_of(block: &str) -> Result<BTreeMap<&str, usize>, String> {
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

    use super::check_document;

    /// The faults of a crate with these files and the layers `low`, then `high`.
    fn faults(files: &[(&str, &str)]) -> Vec<String> {
        let name = format!("layer-check-{}-{:?}", std::process::id(), std::thread::current().id());
        let dir = std::env::temp_dir().join(name);
        let document = dir.join("architecture.md");
        fs::create_dir_all(dir.join("src/low")).unwrap();
        fs::create_dir_all(dir.join("src/high")).unwrap();
        let source = dir.join("src");
        fs::write(&document, format!("```layers {}\nlow # the bottom\nhigh\n```\n", source.display())).unwrap();
        fs::write(dir.join("src/lib.rs"), "pub mod low; pub mod high;").unwrap();
        for (file, text) in files {
            fs::write(dir.join("src").join(file), text).unwrap();
        }
        let prefix = format!("{}: ", source.display());
        let found = check_document(&document).unwrap();
        let found = found.iter().map(|fault| fault.strip_prefix(&prefix).unwrap().to_owned()).collect();
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
    fn cycle_through_a_re_export_is_reported() {
        let found = faults(&[
            ("low/mod.rs", "mod a; mod b; pub use a::A; pub use b::B;"),
            ("low/a.rs", "use super::B; pub struct A(B);"),
            ("low/b.rs", "pub struct B; fn f(_: super::a::A) {}"),
            ("high/mod.rs", ""),
        ]);
        assert_eq!(found[0], "cycle: low/a.rs, low/b.rs");
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
}
