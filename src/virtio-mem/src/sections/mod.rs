//! What is sent of a virtio-mem device, byte for byte as QEMU's `hw/virtio/virtio-mem.c` does.
//!
//! | section | when | fields, big-endian |
//! | --- | --- | --- |
//! | `PATH/virtio-mem-device-early`, version 1 | before RAM | be64 addr, be64 region_size, be64 block_size, be32 node, be64 size, bitmap: be64 words |
//! | `PATH/virtio-mem`, version 1 | after RAM | be64 usable_region_size, be64 requested_size |
//!
//! Bit `i` of word `w` of the bitmap is block `64 * w + i`; there are as many words as the blocks
//! need. Until QEMU 7.2 all of it came after RAM: with [`EARLY_MIGRATION`] off, the second section
//! has addr, region_size, block_size, node, usable_region_size, size, requested_size, bitmap.
//!
//! Block state does not change from the early section on, since it is frozen while memory
//! migrates; the two sizes may, which is why they come late. A destination has block state as
//! soon as the early section was loaded: it needs it to tell which pages may come.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use vmstate::{
    Access, CompatLevel, Count, Described, Field, Priority, Properties, Property, Reason,
    SliceAccess, StateSection, VmState, VmStateDevice,
};

use crate::controller::MemController;
use crate::device::{DeviceState, MAX_BLOCKS};

/// Whether block state is sent before RAM. QEMU's property of the same name.
pub const EARLY_MIGRATION: &str = "virtio-mem.x-early-migration";

/// The properties of virtio-mem devices.
pub const PROPERTIES: &[Property] = &[Property { name: EARLY_MIGRATION, default: true }];

/// What older releases were: versions of QEMU's machine types, the newest first.
pub const COMPAT_LEVELS: &[CompatLevel] = &[
    CompatLevel { name: "8.0", sets: &[] },
    CompatLevel { name: "7.2", sets: &[(EARLY_MIGRATION, false)] },
];

/// What is sent of a device, sizes in bytes; the geometry only to be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtioMemState {
    addr: u64,
    region_size: u64,
    block_size: u64,
    node: u32,
    /// Bytes that are plugged.
    size: u64,
    usable_region_size: u64,
    requested_size: u64,
    /// One bit a block; set: plugged.
    bitmap: Vec<u64>,
}

type State = VirtioMemState;

const ADDR: Field<State> = Field::u64("addr", Access::Immutable(|s| s.addr));
const REGION_SIZE: Field<State> = Field::u64("region_size", Access::Immutable(|s| s.region_size));
const BLOCK_SIZE: Field<State> = Field::u64("block_size", Access::Immutable(|s| s.block_size));
const NODE: Field<State> = Field::u32("node", Access::Immutable(|s| s.node));
const SIZE: Field<State> = Field::u64("size", Access::DerivedChecked(|s| s.size));
const BITMAP: Field<State> = Field::bitmap(
    "bitmap",
    Count::From { count: State::nr_blocks, limit: MAX_BLOCKS },
    SliceAccess::Mutable(|s| &s.bitmap, |s, words| s.bitmap = words),
);
const USABLE_REGION_SIZE: Field<State> = Field::u64(
    "usable_region_size",
    Access::Mutable(|s| s.usable_region_size, |s, size| s.usable_region_size = size),
);
const REQUESTED_SIZE: Field<State> = Field::u64(
    "requested_size",
    Access::Mutable(|s| s.requested_size, |s, size| s.requested_size = size),
);

/// The section before RAM.
pub static EARLY: VmState<State> = VmState::new(
    "virtio-mem-device-early",
    1,
    &[ADDR, REGION_SIZE, BLOCK_SIZE, NODE, SIZE, BITMAP],
)
.early()
.priority(Priority::VirtioMem)
.when(EARLY_MIGRATION, true)
.post_load(State::count_plugged);

