//! TOML that people write, read so that one run tells everything that is wrong with it.

use std::ops::Range;

use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

use super::Faults;

/// How serde begins its words about a key that no field of a `deny_unknown_fields` shape has.
const UNKNOWN: &str = "unknown field";

/// The shape in a text. An unknown key is a fault and is then left out, so that the others, and whatever is wrong with the
/// values, are told in the same run. Any other fault of the shape ends the reading: there is no value to look at.
pub(crate) fn read_toml<T: DeserializeOwned>(place: &str, text: &str, faults: &mut Faults) -> Option<T> {
    let mut document = faults.note(place, DeTable::parse(text))?;
    loop {
        let mut error = match T::deserialize(toml::Deserializer::from(document.clone())) {
            Ok(shape) => return Some(shape),
            Err(error) => error,
        };
        // With the text the message shows the line.
        error.set_input(Some(text));
        faults.add(place, error.to_string().trim_end());
        let unknown = error.span().filter(|_| error.message().starts_with(UNKNOWN))?;
        if !leave_out(document.get_mut(), &unknown) {
            return None;
        }
    }
}

/// Takes the key that stands there out of the table; `false` if there is none.
fn leave_out(table: &mut DeTable<'_>, at: &Range<usize>) -> bool {
    let here = table.keys().find(|key| key.span() == *at).map(|key| key.get_ref().to_string());
    match here {
        Some(key) => table.remove(key.as_str()).is_some(),
        None => table.iter_mut().any(|(_, value)| leave_out_below(value.get_mut(), at)),
    }
}

fn leave_out_below(value: &mut DeValue<'_>, at: &Range<usize>) -> bool {
    match value {
        DeValue::Table(table) => leave_out(table, at),
        DeValue::Array(items) => items.iter_mut().any(|item| leave_out_below(item.get_mut(), at)),
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
    fn every_unknown_key_is_told_with_its_line_and_the_rest_is_read() {
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
    fn what_cannot_be_read_ends_the_reading() {
        for text in ["name = 3\n", "inner = []\n", "name = \n", "name = \"a\"\nname = \"b\"\n"] {
            let (shape, faults) = read(text);
            assert!(shape.is_none() && faults.len() == 1, "{text}: {faults:?}");
        }
        let (shape, faults) = read("colour = 1\nname = 3\n");
        assert!(shape.is_none() && faults.len() == 2, "{faults:?}");
    }

    #[test]
    fn a_right_text_has_no_fault() {
        assert_eq!(read("name = \"a\"\n"), (Some(Shape { name: "a".into(), inner: Vec::new() }), Vec::new()));
    }
}
