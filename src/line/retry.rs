//! What is tried again, after how long, and when it is given up.

use std::error::Error as _;
use std::fmt;
use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;

/// How long a station waits for what may heal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// The deadline of each call.
    pub(super) deadline: Duration,
    /// How long a call is repeated, from its first failure on.
    pub(super) retry_for: Duration,
}

impl Patience {
    /// Makes a call until it succeeds, fails for good, or patience ends. Every call of this service may be repeated: the answer
    /// is the same. `retries` counts the repetitions.
    pub(super) async fn call<T, F>(
        &self,
        name: &'static str,
        retries: &mut u32,
        attempt: impl Fn() -> F,
    ) -> Result<T, CallFailure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut first_failure = None;
        let mut tries = 0;
        loop {
            let status = match attempt().await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => status,
            };
            let Some(advice) = advice(&status) else { return Err(CallFailure::of(name, &status, false)) };
            let pause = pause(tries, advice);
            if first_failure.get_or_insert_with(Instant::now).elapsed() + pause > self.retry_for {
                // A busy chip is its own trouble; all else that should have healed meets every device.
                return Err(CallFailure::of(name, &status, status.code() != Code::Aborted));
            }
            tries += 1;
            *retries += 1;
            tokio::time::sleep(pause).await;
        }
    }

    /// A request with the deadline on it.
    pub(super) fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(self.deadline);
        request
    }
}

/// An error answer, or none.
#[derive(Debug, Clone)]
pub struct CallFailure {
    name: &'static str,
    code: Code,
    message: String,
    violations: Vec<(String, String)>,
    /// Whether the next device would fare the same: the daemon or its HSM was away, full or busy until patience ended.
    pub(super) away: bool,
}

impl CallFailure {
    fn of(name: &'static str, status: &Status, away: bool) -> Self {
        let violations = status.get_details_bad_request().map(|bad| bad.field_violations).unwrap_or_default();
        let violations = violations.into_iter().map(|violation| (violation.field, violation.description)).collect();
        let mut message = status.message().to_owned();
        // A transport error says what happened in its sources only.
        let mut cause = status.source();
        while let Some(inner) = cause {
            let text = inner.to_string();
            if !message.contains(&text) {
                message = format!("{message}: {text}");
            }
            cause = inner.source();
        }
        Self { name, code: status.code(), message, violations, away }
    }

    /// Whether it complains of this field of the request.
    pub(super) fn is_about(&self, field: &str) -> bool {
        self.violations.iter().any(|(found, _)| found == field)
    }

    pub(super) fn with_hint(mut self, hint: &str) -> Self {
        self.message = format!("{}; {hint}", self.message);
        self
    }

    /// What the daemon said, without the call's name.
    pub(super) fn reason(&self) -> String {
        let mut text = wire_name(self.code);
        if !self.message.is_empty() {
            text.push_str(&format!(": {}", self.message));
        }
        for (field, problem) in self.violations.iter().filter(|(_, problem)| !self.message.contains(problem)) {
            text.push_str(&format!("; {field}: {problem}"));
        }
        text
    }

    pub(super) const fn code(&self) -> Code {
        self.code
    }

    /// The call, for reports.
    pub(super) const fn name(&self) -> &'static str {
        self.name
    }
}

impl fmt::Display for CallFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.reason())
    }
}

impl std::error::Error for CallFailure {}

/// `INVALID_ARGUMENT`, as the code is called in every other language.
fn wire_name(code: Code) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}

/// What a failure that may heal says of when to come again; `None`: it does not heal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Advice {
    not_before: Option<Duration>,
}

fn advice(status: &Status) -> Option<Advice> {
    let not_before = status.get_details_retry_info().and_then(|info| info.retry_delay);
    let heals = match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Aborted => true,
        // A rate that is too high heals and says when; a quota that is used up does not.
        Code::ResourceExhausted => not_before.is_some() || is_of_transport(status),
        // What was cut off on the way has these codes, and a cause: a status that the daemon sent has none.
        Code::Unknown | Code::Internal | Code::Cancelled => is_of_transport(status),
        _ => false,
    };
    (heals && !is_refused_by_tls(status)).then_some(Advice { not_before })
}

fn is_of_transport(status: &Status) -> bool {
    status.source().is_some()
}

fn is_refused_by_tls(status: &Status) -> bool {
    // In TLS 1.3 the server's verdict on the client comes after the handshake; HTTP/2 hands it on as text.
    let told = |error: &(dyn std::error::Error + 'static)| error.to_string().contains("received fatal alert");
    let mut cause = status.source();
    while let Some(error) = cause {
        if told(error) {
            return true;
        }
        cause = error.source();
    }
    status.source().and_then(tls_fault).is_some()
}

/// The fault of a TLS handshake in a chain of causes, if that was it: trust does not come by waiting.
pub(super) fn tls_fault<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(fault) = error.downcast_ref::<rustls::Error>() {
            return Some(fault);
        }
        let inside = error.downcast_ref::<std::io::Error>().and_then(|io| io.get_ref());
        if let Some(fault) = inside.and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            return Some(fault);
        }
        cause = error.source();
    }
    None
}

