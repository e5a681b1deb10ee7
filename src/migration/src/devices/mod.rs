//! Devices as migration sees them: sections of state, some of them before memory.

mod registry;

use vmstate::wire::WireRead;

pub use registry::{DeviceRegistry, RegistryError};

use crate::error::MigrationError;
use crate::stream::SectionHeader;

/// The state of a device as it goes over the wire.
#[derive(Clone, Debug)]
pub struct DeviceSection {
    /// Id string, less than 256 bytes.
    pub idstr: String,
    /// The instance among devices of the same id string.
    pub instance_id: u32,
    /// The version of the payload.
    pub version_id: u32,
    /// The fields, as they are on the wire.
    pub payload: Vec<u8>,
    /// What is in the payload, for the description at the end of the stream.
    pub description: serde_json::Value,
}

/// Which of the state of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DevicePhase {
    /// What must be known before memory arrives: its sections come before RAM.
    Early,
    /// The rest: its sections come after RAM, when the guest is stopped.
    Late,
}

/// The devices of a VM.
pub trait Devices {
    /// Saves the state of a phase, in the order in which it is to be loaded.
    ///
    /// # Errors
    ///
    /// When a device cannot be saved.
    fn save(&mut self, phase: DevicePhase) -> Result<Vec<DeviceSection>, MigrationError>;

    /// Loads the state of a device. The phase is early while no memory came yet.
    ///
    /// What a device may touch of guest memory depends on what is loaded. In postcopy and lazy restore,
    /// all of it from LISTEN on, in every section that is not early: a page that is outstanding is
    /// waited for. If the migration fails or is cancelled meanwhile, that wait ends with zeros, and
    /// the guest does not run here whatever the device makes of them. In precopy, all of it in the
    /// same sections. In a snapshot that is restored at once, nothing before
    /// [`loaded`](Self::loaded): memory comes last.
    ///
    /// # Errors
    ///
    /// When the device is unknown, it is not its turn, or it refuses: nothing has changed then.
    fn load(
        &mut self,
        header: &SectionHeader,
        phase: DevicePhase,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError>;

    /// Memory follows: what must be known before it has come.
    ///
    /// # Errors
    ///
    /// When something is missing.
    fn early_loaded(&mut self) -> Result<(), MigrationError> {
        Ok(())
    }

    /// All sections were loaded: takes the states over, or refuses.
    ///
    /// # Errors
    ///
    /// When something is missing or does not fit.
    fn loaded(&mut self) -> Result<(), MigrationError>;

    /// The load goes on no further: devices become what they were before it.
    fn abandon(&mut self) {}
}

/// A VM without devices.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDevices;

impl Devices for NoDevices {
    fn save(&mut self, _phase: DevicePhase) -> Result<Vec<DeviceSection>, MigrationError> {
        Ok(Vec::new())
    }

    fn load(
        &mut self,
        header: &SectionHeader,
        _phase: DevicePhase,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        let (section, at) = (header.idstr.clone(), reader.offset());
        Err(MigrationError::Section { section, at, what: "no such device here".to_owned() })
    }

    fn loaded(&mut self) -> Result<(), MigrationError> {
        Ok(())
    }
}
