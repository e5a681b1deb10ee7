//! The layout of a guest's memory, as Cloud Hypervisor's Config tells it.
//!
//! Slots are numbers of one process and change with each restore: a mapping is known by its zone and its
//! guest-physical address.

use std::collections::BTreeMap;
use std::fs::File;

use migration::stream::TARGET_PAGE_SIZE;
use ram_discard::{FileRange, GpaRange};
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
    pub range: GpaRange,
    /// It is the region of the zone's virtio-mem device.
    pub virtio_mem: bool,
    /// Where its bytes begin in the file.
    pub file_offset: u64,
    /// Its memory is of huge pages of this size, bytes; 0 for the system's default size.
    pub huge_page: Option<u64>,
    /// Cloud Hypervisor reserves all of it when the VM is made.
    pub reserve: bool,
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
    pub fn file_range(&self) -> FileRange {
        FileRange::new(self.file_offset, self.range.len()).expect("checked with the layout")
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
    /// All memory is resident once the VM is made, which an on-demand restore cannot be.
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
    #[serde(default)]
    reserve: bool,
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
    pub fn find(&self, range: GpaRange) -> Option<usize> {
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
    match GpaRange::new(gpa, size).filter(|_| whole && end.is_some()) {
        Some(range) => {
            let reserve = pages.reserve;
            Ok(Mapping { slot, zone: zone_id, range, virtio_mem, file_offset, huge_page, reserve })
        }
        None => Err(format!(
            "the mapping of zone {zone:?} at {gpa:#x}, of {size:#x} bytes at {file_offset:#x} of its file, is \
             impossible: all have to be whole pages of {unit:#x} bytes that do not wrap"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    /// Excerpts of Configs that Cloud Hypervisor sent (54.0-dev at ae44c2971): a zone of a file that crosses the
    /// PCI hole, and a guest with virtio-mem that was restored, whose slots are numbered anew.
    const FILE_ZONE: &str = r#"{"vm_config":{"memory":{"size":0,"mergeable":false,"hotplug_method":"Acpi","shared":false,
        "hugepages":false,"prefault":false,"reserve":false,"zones":[{"id":"z0","size":4294967296,"file":"/guest/ram-file",
        "shared":true,"hugepages":false,"prefault":false,"reserve":false,"mergeable":false}],"thp":true}},
        "memory_manager_data":{"memory_ranges":{"data":[]},"guest_ram_mappings":[
        {"slot":0,"gpa":0,"size":3221225472,"zone_id":"z0","virtio_mem":false,"file_offset":0},
        {"slot":1,"gpa":4294967296,"size":1073741824,"zone_id":"z0","virtio_mem":false,"file_offset":3221225472}],
        "arch_mem_regions":[{"base":4294967296,"size":18446744073709551615,"r_type":"Ram"}]}}"#;
    const RENUMBERED: &str = r#"{"vm_config":{"memory":{"size":268435456,"hotplug_method":"VirtioMem",
        "hotplug_size":1073741824,"shared":true,"hugepages":false,"prefault":false,"thp":true}},
        "memory_manager_data":{"guest_ram_mappings":[
        {"slot":2,"gpa":0,"size":268435456,"zone_id":"mem0","virtio_mem":false,"file_offset":0},
        {"slot":3,"gpa":4294967296,"size":1073741824,"zone_id":"mem0","virtio_mem":true,"file_offset":0}]}}"#;

    fn parse(config: &Value) -> Result<Layout, String> {
        Layout::parse(config.to_string().as_bytes())
    }

    fn edited(pointer: &str, value: Value) -> Result<Layout, String> {
        let mut config: Value = serde_json::from_str(RENUMBERED).unwrap();
        *config.pointer_mut(pointer).unwrap() = value;
        parse(&config)
    }

    #[test]
    fn layouts_that_cloud_hypervisor_sent_are_read() {
        let layout = Layout::parse(FILE_ZONE.as_bytes()).unwrap();
        let ids: Vec<String> = layout.mappings.iter().map(Mapping::id).collect();
        assert_eq!(ids, ["z0/0x0", "z0/0x100000000"]);
        assert_eq!(layout.mappings[1].file_range(), FileRange::new(3 << 30, 1 << 30).unwrap());
        let layout = Layout::parse(RENUMBERED.as_bytes()).unwrap();
        let ids: Vec<String> = layout.mappings.iter().map(Mapping::id).collect();
        assert_eq!(ids, ["mem0/0x0", "mem0/vmem/0x100000000"]);
        assert_eq!(layout.size(), 1280 << 20);
        assert_eq!(layout.find(GpaRange::new(4 << 30, 4096).unwrap()), Some(1));
        assert_eq!(layout.find(GpaRange::new(256 << 20, 4096).unwrap()), None);
        assert_eq!(layout.find(GpaRange::new((256 << 20) - 4096, 8192).unwrap()), None);
    }

    #[test]
    fn zones_say_of_which_pages_their_memory_is() {
        let memory = "/vm_config/memory";
        let layout = edited(
            memory,
            json!({ "size": 0, "hugepages": true, "hugepage_size": 1u64 << 28, "prefault": true }),
        );
        let layout = layout.unwrap();
        assert!(layout.prefault && layout.mappings[0].huge_page == Some(1 << 28));
        let zone = json!({ "id": "mem0", "size": 1, "hugepages": true });
        let layout = edited(memory, json!({ "size": 0, "zones": [zone] })).unwrap();
        assert_eq!((layout.prefault, layout.mappings[0].huge_page), (false, Some(0)));
        let layout =
            edited(memory, json!({ "size": 0, "hugepages": true, "hugepage_size": 1u64 << 30 }));
        assert!(layout.unwrap_err().contains("is impossible"), "256 MiB are no page of 1 GiB");
    }

    #[test]
    fn impossible_layouts_are_refused() {
        let first = |field: &str| format!("/memory_manager_data/guest_ram_mappings/0/{field}");
        for (pointer, value, what) in [
            (first("gpa"), json!(4096u64 << 20), "overlaps"),
            (first("gpa"), json!(u64::MAX - 4095), "is impossible"),
            (first("gpa"), json!(1), "is impossible"),
            (first("size"), json!(0), "is impossible"),
            (first("size"), json!(4097), "is impossible"),
            (first("file_offset"), json!(u64::MAX - 4095), "is impossible"),
            (first("file_offset"), json!(1), "is impossible"),
            (first("slot"), json!(3), "the same slot"),
            (first("slot"), json!(1u64 << 32), "the Config is not what"),
            (first("zone_id"), json!("other"), "which the Config does not have"),
            (first("virtio_mem"), json!(true), "two regions of virtio-mem"),
            (first("zone_id"), json!("a/b"), "no slash"),
            ("/memory_manager_data/guest_ram_mappings".to_owned(), json!([]), "0 mappings"),
        ] {
            let error = edited(&pointer, value).unwrap_err();
            assert!(error.contains(what), "{pointer}: {error}");
        }
        let second = "/memory_manager_data/guest_ram_mappings/1/size";
        assert!(edited(second, json!(1u64 << 45)).unwrap_err().contains("at most 16 TiB"));
    }

    proptest! {
        #[test]
        fn any_mappings_are_refused_or_do_not_overlap(
            mappings in proptest::collection::vec((0..4u32, 0..6u64, 0..4u64, 0..3u64, any::<bool>()), 0..5)
        ) {
            let mapping = |(slot, gpa, size, file_offset, virtio_mem)| json!({
                "slot": slot, "gpa": gpa * 4096, "size": size * 4096, "zone_id": "mem0",
                "virtio_mem": virtio_mem, "file_offset": file_offset * 4096,
            });
            let mappings: Vec<Value> = mappings.into_iter().map(mapping).collect();
            if let Ok(layout) = edited("/memory_manager_data/guest_ram_mappings", json!(mappings)) {
                prop_assert_eq!(layout.mappings.len(), mappings.len());
                for pair in layout.mappings.windows(2) {
                    prop_assert!(pair[0].range.end() <= pair[1].range.start());
                }
            }
        }
    }
}
