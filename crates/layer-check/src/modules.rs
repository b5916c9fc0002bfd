//! The modules of a crate: their files, what they define, import and use.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};

use crate::graph::Uses;

/// Maximum number of re-exports to follow; a longer chain is a cycle of re-exports.
const MOST_STEPS: usize = 16;

/// All modules with a file of their own and the inline modules in them, without test code.
pub(crate) struct Modules {
    list: Vec<Module>,
}

struct Module {
    /// From the crate's root, which has none.
    path: Vec<String>,
    /// Relative to the source directory.
    file: String,
    /// The module of the file: an inline module belongs to the file around it.
    in_file: usize,
    children: BTreeMap<String, usize>,
    defined: BTreeSet<String>,
    /// What a name was imported as, and from where, as written.
    imports: BTreeMap<String, Import>,
    globs: Vec<Vec<String>>,
    /// Paths that code and imports name, but for re-exports.
    paths: Vec<Vec<String>>,
}

struct Import {
    path: Vec<String>,
}

impl Modules {
    pub(crate) fn read(sources: &Path) -> Result<Self, String> {
        let mut modules = Self { list: Vec::new() };
        let root = ["lib.rs", "main.rs"].iter().map(|name| sources.join(name)).find(|file| file.is_file());
        let root = root.ok_or_else(|| format!("{} has neither lib.rs nor main.rs", sources.display()))?;
        modules.read_file(sources, &root, Vec::new(), sources.to_owned())?;
        Ok(modules)
    }

    fn read_file(
        &mut self,
        sources: &Path,
        file: &Path,
        path: Vec<String>,
        children_in: PathBuf,
    ) -> Result<usize, String> {
        let text = fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
        let parsed = syn::parse_file(&text).map_err(|e| format!("{}: {e}", file.display()))?;
        let name = file.strip_prefix(sources).unwrap_or(file).display().to_string();
        let index = self.add(path, name, None);
        self.read_items(sources, index, &parsed.items, &children_in)?;
        Ok(index)
    }

    fn add(&mut self, path: Vec<String>, file: String, in_file: Option<usize>) -> usize {
        let index = self.list.len();
        self.list.push(Module {
            path,
            file,
            in_file: in_file.unwrap_or(index),
            children: BTreeMap::new(),
            defined: BTreeSet::new(),
            imports: BTreeMap::new(),
            globs: Vec::new(),
            paths: Vec::new(),
        });
        index
    }

    fn read_items(
        &mut self,
        sources: &Path,
        index: usize,
        items: &[syn::Item],
        children_in: &Path,
    ) -> Result<(), String> {
        for item in items.iter().filter(|item| !is_test(attributes_of(item))) {
            match item {
                syn::Item::Mod(module) => {
                    let name = module.ident.to_string();
                    let path = [self.list[index].path.clone(), vec![name.clone()]].concat();
                    let inside = children_in.join(&name);
                    let child = match &module.content {
                        Some((_, items)) => {
                            let (file, in_file) = (self.list[index].file.clone(), self.list[index].in_file);
                            let child = self.add(path, file, Some(in_file));
                            self.read_items(sources, child, items, &inside)?;
                            child
                        }
                        None => {
                            let files = [children_in.join(format!("{name}.rs")), inside.join("mod.rs")];
                            let file = files.iter().find(|file| file.is_file());
                            let file = file.ok_or_else(|| format!("module {} has no file", path.join("::")))?;
                            self.read_file(sources, file, path, inside)?
                        }
                    };
                    self.list[index].children.insert(name, child);
                }
                syn::Item::Use(import) => {
                    let exported = !matches!(import.vis, syn::Visibility::Inherited);
                    self.read_use(index, &import.tree, &mut Vec::new(), exported);
                }
                other => {
                    if let Some(name) = name_of(other) {
                        self.list[index].defined.insert(name);
                    }
                    let mut paths = Paths(Vec::new());
                    paths.visit_item(other);
                    self.list[index].paths.extend(paths.0);
                }
            }
        }
        Ok(())
    }

