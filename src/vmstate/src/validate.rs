//! What a description must be, whatever is in the state.

use std::collections::BTreeSet;
use std::fmt;

use super::access::Role;
use super::description::{Field, Kind, Priority, VmState};
use super::properties::Properties;

/// Something wrong with a description, to be found by a test and not by a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    /// Name of the section, structure or subsection.
    pub section: &'static str,
    /// What is wrong.
    pub what: String,
}

impl Flaw {
    pub(super) fn new(section: &'static str, what: impl Into<String>) -> Self {
        Self { section, what: what.into() }
    }
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.section, self.what)
    }
}

/// Names are sent with a length of one byte.
pub const NAME_MAX: usize = 255;
/// QEMU keeps the version of a subsection in a byte.
const VERSION_MAX: u32 = 255;

impl<T: 'static> VmState<T> {
    /// Everything that is wrong with the description of a section, and with what is in it.
    pub fn validate(&self, properties: &Properties) -> Vec<Flaw> {
        let mut flaws = Vec::new();
        self.own_flaws(properties, &mut flaws);
        flaws
    }

    /// The flaws of a description that is part of another.
    pub(super) fn inner_flaws(&self, properties: &Properties, flaws: &mut Vec<Flaw>) {
        if self.early || self.priority != Priority::Default {
            flaws.push(Flaw::new(self.name, "only a section is early or has a priority"));
        }
        self.own_flaws(properties, flaws);
    }

    fn own_flaws(&self, properties: &Properties, flaws: &mut Vec<Flaw>) {
        let name = self.name;
        let mut flaw = |what: String| flaws.push(Flaw::new(name, what));
        if name.is_empty() || name.len() > NAME_MAX {
            flaw(format!("the name has {} bytes, not 1 to {NAME_MAX}", name.len()));
        }
        if self.minimum_version > self.version {
            let (minimum, version) = (self.minimum_version, self.version);
            flaw(format!("minimum version {minimum} is above version {version}"));
        }
        if self.version > VERSION_MAX {
            flaw(format!("version {} is above {VERSION_MAX}", self.version));
        }
        let conditions = self.fields.iter().map(|field| field.condition).chain([self.condition]);
        for (property, _) in conditions.flatten() {
            if !properties.knows(property) {
                flaw(format!("property {property:?} is not known"));
            }
        }
        self.field_flaws(&mut flaw);
        self.subsection_flaws(&mut flaw);
        for field in self.fields {
            if let Kind::Nested(nested) = &field.kind {
                nested.flaws(properties, flaws);
            }
        }
        for subsection in self.subsections {
            subsection.inner_flaws(properties, flaws);
        }
    }

    fn field_flaws(&self, flaw: &mut impl FnMut(String)) {
        let mut names = BTreeSet::new();
        for field in self.fields {
            let field_name = field.name;
            if field_name.is_empty() {
                flaw("a field has no name".to_owned());
            }
            // One name may stand for one value in several versions or places.
            let unused = field.role() == Role::Unused;
            if !unused && !names.insert((field_name, field.since, field.condition)) {
                flaw(format!("field {field_name} is there twice"));
            }
            if field.since > self.version {
                let (since, version) = (field.since, self.version);
                flaw(format!("field {field_name} is of version {since}, above {version}"));
            }
            if length_of(field) == Some(0) {
                flaw(format!("field {field_name} has no bytes"));
            }
        }
        let derived =
            |field: &&Field<T>| matches!(field.role(), Role::Derived | Role::DerivedChecked);
        if let (None, Some(field)) = (self.post_load, self.fields.iter().find(derived)) {
            flaw(format!("field {} is derived, and no post_load recomputes it", field.name));
        }
    }

    fn subsection_flaws(&self, flaw: &mut impl FnMut(String)) {
        let mut names = BTreeSet::new();
        for subsection in self.subsections {
            let name = subsection.name;
            if name.strip_prefix(self.name).is_none_or(str::is_empty) {
                flaw(format!("the name of subsection {name} does not go on from its own"));
            }
            if !names.insert(name) {
                flaw(format!("subsection {name} is there twice"));
            }
            if subsection.needed.is_none() && subsection.condition.is_none() {
                flaw(format!("nothing says when subsection {name} is needed"));
            }
            // A loader of the structure would take it for one of its own.
            let takes = |field: &&Field<T>| matches!(&field.kind, Kind::Nested(nested) if name.starts_with(nested.name()));
            if let Some(field) = self.fields.iter().find(takes) {
                flaw(format!("subsection {name} would be taken by field {}", field.name));
            }
        }
    }
}

/// The most elements that a field can have, where it has any.
fn length_of<T>(field: &Field<T>) -> Option<u64> {
    match &field.kind {
        Kind::Bytes(sequence) => Some(sequence.count.limit()),
        Kind::ArrayU16(sequence) => Some(sequence.count.limit()),
        Kind::ArrayU32(sequence) => Some(sequence.count.limit()),
        Kind::ArrayU64(sequence) | Kind::Bitmap(sequence) => Some(sequence.count.limit()),
        Kind::Unused(len) => Some(*len),
        Kind::Text(text) => Some(text.limit.into()),
        _ => None,
    }
}
