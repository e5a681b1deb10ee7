//! Bytes into state.

use super::access::{Access, Number, Sequence, SliceAccess};
use super::description::{Field, Kind, Text, VmState};
use super::error::{Problem, VmStateError};
use super::properties::Properties;
use crate::wire::{SUBSECTION, WireError, WireRead};

/// Where state is loaded from, and what decides on its parts.
pub struct Loader<'a> {
    pub(super) properties: &'a Properties,
    pub(super) reader: &'a mut dyn WireRead,
}

/// Compares what was read with what the rest of the state makes it.
type Check<T> = Box<dyn Fn(&T) -> Result<(), Problem>>;

/// What a derived field held, to be compared once everything is known.
struct Claim<T> {
    field: &'static str,
    offset: u64,
    check: Check<T>,
}

impl<T: 'static> VmState<T> {
    /// Loads what [`save`](Self::save) wrote as `version` into `state`, which is what the device
    /// is now: a copy, worthless after an error.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, with its place.
    pub fn load(
        &self,
        state: &mut T,
        version: u32,
        properties: &Properties,
        reader: &mut dyn WireRead,
    ) -> Result<(), VmStateError> {
        self.load_from(state, version, &mut Loader { properties, reader })
    }

    pub(super) fn load_from(
        &self,
        state: &mut T,
        version: u32,
        loader: &mut Loader<'_>,
    ) -> Result<(), VmStateError> {
        let start = loader.reader.offset();
        if version > self.version || version < self.minimum_version {
            let (minimum, maximum) = (self.minimum_version, self.version);
            let problem = Problem::Version { found: version, minimum, maximum };
            return Err(self.error(None, start, problem));
        }
        if let Some(hook) = self.pre_load {
            hook(state).map_err(|reason| self.refused(start, "pre_load", reason))?;
        }
        let mut claims = Vec::new();
        for field in self.fields {
            if self.has(field, version, loader.properties) {
                self.load_field(field, state, loader, &mut claims)?;
            }
        }
        self.load_subsections(state, loader)?;
        if let Some(hook) = self.post_load {
            let end = loader.reader.offset();
            hook(state, version).map_err(|reason| self.refused(end, "post_load", reason))?;
        }
        claims.into_iter().try_for_each(|Claim { field, offset, check }| {
            check(state).map_err(|problem| self.error(Some(field), offset, problem))
        })
    }

    fn load_field(
        &self,
        field: &Field<T>,
        state: &mut T,
        loader: &mut Loader<'_>,
        claims: &mut Vec<Claim<T>>,
    ) -> Result<(), VmStateError> {
        let (name, offset) = (field.name, loader.reader.offset());
        let loaded = match &field.kind {
            Kind::Bool(access) => load_value(access, name, state, loader),
            Kind::U8(access) => load_value(access, name, state, loader),
            Kind::U16(access) => load_value(access, name, state, loader),
            Kind::U32(access) => load_value(access, name, state, loader),
            Kind::U64(access) => load_value(access, name, state, loader),
            Kind::I8(access) => load_value(access, name, state, loader),
            Kind::I16(access) => load_value(access, name, state, loader),
            Kind::I32(access) => load_value(access, name, state, loader),
            Kind::I64(access) => load_value(access, name, state, loader),
            Kind::F64(access) => load_value(access, name, state, loader),
            Kind::Text(text) => text.load(name, state, loader),
            Kind::Bytes(sequence) => sequence.load(name, state, loader),
            Kind::ArrayU16(sequence) => sequence.load(name, state, loader),
            Kind::ArrayU32(sequence) => sequence.load(name, state, loader),
            Kind::ArrayU64(sequence) => sequence.load(name, state, loader),
            Kind::Bitmap(sequence) => sequence.load_bitmap(name, state, loader),
            Kind::Nested(nested) => {
                return nested.load(state, loader).map_err(|fault| self.named(name, offset, fault));
            }
            Kind::Unused(len) => {
                loader.reader.skip(*len, name).map(|()| None).map_err(Problem::from)
            }
            Kind::Recomputed | Kind::NotSent => Ok(None),
        };
        let check = loaded.map_err(|problem| self.error(Some(name), offset, problem))?;
        claims.extend(check.map(|check| Claim { field: name, offset, check }));
        Ok(())
    }

    fn load_subsections(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), VmStateError> {
        let mut came = vec![false; self.subsections.len()];
        loop {
            let offset = loader.reader.offset();
            let name = next_subsection(loader.reader, self.name)
                .map_err(|error| self.error(None, offset, error))?;
            let Some(name) = name else { return Ok(()) };
            let Some(index) = self.subsections.iter().position(|sub| sub.name == name) else {
                return Err(self.error(None, offset, Problem::UnknownSubsection(name)));
            };
            let subsection = self.subsections[index];
            if std::mem::replace(&mut came[index], true) {
                return Err(subsection.error(None, offset, Problem::Twice));
            }
            let version = loader.reader.be32("the version of a subsection");
            let version = version.map_err(|error| subsection.error(None, offset, error))?;
            subsection.load_from(state, version, loader)?;
        }
    }
}

