//! A stream, part by part, as QEMU sends it.

use migration::stream::{
    AdvisedSizes, BlockEntry, BlockList, Command, Configuration, PageHeader, PageKind, RAM_SECTION,
    RAM_VERSION, SectionHeader, SectionKind, put_command, put_continued, put_description,
    put_end_of_section, put_eof, put_footer, put_header, put_list, put_section,
};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Number of the RAM section.
pub const RAM_ID: u32 = 2;
/// A description that QEMU could have sent, of [`state`].
pub const DESCRIPTION: &str = r#"{"configuration": {"vmsd_name": "configuration", "version": 1, "fields": []}, "page_size": 4096, "devices": [{"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 1, "fields": [{"name": "all", "type": "buffer", "size": 13}]}, {"name": "cpu", "instance_id": 0, "vmsd_name": "cpu", "version": 1, "fields": [{"name": "all", "type": "buffer", "size": 13}]}]}"#;
/// The value of the PING that is answered when the state of devices is taken over.
pub const PACKAGE_LOADED: u32 = 0x42;

/// Content of a page that is not zeros.
pub fn content(seed: u8) -> [u8; PAGE] {
    std::array::from_fn(|index| seed.wrapping_add(index as u8) | 1)
}

/// A stream so far.
#[derive(Clone, Default)]
pub struct Source {
    /// Its bytes.
    pub bytes: Vec<u8>,
    current: Option<String>,
}

impl Source {
    /// Begins.
    pub fn new() -> Self {
        let mut source = Self::default();
        put_header(&mut source.bytes, &Configuration::new("pc-q35-11.1"));
        source
    }

    /// A command.
    pub fn command(mut self, command: &Command) -> Self {
        put_command(&mut self.bytes, command);
        self
    }

    /// OPEN_RETURN_PATH and the first PING.
    pub fn return_path(self) -> Self {
        self.command(&Command::OpenReturnPath).command(&Command::Ping(1))
    }

    /// POSTCOPY_ADVISE.
    pub fn advise(self) -> Self {
        let sizes = AdvisedSizes { page_sizes: 4096, target_page_size: 4096 };
        self.command(&Command::PostcopyAdvise(Some(sizes)))
    }

    /// The early section of a virtio-mem device at `path`, with the blocks of these numbers plugged.
    pub fn device(mut self, path: &str, region: u64, block: u64, plugged: &[u64]) -> Self {
        let header = SectionHeader {
            kind: SectionKind::Full,
            section_id: 40,
            idstr: format!("{path}/virtio-mem-device-early"),
            instance_id: 0,
            version_id: 1,
        };
        put_section(&mut self.bytes, &header);
        for value in [1 << 32, region, block] {
            self.bytes.extend(u64::to_be_bytes(value));
        }
        self.bytes.extend(0u32.to_be_bytes());
        self.bytes.extend((plugged.len() as u64 * block).to_be_bytes());
        let mut bitmap = vec![0u64; (region / block).div_ceil(64) as usize];
        plugged.iter().for_each(|block| bitmap[(block / 64) as usize] |= 1 << (block % 64));
        bitmap.iter().for_each(|word| self.bytes.extend(word.to_be_bytes()));
        put_footer(&mut self.bytes, 40);
        self
    }

    /// The START section of RAM.
    pub fn ram(mut self, blocks: &[(&str, u64)]) -> Self {
        self.put_ram(blocks);
        self.end_section()
    }

    /// The same without its end.
    pub fn put_ram(&mut self, blocks: &[(&str, u64)]) {
        let header = SectionHeader {
            kind: SectionKind::Start,
            section_id: RAM_ID,
            idstr: RAM_SECTION.to_owned(),
            instance_id: 0,
            version_id: RAM_VERSION,
        };
        put_section(&mut self.bytes, &header);
        put_list(&mut self.bytes, &list(blocks));
    }

    /// Begins a PART or END section of RAM.
    pub fn section(mut self, kind: SectionKind) -> Self {
        put_continued(&mut self.bytes, kind, RAM_ID);
        self
    }

    /// Ends a section of RAM.
    pub fn end_section(mut self) -> Self {
        put_end_of_section(&mut self.bytes);
        put_footer(&mut self.bytes, RAM_ID);
        self
    }

