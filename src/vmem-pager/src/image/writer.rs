//! Writing an image: what stands before RAM and the list of blocks first, pages as they come, and the rest.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use migration::Progress;
use migration::inspect::SavedVirtioMem;
use migration::snapshot::{NewImage, place, with_mapped_ram};
use migration::stream::{
    BlockEntry, BlockList, Configuration, SectionHeader, SectionKind, entry_len, make_findable,
    put_continued, put_description, put_end_of_section, put_entry, put_eof, put_footer, put_header,
    put_list_start, put_section,
};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::pages::{Pages, PlacedBlock};
use crate::error::PagerError;

/// All RAM of a guest, bytes: more than any machine has, little enough for its bitmaps.
const RAM_MAX: u64 = 64 << 40;

/// An image of which nothing is known yet. It has no name, and leaves nothing when it is dropped.
#[derive(Debug)]
pub struct NewFile {
    image: NewImage,
    path: PathBuf,
}

impl NewFile {
    /// A new file in the folder of `path`.
    ///
    /// # Errors
    ///
    /// When the folder does not take one.
    pub fn create(path: &Path) -> Result<Self, PagerError> {
        if path.is_dir() {
            let source = io::Error::from(io::ErrorKind::IsADirectory);
            return Err(PagerError::file("write", path)(source));
        }
        let image = NewImage::create(path).map_err(PagerError::file("create", path))?;
        Ok(Self { image, path: path.to_owned() })
    }

    /// Writes everything up to the pages: `configuration`, which becomes that of a mapped-ram file, the
    /// bytes of the early sections, and the list of blocks.
    ///
    /// # Errors
    ///
    /// When the blocks are impossible, or the file does not take it.
    pub fn begin(
        self,
        start: Start<'_>,
        progress: Arc<Progress>,
    ) -> Result<ImageWriter, PagerError> {
        let Self { image, path } = self;
        let Start { configuration, early, ram, list, devices } = start;
        let configuration = with_mapped_ram(configuration);
        let mut bytes = Vec::new();
        put_header(&mut bytes, &configuration);
        bytes.extend_from_slice(early);
        put_section(&mut bytes, ram);
        let plain =
            list.entries.iter().map(|entry| BlockEntry { page_size: None, ..entry.clone() });
        let plain = BlockList { entries: plain.collect() };
        put_list_start(&mut bytes, &plain);
        let mut out = Out { image: &image, path: &path, position: 0 };
        out.write(&bytes)?;
        let mut devices = assign(devices, &plain);
        let mut placed = Vec::new();
        let mut ram_size = 0u64;
        for (index, entry) in plain.entries.iter().enumerate() {
            ram_size = ram_size.saturating_add(entry.used_length);
            let header = place(out.position + entry_len(entry), entry.used_length);
            let Some(header) = header.filter(|_| ram_size <= RAM_MAX) else {
                let id = vmstate::printable(&entry.id);
                return Err(PagerError::Protocol(format!(
                    "RAM block {id:?} of {:#x} bytes: there is no guest with more than {RAM_MAX:#x} bytes",
                    entry.used_length
                )));
            };
            if plain.entries[..index].iter().any(|other| other.id == entry.id) {
                let id = vmstate::printable(&entry.id);
                return Err(PagerError::Protocol(format!("RAM block {id:?} is in the list twice")));
            }
            bytes.clear();
            put_entry(&mut bytes, &BlockEntry { mapped: Some(header), ..entry.clone() });
            out.write(&bytes)?;
            out.position = header.pages_offset + entry.used_length;
            let device = devices[index].take();
            placed.push(PlacedBlock::new(entry.id.clone(), entry.used_length, header, device));
        }
        bytes.clear();
        put_end_of_section(&mut bytes);
        put_footer(&mut bytes, ram.section_id);
        put_continued(&mut bytes, SectionKind::End, ram.section_id);
        put_end_of_section(&mut bytes);
        put_footer(&mut bytes, ram.section_id);
        out.write(&bytes)?;
        let state_offset = out.position;
        let file =
            image.file().try_clone().map_err(PagerError::system("duplicate a descriptor"))?;
        let pages = Arc::new(Pages::new(file, &path, placed, progress));
        Ok(ImageWriter { image, path, configuration, pages, state_offset, state_len: 0 })
    }
}

/// What stands before the pages.
#[derive(Debug)]
pub struct Start<'a> {
    /// The source's.
    pub configuration: &'a Configuration,
    /// All records between configuration and RAM that are to be kept.
    pub early: &'a [u8],
    /// The source's section of RAM, whose number is kept.
    pub ram: &'a SectionHeader,
    /// Its blocks.
    pub list: &'a BlockList,
    /// virtio-mem devices of the early sections.
    pub devices: Vec<SavedVirtioMem>,
}

/// Gives each block its virtio-mem device; no two blocks have the same.
fn assign(devices: Vec<SavedVirtioMem>, list: &BlockList) -> Vec<Option<SavedVirtioMem>> {
    let blocks = || list.entries.iter().map(|entry| (entry.id.as_str(), entry.used_length));
    let mut of_blocks: Vec<Option<SavedVirtioMem>> = list.entries.iter().map(|_| None).collect();
    for device in devices {
        if let Some(index) = device.find_block(blocks())
            && of_blocks[index].is_none()
        {
            of_blocks[index] = Some(device);
        }
    }
    of_blocks
}

