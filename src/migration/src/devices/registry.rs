//! The sections of a VM's devices, in the order in which they are saved and loaded.

use serde_json::{Map, Value};
use thiserror::Error;
use vmstate::wire::WireRead;
use vmstate::{
    Flaw, NAME_MAX, Priority, Properties, Reason, StagedState, StateSection, VmStateError,
    printable,
};

use super::{DevicePhase, DeviceSection, Devices};
use crate::error::MigrationError;
use crate::stream::SectionHeader;

/// Why a section is not registered or not loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// An id string that cannot be sent.
    #[error("id string of {0} bytes, not 1 to 255")]
    IdLength(usize),
    /// Two sections of the same id string and instance.
    #[error("{}, instance {instance_id}, is registered already", printable(.idstr))]
    Registered {
        /// Its id string.
        idstr: String,
        /// Its instance.
        instance_id: u32,
    },
    /// Its description is wrong.
    #[error("the description of {} is wrong: {}", printable(.idstr), .flaws[0])]
    Flaws {
        /// Its id string.
        idstr: String,
        /// What is wrong; at least one thing.
        flaws: Vec<Flaw>,
    },
    /// No such section.
    #[error("{}, instance {instance_id}, is not known here", printable(.idstr))]
    Unknown {
        /// Its id string.
        idstr: String,
        /// Its instance.
        instance_id: u32,
    },
    /// A property keeps this section from being sent here.
    #[error("{} is not sent with the properties of this side", printable(.0))]
    Unexpected(String),
    /// An early section after RAM, or another one before.
    #[error("{} belongs {} RAM", printable(.idstr), match .phase { DevicePhase::Early => "before", DevicePhase::Late => "after" })]
    Phase {
        /// Its id string.
        idstr: String,
        /// Where it belongs.
        phase: DevicePhase,
    },
    /// The same section again.
    #[error("{} comes twice", printable(.0))]
    Twice(String),
    /// A section that was to come before another one.
    #[error("{} (priority {late_priority:?}) must be loaded before {} ({priority:?})", printable(.late), printable(.loaded))]
    Order {
        /// The section that comes now.
        late: String,
        /// Its priority.
        late_priority: Priority,
        /// The section that was loaded already.
        loaded: String,
        /// Its priority.
        priority: Priority,
    },
    /// A section that did not come.
    #[error("{} did not come", printable(.0))]
    Missing(String),
    /// A section that did not come before RAM.
    #[error("{} did not come before RAM: do both sides have the same properties?", printable(.0))]
    MissingEarly(String),
    /// The device does not become what was loaded.
    #[error("{}: {reason}", printable(.idstr))]
    Refused {
        /// Its id string.
        idstr: String,
        /// Why, in the device's words.
        reason: Reason,
    },
    /// The section itself is wrong.
    #[error(transparent)]
    State(#[from] VmStateError),
}

/// The sections of a VM's devices. Saved and loaded in the order of their priorities, those of
/// the same priority as they were registered; early ones before RAM.
pub struct DeviceRegistry {
    properties: Properties,
    /// In the order in which they go over the wire.
    entries: Vec<Entry>,
}

struct Entry {
    idstr: String,
    instance_id: u32,
    section: Box<dyn StateSection>,
    load: Load,
}

/// How far the load of a section is.
#[derive(Default)]
enum Load {
    /// It did not come.
    #[default]
    Awaited,
    /// It was read and checked.
    Staged(StagedState),
    /// The device has become it, and was this before.
    TakenOver(StagedState),
}

impl Entry {
    /// What the order follows: early ones first, then the highest priority.
    fn rank(&self) -> (bool, Priority) {
        (self.section.is_early(), self.section.priority())
    }

    fn is_loaded(&self) -> bool {
        !matches!(self.load, Load::Awaited)
    }

    /// Has the device take over what was read, if that has not happened yet.
    fn take_over(&mut self) -> Result<(), RegistryError> {
        self.load = match std::mem::take(&mut self.load) {
            Load::Staged(state) => {
                let taken = self.section.take_over(state);
                let idstr = || self.idstr.clone();
                Load::TakenOver(
                    taken.map_err(|reason| RegistryError::Refused { idstr: idstr(), reason })?,
                )
            }
            other => other,
        };
        Ok(())
    }
}

