//! What every process of this program does for itself first.

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

/// No core dumps, no ptrace by the same user: memory holds keys. The first thing a process does; whether the system allowed it
/// is for the log, once there is one.
pub fn forbid_core_dumps() -> bool {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    // A hardened unit forbids changing limits, and has set this one already.
    let limited = getrlimit(Resource::Core).maximum == Some(0) || setrlimit(Resource::Core, none).is_ok();
    let undumpable = set_dumpable_behavior(DumpableBehavior::NotDumpable).is_ok();
    limited && undumpable
}

/// Keeps this process's pages out of swap, where the system lets it lock as many as it likes (root, or a unit with
/// `LimitMEMLOCK=infinity`). With a limit it is left alone: an allocation that hits the limit would end the process.
pub fn lock_memory() -> bool {
    use rustix::mm::{MlockAllFlags, mlockall};
    let unlimited = getrlimit(Resource::Memlock).current.is_none();
    unlimited && mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT).is_ok()
}
