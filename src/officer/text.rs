//! How an officer's tool writes and reads times, tables and what others wrote.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use comfy_table::{CellAlignment, Table, presets};

/// Seconds since the Unix epoch of a day or a moment in UTC.
pub(super) fn moment(text: &str) -> Result<u64, String> {
    let whole = if text.len() == 10 { format!("{text}T00:00:00Z") } else { text.to_owned() };
    let parsed =
        humantime::parse_rfc3339(&whole).map_err(|e| format!("{e}; write 2026-01-31 or 2026-01-31T12:00:00Z"))?;
    Ok(parsed.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

/// Of the year 9999: later ones have no RFC 3339 form.
const LAST_SECOND: u64 = 253_402_300_799;

/// A moment in UTC, as [`moment`] reads it.
pub(super) fn at(seconds: u64) -> String {
    humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.min(LAST_SECOND)))
        .to_string()
}

/// A time in its two largest units.
pub(super) fn duration(seconds: i64) -> String {
    let text = humantime::format_duration(Duration::from_secs(u64::try_from(seconds).unwrap_or(0))).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// What a caller wrote must not move the cursor of whoever reads it.
pub(super) fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// A table without lines and colours, the columns of numbers to the right.
pub(super) fn table<'a>(header: impl IntoIterator<Item = &'a str>, numbers: impl IntoIterator<Item = usize>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let header: Vec<_> = header.into_iter().collect();
    // An empty one would be an empty line.
    if !header.is_empty() {
        table.set_header(header);
    }
    for column in numbers {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// The table without the spaces that fill its lines up.
pub(super) fn trimmed(table: &Table) -> String {
    table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// Tells which files were made.
pub fn tell_written(paths: &[PathBuf], json: bool) {
    if json {
        println!("{:#}", serde_json::json!({ "wrote": paths }));
        return;
    }
    for path in paths {
        println!("wrote {}", path.display());
    }
}

/// Names and values, the values in one column.
pub(super) fn lines(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    lines.iter().map(|(name, value)| format!("{name:<width$}  {}\n", printable(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_day_or_a_time_in_utc() {
        assert_eq!(moment("1970-01-02"), Ok(86_400));
        assert_eq!(moment("1970-01-01T00:01:00Z"), Ok(60));
        for wrong in ["yesterday", "2026-13-01", "2026-02-30", "2026-1-31", "2026-01-31T12:00", ""] {
            assert!(moment(wrong).unwrap_err().contains("2026-01-31"), "{wrong}");
        }
        assert_eq!(moment(&at(1_793_664_000)), Ok(1_793_664_000));
    }

    #[test]
    fn what_a_caller_wrote_moves_no_cursor() {
        assert_eq!(printable("a\u{1b}[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
        assert_eq!(lines(&[("a", "x\r".to_owned()), ("long", "\u{7}".to_owned())]), "a     x\\r\nlong  \\u{7}\n");
    }
}
