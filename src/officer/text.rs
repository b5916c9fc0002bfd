//! Text input and output of `sppctl`: times, durations, tables, untrusted text.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use comfy_table::{CellAlignment, Table, presets};

/// Parses a UTC date or RFC 3339 timestamp into seconds since the Unix epoch.
pub(super) fn parse_time(text: &str) -> Result<u64, String> {
    let whole = if text.len() == 10 { format!("{text}T00:00:00Z") } else { text.to_owned() };
    let parsed =
        humantime::parse_rfc3339(&whole).map_err(|e| format!("{e}; expected 2026-01-31 or 2026-01-31T12:00:00Z"))?;
    Ok(parsed.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

/// Last second of the year 9999; later times have no RFC 3339 form.
const LAST_SECOND: u64 = 253_402_300_799;

/// Formats seconds since the Unix epoch as a UTC timestamp that [`parse_time`] accepts.
pub(super) fn format_time(seconds: u64) -> String {
    humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.min(LAST_SECOND)))
        .to_string()
}

/// Formats a duration with its two largest units.
pub(super) fn format_duration(seconds: i64) -> String {
    let text = humantime::format_duration(Duration::from_secs(u64::try_from(seconds).unwrap_or(0))).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// Escapes control characters, so that text from a caller cannot control the officer's terminal.
pub(super) fn escape_controls(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// A table without borders and colours; the columns in `numbers` are right-aligned.
pub(super) fn table<'a>(header: impl IntoIterator<Item = &'a str>, numbers: impl IntoIterator<Item = usize>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let header: Vec<_> = header.into_iter().collect();
    // An empty header would print an empty line.
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

/// Renders the table without trailing spaces.
pub(super) fn render(table: &Table) -> String {
    table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// Prints the paths of the written files.
pub fn print_written(paths: &[PathBuf], json: bool) {
    if json {
        println!("{:#}", serde_json::json!({ "wrote": paths }));
        return;
    }
    for path in paths {
        println!("wrote {}", path.display());
    }
}

/// One line per name and value, with the values aligned in one column.
pub(super) fn aligned_lines(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    lines.iter().map(|(name, value)| format!("{name:<width$}  {}\n", escape_controls(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamp_parses_date_or_utc_time() {
        assert_eq!(parse_time("1970-01-02"), Ok(86_400));
        assert_eq!(parse_time("1970-01-01T00:01:00Z"), Ok(60));
        for wrong in ["yesterday", "2026-13-01", "2026-02-30", "2026-1-31", "2026-01-31T12:00", ""] {
            assert!(parse_time(wrong).unwrap_err().contains("2026-01-31"), "{wrong}");
        }
        assert_eq!(parse_time(&format_time(1_793_664_000)), Ok(1_793_664_000));
    }

    #[test]
    fn untrusted_text_control_characters_are_escaped() {
        assert_eq!(escape_controls("a\u{1b}[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
        assert_eq!(
            aligned_lines(&[("a", "x\r".to_owned()), ("long", "\u{7}".to_owned())]),
            "a     x\\r\nlong  \\u{7}\n"
        );
    }
}
