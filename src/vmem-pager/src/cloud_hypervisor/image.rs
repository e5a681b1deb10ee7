//! A guest of Cloud Hypervisor's in an image: Config and State are sections of their own, byte for byte; a mapping
//! is a RAM block; what is plugged stands before RAM, as QEMU has it.
//!
//! | section | version 1 |
//! | --- | --- |
//! | `ZONE/vmem/virtio-mem-device-early`, before RAM | as QEMU's |
//! | `ZONE/vmem/virtio-mem` | usable and requested size (be64) |
//! | `globalstate` | as QEMU's: `running` or `paused` |
//! | `cloud-hypervisor/config` | length (be64), JSON |
//! | `cloud-hypervisor/state` | length (be64), JSON |

use std::path::Path;
use std::sync::Arc;

use migration::Progress;
use migration::page_bitmap::bytes_of;
use migration::stream::{
    BlockEntry, BlockList, Configuration, RAM_SECTION, RAM_VERSION, SectionHeader, SectionKind,
    put_footer, put_section,
};
use serde_json::{Value, json};
use vmstate::wire::{WireRead, WireReader, WireWrite};

use super::layout::{Layout, Mapping};
use super::protocol::{CONFIG_MAX, STATE_MAX};
use super::state::{self, Device};
use crate::error::PagerError;
use crate::image::writer::{ImageWriter, NewFile, Start, WholeImage};
use crate::image::{GuestImage, ImageBlock};

/// What stands for a machine type.
pub const MACHINE: &str = "cloud-hypervisor";

const CONFIG: &str = "cloud-hypervisor/config";
const STATE: &str = "cloud-hypervisor/state";
const GLOBAL_STATE: &str = "globalstate";
const VERSION: u32 = 1;
/// Bytes of the field that has the guest's run state.
const RUNSTATE_LEN: usize = 100;
/// The largest field that is described: readers hold no larger ones.
const FIELD_MAX: usize = 8 << 20;

/// Number of the RAM section; devices are numbered from the next on.
const RAM_NUMBER: u32 = 2;

const FULL: u8 = 0x04;
const FOOTER: u8 = 0x7e;

/// What an image has beside memory.
#[derive(Debug)]
pub struct Guest<'a> {
    /// Config, byte for byte.
    pub config: &'a [u8],
    /// State, byte for byte.
    pub state: &'a [u8],
    /// Its memory.
    pub layout: &'a Layout,
    /// Its virtio-mem devices, by mapping.
    pub devices: &'a [Option<Device>],
    /// It was paused before it was saved.
    pub paused: bool,
}

/// An image that takes memory: block `n` is mapping `n`.
#[derive(Debug)]
pub struct GuestWriter {
    writer: ImageWriter,
    description: Vec<u8>,
}

