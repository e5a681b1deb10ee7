//! The command on a file that the test writes itself.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use migration::stream::{
    BlockEntry, BlockList, BlockStateChange, Command, Configuration, PageHeader, PageKind,
    RAM_SECTION, RAM_VERSION, SectionHeader, SectionKind, put_command, put_description,
    put_end_of_section, put_eof, put_footer, put_header, put_list, put_section,
};
use ram_discard::{ByteRange, MemoryState};
use serde_json::{Value, json};
use vmstate::wire::WireWrite;

use super::super::{Console, run};

const MIB: u64 = 1 << 20;

struct Outcome {
    status: u8,
    out: String,
    err: String,
}

fn vmemctl(words: &[&str], file: &Path) -> Outcome {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut line: Vec<OsString> = vec!["vmemctl".into(), "inspect".into()];
    line.extend(words.iter().map(OsString::from));
    line.push(file.into());
    let status = run(&line, &mut Console::plain(&mut out, &mut err));
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Outcome { status, out: text(out), err: text(err) }
}

fn section(out: &mut Vec<u8>, kind: SectionKind, section_id: u32, idstr: &str, version_id: u32) {
    let idstr = idstr.to_owned();
    put_section(out, &SectionHeader { kind, section_id, idstr, instance_id: 0, version_id });
}

/// A region of 4 MiB with the second of two blocks plugged, a page in each, and a device.
fn stream() -> Vec<u8> {
    let mut out = Vec::new();
    put_header(&mut out, &Configuration::new("none\x1b[2J"));
    section(&mut out, SectionKind::Full, 2, "vm0/virtio-mem-device-early", 1);
    [4 << 30, 4 * MIB, 2 * MIB].iter().for_each(|size| out.put_be64(*size));
    out.put_be32(0);
    [2 * MIB, 0b10].iter().for_each(|word| out.put_be64(*word));
    put_footer(&mut out, 2);
    section(&mut out, SectionKind::Start, 1, RAM_SECTION, RAM_VERSION);
    let (page_size, gpa, mapped) = (None, None, None);
    let entry = BlockEntry { id: "vm0/vmem".into(), used_length: 4 * MIB, page_size, gpa, mapped };
    put_list(&mut out, &BlockList { entries: vec![entry] });
    out.put_be64(PageHeader::page_word(PageKind::Zero, 0x1000, false));
    out.put_name("vm0/vmem");
    out.put_u8(0);
    out.put_be64(PageHeader::page_word(PageKind::Normal, 2 * MIB, true));
    out.extend([1; 4096]);
    put_end_of_section(&mut out);
    put_footer(&mut out, 1);
    put_command(&mut out, &Command::Ping(5));
    section(&mut out, SectionKind::Full, 3, "dev", 4);
    out.extend(b"\x01\xff\xfe\x2a\0\0\0\x07");
    put_footer(&mut out, 3);
    put_eof(&mut out);
    let fields = json!([
        { "name": "on", "type": "bool", "size": 1 },
        { "name": "delta", "type": "int16", "size": 2 },
        { "name": "part", "type": "struct", "size": 5, "struct": {
            "vmsd_name": "part", "version": 1,
            "fields": [{ "name": "level", "type": "uint8", "size": 1 }],
        } },
        { "name": "raw", "type": "buffer", "size": 2, "array_len": 2 },
    ]);
    let early = json!([{ "name": "tmp", "type": "tmp", "size": 28 },
        { "name": "size", "type": "uint64", "size": 8 },
        { "name": "bitmap", "type": "bitmap", "size": 8 }]);
    let devices = json!([
        { "name": "dev", "instance_id": 0, "vmsd_name": "dev", "version": 4, "fields": fields },
        { "name": "vm0/virtio-mem-device-early", "instance_id": 0, "fields": early },
    ]);
    put_description(&mut out, json!({ "devices": devices }).to_string().as_bytes());
    out
}

