//! Files that tests write themselves, in either layout, to be read or damaged.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use migration::stream::{
    BlockEntry, BlockList, CAPABILITY_MAPPED_RAM, Command, Configuration, MAPPED_RAM_ALIGNMENT,
    MappedRamHeader, PageHeader, PageKind, RAM_SECTION, RAM_VERSION, SectionHeader, SectionKind,
    TARGET_PAGE_SIZE, entry_len, put_command, put_continued, put_description, put_end_of_section,
    put_entry, put_eof, put_footer, put_header, put_list, put_list_start, put_section,
};
use serde_json::{Value, json};
use vmstate::wire::WireWrite;

const RAM_ID: u32 = 7;
const PAGE: u64 = TARGET_PAGE_SIZE;
/// Size of a device's block.
pub const DEVICE_BLOCK: u64 = 64 << 10;

/// What is in a file.
#[derive(Clone, Debug)]
pub struct Sample {
    pub mapped: bool,
    pub description: bool,
    pub runstate: &'static str,
    pub blocks: Vec<SampleBlock>,
    /// Bits of the blocks of a virtio-mem device whose memory is the first RAM block.
    pub plugged: Option<u64>,
    /// In the order of the stream; a mapped-ram file has the last of each page.
    pub records: Vec<Record>,
    /// After how many records a section ends and another begins.
    pub section_len: usize,
    /// A further device with so many bytes of state.
    pub ballast: usize,
}

/// A RAM block.
#[derive(Clone, Debug)]
pub struct SampleBlock {
    pub id: String,
    pub pages: u64,
}

/// A page of a block, by its place: zeros, or what [`content`] makes of the seed.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    pub block: usize,
    pub page: u64,
    pub seed: Option<u64>,
}

impl Sample {
    /// A device of 16 blocks of which four are plugged, and RAM of 64 pages.
    pub fn new(mapped: bool) -> Self {
        let block = |id: &str, pages| SampleBlock { id: id.to_owned(), pages };
        let record =
            |block, page, seed: u64| Record { block, page, seed: (seed != 0).then_some(seed) };
        Self {
            mapped,
            description: true,
            runstate: "running",
            blocks: vec![block("vm0/vmem", 256), block("ram", 64)],
            plugged: Some(0b1_0000_0111),
            records: vec![
                record(1, 0, 1),
                record(1, 1, 2),
                record(1, 2, 3),
                record(0, 0, 4),
                record(0, 47, 5),
                record(0, 128, 6),
                record(0, 129, 7),
                record(1, 1, 8),
                record(1, 40, 9),
                record(1, 41, 0),
                record(1, 2, 0),
            ],
            section_len: 4,
            ballast: 0,
        }
    }

    /// The content of each page that the file has, by block and page.
    pub fn contents(&self) -> BTreeMap<(usize, u64), Vec<u8>> {
        let mut contents = BTreeMap::new();
        for Record { block, page, seed } in &self.records {
            match seed {
                Some(seed) => drop(contents.insert((*block, *page), content(*seed))),
                None => drop(contents.remove(&(*block, *page))),
            }
        }
        contents
    }

    /// Writes the file.
    pub fn write(&self, path: &Path) {
        let bytes = self.bytes();
        match self.mapped {
            false => fs::write(path, bytes).unwrap(),
            true => {
                // With holes.
                let file = File::create(path).unwrap();
                file.set_len(bytes.len() as u64).unwrap();
                for (index, piece) in bytes.chunks(PAGE as usize).enumerate() {
                    if *piece != vec![0; piece.len()] {
                        file.write_all_at(piece, index as u64 * PAGE).unwrap();
                    }
                }
            }
        }
    }

