//! Allocates TCP ports that no other test uses.

use std::fs::File;
use std::net::TcpListener;
use std::sync::Mutex;

/// Below the system's ephemeral range (from 32768), so that no connection takes a port while its daemon restarts.
const FIRST: u32 = 15_000;
const COUNT: u32 = 17_000;

/// Reserves a port for this process until it ends. Tests run in several processes, so each port has a lock file.
pub fn free_port() -> u16 {
    static HELD: Mutex<(u32, Vec<File>)> = Mutex::new((0, Vec::new()));
    // One directory per user: other users may not open these files.
    let user = rustix::process::getuid().as_raw();
    let directory = std::env::temp_dir().join(format!("spp-testkit-ports-{user}"));
    std::fs::create_dir_all(&directory).unwrap();
    let mut held = HELD.lock().unwrap();
    let begin = std::process::id().wrapping_mul(97);
    while held.0 < COUNT {
        let port = u16::try_from(FIRST + begin.wrapping_add(held.0) % COUNT).unwrap();
        held.0 += 1;
        let lock = File::options().create(true).append(true).open(directory.join(port.to_string())).unwrap();
        if lock.try_lock().is_ok() && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            held.1.push(lock);
            return port;
        }
    }
    panic!("no port from {FIRST} to {} is free", FIRST + COUNT);
}
