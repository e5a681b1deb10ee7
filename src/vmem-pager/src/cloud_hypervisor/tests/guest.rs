//! A guest as a Cloud Hypervisor has it: memory in memfds, Config and State.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

pub const MIB: u64 = 1 << 20;
pub const BLOCK: u64 = 2 * MIB;
pub const PAGE: u64 = 4096;
/// Where the virtio-mem region begins.
pub const REGION: u64 = 4 << 30;
/// Its blocks.
pub const BLOCKS: u64 = 8;

/// A mapping.
pub struct GuestMapping {
    pub slot: u32,
    pub gpa: u64,
    pub size: u64,
    pub zone: &'static str,
    pub virtio_mem: bool,
    pub file_offset: u64,
    pub file: File,
}

/// A guest: boot memory of two mappings that are parts of one file, and a virtio-mem region.
pub struct Guest {
    pub mappings: Vec<GuestMapping>,
    pub plugged: Vec<bool>,
    pub paused: bool,
}

pub fn memfd(len: u64) -> File {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

/// The bytes of a page.
pub fn content(seed: u64) -> Vec<u8> {
    crate::image::reader::sample::content(seed)
}

impl Guest {
    /// Some pages of boot memory and of plugged blocks have something in them; so has a block that is not
    /// plugged, which is not to be seen again.
    pub fn new() -> Self {
        let boot = memfd(6 * MIB);
        let again = boot.try_clone().unwrap();
        let mapping = |slot, gpa, size, zone, virtio_mem, file_offset, file| GuestMapping {
            slot,
            gpa,
            size,
            zone,
            virtio_mem,
            file_offset,
            file,
        };
        // In no order, as Cloud Hypervisor tells them.
        let mappings = vec![
            mapping(7, REGION, BLOCKS * BLOCK, "hot", true, 0, memfd(BLOCKS * BLOCK)),
            mapping(3, 0, 4 * MIB, "boot", false, 0, boot),
            mapping(4, 3 << 30, 2 * MIB, "boot", false, 4 * MIB, again),
        ];
        let mut plugged = vec![false; BLOCKS as usize];
        (plugged[0], plugged[1], plugged[5]) = (true, true, true);
        let guest = Self { mappings, plugged, paused: false };
        for (mapping, page, seed) in [
            (1, 0, 1),
            (1, 1, 2),
            (1, 1023, 3),
            (2, 0, 4),
            (2, 511, 5),
            (0, 0, 6),
            (0, 700, 7),
            (0, 5 * 512 + 9, 8),
            (0, 3 * 512, 9),
        ] {
            guest.write(mapping, page, &content(seed));
        }
        // Resident, and zeros.
        guest.write(1, 40, &vec![0; PAGE as usize]);
        guest
    }

    pub fn write(&self, mapping: usize, page: u64, bytes: &[u8]) {
        let GuestMapping { file, file_offset, .. } = &self.mappings[mapping];
        file.write_all_at(bytes, file_offset + page * PAGE).unwrap();
    }

    /// What the guest finds in each mapping, by address: unplugged blocks read as zeros.
    pub fn memory(&self) -> Vec<(u64, Vec<u8>)> {
        let mut memory = Vec::new();
        for mapping in &self.mappings {
            let mut bytes = vec![0; mapping.size as usize];
            mapping.file.read_exact_at(&mut bytes, mapping.file_offset).unwrap();
            if mapping.virtio_mem {
                for (block, plugged) in self.plugged.iter().enumerate() {
                    if !plugged {
                        bytes[block * BLOCK as usize..][..BLOCK as usize].fill(0);
                    }
                }
            }
            memory.push((mapping.gpa, bytes));
        }
        memory.sort();
        memory
    }

    /// Bytes that the host holds for it.
    pub fn resident(&self) -> u64 {
        let mut files: Vec<(u64, u64)> = Vec::new();
        for mapping in &self.mappings {
            let metadata = mapping.file.metadata().unwrap();
            files.push((metadata.ino(), metadata.blocks() * 512));
        }
        files.sort_unstable();
        files.dedup();
        files.iter().map(|(_, bytes)| bytes).sum()
    }

    pub fn config(&self) -> Value {
        let mappings = self.mappings.iter().map(|mapping| {
            json!({
                "slot": mapping.slot, "gpa": mapping.gpa, "size": mapping.size, "zone_id": mapping.zone,
                "virtio_mem": mapping.virtio_mem, "file_offset": mapping.file_offset,
            })
        });
        json!({
            "vm_config": {
                "memory": {
                    "size": 0, "hugepages": false, "prefault": false, "hotplug_method": "VirtioMem",
                    "zones": [
                        { "id": "boot", "size": 6 * MIB, "shared": true, "hugepages": false, "prefault": false },
                        { "id": "hot", "size": 0, "shared": true, "hugepages": false, "prefault": false,
                          "hotplug_size": BLOCKS * BLOCK },
                    ],
                },
                "payload": { "kernel": "/guest/kernel" },
                "disks": [{ "path": "/old/disk", "readonly": false }, { "path": "/other", "readonly": true }],
                "serial": { "file": "/old/serial.log", "mode": "File" },
            },
            "common_cpuid": [],
            "memory_manager_data": {
                // Left by an attempt that failed; of no meaning.
                "memory_ranges": { "data": [{ "gpa": 4096, "length": 12345 }] },
                "guest_ram_mappings": mappings.collect::<Vec<_>>(),
                "arch_mem_regions": [{ "base": 0, "size": u64::MAX, "r_type": "Ram" }],
            },
        })
    }

    pub fn state(&self) -> Value {
        let plugged = self.plugged.iter().filter(|plugged| **plugged).count() as u64 * BLOCK;
        let device = json!({
            "avail_features": 1u64 << 32, "acked_features": 1u64 << 32,
            "config": {
                "block_size": BLOCK, "node_id": 0, "padding": [0, 0, 0, 0, 0, 0], "addr": REGION,
                "region_size": BLOCKS * BLOCK, "usable_region_size": BLOCKS * BLOCK,
                "plugged_size": plugged, "requested_size": 4 * BLOCK,
            },
            "blocks_state": { "bitmap": self.plugged },
        });
        let leaf = |state: String| json!({ "snapshots": {}, "snapshot_data": { "state": state } });
        let node = |snapshots: Value| json!({ "snapshots": snapshots, "snapshot_data": null });
        json!({
            "snapshots": {
                "cpu-manager": node(json!({ "0": leaf("{}".to_owned()) })),
                "device-manager": node(json!({
                    "__serial": leaf("{}".to_owned()),
                    "hot": leaf(device.to_string()),
                    "_virtio-pci-hot": leaf("{}".to_owned()),
                })),
                "memory-manager": leaf("{}".to_owned()),
            },
            "snapshot_data": { "state": "{\"clock\":null}" },
        })
    }
}
