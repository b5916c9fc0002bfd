//! Retry policy: which failed calls are retried, when, and for how long.

use std::error::Error as _;
use std::fmt;
use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;

/// How long a station retries temporary failures.
#[derive(Debug, Clone, Copy)]
pub struct RetryPolicy {
    /// The deadline of each call.
    pub deadline: Duration,
    /// How long a call is retried, measured from its first failure.
    pub retry_for: Duration,
}

impl Default for RetryPolicy {
    /// As the program `spp-line`.
    fn default() -> Self {
        Self { deadline: Duration::from_secs(30), retry_for: Duration::from_secs(60) }
    }
}

impl RetryPolicy {
    /// Makes a call until it succeeds, fails permanently, or `retry_for` has passed. Every call of this service is idempotent
    /// and may be retried. `retries` counts the retries.
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
        let mut attempts = 0;
        loop {
            let status = match attempt().await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => status,
            };
            let Some(hint) = retry_hint(&status) else { return Err(CallFailure::new(name, &status, false)) };
            let pause = pause(attempts, hint);
            if first_failure.get_or_insert_with(Instant::now).elapsed() + pause > self.retry_for {
                // ABORTED concerns one chip; every other persistent failure affects all devices.
                return Err(CallFailure::new(name, &status, status.code() != Code::Aborted));
            }
            attempts += 1;
            *retries += 1;
            tokio::time::sleep(pause).await;
        }
    }

    /// Creates a request with the deadline.
    pub(super) fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(self.deadline);
        request
    }
}

/// A failed call.
#[derive(Debug, Clone)]
pub struct CallFailure {
    name: &'static str,
    code: Code,
    message: String,
    violations: Vec<(String, String)>,
    /// Whether the next device would fail as well: the daemon or its HSM was unavailable or overloaded until the retries ended.
    pub(super) unavailable: bool,
}

impl CallFailure {
    fn new(name: &'static str, status: &Status, unavailable: bool) -> Self {
        let violations = status.get_details_bad_request().map(|details| details.field_violations).unwrap_or_default();
        let violations = violations.into_iter().map(|violation| (violation.field, violation.description)).collect();
        let mut message = status.message().to_owned();
        // A transport error describes its cause only in its sources.
        let mut cause = status.source();
        while let Some(inner) = cause {
            let text = inner.to_string();
            if !message.contains(&text) {
                message = format!("{message}: {text}");
            }
            cause = inner.source();
        }
        Self { name, code: status.code(), message, violations, unavailable }
    }

    /// Whether the daemon reported a violation in this request field.
    pub(super) fn concerns_field(&self, field: &str) -> bool {
        self.violations.iter().any(|(violated, _)| violated == field)
    }

    pub(super) fn with_hint(mut self, hint: &str) -> Self {
        self.message = format!("{}; {hint}", self.message);
        self
    }

    /// The daemon's error, without the call's name.
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

    /// The gRPC status code.
    pub const fn code(&self) -> Code {
        self.code
    }

    /// The call's name, for reports.
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

/// The canonical gRPC code name, for example `INVALID_ARGUMENT`.
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

/// The daemon's retry hint for a temporary failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RetryHint {
    not_before: Option<Duration>,
}

/// `None` if the failure is permanent.
fn retry_hint(status: &Status) -> Option<RetryHint> {
    let not_before = status.get_details_retry_info().and_then(|info| info.retry_delay);
    let is_temporary = match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Aborted => true,
        // An exceeded rate comes with a retry delay; an exhausted quota does not and is permanent.
        Code::ResourceExhausted => not_before.is_some() || is_transport_error(status),
        // A broken connection yields these codes with a source; a status sent by the daemon has no source.
        Code::Unknown | Code::Internal | Code::Cancelled => is_transport_error(status),
        _ => false,
    };
    (is_temporary && !is_tls_failure(status)).then_some(RetryHint { not_before })
}

fn is_transport_error(status: &Status) -> bool {
    status.source().is_some()
}

fn is_tls_failure(status: &Status) -> bool {
    // A TLS 1.3 server rejects a client certificate after the handshake; HTTP/2 reports the alert as text.
    let is_alert = |error: &(dyn std::error::Error + 'static)| error.to_string().contains("received fatal alert");
    let mut cause = status.source();
    while let Some(error) = cause {
        if is_alert(error) {
            return true;
        }
        cause = error.source();
    }
    status.source().and_then(tls_fault).is_some()
}

/// The TLS error in a chain of causes, if any. TLS errors are permanent.
pub(super) fn tls_fault<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(fault) = error.downcast_ref::<rustls::Error>() {
            return Some(fault);
        }
        let io_source = error.downcast_ref::<std::io::Error>().and_then(|io| io.get_ref());
        if let Some(fault) = io_source.and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            return Some(fault);
        }
        cause = error.source();
    }
    None
}

