//! The device's geometry, its configuration space and the rule for the usable region.

use std::ops::Range;

use ram_discard::{GpaRange, Section};
use thiserror::Error;

/// Length of `struct virtio_mem_config`, bytes.
pub const CONFIG_LEN: usize = 56;

/// What the usable region exceeds the requested size by: twice the largest Linux memory block of
/// small x86 guests (128 MiB), so that a guest that can only use whole memory blocks still
/// reaches the requested size.
pub const USABLE_SLACK: u64 = 256 << 20;

/// More blocks than this are refused: 2^31 - 1, as in QEMU; 256 MiB of bitmap.
pub const MAX_BLOCKS: u64 = (1 << 31) - 1;

/// The smallest block size any host page size allows.
pub const MIN_BLOCK_SIZE: u64 = 4096;

/// Why a geometry is refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum GeometryError {
    /// Block size zero or not a power of two (5.15.4).
    #[error("block size {0:#x} is not a power of two")]
    BlockSizeNotPowerOfTwo(u64),
    /// Block size below [`MIN_BLOCK_SIZE`].
    #[error("block size {0:#x} is smaller than a page ({MIN_BLOCK_SIZE:#x})")]
    BlockSizeTooSmall(u64),
    /// Address not a multiple of the block size.
    #[error("address {addr:#x} is not a multiple of the block size {block_size:#x}")]
    AddrUnaligned {
        /// Guest-physical address of the region.
        addr: u64,
        /// Block size, bytes.
        block_size: u64,
    },
    /// Region size not a multiple of the block size.
    #[error("region size {region_size:#x} is not a multiple of the block size {block_size:#x}")]
    RegionSizeUnaligned {
        /// Size of the region, bytes.
        region_size: u64,
        /// Block size, bytes.
        block_size: u64,
    },
    /// The region would wrap the address space.
    #[error("region of {region_size:#x} bytes at {addr:#x} exceeds the address space")]
    RegionWraps {
        /// Guest-physical address of the region.
        addr: u64,
        /// Size of the region, bytes.
        region_size: u64,
    },
    /// More than [`MAX_BLOCKS`] blocks.
    #[error("region has {0} blocks, more than {MAX_BLOCKS}")]
    TooManyBlocks(u64),
}

/// What never changes while the device lives (5.15.4: block_size, node_id, addr, region_size).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    addr: u64,
    region_size: u64,
    block_size: u64,
    node_id: Option<u16>,
}

impl Geometry {
    /// Checks and fixes a geometry; sizes in bytes. A region of size 0 is legal.
    ///
    /// # Errors
    ///
    /// The rule that was broken, with the values.
    pub fn new(
        addr: u64,
        region_size: u64,
        block_size: u64,
        node_id: Option<u16>,
    ) -> Result<Self, GeometryError> {
        if !block_size.is_power_of_two() {
            return Err(GeometryError::BlockSizeNotPowerOfTwo(block_size));
        }
        if block_size < MIN_BLOCK_SIZE {
            return Err(GeometryError::BlockSizeTooSmall(block_size));
        }
        if !addr.is_multiple_of(block_size) {
            return Err(GeometryError::AddrUnaligned { addr, block_size });
        }
        if !region_size.is_multiple_of(block_size) {
            return Err(GeometryError::RegionSizeUnaligned { region_size, block_size });
        }
        if addr.checked_add(region_size).is_none() {
            return Err(GeometryError::RegionWraps { addr, region_size });
        }
        if region_size / block_size > MAX_BLOCKS {
            return Err(GeometryError::TooManyBlocks(region_size / block_size));
        }
        Ok(Self { addr, region_size, block_size, node_id })
    }

    /// Guest-physical address of the region.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Size of the region, bytes.
    pub fn region_size(&self) -> u64 {
        self.region_size
    }

    /// Size of a block, bytes; a power of two.
    pub fn block_size(&self) -> u64 {
        self.block_size
    }

    /// NUMA node, when VIRTIO_MEM_F_ACPI_PXM is offered.
    pub fn node_id(&self) -> Option<u16> {
        self.node_id
    }

    /// Number of blocks in the region.
    pub fn nr_blocks(&self) -> usize {
        usize::try_from(self.region_size / self.block_size).expect("at most MAX_BLOCKS")
    }

    /// The region in guest-physical addresses; `None` when it has no bytes.
    pub fn region(&self) -> Option<GpaRange> {
        GpaRange::new(self.addr, self.region_size)
    }

    /// The region counted from its own start; `None` when it has no bytes.
    pub fn section(&self) -> Option<Section> {
        Section::new(0, self.region_size)
    }

