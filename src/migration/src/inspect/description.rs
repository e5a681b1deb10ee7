//! The JSON description at the end of a file: what is in the sections of devices.
//!
//! It is found as QEMU's `scripts/analyze-migration.py` finds it, from the end of the file, since
//! it is needed before the first section that it describes.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Arc;

use memchr::{memchr, memrchr_iter};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Number;

use crate::stream::{DESCRIPTION_MAX, TARGET_PAGE_SIZE};

/// Type of the record, as in `stream/record.rs`.
const DESCRIPTION: u8 = 0x06;
/// Type and length of the record, before its text.
const HEAD: usize = 5;
/// What a copy with fixed block sizes may have appended, bytes.
const TAIL_MAX: usize = 4096;
/// How much of the end of a file is looked at first, bytes: most descriptions and what may follow
/// them. Then so many times as much.
const REACH: u64 = 64 << 10;
const REACH_FACTOR: u64 = 16;
/// Places that look like the record and are tried, so that a file full of them takes no longer.
const TRIES: usize = 16;
/// Objects in a description: a large VM's has some thousands.
const OBJECTS_MAX: usize = 1 << 18;

/// The description of a file.
#[derive(Debug)]
pub(super) struct Description {
    /// Where its record starts in the file.
    pub offset: u64,
    /// Bytes of its text.
    pub len: u64,
    devices: HashMap<(Arc<str>, u64), Shape>,
}

/// What is described: a device, a structure in it, or a field.
///
/// QEMU writes the parts of a field of type "tmp" or "vstruct" into the field's own object, so
/// that one shape serves all three. It may write the same name twice in an object; the last holds.
#[derive(Clone, Debug, Default)]
pub(super) struct Shape {
    /// Name of the device or the field.
    pub name: Arc<str>,
    /// Instance of the device.
    pub instance_id: u64,
    /// Name of the structure.
    pub vmsd_name: Arc<str>,
    /// Version of the structure.
    pub version: u64,
    /// Type of the field.
    pub kind: Arc<str>,
    /// Bytes of the field, of one element when it is an array.
    pub size: Option<u64>,
    /// Place in an array whose elements are described one by one.
    pub index: Option<u64>,
    /// Elements of an array that is described at once.
    pub array_len: Option<u64>,
    /// What is in a structure, in order.
    pub fields: Vec<Shape>,
    /// Its subsections, in order; only those that were sent.
    pub subsections: Vec<Shape>,
    /// What is in a field of type "struct".
    pub inner: Option<Box<Shape>>,
}

/// The outermost object.
#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    page_size: Option<u64>,
    devices: Vec<Shape>,
}

impl Description {
    /// Looks for the description at the end of a file of `len` bytes. `None` when it has none.
    pub fn find(file: &mut (impl Read + Seek), len: u64) -> io::Result<Option<Self>> {
        let most = len.min(DESCRIPTION_MAX + (HEAD + TAIL_MAX) as u64);
        let mut reach = most.min(REACH);
        loop {
            let start = file.seek(SeekFrom::Start(len - reach))?;
            let mut tail = Vec::new();
            file.take(reach).read_to_end(&mut tail)?;
            let found = Self::find_in(&tail, start);
            if found.is_some() || reach == most || ends_without(&tail) {
                return Ok(found);
            }
            reach = most.min(reach * REACH_FACTOR);
        }
    }

    /// Looks for the description in the `tail` of a file, which begins at `start`.
    fn find_in(tail: &[u8], start: u64) -> Option<Self> {
        candidates(tail).take(TRIES).find_map(|(at, text)| {
            let document = parse(text)?;
            let (offset, len) = (start + at as u64, text.len() as u64);
            let key = |shape: &Shape| (shape.name.clone(), shape.instance_id);
            let devices = document.devices.into_iter().map(|shape| (key(&shape), shape));
            Some(Self { offset, len, devices: devices.collect() })
        })
    }

    /// What is in the section of a device.
    pub fn device(&self, name: &str, instance_id: u32) -> Option<&Shape> {
        self.devices.get(&(name.into(), instance_id.into()))
    }
}

/// Whether no description ends near the end of `tail`, however long it may be.
fn ends_without(tail: &[u8]) -> bool {
    memchr(b'}', &tail[tail.len().saturating_sub(TAIL_MAX + 1)..]).is_none()
}

/// Places that look like the record, the last first, each with what would be its text.
fn candidates(tail: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let places = &tail[..tail.len().saturating_sub(HEAD)];
    memrchr_iter(DESCRIPTION, places).filter_map(|at| {
        let (head, rest) = tail[at..].split_at(HEAD);
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        let text = rest.get(..usize::try_from(len).ok()?)?;
        let ends = rest.len() - text.len() <= TAIL_MAX;
        (ends && text.starts_with(b"{") && text.ends_with(b"}")).then_some((at, text))
    })
}

