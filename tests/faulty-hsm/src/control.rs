//! The control file: one rule per line, read again after each change.
//!
//! ```text
//! # FUNCTION or *   every=K: each K-th call   times=N: at most N times, over all processes   action
//! # lasts=1: after its first fault, the rule applies to every later matching call of that process
//! C_Sign            every=3                                                                 return CKR_DEVICE_ERROR
//! C_Login           times=1                                                                 crash
//! *                                                                                         token-removed
//! ```

use std::fs::{File, Metadata, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::return_codes;

/// The fault to inject: instead of a call, before it, or into its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Return this value without making the call.
    Return(u64),
    /// Delay the call.
    Sleep(Duration),
    /// The call never returns.
    Hang,
    /// The process ends at once.
    Crash,
    /// Close all sessions before the call.
    DropSessions,
    /// Log the user out before the call.
    Logout,
    /// Behave as if the token had been removed from its slot.
    TokenRemoved,
    /// Flip one bit of the output.
    Flip,
    /// Close each session that was idle for this long; the login ends with the last one.
    Idle(Duration),
    /// Accept the PIN only from the HSM's keypad.
    Keypad,
    /// Return one byte less of the output, with the shorter length.
    Short,
}

struct Rule {
    function: String,
    every: u64,
    times: Option<u64>,
    /// Whether the rule applies to every later call of a process in which it has fired once.
    lasts: bool,
    fired: bool,
    action: Action,
    calls: u64,
}

/// The current rules of the control file.
pub(crate) struct Control {
    path: PathBuf,
    version: Option<(u64, i64, i64, u64)>,
    rules: Vec<Rule>,
}

impl Control {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, version: None, rules: Vec::new() }
    }

    /// The fault to inject into this call of a function, if any.
    pub(crate) fn next_action(&mut self, function: &str) -> Option<Action> {
        self.reload();
        for (number, rule) in self.rules.iter_mut().enumerate() {
            if rule.function != "*" && rule.function != function {
                continue;
            }
            rule.calls += 1;
            let persists = rule.lasts && rule.fired;
            if persists
                || rule.calls.is_multiple_of(rule.every) && may_fire(&self.path, self.version, number, rule.times)
            {
                rule.fired = true;
                // Tells the test that a fault was injected.
                let _ = File::create(self.path.with_extension("fired"));
                return Some(rule.action);
            }
        }
        None
    }

    fn reload(&mut self) {
        let Ok(mut file) = File::open(&self.path) else {
            self.version = None;
            self.rules.clear();
            return;
        };
        let version = file.metadata().ok().as_ref().map(file_version);
        if version == self.version {
            return;
        }
        self.version = version;
        let mut text = String::new();
        let _ = file.read_to_string(&mut text);
        self.rules = text.lines().filter_map(|line| line.split('#').next()).filter_map(parse_rule).collect();
    }
}

fn file_version(metadata: &Metadata) -> (u64, i64, i64, u64) {
    (metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len())
}

/// Counts the firings of a rule with `times` in files, so that the limit holds over all processes.
fn may_fire(control: &Path, version: Option<(u64, i64, i64, u64)>, rule: usize, times: Option<u64>) -> bool {
    let Some(times) = times else { return true };
    let (inode, seconds, nanoseconds, _) = version.unwrap_or_default();
    (0..times).any(|firing| {
        let fired = format!("{}.{inode}-{seconds}-{nanoseconds}.{rule}.{firing}", control.display());
        OpenOptions::new().write(true).create_new(true).open(fired).is_ok()
    })
}

/// Parses a line. Aborts on a malformed rule, because a fault that never occurs makes a test worthless.
fn parse_rule(line: &str) -> Option<Rule> {
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
        let value: u64 = value.parse().unwrap_or_else(|_| malformed(line));
        match name {
            "every" if value > 0 => rule.every = value,
            "times" => rule.times = Some(value),
            "lasts" => rule.lasts = value > 0,
            _ => malformed(line),
        }
        words.next();
    }
    rule.action = match (words.next().unwrap_or_else(|| malformed(line)), words.next()) {
        ("return", Some(code)) => Action::Return(return_codes::value(code).unwrap_or_else(|| malformed(line))),
        ("sleep", Some(milliseconds)) => {
            Action::Sleep(Duration::from_millis(milliseconds.parse().unwrap_or_else(|_| malformed(line))))
        }
        ("hang", None) => Action::Hang,
        ("crash", None) => Action::Crash,
        ("drop-sessions", None) => Action::DropSessions,
        ("logout", None) => Action::Logout,
        ("token-removed", None) => Action::TokenRemoved,
        ("idle", Some(milliseconds)) => {
            Action::Idle(Duration::from_millis(milliseconds.parse().unwrap_or_else(|_| malformed(line))))
        }
        ("keypad", None) => Action::Keypad,
        ("flip", None) => Action::Flip,
        ("short", None) => Action::Short,
        _ => malformed(line),
    };
    Some(rule)
}

fn malformed<T>(line: &str) -> T {
    eprintln!("faulty-hsm: malformed rule: {line}");
    std::process::abort()
}
