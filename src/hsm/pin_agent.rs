//! A PIN that a person typed, kept for the workers to come in a process of its own: the process that faces the network hands it on
//! from one to the other without seeing it.

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

use super::pin::PinSource;

/// The hidden first argument with which `sppd` starts itself again as the keeper.
pub const ARGUMENT: &str = "hsm-pin-keeper";

/// The process that has the PIN. It ends with this one.
#[derive(Debug)]
pub struct PinAgent {
    socket: Mutex<UnixStream>,
    _process: Mutex<Child>,
}

impl PinAgent {
    /// Starts it, and waits until a person has typed the PIN.
    pub fn ask(program: &Path) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let process = Command::new(program)
            .arg(ARGUMENT)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()?;
        let mut typed = [0];
        (&ours).read_exact(&mut typed).map_err(|_| io::Error::other("no PIN was typed; is this a terminal?"))?;
        Ok(Self { socket: Mutex::new(ours), _process: Mutex::new(process) })
    }

    /// Where a worker reads the PIN, once.
    pub(super) fn hand(&self) -> io::Result<OwnedFd> {
        let (read, write) = io::pipe()?;
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        let pipes = [write.as_fd()];
        rights.push(SendAncillaryMessage::ScmRights(&pipes));
        rustix::net::sendmsg(&*socket, &[IoSlice::new(&[0])], &mut rights, SendFlags::NOSIGNAL)?;
        Ok(read.into())
    }
}

/// Asks a person, then gives the PIN to whoever holds a pipe, until the parent is gone.
pub fn run() -> Result<(), String> {
    crate::hardening::forbid_core_dumps();
    crate::hardening::lock_memory();
    let _ = rustix::thread::set_name(c"spp-pin-keeper");
    let socket = io::stdin().as_fd().try_clone_to_owned().map_err(|e| e.to_string())?;
    let mut socket = UnixStream::from(socket);
    let pin = PinSource::Prompt.read().map_err(|e| e.to_string())?.ok_or("no PIN")?;
    socket.write_all(&[0]).map_err(|e| e.to_string())?;
    while let Some(pipe) = next_pipe(&socket).map_err(|e| e.to_string())? {
        // A worker that has gone meanwhile has no use for it. Exposed to the one that reads this pipe.
        let _ = std::fs::File::from(pipe).write_all(pin.expose());
    }
    Ok(())
}

fn next_pipe(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut byte)];
    let received = rustix::net::recvmsg(socket, &mut into, &mut rights, RecvFlags::CMSG_CLOEXEC)?;
    let pipe = rights.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut pipes) => pipes.next(),
        _ => None,
    });
    match pipe {
        _ if received.bytes == 0 => Ok(None),
        Some(pipe) => Ok(Some(pipe)),
        None => Err(io::Error::other("a message without a pipe")),
    }
}
