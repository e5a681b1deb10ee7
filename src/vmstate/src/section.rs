//! A device with the description of its state, as one section.

use std::any::Any;

use serde_json::Value;

use super::description::{Priority, VmState};
use super::error::{Problem, Reason, VmStateError};
use super::properties::Properties;
use super::validate::Flaw;
use crate::wire::WireRead;

/// A device whose state is described.
pub trait VmStateDevice: Send {
    /// What is sent of it, and what for checks only.
    type State: Send + 'static;

    /// The state as it is now, of one moment.
    ///
    /// # Errors
    ///
    /// When it cannot be told.
    fn snapshot(&mut self) -> Result<Self::State, Reason>;

    /// Becomes what was loaded into a [`snapshot`](Self::snapshot), or what it was before when a load
    /// is undone. A device has one early and one other section at most, since nothing is taken over
    /// between those of a kind. Guest memory may not be there yet, and must not be looked at.
    ///
    /// # Errors
    ///
    /// When it cannot; nothing has changed then.
    fn take_over(&mut self, state: Self::State) -> Result<(), Reason>;
}

/// The state of a device of whatever type.
pub type StagedState = Box<dyn Any + Send>;

/// A section of a device of whatever type.
pub trait StateSection: Send {
    /// The version that is saved.
    fn version_id(&self) -> u32;

    /// When it is saved and loaded.
    fn priority(&self) -> Priority;

    /// Whether that is before RAM.
    fn is_early(&self) -> bool;

    /// Whether it may come at all; not all that may come is needed.
    fn is_expected(&self, properties: &Properties) -> bool;

    /// Whether it must come if it is expected.
    fn is_required(&self) -> bool;

    /// What is wrong with its description.
    fn validate(&self, properties: &Properties) -> Vec<Flaw>;

    /// Appends the device's state, and describes it; nothing when it is not needed.
    ///
    /// # Errors
    ///
    /// When the device cannot tell it.
    fn save(
        &mut self,
        properties: &Properties,
        out: &mut Vec<u8>,
    ) -> Result<Option<Value>, VmStateError>;

    /// Reads the device's state, to be taken over later.
    ///
    /// # Errors
    ///
    /// When it is refused.
    fn load(
        &mut self,
        version_id: u32,
        properties: &Properties,
        reader: &mut dyn WireRead,
    ) -> Result<StagedState, VmStateError>;

    /// Has the device become what [`load`](Self::load) read; what it was before.
    ///
    /// # Errors
    ///
    /// When it cannot; nothing has changed then.
    fn take_over(&mut self, state: StagedState) -> Result<StagedState, Reason>;
}

/// A device with the description of its state.
pub struct Described<D: VmStateDevice> {
    /// What is sent.
    pub vmstate: &'static VmState<D::State>,
    /// What it is of.
    pub device: D,
}

impl<D: VmStateDevice> StateSection for Described<D> {
    fn version_id(&self) -> u32 {
        self.vmstate.version
    }

    fn priority(&self) -> Priority {
        self.vmstate.priority
    }

    fn is_early(&self) -> bool {
        self.vmstate.early
    }

    fn is_expected(&self, properties: &Properties) -> bool {
        properties.allow(self.vmstate.condition)
    }

    fn is_required(&self) -> bool {
        self.vmstate.needed.is_none()
    }

    fn validate(&self, properties: &Properties) -> Vec<Flaw> {
        self.vmstate.validate(properties)
    }

    fn save(
        &mut self,
        properties: &Properties,
        out: &mut Vec<u8>,
    ) -> Result<Option<Value>, VmStateError> {
        let snapshot = self.device.snapshot();
        let mut state =
            snapshot.map_err(|reason| self.vmstate.error(None, 0, Problem::Device(reason)))?;
        if !self.vmstate.is_sent(&state, properties) {
            return Ok(None);
        }
        self.vmstate.save(&mut state, properties, out).map(Some)
    }

    fn load(
        &mut self,
        version_id: u32,
        properties: &Properties,
        reader: &mut dyn WireRead,
    ) -> Result<StagedState, VmStateError> {
        let start = reader.offset();
        let snapshot = self.device.snapshot();
        let mut state =
            snapshot.map_err(|reason| self.vmstate.error(None, start, Problem::Device(reason)))?;
        self.vmstate.load(&mut state, version_id, properties, reader)?;
        Ok(Box::new(state))
    }

    fn take_over(&mut self, state: StagedState) -> Result<StagedState, Reason> {
        let state = state.downcast().map_err(|_| "the state is of another device")?;
        let before = self.device.snapshot()?;
        self.device.take_over(*state)?;
        Ok(Box::new(before))
    }
}