impl DeviceRegistry {
    /// No devices yet; their properties are those of both sides of a migration.
    pub fn new(properties: Properties) -> Self {
        Self { properties, entries: Vec::new() }
    }

    /// What decides on the parts of the state that are sent.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// Adds a section. Id strings are a device's path, a slash and the section's name.
    ///
    /// # Errors
    ///
    /// When the id string is not possible or taken, or the description has a flaw.
    pub fn register(
        &mut self,
        idstr: &str,
        instance_id: u32,
        section: Box<dyn StateSection>,
    ) -> Result<(), RegistryError> {
        if idstr.is_empty() || idstr.len() > NAME_MAX {
            return Err(RegistryError::IdLength(idstr.len()));
        }
        let idstr = idstr.to_owned();
        if self.find(&idstr, instance_id).is_some() {
            return Err(RegistryError::Registered { idstr, instance_id });
        }
        let flaws = section.validate(&self.properties);
        if !flaws.is_empty() {
            return Err(RegistryError::Flaws { idstr, flaws });
        }
        let entry = Entry { idstr, instance_id, section, load: Load::Awaited };
        let place = self.entries.partition_point(|other| other.rank() >= entry.rank());
        self.entries.insert(place, entry);
        Ok(())
    }

    /// Saves the sections of a phase, in order; those that are not needed are left out.
    ///
    /// # Errors
    ///
    /// When a device cannot be saved.
    pub fn save_phase(&mut self, phase: DevicePhase) -> Result<Vec<DeviceSection>, VmStateError> {
        let properties = &self.properties;
        let entries = self.entries.iter_mut().filter(|entry| {
            phase_of(&*entry.section) == phase && entry.section.is_expected(properties)
        });
        let mut sections = Vec::new();
        for entry in entries {
            let mut payload = Vec::new();
            let saved = entry.section.save(properties, &mut payload);
            let Some(contents) = saved.map_err(|error| named(error, &entry.idstr))? else {
                continue;
            };
            sections.push(DeviceSection {
                idstr: entry.idstr.clone(),
                instance_id: entry.instance_id,
                version_id: entry.section.version_id(),
                payload,
                description: described(&entry.idstr, entry.instance_id, contents),
            });
        }
        Ok(sections)
    }

    /// Loads a section whose header was read. The phase is early while no RAM came yet: such a section is
    /// taken over at once, since memory cannot come without it; others when all have come.
    ///
    /// # Errors
    ///
    /// When it is unknown, not its turn, or refused: nothing has changed then.
    pub fn load_section(
        &mut self,
        header: &SectionHeader,
        phase: DevicePhase,
        reader: &mut dyn WireRead,
    ) -> Result<(), RegistryError> {
        let (idstr, instance_id) = (header.idstr.clone(), header.instance_id);
        let Some(index) = self.find(&idstr, instance_id) else {
            return Err(RegistryError::Unknown { idstr, instance_id });
        };
        let entry = &self.entries[index];
        if !entry.section.is_expected(&self.properties) {
            return Err(RegistryError::Unexpected(idstr));
        }
        let belongs = phase_of(&*entry.section);
        if belongs != phase {
            return Err(RegistryError::Phase { idstr, phase: belongs });
        }
        if entry.is_loaded() {
            return Err(RegistryError::Twice(idstr));
        }
        if let Some(loaded) = self.entries[index + 1..].iter().find(|later| later.is_loaded()) {
            return Err(RegistryError::Order {
                late: idstr,
                late_priority: entry.section.priority(),
                loaded: loaded.idstr.clone(),
                priority: loaded.section.priority(),
            });
        }
        let entry = &mut self.entries[index];
        let loaded = entry.section.load(header.version_id, &self.properties, reader);
        entry.load = Load::Staged(loaded.map_err(|error| named(error, &idstr))?);
        match phase {
            DevicePhase::Early => entry.take_over(),
            DevicePhase::Late => Ok(()),
        }
    }

    /// Ends a load: every section must have come, except those that are not always needed, and all
    /// devices take their state over. What is loaded next is another stream.
    ///
    /// # Errors
    ///
    /// The first section that is missing, or that its device does not take over: all devices are
    /// what they were before the load then.
    pub fn finish_load(&mut self) -> Result<(), RegistryError> {
        let finished = self.take_over_all();
        match finished {
            Ok(()) => self.entries.iter_mut().for_each(|entry| entry.load = Load::Awaited),
            Err(_) => self.abandon_load(),
        }
        finished
    }

