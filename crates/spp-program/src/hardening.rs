//! Process hardening: disables core dumps and locks memory.

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

/// Disables core dumps, and ptrace by the same user, because memory holds keys. Every process calls this first. The caller logs a
/// failure once logging has started.
pub fn forbid_core_dumps() -> bool {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    // A hardened systemd unit forbids changing limits, and has already set this one.
    let limited = getrlimit(Resource::Core).maximum == Some(0) || setrlimit(Resource::Core, none).is_ok();
    let undumpable = set_dumpable_behavior(DumpableBehavior::NotDumpable).is_ok();
    limited && undumpable
}

/// Locks this process's pages in memory, if the system allows unlimited locking (root, or a unit with `LimitMEMLOCK=infinity`).
/// With a limit, memory stays unlocked: an allocation above the limit would end the process.
pub fn lock_memory() -> bool {
    use rustix::mm::{MlockAllFlags, mlockall};
    let unlimited = getrlimit(Resource::Memlock).current.is_none();
    unlimited && mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT).is_ok()
}
