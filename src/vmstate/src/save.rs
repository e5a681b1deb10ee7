//! State into bytes.

use serde_json::Value;

use super::access::{Access, Number, Sequence};
use super::describe;
use super::description::{Field, Kind, Text, VmState};
use super::error::{Place, Problem, Reason, VmStateError};
use super::nested::Fault;
use super::properties::Properties;
use crate::wire::{SUBSECTION, WireWrite};

/// Where state is saved to, and what decides on its parts.
pub struct Saver<'a> {
    pub(super) properties: &'a Properties,
    pub(super) out: &'a mut Vec<u8>,
}

impl<T: 'static> VmState<T> {
    /// Appends `state`, without a header, and returns what was written as QEMU's analyser wants it
    /// described.
    ///
    /// # Errors
    ///
    /// When `pre_save` refuses, or the state does not agree with itself.
    pub fn save(
        &self,
        state: &mut T,
        properties: &Properties,
        out: &mut Vec<u8>,
    ) -> Result<Value, VmStateError> {
        self.save_to(state, &mut Saver { properties, out })
    }

    /// Whether it is sent at all.
    pub(super) fn is_sent(&self, state: &T, properties: &Properties) -> bool {
        properties.allow(self.condition) && self.needed.is_none_or(|needed| needed(state))
    }

    /// Whether a field is there in `version`.
    pub(super) fn has(&self, field: &Field<T>, version: u32, properties: &Properties) -> bool {
        field.since <= version && properties.allow(field.condition)
    }

    pub(super) fn error(
        &self,
        field: Option<&'static str>,
        offset: u64,
        problem: impl Into<Problem>,
    ) -> VmStateError {
        let place = Place { device: String::new(), section: self.name, field, offset };
        VmStateError { place, problem: problem.into() }
    }

    /// What is wrong with a structure, with its place: that of the field, or one within it.
    pub(super) fn named(&self, field: &'static str, offset: u64, fault: Fault) -> VmStateError {
        match fault {
            Fault::Field(problem) => self.error(Some(field), offset, problem),
            Fault::Within(error) => error,
        }
    }

    /// The error of a hook that refused.
    pub(super) fn refused(&self, offset: u64, hook: &'static str, reason: Reason) -> VmStateError {
        self.error(None, offset, Problem::Hook { hook, reason })
    }

    pub(super) fn save_to(
        &self,
        state: &mut T,
        saver: &mut Saver<'_>,
    ) -> Result<Value, VmStateError> {
        if let Some(hook) = self.pre_save {
            let offset = saver.out.len() as u64;
            hook(state).map_err(|reason| self.refused(offset, "pre_save", reason))?;
        }
        let mut fields = Vec::new();
        for field in self.fields {
            if self.has(field, self.version, saver.properties) {
                self.save_field(field, state, saver, &mut fields)?;
            }
        }
        let mut subsections = Vec::new();
        for &subsection in self.subsections {
            if subsection.is_sent(state, saver.properties) {
                saver.out.put_u8(SUBSECTION);
                saver.out.put_name(subsection.name);
                saver.out.put_be32(subsection.version);
                subsections.push(subsection.save_to(state, saver)?);
            }
        }
        Ok(describe::contents(self.name, self.version, fields, subsections))
    }

    fn save_field(
        &self,
        field: &Field<T>,
        state: &mut T,
        saver: &mut Saver<'_>,
        described: &mut Vec<Value>,
    ) -> Result<(), VmStateError> {
        let (name, start) = (field.name, saver.out.len() as u64);
        let saved = match &field.kind {
            Kind::Bool(access) => Ok(value(name, access, state, saver)),
            Kind::U8(access) => Ok(value(name, access, state, saver)),
            Kind::U16(access) => Ok(value(name, access, state, saver)),
            Kind::U32(access) => Ok(value(name, access, state, saver)),
            Kind::U64(access) => Ok(value(name, access, state, saver)),
            Kind::I8(access) => Ok(value(name, access, state, saver)),
            Kind::I16(access) => Ok(value(name, access, state, saver)),
            Kind::I32(access) => Ok(value(name, access, state, saver)),
            Kind::I64(access) => Ok(value(name, access, state, saver)),
            Kind::F64(access) => Ok(value(name, access, state, saver)),
            Kind::Text(text) => text.put(state, saver).map(|count| {
                described.push(describe::field(&format!("{name}_len"), "uint32", 4, None));
                describe::field(name, "buffer", count, None)
            }),
            Kind::Bytes(sequence) => sequence
                .put(state, saver, |count| count)
                .map(|count| describe::field(name, "buffer", count, None)),
            Kind::ArrayU16(sequence) => array(name, sequence, state, saver),
            Kind::ArrayU32(sequence) => array(name, sequence, state, saver),
            Kind::ArrayU64(sequence) => array(name, sequence, state, saver),
            Kind::Bitmap(sequence) => sequence
                .put(state, saver, |bits| bits.div_ceil(64))
                .map(|words| describe::field(name, "bitmap", words * 8, None)),
            Kind::Nested(nested) => {
                let saved = nested.save(name, state, saver, described);
                return saved.map_err(|fault| self.named(name, start, fault));
            }
            Kind::Unused(len) => {
                let end = saver.out.len() + usize::try_from(*len).unwrap_or(0);
                saver.out.resize(end, 0);
                Ok(describe::field(name, "unused_buffer", *len, None))
            }
            Kind::Recomputed | Kind::NotSent => return Ok(()),
        };
        let saved = saved.map_err(|problem| self.error(Some(name), start, problem))?;
        // QEMU's analyser reads an element of an array wherever one is described.
        if saved["array_len"] != 0 {
            described.push(saved);
        }
        Ok(())
    }
}

fn value<T, V: Number>(
    name: &str,
    access: &Access<T, V>,
    state: &T,
    saver: &mut Saver<'_>,
) -> Value {
    (access.get())(state).put(saver.out);
    describe::field(name, V::TYPE, V::SIZE as u64, None)
}

fn array<T, V: Number>(
    name: &str,
    sequence: &Sequence<T, V>,
    state: &T,
    saver: &mut Saver<'_>,
) -> Result<Value, Problem> {
    let count = sequence.put(state, saver, |count| count)?;
    Ok(describe::field(name, V::TYPE, V::SIZE as u64, Some(count)))
}

impl<T> Text<T> {
    /// Appends it, and returns how many bytes of text it has.
    fn put(&self, state: &T, saver: &mut Saver<'_>) -> Result<u64, Problem> {
        let text = (self.access.get())(state);
        let len = u32::try_from(text.len()).ok().filter(|len| *len <= self.limit);
        let Some(len) = len else {
            return Err(Problem::TooMany { count: text.len() as u64, limit: self.limit.into() });
        };
        saver.out.put_be32(len);
        saver.out.put(text.as_bytes());
        Ok(len.into())
    }
}

impl<T, V: Number> Sequence<T, V> {
    /// Appends the elements that `stored` makes of the count, and returns their number.
    fn put(
        &self,
        state: &T,
        saver: &mut Saver<'_>,
        stored: fn(u64) -> u64,
    ) -> Result<u64, Problem> {
        let count = stored(self.count.of(state)?);
        let values = (self.access.get())(state);
        if values.len() as u64 != count {
            return Err(Problem::Length { held: values.len(), count });
        }
        saver.out.reserve(values.len() * V::SIZE);
        values.iter().for_each(|value| value.put(saver.out));
        Ok(count)
    }
}
