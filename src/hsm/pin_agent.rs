//! A separate process that holds a typed PIN for later workers. The process that faces the network passes a pipe from the agent
//! to each worker and never sees the PIN.

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

/// The hidden first argument with which `sppd` starts itself again as the PIN agent.
pub const ARGUMENT: &str = "hsm-pin-agent";

/// The process that holds the PIN. It ends with this process.
#[derive(Debug)]
pub struct PinAgent {
    socket: Mutex<UnixStream>,
    _process: Mutex<Child>,
}

impl PinAgent {
    /// Starts the agent and waits until a person has typed the PIN.
    pub fn start(program: &Path) -> io::Result<Self> {
        let (socket, agent_socket) = UnixStream::pair()?;
        let process = Command::new(program)
            .arg(ARGUMENT)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(agent_socket)))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()?;
        let mut typed = [0];
        let error = |_| io::Error::other("no PIN was typed: run sppd on a terminal, or configure a PIN file");
        (&socket).read_exact(&mut typed).map_err(error)?;
        Ok(Self { socket: Mutex::new(socket), _process: Mutex::new(process) })
    }

    /// A pipe from which a worker reads the PIN once.
    pub(super) fn pin_pipe(&self) -> io::Result<OwnedFd> {
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

/// Prompts for the PIN, then writes it to each pipe received from the parent, until the parent ends.
pub fn run() -> Result<(), String> {
    spp_program::hardening::forbid_core_dumps();
    spp_program::hardening::lock_memory();
    let _ = rustix::thread::set_name(c"spp-pin-agent");
    let socket = io::stdin().as_fd().try_clone_to_owned().map_err(|e| e.to_string())?;
    let mut socket = UnixStream::from(socket);
    let pin = PinSource::Prompt.read().map_err(|e| e.to_string())?.ok_or("no PIN")?;
    socket.write_all(&[0]).map_err(|e| e.to_string())?;
    while let Some(pipe) = next_pipe(&socket).map_err(|e| e.to_string())? {
        // A write fails if the worker has ended, which needs no handling. Exposed to the worker that reads this pipe.
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
