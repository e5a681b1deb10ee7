mod hostile;
mod ours;
mod sample;
mod sparse;

use std::io::Cursor;

use ram_discard::{MemoryState, RamDiscardSource};
use serde_json::json;

use super::*;
use crate::stream::{PageHeader, PageKind};
use sample::{ADDR, BLOCK, MIB, PAGE, RAM, REGION, Sample};

fn look(bytes: &[u8]) -> Inspection {
    inspect(Cursor::new(bytes))
}

fn sound(sample: &Sample) -> Inspection {
    let seen = look(&sample.write());
    assert!(seen.error.is_none(), "{:?}", seen.error);
    seen
}

fn range(start: u64, end: u64) -> ram_discard::Section {
    ram_discard::Section::from_bounds(start, end).unwrap()
}

/// Of a block: id, bytes, pages with content, of zeros, absent, sent.
fn summary(block: &SavedRamBlock) -> (&str, u64, u64, u64, u64, u64) {
    let SavedRamBlock { id, used_length, normal, zero, absent, sent, .. } = block;
    (id, *used_length, *normal, *zero, *absent, *sent)
}

#[test]
fn a_stream_of_pages_is_read() {
    let sample = Sample::new(false);
    let seen = sound(&sample);
    assert_eq!(seen.warnings, []);
    assert_eq!(seen.configuration.machine, "pc-q35-11.1");
    let blocks: Vec<_> = seen.blocks.iter().map(summary).collect();
    let (vmem, ram) = (REGION / PAGE, RAM / PAGE);
    assert_eq!(blocks, [("vm0/vmem", REGION, 2, 1, vmem - 3, 3), ("ram", RAM, 2, 1, ram - 3, 3)]);
    let device = &seen.virtio_mem[0];
    assert_eq!((device.addr, device.region_size, device.block_size), (ADDR, REGION, BLOCK));
    assert_eq!((device.path.as_str(), device.node, device.plugged_size), ("vm0", 3, 3 * BLOCK));
    assert_eq!(device.usable_region_size, Some(sample.usable));
    assert_eq!(device.requested_size, Some(sample.requested));
    assert_eq!(device.ram_block.as_deref(), Some("vm0/vmem"));
    let plugged: Vec<_> = device.plugged().collect();
    assert_eq!(plugged, [range(0, 2 * BLOCK), range(3 * BLOCK, 4 * BLOCK)]);
    let commands: Vec<_> = seen.commands.into_iter().map(|(_, command)| command).collect();
    assert_eq!(commands, [Command::Ping(1), Command::SwitchoverStart]);
    let names: Vec<_> = seen.sections.iter().map(|section| &*section.header.idstr).collect();
    assert_eq!(names, ["vm0/virtio-mem-device-early", "vm0/virtio-mem"]);
}

#[test]
fn a_mapped_ram_file_is_read() {
    let seen = sound(&Sample::new(true));
    assert_eq!(seen.warnings, []);
    let blocks: Vec<_> = seen.blocks.iter().map(summary).collect();
    let (vmem, ram) = (REGION / PAGE, RAM / PAGE);
    assert_eq!(blocks, [("vm0/vmem", REGION, 2, 0, vmem - 2, 0), ("ram", RAM, 2, 0, ram - 2, 0)]);
    assert_eq!(seen.blocks[0].mapped.unwrap().pages_offset, MIB);
    assert_eq!(seen.virtio_mem[0].plugged().count(), 2);
    assert_eq!(seen.virtio_mem[0].requested_size, Some(4 * BLOCK));
}

#[test]
fn a_page_that_comes_again_counts_once_and_as_it_came_last() {
    let mut sample = Sample::new(false);
    sample.ram = vec![(5, false), (5, true), (6, true), (6, true), (6, false)];
    let seen = sound(&sample);
    assert_eq!(summary(&seen.blocks[1]), ("ram", RAM, 1, 1, RAM / PAGE - 2, 5));
}

/// Keeps where the bytes of each page are.
#[derive(Default)]
struct Places {
    map: PageMap,
    at: std::collections::BTreeMap<u64, u64>,
}

impl PageIndex for Places {
    fn map(&self) -> &PageMap {
        &self.map
    }

    fn note(&mut self, page: u64, kind: PageKind, at: u64) {
        self.map.note(page, kind);
        self.at.insert(page, at);
    }

    fn note_normal(&mut self, index: u64, normal: u64) {
        self.map.note_normal(index, normal);
    }

    fn entries(&self) -> usize {
        self.at.len()
    }
}

