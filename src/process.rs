//! What every process of this program does for itself first.

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

/// No core dumps, no ptrace by the same user: memory holds keys. Where the system refuses, there is nothing better to do than
/// to say so. Call it once logging is on.
pub fn forbid_core_dumps() {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    // A hardened unit forbids changing limits, and has set this one already.
    let limited = getrlimit(Resource::Core).maximum == Some(0) || setrlimit(Resource::Core, none).is_ok();
    let undumpable = set_dumpable_behavior(DumpableBehavior::NotDumpable).is_ok();
    if !(limited && undumpable) {
        tracing::warn!("core dumps could not be switched off");
    }
}