    /// Blocks as bytes from the start of the region; `None` of no blocks.
    pub fn section_of(&self, blocks: &Range<usize>) -> Option<Section> {
        let start = blocks.start as u64 * self.block_size;
        Section::from_bounds(start, blocks.end as u64 * self.block_size)
    }

    /// `min(region_size, roundup(requested_size + 256 MiB, block_size))`, 0 when nothing is
    /// requested: always a multiple of the block size and never below `requested_size`.
    pub fn usable_for(&self, requested_size: u64) -> u64 {
        if requested_size == 0 {
            return 0;
        }
        requested_size
            .checked_add(USABLE_SLACK)
            .and_then(|wanted| wanted.checked_next_multiple_of(self.block_size))
            .map_or(self.region_size, |wanted| wanted.min(self.region_size))
    }
}

/// `struct virtio_mem_config` (5.15.4); sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(alias = "virtio_mem_config")]
pub struct ConfigSpace {
    /// Size of a block.
    pub block_size: u64,
    /// NUMA node; 0 when there is none.
    pub node_id: u16,
    /// Guest-physical address of the region.
    pub addr: u64,
    /// Size of the region.
    pub region_size: u64,
    /// Size of the part that requests may name.
    pub usable_region_size: u64,
    /// Sum of the plugged blocks.
    pub plugged_size: u64,
    /// What the guest is asked to plug.
    pub requested_size: u64,
}

impl ConfigSpace {
    /// The little-endian bytes the guest reads.
    pub fn to_bytes(&self) -> [u8; CONFIG_LEN] {
        let mut bytes = [0; CONFIG_LEN];
        bytes[0..8].copy_from_slice(&self.block_size.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.node_id.to_le_bytes());
        let sizes = [
            self.addr,
            self.region_size,
            self.usable_region_size,
            self.plugged_size,
            self.requested_size,
        ];
        for (field, value) in bytes[16..].chunks_exact_mut(8).zip(sizes) {
            field.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn each_broken_rule_is_named() {
        let err = |a, r, b| Geometry::new(a, r, b, None).unwrap_err();
        assert_eq!(err(0, 0, 0), GeometryError::BlockSizeNotPowerOfTwo(0));
        assert_eq!(err(0, 0, 3 * MIB), GeometryError::BlockSizeNotPowerOfTwo(3 * MIB));
        assert_eq!(err(0, 0, MIB + 1), GeometryError::BlockSizeNotPowerOfTwo(MIB + 1));
        assert_eq!(err(0, 0, 2048), GeometryError::BlockSizeTooSmall(2048));
        assert!(matches!(err(MIB, GIB, 2 * MIB), GeometryError::AddrUnaligned { .. }));
        assert!(matches!(err(0, GIB + 1, 2 * MIB), GeometryError::RegionSizeUnaligned { .. }));
        let top = 0u64.wrapping_sub(2 * MIB);
        assert!(matches!(err(top, 2 * MIB, 2 * MIB), GeometryError::RegionWraps { .. }));
        assert!(matches!(err(0, 1 << 62, 4096), GeometryError::TooManyBlocks(_)));
        assert!(Geometry::new(0, 0, 4096, None).is_ok(), "a region of size 0 is legal");
    }

    #[test]
    fn usable_region_is_aligned_capped_and_covers_the_request() {
        let small = Geometry::new(0, 64 * GIB, 2 * MIB, None).unwrap();
        assert_eq!(small.usable_for(0), 0);
        assert_eq!(small.usable_for(2 * MIB), 258 * MIB);
        assert_eq!(small.usable_for(64 * GIB), 64 * GIB);
        assert_eq!(small.usable_for(64 * GIB - 2 * MIB), 64 * GIB);
        let large = Geometry::new(0, 8 * GIB, GIB, None).unwrap();
        assert_eq!(large.usable_for(GIB), 2 * GIB, "the slack is rounded up to a block");
    }

    #[test]
    fn config_space_has_the_layout_of_the_specification() {
        let config = ConfigSpace {
            block_size: 0x20_0000,
            node_id: 0x0102,
            addr: 0x1_4000_0000,
            region_size: 0x2_0000_0000,
            usable_region_size: 0x3000_0000,
            plugged_size: 0x40_0000,
            requested_size: 0x2000_0000,
        };
        let bytes = config.to_bytes();
        assert_eq!(bytes[0..8], 0x20_0000u64.to_le_bytes());
        assert_eq!(bytes[8..16], [2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..24], 0x1_4000_0000u64.to_le_bytes());
        assert_eq!(bytes[24..32], 0x2_0000_0000u64.to_le_bytes());
        assert_eq!(bytes[32..40], 0x3000_0000u64.to_le_bytes());
        assert_eq!(bytes[40..48], 0x40_0000u64.to_le_bytes());
        assert_eq!(bytes[48..56], 0x2000_0000u64.to_le_bytes());
    }
}
