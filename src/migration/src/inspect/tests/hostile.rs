//! Files that lie.

use proptest::prelude::*;
use vmstate::wire::WireWrite;

use super::sample::{PAGE, full, section};
use super::*;
use crate::stream::{
    BlockEntry, BlockList, CAPABILITY_MAPPED_RAM, MappedRamHeader, PageHeader, PageKind,
    SectionKind, put_command, put_description, put_end_of_section, put_eof, put_footer, put_header,
    put_list,
};

/// A stream with blocks of these sizes, whose RAM section goes on with `rest`.
fn with_blocks(sizes: &[u64], mapped: Option<MappedRamHeader>, rest: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut configuration = Configuration::new("none");
    if mapped.is_some() {
        configuration.capabilities.push(CAPABILITY_MAPPED_RAM.into());
    }
    put_header(&mut out, &configuration);
    section(&mut out, SectionKind::Start, 1, RAM_SECTION, RAM_VERSION);
    let entry = |(nth, used_length): (usize, &u64)| BlockEntry {
        id: format!("block{nth}"),
        used_length: *used_length,
        page_size: None,
        gpa: None,
        mapped,
    };
    put_list(&mut out, &BlockList { entries: sizes.iter().enumerate().map(entry).collect() });
    out.extend(rest);
    out
}

fn page(kind: PageKind, offset: u64, block: Option<&str>) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_be64(PageHeader::page_word(kind, offset, block.is_none()));
    block.into_iter().for_each(|block| out.put_name(block));
    out.extend(vec![0; if kind == PageKind::Zero { 1 } else { PAGE as usize }]);
    out
}

fn message(bytes: &[u8]) -> String {
    look(bytes).error.unwrap().to_string()
}

#[test]
fn other_files_are_named() {
    assert!(message(b"").contains("ends at byte 0x0"));
    assert!(message(b"PK\x03\x04 and so on").contains("not a migration stream"));
    assert!(message(b"QEVM\0\0\0\x02").contains("version 2"));
}

#[test]
fn a_block_of_an_impossible_length_is_refused_and_costs_nothing() {
    for mapped in
        [None, Some(MappedRamHeader { page_size: PAGE, bitmap_offset: 64, pages_offset: 0 })]
    {
        let error = message(&with_blocks(&[1 << 60], mapped, &[]));
        assert!(error.contains("length of a RAM block"), "{error}");
    }
    // As long as one can be, with its last page: held is one word.
    let last = (1 << 52) - PAGE;
    let mut rest = page(PageKind::Zero, last, Some("block0"));
    put_end_of_section(&mut rest);
    put_footer(&mut rest, 1);
    put_eof(&mut rest);
    let seen = look(&with_blocks(&[1 << 52], None, &rest));
    assert!(seen.error.is_none(), "{:?}", seen.error);
    assert_eq!((seen.blocks[0].zero, seen.blocks[0].absent), (1, (1 << 40) - 1));
    // A bitmap that the file cannot have is not looked for.
    let header = MappedRamHeader { page_size: PAGE, bitmap_offset: 200, pages_offset: MIB };
    let error = message(&with_blocks(&[1 << 52], Some(header), &[0; 1000]));
    assert!(error.contains("the bitmap of a block"), "{error}");
}

#[test]
fn places_that_overlap_or_go_back_are_refused() {
    // Neither place is for memory that both sides share, which these do not.
    let places = [(8, MIB), (300, 300), (300, 0), (0, 300), (300, u64::MAX), (0, 0)];
    for (bitmap_offset, pages_offset) in places {
        let header = MappedRamHeader { page_size: PAGE, bitmap_offset, pages_offset };
        let error = message(&with_blocks(&[MIB], Some(header), &[0; 1000]));
        assert!(error.contains("place of the pages of a block"), "{error}");
    }
}

#[test]
fn bits_beyond_the_block_are_refused() {
    let head = with_blocks(&[PAGE], None, &[]).len() + 40;
    let at = head as u64 + 100;
    let header = MappedRamHeader { page_size: PAGE, bitmap_offset: at, pages_offset: at + 8 };
    for (bits, known) in [(1u64, true), (2, false), (u64::MAX, false)] {
        let mut bytes = with_blocks(&[PAGE], Some(header), &[]);
        bytes.resize(at as usize, 0);
        bytes.extend(bits.to_le_bytes());
        let seen = look(&bytes);
        assert_eq!(seen.blocks[0].normal, u64::from(known), "{:?}", seen.error);
        let error = seen.error.unwrap().to_string();
        assert_eq!(error.contains("pages beyond the block"), !known, "{error}");
    }
}

#[test]
fn impossible_pages_are_refused_where_they_stand() {
    let first = page(PageKind::Zero, 0, Some("block0"));
    let start = with_blocks(&[MIB], None, &[]).len();
    let flagged = |flags: u64| flags.to_be_bytes().to_vec();
    for (rest, what) in [
        (page(PageKind::Zero, 0, None), "page that continues no block"),
        (page(PageKind::Zero, 0, Some("other")), "page of RAM block \"other\""),
        (page(PageKind::Zero, MIB, Some("block0")), "a page at 0x100000 of block \"block0\""),
        (flagged(0x40), "XBZRLE pages are not supported"),
        (flagged(0x60), "XBZRLE pages are not supported"),
        (flagged(0x80), "RDMA pages are not supported"),
        (flagged(0x104), "flags of a page"),
        (flagged(0x1004), "second list of RAM blocks"),
    ] {
        let error = message(&with_blocks(&[MIB], None, &rest));
        assert!(error.contains(what), "{error}");
        assert!(error.contains(&format!("{start:#x}")) || what.starts_with("second"), "{error}");
    }
    let mut filled = first;
    *filled.last_mut().unwrap() = 7;
    assert!(message(&with_blocks(&[MIB], None, &filled)).contains("filled with 0x7"));
}

