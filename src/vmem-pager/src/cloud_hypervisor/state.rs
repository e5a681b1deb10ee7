//! What is plugged of virtio-mem regions, as Cloud Hypervisor's State tells it.

use std::collections::HashMap;

use migration::inspect::SavedVirtioMem;
use migration::stream::TARGET_PAGE_SIZE;
use serde::Deserialize;
use serde::de::IgnoredAny;
use vmstate::wire::{WireReader, WireWrite};

use super::layout::{Layout, Mapping};

/// Last part of the id of the section before RAM.
const EARLY: &str = "virtio-mem-device-early";
/// Last part of the id of the section after RAM.
const LATE: &str = "virtio-mem";

/// A virtio-mem device of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// What is plugged.
    pub state: SavedVirtioMem,
    /// The payload of the section before RAM that says so in an image.
    pub early: Vec<u8>,
    /// The payload of the section after RAM: usable and requested size. `None` when they are not what
    /// readers of images take.
    pub late: Option<Vec<u8>>,
}

impl Device {
    /// The id of the section before RAM.
    pub fn early_id(&self) -> String {
        format!("{}/{EARLY}", self.state.path)
    }

    /// The id of the section after RAM.
    pub fn late_id(&self) -> String {
        format!("{}/{LATE}", self.state.path)
    }
}

#[derive(Deserialize)]
struct State {
    snapshots: Managers,
}

#[derive(Deserialize)]
struct Managers {
    #[serde(rename = "device-manager")]
    device_manager: DeviceManager,
    #[serde(rename = "memory-manager")]
    _memory_manager: IgnoredAny,
    #[serde(rename = "cpu-manager")]
    _cpu_manager: IgnoredAny,
}

#[derive(Deserialize)]
struct DeviceManager {
    snapshots: HashMap<String, Node>,
}

#[derive(Deserialize)]
struct Node {
    snapshot_data: Option<Data>,
}

#[derive(Deserialize)]
struct Data {
    state: String,
}

#[derive(Deserialize)]
struct VirtioMemState {
    config: Geometry,
    blocks_state: BlocksState,
}

#[derive(Deserialize)]
struct Geometry {
    block_size: u64,
    node_id: u16,
    addr: u64,
    region_size: u64,
    usable_region_size: u64,
    plugged_size: u64,
    requested_size: u64,
}

#[derive(Deserialize)]
struct BlocksState {
    bitmap: Vec<bool>,
}

/// The virtio-mem devices of a State: one for each mapping of `layout` that is a region of one, in the order of
/// the mappings; `None` for the others.
///
/// # Errors
///
/// When it is no State, or what it says of a device is impossible or not of the layout.
pub fn devices(state: &[u8], layout: &Layout) -> Result<Vec<Option<Device>>, String> {
    let state: State = serde_json::from_slice(state)
        .map_err(|error| format!("the State is not what Cloud Hypervisor sends: {error}"))?;
    let nodes = state.snapshots.device_manager.snapshots;
    let device = |mapping: &Mapping| {
        mapping
            .virtio_mem
            .then(|| {
                device(mapping, nodes.get(&mapping.zone))
                    .map_err(|what| format!("{}: {what}", mapping.name()))
            })
            .transpose()
    };
    layout.mappings.iter().map(device).collect()
}

fn device(mapping: &Mapping, node: Option<&Node>) -> Result<Device, String> {
    let data = node.and_then(|node| node.snapshot_data.as_ref());
    let Some(Data { state }) = data else {
        return Err("the State has nothing of its virtio-mem device".to_owned());
    };
    let state: VirtioMemState = serde_json::from_str(state)
        .map_err(|error| format!("the state of its virtio-mem device: {error}"))?;
    let VirtioMemState { config, blocks_state: BlocksState { bitmap } } = state;
    let Geometry { block_size, addr, region_size, .. } = config;
    if (addr, region_size) != (mapping.range.start(), mapping.range.len()) {
        return Err(format!(
            "its virtio-mem device has its region at {addr:#x}, of {region_size:#x} bytes; expected that \
             of the mapping, of {:#x} bytes",
            mapping.range.len()
        ));
    }
    let aligned = |size: u64| size.is_multiple_of(block_size);
    if !block_size.is_power_of_two()
        || block_size < TARGET_PAGE_SIZE
        || !aligned(addr)
        || !aligned(region_size)
    {
        return Err(format!(
            "its virtio-mem device has blocks of {block_size:#x} bytes; expected a power of two of which \
             region and address are multiples"
        ));
    }
    let (found, expected) = (bitmap.len() as u64, region_size / block_size);
    if found != expected {
        return Err(format!("its virtio-mem device tells of {found} blocks; expected {expected}"));
    }
    let plugged = bitmap.iter().filter(|plugged| **plugged).count() as u64 * block_size;
    if plugged != config.plugged_size {
        return Err(format!(
            "its virtio-mem device has {plugged:#x} bytes of plugged blocks, and says {:#x}",
            config.plugged_size
        ));
    }
    let mut early = Vec::new();
    for value in [addr, region_size, block_size] {
        early.put_be64(value);
    }
    early.put_be32(config.node_id.into());
    early.put_be64(plugged);
    for word in bitmap.chunks(64) {
        let bits = word.iter().enumerate().map(|(bit, plugged)| u64::from(*plugged) << bit);
        early.put_be64(bits.sum());
    }
    let path = mapping.device_path();
    let read =
        SavedVirtioMem::read_early(&format!("{path}/{EARLY}"), 0, &mut WireReader::new(&early[..]));
    let Ok(Some((state, _))) = read else {
        return Err(format!("its virtio-mem region of {expected} blocks is more than images take"));
    };
    let Geometry { usable_region_size: usable, requested_size: requested, .. } = config;
    let sound =
        usable <= region_size && requested <= usable && aligned(usable) && aligned(requested);
    let late = sound.then(|| {
        let mut late = Vec::new();
        late.put_be64(usable);
        late.put_be64(requested);
        late
    });
    Ok(Device { state, early, late })
}
