//! What is discarded of a block: its virtio-mem device says.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use migration::inspect::SavedVirtioMem;
use migration::stream::TARGET_PAGE_SIZE;
use ram_discard::{LocalRamDiscardManager, MemoryState, RegisterError, Section};

/// The RamDiscardManager of a region in an image, whose source is the device's state in it.
pub struct Discards {
    device: String,
    manager: LocalRamDiscardManager,
}

impl Discards {
    /// Of a device in an image.
    ///
    /// # Errors
    ///
    /// When the source is refused.
    pub(super) fn of(device: &SavedVirtioMem) -> Result<Self, RegisterError> {
        let manager = LocalRamDiscardManager::new(device.region_size);
        manager.add_source(Arc::new(device.clone()))?;
        Ok(Self { device: device.path.clone(), manager })
    }

    /// The device's path, empty when it has none.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The manager.
    pub fn manager(&self) -> &LocalRamDiscardManager {
        &self.manager
    }

    /// Calls `visit` with each run of pages that are populated, ascending.
    pub fn populated(&self, mut visit: impl FnMut(Range<u64>)) {
        self.replay(MemoryState::Populated, &mut visit);
    }

    /// Calls `visit` with each run of pages that are discarded, ascending.
    pub fn discarded(&self, mut visit: impl FnMut(Range<u64>)) {
        self.replay(MemoryState::Discarded, &mut visit);
    }

    fn replay(&self, state: MemoryState, visit: &mut dyn FnMut(Range<u64>)) {
        let Some(all) = Section::new(0, self.manager.region_size()) else { return };
        let visit = |range: Section| {
            visit(range.start() / TARGET_PAGE_SIZE..range.end() / TARGET_PAGE_SIZE);
            ControlFlow::Continue(())
        };
        let _ = match state {
            MemoryState::Populated => self.manager.replay_populated(all, visit),
            MemoryState::Discarded => self.manager.replay_discarded(all, visit),
        };
    }
}

impl std::fmt::Debug for Discards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Discards").field("device", &self.device).finish_non_exhaustive()
    }
}