#[test]
fn where_the_last_record_of_a_page_is_can_be_kept() {
    let mut sample = Sample::new(false);
    sample.ram = vec![(5, true), (9, true), (5, true)];
    let bytes = sample.write();
    let (seen, pages) = inspect_pages::<Places>(Cursor::new(&bytes));
    assert!(seen.error.is_none(), "{:?}", seen.error);
    let at: Vec<_> = pages[1].at.iter().map(|(page, at)| (*page, *at as usize)).collect();
    let [(5, last), (9, before)] = at[..] else { panic!("{at:?}") };
    assert_eq!(before + 4096 + PageHeader::LEN, last);
    assert_eq!(bytes[last..last + 4096], [1; 4096]);
    assert_eq!(pages[1].map.counts(), (2, 0));
}

#[test]
fn sections_have_their_bytes_and_those_before_ram_are_told_from_those_after_it() {
    for mapped in [false, true] {
        let sample = Sample::new(mapped);
        let bytes = sample.write();
        let seen = look(&bytes);
        let [early, normal] = &seen.sections[..] else { panic!("{:?}", seen.sections) };
        let after_ram = seen.after_ram.unwrap();
        assert!(early.offset + early.len < after_ram && after_ram < normal.offset);
        let of = |section: &SavedSection| {
            bytes[section.offset as usize..(section.offset + section.len) as usize].to_vec()
        };
        let mut expected = Vec::new();
        sample::full(&mut expected, 38, "vm0/virtio-mem-device-early", &sample.early());
        assert_eq!(of(early), expected);
        expected.clear();
        sample::full(&mut expected, 39, "vm0/virtio-mem", &sample.sizes());
        assert_eq!(of(normal), expected);
        // Without a description the reading ends at the first section after RAM, which is told.
        let cut = look(&Sample { description: false, ..sample }.write());
        assert!(matches!(cut.error, Some(InspectError::Undescribed { .. })));
        assert_eq!(cut.after_ram, Some(after_ram));
        assert_eq!(cut.sections[1].offset, normal.offset);
    }
}

#[test]
fn a_device_in_a_file_is_a_source_of_what_is_discarded() {
    let device = sound(&Sample::new(false)).virtio_mem.remove(0);
    let source: &dyn RamDiscardSource = &device;
    assert_eq!((source.region_size(), source.granularity()), (REGION, BLOCK));
    let plugged = |at: u64| 0b1011 >> (at / BLOCK) & 1 != 0;
    // Sections that begin and end within blocks.
    let step = BLOCK / 2;
    for (start, end) in (0..8).flat_map(|start| (start + 1..=16).map(move |end| (start, end))) {
        let section = range(start * step, end * step);
        for state in MemoryState::BOTH {
            let is_so = |at: &u64| plugged(at * step) == state.is_populated();
            let mut expected = (start..end).filter(is_so);
            let first = expected.next();
            let expected = first.and_then(|first| {
                let last = (first..end).take_while(is_so).last()?;
                ram_discard::Section::from_bounds(first * step, (last + 1) * step)
            });
            assert_eq!(source.next_range(section, state), expected, "{section}");
        }
    }
    // What is impossible has nothing plugged.
    let mut sample = Sample::new(false);
    sample.block_size = BLOCK + 1;
    let device = sound(&sample).virtio_mem.remove(0);
    let all = range(0, REGION);
    assert_eq!(device.next_range(all, MemoryState::Populated), None);
    assert_eq!(device.next_range(all, MemoryState::Discarded), Some(all));
}

#[test]
fn pages_in_discarded_memory_are_told() {
    let mut sample = Sample::new(false);
    let stray = 2 * BLOCK / PAGE;
    sample.vmem.extend([(stray + 1, true), (stray, false), (5 * BLOCK / PAGE, true)]);
    let expected = |normal, zero, first: u64| Warning::DiscardedPages {
        device: "vm0".into(),
        block: "vm0/vmem".into(),
        normal,
        zero,
        first: first * PAGE,
    };
    assert_eq!(sound(&sample).warnings, [expected(2, 1, stray)]);
    sample.mapped = true;
    assert_eq!(sound(&sample).warnings, [expected(2, 0, stray + 1)]);
}

#[test]
fn blocks_smaller_than_a_word_of_pages_are_told_apart() {
    let mut sample = Sample::new(false);
    // 256 blocks of 64 KiB need four words; the bitmap has one.
    sample.block_size = MIB / 16;
    sample.bitmap = 0b101;
    sample.plugged_size = 2 * sample.block_size;
    sample.vmem = vec![(15, true), (16, true), (31, true), (32, true), (47, true), (48, true)];
    let warnings = sound(&sample).warnings;
    assert!(matches!(warnings[0], Warning::BitmapSize { found: 8, expected: 32, .. }));
    let Warning::DiscardedPages { normal, zero, first, .. } = warnings[1] else {
        panic!("{warnings:?}");
    };
    assert_eq!((normal, zero, first), (3, 0, 16 * PAGE));
}