/// The file, at a place.
struct Out<'a> {
    image: &'a NewImage,
    path: &'a Path,
    position: u64,
}

impl Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), PagerError> {
        let written = self.image.file().write_all_at(bytes, self.position);
        written
            .map_err(|error| explain(error, self.position))
            .map_err(PagerError::file("write", self.path))?;
        self.position += bytes.len() as u64;
        Ok(())
    }
}

/// Says of a file that may not become as large why it is.
fn explain(error: io::Error, needed: u64) -> io::Error {
    if error.kind() != io::ErrorKind::FileTooLarge {
        return error;
    }
    let what = format!(
        "{error}: each page has its place, so that the file is as large as all RAM blocks ({needed:#x} bytes \
         and more), though mostly holes; use a file system that allows files of this size"
    );
    io::Error::new(io::ErrorKind::FileTooLarge, what)
}

/// An image whose pages arrive.
#[derive(Debug)]
pub struct ImageWriter {
    image: NewImage,
    path: PathBuf,
    configuration: Configuration,
    pages: Arc<Pages>,
    /// Where the state of devices begins.
    state_offset: u64,
    /// Bytes of it so far.
    state_len: u64,
}

impl ImageWriter {
    /// Its pages.
    pub fn pages(&self) -> &Arc<Pages> {
        &self.pages
    }

    /// Bytes of state of devices.
    pub fn state_len(&self) -> u64 {
        self.state_len
    }

    /// Appends to the state of devices.
    ///
    /// # Errors
    ///
    /// When the file does not take it.
    pub fn append_state(&mut self, bytes: &[u8]) -> Result<(), PagerError> {
        let position = self.state_offset + self.state_len;
        Out { image: &self.image, path: &self.path, position }.write(bytes)?;
        self.state_len += bytes.len() as u64;
        Ok(())
    }

    /// Reads bytes of the state of devices back, from `offset` on.
    ///
    /// # Errors
    ///
    /// When the file does not give them.
    pub fn read_state(&self, offset: u64, bytes: &mut [u8]) -> Result<(), PagerError> {
        let read = self.image.file().read_exact_at(bytes, self.state_offset + offset);
        read.map_err(PagerError::file("read", &self.path))
    }

    /// Writes the end: all but the first `state_len` bytes of the state go, the end of the stream and the
    /// description follow, and which pages there are.
    ///
    /// # Errors
    ///
    /// When the file does not take it.
    pub fn finish(
        self,
        state_len: u64,
        description: Option<&[u8]>,
    ) -> Result<WholeImage, PagerError> {
        let Self { image, path, configuration, pages, state_offset, .. } = self;
        let end = state_offset + state_len;
        image.file().set_len(end).map_err(PagerError::file("write", &path))?;
        let mut bytes = Vec::new();
        put_eof(&mut bytes);
        if let Some(description) = description {
            put_description(&mut bytes, &with_configuration(description, &configuration));
        }
        Out { image: &image, path: &path, position: end }.write(&bytes)?;
        pages.finish()?;
        Ok(WholeImage { image, path, pages })
    }
}

/// An image that only lacks its name.
#[derive(Debug)]
pub struct WholeImage {
    image: NewImage,
    path: PathBuf,
    pages: Arc<Pages>,
}

impl WholeImage {
    /// The file.
    pub fn file(&self) -> &std::fs::File {
        self.image.file()
    }

    /// The first page of each block that came for discarded memory: block, and bytes from its start.
    pub fn strays(&self) -> Vec<(&str, u64)> {
        self.pages.strays()
    }

    /// Brings the file to the disk and gives it its name, in place of what had it.
    ///
    /// # Errors
    ///
    /// Why it has not got its name.
    pub fn commit(self) -> Result<(), PagerError> {
        let Self { image, path, .. } = self;
        image.commit().map_err(PagerError::file("finish", &path))
    }
}

/// The description of devices, with what the configuration section has now. All else stays, byte for byte.
fn with_configuration(description: &[u8], configuration: &Configuration) -> Vec<u8> {
    #[derive(Deserialize)]
    struct Described<'a> {
        #[serde(borrow)]
        configuration: &'a RawValue,
    }
    let text = std::str::from_utf8(description).unwrap_or_default();
    let Ok(Described { configuration: old }) = serde_json::from_str(text) else {
        return description.to_vec();
    };
    let old = old.get();
    let start = old.as_ptr().addr() - text.as_ptr().addr();
    let new = configuration.description().to_string();
    let mut json = description.to_vec();
    json.splice(start..start + old.len(), new.into_bytes());
    make_findable(&mut json);
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_tells_the_new_configuration_and_keeps_all_else() {
        let old =
            br#"{"configuration": {"vmsd_name": "configuration", "a": [1]}, "b": 1.50, "a": {}}"#;
        let configuration = with_mapped_ram(&Configuration::new("q35"));
        let new = String::from_utf8(with_configuration(old, &configuration)).unwrap();
        let expected = configuration.description().to_string();
        let (head, tail) = new.split_once(&expected).expect("the new configuration is there");
        assert_eq!(
            (head.replace(' ', "").as_str(), tail),
            (r#"{"configuration":"#, r#", "b": 1.50, "a": {}}"#)
        );
        for odd in [&b"{}"[..], b"nothing", b"\xff"] {
            assert_eq!(with_configuration(odd, &configuration), odd);
        }
    }
}
