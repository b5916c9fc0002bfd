//! Reads, fetches, mirrors and verifies the public database and the audit log, offline and without trust in the daemon.
//!
//! [`registry`] is the public database, [`audit`] the audit log. Needs neither a store engine nor an HSM nor gRPC. The formats of
//! records, checkpoints and proofs are in `spp-format`; the daemon, the only writer of both logs, is the crate `spp`.

pub mod audit;
pub mod registry;
