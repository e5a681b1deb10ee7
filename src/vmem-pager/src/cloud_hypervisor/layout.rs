//! The layout of a guest's memory, as Cloud Hypervisor's Config tells it.
//!
//! Slots are numbers of one process and change with each restore: a mapping is known by its zone and its
//! guest-physical address.

use std::collections::BTreeMap;
use std::fs::File;

use migration::stream::TARGET_PAGE_SIZE;
use ram_discard::ByteRange;
use rustix::fs::{FileType, fstat};
use serde::Deserialize;
use vmstate::printable;

/// Mappings of a guest: each has a descriptor, of which a process has a thousand or so.
pub const MAPPINGS_MAX: usize = 512;
/// All memory of a guest, bytes: as much as images have.
const MEMORY_MAX: u64 = 16 << 40;
/// Bytes of the name of a zone, so that an id of a RAM block has room for it.
const ZONE_MAX: usize = 200;
/// The zone of a guest that was given none.
const DEFAULT_ZONE: &str = "mem0";

/// A mapping of guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its slot in the process that sent it.
    pub slot: u32,
    /// The zone that it is of.
    pub zone: String,
    /// Guest-physical addresses.
    pub range: ByteRange,
    /// It is the region of the zone's virtio-mem device.
    pub virtio_mem: bool,
    /// Where its bytes begin in the file.
    pub file_offset: u64,
    /// Its memory is of huge pages of this size, bytes; 0 for the system's default size.
    pub huge_page: Option<u64>,
}

impl Mapping {
    /// The id of its RAM block in an image: unique, and such that a virtio-mem device, whose path is
    /// [`device_path`](Self::device_path), finds its own.
    pub fn id(&self) -> String {
        let Self { zone, range, .. } = self;
        match self.virtio_mem {
            true => format!("{}/{:#x}", self.device_path(), range.start()),
            false => format!("{zone}/{:#x}", range.start()),
        }
    }

    /// What the zone's virtio-mem device is called in an image.
    pub fn device_path(&self) -> String {
        format!("{}/vmem", self.zone)
    }

    /// Where its bytes are in the file.
    pub fn file_range(&self) -> ByteRange {
        ByteRange::new(self.file_offset, self.range.len()).expect("checked with the layout")
    }

    /// What it is called in messages.
    pub fn name(&self) -> String {
        let zone = printable(&self.zone);
        format!("the mapping of zone {zone:?} at {:#x}", self.range.start())
    }
}

/// The layout of a guest's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Ascending by address.
    pub mappings: Vec<Mapping>,
    /// All memory is populated when the VM is made, which an on-demand restore cannot be.
    pub prefault: bool,
}

#[derive(Deserialize)]
struct Config {
    vm_config: VmConfig,
    memory_manager_data: MemoryManagerData,
}

#[derive(Deserialize)]
struct VmConfig {
    memory: MemoryConfig,
}

#[derive(Deserialize)]
struct MemoryConfig {
    #[serde(flatten)]
    pages: Pages,
    zones: Option<Vec<ZoneConfig>>,
}

#[derive(Deserialize)]
struct ZoneConfig {
    id: String,
    #[serde(flatten)]
    pages: Pages,
}

#[derive(Clone, Copy, Deserialize)]
struct Pages {
    #[serde(default)]
    hugepages: bool,
    hugepage_size: Option<u64>,
    #[serde(default)]
    prefault: bool,
}

#[derive(Deserialize)]
struct MemoryManagerData {
    guest_ram_mappings: Vec<GuestRamMapping>,
}

#[derive(Deserialize)]
struct GuestRamMapping {
    slot: u32,
    gpa: u64,
    size: u64,
    zone_id: String,
    virtio_mem: bool,
    file_offset: u64,
}