/// Takes the head of a subsection, if one of those whose names start with `parent` comes next.
/// Anything else may be the next field of an outer structure.
fn next_subsection(reader: &mut dyn WireRead, parent: &str) -> Result<Option<String>, WireError> {
    const HEAD: usize = 2;
    if !has_ahead(reader, HEAD)? {
        return Ok(None);
    }
    let (kind, len) = (reader.buffered()[0], usize::from(reader.buffered()[1]));
    if kind != SUBSECTION || len <= parent.len() || !has_ahead(reader, HEAD + len)? {
        return Ok(None);
    }
    let name = &reader.buffered()[HEAD..HEAD + len];
    if !name.starts_with(parent.as_bytes()) {
        return Ok(None);
    }
    let name = String::from_utf8_lossy(name).into_owned();
    reader.take(HEAD + len);
    Ok(Some(name))
}

/// Whether so many bytes follow; a section may be the last thing there is.
fn has_ahead(reader: &mut dyn WireRead, len: usize) -> Result<bool, WireError> {
    let (offset, what) = (reader.offset(), "a subsection");
    while reader.buffered().len() < len {
        if !reader.read_ahead().map_err(|source| WireError::Io { offset, what, source })? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What is to be compared later, if anything.
type Loaded<T> = Result<Option<Check<T>>, Problem>;

fn load_value<T: 'static, V: Number>(
    access: &Access<T, V>,
    name: &'static str,
    state: &mut T,
    loader: &mut Loader<'_>,
) -> Loaded<T> {
    let found = V::take(loader.reader, name)?;
    give(access, found, state, V::same)
}

/// Gives a value to what its role asks for.
fn give<T: 'static, V: std::fmt::Display + 'static>(
    access: &Access<T, V>,
    found: V,
    state: &mut T,
    same: fn(&V, &V) -> bool,
) -> Loaded<T> {
    match *access {
        Access::Mutable(_, set) => set(state, found),
        Access::Immutable(get) => {
            let expected = get(state);
            if !same(&found, &expected) {
                let (found, expected) = (found.to_string(), expected.to_string());
                return Err(Problem::Immutable { found, expected });
            }
        }
        Access::Derived(_) => {}
        Access::DerivedChecked(get) => {
            return Ok(Some(Box::new(move |state| {
                let expected = get(state);
                if same(&found, &expected) {
                    return Ok(());
                }
                let (found, expected) = (found.to_string(), expected.to_string());
                Err(Problem::Derived { found, expected })
            })));
        }
    }
    Ok(None)
}

impl<T: 'static> Text<T> {
    fn load(&self, name: &'static str, state: &mut T, loader: &mut Loader<'_>) -> Loaded<T> {
        let len = loader.reader.be32(name)?;
        let offset = loader.reader.offset();
        let bytes = loader.reader.bytes(len.into(), self.limit.into(), name)?;
        let text = String::from_utf8(bytes);
        let text = text.map_err(|_| WireError::NotText { offset, what: name })?;
        give(&self.access, text, state, String::eq)
    }
}

impl<T: 'static, V: Number> Sequence<T, V> {
    fn load(&self, name: &'static str, state: &mut T, loader: &mut Loader<'_>) -> Loaded<T> {
        let found = take_all(loader.reader, self.count.of(state)?, name)?;
        self.give(found, state)
    }

    /// Gives a value to what its role asks for.
    fn give(&self, found: Vec<V>, state: &mut T) -> Loaded<T> {
        match self.access {
            SliceAccess::Mutable(_, set) => set(state, found),
            SliceAccess::Immutable(get) => {
                if let Some((found, expected)) = difference(&found, get(state)) {
                    return Err(Problem::Immutable { found, expected });
                }
            }
            SliceAccess::Derived(_) => {}
            SliceAccess::DerivedChecked(get) => {
                return Ok(Some(Box::new(move |state| match difference(&found, get(state)) {
                    None => Ok(()),
                    Some((found, expected)) => Err(Problem::Derived { found, expected }),
                })));
            }
        }
        Ok(None)
    }
}

impl<T: 'static> Sequence<T, u64> {
    fn load_bitmap(&self, name: &'static str, state: &mut T, loader: &mut Loader<'_>) -> Loaded<T> {
        let bits = self.count.of(state)?;
        let found: Vec<u64> = take_all(loader.reader, bits.div_ceil(64), name)?;
        let tail = bits % 64;
        if let Some(last) = found.last().filter(|last| tail != 0 && **last >> tail != 0) {
            let bit = bits - tail + u64::from((last >> tail << tail).trailing_zeros());
            return Err(Problem::BitsBeyond { bit, bits });
        }
        self.give(found, state)
    }
}

/// Reads so many numbers; one that lies about their number costs no more than it sends.
fn take_all<V: Number>(
    reader: &mut dyn WireRead,
    count: u64,
    name: &'static str,
) -> Result<Vec<V>, Problem> {
    const AT_ONCE: u64 = 64 << 10;
    let mut values = Vec::with_capacity(count.min(AT_ONCE) as usize);
    for _ in 0..count {
        values.push(V::take(reader, name)?);
    }
    Ok(values)
}

/// The first element in which two sequences differ, or their lengths.
fn difference<V: Number>(found: &[V], expected: &[V]) -> Option<(String, String)> {
    if found.len() != expected.len() {
        let elements = |values: &[V]| format!("{} elements", values.len());
        return Some((elements(found), elements(expected)));
    }
    let mut pairs = found.iter().zip(expected).enumerate();
    let (index, (found, expected)) = pairs.find(|(_, (found, expected))| found != expected)?;
    Some((format!("[{index}] {found}"), format!("[{index}] {expected}")))
}
