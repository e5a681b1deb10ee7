//! The state of a device, field by field, as the description has it.

use std::sync::Arc;

use vmstate::wire::{SUBSECTION, WireRead};

use super::description::Shape;
use super::error::InspectError;

/// What stands for a pointer that is null.
const NULL: u8 = b'0';
/// Values of all devices that are held.
const VALUES_MAX: u64 = 1 << 20;
/// Bytes of values that are kept as bytes, one by one and together.
const BYTES_MAX: u64 = 16 << 20;
const ALL_BYTES_MAX: u64 = 64 << 20;

/// A structure of a device's state, or the whole of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Structure {
    /// Its name in the device's code.
    pub vmsd_name: Arc<str>,
    /// Its version.
    pub version: u64,
    /// In the order of the stream.
    pub fields: Vec<SavedField>,
    /// In the order of the stream.
    pub subsections: Vec<Structure>,
}

/// A field of a structure.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedField {
    /// Its name in the device's code.
    pub name: Arc<str>,
    /// Its place, when it is an element of an array.
    pub index: Option<u64>,
    /// Its type, in QEMU's words.
    pub kind: Arc<str>,
    /// Its value.
    pub value: Value,
}

/// What a field holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// One byte, not 0 when it holds.
    Bool(bool),
    /// An unsigned number of 1, 2, 4 or 8 bytes.
    Unsigned {
        /// The number.
        value: u64,
        /// Its bytes.
        size: usize,
    },
    /// A signed number of 1, 2, 4 or 8 bytes.
    Signed {
        /// The number.
        value: i64,
        /// Its bytes.
        size: usize,
    },
    /// A floating-point number of 8 bytes.
    Float(f64),
    /// A name.
    Text(String),
    /// A pointer that is null.
    Null,
    /// Bytes of a buffer or a bitmap, or whatever is not described any further.
    Bytes(Vec<u8>),
    /// All elements of an array.
    Array(Vec<Value>),
    /// Fields of its own.
    Structure(Structure),
}

impl Structure {
    /// The bytes of all fields as they were on the stream, without those of subsections.
    pub(super) fn wire_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.fields.iter().for_each(|field| field.value.append_to(&mut bytes));
        bytes
    }
}

impl Value {
    fn append_to(&self, out: &mut Vec<u8>) {
        match self {
            Self::Bool(value) => out.push((*value).into()),
            Self::Unsigned { value, size } => out.extend(&value.to_be_bytes()[8 - size..]),
            Self::Signed { value, size } => out.extend(&value.to_be_bytes()[8 - size..]),
            Self::Float(value) => out.extend(value.to_bits().to_be_bytes()),
            Self::Text(text) => {
                out.push(text.len() as u8);
                out.extend(text.as_bytes());
            }
            Self::Null => out.push(NULL),
            Self::Bytes(bytes) => out.extend(bytes),
            Self::Array(values) => values.iter().for_each(|value| value.append_to(out)),
            Self::Structure(structure) => out.extend(structure.wire_bytes()),
        }
    }
}

/// Reads structures, and keeps count of what they hold.
#[derive(Debug)]
pub(super) struct Decoder {
    values: u64,
    bytes: u64,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { values: VALUES_MAX, bytes: ALL_BYTES_MAX }
    }
}

impl Decoder {
    /// Reads what `shape` says into `out`, which keeps what was read before an error.
    pub fn read(
        &mut self,
        reader: &mut dyn WireRead,
        shape: &Shape,
        out: &mut Structure,
    ) -> Result<(), InspectError> {
        out.vmsd_name = shape.vmsd_name.clone();
        out.version = shape.version;
        for field in &shape.fields {
            let value = match field.array_len {
                None => self.value(reader, field)?,
                Some(len) => self.array(reader, field, len)?,
            };
            let (name, kind) = (field.name.clone(), field.kind.clone());
            out.fields.push(SavedField { name, index: field.index, kind, value });
        }
        for subsection in &shape.subsections {
            self.subsection_head(reader, subsection)?;
            let mut inner = Structure::default();
            let read = self.read(reader, subsection, &mut inner);
            out.subsections.push(inner);
            read?;
        }
        Ok(())
    }