impl Layout {
    /// Out of a Config.
    ///
    /// # Errors
    ///
    /// When it is no Config, or its layout is impossible; the sentence says what.
    pub fn parse(config: &[u8]) -> Result<Self, String> {
        let config: Config = serde_json::from_slice(config)
            .map_err(|error| format!("the Config is not what Cloud Hypervisor sends: {error}"))?;
        let memory = config.vm_config.memory;
        let mut prefault = memory.pages.prefault;
        let mut zones = BTreeMap::new();
        for zone in memory.zones.unwrap_or_default() {
            prefault |= zone.pages.prefault;
            zones.insert(zone.id, zone.pages);
        }
        if zones.is_empty() {
            zones.insert(DEFAULT_ZONE.to_owned(), memory.pages);
        }
        let found = config.memory_manager_data.guest_ram_mappings;
        if found.is_empty() || found.len() > MAPPINGS_MAX {
            let count = found.len();
            return Err(format!(
                "the Config has {count} mappings of memory; expected 1 to {MAPPINGS_MAX}"
            ));
        }
        let mappings = found.into_iter().map(|mapping| check(mapping, &zones));
        let mut mappings: Vec<Mapping> = mappings.collect::<Result<_, _>>()?;
        mappings.sort_by_key(|mapping| mapping.range.start());
        let mut slots: Vec<u32> = mappings.iter().map(|mapping| mapping.slot).collect();
        slots.sort_unstable();
        if slots.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err("two mappings of the Config have the same slot".to_owned());
        }
        for pair in mappings.windows(2) {
            if pair[0].range.overlaps(pair[1].range) {
                let (one, other) = (pair[0].name(), pair[1].name());
                return Err(format!("{one} overlaps {other}"));
            }
        }
        let total = mappings.iter().map(|mapping| u128::from(mapping.range.len())).sum::<u128>();
        if total > u128::from(MEMORY_MAX) {
            let limit = MEMORY_MAX >> 40;
            return Err(format!(
                "the guest has {total:#x} bytes of memory; at most {limit} TiB are taken"
            ));
        }
        let devices: Vec<&str> =
            mappings.iter().filter(|it| it.virtio_mem).map(|it| it.zone.as_str()).collect();
        for (index, zone) in devices.iter().enumerate() {
            if devices[..index].contains(zone) {
                let zone = printable(zone);
                return Err(format!("zone {zone:?} has two regions of virtio-mem; expected one"));
            }
        }
        Ok(Self { mappings, prefault })
    }

    /// All memory, bytes.
    pub fn size(&self) -> u64 {
        self.mappings.iter().map(|mapping| mapping.range.len()).sum()
    }

    /// The mapping that has all of a range of guest-physical addresses, by its place.
    pub fn find(&self, range: ByteRange) -> Option<usize> {
        let after = self.mappings.partition_point(|it| it.range.start() <= range.start());
        let index = after.checked_sub(1)?;
        self.mappings[index].range.contains(range).then_some(index)
    }

    /// Gives each mapping the file that came for its slot, in the order of the mappings.
    ///
    /// # Errors
    ///
    /// When one is missing or too many, is no file, or does not have all of the mapping.
    pub fn assign(&self, mut files: BTreeMap<u32, File>) -> Result<Vec<File>, String> {
        let mut assigned = Vec::new();
        for mapping in &self.mappings {
            let name = mapping.name();
            let Some(file) = files.remove(&mapping.slot) else {
                return Err(format!(
                    "{name} has slot {}, for which no descriptor came",
                    mapping.slot
                ));
            };
            let stat = fstat(&file).map_err(|errno| format!("{name}: its file: {errno}"))?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                return Err(format!("{name}: its descriptor is not of a memfd or file"));
            }
            let (size, end) = (stat.st_size.cast_unsigned(), mapping.file_range().end());
            if size < end {
                return Err(format!(
                    "{name}: its file has {size:#x} bytes; expected {end:#x} at least"
                ));
            }
            assigned.push(file);
        }
        match files.first_key_value() {
            Some((slot, _)) => {
                Err(format!("a descriptor came for slot {slot}, which no mapping has"))
            }
            None => Ok(assigned),
        }
    }
}

fn check(found: GuestRamMapping, zones: &BTreeMap<String, Pages>) -> Result<Mapping, String> {
    let GuestRamMapping { slot, gpa, size, zone_id, virtio_mem, file_offset } = found;
    let zone = printable(&zone_id);
    // A slash would make ids of RAM blocks ambiguous.
    if zone_id.is_empty() || zone_id.len() > ZONE_MAX || zone_id.contains('/') {
        return Err(format!(
            "the zone {zone:?}: its name has to have 1 to {ZONE_MAX} bytes, and no slash"
        ));
    }
    let pages = zones.get(&zone_id).copied();
    let Some(pages) = pages else {
        return Err(format!("a mapping is of the zone {zone:?}, which the Config does not have"));
    };
    let huge_page = pages.hugepages.then_some(pages.hugepage_size.unwrap_or(0));
    let unit = huge_page.unwrap_or(0).max(TARGET_PAGE_SIZE);
    if !unit.is_power_of_two() {
        return Err(format!(
            "the zone {zone:?} has pages of {unit:#x} bytes; expected a power of two"
        ));
    }
    let whole = [gpa, size, file_offset].iter().all(|value| value.is_multiple_of(unit));
    let end = file_offset.checked_add(size).filter(|end| i64::try_from(*end).is_ok());
    match ByteRange::new(gpa, size).filter(|_| whole && end.is_some()) {
        Some(range) => {
            Ok(Mapping { slot, zone: zone_id, range, virtio_mem, file_offset, huge_page })
        }
        None => Err(format!(
            "the mapping of zone {zone:?} at {gpa:#x}, of {size:#x} bytes at {file_offset:#x} of its file, is \
             impossible: all have to be whole pages of {unit:#x} bytes that do not wrap"
        )),
    }
}