fn saved(dir: &tempfile::TempDir, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join("stream");
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn a_change_of_block_state_is_shown_as_a_command() {
    let range = ByteRange::new(2 * MIB, 4 * MIB).unwrap();
    for (state, words) in [
        (MemoryState::Populated, "7 populate vm0/vmem"),
        (MemoryState::Discarded, "7 discard vm0/vmem"),
    ] {
        let (block, ranges) = ("vm0/vmem".to_owned(), vec![range]);
        let change = BlockStateChange { number: 7, state, block, ranges };
        let shown = super::command_words(&Command::BlockState(change));
        assert_eq!(shown, ("BLOCK_STATE", format!("{words} 0x200000+0x400000")));
    }
}

#[test]
fn a_file_is_shown_to_people() {
    let dir = tempfile::tempdir().unwrap();
    let seen = vmemctl(&[], &saved(&dir, &stream()));
    assert_eq!((seen.status, seen.err.as_str()), (0, ""));
    for line in [
        "machine      none\\u{1b}[2J\n",
        "layout       plain\n",
        "vm0/vmem          4 MiB           1           1        1022\n",
        "  plugged    2 MiB (2097152 bytes) in 1 range\n",
        "    0x000000200000  2 MiB (2097152 bytes)\n",
        "PING 5\n",
        "dev, instance 0, version 4\n    on = true\n    delta = -2\n    part\n      level = 0x2a\n",
        "    raw = [2 bytes, all 0, 0007]\n",
        "Warnings\n  vm0: 0 normal and 1 zero pages of block \"vm0/vmem\" lie in discarded memory, \
         the first at 0x1000\n",
    ] {
        assert!(seen.out.contains(line), "{line}\n{}", seen.out);
    }
    assert!(!seen.out.contains('\x1b'));
}

#[test]
fn a_file_is_shown_to_programs() {
    let dir = tempfile::tempdir().unwrap();
    let seen = vmemctl(&["--json"], &saved(&dir, &stream()));
    let json: Value = serde_json::from_str(&seen.out).unwrap();
    assert_eq!((seen.status, &json["error"], &json["layout"]), (0, &Value::Null, &json!("plain")));
    assert_eq!(json["ram_blocks"][0]["absent"], 1022);
    assert_eq!(json["virtio_mem"][0]["plugged"], json!([{ "offset": 2 << 20, "size": 2 << 20 }]));
    assert_eq!(json["virtio_mem"][0]["requested_size"], Value::Null);
    let fields = &json["sections"][1]["state"]["fields"];
    assert_eq!(fields[1], json!({ "name": "delta", "type": "int16", "value": -2 }));
    assert_eq!(fields[2]["value"]["fields"][0]["value"], 42);
    assert_eq!(fields[3]["value"], json!(["0000", "0007"]));
    assert_eq!(json["warnings"].as_array().unwrap().len(), 1);
}

#[test]
fn a_damaged_file_is_shown_up_to_the_damage() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = stream();
    let len = bytes.len() - 400;
    bytes.truncate(len);
    let path = saved(&dir, &bytes);
    let seen = vmemctl(&[], &path);
    assert_eq!(seen.status, 1);
    assert!(seen.out.contains("in 1 range"), "{}", seen.out);
    assert!(seen.err.contains("section \"dev\" (instance 0) at byte 0x"), "{}", seen.err);
    assert!(seen.err.contains("no description"), "{}", seen.err);
    let seen = vmemctl(&["--json"], &path);
    let json: Value = serde_json::from_str(&seen.out).unwrap();
    assert!(json["error"].as_str().unwrap().contains("no description"), "{json}");
    assert!(serde_json::from_str::<Value>(&seen.err).unwrap()["error"].is_string());
}

#[test]
fn what_is_no_stream_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let seen = vmemctl(&[], &saved(&dir, b"PK\x03\x04 and so on"));
    assert_eq!(seen.status, 1);
    assert!(seen.err.contains("not a migration stream"), "{}", seen.err);
    for path in [dir.path().join("none"), dir.path().to_owned()] {
        let seen = vmemctl(&[], &path);
        assert_eq!((seen.status, seen.out.as_str()), (1, ""));
        assert!(seen.err.starts_with("vmemctl: cannot read /"), "{}", seen.err);
    }
}
