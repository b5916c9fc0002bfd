//! Parses TOML files so that one run reports as many faults as possible.

use std::ops::Range;

use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

use super::Faults;

/// The beginning of serde's error message for an unknown key.
const UNKNOWN: &str = "unknown field";

/// Deserializes a text. An unknown key is a fault; it is removed and the text is parsed again, so that further faults are
/// reported in the same run. Any other fault ends parsing, because there is no value to validate.
pub fn read_toml<T: DeserializeOwned>(place: &str, text: &str, faults: &mut Faults) -> Option<T> {
    let mut document = faults.note(place, DeTable::parse(text))?;
    loop {
        let mut error = match T::deserialize(toml::Deserializer::from(document.clone())) {
            Ok(shape) => return Some(shape),
            Err(error) => error,
        };
        // With the input text, the message shows the line.
        error.set_input(Some(text));
        faults.add(place, error.to_string().trim_end());
        let unknown = error.span().filter(|_| error.message().starts_with(UNKNOWN))?;
        if !remove_key(document.get_mut(), &unknown) {
            return None;
        }
    }
}

/// Removes the key at `span` from the table or its subtables; returns `false` if there is none.
fn remove_key(table: &mut DeTable<'_>, span: &Range<usize>) -> bool {
    let key = table.keys().find(|key| key.span() == *span).map(|key| key.get_ref().to_string());
    match key {
        Some(key) => table.remove(key.as_str()).is_some(),
        None => table.iter_mut().any(|(_, value)| remove_key_below(value.get_mut(), span)),
    }
}

fn remove_key_below(value: &mut DeValue<'_>, span: &Range<usize>) -> bool {
    match value {
        DeValue::Table(table) => remove_key(table, span),
        DeValue::Array(items) => items.iter_mut().any(|item| remove_key_below(item.get_mut(), span)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Shape {
        name: String,
        #[serde(default)]
        inner: Vec<Inner>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        size: u32,
    }

    fn read(text: &str) -> (Option<Shape>, Vec<String>) {
        let mut faults = Faults::default();
        let shape = read_toml("x.toml", text, &mut faults);
        (shape, faults.iter().map(|fault| fault.problem.clone()).collect())
    }

    #[test]
    fn unknown_keys_are_all_reported_with_their_lines() {
        let text = "name = \"a\"\ncolour = \"\"\"\nname\n\"\"\"\n[[inner]]\nsize = 1\n[[inner]]\nsize = 2\ndepth.a.b = 3\n[extra]\nx = 1\n";
        let (shape, faults) = read(text);
        assert_eq!(shape, Some(Shape { name: "a".into(), inner: vec![Inner { size: 1 }, Inner { size: 2 }] }));
        assert_eq!(faults.len(), 3, "{faults:?}");
        for (fault, (key, line)) in faults.iter().zip([("colour", 2), ("extra", 10), ("depth", 9)]) {
            let all = faults.join("\n");
            assert!(
                all.contains(&format!("unknown field `{key}`")) && all.contains(&format!("line {line}")),
                "{fault}"
            );
        }
    }

    #[test]
    fn invalid_value_or_syntax_ends_parsing() {
        for text in ["name = 3\n", "inner = []\n", "name = \n", "name = \"a\"\nname = \"b\"\n"] {
            let (shape, faults) = read(text);
            assert!(shape.is_none() && faults.len() == 1, "{text}: {faults:?}");
        }
        let (shape, faults) = read("colour = 1\nname = 3\n");
        assert!(shape.is_none() && faults.len() == 2, "{faults:?}");
    }

    #[test]
    fn valid_text_has_no_faults() {
        assert_eq!(read("name = \"a\"\n"), (Some(Shape { name: "a".into(), inner: Vec::new() }), Vec::new()));
    }
}
