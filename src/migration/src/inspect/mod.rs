//! Reading a migration stream in a file, ours or QEMU's, without loading it.
//!
//! [`inspect`] tells what a file of QEMU's `migrate file:...` holds: RAM blocks and how many of
//! their pages, the state of devices field by field, and what is plugged of virtio-mem devices;
//! and it says what does not fit together, above all pages in discarded memory.
//!
//! Files are hostile until read: every length is limited before anything of it is allocated, what
//! is held grows with what a file really has, and reading goes forward only. Drawn in
//! `spec-notes/stream.md`.

mod description;
mod error;
mod fields;
mod pages;
mod ram;
#[cfg(test)]
mod tests;
mod virtio_mem;

pub use error::{InspectError, Warning};
pub use fields::{SavedField, Structure, Value};
pub use pages::{PageIndex, PageMap, Word};
pub use ram::SavedRamBlock;
pub use virtio_mem::SavedVirtioMem;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use vmstate::wire::WireRead;

use crate::file_reader::FileReader;
use crate::stream::{
    Command, Configuration, RAM_SECTION, RAM_VERSION, Record, SectionHeader, SectionKind,
    TARGET_PAGE_BITS, read_footer, read_header, read_record,
};

use description::{Description, Shape};
use fields::Decoder;
use ram::Ram;

/// Sections of devices and commands that are held.
const RECORDS_MAX: u64 = 1 << 16;
/// Bytes of a bitmap of blocks that is read without a description.
const BITMAP_MAX: u64 = 16 << 20;

/// What is in a file. Offsets and sizes are in bytes, offsets from the start of the file.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Inspection {
    /// Bytes of the file.
    pub len: u64,
    /// The configuration section.
    pub configuration: Configuration,
    /// RAM blocks, in the order of the stream.
    pub blocks: Vec<SavedRamBlock>,
    /// Sections of devices, in the order of the stream.
    pub sections: Vec<SavedSection>,
    /// Commands with their offsets, in the order of the stream.
    pub commands: Vec<(u64, Command)>,
    /// Number of the RAM section.
    pub ram_section: Option<u32>,
    /// Where the sections of devices begin that follow RAM; those before it are *early*.
    pub after_ram: Option<u64>,
    /// virtio-mem devices, in the order of the stream.
    pub virtio_mem: Vec<SavedVirtioMem>,
    /// Offset of the record with the JSON description, and the length of the description.
    pub description: Option<(u64, u64)>,
    /// What is odd.
    pub warnings: Vec<Warning>,
    /// Why reading ended early; all that was read before is there.
    pub error: Option<InspectError>,
}

/// The section of a device.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct SavedSection {
    /// Where it starts.
    pub offset: u64,
    /// Its bytes, header and footer included; of one that could not be read, up to where that was seen.
    pub len: u64,
    /// Its id string, instance and version.
    pub header: SectionHeader,
    /// What is in it, as far as it was read.
    pub state: Structure,
}

/// Reads a file from its start to its end.
///
/// An error ends the reading, and is in the result together with what was read before it.
pub fn inspect(file: impl Read + Seek) -> Inspection {
    inspect_pages::<PageMap>(file).0
}

/// As [`inspect`], and gives for each block, in their order, what `P` keeps of its pages.
pub fn inspect_pages<P: PageIndex>(file: impl Read + Seek) -> (Inspection, Vec<P>) {
    inspect_with(file, None)
}

/// As [`inspect_pages`]; of bitmaps of RAM blocks only what the file has data for is read, so that the size of absent
/// memory does not matter. The position in the file moves.
pub fn inspect_file<P: PageIndex>(file: &File) -> (Inspection, Vec<P>) {
    inspect_with(file, Some(file))
}

fn inspect_with<P: PageIndex>(
    mut file: impl Read + Seek,
    holes: Option<&File>,
) -> (Inspection, Vec<P>) {
    let mut inspection = Inspection::default();
    let mut pages = Vec::new();
    if let Err(error) = read(&mut file, holes, &mut inspection, &mut pages) {
        inspection.error = Some(error);
    }
    (inspection, pages)
}

