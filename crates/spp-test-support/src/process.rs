//! Starts and signals the processes of a test, and ends them with the test.
//!
//! Two mechanisms end a process that a test started. [`Process`] kills it, with its children, when it is dropped. If the test's
//! own process is killed before that, the kernel kills it: every process is started through `setpriv --pdeathsig KILL`
//! (util-linux, which Debian always has), and from a thread that lives as long as the test's process, because the kernel watches
//! the thread.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process};

use crate::wait::eventually_blocking;

/// The path of a program of this workspace, built beside the running test: `sppd`, `sppctl` or `spp-line`.
pub fn program(name: &str) -> PathBuf {
    let program = build_directory().join(name);
    assert!(program.exists(), "{} is missing: cargo build --bins", program.display());
    program
}

/// The PKCS#11 module that fails on request (`tests/faulty-hsm`), built beside the running test.
pub fn faulty_module() -> PathBuf {
    let module = build_directory().join("deps/libfaulty_hsm.so");
    assert!(module.exists(), "{} is built with the tests", module.display());
    module
}

/// The directory of the running test's build, for example `target/debug`.
fn build_directory() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let deps = test.parent().expect("a test is in a directory");
    if deps.ends_with("deps") { deps.parent().unwrap().to_owned() } else { deps.to_owned() }
}

/// Creates a command whose process ends with the test's process. Start it with [`Process::spawn`] or [`output`].
pub fn child_command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Runs a [`child_command`] command to its end, with nothing on its standard input.
pub fn output(mut command: Command) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    spawn(command).and_then(Child::wait_with_output).unwrap()
}

/// Runs a [`child_command`] command to its end and writes `text` to its standard input. The command may end without reading it.
pub fn output_with_input(mut command: Command, text: &str) -> Output {
    use std::io::Write as _;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn(command).unwrap();
    let _ = child.stdin.take().unwrap().write_all(text.as_bytes());
    child.wait_with_output().unwrap()
}

/// A running process. Dropping it kills it and its children.
pub struct Process(Child);

impl Process {
    /// Starts a [`child_command`] command.
    pub fn spawn(command: Command) -> Self {
        Self(spawn(command).unwrap())
    }

    /// The process ID.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// The child process with its standard streams, as far as they are pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        send(self.id(), signal);
    }

    /// The exit status, if the process has ended.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().unwrap()
    }

    /// Waits for the process to end.
    pub fn wait(&mut self) -> ExitStatus {
        eventually_blocking("the process ends", || self.try_wait())
    }

    /// Sends SIGKILL and waits for the process to end. Its children have to notice this themselves, as after a crash.
    pub fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// Reads both pipes to their end and waits for the end of the process.
    pub fn wait_with_output(mut self) -> Output {
        let read = |pipe: Option<Box<dyn io::Read + Send>>| {
            std::thread::spawn(move || {
                let mut text = Vec::new();
                pipe.map(|mut pipe| pipe.read_to_end(&mut text));
                text
            })
        };
        let stdout = read(self.0.stdout.take().map(|pipe| Box::new(pipe) as _));
        let stderr = read(self.0.stderr.take().map(|pipe| Box::new(pipe) as _));
        let status = self.0.wait().unwrap();
        Output { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let children = children_of(self.id());
        let _ = self.0.kill();
        let _ = self.0.wait();
        // A child that hangs or is stopped does not notice the end of its parent.
        for child in children {
            if let Some(pid) = pid(child) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// Sends a signal to any process of this test.
pub fn send(process: u32, signal: Signal) {
    kill_process(pid(process).expect("a process ID is positive"), signal)
        .unwrap_or_else(|e| panic!("{signal:?} to process {process}: {e}"));
}

/// Sends a signal to a process that may have ended already.
pub fn send_if_running(process: u32, signal: Signal) {
    let _ = kill_process(pid(process).expect("a process ID is positive"), signal);
}

/// The direct children of a process, whichever of its threads started them.
pub fn children_of(process: u32) -> Vec<u32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{process}/task")) else { return Vec::new() };
    let children = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("children")).ok();
    let texts: Vec<_> = threads.flatten().filter_map(children).collect();
    texts.iter().flat_map(|text| text.split_whitespace()).filter_map(|pid| pid.parse().ok()).collect()
}

/// Whether a process exists and has not ended (a zombie has).
pub fn is_running(process: u32) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(process.to_string()).join("stat"));
    // The state follows the command, which is in parentheses and may contain anything (proc_pid_stat(5)).
    stat.is_ok_and(|text| text.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X'])))
}

fn pid(process: u32) -> Option<Pid> {
    i32::try_from(process).ok().and_then(Pid::from_raw)
}

type Reply = Sender<io::Result<Child>>;

/// Starts a command from the thread that lives as long as this process.
fn spawn(command: Command) -> io::Result<Child> {
    static LAUNCHER: OnceLock<Sender<(Command, Reply)>> = OnceLock::new();
    let launcher = LAUNCHER.get_or_init(|| {
        let (sender, commands) = channel::<(Command, Reply)>();
        std::thread::spawn(move || {
            for (mut command, reply) in commands {
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });
    let (reply, child) = channel();
    launcher.send((command, reply)).expect("the launcher never ends");
    child.recv().expect("the launcher answers")
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};

    use super::*;

    /// Set for the process that starts another one and is then killed.
    const STARTS_ANOTHER: &str = "SPP_TESTKIT_STARTS_ANOTHER";

    #[test]
    fn process_ends_when_its_test_is_killed() {
        if std::env::var_os(STARTS_ANOTHER).is_some() {
            let mut sleep = child_command("sleep");
            sleep.arg("1000").stdout(Stdio::null()).stderr(Stdio::null());
            let sleep = Process::spawn(sleep);
            // Before setpriv has executed the program, the parent-death signal may not be set yet.
            let name = || std::fs::read_to_string(format!("/proc/{}/comm", sleep.id())).unwrap_or_default();
            eventually_blocking("setpriv has started the program", || name().trim() == "sleep");
            println!("started {}", sleep.id());
            std::thread::sleep(std::time::Duration::from_secs(1000));
        }
        let mut test = child_command(std::env::current_exe().unwrap());
        test.args(["--exact", "process::tests::process_ends_when_its_test_is_killed", "--nocapture"]);
        test.env(STARTS_ANOTHER, "1").stdout(Stdio::piped()).stderr(Stdio::null());
        let mut test = Process::spawn(test);
        let lines = BufReader::new(test.child().stdout.take().unwrap()).lines();
        let started = lines.map(Result::unwrap).find_map(|line| line.strip_prefix("started ")?.parse().ok()).unwrap();
        assert!(is_running(started));
        test.kill();
        eventually_blocking("the process has ended", || !is_running(started));
    }

    #[test]
    fn dropped_process_is_killed_with_its_children() {
        let mut shell = child_command("sh");
        shell.args(["-c", "sleep 1000 & wait"]).stdin(Stdio::null());
        let process = Process::spawn(shell);
        let child = eventually_blocking("it has a child", || children_of(process.id()).first().copied());
        send(child, Signal::STOP);
        drop(process);
        eventually_blocking("the child has ended", || !is_running(child));
    }
}
