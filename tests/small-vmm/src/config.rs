//! The device's configuration space, as the guest reads it.

use crate::protocol::read64;

/// Length of `struct virtio_mem_config`.
pub const CONFIG_SIZE: u32 = 56;

/// The fields of `struct virtio_mem_config`, all in bytes but `node_id`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MemConfig {
    /// The unit of plugging.
    pub block_size: u64,
    /// The NUMA node, when `VIRTIO_MEM_F_ACPI_PXM` was negotiated.
    pub node_id: u16,
    /// Where the region starts.
    pub addr: u64,
    /// How large it can ever be.
    pub region_size: u64,
    /// How much of it requests may name.
    pub usable_region_size: u64,
    /// How much of it is plugged.
    pub plugged_size: u64,
    /// How much of it the device wants plugged.
    pub requested_size: u64,
}

impl MemConfig {
    /// Takes the 56 bytes apart; what is missing is zero.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self {
            block_size: read64(bytes, 0),
            node_id: bytes.get(8..10).map_or(0, |id| u16::from_le_bytes([id[0], id[1]])),
            addr: read64(bytes, 16),
            region_size: read64(bytes, 24),
            usable_region_size: read64(bytes, 32),
            plugged_size: read64(bytes, 40),
            requested_size: read64(bytes, 48),
        }
    }

    /// What the specification promises of the numbers in one reply; the first promise that does not
    /// hold.
    pub fn check(&self) -> Result<(), String> {
        if !self.block_size.is_power_of_two() {
            return Err(format!("block_size {:#x} is not a power of two", self.block_size));
        }
        for (name, value) in [
            ("addr", self.addr),
            ("region_size", self.region_size),
            ("usable_region_size", self.usable_region_size),
            ("plugged_size", self.plugged_size),
            ("requested_size", self.requested_size),
        ] {
            if value % self.block_size != 0 {
                return Err(format!(
                    "{name} {value:#x} is not a multiple of block_size {:#x}",
                    self.block_size
                ));
            }
        }
        if self.usable_region_size > self.region_size
            || self.requested_size > self.usable_region_size
        {
            return Err(format!(
                "not requested {:#x} <= usable {:#x} <= region {:#x}",
                self.requested_size, self.usable_region_size, self.region_size
            ));
        }
        Ok(())
    }
}