    fn subsection_head(
        &mut self,
        reader: &mut dyn WireRead,
        shape: &Shape,
    ) -> Result<(), InspectError> {
        let offset = reader.offset();
        self.count(offset)?;
        let name = shape.vmsd_name.as_ref();
        let mismatch = |what| InspectError::Mismatch { offset, what, name: name.to_owned() };
        if reader.u8("a subsection")? != SUBSECTION
            || reader.name("the name of a subsection")? != name
        {
            return Err(mismatch("the start of subsection"));
        }
        if u64::from(reader.be32("the version of a subsection")?) != shape.version {
            return Err(mismatch("the version of subsection"));
        }
        Ok(())
    }

    fn array(
        &mut self,
        reader: &mut dyn WireRead,
        shape: &Shape,
        len: u64,
    ) -> Result<Value, InspectError> {
        let mut values = Vec::new();
        for _ in 0..len {
            values.push(self.value(reader, shape)?);
        }
        Ok(Value::Array(values))
    }

    fn value(&mut self, reader: &mut dyn WireRead, shape: &Shape) -> Result<Value, InspectError> {
        let offset = reader.offset();
        self.count(offset)?;
        let parts = match (&shape.inner, &*shape.kind) {
            (Some(inner), _) => Some(&**inner),
            // Of other types, such as queues, only the parts of one element are described.
            (None, "tmp" | "vstruct") if !shape.fields.is_empty() => Some(shape),
            _ => None,
        };
        if let Some(parts) = parts {
            let mut structure = Structure::default();
            self.read(reader, parts, &mut structure)?;
            return Ok(Value::Structure(structure));
        }
        let mismatch =
            |what| InspectError::Mismatch { offset, what, name: shape.name.as_ref().to_owned() };
        let size = shape.size.ok_or_else(|| mismatch("the size of field"))?;
        let number = matches!(size, 1 | 2 | 4 | 8);
        Ok(match &*shape.kind {
            "bool" if size == 1 => Value::Bool(reader.u8("a field")? != 0),
            // "le" is a comparison, not an order of bytes.
            kind if number && kind.starts_with("int") => signed(reader, size)?,
            kind if number && kind.starts_with("uint") => unsigned(reader, size)?,
            "timer" if size == 8 => unsigned(reader, size)?,
            "float64" if size == 8 => Value::Float(f64::from_bits(reader.be64("a field")?)),
            "nullptr" if size == 1 => match reader.u8("a field")? {
                NULL => Value::Null,
                _ => return Err(mismatch("the mark of a null pointer")),
            },
            "capability" => Value::Text(reader.name("a capability")?),
            _ => {
                let what = "bytes of device state";
                self.bytes = self.bytes.checked_sub(size).ok_or(InspectError::TooMany {
                    offset,
                    what,
                    limit: ALL_BYTES_MAX,
                })?;
                Value::Bytes(reader.bytes(size, BYTES_MAX, "a field")?)
            }
        })
    }

    fn count(&mut self, offset: u64) -> Result<(), InspectError> {
        let what = "values of device state";
        let too_many = InspectError::TooMany { offset, what, limit: VALUES_MAX };
        self.values = self.values.checked_sub(1).ok_or(too_many)?;
        Ok(())
    }
}

fn unsigned(reader: &mut dyn WireRead, size: u64) -> Result<Value, InspectError> {
    let size = size as usize;
    let mut bytes = [0; 8];
    reader.read_exact(&mut bytes[8 - size..], "a field")?;
    Ok(Value::Unsigned { value: u64::from_be_bytes(bytes), size })
}

fn signed(reader: &mut dyn WireRead, size: u64) -> Result<Value, InspectError> {
    let size = size as usize;
    let mut bytes = [0; 8];
    reader.read_exact(&mut bytes[..size], "a field")?;
    // From the top, so that the shift brings the sign along.
    Ok(Value::Signed { value: i64::from_be_bytes(bytes) >> (64 - 8 * size), size })
}
