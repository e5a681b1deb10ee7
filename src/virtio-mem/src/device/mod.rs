//! The virtio-mem device model (VIRTIO 1.4, 5.15): configuration, blocks, requests.
//!
//! A request is judged and applied in two steps, so that whatever can still refuse it (memory,
//! listeners, the state file) is asked in between: [`VirtioMem::evaluate`] changes nothing, and
//! [`VirtioMem::apply`] cannot fail.

mod block_bitmap;
mod config;
mod request;

use std::ops::Range;

use thiserror::Error;

pub use block_bitmap::{BlockBitmap, BlockRuns};
pub use config::{
    CONFIG_LEN, ConfigSpace, Geometry, GeometryError, MAX_BLOCKS, MIN_BLOCK_SIZE, USABLE_SLACK,
};
pub use request::{BlockSpan, BlockState, REQUEST_LEN, RESPONSE_LEN, Request, Response};

/// Why a requested size is refused; nothing was changed. Sizes in bytes.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RequestedSizeError {
    /// Not a multiple of the block size.
    #[error("requested size {requested_size} is not a multiple of the block size {block_size}")]
    Unaligned {
        /// What was asked for.
        requested_size: u64,
        /// The device's block size.
        block_size: u64,
    },
    /// Larger than the region.
    #[error("requested size {requested_size} is larger than the region ({region_size})")]
    TooLarge {
        /// What was asked for.
        requested_size: u64,
        /// The device's region size.
        region_size: u64,
    },
}

/// Saved state of a device, not yet trusted; [`VirtioMem::restore`] checks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Requested size, bytes.
    pub requested_size: u64,
    /// Size of the usable region, bytes.
    pub usable_region_size: u64,
    /// One bit a block, block 0 in the lowest bit of word 0.
    pub plugged: Vec<u64>,
}

/// Why saved state is refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceStateError {
    /// The requested size breaks a rule.
    #[error(transparent)]
    RequestedSize(#[from] RequestedSizeError),
    /// The usable region is unaligned, smaller than requested or larger than the region.
    #[error(
        "usable region size {usable_region_size} is not a multiple of the block size between \
         the requested size {requested_size} and the region size"
    )]
    UsableRegion {
        /// The saved usable region, bytes.
        usable_region_size: u64,
        /// The saved requested size, bytes.
        requested_size: u64,
    },
    /// The bitmap has another length, or bits past the last block.
    #[error("the block bitmap does not fit a region of {nr_blocks} blocks")]
    Bitmap {
        /// Blocks in the region.
        nr_blocks: usize,
    },
    /// A block is plugged outside the usable region.
    #[error("block {block} is plugged outside the usable region")]
    PluggedOutsideUsable {
        /// Index of the first such block.
        block: usize,
    },
}

/// A change of block state that a request asks for and the device would allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Plug these unplugged blocks.
    Plug(Range<usize>),
    /// Unplug these plugged blocks.
    Unplug(Range<usize>),
    /// Unplug every block and let the usable region follow the requested size.
    UnplugAll,
}

/// What the device says to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The answer; the request changes nothing.
    Answer(Response),
    /// ACK, once this change is made.
    Change(Change),
}

/// A virtio-mem device: sizes and block states.
#[derive(Clone, Debug)]
pub struct VirtioMem {
    geometry: Geometry,
    blocks: BlockBitmap,
    requested_size: u64,
    usable_region_size: u64,
}

impl VirtioMem {
    /// A device with every block unplugged.
    ///
    /// # Errors
    ///
    /// When `requested_size` (bytes) breaks a rule.
    pub fn new(geometry: Geometry, requested_size: u64) -> Result<Self, RequestedSizeError> {
        check_requested_size(&geometry, requested_size)?;
        Ok(Self {
            geometry,
            blocks: BlockBitmap::new(geometry.nr_blocks()),
            requested_size,
            usable_region_size: geometry.usable_for(requested_size),
        })
    }

    /// A device in a saved state, every rule of which is checked.
    ///
    /// # Errors
    ///
    /// The first rule that the state breaks.
    pub fn restore(geometry: Geometry, state: DeviceState) -> Result<Self, DeviceStateError> {
        let DeviceState { requested_size, usable_region_size, plugged } = state;
        check_requested_size(&geometry, requested_size)?;
        if !usable_region_size.is_multiple_of(geometry.block_size())
            || usable_region_size < requested_size
            || usable_region_size > geometry.region_size()
        {
            return Err(DeviceStateError::UsableRegion { usable_region_size, requested_size });
        }
        let nr_blocks = geometry.nr_blocks();
        let blocks = BlockBitmap::from_words(nr_blocks, plugged)
            .ok_or(DeviceStateError::Bitmap { nr_blocks })?;
        let device = Self { geometry, blocks, requested_size, usable_region_size };
        match device.blocks.find(device.nr_usable()..nr_blocks, true) {
            Some(block) => Err(DeviceStateError::PluggedOutsideUsable { block }),
            None => Ok(device),
        }
    }

    /// What [`restore`](Self::restore) takes.
    pub fn state(&self) -> DeviceState {
        DeviceState {
            requested_size: self.requested_size,
            usable_region_size: self.usable_region_size,
            plugged: self.blocks.words().to_vec(),
        }
    }

    /// What never changes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The block states.
    pub fn blocks(&self) -> &BlockBitmap {
        &self.blocks
    }

    /// What the guest is asked to plug, bytes.
    pub fn requested_size(&self) -> u64 {
        self.requested_size
    }

    /// What requests may name, bytes from the start of the region.
    pub fn usable_region_size(&self) -> u64 {
        self.usable_region_size
    }