impl GuestWriter {
    /// Writes everything but memory.
    ///
    /// # Errors
    ///
    /// When the file does not take it.
    pub fn begin(
        file: NewFile,
        guest: &Guest<'_>,
        progress: Arc<Progress>,
    ) -> Result<Self, PagerError> {
        let mut sections = Sections { number: RAM_NUMBER, described: Vec::new() };
        let mut early = Vec::new();
        let devices = guest.devices.iter().flatten();
        for device in devices.clone() {
            let bitmap = device.early.len() - 36;
            let fields = json!([
                { "name": "tmp", "type": "tmp", "size": 28 },
                { "name": "size", "type": "uint64", "size": 8 },
                { "name": "bitmap", "type": "bitmap", "size": bitmap },
            ]);
            sections.put(&mut early, &device.early_id(), &device.early, fields);
        }
        let entries = guest.layout.mappings.iter().map(|mapping| BlockEntry {
            id: mapping.id(),
            used_length: mapping.range.len(),
            page_size: None,
            gpa: None,
            mapped: None,
        });
        let start = Start {
            configuration: &Configuration::new(MACHINE),
            early: &early,
            ram: &SectionHeader {
                kind: SectionKind::Start,
                section_id: RAM_NUMBER,
                idstr: RAM_SECTION.to_owned(),
                instance_id: 0,
                version_id: RAM_VERSION,
            },
            list: &BlockList { entries: entries.collect() },
            devices: devices.clone().map(|device| device.state.clone()).collect(),
        };
        let mut writer = file.begin(start, progress)?;
        let mut late = Vec::new();
        for device in devices {
            if let Some(sizes) = &device.late {
                let fields = json!([
                    { "name": "usable_region_size", "type": "uint64", "size": 8 },
                    { "name": "requested_size", "type": "uint64", "size": 8 },
                ]);
                sections.put(&mut late, &device.late_id(), sizes, fields);
            }
        }
        let name: &[u8] = if guest.paused { b"paused" } else { b"running" };
        let mut runstate = Vec::new();
        runstate.put_be32(name.len() as u32 + 1);
        runstate.put(name);
        runstate.resize(4 + RUNSTATE_LEN, 0);
        let fields = json!([
            { "name": "size", "type": "uint32", "size": 4 },
            { "name": "runstate", "type": "buffer", "size": RUNSTATE_LEN },
        ]);
        sections.put(&mut late, GLOBAL_STATE, &runstate, fields);
        writer.append_state(&late)?;
        for (id, json) in [(CONFIG, guest.config), (STATE, guest.state)] {
            let mut payload = Vec::new();
            payload.put_be64(json.len() as u64);
            payload.put(json);
            let mut fields = vec![json!({ "name": "length", "type": "uint64", "size": 8 })];
            let pieces = json.chunks(FIELD_MAX).enumerate();
            fields.extend(pieces.map(|(index, piece)| {
                json!({ "name": "json", "index": index, "type": "buffer", "size": piece.len() })
            }));
            let mut bytes = Vec::new();
            sections.put(&mut bytes, id, &payload, Value::Array(fields));
            writer.append_state(&bytes)?;
        }
        let configuration = Configuration::new(MACHINE).description();
        let description = json!({ "configuration": configuration, "page_size": 4096, "devices": sections.described });
        Ok(Self { writer, description: description.to_string().into_bytes() })
    }

    /// Its pages, by mapping.
    pub fn pages(&self) -> &Arc<crate::image::pages::Pages> {
        self.writer.pages()
    }

    /// Writes the end.
    ///
    /// # Errors
    ///
    /// When the file does not take it.
    pub fn finish(self) -> Result<WholeImage, PagerError> {
        let len = self.writer.state_len();
        self.writer.finish(len, Some(&self.description))
    }
}

struct Sections {
    number: u32,
    described: Vec<Value>,
}

impl Sections {
    fn put(&mut self, out: &mut Vec<u8>, id: &str, payload: &[u8], fields: Value) {
        self.number += 1;
        put_section(
            out,
            &SectionHeader {
                kind: SectionKind::Full,
                section_id: self.number,
                idstr: id.to_owned(),
                instance_id: 0,
                version_id: VERSION,
            },
        );
        out.put(payload);
        put_footer(out, self.number);
        self.described.push(json!({
            "name": id, "instance_id": 0, "vmsd_name": id, "version": VERSION, "fields": fields,
        }));
    }
}

/// A guest of Cloud Hypervisor's in an image, checked.
#[derive(Debug)]
pub struct SavedGuest {
    image: GuestImage,
    config: Vec<u8>,
    state: Vec<u8>,
    layout: Layout,
    /// The RAM block of each mapping, by its place in the image.
    blocks: Vec<usize>,
}

impl SavedGuest {
    /// Opens and checks an image.
    ///
    /// # Errors
    ///
    /// When it cannot be read, is not the whole of a guest, or is one of another VMM.
    pub fn open(path: &Path) -> Result<Self, PagerError> {
        let image = GuestImage::open(path)?;
        let refuse = |what: String| PagerError::Image { path: path.to_owned(), what };
        if !is_ours(&image) {
            let machine = vmstate::printable(&image.configuration().machine);
            return Err(refuse(format!(
                "an image of a {machine:?} of QEMU, not of Cloud Hypervisor; restore it with --vmm qemu"
            )));
        }
        let (config, state) = sections(image.device_state()).map_err(refuse)?;
        let layout = Layout::parse(&config).map_err(refuse)?;
        let devices = state::devices(&state, &layout).map_err(refuse)?;
        let mut blocks = Vec::new();
        for (mapping, device) in layout.mappings.iter().zip(&devices) {
            blocks.push(find(&image, mapping, device.as_ref()).map_err(refuse)?);
        }
        if image.blocks().len() != blocks.len() {
            return Err(refuse("it has memory that is not in the Config's layout".to_owned()));
        }
        Ok(Self { image, config, state, layout, blocks })
    }

    /// The image.
    pub fn image(&self) -> &GuestImage {
        &self.image
    }