fn read<P: PageIndex>(
    file: &mut (impl Read + Seek),
    holes: Option<&File>,
    out: &mut Inspection,
    pages: &mut Vec<P>,
) -> Result<(), InspectError> {
    out.len = file.seek(SeekFrom::End(0))?;
    let description = Description::find(file, out.len)?;
    out.description = description.as_ref().map(|found| (found.offset, found.len));
    let mut reader = FileReader::new(file, out.len)?;
    out.configuration = read_header(&mut reader)?;
    if out.configuration.target_page_bits.is_some_and(|bits| bits != TARGET_PAGE_BITS) {
        let offset = reader.offset();
        return Err(InspectError::Unsupported { offset, what: "pages that are not of 4 KiB" });
    }
    let (ram, decoder) = (Ram::new(holes), Decoder::default());
    let mut walk = Walk { reader, description, decoder, ram, package: None, out };
    let read = walk.records();
    let Walk { ram, out, .. } = walk;
    (out.blocks, *pages) = ram.into_parts();
    let mut taken = vec![false; out.blocks.len()];
    for device in &mut out.virtio_mem {
        device.check(&mut out.warnings);
        // A block is one device's at most, so that none is gone through more than once.
        let index = device
            .find_block(out.blocks.iter().map(|block| (&*block.id, block.used_length)))
            .filter(|index| !taken[*index]);
        match index {
            Some(index) => {
                taken[index] = true;
                device.ram_block = Some(out.blocks[index].id.clone());
                let stray = device.check_pages(&out.blocks[index], pages[index].map());
                out.warnings.extend(stray);
            }
            // Of a stream that ends before its blocks nothing can be said.
            None if out.blocks.is_empty() => {}
            None => {
                let device_name = virtio_mem::device_name(&device.path);
                let region_size = device.region_size;
                out.warnings.push(Warning::NoBlock { device: device_name, region_size });
            }
        }
    }
    read
}

/// Where the reading is.
struct Walk<'a, R, P> {
    reader: FileReader<R>,
    description: Option<Description>,
    decoder: Decoder,
    ram: Ram<'a, P>,
    /// Where the package ends that is being read.
    package: Option<u64>,
    out: &'a mut Inspection,
}