/// From 0.1 s doubling up to 5 s, or what the daemon asks for; half of the one and a quarter of the other are left to chance,
/// so that stations that failed together do not come back together.
fn pause(tries: u32, advice: Advice) -> Duration {
    let step = Duration::from_millis(100 << tries.min(6)).min(Duration::from_secs(5));
    match advice.not_before {
        Some(asked) => asked + asked.min(step).mul_f64(0.25 * chance()),
        None => step.mul_f64(0.5 + 0.5 * chance()),
    }
}

/// A number from 0 to 1. Without random numbers the stations are merely less spread.
fn chance() -> f64 {
    let mut bytes = [0; 4];
    let filled = aws_lc_rs::rand::fill(&mut bytes).is_ok();
    if filled { f64::from(u32::from_be_bytes(bytes)) / f64::from(u32::MAX) } else { 0.5 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use tonic_types::ErrorDetails;

    const BRIEF: Patience = Patience { deadline: Duration::from_secs(1), retry_for: Duration::from_secs(2) };

    /// A failure of the connection, as the client library tells it.
    fn cut_off(code: Code) -> Status {
        let mut status = Status::new(code, "transport error");
        let reset: std::io::Error = std::io::ErrorKind::ConnectionReset.into();
        status.set_source(std::sync::Arc::new(reset));
        status
    }

    fn asking(code: Code, delay: Duration) -> Status {
        Status::with_error_details(code, "later", ErrorDetails::with_retry_info(Some(delay)))
    }

    #[test]
    fn only_what_may_heal_is_tried_again() {
        for code in [Code::Unavailable, Code::DeadlineExceeded, Code::Aborted] {
            assert!(advice(&Status::new(code, "")).is_some(), "{code:?}");
        }
        for code in [
            Code::InvalidArgument,
            Code::FailedPrecondition,
            Code::AlreadyExists,
            Code::PermissionDenied,
            Code::Unauthenticated,
            Code::NotFound,
            Code::Internal,
            Code::Unknown,
            Code::Unimplemented,
        ] {
            assert!(advice(&Status::new(code, "")).is_none(), "{code:?}");
        }
        for code in [Code::Unknown, Code::Internal, Code::Cancelled] {
            assert!(advice(&cut_off(code)).is_some(), "{code:?} of the transport");
        }
    }

    #[test]
    fn a_used_up_quota_is_not_waited_for_and_a_rate_is() {
        assert!(advice(&Status::new(Code::ResourceExhausted, "in total")).is_none());
        let told = advice(&asking(Code::ResourceExhausted, Duration::from_secs(3))).unwrap();
        assert_eq!(told.not_before, Some(Duration::from_secs(3)));
    }

    #[test]
    fn distrust_is_not_waited_for() {
        let mut status = Status::new(Code::Unavailable, "tcp connect error");
        let alert = rustls::Error::AlertReceived(rustls::AlertDescription::UnknownCA);
        status.set_source(std::sync::Arc::new(std::io::Error::new(std::io::ErrorKind::InvalidData, alert)));
        assert!(advice(&status).is_none());
    }

    #[test]
    fn pauses_grow_and_honour_what_was_asked() {
        let none = Advice { not_before: None };
        for (tries, most) in [(0, 100), (1, 200), (3, 800), (6, 5000), (40, 5000)] {
            let pause = pause(tries, none).as_millis();
            assert!((most / 2..=most).contains(&pause), "{tries}: {pause} ms");
        }
        let asked = Duration::from_secs(2);
        assert!(pause(0, Advice { not_before: Some(asked) }) >= asked);
    }

    #[tokio::test]
    async fn a_call_is_repeated_until_it_succeeds() {
        let (calls, mut retries) = (Cell::new(0), 0);
        let answer = BRIEF.call("Assemble", &mut retries, || {
            calls.set(calls.get() + 1);
            let result = if calls.get() < 4 { Err(cut_off(Code::Unknown)) } else { Ok(Response::new(7)) };
            std::future::ready(result)
        });
        assert_eq!(answer.await.unwrap(), 7);
        assert_eq!((calls.get(), retries), (4, 3));
    }

    #[tokio::test]
    async fn patience_ends() {
        let mut retries = 0;
        let call =
            BRIEF.call::<(), _>("Assemble", &mut retries, || std::future::ready(Err(Status::unavailable("hsm"))));
        let failure = call.await.unwrap_err();
        assert!(failure.away);
        assert!(retries > 0, "{retries}");

        // Longer than patience: not even begun.
        let before = retries;
        let long = asking(Code::ResourceExhausted, Duration::from_secs(3600));
        let call = BRIEF.call::<(), _>("Assemble", &mut retries, || std::future::ready(Err(long.clone())));
        let failure = call.await.unwrap_err();
        assert!(failure.away, "nor is it for the next device");
        assert_eq!(retries, before, "it is not waited for what is too long");
    }

    #[test]
    fn a_failure_names_the_fields_once() {
        let details = ErrorDetails::with_bad_request_violation("identity", "no check digit");
        let told = |message| {
            let status = Status::with_error_details(Code::InvalidArgument, message, details.clone());
            CallFailure::of("Assemble", &status, false).to_string()
        };
        assert_eq!(told("wrong"), "Assemble: INVALID_ARGUMENT: wrong; identity: no check digit");
        assert_eq!(told("identity: no check digit"), "Assemble: INVALID_ARGUMENT: identity: no check digit");
    }
}