fn parse(text: &[u8]) -> Option<Document> {
    let objects = text.iter().filter(|byte| **byte == b'{').count();
    let document: Document =
        (objects <= OBJECTS_MAX).then(|| serde_json::from_slice(text).ok())??;
    // Streams of machines with other pages have another RAM section, too.
    document.page_size.is_none_or(|size| size == TARGET_PAGE_SIZE).then_some(document)
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ShapeVisitor)
    }
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = Shape;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a device, a structure or a field")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Shape, A::Error> {
        let mut shape = Shape::default();
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "name" => shape.name = map.next_value::<String>()?.into(),
                "vmsd_name" => shape.vmsd_name = map.next_value::<String>()?.into(),
                "type" => shape.kind = map.next_value::<String>()?.into(),
                "instance_id" => shape.instance_id = number(&mut map)?.unwrap_or(0),
                "version" => shape.version = number(&mut map)?.unwrap_or(0),
                "size" => shape.size = number(&mut map)?,
                "index" => shape.index = number(&mut map)?,
                "array_len" => shape.array_len = number(&mut map)?,
                "fields" => shape.fields = map.next_value()?,
                "subsections" => shape.subsections = map.next_value()?,
                "struct" => shape.inner = Some(map.next_value()?),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(shape)
    }
}

/// A number that is not negative; QEMU's own are none or small.
fn number<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<u64>, A::Error> {
    map.next_value::<Number>().map(|number| number.as_u64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn file(text: &str, tail: &[u8]) -> Vec<u8> {
        let mut bytes = vec![DESCRIPTION; 40];
        bytes.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
        bytes.extend(text.as_bytes());
        bytes.extend(tail);
        bytes
    }

    fn find(bytes: &[u8]) -> Option<Description> {
        Description::find(&mut Cursor::new(bytes), bytes.len() as u64).unwrap()
    }

    #[test]
    fn it_is_found_at_the_end_and_near_it() {
        let text = r#"{"page_size":4096,"devices":[{"name":"a","instance_id":1,"fields":[]}]}"#;
        for tail in [0, 1, TAIL_MAX] {
            let found = find(&file(text, &vec![0; tail])).unwrap();
            assert_eq!((found.offset, found.len), (39, text.len() as u64));
            assert!(found.device("a", 1).is_some() && found.device("a", 0).is_none());
        }
        assert!(find(&file(text, &vec![0; TAIL_MAX + 1])).is_none());
        assert!(find(&file(&text[..text.len() - 1], b"")).is_none());
        assert!(find(&file(&text.replace("4096", "65536"), b"")).is_none());
        assert!(find(b"").is_none());
    }

    /// Counts the bytes that are read.
    struct Counting<'a>(Cursor<&'a [u8]>, u64);

    impl Read for Counting<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let read = self.0.read(buf)?;
            self.1 += read as u64;
            Ok(read)
        }
    }

    impl Seek for Counting<'_> {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.0.seek(to)
        }
    }

    #[test]
    fn no_more_is_read_of_a_long_file_than_a_short_description_takes() {
        let text = r#"{"devices":[{"name":"a"}]}"#;
        let mut long = vec![0; 8 << 20];
        long.extend(file(text, b""));
        let mut counting = Counting(Cursor::new(&long), 0);
        let found = Description::find(&mut counting, long.len() as u64).unwrap().unwrap();
        assert_eq!((found.len, found.offset), (text.len() as u64, (8 << 20) + 39));
        assert_eq!(counting.1, REACH);
    }

    #[test]
    fn no_more_is_read_of_a_file_that_cannot_end_with_a_description() {
        let mut cut = file(r#"{"devices":[{"name":"a"}]}"#, b"");
        cut.resize(8 << 20, 0);
        let mut counting = Counting(Cursor::new(&cut), 0);
        assert!(Description::find(&mut counting, cut.len() as u64).unwrap().is_none());
        assert_eq!(counting.1, REACH);
    }

    #[test]
    fn a_description_of_any_length_is_found() {
        for len in [REACH, 2 * REACH, REACH * REACH_FACTOR, 4 << 20] {
            let text =
                format!(r#"{{"devices":[{{"name":"a","x":"{}"}}]}}"#, "y".repeat(len as usize));
            let found = find(&file(&text, &[0; TAIL_MAX])).unwrap();
            assert_eq!((found.len, found.offset), (text.len() as u64, 39));
            assert!(found.device("a", 0).is_some());
        }
    }

    #[test]
    fn a_name_that_comes_twice_is_no_error() {
        let text = r#"{"devices":[{"name":"a","version":1,"version":2,"x":{"y":[1,-2.5]}}]}"#;
        assert_eq!(find(&file(text, b"")).unwrap().device("a", 0).unwrap().version, 2);
    }

    #[test]
    fn deep_and_numerous_descriptions_are_refused() {
        let deep = format!(r#"{{"devices":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
        assert!(find(&file(&deep, b"")).is_none());
        let objects = "{},".repeat(OBJECTS_MAX);
        assert!(find(&file(&format!(r#"{{"devices":[{objects}{{}}]}}"#), b"")).is_none());
    }
}
