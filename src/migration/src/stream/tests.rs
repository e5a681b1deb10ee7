use super::*;
use serde_json::json;
use vmstate::wire::{WireRead, WireReader};

use proptest::prelude::*;
use ram_discard::{ByteRange, MemoryState};

fn reader(bytes: &[u8]) -> WireReader<&[u8]> {
    WireReader::new(bytes)
}

fn no_skip(_: &mut dyn WireRead, _: &BlockEntry) -> Result<(), FormatError> {
    Ok(())
}

#[test]
fn golden_header_with_configuration() {
    let mut out = Vec::new();
    let configuration = Configuration {
        capabilities: vec![CAPABILITY_MAPPED_RAM.into()],
        uuid: Some([9; 16]),
        ..Configuration::new("pc-q35-11.1")
    };
    put_header(&mut out, &configuration);
    let mut golden: Vec<u8> = Vec::new();
    golden.extend(b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-11.1");
    golden.extend(b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0amapped-ram");
    golden.extend(b"\x05\x12configuration/uuid\0\0\0\x01");
    golden.extend([9; 16]);
    assert_eq!(out, golden);
    // What follows a configuration tells where it ends.
    out.push(0);
    let mut reader = reader(&out);
    assert_eq!(read_header(&mut reader).unwrap(), configuration);
    assert_eq!(read_record(&mut reader).unwrap(), Record::Eof);
}

#[test]
fn a_configuration_is_described_as_it_is_sent() {
    let configuration = Configuration {
        target_page_bits: Some(12),
        capabilities: vec![CAPABILITY_MAPPED_RAM.into(), CAPABILITY_IGNORE_SHARED.into()],
        uuid: Some([9; 16]),
        ..Configuration::new("pc")
    };
    let expected = json!({
        "vmsd_name": "configuration",
        "version": 1,
        "fields": [
            {"name": "len", "type": "uint32", "size": 4},
            {"name": "name", "type": "buffer", "size": 2},
        ],
        "subsections": [
            {"vmsd_name": "configuration/target-page-bits", "version": 1,
             "fields": [{"name": "target_page_bits", "type": "uint32", "size": 4}]},
            {"vmsd_name": "configuration/capabilities", "version": 1, "fields": [
                {"name": "caps_count", "type": "uint32", "size": 4},
                {"name": "capabilities", "index": 0, "type": "capability", "size": 11},
                {"name": "capabilities", "index": 1, "type": "capability", "size": 16},
            ]},
            {"vmsd_name": "configuration/uuid", "version": 1,
             "fields": [{"name": "uuid", "type": "buffer", "size": 16}]},
        ],
    });
    assert_eq!(configuration.description(), expected);
}

#[test]
fn golden_sections() {
    let mut out = Vec::new();
    let full = SectionHeader {
        kind: SectionKind::Full,
        section_id: 0x26,
        idstr: "vm0/virtio-mem-device-early".into(),
        instance_id: 0,
        version_id: 1,
    };
    put_section(&mut out, &full);
    put_footer(&mut out, 0x26);
    let ram = SectionHeader {
        kind: SectionKind::Start,
        section_id: 1,
        idstr: RAM_SECTION.into(),
        instance_id: 0,
        version_id: RAM_VERSION,
    };
    put_section(&mut out, &ram);
    put_end_of_section(&mut out);
    put_footer(&mut out, 1);
    put_continued(&mut out, SectionKind::Part, 1);
    put_footer(&mut out, 1);
    put_continued(&mut out, SectionKind::End, 1);
    put_footer(&mut out, 1);
    put_eof(&mut out);
    put_description(&mut out, b"{}");
    let mut golden: Vec<u8> = Vec::new();
    golden.extend(b"\x04\0\0\0\x26\x1bvm0/virtio-mem-device-early\0\0\0\0\0\0\0\x01");
    golden.extend(b"\x7e\0\0\0\x26");
    golden.extend(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04");
    golden.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01");
    golden.extend(b"\x02\0\0\0\x01\x7e\0\0\0\x01");
    golden.extend(b"\x03\0\0\0\x01\x7e\0\0\0\x01");
    golden.extend(b"\0\x06\0\0\0\x02{}");
    assert_eq!(out, golden);

    let mut reader = reader(&out);
    assert_eq!(read_record(&mut reader).unwrap(), Record::Section(full));
    read_footer(&mut reader, 0x26).unwrap();
    assert_eq!(read_record(&mut reader).unwrap(), Record::Section(ram));
    let word = reader.be64("page").unwrap();
    assert_eq!(PageHeader::parse(word, 0).unwrap(), PageHeader::EndOfSection);
    read_footer(&mut reader, 1).unwrap();
    for kind in [SectionKind::Part, SectionKind::End] {
        let record = read_record(&mut reader).unwrap();
        assert_eq!(record, Record::Continued { kind, section_id: 1 });
        read_footer(&mut reader, 1).unwrap();
    }
    assert_eq!(read_record(&mut reader).unwrap(), Record::Eof);
    assert_eq!(read_record(&mut reader).unwrap(), Record::Description(b"{}".to_vec()));
    assert!(reader.is_at_end().unwrap());
}

#[test]
fn golden_block_list_and_pages() {
    let mapped =
        MappedRamHeader { page_size: 4096, bitmap_offset: 0x1000, pages_offset: 0x10_0000 };
    let list = BlockList {
        entries: vec![BlockEntry {
            id: "vmem0".into(),
            used_length: 0x4000_0000,
            page_size: None,
            gpa: Some(0x1_4000_0000),
            mapped: Some(mapped),
        }],
    };
    let mut out = Vec::new();
    put_list(&mut out, &list);
    let mut golden: Vec<u8> = Vec::new();
    golden.extend(b"\0\0\0\0\x40\0\0\x04\x05vmem0\0\0\0\0\x40\0\0\0\0\0\0\x01\x40\0\0\0");
    golden.extend(b"\0\0\0\x01\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\x10\0\0");
    assert_eq!(out, golden);
    let mut reader = reader(&out);
    let word = reader.be64("list").unwrap();
    assert_eq!(PageHeader::parse(word, 0).unwrap(), PageHeader::List { total: 0x4000_0000 });
    let limits = ListLimits {
        ignore_shared: true,
        mapped_ram: true,
        with_page_size: &[],
        may_have_page_size: false,
    };
    let read = BlockList::read(&mut reader, 0x4000_0000, limits, &mut no_skip).unwrap();
    assert_eq!(read, list);

    assert_eq!(PageHeader::page_word(PageKind::Normal, 0x5000, true), 0x5028);
    assert_eq!(PageHeader::page_word(PageKind::Zero, 0x5000, false), 0x5002);
    let page = PageHeader::Page { kind: PageKind::Normal, offset: 0x5000, continued: true };
    assert_eq!(PageHeader::parse(0x5028, 0).unwrap(), page);
}

#[test]
fn lists_that_do_not_add_up_are_refused() {
    let entry = |id: &str, used_length| BlockEntry {
        id: id.into(),
        used_length,
        page_size: None,
        gpa: None,
        mapped: None,
    };
    let list = BlockList { entries: vec![entry("a", 0x2000), entry("b", 0x3000)] };
    let mut out = Vec::new();
    put_list(&mut out, &list);
    let read =
        |total| BlockList::read(&mut reader(&out[8..]), total, ListLimits::default(), &mut no_skip);
    assert_eq!(read(0x5000).unwrap(), list);
    assert!(read(0x4000).is_err());
    assert!(matches!(read(0x6000), Err(FormatError::Wire(_))));
    let unaligned = BlockList { entries: vec![entry("a", 0x2001)] };
    let mut out = Vec::new();
    put_list(&mut out, &unaligned);
    let list = BlockList::read(&mut reader(&out[8..]), 0x2001, ListLimits::default(), &mut no_skip);
    assert!(list.is_err());
}

#[test]
fn page_sizes_in_a_list_are_found_where_they_stand() {
    let entry = |id: &str, page_size| BlockEntry {
        id: id.into(),
        used_length: 0x40_0000,
        page_size,
        gpa: None,
        mapped: None,
    };
    let huge = Some(0x20_0000);
    for sizes in [[huge, None, None], [None, huge, huge], [None, None, huge], [None; 3]] {
        let entries = ["a", "b", "c"].into_iter().zip(sizes).map(|(id, size)| entry(id, size));
        let list = BlockList { entries: entries.collect() };
        let mut out = Vec::new();
        put_list(&mut out, &list);
        put_end_of_section(&mut out);
        let mut reader = reader(&out[8..]);
        let limits = ListLimits { may_have_page_size: true, ..ListLimits::default() };
        let read = BlockList::read(&mut reader, 3 * 0x40_0000, limits, &mut no_skip).unwrap();
        assert_eq!(read, list);
        let word = reader.be64("end").unwrap();
        assert_eq!(PageHeader::parse(word, 0).unwrap(), PageHeader::EndOfSection);
    }
}

#[test]
fn unknown_flags_of_a_page_are_refused() {
    for word in [0x01, 0x40, 0x80, 0x100, 0x400, 0x0a, 0x18, 0x24, 0x1010, 0x30, 0x1200, 0] {
        assert!(PageHeader::parse(word, 7).is_err(), "{word:#x}");
    }
}

#[test]
fn other_streams_are_named() {
    let error = read_header(&mut reader(b"PK\x03\x04\0\0\0\0\0")).unwrap_err();
    assert!(error.to_string().contains("0x504b0304"), "{error}");
    let error = read_header(&mut reader(b"QEVM\0\0\0\x02")).unwrap_err();
    assert!(error.to_string().contains("version 2"), "{error}");
    let error = read_footer(&mut reader(b"\x7e\0\0\0\x02"), 1).unwrap_err();
    assert!(matches!(error, FormatError::Footer { section_id: 1, offset: 0 }));
}

/// A command of ours with these bytes behind its code.
#[test]
fn golden_reason() {
    let mut out = Vec::new();
    ReturnMessage::Reason("no room".to_owned()).put(&mut out);
    assert_eq!(out, b"\x56\x4f\0\x08\x07no room");
    assert_eq!(PING_REASON, 0x564d_0004);
    let mut long = Vec::new();
    ReturnMessage::Reason("é".repeat(200)).put(&mut long);
    let cut = ReturnMessage::Reason("é".repeat(127));
    assert_eq!(ReturnMessage::read(&mut reader(&long)).unwrap(), cut);
}

#[test]
fn what_begins_as_a_record_of_tls_is_named_wherever_a_channel_begins() {
    for first in 0x14..=0x17 {
        let record = [&[first, 3, 1, 2, 0][..], &[1; 60]].concat();
        let tls = |read: Result<(), FormatError>| {
            assert!(matches!(read, Err(FormatError::Tls)), "{read:?}");
        };
        tls(read_header(&mut reader(&record)).map(drop));
        tls(Greeting::read(&mut reader(&record)).map(drop));
        tls(ReturnMessage::read(&mut reader(&record)).map(drop));
    }
    let other = [0x16, 4, 1, 2];
    assert!(matches!(read_header(&mut reader(&other)), Err(FormatError::Magic { .. })));
    assert!(matches!(Greeting::read(&mut reader(&other)), Err(FormatError::Value { .. })));
}

fn block_state(data: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x08VM".to_vec();
    bytes.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn golden_changes_of_block_state() {
    let range = |start, len| ByteRange::new(start, len).unwrap();
    for (state, kind) in [(MemoryState::Populated, 1), (MemoryState::Discarded, 2)] {
        let ranges = vec![range(0x20_0000, 0x20_0000), range(0x80_0000, 0x40_0000)];
        let change = BlockStateChange { number: 7, state, block: "vm0".into(), ranges };
        let mut data = vec![0, 0, 0, 7, kind];
        data.extend(b"\x03vm0\0\0\0\0\0\x20\0\0\0\0\0\0\0\x20\0\0");
        data.extend(b"\0\0\0\0\0\x80\0\0\0\0\0\0\0\x40\0\0");
        let golden = block_state(&data);
        let mut out = Vec::new();
        put_command(&mut out, &Command::BlockState(change.clone()));
        assert_eq!(out, golden);
        let read = read_record(&mut reader(&golden)).unwrap();
        assert_eq!(read, Record::Command(Command::BlockState(change)));
    }
    for (refused, golden) in [
        (None, &b"VM\0\x05\0\0\0\x07\0"[..]),
        (Some("no".to_owned()), &b"VM\0\x08\0\0\0\x07\x01\x02no"[..]),
    ] {
        let answer = ReturnMessage::BlockState { number: 7, refused };
        let mut out = Vec::new();
        answer.put(&mut out);
        assert_eq!(out, golden);
        assert_eq!(ReturnMessage::read(&mut reader(golden)).unwrap(), answer);
    }
    assert_eq!((PING_BLOCK_STATE, PONG_BLOCK_STATE), (0x564d_0001, 0x564d_0002));
}

#[test]
fn golden_discarded_pages() {
    let told = ReturnMessage::Discarded { block: "vm0".into(), start: 0x20_0000, len: 0x40_0000 };
    let golden = b"VN\0\x14\0\0\0\0\0\x20\0\0\0\0\0\0\0\x40\0\0\x03vm0";
    let mut out = Vec::new();
    told.put(&mut out);
    assert_eq!(out, golden);
    assert_eq!(ReturnMessage::read(&mut reader(golden)).unwrap(), told);
    let cut = ReturnMessage::read(&mut reader(b"VN\0\x08\0\0\0\0\0\x20\0\0")).unwrap_err();
    assert!(cut.to_string().contains("length of a message"), "{cut}");
    assert_eq!(PING_DISCARDED, 0x564d_0003);
}

#[test]
fn changes_of_block_state_that_do_not_add_up_are_refused() {
    let words =
        |words: &[u64]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<_>>();
    let head = |kind: u8| [&[0, 0, 0, 1, kind][..], b"\x03vm0"].concat();
    let many = vec![[0x1000u64, 0x1000]; BLOCK_STATE_RANGES_MAX + 1];
    let many: Vec<_> = (0..).zip(many).flat_map(|(at, [_, len])| [at * 0x1000, len]).collect();
    for (data, what) in [
        (vec![0, 0, 0, 1], "the kind of a change"),
        ([head(3), words(&[0, 1])].concat(), "kind of a change of block state"),
        (head(1), "length of a change of block state"),
        ([head(1), words(&[0])].concat(), "length of a change of block state"),
        ([head(1), words(&many)].concat(), "length of a change of block state"),
        ([head(1), words(&[0, 0])].concat(), "range of a change of block state"),
        ([head(1), words(&[u64::MAX, 1])].concat(), "range of a change of block state"),
        ([head(1), words(&[8, 8, 0, 8])].concat(), "range of a change of block state"),
        ([head(1), words(&[0, 8, 7, 8])].concat(), "range of a change of block state"),
    ] {
        let bytes = block_state(&data);
        let error = read_record(&mut reader(&bytes)).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
    let error = ReturnMessage::read(&mut reader(b"VM\0\x05\0\0\0\x07\x02")).unwrap_err();
    assert!(error.to_string().contains("answer to a change of block state"), "{error}");
}

#[test]
fn a_reason_that_is_too_long_is_cut_at_a_character() {
    let refused = Some("ä".repeat(200));
    let mut out = Vec::new();
    ReturnMessage::BlockState { number: 1, refused }.put(&mut out);
    let read = ReturnMessage::read(&mut reader(&out)).unwrap();
    assert_eq!(read, ReturnMessage::BlockState { number: 1, refused: Some("ä".repeat(127)) });
}

fn commands() -> impl Strategy<Value = Command> {
    let name = "[a-z@/.:0-9]{1,200}";
    prop_oneof![
        Just(Command::OpenReturnPath),
        any::<u32>().prop_map(Command::Ping),
        Just(Command::PostcopyAdvise(None)),
        any::<(u64, u64)>().prop_map(|(page_sizes, target_page_size)| {
            Command::PostcopyAdvise(Some(AdvisedSizes { page_sizes, target_page_size }))
        }),
        Just(Command::PostcopyListen),
        Just(Command::PostcopyRun),
        (name, prop::collection::vec(any::<(u64, u64)>(), 1..=DISCARD_RANGES_MAX))
            .prop_map(|(block, ranges)| Command::PostcopyRamDiscard { block, ranges }),
        any::<u32>().prop_map(|len| Command::Packaged { len }),
        Just(Command::PostcopyResume),
        name.prop_map(|block| Command::RecvBitmap { block }),
        Just(Command::SwitchoverStart),
        changes().prop_map(Command::BlockState),
    ]
}

fn changes() -> impl Strategy<Value = BlockStateChange> {
    let gap = (0u64..1 << 20, 1u64..1 << 20);
    let gaps = prop::collection::vec(gap, 1..=BLOCK_STATE_RANGES_MAX);
    (any::<u32>(), prop::sample::select(&MemoryState::BOTH), "[a-z@/.:0-9]{1,200}", gaps).prop_map(
        |(number, state, block, gaps)| {
            let mut at = 0;
            let ranges = gaps.into_iter().filter_map(|(gap, len)| {
                let range = ByteRange::new(at + gap, len);
                at += gap + len;
                range
            });
            BlockStateChange { number, state, block, ranges: ranges.collect() }
        },
    )
}

fn messages() -> impl Strategy<Value = ReturnMessage> {
    let name = "[a-z@/.:0-9]{1,200}";
    prop_oneof![
        any::<u32>().prop_map(ReturnMessage::Shut),
        any::<u32>().prop_map(ReturnMessage::Pong),
        (prop::option::of(name), any::<u64>(), any::<u32>())
            .prop_map(|(block, start, len)| ReturnMessage::RequestPages { block, start, len }),
        name.prop_map(|block| ReturnMessage::RecvBitmap { block }),
        Just(ReturnMessage::ResumeAck),
        Just(ReturnMessage::SwitchoverAck),
        (any::<u32>(), prop::option::of("[a-z ]{0,200}"))
            .prop_map(|(number, refused)| ReturnMessage::BlockState { number, refused }),
        (name, any::<u64>(), any::<u64>())
            .prop_map(|(block, start, len)| ReturnMessage::Discarded { block, start, len }),
        "[ -~é]{0,100}".prop_map(ReturnMessage::Reason),
    ]
}

proptest! {
    #[test]
    fn commands_come_back(command in commands(), cut in any::<prop::sample::Index>()) {
        let mut out = Vec::new();
        put_command(&mut out, &command);
        let mut whole = reader(&out);
        prop_assert_eq!(read_record(&mut whole).unwrap(), Record::Command(command));
        prop_assert!(whole.is_at_end().unwrap());
        prop_assert!(read_record(&mut reader(&out[..cut.index(out.len())])).is_err());
    }

    #[test]
    fn messages_of_the_return_path_come_back(
        message in messages(),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut out = Vec::new();
        message.put(&mut out);
        prop_assert_eq!(ReturnMessage::read(&mut reader(&out)).unwrap(), message);
        prop_assert!(ReturnMessage::read(&mut reader(&out[..cut.index(out.len())])).is_err());
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = read_header(&mut reader(&bytes));
        let _ = ReturnMessage::read(&mut reader(&bytes));
        let mut records = reader(&bytes);
        while read_record(&mut records).is_ok() {}
        let limits = ListLimits { ignore_shared: true, mapped_ram: true, with_page_size: &[], may_have_page_size: false };
        let _ = BlockList::read(&mut reader(&bytes), u64::MAX, limits, &mut no_skip);
    }
}