/// Exponential back-off from 0.1 s to 5 s, or the daemon's retry delay, with jitter (half of the back-off, up to a quarter of
/// the delay), so that stations that failed together do not retry together.
fn pause(attempts: u32, hint: RetryHint) -> Duration {
    let step = Duration::from_millis(100 << attempts.min(6)).min(Duration::from_secs(5));
    match hint.not_before {
        Some(delay) => delay + delay.min(step).mul_f64(0.25 * jitter()),
        None => step.mul_f64(0.5 + 0.5 * jitter()),
    }
}

/// A random number from 0 to 1. If the random number generator fails, 0.5: the stations are then less spread.
fn jitter() -> f64 {
    let mut bytes = [0; 4];
    let filled = aws_lc_rs::rand::fill(&mut bytes).is_ok();
    if filled { f64::from(u32::from_be_bytes(bytes)) / f64::from(u32::MAX) } else { 0.5 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use tonic_types::ErrorDetails;

    const SHORT_RETRY: RetryPolicy =
        RetryPolicy { deadline: Duration::from_secs(1), retry_for: Duration::from_secs(2) };

    /// A connection failure as the client library reports it.
    fn cut_off(code: Code) -> Status {
        let mut status = Status::new(code, "transport error");
        let reset: std::io::Error = std::io::ErrorKind::ConnectionReset.into();
        status.set_source(std::sync::Arc::new(reset));
        status
    }

    fn status_with_delay(code: Code, delay: Duration) -> Status {
        Status::with_error_details(code, "later", ErrorDetails::with_retry_info(Some(delay)))
    }

    #[test]
    fn only_temporary_failures_retried() {
        for code in [Code::Unavailable, Code::DeadlineExceeded, Code::Aborted] {
            assert!(retry_hint(&Status::new(code, "")).is_some(), "{code:?}");
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
            assert!(retry_hint(&Status::new(code, "")).is_none(), "{code:?}");
        }
        for code in [Code::Unknown, Code::Internal, Code::Cancelled] {
            assert!(retry_hint(&cut_off(code)).is_some(), "{code:?} from the transport");
        }
    }

    #[test]
    fn exceeded_rate_retried_but_exhausted_quota_not() {
        assert!(retry_hint(&Status::new(Code::ResourceExhausted, "in total")).is_none());
        let hint = retry_hint(&status_with_delay(Code::ResourceExhausted, Duration::from_secs(3))).unwrap();
        assert_eq!(hint.not_before, Some(Duration::from_secs(3)));
    }

    #[test]
    fn tls_failure_not_retried() {
        let mut status = Status::new(Code::Unavailable, "tcp connect error");
        let alert = rustls::Error::AlertReceived(rustls::AlertDescription::UnknownCA);
        status.set_source(std::sync::Arc::new(std::io::Error::new(std::io::ErrorKind::InvalidData, alert)));
        assert!(retry_hint(&status).is_none());
    }

    #[test]
    fn pause_grows_and_honours_retry_delay() {
        let none = RetryHint { not_before: None };
        for (attempts, max) in [(0, 100), (1, 200), (3, 800), (6, 5000), (40, 5000)] {
            let pause = pause(attempts, none).as_millis();
            assert!((max / 2..=max).contains(&pause), "{attempts}: {pause} ms");
        }
        let delay = Duration::from_secs(2);
        assert!(pause(0, RetryHint { not_before: Some(delay) }) >= delay);
    }

    #[tokio::test]
    async fn call_retried_until_success() {
        let (calls, mut retries) = (Cell::new(0), 0);
        let response = SHORT_RETRY.call("Assemble", &mut retries, || {
            calls.set(calls.get() + 1);
            let result = if calls.get() < 4 { Err(cut_off(Code::Unknown)) } else { Ok(Response::new(7)) };
            std::future::ready(result)
        });
        assert_eq!(response.await.unwrap(), 7);
        assert_eq!((calls.get(), retries), (4, 3));
    }

    #[tokio::test]
    async fn retries_end_after_retry_for() {
        let mut retries = 0;
        let call =
            SHORT_RETRY.call::<(), _>("Assemble", &mut retries, || std::future::ready(Err(Status::unavailable("hsm"))));
        let failure = call.await.unwrap_err();
        assert!(failure.unavailable);
        assert!(retries > 0, "{retries}");

        // A delay longer than retry_for is not waited for.
        let before = retries;
        let long = status_with_delay(Code::ResourceExhausted, Duration::from_secs(3600));
        let call = SHORT_RETRY.call::<(), _>("Assemble", &mut retries, || std::future::ready(Err(long.clone())));
        let failure = call.await.unwrap_err();
        assert!(failure.unavailable, "the next device would fail as well");
        assert_eq!(retries, before, "a delay that is too long is not waited for");
    }

    #[test]
    fn call_failure_names_each_field_once() {
        let details = ErrorDetails::with_bad_request_violation("identity", "no check digit");
        let message_of = |message| {
            let status = Status::with_error_details(Code::InvalidArgument, message, details.clone());
            CallFailure::new("Assemble", &status, false).to_string()
        };
        assert_eq!(message_of("wrong"), "Assemble: INVALID_ARGUMENT: wrong; identity: no check digit");
        assert_eq!(message_of("identity: no check digit"), "Assemble: INVALID_ARGUMENT: identity: no check digit");
    }
}