    fn read_use(&mut self, index: usize, tree: &syn::UseTree, before: &mut Vec<String>, exported: bool) {
        let module = &mut self.list[index];
        let mut add = |path: Vec<String>, name: String| {
            if !exported {
                module.paths.push(path.clone());
            }
            module.imports.insert(name, Import { path });
        };
        match tree {
            syn::UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.read_use(index, &path.tree, before, exported);
                before.pop();
            }
            syn::UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.read_use(index, tree, before, exported));
            }
            syn::UseTree::Name(name) if name.ident == "self" => {
                if let Some(last) = before.last().cloned() {
                    add(before.clone(), last);
                }
            }
            syn::UseTree::Name(name) => {
                add([before.clone(), vec![name.ident.to_string()]].concat(), name.ident.to_string());
            }
            syn::UseTree::Rename(name) => {
                add([before.clone(), vec![name.ident.to_string()]].concat(), name.rename.to_string());
            }
            syn::UseTree::Glob(_) => {
                if !exported {
                    module.paths.push(before.clone());
                }
                module.globs.push(before.clone());
            }
        }
    }

    /// The names of the modules that the crate's root declares.
    pub(crate) fn top_level(&self) -> Vec<String> {
        self.list.iter().filter(|module| module.path.len() == 1).map(|module| module.path[0].clone()).collect()
    }

    /// The top-level module in which a module is; of the root itself, nothing.
    pub(crate) fn top_of(&self, index: usize) -> &str {
        self.list[index].path.first().map_or("", String::as_str)
    }

    pub(crate) fn file(&self, index: usize) -> &str {
        &self.list[index].file
    }

    /// Which file uses which names of which other file, re-exports followed to where a name is defined.
    pub(crate) fn uses(&self) -> Uses {
        let mut uses = Uses::new();
        for (index, module) in self.list.iter().enumerate() {
            for path in &module.paths {
                let Some((target, name)) = self.resolve(index, path, 0) else { continue };
                let (user, target) = (module.in_file, self.list[target].in_file);
                if user != target {
                    uses.entry(user).or_default().entry(target).or_default().insert(name);
                }
            }
        }
        uses
    }

    /// The module that defines what a path in a module names, and the name; nothing for other crates.
    fn resolve(&self, from: usize, path: &[String], steps: usize) -> Option<(usize, String)> {
        let (first, rest) = path.split_first()?;
        if steps > MOST_STEPS {
            return None;
        }
        match first.as_str() {
            "crate" => self.walk(0, rest, steps),
            "self" => self.walk(from, rest, steps),
            "super" => self.walk(self.parent(from)?, rest, steps),
            name => {
                let module = &self.list[from];
                if let Some(child) = module.children.get(name) {
                    return self.walk(*child, rest, steps);
                }
                let import = module.imports.get(name)?;
                let whole = [&import.path[..], rest].concat();
                (whole != path).then(|| self.resolve(from, &whole, steps + 1)).flatten()
            }
        }
    }

    fn parent(&self, index: usize) -> Option<usize> {
        let path = &self.list[index].path;
        let (_, parent) = path.split_last()?;
        self.list.iter().position(|module| module.path == parent)
    }

    /// From a module along the rest of a path.
    fn walk(&self, at: usize, rest: &[String], steps: usize) -> Option<(usize, String)> {
        let module = &self.list[at];
        let Some((name, after)) = rest.split_first() else {
            return Some((at, module.path.last().cloned().unwrap_or_default()));
        };
        if name == "super" {
            return self.walk(self.parent(at)?, after, steps);
        }
        if module.defined.contains(name) {
            return Some((at, name.clone()));
        }
        if let Some(child) = module.children.get(name) {
            return self.walk(*child, after, steps);
        }
        if let Some(import) = module.imports.get(name) {
            return self.resolve(at, &[&import.path[..], after].concat(), steps + 1);
        }
        module.globs.iter().find_map(|glob| self.resolve(at, &[&glob[..], rest].concat(), steps + 1))
    }
}

