//! The worker process: loads the vendor's module, holds the PIN, serves requests over a socket pair.
//!
//! It dies with its parent (a hang-up of the socket, also while the module hangs) and by SIGKILL on itself, since a module with
//! busy threads crashes in its destructors. Nothing is lost by that: what must last is on the token or with the parent.

use std::io::{BufReader, Read, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use cryptoki::object::ObjectHandle;
use rustix::event::{PollFd, PollFlags, poll};
use zeroize::Zeroizing;

use super::failure::{Failure, FailureClass, learn};
use super::operations::{Shared, TokenOperations};
use super::token::Token;
use super::wire::{self, Answer, Priority, Reply, Request, Start, Started};

/// The hidden first argument with which `sppd` starts itself again as a worker.
pub const ARGUMENT: &str = "hsm-worker";

/// Requests that may wait inside the worker; the handle bounds what it sends, so this is never the limit.
const QUEUE: usize = 4096;

/// Runs the worker on the socket that is its standard input; returns only if that is none.
pub fn run() -> Result<(), String> {
    crate::hardening::forbid_core_dumps();
    crate::hardening::lock_memory();
    // What `ps` shows; the program was started as /proc/self/exe. Only for people, so a failure does not matter.
    let _ = rustix::thread::set_name(c"spp-hsm-worker");
    let socket = std::io::stdin().as_fd().try_clone_to_owned().map_err(|e| e.to_string())?;
    let mut socket = UnixStream::from(socket);
    end_with_parent(&socket)?;
    let start: Start = wire::parse(&read_frame(&mut socket)?.ok_or("the parent is gone")?)?;
    let opened = open(start);
    let answer = opened.as_ref().map(|opened| &opened.started).map_err(Clone::clone);
    write_frame(&mut socket, &answer)?;
    if let Ok(opened) = opened {
        serve(opened, &socket)?;
    }
    leave()
}

/// Ends this process when its parent is gone, whatever the module is doing: a module may hang in any call, and a process that
/// has the PIN must not outlive the daemon. While requests are read the end of the file is noticed there, too.
fn end_with_parent(socket: &UnixStream) -> Result<(), String> {
    let socket = socket.try_clone().map_err(|e| e.to_string())?;
    let watch = move || {
        let mut watched = [PollFd::new(&socket, PollFlags::RDHUP)];
        // An interrupted call is made again.
        while !matches!(poll(&mut watched, None), Ok(events) if events > 0) {}
        leave();
    };
    std::thread::Builder::new().name("parent".to_owned()).spawn(watch).map_err(|e| e.to_string())?;
    Ok(())
}

struct Opened {
    token: Token,
    shared: Arc<Shared>,
    /// Whose session has the transport key: it dies with it.
    maker: TokenOperations,
    transport_key: ObjectHandle,
    started: Started,
}

fn open(start: Start) -> Result<Opened, Failure> {
    learn(start.module.failures.clone());
    let token = Token::open(&start.module, &start.token, &start.pin)?;
    let shared = Shared::new(start.module, start.keys);
    TokenOperations::new(token.session()?, Arc::clone(&shared), None).check_keys()?;
    let mut maker = TokenOperations::new(token.session()?, Arc::clone(&shared), None);
    let (transport_key, wrapped) = maker.make_transport_key(&start.transport_rsa)?;
    let started =
        Started { module: token.description().to_owned(), token: token.identity().clone(), transport_key: wrapped };
    Ok(Opened { token, shared, maker, transport_key, started })
}

/// Reads requests until the parent closes the socket.
fn serve(opened: Opened, socket: &UnixStream) -> Result<(), String> {
    let out = Arc::new(Mutex::new(socket.try_clone().map_err(|e| e.to_string())?));
    let held = Arc::new(Held {
        token: Mutex::new(opened.token),
        maker: Mutex::new(opened.maker),
        used: Mutex::new(Instant::now()),
    });
    let module = &opened.shared.module;
    let start = |lane, count| -> Result<Queue, String> {
        let (queue, waiting) = bounded(QUEUE);
        for _ in 0..count {
            let session = lock(&held.token).session().map_err(|f| f.message)?;
            let verbs = TokenOperations::new(session, Arc::clone(&opened.shared), Some(opened.transport_key));
            let (waiting, out, held) = (waiting.clone(), Arc::clone(&out), Arc::clone(&held));
            Thread { lane, waiting, out, held, keep_alive: module.keep_alive, nice: module.background_nice }
                .start(verbs)?;
        }
        Ok(queue)
    };
    let line = start(Priority::Line, module.threads)?;
    let background = start(Priority::Background, module.background_threads)?;
    read_requests(&mut BufReader::new(socket), &line, &background)
}

type Queue = Sender<(Request, Instant)>;

/// What no thread works with and must stay open: the login, and the session of the transport key.
struct Held {
    token: Mutex<Token>,
    maker: Mutex<TokenOperations>,
    used: Mutex<Instant>,
}

fn read_requests(socket: &mut impl Read, line: &Queue, background: &Queue) -> Result<(), String> {
    while let Some(body) = read_frame(socket)? {
        let request: Request = wire::parse(&body)?;
        let until = Instant::now() + Duration::from_millis(u64::from(request.budget_ms));
        let queue = match request.lane {
            Priority::Line => line,
            Priority::Background => background,
        };
        queue.send((request, until)).map_err(|e| e.to_string())?;
    }
    Ok(())
}

struct Thread {
    lane: Priority,
    waiting: Receiver<(Request, Instant)>,
    out: Arc<Mutex<UnixStream>>,
    held: Arc<Held>,
    keep_alive: Duration,
    nice: u8,
}

impl Thread {
    fn start(self, verbs: TokenOperations) -> Result<(), String> {
        let name = match self.lane {
            Priority::Line => "hsm-session",
            Priority::Background => "hsm-background",
        };
        let thread = std::thread::Builder::new().name(name.to_owned());
        thread.spawn(move || self.work(verbs)).map_err(|e| e.to_string())?;
        Ok(())
    }

    fn work(self, verbs: TokenOperations) {
        if self.lane == Priority::Background {
            lower_priority(self.nice);
        }
        let mut verbs = Some(verbs);
        loop {
            let (request, until) = match self.waiting.recv_timeout(self.keep_alive) {
                Ok(next) => next,
                Err(RecvTimeoutError::Timeout) => {
                    let used = verbs.as_mut().map_or(Ok(()), TokenOperations::keep_alive);
                    self.end_if_lost(used.map_err(|failure| self.heal(&mut verbs, failure)));
                    self.use_held();
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => leave(),
            };
            let id = request.id;
            let mut took_us = Vec::with_capacity(request.operations.len());
            let result = self.answer(&mut verbs, request, until, &mut took_us);
            let fatal = matches!(&result, Err(f) if f.class == FailureClass::ModuleLost);
            if write_frame(&mut lock(&self.out), &Reply { id, took_us, result }).is_err() || fatal {
                leave();
            }
            self.use_held();
        }
    }

    /// Does the operations in order.
    fn answer(
        &self,
        verbs: &mut Option<TokenOperations>,
        request: Request,
        until: Instant,
        took_us: &mut Vec<u32>,
    ) -> Result<Vec<Answer>, Failure> {
        if Instant::now() > until {
            return Err(Failure::new(FailureClass::Transient, "nobody waits for this any more"));
        }
        let mut answers = Vec::with_capacity(request.operations.len());
        for operation in request.operations {
            let Some(current) = verbs.as_mut() else {
                return Err(Failure::new(FailureClass::ModuleLost, "the session could not be opened again"));
            };
            let begun = Instant::now();
            let answer = current.perform(operation);
            took_us.push(u32::try_from(begun.elapsed().as_micros()).unwrap_or(u32::MAX));
            answers.push(answer.map_err(|failure| self.heal(verbs, failure))?);
        }
        Ok(answers)
    }

    /// A lost session is opened again, once, then the module counts as lost.
    fn heal(&self, verbs: &mut Option<TokenOperations>, failure: Failure) -> Failure {
        if failure.class != FailureClass::SessionLost {
            return failure;
        }
        *verbs = verbs.take().and_then(|old| Some(old.renewed(lock(&self.held.token).session().ok()?)));
        let class = match verbs.as_mut().map(TokenOperations::check_keys) {
            Some(Ok(())) => FailureClass::Transient,
            _ => FailureClass::ModuleLost,
        };
        Failure::new(class, failure.message)
    }

    /// Uses the sessions that no thread works with, when that is due: modules end those that nobody uses, and the login with the last one.
    fn use_held(&self) {
        let due = lock(&self.held.used).elapsed() >= self.keep_alive;
        if !due {
            return;
        }
        *lock(&self.held.used) = Instant::now();
        let used = lock(&self.held.token).keep_alive().and_then(|()| lock(&self.held.maker).keep_alive());
        // What holds the login or the transport key cannot be had again.
        self.end_if_lost(used.map_err(|failure| match failure.class {
            FailureClass::SessionLost => Failure::new(FailureClass::ModuleLost, failure.message),
            _ => failure,
        }));
    }

    fn end_if_lost(&self, used: Result<(), Failure>) {
        if let Err(Failure { class: FailureClass::ModuleLost, message }) = used {
            eprintln!("sppd: the HSM worker ends: {message}");
            leave();
        }
    }
}

/// Gives this thread that nice value, unless it has a lower priority already.
fn lower_priority(nice: u8) {
    use rustix::process::{getpriority_process, setpriority_process};
    // On Linux a thread has a nice value of its own (sched(7)).
    let thread = Some(rustix::thread::gettid());
    let nice = i32::from(nice);
    if getpriority_process(thread).is_ok_and(|now| now >= nice) {
        return;
    }
    if let Err(e) = setpriority_process(thread, nice) {
        eprintln!(
            "sppd: a background thread of the HSM worker cannot lower its priority ({e}): filling pools will slow the line; \
             allow setpriority(2)"
        );
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
