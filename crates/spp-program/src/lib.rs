//! Code that all programs share: process hardening, and generation of man pages and shell completions.
//!
//! `sppd`, `sppctl` and `spp-line` use it. It is a crate, because `spp-line` does not depend on `spp`.

pub mod cli_docs;
pub mod hardening;
