//! The worker process: loads the vendor's module, logs in with the PIN, serves requests over a socket pair.
//!
//! The worker exits when its parent ends (hang-up of the socket, even while the module hangs). It exits by sending itself
//! SIGKILL, because a module with busy threads crashes in its destructors. No state is lost: durable state is on the token or
//! with the parent.

use std::io::{BufReader, Read, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use cryptoki::object::ObjectHandle;
use rustix::event::{PollFd, PollFlags, poll};
use zeroize::Zeroizing;

use super::failure::{Failure, set_failure_overrides};
use super::failure_class::FailureClass;
use super::operations::{Shared, TokenOperations};
use super::token::Token;
use super::wire::{self, Answer, Priority, Reply, Request, Start, Started};

/// The hidden first argument with which `sppd` starts itself again as a worker.
pub const ARGUMENT: &str = "hsm-worker";

/// Capacity of the request queue. The handle sends fewer requests, so the queue is never full.
const QUEUE: usize = 4096;

/// Runs the worker on the socket on standard input. Returns only if that is not a socket.
pub fn run() -> Result<(), String> {
    spp_program::hardening::forbid_core_dumps();
    spp_program::hardening::lock_memory();
    // The name shown by `ps`, because the program was started as /proc/self/exe. A failure has no effect on function.
    let _ = rustix::thread::set_name(c"spp-hsm-worker");
    let socket = std::io::stdin().as_fd().try_clone_to_owned().map_err(|e| e.to_string())?;
    let mut socket = UnixStream::from(socket);
    exit_with_parent(&socket)?;
    let start: Start = wire::parse(&read_frame(&mut socket)?.ok_or("the parent closed the socket")?)?;
    let opened = open(start);
    let answer = opened.as_ref().map(|opened| &opened.started).map_err(Clone::clone);
    write_frame(&mut socket, &answer)?;
    if let Ok(opened) = opened {
        serve(opened, &socket)?;
    }
    exit_now()
}

/// Ends this process when its parent ends, even during a module call: a module may hang in any call, and a process that holds the
/// PIN must not outlive the daemon. The request reader detects the end of the file too.
fn exit_with_parent(socket: &UnixStream) -> Result<(), String> {
    let socket = socket.try_clone().map_err(|e| e.to_string())?;
    let watch = move || {
        let mut watched = [PollFd::new(&socket, PollFlags::RDHUP)];
        // Repeat an interrupted poll.
        while !matches!(poll(&mut watched, None), Ok(events) if events > 0) {}
        exit_now();
    };
    std::thread::Builder::new().name("parent".to_owned()).spawn(watch).map_err(|e| e.to_string())?;
    Ok(())
}

struct Opened {
    token: Token,
    shared: Arc<Shared>,
    /// Owns the session of the transport key, which is a session object and ends with its session.
    transport_session: TokenOperations,
    transport_key: ObjectHandle,
    started: Started,
}

fn open(start: Start) -> Result<Opened, Failure> {
    set_failure_overrides(start.module.failures.clone());
    let token = Token::open(&start.module, &start.token, &start.pin)?;
    let shared = Shared::new(start.module, start.keys);
    TokenOperations::new(token.session()?, Arc::clone(&shared), None).check_keys()?;
    let mut transport_session = TokenOperations::new(token.session()?, Arc::clone(&shared), None);
    let (transport_key, wrapped) = transport_session.make_transport_key(&start.transport_rsa)?;
    let started =
        Started { module: token.description().to_owned(), token: token.identity().clone(), transport_key: wrapped };
    Ok(Opened { token, shared, transport_session, transport_key, started })
}

/// Reads requests until the parent closes the socket.
fn serve(opened: Opened, socket: &UnixStream) -> Result<(), String> {
    let replies = Arc::new(Mutex::new(socket.try_clone().map_err(|e| e.to_string())?));
    let reserved = Arc::new(ReservedSessions {
        token: Mutex::new(opened.token),
        transport_session: Mutex::new(opened.transport_session),
        last_used: Mutex::new(Instant::now()),
    });
    let module = &opened.shared.module;
    let start = |priority, count| -> Result<Queue, String> {
        let (queue, requests) = bounded(QUEUE);
        for _ in 0..count {
            let session = lock(&reserved.token).session().map_err(|f| f.message)?;
            let operations = TokenOperations::new(session, Arc::clone(&opened.shared), Some(opened.transport_key));
            let (requests, replies, reserved) = (requests.clone(), Arc::clone(&replies), Arc::clone(&reserved));
            let (keep_alive, nice) = (module.keep_alive, module.background_nice);
            Thread { priority, requests, replies, reserved, keep_alive, nice }.start(operations)?;
        }
        Ok(queue)
    };
    let line = start(Priority::Line, module.threads)?;
    let background = start(Priority::Background, module.background_threads)?;
    read_requests(&mut BufReader::new(socket), &line, &background)
}

type Queue = Sender<(Request, Instant)>;

/// Sessions that no thread uses and that must stay open: the session that holds the login, and the session of the transport key.
struct ReservedSessions {
    token: Mutex<Token>,
    transport_session: Mutex<TokenOperations>,
    last_used: Mutex<Instant>,
}

fn read_requests(socket: &mut impl Read, line: &Queue, background: &Queue) -> Result<(), String> {
    while let Some(body) = read_frame(socket)? {
        let request: Request = wire::parse(&body)?;
        let until = Instant::now() + Duration::from_millis(u64::from(request.budget_ms));
        let queue = match request.priority {
            Priority::Line => line,
            Priority::Background => background,
        };
        queue.send((request, until)).map_err(|e| e.to_string())?;
    }
    Ok(())
}

struct Thread {
    priority: Priority,
    requests: Receiver<(Request, Instant)>,
    replies: Arc<Mutex<UnixStream>>,
    reserved: Arc<ReservedSessions>,
    keep_alive: Duration,
    nice: u8,
}

impl Thread {
    fn start(self, operations: TokenOperations) -> Result<(), String> {
        let name = match self.priority {
            Priority::Line => "hsm-session",
            Priority::Background => "hsm-background",
        };
        let thread = std::thread::Builder::new().name(name.to_owned());
        thread.spawn(move || self.work(operations)).map_err(|e| e.to_string())?;
        Ok(())
    }

    fn work(self, operations: TokenOperations) {
        if self.priority == Priority::Background {
            lower_priority(self.nice);
        }
        let mut operations = Some(operations);
        loop {
            let (request, until) = match self.requests.recv_timeout(self.keep_alive) {
                Ok(next) => next,
                Err(RecvTimeoutError::Timeout) => {
                    let result = operations.as_mut().map_or(Ok(()), TokenOperations::keep_alive);
                    self.exit_if_lost(result.map_err(|failure| self.recover_session(&mut operations, failure)));
                    self.keep_sessions_alive();
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => exit_now(),
            };
            let id = request.id;
            let mut took_us = Vec::with_capacity(request.operations.len());
            let result = self.answer(&mut operations, request, until, &mut took_us);
            let fatal = matches!(&result, Err(f) if f.class == FailureClass::ModuleLost);
            if write_frame(&mut lock(&self.replies), &Reply { id, took_us, result }).is_err() || fatal {
                exit_now();
            }
            self.keep_sessions_alive();
        }
    }

    /// Performs the operations in order.
    fn answer(
        &self,
        operations: &mut Option<TokenOperations>,
        request: Request,
        until: Instant,
        took_us: &mut Vec<u32>,
    ) -> Result<Vec<Answer>, Failure> {
        if Instant::now() > until {
            return Err(Failure::new(FailureClass::Transient, "deadline expired before the worker started the call"));
        }
        let mut answers = Vec::with_capacity(request.operations.len());
        for operation in request.operations {
            let Some(current) = operations.as_mut() else {
                return Err(Failure::new(FailureClass::ModuleLost, "cannot reopen the session"));
            };
            let started = Instant::now();
            let answer = current.perform(operation);
            took_us.push(u32::try_from(started.elapsed().as_micros()).unwrap_or(u32::MAX));
            answers.push(answer.map_err(|failure| self.recover_session(operations, failure))?);
        }
        Ok(answers)
    }

    /// Reopens a lost session once. If that fails, the module counts as lost.
    fn recover_session(&self, operations: &mut Option<TokenOperations>, failure: Failure) -> Failure {
        if failure.class != FailureClass::SessionLost {
            return failure;
        }
        *operations = operations.take().and_then(|old| Some(old.renewed(lock(&self.reserved.token).session().ok()?)));
        let class = match operations.as_mut().map(TokenOperations::check_keys) {
            Some(Ok(())) => FailureClass::Transient,
            _ => FailureClass::ModuleLost,
        };
        Failure::new(class, failure.message)
    }

    /// Uses the reserved sessions once per keep-alive interval. Modules close idle sessions, and the login ends with the last
    /// one.
    fn keep_sessions_alive(&self) {
        let due = lock(&self.reserved.last_used).elapsed() >= self.keep_alive;
        if !due {
            return;
        }
        *lock(&self.reserved.last_used) = Instant::now();
        let reserved = &self.reserved;
        let used = lock(&reserved.token).keep_alive().and_then(|()| lock(&reserved.transport_session).keep_alive());
        // The sessions of the login and of the transport key cannot be replaced.
        self.exit_if_lost(used.map_err(|failure| match failure.class {
            FailureClass::SessionLost => Failure::new(FailureClass::ModuleLost, failure.message),
            _ => failure,
        }));
    }

    fn exit_if_lost(&self, result: Result<(), Failure>) {
        if let Err(Failure { class: FailureClass::ModuleLost, message }) = result {
            eprintln!("sppd: HSM worker exits: {message}");
            exit_now();
        }
    }
}

/// Sets the nice value of this thread, unless its priority is lower already.
fn lower_priority(nice: u8) {
    use rustix::process::{getpriority_process, setpriority_process};
    // On Linux each thread has its own nice value (sched(7)).
    let thread = Some(rustix::thread::gettid());
    let nice = i32::from(nice);
    if getpriority_process(thread).is_ok_and(|now| now >= nice) {
        return;
    }
    if let Err(e) = setpriority_process(thread, nice) {
        eprintln!(
            "sppd: cannot lower the priority of an HSM background thread ({e}): filling pools will slow the line; allow \
             setpriority(2)"
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
fn exit_now() -> ! {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    std::process::exit(1)
}