impl<R: Read + Seek, P: PageIndex> Walk<'_, R, P> {
    fn records(&mut self) -> Result<(), InspectError> {
        loop {
            let offset = self.reader.offset();
            if (self.out.sections.len() + self.out.commands.len()) as u64 >= RECORDS_MAX {
                let what = "sections of devices and commands";
                return Err(InspectError::TooMany { offset, what, limit: RECORDS_MAX });
            }
            if self.package.take_if(|end| *end <= offset).is_some_and(|end| end != offset) {
                self.out.warnings.push(Warning::PackageEnd { offset });
            }
            match read_record(&mut self.reader)? {
                Record::Section(header) if header.idstr == RAM_SECTION => {
                    if header.version_id != RAM_VERSION {
                        let what = "other versions of RAM sections";
                        return Err(InspectError::Unsupported { offset, what });
                    }
                    self.out.ram_section = Some(header.section_id);
                    self.ram_section(header.section_id)?;
                }
                Record::Section(header) => self.device(offset, header)?,
                Record::Continued { section_id, kind }
                    if self.out.ram_section == Some(section_id) =>
                {
                    self.ram_section(section_id)?;
                    if kind == SectionKind::End {
                        self.out.after_ram = Some(self.reader.offset());
                    }
                }
                Record::Continued { section_id, .. } => {
                    return Err(InspectError::UnknownSection { offset, section_id });
                }
                Record::Command(command) => self.command(offset, command)?,
                Record::Eof => return self.end(),
                // A description may stand without an end before it.
                Record::Description(_) => return self.rest(),
            }
        }
    }

    /// After the end of the sections there is a description, or nothing.
    fn end(&mut self) -> Result<(), InspectError> {
        if self.description.as_ref().is_some_and(|found| found.offset == self.reader.offset()) {
            read_record(&mut self.reader)?;
        }
        self.rest()
    }

    fn rest(&mut self) -> Result<(), InspectError> {
        let (offset, len) = (self.reader.offset(), self.reader.left());
        if len != 0 {
            self.out.warnings.push(Warning::Trailing { offset, len });
        }
        Ok(())
    }

    fn ram_section(&mut self, section_id: u32) -> Result<(), InspectError> {
        self.ram.read(&mut self.reader, &self.out.configuration)?;
        Ok(read_footer(&mut self.reader, section_id)?)
    }

    fn command(&mut self, offset: u64, command: Command) -> Result<(), InspectError> {
        if let Command::Packaged { len } = command {
            let (start, len) = (self.reader.offset(), u64::from(len));
            // The records of a package stand in the file as any others.
            match self.description {
                Some(_) => self.package = Some(start.saturating_add(len)),
                None => {
                    self.reader.skip(len, "a package")?;
                    self.out.warnings.push(Warning::PackageSkipped { offset: start, len });
                }
            }
        }
        self.out.commands.push((offset, command));
        Ok(())
    }

    fn device(&mut self, offset: u64, header: SectionHeader) -> Result<(), InspectError> {
        let (idstr, instance_id) = (header.idstr.clone(), header.instance_id);
        let section_id = header.section_id;
        let described = self.description.as_ref();
        let shape = described.and_then(|found| found.device(&idstr, instance_id));
        let mut state = Structure::default();
        let read = match shape {
            Some(shape) => self.decoder.read(&mut self.reader, shape, &mut state),
            None if virtio_mem::split_id(&idstr, virtio_mem::EARLY).is_some() => {
                early_shape(&mut self.reader)
                    .and_then(|shape| self.decoder.read(&mut self.reader, &shape, &mut state))
            }
            None => {
                let described = described.is_some();
                Err(InspectError::Undescribed { offset, idstr, instance_id, described })
            }
        };
        let read = read.and_then(|()| Ok(read_footer(&mut self.reader, section_id)?));
        if read.is_ok() {
            self.virtio_mem(&header, &state);
        }
        let len = self.reader.offset() - offset;
        self.out.sections.push(SavedSection { offset, len, header, state });
        read
    }

    fn virtio_mem(&mut self, header: &SectionHeader, state: &Structure) {
        let Inspection { virtio_mem: devices, warnings, .. } = &mut *self.out;
        let id = header.instance_id;
        if let Some(path) = virtio_mem::split_id(&header.idstr, virtio_mem::EARLY) {
            devices.extend(SavedVirtioMem::from_early(path, id, &state.wire_bytes()));
        } else if let Some(path) = virtio_mem::split_id(&header.idstr, virtio_mem::NORMAL) {
            let of_path =
                |device: &&mut SavedVirtioMem| device.path == path && device.instance_id == id;
            let device = virtio_mem::device_name(path);
            match devices.iter_mut().find(of_path) {
                None => warnings.push(Warning::NoEarlySection { device }),
                Some(found) => {
                    if found.read_sizes(&state.wire_bytes()).is_none() {
                        warnings.push(Warning::NoSizes { device });
                    }
                }
            }
        }
    }
}

/// What is in an early section of virtio-mem: its geometry tells the size of its bitmap.
fn early_shape(reader: &mut dyn WireRead) -> Result<Shape, InspectError> {
    let offset = reader.offset();
    let geometry = reader.peek(virtio_mem::GEOMETRY_LEN, "the geometry of a virtio-mem device")?;
    let size = |at: usize| {
        let bytes = geometry[at..].first_chunk().expect("a geometry has three sizes");
        u64::from_be_bytes(*bytes)
    };
    let bitmap = SavedVirtioMem::bitmap_len(size(8), size(16)).filter(|len| *len <= BITMAP_MAX);
    let bitmap = bitmap.ok_or(InspectError::Mismatch {
        offset,
        what: "the geometry",
        name: virtio_mem::EARLY.to_owned(),
    })?;
    let field = |name: &str, kind: &str, size| Shape {
        name: name.into(),
        kind: kind.into(),
        size: Some(size),
        ..Shape::default()
    };
    let geometry = [("addr", 8), ("region_size", 8), ("block_size", 8), ("node", 4)];
    let geometry = Shape {
        fields: geometry.map(|(name, size)| field(name, "uint64", size)).into(),
        ..field("tmp", "tmp", virtio_mem::GEOMETRY_LEN as u64)
    };
    let fields = vec![geometry, field("size", "uint64", 8), field("bitmap", "bitmap", bitmap)];
    Ok(Shape { vmsd_name: virtio_mem::EARLY.into(), version: 1, fields, ..Shape::default() })
}