#[test]
fn sections_out_of_place_are_refused() {
    let mut out = Vec::new();
    put_header(&mut out, &Configuration::new("none"));
    let start = out.len();
    crate::stream::put_continued(&mut out, SectionKind::Part, 9);
    let error = look(&out).error.unwrap();
    assert!(
        matches!(error, InspectError::UnknownSection { section_id: 9, offset } if offset == start as u64)
    );
    let mut sample = Sample::new(false);
    sample.devices.push(("dev".into(), json!([]), vec![1]));
    assert!(message(&sample.write()).contains("footer"));
    sample.devices[0].1 = json!([{ "name": "x", "type": "uint8" }]);
    assert!(message(&sample.write()).contains("size of field of \"x\""));
}

#[test]
fn descriptions_of_more_than_can_be_held_are_refused() {
    let mut sample = Sample::new(false);
    for (size, len, what) in [
        (0, u64::MAX, "values of device state"),
        (1u64 << 40, 1, "bytes of device state"),
        (60 << 20, 1, "at most 16777216 are possible"),
    ] {
        let field = json!([{ "name": "x", "type": "buffer", "size": size, "array_len": len }]);
        sample.devices = vec![("dev".into(), field, Vec::new())];
        let seen = look(&sample.write());
        let error = seen.error.unwrap().to_string();
        assert!(error.contains(what), "{error}");
        // What came before is there.
        assert_eq!((seen.sections.len(), seen.blocks.len()), (2, 2));
    }
}

#[test]
fn packages_are_read_or_passed_over() {
    let mut inner = Vec::new();
    put_command(&mut inner, &Command::PostcopyListen);
    full(&mut inner, 7, "dev", b"\x2a");
    put_command(&mut inner, &Command::PostcopyRun);
    let description = json!({ "devices": [sample::device("dev", json!([
        { "name": "x", "type": "uint8", "size": 1 }
    ]))] });
    let file = |len: usize, described: bool| {
        let mut out = Vec::new();
        put_header(&mut out, &Configuration::new("none"));
        put_command(&mut out, &Command::Packaged { len: len as u32 });
        out.extend(&inner);
        put_eof(&mut out);
        if described {
            put_description(&mut out, description.to_string().as_bytes());
        }
        out
    };
    let seen = look(&file(inner.len(), true));
    assert!(seen.error.is_none() && seen.warnings.is_empty(), "{seen:?}");
    assert_eq!((seen.commands.len(), seen.sections.len()), (3, 1));
    let seen = look(&file(inner.len(), false));
    assert!(seen.error.is_none(), "{:?}", seen.error);
    assert!(matches!(seen.warnings[..], [Warning::PackageSkipped { .. }]));
    let seen = look(&file(inner.len() - 1, true));
    assert!(matches!(seen.warnings[..], [Warning::PackageEnd { .. }]), "{seen:?}");
}

#[test]
fn what_follows_the_end_is_told() {
    let mut bytes = Sample::new(false).write();
    let len = bytes.len() as u64;
    bytes.extend([0; 100]);
    assert_eq!(look(&bytes).warnings, [Warning::Trailing { offset: len, len: 100 }]);
}

/// Short, so that damage falls into headers rather than into pages.
fn short(mapped: bool) -> Vec<u8> {
    let mut sample = Sample::new(mapped);
    sample.devices.push((
        "dev".into(),
        json!([{ "name": "x", "type": "uint8", "size": 1, "array_len": 3 }]),
        vec![1, 2, 3],
    ));
    sample.vmem = vec![(0, false), (1, false)];
    sample.ram = vec![(3, false)];
    sample.write()
}

proptest! {
    #[test]
    fn a_file_that_is_cut_ends_with_an_error(cut in any::<prop::sample::Index>()) {
        let whole = short(false);
        let bytes = &whole[..cut.index(whole.len())];
        let seen = look(bytes);
        // The end of the sections is enough: a description may be missing.
        prop_assert!(seen.error.is_some() || seen.sections.len() == 3, "{:?}", bytes.len());
    }

    #[test]
    fn damage_is_read_or_refused(
        mapped in prop::bool::weighted(0.02),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        at_start in any::<bool>(),
    ) {
        let mut bytes = short(mapped);
        let len = if at_start { 700 } else { bytes.len() };
        for (place, byte) in damage {
            bytes[place.index(len)] = byte;
        }
        let seen = look(&bytes);
        for device in &seen.virtio_mem {
            device.plugged().take(1000).for_each(drop);
        }
        let _ = format!("{:?} {:?}", seen.error.map(|error| error.to_string()), seen.warnings);
    }

    #[test]
    fn any_state_is_read_or_refused(
        kind in "(u?int(8|16|32|64)( le| equal)?|bool|struct|tmp|nullptr|capability|timer|x)",
        size in prop_oneof![0..10u64, any::<u64>()],
        len in prop::option::of(0..5u64),
        payload in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut field = json!({ "name": "x", "type": kind, "size": size });
        if let Some(len) = len {
            field["array_len"] = len.into();
        }
        let mut sample = Sample::new(false);
        sample.devices.push(("dev".into(), json!([field]), payload));
        let _ = look(&sample.write());
    }
}
