//! A guest as a Cloud Hypervisor has it: memory in memfds, Config and State.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use ram_discard::memory::HostMapping;
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

/// Bytes of a MiB.
pub const MIB: u64 = 1 << 20;
/// Bytes of a block of its virtio-mem device.
pub const BLOCK: u64 = 2 * MIB;
/// Bytes of a small page.
pub const PAGE: u64 = 4096;
/// Where the virtio-mem region begins.
pub const REGION: u64 = 4 << 30;
/// Blocks of the virtio-mem region of [`Guest::new`].
pub const BLOCKS: u64 = 8;

/// A mapping.
#[derive(Debug)]
pub struct Mapping {
    /// Its number in this process.
    pub slot: u32,
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Its zone.
    pub zone: &'static str,
    /// It is the region of the zone's virtio-mem device.
    pub virtio_mem: bool,
    /// Where its bytes begin in the file.
    pub file_offset: u64,
    /// Its memory.
    pub file: File,
}

/// A guest.
#[derive(Debug)]
pub struct Guest {
    /// In no order, as Cloud Hypervisor tells them.
    pub mappings: Vec<Mapping>,
    /// Blocks of the virtio-mem region that are plugged.
    pub plugged: Vec<bool>,
    /// It is paused before it is sent.
    pub paused: bool,
    /// Its memory is of huge pages of this size, bytes.
    pub huge_page: Option<u64>,
    /// The Config says that all memory is populated when a VM is made.
    pub prefault: bool,
    /// What it writes between Config and State, while it still runs: mapping, page, seed of the content.
    pub writes: Vec<(usize, u64, u64)>,
}

/// Memory of `len` bytes, with nothing in it.
///
/// # Panics
///
/// When there is none to be had.
pub fn memfd(len: u64, huge_page: Option<u64>) -> File {
    let mut flags = MemfdFlags::CLOEXEC;
    if let Some(size) = huge_page {
        flags |= MemfdFlags::HUGETLB;
        // MFD_HUGE_SHIFT.
        flags |= MemfdFlags::from_bits_retain(size.trailing_zeros() << 26);
    }
    let file = File::from(memfd_create("guest", flags).expect("a memfd"));
    file.set_len(len).expect("a memfd of any size");
    file
}

/// The bytes of a page: not zeros, and others for each seed.
pub fn content(seed: u64) -> Vec<u8> {
    let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = (0..PAGE / 8).flat_map(|_| {
        word = word.rotate_left(7).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word.to_be_bytes()
    });
    words.collect()
}