/// The paths with more than one segment that code names.
struct Paths(Vec<Vec<String>>);

impl<'ast> Visit<'ast> for Paths {
    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.segments.len() > 1 && path.leading_colon.is_none() {
            self.0.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        }
        visit::visit_path(self, path);
    }

    /// `pub(in crate::x)` opens an item to a module above; it does not use that module.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.read_tokens(call.tokens.clone());
        visit::visit_macro(self, call);
    }

    fn visit_item_use(&mut self, import: &'ast syn::ItemUse) {
        fn leaves(tree: &syn::UseTree, before: &[String], found: &mut Vec<Vec<String>>) {
            let with = |ident: &syn::Ident| [before, &[ident.to_string()]].concat();
            match tree {
                syn::UseTree::Path(path) => leaves(&path.tree, &with(&path.ident), found),
                syn::UseTree::Group(group) => group.items.iter().for_each(|tree| leaves(tree, before, found)),
                syn::UseTree::Name(name) => found.push(with(&name.ident)),
                syn::UseTree::Rename(name) => found.push(with(&name.ident)),
                syn::UseTree::Glob(_) => found.push(before.to_vec()),
            }
        }
        leaves(&import.tree, &[], &mut self.0);
    }

    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !is_test(&module.attrs) {
            visit::visit_item_mod(self, module);
        }
    }
}

impl Paths {
    /// Arguments of macros are not parsed: what looks like a path in them is one.
    fn read_tokens(&mut self, tokens: TokenStream) {
        let (mut path, mut colons) = (Vec::new(), 0);
        for token in tokens {
            match &token {
                TokenTree::Ident(ident) if path.is_empty() || colons == 2 => {
                    path.push(ident.to_string());
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' && !path.is_empty() && colons < 2 => colons += 1,
                other => {
                    self.end(&mut path);
                    colons = 0;
                    if let TokenTree::Ident(ident) = other {
                        path.push(ident.to_string());
                    }
                }
            }
            if let TokenTree::Group(group) = token {
                self.read_tokens(group.stream());
            }
        }
        self.end(&mut path);
    }

    fn end(&mut self, path: &mut Vec<String>) {
        let path = std::mem::take(path);
        if path.len() > 1 {
            self.0.push(path);
        }
    }
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.meta.require_list().is_ok_and(|list| list.tokens.to_string() == "test")
    })
}

fn attributes_of(item: &syn::Item) -> &[syn::Attribute] {
    match item {
        syn::Item::Const(item) => &item.attrs,
        syn::Item::Enum(item) => &item.attrs,
        syn::Item::Fn(item) => &item.attrs,
        syn::Item::Impl(item) => &item.attrs,
        syn::Item::Macro(item) => &item.attrs,
        syn::Item::Mod(item) => &item.attrs,
        syn::Item::Static(item) => &item.attrs,
        syn::Item::Struct(item) => &item.attrs,
        syn::Item::Trait(item) => &item.attrs,
        syn::Item::Type(item) => &item.attrs,
        syn::Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

fn name_of(item: &syn::Item) -> Option<String> {
    let ident = match item {
        syn::Item::Const(item) => &item.ident,
        syn::Item::Enum(item) => &item.ident,
        syn::Item::Fn(item) => &item.sig.ident,
        syn::Item::Static(item) => &item.ident,
        syn::Item::Struct(item) => &item.ident,
        syn::Item::Trait(item) => &item.ident,
        syn::Item::Type(item) => &item.ident,
        syn::Item::Macro(item) => item.ident.as_ref()?,
        _ => return None,
    };
    Some(ident.to_string())
}