#[test]
fn a_device_that_contradicts_itself_is_told() {
    let warnings = |change: fn(&mut Sample)| {
        let mut sample = Sample::new(true);
        change(&mut sample);
        sound(&sample).warnings
    };
    let rule = |warnings: Vec<Warning>| match warnings.as_slice() {
        [Warning::Rule { what, .. }, ..] => *what,
        other => panic!("{other:?}"),
    };
    let device = || "vm0".to_owned();
    let (size, counted) = (BLOCK, 3 * BLOCK);
    assert_eq!(
        warnings(|sample| sample.plugged_size = BLOCK),
        [Warning::PluggedSize { device: device(), size, counted }]
    );
    assert_eq!(
        warnings(|sample| sample.bitmap |= 1 << 8 | 1 << 63),
        [Warning::BeyondRegion { device: device(), blocks: 2 }]
    );
    let (end, usable) = (4 * BLOCK, BLOCK);
    assert_eq!(
        warnings(|sample| (sample.usable, sample.requested) = (BLOCK, BLOCK)),
        [Warning::BeyondUsable { device: device(), end, usable }]
    );
    assert_eq!(rule(warnings(|sample| sample.usable += 1)), "usable_region_size");
    assert_eq!(rule(warnings(|sample| sample.usable = 2 * REGION)), "usable_region_size");
    assert_eq!(rule(warnings(|sample| sample.requested += PAGE)), "requested_size");
    assert_eq!(rule(warnings(|sample| sample.requested = 6 * BLOCK)), "requested_size");
    for block_size in [0, 1, 3 * MIB, 2 * REGION, u64::MAX] {
        let mut sample = Sample::new(false);
        sample.block_size = block_size;
        let seen = sound(&sample);
        assert!(matches!(seen.warnings[0], Warning::Rule { .. }), "{block_size}");
        assert_eq!(seen.virtio_mem[0].plugged().count(), 0);
    }
}

#[test]
fn sizes_are_found_in_the_state_of_the_transport() {
    let mut sample = Sample::new(false);
    let sizes = sample.sizes();
    // The only block of that size is the first device's.
    let no_block = || Warning::NoBlock { device: "0000:00:02.0".into(), region_size: REGION };
    // What a guest may have written, which looks like the sizes and a subsection.
    let mut blob = b"\0\0\0\x02".to_vec();
    blob.extend([0xff; 16]);
    blob.extend(b"\x05\x0evirtio/started\0\0\0\x01\x01");
    // The copy of the configuration space, little-endian.
    for value in [BLOCK, 0, ADDR, REGION, 0, 0, 0] {
        blob.extend(value.to_le_bytes());
    }
    blob.extend(b"\0\0\0\x01\0\0\0\x80\0\0\0\0\x02\x91\xe0\0\0\x01\0\x01");
    blob.extend(&sizes);
    let whole = [&blob[..], b"\x05\x15virtio/64bit_features\0\0\0\x01\0\0\0\x01"].concat();
    for payload in [whole, blob] {
        let name = "0000:00:02.0/virtio-mem";
        let early = "0000:00:02.0/virtio-mem-device-early";
        let opaque = |name, kind, len| json!([{ "name": name, "type": kind, "size": len }]);
        sample.devices = vec![
            (early.into(), opaque("all", "buffer", 44), sample.early()),
            (name.into(), opaque("virtio", "virtio", payload.len()), payload),
        ];
        let seen = sound(&sample);
        assert_eq!(seen.warnings, [no_block()]);
        let device = &seen.virtio_mem[1];
        assert_eq!(device.path, "0000:00:02.0");
        let sizes = (device.usable_region_size, device.requested_size);
        assert_eq!(sizes, (Some(sample.usable), Some(sample.requested)));
        assert_eq!(device.plugged().count(), 2);
    }
    sample.devices[1].2.fill(0);
    let device = "0000:00:02.0".to_owned();
    assert_eq!(sound(&sample).warnings, [Warning::NoSizes { device }, no_block()]);
    sample.devices.remove(0);
    let device = "0000:00:02.0".to_owned();
    assert_eq!(sound(&sample).warnings, [Warning::NoEarlySection { device }]);
}