    /// The bytes of the file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut configuration = Configuration::new("pc-q35-11.1");
        if self.mapped {
            configuration.capabilities.push(CAPABILITY_MAPPED_RAM.to_owned());
        }
        put_header(&mut out, &configuration);
        out.put(&self.early());
        section(&mut out, SectionKind::Start, RAM_ID, RAM_SECTION, RAM_VERSION);
        self.put_blocks(&mut out);
        put_end_of_section(&mut out);
        put_footer(&mut out, RAM_ID);
        let mut last = None;
        let records = if self.mapped { &[][..] } else { &self.records };
        for records in records.chunks(self.section_len.max(1)) {
            put_continued(&mut out, SectionKind::Part, RAM_ID);
            for Record { block, page, seed } in records {
                let kind = if seed.is_some() { PageKind::Normal } else { PageKind::Zero };
                let continued = last == Some(*block);
                out.put_be64(PageHeader::page_word(kind, page * PAGE, continued));
                if !continued {
                    out.put_name(&self.blocks[*block].id);
                }
                last = Some(*block);
                match seed {
                    Some(seed) => out.put(&content(*seed)),
                    None => out.put_u8(0),
                }
            }
            put_end_of_section(&mut out);
            put_footer(&mut out, RAM_ID);
        }
        put_command(&mut out, &Command::SwitchoverStart);
        put_continued(&mut out, SectionKind::End, RAM_ID);
        put_end_of_section(&mut out);
        put_footer(&mut out, RAM_ID);
        out.put(&self.device_state());
        put_eof(&mut out);
        if self.description {
            put_description(&mut out, self.describe().to_string().as_bytes());
        }
        out
    }

    /// The section before RAM.
    pub fn early(&self) -> Vec<u8> {
        let mut out = Vec::new();
        if let Some(bits) = self.plugged {
            let region = self.blocks[0].pages * PAGE;
            section(&mut out, SectionKind::Full, 38, "vm0/virtio-mem-device-early", 1);
            out.put_be64(5 << 30);
            out.put_be64(region);
            out.put_be64(DEVICE_BLOCK);
            out.put_be32(0);
            out.put_be64(u64::from(bits.count_ones()) * DEVICE_BLOCK);
            let words = (region / DEVICE_BLOCK).div_ceil(64);
            (0..words).for_each(|word| out.put_be64(if word == 0 { bits } else { 0 }));
            put_footer(&mut out, 38);
        }
        out
    }

    /// The sections after RAM.
    pub fn device_state(&self) -> Vec<u8> {
        let mut out = Vec::new();
        section(&mut out, SectionKind::Full, 40, "globalstate", 1);
        out.put_be32(self.runstate.len() as u32 + 1);
        let mut name = self.runstate.as_bytes().to_vec();
        name.resize(100, 0);
        out.put(&name);
        put_footer(&mut out, 40);
        section(&mut out, SectionKind::Full, 41, "ballast", 1);
        out.put(&vec![0xa5; self.ballast]);
        put_footer(&mut out, 41);
        out
    }

    fn describe(&self) -> Value {
        let device = |name: &str, fields: Value| json!({ "name": name, "instance_id": 0, "vmsd_name": name, "version": 1, "fields": fields });
        let buffer =
            |name: &str, size: usize| json!({ "name": name, "type": "buffer", "size": size });
        let mut devices = vec![
            device(
                "globalstate",
                json!([{ "name": "size", "type": "uint32", "size": 4 }, buffer("runstate", 100)]),
            ),
            device(
                "ballast",
                if self.ballast == 0 {
                    json!([])
                } else {
                    json!([buffer("ballast", self.ballast)])
                },
            ),
        ];
        if self.plugged.is_some() {
            let bitmap = (self.blocks[0].pages * PAGE / DEVICE_BLOCK).div_ceil(64) * 8;
            devices.push(device(
                "vm0/virtio-mem-device-early",
                json!([
                    { "name": "tmp", "type": "tmp", "size": 28 },
                    { "name": "size", "type": "uint64", "size": 8 },
                    { "name": "bitmap", "type": "bitmap", "size": bitmap },
                ]),
            ));
        }
        json!({ "page_size": PAGE, "devices": devices })
    }

    fn put_blocks(&self, out: &mut Vec<u8>) {
        let entries = self.blocks.iter().map(|block| BlockEntry {
            id: block.id.clone(),
            used_length: block.pages * PAGE,
            page_size: None,
            gpa: None,
            mapped: None,
        });
        let mut list = BlockList { entries: entries.collect() };
        if !self.mapped {
            return put_list(out, &list);
        }
        put_list_start(out, &list);
        let contents = self.contents();
        for (index, entry) in list.entries.iter_mut().enumerate() {
            let bitmap_len = (entry.used_length / PAGE).div_ceil(64) * 8;
            let bitmap_offset = out.len() as u64 + entry_len(entry) + MappedRamHeader::LEN;
            let pages_offset = (bitmap_offset + bitmap_len).next_multiple_of(MAPPED_RAM_ALIGNMENT);
            entry.mapped = Some(MappedRamHeader { page_size: PAGE, bitmap_offset, pages_offset });
            put_entry(out, entry);
            let mut bitmap = vec![0u8; bitmap_len as usize];
            let mut pages = vec![0u8; entry.used_length as usize];
            for ((_, page), content) in contents.iter().filter(|((block, _), _)| *block == index) {
                bitmap[*page as usize / 8] |= 1 << (page % 8);
                pages[(page * PAGE) as usize..][..PAGE as usize].copy_from_slice(content);
            }
            out.put(&bitmap);
            out.resize(pages_offset as usize, 0);
            out.put(&pages);
        }
    }
}

/// The bytes of a page.
pub fn content(seed: u64) -> Vec<u8> {
    let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut page = Vec::new();
    while page.len() < PAGE as usize {
        page.put_be64(word);
        word = word.rotate_left(7).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    page
}

fn section(out: &mut Vec<u8>, kind: SectionKind, section_id: u32, name: &str, version_id: u32) {
    let idstr = name.to_owned();
    put_section(out, &SectionHeader { kind, section_id, idstr, instance_id: 0, version_id });
}