    /// Sum of the plugged blocks, bytes.
    pub fn plugged_size(&self) -> u64 {
        self.blocks.nr_plugged() as u64 * self.geometry.block_size()
    }

    /// The configuration space as it is now.
    pub fn config(&self) -> ConfigSpace {
        ConfigSpace {
            block_size: self.geometry.block_size(),
            node_id: self.geometry.node_id().unwrap_or(0),
            addr: self.geometry.addr(),
            region_size: self.geometry.region_size(),
            usable_region_size: self.usable_region_size,
            plugged_size: self.plugged_size(),
            requested_size: self.requested_size,
        }
    }

    /// Judges a request. Nothing is changed; ERROR wins over NACK where both apply, since the
    /// conditions for ERROR are MUSTs (5.15.6.3.1 and following) and NACK is a choice.
    pub fn evaluate(&self, request: Request) -> Verdict {
        match request {
            Request::Plug(span) => match self.usable_blocks(span) {
                Some(blocks) if self.blocks.all(blocks.clone(), false) => {
                    let size = blocks.len() as u64 * self.geometry.block_size();
                    if size > self.requested_size.saturating_sub(self.plugged_size()) {
                        Verdict::Answer(Response::Nack)
                    } else {
                        Verdict::Change(Change::Plug(blocks))
                    }
                }
                _ => Verdict::Answer(Response::Error),
            },
            Request::Unplug(span) => match self.usable_blocks(span) {
                Some(blocks) if self.blocks.all(blocks.clone(), true) => {
                    Verdict::Change(Change::Unplug(blocks))
                }
                _ => Verdict::Answer(Response::Error),
            },
            Request::UnplugAll => Verdict::Change(Change::UnplugAll),
            Request::State(span) => Verdict::Answer(match self.usable_blocks(span) {
                None => Response::Error,
                Some(blocks) => Response::AckState(self.state_of(blocks)),
            }),
            Request::Unsupported(_) => Verdict::Answer(Response::Error),
        }
    }

    /// Makes a change that [`evaluate`](Self::evaluate) allowed.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Plug(blocks) => self.blocks.set(blocks.clone(), true),
            Change::Unplug(blocks) => self.blocks.set(blocks.clone(), false),
            Change::UnplugAll => {
                self.blocks.clear();
                self.usable_region_size = self.usable_after_unplug_all();
            }
        }
    }

    /// The usable region that UNPLUG ALL or a system reset leaves: the only events at which it
    /// may shrink.
    pub fn usable_after_unplug_all(&self) -> u64 {
        self.geometry.usable_for(self.requested_size)
    }

    /// The usable region that a new requested size leads to: it grows, and never shrinks.
    ///
    /// # Errors
    ///
    /// When `requested_size` breaks a rule.
    pub fn usable_after_resize(&self, requested_size: u64) -> Result<u64, RequestedSizeError> {
        check_requested_size(&self.geometry, requested_size)?;
        Ok(self.geometry.usable_for(requested_size).max(self.usable_region_size))
    }

    /// Sets the requested size, bytes; the usable region grows to it.
    ///
    /// # Errors
    ///
    /// When `requested_size` breaks a rule; nothing was changed.
    pub fn set_requested_size(&mut self, requested_size: u64) -> Result<(), RequestedSizeError> {
        self.usable_region_size = self.usable_after_resize(requested_size)?;
        self.requested_size = requested_size;
        Ok(())
    }

    /// Whether the change that `request` asks for has been made already: every block it names is
    /// in the state it asks for. False of requests that name no blocks.
    pub fn is_done(&self, request: Request) -> bool {
        match request {
            Request::Plug(span) => {
                self.usable_blocks(span).is_some_and(|blocks| self.blocks.all(blocks, true))
            }
            Request::Unplug(span) => {
                self.usable_blocks(span).is_some_and(|blocks| self.blocks.all(blocks, false))
            }
            Request::UnplugAll | Request::State(_) | Request::Unsupported(_) => false,
        }
    }

    /// The blocks of a span; `None` when it is empty, unaligned or not wholly in the usable
    /// region.
    fn usable_blocks(&self, span: BlockSpan) -> Option<Range<usize>> {
        let block_size = self.geometry.block_size();
        let offset = span.addr.checked_sub(self.geometry.addr())?;
        if span.nb_blocks == 0 || !offset.is_multiple_of(block_size) {
            return None;
        }
        let first = offset / block_size;
        // No overflow: first <= 2^52 and nb_blocks < 2^16.
        let end = first + u64::from(span.nb_blocks);
        let usable = self.nr_usable();
        (end <= usable as u64).then(|| usable_index(first)..usable_index(end))
    }

    fn nr_usable(&self) -> usize {
        usable_index(self.usable_region_size / self.geometry.block_size())
    }

    fn state_of(&self, blocks: Range<usize>) -> BlockState {
        if self.blocks.all(blocks.clone(), true) {
            BlockState::Plugged
        } else if self.blocks.all(blocks, false) {
            BlockState::Unplugged
        } else {
            BlockState::Mixed
        }
    }
}

/// A block index that is known to lie in the region.
fn usable_index(block: u64) -> usize {
    usize::try_from(block).expect("regions have at most MAX_BLOCKS blocks")
}

fn check_requested_size(
    geometry: &Geometry,
    requested_size: u64,
) -> Result<(), RequestedSizeError> {
    let (block_size, region_size) = (geometry.block_size(), geometry.region_size());
    if !requested_size.is_multiple_of(block_size) {
        return Err(RequestedSizeError::Unaligned { requested_size, block_size });
    }
    if requested_size > region_size {
        return Err(RequestedSizeError::TooLarge { requested_size, region_size });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
