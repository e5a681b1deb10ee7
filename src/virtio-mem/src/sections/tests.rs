use super::*;
use crate::controller::{InitialState, StateRecord, StateStore};
use crate::device::{BlockSpan, Geometry, Request, Response, VirtioMem};
use migration::DevicePhase::{Early, Late};
use migration::inspect::inspect;
use migration::stream::{
    Configuration, SectionHeader, SectionKind, put_description, put_eof, put_footer, put_header,
    put_section,
};
use migration::{DeviceRegistry, DeviceSection, RegistryError};
use proptest::prelude::*;
use std::io::{self, Cursor};
use vmstate::wire::WireReader;
use vmstate::{Problem, VmStateError};

const BLOCK: u64 = 0x20_0000;
const REGION_AT: u64 = 0x1_4000_0000;
const NR: u64 = 70;
const PATH: &str = "0000:00:01.0";

fn geometry() -> Geometry {
    Geometry::new(REGION_AT, NR * BLOCK, BLOCK, Some(3)).unwrap()
}

fn controller(state: DeviceState) -> Arc<MemController> {
    let device = VirtioMem::restore(geometry(), state).unwrap();
    Arc::new(MemController::new(InitialState::volatile(device)))
}

/// Blocks 0, 2 and 69 are plugged.
fn sample() -> DeviceState {
    DeviceState {
        requested_size: 4 * BLOCK,
        usable_region_size: NR * BLOCK,
        plugged: vec![0b101, 1 << 5],
    }
}

fn empty() -> DeviceState {
    DeviceState { requested_size: 0, usable_region_size: 0, plugged: vec![0, 0] }
}

