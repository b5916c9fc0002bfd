//! An [`Fs`] with fault injection, for tests of all stores.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use super::directory::Fs;

/// Injects faults into file system calls while the respective flag is set.
#[derive(Default)]
pub(crate) struct FaultInjector {
    pub(crate) before_apply: AtomicBool,
    pub(crate) in_sync: AtomicBool,
    /// Writes fail with "disk full".
    pub(crate) full: AtomicBool,
    /// Syncs that succeed before one fails.
    pub(crate) syncs_before: AtomicU64,
    pub(crate) free: AtomicU64,
    pub(crate) syncs: AtomicU64,
    /// Additional milliseconds per sync. Calls made during a sync share the next one.
    pub(crate) slow: AtomicU64,
}

impl Fs for FaultInjector {
    fn before_apply(&self) -> io::Result<()> {
        if self.full.load(SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        fail_if(&self.before_apply)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.syncs.fetch_add(1, SeqCst);
        std::thread::sleep(Duration::from_millis(self.slow.load(SeqCst)));
        file.sync_data()?;
        match self.syncs_before.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => Ok(()),
            Err(_) => fail_if(&self.in_sync),
        }
    }

    fn free(&self, _: &Path) -> io::Result<u64> {
        match self.free.load(SeqCst) {
            0 => Ok(1 << 40),
            bytes => Ok(bytes),
        }
    }
}

fn fail_if(fails: &AtomicBool) -> io::Result<()> {
    if fails.load(SeqCst) { Err(io::Error::other("injected fault")) } else { Ok(()) }
}