#[test]
fn devices_of_one_size_are_told_apart_by_their_names() {
    let early = Sample::new(false).early();
    let device = |path: &str| SavedVirtioMem::from_early(path, 0, &early).unwrap();
    let find = |path: &str, blocks: &[(&str, u64)]| device(path).find_block(blocks.iter().copied());
    let blocks = [("ram", REGION), ("b/vmem", REGION), ("a/vmem", REGION)];
    assert_eq!(find("a", &blocks), Some(2));
    assert_eq!(find("b", &blocks), Some(1));
    assert_eq!(find("c", &blocks), None);
    assert_eq!(find("", &blocks[..1]), Some(0));
    assert_eq!(find("a", &[("a/vmem", RAM)]), None);
}

#[test]
fn state_is_read_field_by_field() {
    let part = json!({
        "vmsd_name": "part", "version": 2,
        "fields": [{ "name": "x", "type": "uint16", "size": 2 }],
        "subsections": [{
            "vmsd_name": "part/more", "version": 7,
            "fields": [{ "name": "y", "type": "bool", "size": 1 }],
        }],
    });
    let fields = json!([
        { "name": "u", "type": "uint32 equal", "size": 4 },
        { "name": "i", "type": "int32 le", "size": 4 },
        { "name": "b", "type": "int8", "size": 1, "index": 3 },
        { "name": "t", "type": "timer", "size": 8 },
        { "name": "f", "type": "float64", "size": 8 },
        { "name": "n", "type": "nullptr", "size": 1 },
        { "name": "c", "type": "capability", "size": 4 },
        { "name": "o", "type": "pci config", "size": 3 },
        { "name": "a", "type": "uint8", "size": 1, "array_len": 3 },
        { "name": "s", "type": "struct", "size": 2, "struct": part },
        { "name": "v", "type": "vstruct", "size": 1, "vmsd_name": "v", "version": 1,
          "fields": [{ "name": "z", "type": "int64 equal", "size": 8 }] },
    ]);
    let mut payload = b"\0\0\x01\0\xff\xff\xff\xfe\x80".to_vec();
    payload.extend(b"\xff\xff\xff\xff\xff\xff\xff\xff\x3f\xe0\0\0\0\0\0\0");
    payload.extend(b"0\x03capABC\x01\x02\x03\x01\x02\x05\x09part/more\0\0\0\x07\x01");
    payload.extend(b"\0\0\0\0\0\0\0\x09");
    let mut sample = Sample::new(false);
    sample.devices.push(("dev".into(), fields, payload));
    let seen = sound(&sample);
    let state = &seen.sections[1].state;
    let unsigned = |value, size| Value::Unsigned { value, size };
    let signed = |value, size| Value::Signed { value, size };
    let values: Vec<&Value> = state.fields.iter().map(|field| &field.value).collect();
    let scalars = [
        unsigned(0x100, 4),
        signed(-2, 4),
        signed(-128, 1),
        unsigned(u64::MAX, 8),
        Value::Float(0.5),
        Value::Null,
        Value::Text("cap".into()),
        Value::Bytes(b"ABC".to_vec()),
        Value::Array(vec![unsigned(1, 1), unsigned(2, 1), unsigned(3, 1)]),
    ];
    assert_eq!(values[..9], scalars.each_ref()[..]);
    assert_eq!(state.fields[2].index, Some(3));
    let Value::Structure(part) = values[9] else { panic!("{:?}", values[9]) };
    assert_eq!((&*part.vmsd_name, part.version), ("part", 2));
    assert_eq!(part.fields[0].value, unsigned(0x102, 2));
    assert_eq!(part.subsections[0].fields[0].value, Value::Bool(true));
    let Value::Structure(v) = values[10] else { panic!("{:?}", values[10]) };
    assert_eq!(v.fields[0].value, signed(9, 8));
}

#[test]
fn without_a_description_all_before_the_first_unknown_section_is_read() {
    for mapped in [false, true] {
        let mut sample = Sample::new(mapped);
        sample.description = false;
        let seen = look(&sample.write());
        let error = seen.error.unwrap();
        assert!(
            matches!(&error, InspectError::Undescribed { idstr, described: false, .. }
                if idstr == "vm0/virtio-mem"),
            "{error}"
        );
        assert!(error.to_string().contains("the file has no description"), "{error}");
        assert_eq!(seen.blocks.len(), 2);
        assert_eq!(seen.virtio_mem[0].plugged().count(), 2);
        assert_eq!(seen.virtio_mem[0].requested_size, None);
        assert_eq!(seen.virtio_mem[0].ram_block.as_deref(), Some("vm0/vmem"));
        assert_eq!(seen.sections[0].state.fields.len(), 3);
    }
}