    /// Config, byte for byte.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// State, byte for byte.
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// Its memory.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The RAM block of a mapping.
    pub fn block(&self, mapping: usize) -> &ImageBlock {
        &self.image.blocks()[self.blocks[mapping]]
    }

    /// The place in the image of the RAM block of a mapping.
    pub fn block_index(&self, mapping: usize) -> usize {
        self.blocks[mapping]
    }

    /// The mapping of a RAM block, by its place in the image.
    pub fn mapping_of(&self, block: usize) -> Option<usize> {
        self.blocks.iter().position(|index| *index == block)
    }

    /// It was paused before it was saved.
    pub fn is_paused(&self) -> bool {
        self.image.is_paused()
    }
}

/// Whether an image is of a guest of Cloud Hypervisor's.
pub fn is_ours(image: &GuestImage) -> bool {
    image.configuration().machine == MACHINE
}

/// The block of a mapping, whose discarded parts must be those that Cloud Hypervisor will take for unplugged.
fn find(image: &GuestImage, mapping: &Mapping, device: Option<&Device>) -> Result<usize, String> {
    let (id, size, name) = (mapping.id(), mapping.range.len(), mapping.name());
    let found = image.blocks().iter().position(|block| block.id() == id);
    let Some(index) = found else {
        return Err(format!("{name} is not in it: RAM block {id:?} is missing"));
    };
    let block = &image.blocks()[index];
    if block.used_length() != size {
        let used = block.used_length();
        return Err(format!("{name} has {size:#x} bytes, and RAM block {id:?} {used:#x}"));
    }
    let plugged = device.map(|device| device.state.plugged().collect::<Vec<_>>());
    let populated = block.discards().map(|discards| {
        let mut ranges = Vec::new();
        discards.populated(|pages| ranges.extend(bytes_of(pages).section(0)));
        ranges
    });
    if plugged != populated {
        return Err(format!("{name}: its sections and its State differ in what is plugged"));
    }
    Ok(index)
}

/// Config and State of the sections after RAM.
fn sections(bytes: &[u8]) -> Result<(Vec<u8>, Vec<u8>), String> {
    let damaged = |what: &str| format!("the state of its devices is damaged: {what}");
    let mut reader = WireReader::new(bytes);
    let (mut config, mut state) = (None, None);
    let wire = |error: vmstate::wire::WireError| damaged(&error.to_string());
    while reader.offset() < bytes.len() as u64 {
        if reader.u8("a section").map_err(wire)? != FULL {
            return Err(damaged("a section of another kind than expected"));
        }
        let number = reader.be32("a section's number").map_err(wire)?;
        let id = reader.name("a section's id").map_err(wire)?;
        let _instance = reader.be32("a section's instance").map_err(wire)?;
        let version = reader.be32("a section's version").map_err(wire)?;
        if version != VERSION {
            let id = vmstate::printable(&id);
            return Err(format!("section {id:?} has version {version}; expected {VERSION}"));
        }
        match id.as_str() {
            CONFIG | STATE => {
                let (into, max) =
                    if id == CONFIG { (&mut config, CONFIG_MAX) } else { (&mut state, STATE_MAX) };
                let len = reader.be64("the length of a section").map_err(wire)?;
                let json = reader.bytes(len, max, "Config or State").map_err(wire)?;
                if into.replace(json).is_some() {
                    return Err(damaged(&format!("section {id:?} is there twice")));
                }
            }
            GLOBAL_STATE => {
                reader
                    .bytes(4 + RUNSTATE_LEN as u64, 4 + RUNSTATE_LEN as u64, "run state")
                    .map_err(wire)?;
            }
            _ if id.ends_with("/vmem/virtio-mem") => {
                reader.bytes(16, 16, "sizes of a virtio-mem device").map_err(wire)?;
            }
            _ => {
                let id = vmstate::printable(&id);
                return Err(damaged(&format!(
                    "a section {id:?}, which is not one of Cloud Hypervisor's"
                )));
            }
        }
        let footer = reader.u8("a footer").map_err(wire)?;
        if footer != FOOTER || reader.be32("a footer").map_err(wire)? != number {
            return Err(damaged("a section does not end where it should"));
        }
    }
    match (config, state) {
        (Some(config), Some(state)) => Ok((config, state)),
        _ => Err("it has no Config or no State of Cloud Hypervisor's".to_owned()),
    }
}