impl Guest {
    /// Boot memory of two mappings that are parts of one file, and a virtio-mem region. Some pages of boot memory
    /// and of plugged blocks have something in them; so has a block that is not plugged, which is not to be
    /// seen again.
    pub fn new() -> Self {
        let boot = memfd(6 * MIB, None);
        let again = boot.try_clone().expect("a descriptor");
        let mapping = |slot, gpa, size, zone, virtio_mem, file_offset, file| Mapping {
            slot,
            gpa,
            size,
            zone,
            virtio_mem,
            file_offset,
            file,
        };
        let mappings = vec![
            mapping(7, REGION, BLOCKS * BLOCK, "hot", true, 0, memfd(BLOCKS * BLOCK, None)),
            mapping(3, 0, 4 * MIB, "boot", false, 0, boot),
            mapping(4, 3 << 30, 2 * MIB, "boot", false, 4 * MIB, again),
        ];
        let plugged = (0..BLOCKS).map(|block| [0, 1, 5].contains(&block)).collect();
        // What was there before does not count, what is written then does.
        let writes = vec![(1, 1, 77), (0, 1, 78)];
        let guest =
            Self { mappings, plugged, paused: false, huge_page: None, prefault: false, writes };
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

    /// Boot memory of one mapping and nothing else.
    pub fn with_boot_memory(size: u64, huge_page: Option<u64>) -> Self {
        let file = memfd(size, huge_page);
        let mapping = Mapping {
            slot: 0,
            gpa: 0,
            size,
            zone: "boot",
            virtio_mem: false,
            file_offset: 0,
            file,
        };
        Self {
            mappings: vec![mapping],
            plugged: Vec::new(),
            paused: false,
            huge_page,
            prefault: false,
            writes: Vec::new(),
        }
    }

    /// Writes a page of a mapping.
    ///
    /// # Panics
    ///
    /// When there is no memory for it.
    pub fn write(&self, mapping: usize, page: u64, bytes: &[u8]) {
        let Mapping { file, file_offset, size, .. } = &self.mappings[mapping];
        match self.huge_page {
            None => file.write_all_at(bytes, file_offset + page * PAGE).expect("memory"),
            // They take no write(2).
            Some(_) => {
                let mapped = HostMapping::map(file, *file_offset, *size).expect("a mapping");
                mapped.write(page * PAGE, bytes);
            }
        }
    }

    /// What the guest finds in each mapping, by address: unplugged blocks read as zeros.
    ///
    /// # Panics
    ///
    /// When its memory cannot be read.
    pub fn memory(&self) -> Vec<(u64, Vec<u8>)> {
        let mut memory = Vec::new();
        for mapping in &self.mappings {
            let mut bytes = vec![0; mapping.size as usize];
            mapping.file.read_exact_at(&mut bytes, mapping.file_offset).expect("memory");
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
    ///
    /// # Panics
    ///
    /// When its files cannot be asked.
    pub fn resident(&self) -> u64 {
        let mut files: Vec<(u64, u64)> = Vec::new();
        for mapping in &self.mappings {
            let metadata = mapping.file.metadata().expect("a file");
            files.push((metadata.ino(), metadata.blocks() * 512));
        }
        files.sort_unstable();
        files.dedup();
        files.iter().map(|(_, bytes)| bytes).sum()
    }

    fn region(&self) -> Option<&Mapping> {
        self.mappings.iter().find(|mapping| mapping.virtio_mem)
    }

    /// The Config that it is sent with.
    pub fn config(&self) -> Value {
        let mappings = self.mappings.iter().map(|mapping| {
            json!({
                "slot": mapping.slot, "gpa": mapping.gpa, "size": mapping.size, "zone_id": mapping.zone,
                "virtio_mem": mapping.virtio_mem, "file_offset": mapping.file_offset,
            })
        });
        let mut zones: Vec<&str> = self.mappings.iter().map(|mapping| mapping.zone).collect();
        zones.sort_unstable();
        zones.dedup();
        let zones = zones.into_iter().map(|zone| {
            let of = |virtio_mem| {
                let all = self.mappings.iter();
                let mappings = all.filter(|it| it.zone == zone && it.virtio_mem == virtio_mem);
                mappings.map(|mapping| mapping.size).sum::<u64>()
            };
            json!({
                "id": zone, "size": of(false), "hotplug_size": of(true), "shared": true, "prefault": self.prefault,
                "hugepages": self.huge_page.is_some(), "hugepage_size": self.huge_page, "reserve": false,
            })
        });
        json!({
            "vm_config": {
                "memory": {
                    "size": 0, "hugepages": false, "prefault": false, "hotplug_method": "VirtioMem",
                    "zones": zones.collect::<Vec<_>>(),
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

    /// The State that it is sent with.
    pub fn state(&self) -> Value {
        let leaf = |state: String| json!({ "snapshots": {}, "snapshot_data": { "state": state } });
        let node = |snapshots: Value| json!({ "snapshots": snapshots, "snapshot_data": null });
        let mut devices = json!({ "__serial": leaf("{}".to_owned()) });
        if let Some(region) = self.region() {
            let plugged = self.plugged.iter().filter(|plugged| **plugged).count() as u64 * BLOCK;
            let device = json!({
                "avail_features": 1u64 << 32, "acked_features": 1u64 << 32,
                "config": {
                    "block_size": BLOCK, "node_id": 0, "padding": [0, 0, 0, 0, 0, 0], "addr": region.gpa,
                    "region_size": region.size, "usable_region_size": region.size,
                    "plugged_size": plugged, "requested_size": 4 * BLOCK,
                },
                "blocks_state": { "bitmap": self.plugged },
            });
            devices[region.zone] = leaf(device.to_string());
            devices[format!("_virtio-pci-{}", region.zone)] = leaf("{}".to_owned());
        }
        json!({
            "snapshots": {
                "cpu-manager": node(json!({ "0": leaf("{}".to_owned()) })),
                "device-manager": node(devices),
                "memory-manager": leaf("{}".to_owned()),
            },
            "snapshot_data": { "state": "{\"clock\":null}" },
        })
    }
}

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}
