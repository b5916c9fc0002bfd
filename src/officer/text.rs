//! Words and times as people read and type them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Seconds since the Unix epoch of a day or a moment in UTC.
pub(super) fn moment(text: &str) -> Result<u64, String> {
    let whole = if text.len() == 10 { format!("{text}T00:00:00Z") } else { text.to_owned() };
    let parsed =
        humantime::parse_rfc3339(&whole).map_err(|e| format!("{e}; write 2026-01-31 or 2026-01-31T12:00:00Z"))?;
    Ok(parsed.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

/// What a caller wrote must not move the cursor of whoever reads it.
pub(super) fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// A moment in UTC.
pub(super) fn at(seconds: u64) -> String {
    humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_day_or_a_time_in_utc() {
        assert_eq!(moment("1970-01-02"), Ok(86_400));
        assert_eq!(moment("1970-01-01T00:01:00Z"), Ok(60));
        assert!(moment("yesterday").unwrap_err().contains("2026-01-31"));
    }

    #[test]
    fn what_a_caller_wrote_moves_no_cursor() {
        assert_eq!(printable("a\u{1b}[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
    }
}
