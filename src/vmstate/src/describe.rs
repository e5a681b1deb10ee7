//! The description of what was saved, as QEMU's `scripts/analyze-migration.py` reads it.

use serde_json::{Value, json};

/// A field: its name, type and the bytes of an element; `array_len` of one whose elements are
/// described at once.
pub(super) fn field(name: &str, kind: &str, size: u64, array_len: Option<u64>) -> Value {
    let mut field = json!({ "name": name, "type": kind, "size": size });
    if let (Some(len), Some(object)) = (array_len, field.as_object_mut()) {
        object.insert("array_len".to_owned(), len.into());
    }
    field
}

/// A structure within another; `index` of one in an array.
pub(super) fn structure(name: &str, size: u64, index: Option<u64>, inner: Value) -> Value {
    let mut field = json!({ "name": name, "type": "struct", "size": size, "struct": inner });
    if let (Some(index), Some(object)) = (index, field.as_object_mut()) {
        object.insert("index".to_owned(), index.into());
    }
    field
}

/// What is in a section, structure or subsection.
pub(super) fn contents(
    name: &str,
    version: u32,
    fields: Vec<Value>,
    subsections: Vec<Value>,
) -> Value {
    let mut contents = json!({ "vmsd_name": name, "version": version, "fields": fields });
    if let (false, Some(object)) = (subsections.is_empty(), contents.as_object_mut()) {
        object.insert("subsections".to_owned(), subsections.into());
    }
    contents
}
