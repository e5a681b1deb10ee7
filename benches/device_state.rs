//! What saving and loading the state of a device costs, sections `virtio-mem-device-early` and
//! `virtio-mem`, against memcpy of the same bytes. Loading also tells the device's memory of each
//! range that becomes plugged, of which there are 262144 at worst.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::hint::black_box;
use std::sync::Arc;

use migration::stream::{SectionHeader, SectionKind};
use migration::{DevicePhase, DeviceRegistry, DeviceSection};
use ram_discard::memory::RamBlock;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{DeviceState, Geometry, VirtioMem};
use virtio_mem::sections;
use vmstate::wire::WireReader;

use common::{busy, compare, head, memfd};

const REGION: u64 = 1 << 40;
const BLOCK: u64 = 2 << 20;
const RUNS: usize = 11;
const WORDS: usize = (REGION / BLOCK / 64) as usize;
const PHASES: [DevicePhase; 2] = [DevicePhase::Early, DevicePhase::Late];

/// A device, whose region has memory behind it (nothing of it touched) when `mapped`.
fn registry(plugged: u64, mapped: bool) -> DeviceRegistry {
    let geometry = Geometry::new(1 << 40, REGION, BLOCK, None).unwrap();
    let state = DeviceState {
        requested_size: REGION,
        usable_region_size: REGION,
        plugged: vec![plugged; WORDS],
    };
    let device = VirtioMem::restore(geometry, state).unwrap();
    let controller = Arc::new(MemController::new(InitialState::volatile(device)));
    if mapped {
        let ram = RamBlock::new("vmem0".into(), 1 << 40, REGION, memfd(REGION), 0).unwrap();
        controller.set_memory(vec![Arc::new(ram)]).unwrap();
    }
    let mut registry = DeviceRegistry::new(sections::properties());
    for (idstr, section) in sections::of("0000:00:01.0", &controller) {
        registry.register(&idstr, 0, section).unwrap();
    }
    registry
}

fn header(section: &DeviceSection) -> SectionHeader {
    SectionHeader {
        kind: SectionKind::Full,
        section_id: 1,
        idstr: section.idstr.clone(),
        instance_id: section.instance_id,
        version_id: section.version_id,
    }
}

fn main() {
    head("State of a device of 1 TiB in blocks of 2 MiB", "memcpy");
    for (name, plugged) in [("all plugged", u64::MAX), ("every other block", 0x5555_5555_5555_5555)]
    {
        let mut source = registry(plugged, false);
        let mut save = || PHASES.map(|phase| source.save_phase(phase).unwrap());
        let phases = save();
        let sent: Vec<u8> =
            phases.iter().flatten().flat_map(|section| section.payload.clone()).collect();
        let times = |work: &mut dyn FnMut()| busy(|| (0..64).for_each(|_| work())) / 64;
        let copy = || times(&mut || drop(black_box(black_box(&sent).clone())));
        let what = format!("{} bytes", sent.len());
        compare(&format!("{name}, saved, {what}"), RUNS, || times(&mut || _ = save()), copy);
        let load = |mapped| {
            let mut to = registry(0, mapped);
            busy(|| {
                for (sections, phase) in phases.iter().zip(PHASES) {
                    for section in sections {
                        let mut reader = WireReader::new(&section.payload[..]);
                        to.load_section(&header(section), phase, &mut reader).unwrap();
                    }
                }
                to.finish_load().unwrap();
            })
        };
        compare(&format!("{name}, loaded"), RUNS, || load(false), copy);
        compare(&format!("{name}, loaded, with memory"), RUNS, || load(true), copy);
    }
}
