//! What of the state is sent, so that another release understands it.

use std::collections::BTreeMap;

use thiserror::Error;

/// A switch of devices that changes what they send, such as `virtio-mem.x-early-migration`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Property {
    /// Kind of device, a dot, and the name.
    pub name: &'static str,
    /// The value in this release.
    pub default: bool,
}

/// What an older release was: properties that it had otherwise or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompatLevel {
    /// Its name, such as a machine type's version.
    pub name: &'static str,
    /// Properties and what they were before the next newer level.
    pub sets: &'static [(&'static str, bool)],
}

/// Why properties are not as they were asked for; nothing was changed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PropertyError {
    /// No device has it.
    #[error("unknown property {0:?}")]
    Unknown(String),
    /// No such level.
    #[error("unknown compatibility level {name:?}; known are {known}")]
    UnknownLevel {
        /// What was asked for.
        name: String,
        /// The names of all levels.
        known: String,
    },
}

/// The properties of a VM's devices. Both sides of a migration must have the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Properties {
    values: BTreeMap<&'static str, bool>,
}

impl Properties {
    /// Properties as they are in this release.
    pub fn new(known: &[Property]) -> Self {
        Self { values: known.iter().map(|property| (property.name, property.default)).collect() }
    }

    /// Makes them what they were at the level `name`: as it says, and all newer levels before it.
    /// `levels` starts with the newest.
    ///
    /// # Errors
    ///
    /// When there is no such level, or a level names a property that is not known.
    pub fn apply_level(&mut self, levels: &[CompatLevel], name: &str) -> Result<(), PropertyError> {
        let Some(index) = levels.iter().position(|level| level.name == name) else {
            let known = levels.iter().map(|level| level.name).collect::<Vec<_>>().join(", ");
            return Err(PropertyError::UnknownLevel { name: name.to_owned(), known });
        };
        let mut changed = self.clone();
        for &(property, value) in levels[..=index].iter().flat_map(|level| level.sets) {
            changed.set(property, value)?;
        }
        *self = changed;
        Ok(())
    }

    /// Sets one.
    ///
    /// # Errors
    ///
    /// When it is not known.
    pub fn set(&mut self, name: &str, value: bool) -> Result<(), PropertyError> {
        let known = self.values.get_mut(name);
        *known.ok_or_else(|| PropertyError::Unknown(name.to_owned()))? = value;
        Ok(())
    }

    /// Whether it is known.
    pub fn knows(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// Whether it is on; false of one that is not known.
    pub fn is_on(&self, name: &str) -> bool {
        self.values.get(name).copied().unwrap_or(false)
    }

    /// Whether a condition holds.
    pub(super) fn allow(&self, condition: Option<(&'static str, bool)>) -> bool {
        condition.is_none_or(|(name, value)| self.is_on(name) == value)
    }
}
