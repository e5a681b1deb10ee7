//! The memory device as this process knows it.

use std::sync::Arc;

use anyhow::ensure;
use migration::MigrationError;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{DeviceState, Geometry, VirtioMem};
use virtio_mem::discard_channel::RemoteRamDiscardManager;

use super::device_error;
use crate::config::MemConfig;
use crate::protocol::feature;

/// A device without memory or queue, which has the state of one in another process.
pub(super) struct Shadow(Arc<MemController>);

impl Shadow {
    /// With nothing plugged.
    pub(super) fn new(geometry: Geometry) -> anyhow::Result<Self> {
        let device = VirtioMem::new(geometry, 0)?;
        Ok(Self(Arc::new(MemController::new(InitialState::volatile(device)))))
    }

    /// Of the geometry in a configuration space.
    pub(super) fn of_config(config: &MemConfig, features: u64) -> anyhow::Result<Self> {
        let node_id = (features & feature::VIRTIO_MEM_ACPI_PXM != 0).then_some(config.node_id);
        Self::new(Geometry::new(config.addr, config.region_size, config.block_size, node_id)?)
    }

    pub(super) fn controller(&self) -> &Arc<MemController> {
        &self.0
    }

    /// Becomes what the device is now.
    pub(super) fn follow(&self, manager: &RemoteRamDiscardManager) -> Result<(), MigrationError> {
        let sizes = manager.sizes()?;
        let state = DeviceState {
            requested_size: sizes.requested_size,
            usable_region_size: sizes.usable_region_size,
            plugged: manager.words()?,
        };
        self.0.load_state(state).map_err(|error| device_error(&error.to_string()))
    }

    /// Whether a device whose configuration this is has the same sizes.
    pub(super) fn compare(&self, config: &MemConfig) -> anyhow::Result<()> {
        let expected = MemConfig::from_bytes(&self.0.config().to_bytes());
        for (name, found, expected) in [
            ("plugged_size", config.plugged_size, expected.plugged_size),
            ("requested_size", config.requested_size, expected.requested_size),
            ("usable_region_size", config.usable_region_size, expected.usable_region_size),
        ] {
            ensure!(
                found == expected,
                "the daemon's {name} is {found:#x}, {expected:#x} was sent for it"
            );
        }
        Ok(())
    }
}
