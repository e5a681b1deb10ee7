//! The ranges of a region as JSON, written as they come.

use std::fmt::Write;

use management_api::Range;

use super::range_stream::{Item, List};

/// Writes one object with the lists of several answers, as wide as `serde_json` does.
#[derive(Debug)]
pub(super) struct RegionJson {
    /// The lists that have begun.
    begun: Vec<List>,
    /// Ranges of the last one.
    ranges: u64,
}

impl RegionJson {
    pub(super) fn new() -> Self {
        Self { begun: Vec::new(), ranges: 0 }
    }

    /// Writes an item.
    pub(super) fn write(&mut self, item: Item, text: &mut String) {
        match item {
            Item::Begin(list) => {
                self.end_list(text);
                self.name(list, text);
                text.push('[');
                self.begun.push(list);
                self.ranges = 0;
            }
            Item::Range(Range { offset, size }) => {
                text.push_str(if self.ranges == 0 { "\n" } else { ",\n" });
                let _ = write!(
                    text,
                    "    {{\n      \"offset\": {offset},\n      \"size\": {size}\n    }}"
                );
                self.ranges += 1;
            }
        }
    }

    /// Writes the end. Lists of which nothing was said are null.
    pub(super) fn end(mut self, text: &mut String) {
        self.end_list(text);
        for list in [List::Plugged, List::Discarded, List::Resident] {
            if !self.begun.contains(&list) {
                self.name(list, text);
                text.push_str("null");
                self.begun.push(list);
            }
        }
        text.push_str("\n}\n");
    }

    fn name(&self, list: List, text: &mut String) {
        text.push_str(if self.begun.is_empty() { "{\n" } else { ",\n" });
        let _ = write!(text, "  \"{}\": ", list.name());
    }

    fn end_list(&self, text: &mut String) {
        match (self.begun.is_empty(), self.ranges) {
            (true, _) => {}
            (false, 0) => text.push(']'),
            (false, _) => text.push_str("\n  ]"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn json_of(items: &[Item]) -> String {
        let mut text = String::new();
        let mut json = RegionJson::new();
        items.iter().for_each(|&item| json.write(item, &mut text));
        json.end(&mut text);
        text
    }

    #[test]
    fn it_is_what_serde_writes() {
        let range = |offset| Range { offset, size: 2 };
        let items = [
            Item::Begin(List::Plugged),
            Item::Range(range(0)),
            Item::Range(range(4)),
            Item::Begin(List::Discarded),
        ];
        let value = json!({ "plugged": [range(0), range(4)], "discarded": [], "resident": null });
        let text = json_of(&items);
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
        assert!(text.starts_with("{\n  \"plugged\": [\n    {\n      \"offset\": 0,\n"), "{text}");
        assert!(text.contains("\n    }\n  ],\n  \"discarded\": [],\n  \"resident\": null\n}\n"));
    }

    #[test]
    fn nothing_that_was_said_is_null() {
        let value: Value = serde_json::from_str(&json_of(&[])).unwrap();
        assert_eq!(value, json!({ "plugged": null, "discarded": null, "resident": null }));
    }
}
