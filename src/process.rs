//! What every process of this program does for itself first.

/// No core dumps, no ptrace by the same user: memory holds keys. Where the system refuses, there is nothing better to do.
pub fn forbid_core_dumps() {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    let limited = setrlimit(Resource::Core, none);
    let undumpable = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    if let Err(e) = limited.and(undumpable) {
        tracing::warn!(error = %e, "core dumps could not be switched off");
    }
}