fn registry(controller: &Arc<MemController>, properties: Properties) -> DeviceRegistry {
    let mut registry = DeviceRegistry::new(properties);
    for (idstr, section) in of(PATH, controller) {
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

fn save(controller: &Arc<MemController>, properties: &Properties) -> [Vec<DeviceSection>; 2] {
    let mut registry = registry(controller, properties.clone());
    [Early, Late].map(|phase| registry.save_phase(phase).unwrap())
}

/// Loads both phases, as far as that goes.
fn load(
    controller: &Arc<MemController>,
    properties: &Properties,
    phases: &[Vec<DeviceSection>; 2],
) -> Result<(), RegistryError> {
    let mut registry = registry(controller, properties.clone());
    for (sections, phase) in phases.iter().zip([Early, Late]) {
        for section in sections {
            let mut reader = WireReader::new(&section.payload[..]);
            registry.load_section(&header(section), phase, &mut reader)?;
        }
    }
    registry.finish_load()
}

#[rustfmt::skip]
const EARLY_BYTES: [u8; 52] = [
    0, 0, 0, 1, 0x40, 0, 0, 0,          // addr
    0, 0, 0, 0, 0x08, 0xc0, 0, 0,       // region_size: 140 MiB
    0, 0, 0, 0, 0, 0x20, 0, 0,          // block_size
    0, 0, 0, 3,                         // node
    0, 0, 0, 0, 0, 0x60, 0, 0,          // size: three blocks
    0, 0, 0, 0, 0, 0, 0, 0b101,         // blocks 0 and 2
    0, 0, 0, 0, 0, 0, 0, 0b10_0000,     // block 69
];

#[rustfmt::skip]
const NORMAL_BYTES: [u8; 16] = [
    0, 0, 0, 0, 0x08, 0xc0, 0, 0,       // usable_region_size
    0, 0, 0, 0, 0, 0x80, 0, 0,          // requested_size
];

#[test]
fn all_descriptions_are_valid() {
    for vmstate in [&EARLY, &NORMAL] {
        assert_eq!(vmstate.validate(&properties()), []);
    }
    for level in COMPAT_LEVELS {
        properties().apply_level(COMPAT_LEVELS, level.name).unwrap();
    }
}

#[test]
fn every_member_of_the_state_is_sent() {
    let members = vmstate::members!(VirtioMemState {
        addr,
        region_size,
        block_size,
        node,
        size,
        usable_region_size,
        requested_size,
        bitmap,
    });
    for level in COMPAT_LEVELS {
        let mut properties = properties();
        properties.apply_level(COMPAT_LEVELS, level.name).unwrap();
        assert_eq!(members.missing(&[&EARLY, &NORMAL], &properties), [""; 0], "{}", level.name);
    }
    let late = ["usable_region_size", "requested_size"];
    assert_eq!(members.missing(&[&EARLY], &properties()), late);
}

#[test]
fn the_sections_have_qemus_bytes() {
    let [early, normal] = save(&controller(sample()), &properties());
    let of = |sections: &[DeviceSection]| {
        assert_eq!(sections.len(), 1);
        (sections[0].idstr.clone(), sections[0].version_id, sections[0].payload.clone())
    };
    let id = |name: &str| format!("{PATH}/{name}");
    assert_eq!(of(&early), (id("virtio-mem-device-early"), 1, EARLY_BYTES.to_vec()));
    assert_eq!(of(&normal), (id("virtio-mem"), 1, NORMAL_BYTES.to_vec()));
    let field = |name: &str, kind: &str, size: u64| serde_json::json!({ "name": name, "type": kind, "size": size });
    let expected = serde_json::json!({
        "name": "0000:00:01.0/virtio-mem-device-early",
        "instance_id": 0,
        "vmsd_name": "virtio-mem-device-early",
        "version": 1,
        "fields": [
            field("addr", "uint64", 8),
            field("region_size", "uint64", 8),
            field("block_size", "uint64", 8),
            field("node", "uint32", 4),
            field("size", "uint64", 8),
            field("bitmap", "bitmap", 16),
        ],
    });
    assert_eq!(early[0].description, expected);
}

#[test]
fn a_stream_of_them_is_understood_by_the_inspector() {
    let phases = save(&controller(sample()), &properties());
    let mut stream = Vec::new();
    put_header(&mut stream, &Configuration::new("small"));
    for (section_id, section) in (0..).zip(phases.iter().flatten()) {
        put_section(&mut stream, &SectionHeader { section_id, ..header(section) });
        stream.extend(&section.payload);
        put_footer(&mut stream, section_id);
    }
    put_eof(&mut stream);
    let devices: Vec<_> = phases.iter().flatten().map(|s| s.description.clone()).collect();
    let json = serde_json::json!({ "page_size": 4096, "devices": devices }).to_string();
    put_description(&mut stream, json.as_bytes());
    let inspection = inspect(Cursor::new(stream));
    assert!(inspection.error.is_none() && inspection.warnings.is_empty(), "{inspection:?}");
    let [device] = &inspection.virtio_mem[..] else { panic!("{inspection:?}") };
    assert_eq!((&device.path[..], device.addr, device.node), (PATH, REGION_AT, 3));
    assert_eq!(device.plugged_size, 3 * BLOCK);
    assert_eq!(device.usable_region_size, Some(NR * BLOCK));
    assert_eq!(device.requested_size, Some(4 * BLOCK));
    let plugged: Vec<_> = device.plugged().map(|range| range.start() / BLOCK).collect();
    assert_eq!(plugged, [0, 2, 69]);
}

#[test]
fn before_8_0_everything_comes_after_ram() {
    let mut old = properties();
    old.apply_level(COMPAT_LEVELS, "7.2").unwrap();
    let phases = save(&controller(sample()), &old);
    assert!(phases[0].is_empty());
    let expected = [
        &EARLY_BYTES[..28],
        &NORMAL_BYTES[..8],
        &EARLY_BYTES[28..36],
        &NORMAL_BYTES[8..],
        &EARLY_BYTES[36..],
    ];
    assert_eq!(phases[1][0].payload, expected.concat());
    let destination = controller(empty());
    load(&destination, &old, &phases).unwrap();
    assert_eq!(destination.save_state(), sample());
    let early = save(&controller(sample()), &properties());
    assert!(matches!(load(&destination, &old, &early), Err(RegistryError::Unexpected(_))));
}

#[test]
fn block_state_is_there_before_ram_and_the_sizes_after_it() {
    let phases = save(&controller(sample()), &properties());
    let destination = controller(empty());
    let mut registry = registry(&destination, properties());
    let mut reader = WireReader::new(&phases[0][0].payload[..]);
    registry.load_section(&header(&phases[0][0]), Early, &mut reader).unwrap();
    assert_eq!(destination.save_state().plugged, sample().plugged);
    assert_eq!(destination.config().requested_size, 0);
    assert!(
        matches!(registry.finish_load(), Err(RegistryError::Missing(id)) if id.ends_with("/virtio-mem"))
    );
    load(&destination, &properties(), &phases).unwrap();
    assert_eq!(destination.save_state(), sample());
}

#[test]
fn sections_in_another_order_are_refused() {
    let [early, normal] = save(&controller(sample()), &properties());
    let destination = controller(empty());
    let refuse = |phases: [Vec<DeviceSection>; 2]| {
        let error = load(&destination, &properties(), &phases).unwrap_err();
        assert_eq!(destination.save_state(), empty());
        error
    };
    let error = refuse([normal.clone(), early.clone()]);
    assert!(matches!(error, RegistryError::Phase { phase: Late, .. }), "{error}");
    let error = refuse([Vec::new(), early]);
    assert!(matches!(error, RegistryError::Phase { phase: Early, .. }), "{error}");
}

#[test]
fn a_change_of_geometry_names_the_field_and_both_values() {
    let cases = [(0, "addr"), (8, "region_size"), (16, "block_size"), (24, "node"), (35, "size")];
    for (at, name) in cases {
        let mut phases = save(&controller(sample()), &properties());
        phases[0][0].payload[at] ^= 1;
        let destination = controller(empty());
        let error = load(&destination, &properties(), &phases).unwrap_err();
        let RegistryError::State(VmStateError { place, problem }) = error else { panic!() };
        assert_eq!(place.field, Some(name));
        assert_eq!(place.device, "0000:00:01.0/virtio-mem-device-early");
        let known = matches!(problem, Problem::Immutable { .. } | Problem::Derived { .. });
        assert!(known, "{problem}");
        assert_eq!(destination.save_state(), empty());
    }
    let mut phases = save(&controller(sample()), &properties());
    phases[0][0].payload[16..24].copy_from_slice(&0x40_0000u64.to_be_bytes());
    let error = load(&controller(empty()), &properties(), &phases).unwrap_err().to_string();
    let expected = "0000:00:01.0/virtio-mem-device-early: virtio-mem-device-early, field \
                    block_size at byte 0x10: 4194304 in the stream, 2097152 here";
    assert_eq!(error, expected);
}

#[test]
fn what_qemu_does_not_check_is_refused() {
    let broken = |bytes: &[u8], phase: usize, at: usize| {
        let mut phases = save(&controller(sample()), &properties());
        phases[phase][0].payload[at..at + bytes.len()].copy_from_slice(bytes);
        let destination = controller(empty());
        load(&destination, &properties(), &phases).unwrap_err().to_string()
    };
    let word = |value: u64| value.to_be_bytes();
    // A bit behind the region, with a size that counts it.
    let tail = [word(4 * BLOCK), word(0b101), word(1 << 5 | 1 << 6)].concat();
    assert!(broken(&tail, 0, 28).contains("past the end"));
    assert!(broken(&word(4 * BLOCK), 0, 28).contains("the rest of the state"));
    assert!(broken(&word(NR * BLOCK + BLOCK), 1, 0).contains("usable region size"));
    assert!(broken(&word(NR * BLOCK - 1), 1, 0).contains("usable region size"));
    assert!(broken(&word(2 * BLOCK), 1, 0).contains("usable region size"));
    assert!(broken(&word(69 * BLOCK), 1, 0).contains("block 69 is plugged outside"));
    assert!(broken(&word(BLOCK + 1), 1, 8).contains("not a multiple"));
    assert!(broken(&word(71 * BLOCK), 1, 8).contains("larger than the region"));
}

/// A store that fails.
struct Failing;

impl StateStore for Failing {
    fn commit(&mut self, _record: &StateRecord<'_>) -> io::Result<()> {
        Err(io::Error::other("the disk is gone"))
    }

    fn mark_answered(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn what_the_device_refuses_changes_nothing() {
    let phases = save(&controller(sample()), &properties());
    let mut start = InitialState::volatile(VirtioMem::restore(geometry(), empty()).unwrap());
    start.store = Box::new(Failing);
    let destination = Arc::new(MemController::new(start));
    let error = load(&destination, &properties(), &phases).unwrap_err().to_string();
    assert!(error.contains("the disk is gone"), "{error}");
    assert_eq!(destination.save_state(), empty());
}

#[test]
fn a_loaded_device_goes_on_as_the_saved_one_would() {
    let phases = save(&controller(sample()), &properties());
    let destination = controller(empty());
    load(&destination, &properties(), &phases).unwrap();
    let state = Request::State(BlockSpan { addr: REGION_AT + 69 * BLOCK, nb_blocks: 1 });
    assert!(matches!(destination.execute(state), Response::AckState(_)));
    let plug = Request::Plug(BlockSpan { addr: REGION_AT, nb_blocks: 1 });
    assert_eq!(destination.execute(plug), Response::Error, "it is plugged");
}

fn any_state() -> impl Strategy<Value = DeviceState> {
    let word = prop_oneof![Just(0), Just(u64::MAX), any::<u64>()];
    (0..=NR, 0..=NR, word.clone(), word).prop_map(|(requested, usable, first, second)| {
        let mut plugged = vec![first, second & 0b11_1111];
        let usable = usable.max(requested);
        for block in usable..NR {
            plugged[(block / 64) as usize] &= !(1 << (block % 64));
        }
        let (requested_size, usable_region_size) = (requested * BLOCK, usable * BLOCK);
        DeviceState { requested_size, usable_region_size, plugged }
    })
}

fn any_properties() -> impl Strategy<Value = Properties> {
    prop::sample::select(vec!["8.0", "7.2"]).prop_map(|level| {
        let mut properties = properties();
        properties.apply_level(COMPAT_LEVELS, level).unwrap();
        properties
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn loading_and_saving_again_gives_the_same_bytes(
        (source, before, properties) in (any_state(), any_state(), any_properties()),
    ) {
        let phases = save(&controller(source.clone()), &properties);
        let destination = controller(before);
        load(&destination, &properties, &phases).unwrap();
        prop_assert_eq!(destination.save_state(), source);
        for (sections, again) in phases.iter().zip(save(&destination, &properties)) {
            let bytes = |sections: &[DeviceSection]| -> Vec<Vec<u8>> {
                sections.iter().map(|section| section.payload.clone()).collect()
            };
            prop_assert_eq!(bytes(sections), bytes(&again));
        }
    }

    /// All in one section, so that a refusal leaves all as it was.
    #[test]
    fn a_wrong_byte_is_refused_or_gives_a_state_that_holds(
        (source, before) in (any_state(), any_state()),
        (at, bits) in (any::<prop::sample::Index>(), 1u8..),
    ) {
        let mut old = properties();
        old.set(EARLY_MIGRATION, false).unwrap();
        let mut phases = save(&controller(source), &old);
        let payload = &mut phases[1][0].payload;
        let at = at.index(payload.len());
        payload[at] ^= bits;
        let destination = controller(before.clone());
        match load(&destination, &old, &phases) {
            Err(_) => prop_assert_eq!(destination.save_state(), before),
            Ok(()) => {
                prop_assert!(VirtioMem::restore(geometry(), destination.save_state()).is_ok());
                prop_assert_eq!(save(&destination, &old)[1][0].payload.clone(), phases[1][0].payload.clone());
            }
        }
    }

    #[test]
    fn what_is_cut_anywhere_is_refused((source, before) in (any_state(), any_state())) {
        let mut old = properties();
        old.set(EARLY_MIGRATION, false).unwrap();
        let whole = save(&controller(source), &old);
        for len in 0..whole[1][0].payload.len() {
            let mut phases = whole.clone();
            phases[1][0].payload.truncate(len);
            let destination = controller(before.clone());
            prop_assert!(load(&destination, &old, &phases).is_err());
            prop_assert_eq!(destination.save_state(), before.clone());
        }
    }
}
