//! The worker process: loads the vendor's module, holds the PIN, serves requests over a socket pair.
//!
//! It dies with its parent (end of file on the socket) and by SIGKILL on itself, since a module with busy threads crashes
//! in its destructors. Nothing is lost by that: what must last is on the token or with the parent.

use std::io::{BufReader, Read, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use cryptoki::object::ObjectHandle;
use zeroize::Zeroizing;

use super::failure::{Failure, FailureClass};
use super::token::Token;
use super::verbs::{Shared, Verbs};
use super::wire::{self, Answer, Lane, Reply, Request, Start, Started};

/// The hidden first argument with which `sppd` starts itself again as a worker.
pub const ARGUMENT: &str = "hsm-worker";

/// Requests that may wait inside the worker; the handle bounds what it sends, so this is never the limit.
const QUEUE: usize = 4096;

/// The nice value of background threads: the lowest.
const NICE: i32 = 19;

/// Runs the worker on the socket that is its standard input; returns only if that is none.
pub fn run() -> Result<(), String> {
    crate::process::forbid_core_dumps();
    crate::process::lock_memory();
    // What `ps` shows; the program was started as /proc/self/exe. Only for people, so a failure does not matter.
    let _ = rustix::thread::set_name(c"spp-hsm-worker");
    let socket = std::io::stdin().as_fd().try_clone_to_owned().map_err(|e| e.to_string())?;
    let mut socket = UnixStream::from(socket);
    let start: Start = wire::parse(&read_frame(&mut socket)?.ok_or("the parent is gone")?)?;
    let opened = open(start);
    let answer = opened.as_ref().map(|opened| &opened.started).map_err(Clone::clone);
    write_frame(&mut socket, &answer)?;
    if let Ok(opened) = opened {
        serve(opened, &socket)?;
    }
    leave()
}

struct Opened {
    token: Token,
    shared: Arc<Shared>,
    transport_key: ObjectHandle,
    threads: usize,
    background_threads: usize,
    started: Started,
}

fn open(start: Start) -> Result<Opened, Failure> {
    let token = Token::open(&start.library, &start.token, &start.pin)?;
    let shared = Arc::new(Shared {
        keys: start.keys,
        wrap: start.wrap,
        unwrappable: start.unwrappable,
        objects: start.exclusive_changes.then(|| RwLock::new(())),
        sync_directory: start.sync_directory,
        pairs: Mutex::default(),
    });
    Verbs::new(token.session()?, Arc::clone(&shared), None).check_keys()?;
    // The transport key dies with the session that made it, so the anchor's twin that never closes makes it.
    let mut maker = Verbs::new(token.session()?, Arc::clone(&shared), None);
    let (transport_key, wrapped) = maker.make_transport_key(&start.transport_rsa, start.oaep_hash)?;
    std::mem::forget(maker);
    let started =
        Started { module: token.description().to_owned(), token: token.identity().clone(), transport_key: wrapped };
    let (threads, background_threads) = (start.threads, start.background_threads);
    Ok(Opened { token, shared, transport_key, threads, background_threads, started })
}

/// Reads requests until the parent closes the socket.
fn serve(opened: Opened, socket: &UnixStream) -> Result<(), String> {
    let out = Arc::new(Mutex::new(socket.try_clone().map_err(|e| e.to_string())?));
    let token = Arc::new(Mutex::new(opened.token));
    let start = |lane, count| -> Result<Queue, String> {
        let (queue, waiting) = sync_channel(QUEUE);
        let waiting = Arc::new(Mutex::new(waiting));
        for _ in 0..count {
            let session = lock(&token).session().map_err(|f| f.message)?;
            let verbs = Verbs::new(session, Arc::clone(&opened.shared), Some(opened.transport_key));
            let (waiting, out, token) = (Arc::clone(&waiting), Arc::clone(&out), Arc::clone(&token));
            Thread { lane, waiting, out, token }.start(verbs)?;
        }
        Ok(queue)
    };
    let line = start(Lane::Line, opened.threads)?;
    let background = start(Lane::Background, opened.background_threads)?;
    read_requests(&mut BufReader::new(socket), &line, &background)
}

type Queue = SyncSender<(Request, Instant)>;

fn read_requests(socket: &mut impl Read, line: &Queue, background: &Queue) -> Result<(), String> {
    while let Some(body) = read_frame(socket)? {
        let request: Request = wire::parse(&body)?;
        let until = Instant::now() + Duration::from_millis(u64::from(request.budget_ms));
        let queue = match request.lane {
            Lane::Line => line,
            Lane::Background => background,
        };
        queue.send((request, until)).map_err(|e| e.to_string())?;
    }
    Ok(())
}

struct Thread {
    lane: Lane,
    waiting: Arc<Mutex<Receiver<(Request, Instant)>>>,
    out: Arc<Mutex<UnixStream>>,
    token: Arc<Mutex<Token>>,
}

impl Thread {
    fn start(self, verbs: Verbs) -> Result<(), String> {
        let name = match self.lane {
            Lane::Line => "hsm-session",
            Lane::Background => "hsm-background",
        };
        let thread = std::thread::Builder::new().name(name.to_owned());
        thread.spawn(move || self.work(verbs)).map_err(|e| e.to_string())?;
        Ok(())
    }

    fn work(self, verbs: Verbs) {
        if self.lane == Lane::Background {
            // On Linux a thread has a nice value of its own (sched(7)).
            if let Err(e) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE) {
                eprintln!(
                    "sppd: a background thread of the HSM worker cannot lower its priority ({e}): filling pools will slow the line; \
                     allow setpriority(2)"
                );
            }
        }
        let mut verbs = Some(verbs);
        loop {
            let next = lock(&self.waiting).recv();
            let Ok((request, until)) = next else { leave() };
            let id = request.id;
            let result = self.answer(&mut verbs, request, until);
            let fatal = matches!(&result, Err(f) if f.class == FailureClass::ModuleLost);
            if write_frame(&mut lock(&self.out), &Reply { id, result }).is_err() || fatal {
                leave();
            }
        }
    }

    /// Does the operations in order; a lost session is opened again once, then the module counts as lost.
    fn answer(&self, verbs: &mut Option<Verbs>, request: Request, until: Instant) -> Result<Vec<Answer>, Failure> {
        if Instant::now() > until {
            return Err(Failure::new(FailureClass::Transient, "nobody waits for this any more"));
        }
        let mut answers = Vec::with_capacity(request.operations.len());
        for operation in request.operations {
            let Some(current) = verbs.as_mut() else {
                return Err(Failure::new(FailureClass::ModuleLost, "the session could not be opened again"));
            };
            match current.perform(operation) {
                Ok(answer) => answers.push(answer),
                Err(failure) if failure.class == FailureClass::SessionLost => {
                    let renewed = verbs.take().and_then(|old| Some(old.renewed(lock(&self.token).session().ok()?)));
                    *verbs = renewed;
                    let checked = verbs.as_mut().map(Verbs::check_keys);
                    let class = if matches!(checked, Some(Ok(()))) {
                        FailureClass::Transient
                    } else {
                        FailureClass::ModuleLost
                    };
                    return Err(Failure::new(class, failure.message));
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(answers)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_frame(socket: &mut impl Read) -> Result<Option<Zeroizing<Vec<u8>>>, String> {
    let mut prefix = [0; 4];
    match socket.read_exact(&mut prefix) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e.to_string()),
    }
    let mut body = Zeroizing::new(vec![0; wire::frame_len(prefix)?]);
    socket.read_exact(&mut body).map_err(|e| e.to_string())?;
    Ok(Some(body))
}

fn write_frame<T: serde::Serialize>(socket: &mut UnixStream, value: &T) -> Result<(), String> {
    socket.write_all(&wire::frame(value)?).map_err(|e| e.to_string())
}

/// Ends the process without running the module's destructors.
fn leave() -> ! {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    std::process::exit(1)
}
