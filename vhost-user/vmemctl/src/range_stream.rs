//! Lists of ranges in an answer of any length, taken up as they come.

use std::fmt;
use std::io::{self, BufReader, Read};

use hyper::body::Bytes;
use management_api::Range;
use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use tokio::sync::mpsc::{Receiver, Sender};

/// Items that are handed over at once.
const BATCH: usize = 1024;

/// A list of ranges that a daemon tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// What the guest may use.
    Plugged,
    /// What it may not use.
    Discarded,
    /// Where the host holds memory.
    Resident,
}

impl List {
    /// The field that has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plugged => "plugged",
            Self::Discarded => "discarded",
            Self::Resident => "resident",
        }
    }

    fn of(name: &str) -> Option<Self> {
        [Self::Plugged, Self::Discarded, Self::Resident]
            .into_iter()
            .find(|list| list.name() == name)
    }
}

/// A step of reading lists of ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// A list begins.
    Begin(List),
    /// The next range of the list that has begun.
    Range(Range),
}

/// Reads the text of an answer and hands its items over, a batch at a time. A list that is null does
/// not begin. Fields that are not lists of ranges are passed over.
pub(super) fn read(text: Receiver<Bytes>, items: Sender<Vec<Item>>) -> serde_json::Result<()> {
    let mut batches = Batches { items, batch: Vec::with_capacity(BATCH) };
    // An object of three fields is not deep, whatever else it has.
    let mut json = serde_json::Deserializer::from_reader(BufReader::new(Text::new(text)));
    json.deserialize_map(Object(&mut batches))?;
    json.end()?;
    batches.flush()
}

/// The text as it comes.
struct Text {
    chunks: Receiver<Bytes>,
    chunk: Bytes,
}

impl Text {
    fn new(chunks: Receiver<Bytes>) -> Self {
        Self { chunks, chunk: Bytes::new() }
    }
}

impl Read for Text {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            match self.chunks.blocking_recv() {
                Some(chunk) => self.chunk = chunk,
                None => return Ok(0),
            }
        }
        let len = into.len().min(self.chunk.len());
        into[..len].copy_from_slice(&self.chunk.split_to(len));
        Ok(len)
    }
}

struct Batches {
    items: Sender<Vec<Item>>,
    batch: Vec<Item>,
}

impl Batches {
    fn push<E: Error>(&mut self, item: Item) -> Result<(), E> {
        self.batch.push(item);
        if self.batch.len() < BATCH { Ok(()) } else { self.flush() }
    }

    fn flush<E: Error>(&mut self) -> Result<(), E> {
        let batch = std::mem::replace(&mut self.batch, Vec::with_capacity(BATCH));
        self.items.blocking_send(batch).map_err(|_| E::custom("it is not read any more"))
    }
}

/// The object with the lists.
struct Object<'a>(&'a mut Batches);

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with lists of ranges")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            match List::of(&name) {
                None => drop(map.next_value::<IgnoredAny>()?),
                Some(list) if seen.contains(&list) => {
                    return Err(A::Error::custom(format!("`{name}` comes twice")));
                }
                Some(list) => {
                    seen.push(list);
                    map.next_value_seed(Ranges { list, batches: self.0 })?;
                }
            }
        }
        Ok(())
    }
}

/// A list of ranges, or null.
struct Ranges<'a> {
    list: List,
    batches: &'a mut Batches,
}

impl<'de> DeserializeSeed<'de> for Ranges<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Ranges<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of ranges or null")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut ranges: A) -> Result<(), A::Error> {
        self.batches.push(Item::Begin(self.list))?;
        while let Some(range) = ranges.next_element()? {
            self.batches.push(Item::Range(range))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc::channel;

    /// What comes out of a text that comes in pieces of `size` bytes.
    fn items(text: &str, size: usize) -> (Vec<Item>, Result<(), String>) {
        let (chunks, text_end) = channel(1);
        let (sender, mut batches) = channel(1);
        let read = std::thread::spawn(move || read(text_end, sender).map_err(|e| e.to_string()));
        let pieces: Vec<_> = text.as_bytes().chunks(size).map(Bytes::copy_from_slice).collect();
        std::thread::spawn(move || {
            for piece in pieces {
                let _ = chunks.blocking_send(piece);
            }
        });
        let mut items = Vec::new();
        while let Some(batch) = batches.blocking_recv() {
            items.extend(batch);
        }
        (items, read.join().unwrap())
    }

    #[test]
    fn lists_come_out_however_the_text_is_cut() {
        let text = r#"{"plugged":[{"offset":0,"size":2},{"size":3,"offset":4}], "later":{"a":[1]},
            "discarded":[],"resident":null}"#;
        let range = |offset, size| Item::Range(Range { offset, size });
        let expected =
            [Item::Begin(List::Plugged), range(0, 2), range(4, 3), Item::Begin(List::Discarded)];
        for size in [1, 2, 7, 1000] {
            let (items, end) = items(text, size);
            assert_eq!((&items[..], end), (&expected[..], Ok(())), "in pieces of {size}");
        }
    }

    #[test]
    fn more_items_than_are_handed_over_at_once_come_in_order() {
        let text: Vec<_> = (0..5000).map(|n| format!("{{\"offset\":{n},\"size\":1}}")).collect();
        let (items, end) = items(&format!("{{\"resident\":[{}]}}", text.join(",")), 100);
        assert_eq!(end, Ok(()));
        assert_eq!(items[0], Item::Begin(List::Resident));
        assert_eq!(items.len(), 5001);
        assert_eq!(items[5000], Item::Range(Range { offset: 4999, size: 1 }));
    }

    #[test]
    fn what_is_cut_or_not_a_list_of_ranges_is_an_error() {
        for (text, expected) in [
            ("", "EOF"),
            (r#"{"plugged":[{"offset":0,"#, "EOF"),
            (r#"{"plugged":[]"#, "EOF"),
            (r#"{"plugged":[]} {"#, "trailing"),
            (r#"{"plugged":[],"plugged":[]}"#, "comes twice"),
            (r#"{"plugged":7}"#, "a list of ranges or null"),
            (r#"{"plugged":[{"offset":-1,"size":1}]}"#, "invalid value"),
            ("[]", "an object with lists of ranges"),
        ] {
            let error = items(text, 10).1.unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