    /// A mark at which other channels are waited for.
    pub fn flush(mut self) -> Self {
        self.bytes.extend(0x200u64.to_be_bytes());
        self
    }

    /// A page; `None` is one of zeros.
    pub fn page(mut self, block: &str, offset: u64, page: Option<&[u8]>) -> Self {
        let continued = self.current.as_deref() == Some(block);
        self.put_page(block, offset, page, continued);
        self.current = Some(block.to_owned());
        self
    }

    /// A page, with or without its block's name.
    pub fn put_page(&mut self, block: &str, offset: u64, page: Option<&[u8]>, continued: bool) {
        let kind = if page.is_some() { PageKind::Normal } else { PageKind::Zero };
        self.bytes.extend(PageHeader::page_word(kind, offset, continued).to_be_bytes());
        if !continued {
            self.bytes.push(block.len() as u8);
            self.bytes.extend(block.as_bytes());
        }
        self.bytes.extend(page.unwrap_or(&[0]));
    }

    /// The empty END section, state of devices, and the end.
    pub fn end(self, state: &[u8]) -> Self {
        let mut source = self.section(SectionKind::End).end_section();
        source.bytes.extend(state);
        put_eof(&mut source.bytes);
        put_description(&mut source.bytes, DESCRIPTION.as_bytes());
        source
    }

    /// State of devices as a package, by which the guest is given away.
    pub fn package(mut self, state: &[u8]) -> Self {
        let mut package = Vec::new();
        put_command(&mut package, &Command::PostcopyListen);
        package.extend(state);
        put_command(&mut package, &Command::Ping(3));
        put_command(&mut package, &Command::Ping(PACKAGE_LOADED));
        put_command(&mut package, &Command::PostcopyRun);
        put_command(&mut self.bytes, &Command::Packaged { len: package.len() as u32 });
        self.bytes.extend(package);
        self
    }

    /// The end of a stream whose state of devices was a package.
    pub fn end_postcopy(self) -> Self {
        let mut source = self.section(SectionKind::End).end_section();
        put_eof(&mut source.bytes);
        source
    }
}

/// Sections of devices, as they are on a stream.
pub fn state() -> Vec<u8> {
    let mut bytes = Vec::new();
    for (section_id, idstr) in [(50, "timer"), (51, "cpu")] {
        let header = SectionHeader {
            kind: SectionKind::Full,
            section_id,
            idstr: idstr.to_owned(),
            instance_id: 0,
            version_id: 1,
        };
        put_section(&mut bytes, &header);
        bytes.extend(b"\0\x06\0\0\0\x02{}state");
        put_footer(&mut bytes, section_id);
    }
    bytes
}

fn list(blocks: &[(&str, u64)]) -> BlockList {
    let entry = |(id, used_length): &(&str, u64)| BlockEntry {
        id: (*id).to_owned(),
        used_length: *used_length,
        page_size: None,
        gpa: None,
        mapped: None,
    };
    BlockList { entries: blocks.iter().map(entry).collect() }
}

/// How a multifd channel introduces itself.
pub fn multifd_greeting(id: u8) -> Vec<u8> {
    let mut bytes = vec![0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1];
    bytes.extend([9; 16]);
    bytes.push(id);
    bytes.resize(64, 0);
    bytes
}

/// A multifd packet; `pages` have their offsets, then `zeros`.
pub fn multifd_packet(sync: bool, block: &str, pages: &[(u64, u8)], zeros: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (normal, zero) = (pages.len() as u32, zeros.len() as u32);
    for word in [0x1122_3344, 1, u32::from(sync), 128, normal, normal * PAGE as u32, 0, 7, zero] {
        bytes.extend(u32::to_be_bytes(word));
    }
    bytes.resize(64, 0);
    bytes.extend(block.as_bytes());
    bytes.resize(320, 0);
    let offsets = pages.iter().map(|(offset, _)| offset).chain(zeros);
    offsets.for_each(|offset| bytes.extend(offset.to_be_bytes()));
    bytes.resize(320 + 128 * 8, 0);
    pages.iter().for_each(|(_, seed)| bytes.extend(content(*seed)));
    bytes
}
