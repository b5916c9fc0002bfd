//! The daemon as its users meet it: real processes, real sockets, a real HSM module, real files.
#![allow(missing_docs, unreachable_pub, reason = "tests are named by what must be true")]

mod site;
mod starts;
