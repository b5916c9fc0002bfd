//! The secure processing point: gives every device on an assembly line its identity and its keys.
//!
//! # The way of one device
//!
//! ```text
//!  station                        sppd                                              device
//!     │ Line.Assemble(chip ID, identity, profile)                                      │
//!     ├──────────────► admit → keys (HSM) → prepare + lint → intend ─► journal         │
//!     │                → sign (HSM) → issue ─► journal → deliver                       │
//!     │◄────────────── certificate, data package                                       │
//!     ├───────────────────────────────────────────────────────────────────────────────►│ verify, store,
//!     │◄───────────────────────────────────────────────────────────────────────────────┤ backup, confirm
//!     │ Line.Complete(session, backup, confirmation)                                   │
//!     ├──────────────► accept → publish ─► public log → erase ─► secret store          │
//!     │◄────────────── receipt: a proof that anybody can verify                        │
//!                      Recovery.GetRecord(chip ID) ── ever after, by anybody ─────────►│ recover
//! ```
//!
//! It is told by two functions: [`provisioning::Provisioner::assemble`] and [`provisioning::Provisioner::complete`].
//!
//! # The rooms
//!
//! | room | what is in it | what it may touch |
//! |---|---|---|
//! | [`names`], [`keys`], [`secret`], [`clock`] | the words that all rooms share | nothing |
//! | [`config`] | files people write → validated values | the configuration's files |
//! | [`provisioning`] ★ | the stories of a device, and what a crash left of them | every room below |
//! | [`hsm`] | the worker process, the verbs, keys on a token | PKCS#11, alone |
//! | [`keypool`] | pairs made in advance: batches, filling, shredding | the HSM's verbs, the stores |
//! | [`certificate`] | profile → prepared → linted → issued; pure | nothing |
//! | [`package`] | data package, sealing, backup, confirmation; pure | nothing |
//! | [`store`] | state store, the traits of both stores, the public database's index; hands out the proofs | sled, alone |
//! | [`tlog`] | notes, checkpoints, tiles, inclusion proofs; pure | nothing |
//! | [`registry`] | the public database as a transparency log: files, sequencer, mirrors, witnesses, verification | its directory, the log key, HTTP as a client |
//! | [`access`] | who may call, what officers agree on, quotas, identities to give out | the state store, the access key |
//! | [`audit`] | what was done and refused, in a chain that only grows | its file, the log key |
//! | [`reload`], [`logging`] | the configuration in force, and its exchange; the log's level | what is exchanged |
//! | [`connections`] | how every listener accepts, its TLS, the stop | sockets |
//! | [`rpc`] | services, callers, the table from errors to statuses, TLS, drain | gRPC |
//! | [`web`] | records, the log and pages for anybody; metrics | HTTP |
//! | [`device`] | the personal device, the reference for firmware authors | its flash file |
//! | [`mod@line`] | what a station does | gRPC as a client, simulated devices |
//! | [`officer`] | ceremonies, enrolment, pools, status, reports | the token (through [`hsm`]), gRPC as a client |
//!
//! # Who is trusted with what
//!
//! | part | whoever controls it can at most |
//! |---|---|
//! | HSM | do everything: it is the root |
//! | the daemon's memory | use the HSM while it runs, see packages in flight |
//! | state store | withhold or roll back sessions; read no key without the HSM |
//! | public database | withhold records; not alter, remove or reorder one unnoticed |
//! | station | provision within its profiles and identity ranges; with sealed delivery it sees no secret, unless it exchanges the chip's transport key |
//! | network | nothing |

/// The messages and services of `proto/spp/v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, reason = "generated from proto/")]
pub mod proto {
    tonic::include_proto!("spp.v1");
    /// The compiled descriptors, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/spp_descriptor.bin"));
}

pub mod access;
pub mod audit;
pub mod certificate;
pub mod cli_docs;
pub mod clock;
pub mod config;
pub mod connections;
pub mod device;
pub mod hardening;
pub mod hsm;
pub mod keypool;
pub mod keys;
pub mod line;
pub mod logging;
pub mod names;
pub mod officer;
pub mod package;
pub mod provisioning;
pub mod registry;
pub mod reload;
pub mod rpc;
pub mod secret;
pub mod store;
pub mod tlog;
pub mod web;