    fn take_over_all(&mut self) -> Result<(), RegistryError> {
        if let Some(entry) = self.missing().next() {
            return Err(RegistryError::Missing(entry.idstr.clone()));
        }
        self.entries.iter_mut().try_for_each(Entry::take_over)
    }

    /// Whether all sections came that belong before RAM, which follows.
    ///
    /// # Errors
    ///
    /// The first that is missing: the other side's properties may differ.
    pub fn finish_early(&self) -> Result<(), RegistryError> {
        match self.missing().find(|entry| entry.section.is_early()) {
            Some(entry) => Err(RegistryError::MissingEarly(entry.idstr.clone())),
            None => Ok(()),
        }
    }

    /// What must come and did not.
    fn missing(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| {
            let section = &entry.section;
            !entry.is_loaded() && section.is_required() && section.is_expected(&self.properties)
        })
    }

    /// Forgets what was loaded of a stream that goes on no further. Devices become what they were
    /// before, the last first.
    pub fn abandon_load(&mut self) {
        for entry in self.entries.iter_mut().rev() {
            if let Load::TakenOver(before) = std::mem::take(&mut entry.load)
                && let Err(error) = entry.section.take_over(before)
            {
                let device = &entry.idstr;
                tracing::warn!(%error, device, "the device keeps the state of a load that failed");
            }
        }
    }

    fn find(&self, idstr: &str, instance_id: u32) -> Option<usize> {
        self.entries
            .iter()
            .position(|entry| entry.idstr == idstr && entry.instance_id == instance_id)
    }
}

/// When a section comes.
fn phase_of(section: &dyn StateSection) -> DevicePhase {
    if section.is_early() { DevicePhase::Early } else { DevicePhase::Late }
}

/// Says whose state it is.
fn named(mut error: VmStateError, idstr: &str) -> VmStateError {
    idstr.clone_into(&mut error.place.device);
    error
}

impl Devices for DeviceRegistry {
    fn save(&mut self, phase: DevicePhase) -> Result<Vec<DeviceSection>, MigrationError> {
        self.save_phase(phase).map_err(|error| {
            let section = error.place.device.clone();
            MigrationError::Device { section, reason: error.to_string() }
        })
    }

    fn load(
        &mut self,
        header: &SectionHeader,
        phase: DevicePhase,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        let at = reader.offset();
        self.load_section(header, phase, reader).map_err(|error| {
            let section = header.idstr.clone();
            match error {
                RegistryError::State(error) => {
                    MigrationError::Device { section, reason: error.to_string() }
                }
                RegistryError::Refused { reason, .. } => {
                    MigrationError::Device { section, reason: reason.to_string() }
                }
                error => MigrationError::Section { section, at, what: error.to_string() },
            }
        })
    }

    fn loaded(&mut self) -> Result<(), MigrationError> {
        self.finish_load().map_err(|error| {
            let (section, reason) = match error {
                RegistryError::Missing(idstr) => (idstr, "it did not come".to_owned()),
                RegistryError::Refused { idstr, reason } => (idstr, reason.to_string()),
                other => (String::new(), other.to_string()),
            };
            MigrationError::Device { section, reason }
        })
    }

    fn early_loaded(&mut self) -> Result<(), MigrationError> {
        self.finish_early().map_err(|error| {
            let RegistryError::MissingEarly(section) = error else {
                let (section, reason) = (String::new(), error.to_string());
                return MigrationError::Device { section, reason };
            };
            let reason = "it did not come before RAM: do both sides have the same properties?";
            MigrationError::Device { section, reason: reason.to_owned() }
        })
    }

    fn abandon(&mut self) {
        self.abandon_load();
    }
}

/// A section: its contents, and whose they are.
fn described(idstr: &str, instance_id: u32, contents: Value) -> Value {
    let mut device = Map::new();
    device.insert("name".to_owned(), idstr.into());
    device.insert("instance_id".to_owned(), instance_id.into());
    if let Value::Object(contents) = contents {
        device.extend(contents);
    }
    Value::Object(device)
}

#[cfg(test)]
mod tests;
