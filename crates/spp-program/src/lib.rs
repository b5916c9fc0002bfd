//! What every program does: it hardens its process and generates its own man pages and shell completions.

pub mod cli_docs;
pub mod hardening;
