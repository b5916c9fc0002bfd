//! The control file: one rule a line, read again whenever it is another one.
//!
//! ```text
//! # FUNCTION or *   every=K: each K-th call   times=N: no more than N, over all processes   what
//! # lasts=1: once begun it goes on for as long as the process does
//! C_Sign            every=3                                                                 return CKR_DEVICE_ERROR
//! C_Login           times=1                                                                 crash
//! *                                                                                         away
//! ```

use std::fs::{File, Metadata, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::ckr;

/// What happens instead of a call, before it or to its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// The call is not made; this is its answer.
    Return(u64),
    /// The call is made after a while.
    Sleep(Duration),
    /// The call never returns.
    Hang,
    /// The process ends at once.
    Crash,
    /// All sessions are closed before the call.
    DropSessions,
    /// The user is logged out before the call.
    Logout,
    /// The token is not in its slot.
    Away,
    /// One bit of what comes back is another.
    Flip,
    /// A session that nobody used for so long is gone, and the login with the last one.
    Idle(Duration),
    /// The PIN is entered at the HSM, and by no program.
    Keypad,
    /// What comes back is a byte shorter, and the call says that this is all.
    Short,
}

struct Rule {
    function: String,
    every: u64,
    times: Option<u64>,
    /// Whether a process in which it has fired once has it for each call from then on.
    lasts: bool,
    fired: bool,
    action: Action,
    calls: u64,
}

/// The rules as they are in the file at this moment.
pub(crate) struct Control {
    path: PathBuf,
    seen: Option<(u64, i64, i64, u64)>,
    rules: Vec<Rule>,
}

impl Control {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, seen: None, rules: Vec::new() }
    }

    /// What the call of a function meets.
    pub(crate) fn meet(&mut self, function: &str) -> Option<Action> {
        self.read_again();
        for (number, rule) in self.rules.iter_mut().enumerate() {
            if rule.function != "*" && rule.function != function {
                continue;
            }
            rule.calls += 1;
            let again = rule.lasts && rule.fired;
            if again || rule.calls.is_multiple_of(rule.every) && may_fire(&self.path, self.seen, number, rule.times) {
                rule.fired = true;
                // For a test that wants to know whether anything happened.
                let _ = File::create(self.path.with_extension("fired"));
                return Some(rule.action);
            }
        }
        None
    }

    fn read_again(&mut self) {
        let Ok(mut file) = File::open(&self.path) else {
            self.seen = None;
            self.rules.clear();
            return;
        };
        let stamp = file.metadata().ok().as_ref().map(stamp);
        if stamp == self.seen {
            return;
        }
        self.seen = stamp;
        let mut text = String::new();
        let _ = file.read_to_string(&mut text);
        self.rules = text.lines().filter_map(|line| line.split('#').next()).filter_map(rule).collect();
    }
}

fn stamp(metadata: &Metadata) -> (u64, i64, i64, u64) {
    (metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len())
}

/// Each firing of a rule that has an end leaves a file, so that the next process does not begin again.
fn may_fire(control: &Path, version: Option<(u64, i64, i64, u64)>, rule: usize, times: Option<u64>) -> bool {
    let Some(times) = times else { return true };
    let (inode, seconds, nanoseconds, _) = version.unwrap_or_default();
    (0..times).any(|one| {
        let fired = format!("{}.{inode}-{seconds}-{nanoseconds}.{rule}.{one}", control.display());
        OpenOptions::new().write(true).create_new(true).open(fired).is_ok()
    })
}

/// A line; what it does not understand is said at once, since a fault that never comes makes a test worthless.
fn rule(line: &str) -> Option<Rule> {
    let mut words = line.split_whitespace().peekable();
    let mut rule = Rule {
        function: words.next()?.to_owned(),
        every: 1,
        times: None,
        lasts: false,
        fired: false,
        action: Action::Hang,
        calls: 0,
    };
    while let Some((name, value)) = words.peek().and_then(|word| word.split_once('=')) {
        let value: u64 = value.parse().unwrap_or_else(|_| wrong(line));
        match name {
            "every" if value > 0 => rule.every = value,
            "times" => rule.times = Some(value),
            "lasts" => rule.lasts = value > 0,
            _ => wrong(line),
        }
        words.next();
    }
    rule.action = match (words.next().unwrap_or_else(|| wrong(line)), words.next()) {
        ("return", Some(code)) => Action::Return(ckr::value(code).unwrap_or_else(|| wrong(line))),
        ("sleep", Some(milliseconds)) => {
            Action::Sleep(Duration::from_millis(milliseconds.parse().unwrap_or_else(|_| wrong(line))))
        }
        ("hang", None) => Action::Hang,
        ("crash", None) => Action::Crash,
        ("drop-sessions", None) => Action::DropSessions,
        ("logout", None) => Action::Logout,
        ("away", None) => Action::Away,
        ("idle", Some(milliseconds)) => {
            Action::Idle(Duration::from_millis(milliseconds.parse().unwrap_or_else(|_| wrong(line))))
        }
        ("keypad", None) => Action::Keypad,
        ("flip", None) => Action::Flip,
        ("short", None) => Action::Short,
        _ => wrong(line),
    };
    Some(rule)
}

fn wrong<T>(line: &str) -> T {
    eprintln!("faulty-hsm: this is no rule: {line}");
    std::process::abort()
}
