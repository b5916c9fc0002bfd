//! Cycles in a directed graph.

use std::collections::{BTreeMap, BTreeSet};

/// Which module uses which names of which other module.
pub(crate) type Uses = BTreeMap<usize, BTreeMap<usize, BTreeSet<String>>>;

/// The strongly connected components with more than one member (Tarjan's algorithm), each sorted.
pub(crate) fn cycles(uses: &Uses) -> Vec<Vec<usize>> {
    let mut search = Search::new(uses);
    for start in uses.keys() {
        if !search.index.contains_key(start) {
            search.visit(*start);
        }
    }
    search.found
}

struct Search<'a> {
    uses: &'a Uses,
    index: BTreeMap<usize, usize>,
    low: BTreeMap<usize, usize>,
    stack: Vec<usize>,
    found: Vec<Vec<usize>>,
}

impl<'a> Search<'a> {
    fn new(uses: &'a Uses) -> Self {
        Self { uses, index: BTreeMap::new(), low: BTreeMap::new(), stack: Vec::new(), found: Vec::new() }
    }

    fn visit(&mut self, node: usize) {
        let number = self.index.len();
        self.index.insert(node, number);
        self.low.insert(node, number);
        self.stack.push(node);
        let next: Vec<usize> = self.uses.get(&node).into_iter().flat_map(|used| used.keys().copied()).collect();
        for other in next {
            if !self.index.contains_key(&other) {
                self.visit(other);
                self.low.insert(node, self.low[&node].min(self.low[&other]));
            } else if self.stack.contains(&other) {
                self.low.insert(node, self.low[&node].min(self.index[&other]));
            }
        }
        if self.low[&node] == number {
            let from = self.stack.iter().position(|on_stack| *on_stack == node).unwrap_or_default();
            let mut component = self.stack.split_off(from);
            if component.len() > 1 {
                component.sort_unstable();
                self.found.push(component);
            }
        }
    }
}
