//! The formats of the secure processing point, for the daemon, its clients and firmware authors.
//!
//! Pure: no clock, no network, no HSM, no storage. [`file_format`] opens a file of secrets to check its mode; nothing else does I/O.
//!
//! | module | content |
//! |---|---|
//! | [`names`], [`secret`] | identifiers, and values that are wiped |
//! | [`keys`] | key types, algorithms, public and private keys |
//! | [`tlog`] | a transparency log: notes, checkpoints, tiles, proofs |
//! | [`cbor`], [`package`] | deterministic CBOR; data package, sealing, backup, key confirmation |
//! | [`file_format`] | files that people write: all faults of a file at once, with their places |
//! | [`certificate`] | profile, certificate, CWT, linting, access certificates |
//! | [`record`] | entries of the public database |
//! | [`approval`], [`audit`] | statements that officers sign; checkpoints of the audit log |

pub mod approval;
pub mod audit;
pub mod cbor;
pub mod certificate;
pub mod file_format;
pub mod keys;
pub mod names;
pub mod package;
pub mod record;
pub mod secret;
pub mod tlog;
