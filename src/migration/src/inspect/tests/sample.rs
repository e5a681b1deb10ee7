//! A stream that the tests write themselves, in either layout, to be damaged in one place.

use serde_json::{Value as Json, json};
use vmstate::wire::WireWrite;

use crate::stream::*;

pub const MIB: u64 = 1 << 20;
pub const REGION: u64 = 16 * MIB;
pub const BLOCK: u64 = 2 * MIB;
pub const ADDR: u64 = 0x1_4000_0000;
pub const RAM: u64 = 4 * MIB;
pub const PAGE: u64 = TARGET_PAGE_SIZE;

const EARLY_ID: u32 = 38;
const RAM_ID: u32 = 1;

/// What is to be written.
pub struct Sample {
    pub mapped: bool,
    pub description: bool,
    /// Bits of the blocks, first in the lowest.
    pub bitmap: u64,
    pub plugged_size: u64,
    pub block_size: u64,
    pub usable: u64,
    pub requested: u64,
    /// Pages of the device's block and of RAM: number and whether it has content.
    pub vmem: Vec<(u64, bool)>,
    pub ram: Vec<(u64, bool)>,
    /// Further devices: id string, description of the fields, payload.
    pub devices: Vec<(String, Json, Vec<u8>)>,
}

impl Sample {
    /// Plugged: the blocks 0, 1 and 3; pages at the start of block 0 and at the end of block 3.
    pub fn new(mapped: bool) -> Self {
        Self {
            mapped,
            description: true,
            bitmap: 0b1011,
            plugged_size: 3 * BLOCK,
            block_size: BLOCK,
            usable: 5 * BLOCK,
            requested: 4 * BLOCK,
            vmem: vec![(0, true), (1, false), (4 * BLOCK / PAGE - 1, true)],
            ram: vec![(0, true), (7, true), (8, false)],
            devices: Vec::new(),
        }
    }

    pub fn early(&self) -> Vec<u8> {
        let mut out = Vec::new();
        [ADDR, REGION, self.block_size].iter().for_each(|value| out.put_be64(*value));
        out.put_be32(3);
        out.put_be64(self.plugged_size);
        out.put_be64(self.bitmap);
        out
    }

    pub fn sizes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_be64(self.usable);
        out.put_be64(self.requested);
        out
    }

    pub fn write(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut configuration = Configuration::new("pc-q35-11.1");
        if self.mapped {
            configuration.capabilities.push(CAPABILITY_MAPPED_RAM.into());
        }
        put_header(&mut out, &configuration);
        put_command(&mut out, &Command::Ping(1));
        full(&mut out, EARLY_ID, "vm0/virtio-mem-device-early", &self.early());
        section(&mut out, SectionKind::Start, RAM_ID, RAM_SECTION, RAM_VERSION);
        self.put_blocks(&mut out);
        put_end_of_section(&mut out);
        put_footer(&mut out, RAM_ID);
        for (kind, pages) in [(SectionKind::Part, true), (SectionKind::End, false)] {
            put_continued(&mut out, kind, RAM_ID);
            if pages && !self.mapped {
                put_pages(&mut out, "vm0/vmem", &self.vmem);
                put_pages(&mut out, "ram", &self.ram);
            }
            put_end_of_section(&mut out);
            put_footer(&mut out, RAM_ID);
        }
        put_command(&mut out, &Command::SwitchoverStart);
        let mut devices = vec![device("vm0/virtio-mem-device-early", early_fields())];
        for (number, (name, fields, payload)) in (40..).zip(&self.devices) {
            full(&mut out, number, name, payload);
            devices.push(device(name, fields.clone()));
        }
        full(&mut out, 39, "vm0/virtio-mem", &self.sizes());
        devices.push(device("vm0/virtio-mem", sizes_fields()));
        put_eof(&mut out);
        if self.description {
            let text = json!({ "page_size": PAGE, "devices": devices }).to_string();
            put_description(&mut out, text.as_bytes());
        }
        out
    }

    fn put_blocks(&self, out: &mut Vec<u8>) {
        let entry = |id: &str, used_length| BlockEntry {
            id: id.into(),
            used_length,
            page_size: None,
            gpa: None,
            mapped: None,
        };
        let blocks = [(entry("vm0/vmem", REGION), &self.vmem), (entry("ram", RAM), &self.ram)];
        let total = REGION + RAM;
        if !self.mapped {
            let entries = blocks.map(|(entry, _)| entry).into();
            return put_list(out, &BlockList { entries });
        }
        out.put_be64(total | 0x04);
        for (mut entry, pages) in blocks {
            let mut one = Vec::new();
            let bitmap_len = (entry.used_length / PAGE).div_ceil(64) * 8;
            let header = MappedRamHeader { page_size: PAGE, bitmap_offset: 0, pages_offset: 0 };
            let head = (1 + entry.id.len()) as u64 + 8 + MappedRamHeader::LEN;
            let bitmap_offset = out.len() as u64 + head;
            let pages_offset = (bitmap_offset + bitmap_len).next_multiple_of(MAPPED_RAM_ALIGNMENT);
            entry.mapped = Some(MappedRamHeader { bitmap_offset, pages_offset, ..header });
            let end = pages_offset + entry.used_length;
            put_list(&mut one, &BlockList { entries: vec![entry] });
            // Without the word that starts a list.
            out.extend(&one[8..]);
            let mut bitmap = vec![0u8; bitmap_len as usize];
            for (page, _) in pages.iter().filter(|(_, content)| *content) {
                bitmap[*page as usize / 8] |= 1 << (page % 8);
            }
            out.extend(bitmap);
            out.resize(end as usize, 0);
        }
    }
}

/// A FULL section with its footer.
pub fn full(out: &mut Vec<u8>, number: u32, name: &str, payload: &[u8]) {
    section(out, SectionKind::Full, number, name, 1);
    out.put(payload);
    put_footer(out, number);
}

pub fn section(out: &mut Vec<u8>, kind: SectionKind, number: u32, name: &str, version: u32) {
    let idstr = name.to_owned();
    let header =
        SectionHeader { kind, section_id: number, idstr, instance_id: 0, version_id: version };
    put_section(out, &header);
}

/// The description of a device.
pub fn device(name: &str, fields: Json) -> Json {
    json!({ "name": name, "instance_id": 0, "vmsd_name": name, "version": 1, "fields": fields })
}

fn early_fields() -> Json {
    json!([
        { "name": "tmp", "type": "tmp", "size": 28 },
        { "name": "size", "type": "uint64", "size": 8 },
        { "name": "bitmap", "type": "bitmap", "size": 8 },
    ])
}

fn sizes_fields() -> Json {
    json!([
        { "name": "usable_region_size", "type": "uint64", "size": 8 },
        { "name": "requested_size", "type": "uint64", "size": 8 },
    ])
}

fn put_pages(out: &mut Vec<u8>, block: &str, pages: &[(u64, bool)]) {
    for (nth, (page, content)) in pages.iter().enumerate() {
        let kind = if *content { PageKind::Normal } else { PageKind::Zero };
        out.put_be64(PageHeader::page_word(kind, page * PAGE, nth != 0));
        if nth == 0 {
            out.put_name(block);
        }
        out.extend(vec![u8::from(*content); if *content { PAGE as usize } else { 1 }]);
    }
}