/// The section after RAM.
pub static NORMAL: VmState<State> = VmState::new(
    "virtio-mem",
    1,
    &[
        ADDR.when(EARLY_MIGRATION, false),
        REGION_SIZE.when(EARLY_MIGRATION, false),
        BLOCK_SIZE.when(EARLY_MIGRATION, false),
        NODE.when(EARLY_MIGRATION, false),
        USABLE_REGION_SIZE,
        SIZE.when(EARLY_MIGRATION, false),
        REQUESTED_SIZE,
        BITMAP.when(EARLY_MIGRATION, false),
    ],
)
.priority(Priority::VirtioMem)
.post_load(State::count_plugged);

impl VirtioMemState {
    /// The state of a device, of one moment.
    pub fn of(controller: &MemController) -> Self {
        let geometry = controller.geometry();
        let DeviceState { requested_size, usable_region_size, plugged } = controller.save_state();
        let mut state = Self {
            addr: geometry.addr(),
            region_size: geometry.region_size(),
            block_size: geometry.block_size(),
            node: geometry.node_id().map_or(0, u32::from),
            size: 0,
            usable_region_size,
            requested_size,
            bitmap: plugged,
        };
        state.recount();
        state
    }

    /// What [`MemController::load_state`] takes. The geometry was compared.
    pub fn into_device(self) -> DeviceState {
        let Self { usable_region_size, requested_size, bitmap: plugged, .. } = self;
        DeviceState { requested_size, usable_region_size, plugged }
    }

    fn nr_blocks(&self) -> u64 {
        self.region_size.checked_div(self.block_size).unwrap_or(0)
    }

    fn count_plugged(&mut self, _version: u32) -> Result<(), Reason> {
        self.recount();
        Ok(())
    }

    fn recount(&mut self) {
        let blocks: u64 = self.bitmap.iter().map(|w| u64::from(w.count_ones())).sum();
        self.size = blocks * self.block_size;
    }

    /// Bytes from the start of the region to the end of the last plugged block.
    fn plugged_end(&self) -> u64 {
        let last = self.bitmap.iter().rposition(|word| *word != 0);
        let blocks = last.map_or(0, |index| {
            (index as u64 + 1) * 64 - u64::from(self.bitmap[index].leading_zeros())
        });
        blocks * self.block_size
    }
}

/// The part of a device that comes before RAM.
struct Early(Arc<MemController>);

impl VmStateDevice for Early {
    type State = State;

    fn snapshot(&mut self) -> Result<State, Reason> {
        Ok(State::of(&self.0))
    }

    /// The usable region comes later, and is at least what is plugged.
    fn take_over(&mut self, mut state: State) -> Result<(), Reason> {
        state.usable_region_size = state.usable_region_size.max(state.plugged_end());
        Ok(self.0.load_state(state.into_device())?)
    }
}

/// The part of a device that comes after RAM.
struct Normal(Arc<MemController>);

impl VmStateDevice for Normal {
    type State = State;

    fn snapshot(&mut self) -> Result<State, Reason> {
        Ok(State::of(&self.0))
    }

    fn take_over(&mut self, state: State) -> Result<(), Reason> {
        Ok(self.0.load_state(state.into_device())?)
    }
}

/// Both sections of a device at `path`, which names it on both sides, with their id strings, for the registry of
/// a VM's devices. The registry must know [`PROPERTIES`].
pub fn of(path: &str, controller: &Arc<MemController>) -> [(String, Box<dyn StateSection>); 2] {
    let early = Described { vmstate: &EARLY, device: Early(Arc::clone(controller)) };
    let normal = Described { vmstate: &NORMAL, device: Normal(Arc::clone(controller)) };
    [
        (format!("{path}/virtio-mem-device-early"), Box::new(early)),
        (format!("{path}/virtio-mem"), Box::new(normal)),
    ]
}

/// The properties of this release.
pub fn properties() -> Properties {
    Properties::new(PROPERTIES)
}
