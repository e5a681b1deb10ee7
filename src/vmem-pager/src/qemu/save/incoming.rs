//! The main channel: QEMU's stream from its first byte to its last.

use std::io::Read;
use std::sync::Arc;

use migration::Progress;
use migration::inspect::SavedVirtioMem;
use migration::stream::{
    BlockList, CAPABILITY_IGNORE_SHARED, CAPABILITY_MAPPED_RAM, Command, Configuration, ListLimits,
    PageHeader, RAM_SECTION, RAM_VERSION, Record, ReturnMessage, SectionHeader, SectionKind,
    TARGET_PAGE_BITS, TARGET_PAGE_SIZE, put_footer, put_section, read_footer, read_header,
    read_record,
};
use vmstate::printable;
use vmstate::wire::{WireError, WireRead, WireReader};

use super::description::{DescriptionFinder, is_description};
use super::kept;
use super::package::{PACKAGE_MAX, Package};
use super::records::{Mark, Records};
use crate::error::PagerError;
use crate::image::pages::Pages;
use crate::image::writer::{ImageWriter, NewFile, Start, WholeImage};

/// State of devices, bytes. QEMU's is some tens of KiB, more with graphics.
const STATE_MAX: u64 = 256 << 20;
/// virtio-mem devices.
const DEVICES_MAX: usize = 256;
/// PING of QEMU's that is answered when the state of devices has been taken over: the source gives the
/// guest away by it.
const PING_PACKAGE_LOADED: u32 = 0x42;

/// What the main channel needs of the connection.
pub(super) trait Peer {
    /// The source has opened the return path: it reads what is sent, and wants to hear how it ends.
    fn open_return_path(&mut self);

    /// Whether it has.
    fn has_return_path(&self) -> bool;

    /// Sends a message back.
    fn reply(&mut self, message: &ReturnMessage) -> Result<(), PagerError>;

    /// The blocks are known: pages may come by other channels.
    fn blocks_known(&mut self, pages: &Arc<Pages>);

    /// Keeps what is needed to continue, whatever becomes of this process: everything but the pages.
    fn keep(&mut self, bytes: &[u8]) -> Result<(), PagerError>;

    /// Says which pages of a block are here, after the break of a save in postcopy: none, so that all are sent.
    fn reply_nothing_received(&mut self, block: &str, nr_pages: u64) -> Result<(), PagerError>;

    /// Postcopy may follow: a channel for it may come.
    fn postcopy_advised(&mut self);

    /// The guest is given away: from here on, a failure is one that the source does not undo.
    fn guest_taken(&mut self);

    /// How many other channels carry pages.
    fn channels(&mut self) -> Result<usize, PagerError>;

    /// Waits until all pages that were sent on other channels before this point are in the file.
    fn sync(&mut self) -> Result<(), PagerError>;

    /// Whether nothing has come for a moment, and the channel is open.
    fn is_quiet(&mut self) -> Result<bool, PagerError>;
}

/// Takes a whole stream into an image, which lacks only its name then.
///
/// # Errors
///
/// Why there is none: the stream, or the file.
pub(super) fn receive<R: Read>(
    reader: &mut WireReader<R>,
    peer: &mut dyn Peer,
    file: NewFile,
    progress: &Arc<Progress>,
) -> Result<WholeImage, PagerError> {
    let configuration = read_header(reader)?;
    check(&configuration)?;
    let mut early = Early::new(progress, configuration);
    let (image, ram) = early.read(reader, peer, file)?;
    let Early { head, .. } = early;
    let (records, package, recovery) = (Records::default(), None, Recovery::None);
    Incoming { reader, peer, image, ram, records, head, package, recovery }.read()
}

/// Continues a save that broke off in postcopy, with what was kept of it: the source sends all pages again.
///
/// # Errors
///
/// Why there is no image: what was kept, the stream, or the file.
pub(super) fn recover<R: Read>(
    kept: &[u8],
    reader: &mut WireReader<R>,
    peer: &mut dyn Peer,
    file: NewFile,
    progress: &Arc<Progress>,
) -> Result<WholeImage, PagerError> {
    let mut from = WireReader::new(kept);
    let configuration = read_header(&mut from)?;
    check(&configuration)?;
    let mut early = Early::new(progress, configuration);
    peer.postcopy_advised();
    let (image, ram) = early.read(&mut from, peer, file)?;
    let at = from.offset();
    match read_record(&mut from)? {
        Record::Continued { kind: SectionKind::End, section_id }
            if section_id == ram.section_id => {}
        other => return Err(unexpected(&other, at, "among what was kept")),
    }
    let ended = Records::default().take(&mut from, image.pages())? == Mark::End;
    read_footer(&mut from, ram.section_id)?;
    let state = kept.get(from.offset() as usize..).and_then(|rest| rest.strip_suffix(&[0]));
    let Some(state) = state.filter(|_| ended) else {
        return Err(PagerError::Protocol("what was kept of the guest is not whole".to_owned()));
    };
    let package = Some(Package::of_state(state));
    image.pages().reserve()?;
    peer.open_return_path();
    peer.guest_taken();
    let (records, head, recovery) = (Records::default(), Vec::new(), Recovery::Asking);
    Incoming { reader, peer, image, ram, records, head, package, recovery }.read()
}

fn check(configuration: &Configuration) -> Result<(), PagerError> {
    for (capability, why) in [
        (CAPABILITY_IGNORE_SHARED, "shared memory would be missing in the image"),
        (CAPABILITY_MAPPED_RAM, "it is for files, which QEMU writes itself"),
    ] {
        if configuration.has(capability) {
            let what = format!("the source has the capability {capability}: {why}; switch it off");
            return Err(PagerError::Protocol(what));
        }
    }
    match configuration.target_page_bits {
        Some(bits) if bits != TARGET_PAGE_BITS => {
            let what =
                format!("pages of 2^{bits} bytes: only guests with pages of 4 KiB are saved");
            Err(PagerError::Protocol(what))
        }
        _ => Ok(()),
    }
}

/// The RAM section.
struct Ram {
    section_id: u32,
    /// Channels are waited for at the end of each section, as machine types of QEMU 8.0 and before have
    /// it, since nothing else says where.
    sync_each_section: bool,
}

/// Up to the list of blocks.
struct Early<'a> {
    progress: &'a Arc<Progress>,
    configuration: Configuration,
    /// Sections before RAM, as they came.
    bytes: Vec<u8>,
    devices: Vec<SavedVirtioMem>,
    /// Page sizes that postcopy was advised with, or'ed together.
    advised: u64,
    /// Everything up to the pages, once that is known, if postcopy was advised.
    head: Vec<u8>,
}

impl<'a> Early<'a> {
    fn new(progress: &'a Arc<Progress>, configuration: Configuration) -> Self {
        let (bytes, devices, head) = (Vec::new(), Vec::new(), Vec::new());
        Self { progress, configuration, bytes, devices, advised: 0, head }
    }

    fn read<R: Read>(
        &mut self,
        reader: &mut WireReader<R>,
        peer: &mut dyn Peer,
        file: NewFile,
    ) -> Result<(ImageWriter, Ram), PagerError> {
        loop {
            let at = reader.offset();
            match read_record(reader)? {
                Record::Section(header) if header.idstr == RAM_SECTION => {
                    return self.ram(reader, peer, file, &header);
                }
                Record::Section(header) => self.section(reader, &header, at)?,
                Record::Command(Command::PostcopyAdvise(sizes)) => {
                    let sizes = sizes.filter(|sizes| sizes.target_page_size == TARGET_PAGE_SIZE);
                    let Some(sizes) = sizes else {
                        let what =
                            "postcopy was advised without RAM, or with pages that are not of 4 KiB";
                        return Err(PagerError::Protocol(what.to_owned()));
                    };
                    self.advised |= sizes.page_sizes;
                    peer.postcopy_advised();
                }
                Record::Command(command) => plain_command(&command, at, peer)?,
                other => return Err(unexpected(&other, at, "before RAM")),
            }
        }
    }

    fn section(
        &mut self,
        reader: &mut dyn WireRead,
        header: &SectionHeader,
        at: u64,
    ) -> Result<(), PagerError> {
        let SectionHeader { kind, idstr, instance_id, section_id, .. } = header;
        let early = match kind {
            SectionKind::Full if self.devices.len() < DEVICES_MAX => {
                SavedVirtioMem::read_early(idstr, *instance_id, reader)?
            }
            _ => None,
        };
        let Some((device, bytes)) = early else {
            let idstr = printable(idstr);
            return Err(PagerError::Protocol(format!(
                "byte {at:#x} of the stream: the section {idstr:?} before RAM is not understood; only those of \
                 virtio-mem are. Migrate without the device or the capability that it comes from"
            )));
        };
        read_footer(reader, *section_id)?;
        put_section(&mut self.bytes, header);
        self.bytes.extend_from_slice(&bytes);
        put_footer(&mut self.bytes, *section_id);
        self.devices.push(device);
        Ok(())
    }

    fn ram<R: Read>(
        &mut self,
        reader: &mut WireReader<R>,
        peer: &mut dyn Peer,
        file: NewFile,
        header: &SectionHeader,
    ) -> Result<(ImageWriter, Ram), PagerError> {
        let at = reader.offset();
        let (kind, version) = (header.kind, header.version_id);
        if kind != SectionKind::Start || version != RAM_VERSION {
            let what = format!(
                "byte {at:#x} of the stream: RAM as a {kind:?} section of version {version}"
            );
            return Err(PagerError::Protocol(what));
        }
        let PageHeader::List { total } = PageHeader::read(reader)? else {
            let what = format!("byte {at:#x} of the stream: the list of RAM blocks is missing");
            return Err(PagerError::Protocol(what));
        };
        let limits = ListLimits {
            may_have_page_size: self.advised > TARGET_PAGE_SIZE,
            ..ListLimits::default()
        };
        let list = BlockList::read(reader, total, limits, &mut |_, _| Ok(()))?;
        let start = Start {
            configuration: &self.configuration,
            early: &self.bytes,
            ram: header,
            list: &list,
            devices: std::mem::take(&mut self.devices),
        };
        if self.advised != 0 {
            kept::put_head(&mut self.head, &self.configuration, &self.bytes, header, &list);
        }
        let image = file.begin(start, Arc::clone(self.progress))?;
        image.pages().write_out_early();
        peer.blocks_known(image.pages());
        let mut records = Records::default();
        let mut has_flush = false;
        while records.take(reader, image.pages())? == Mark::Flush {
            has_flush = true;
            peer.sync()?;
        }
        let sync_each_section = !has_flush && peer.channels()? != 0;
        if sync_each_section {
            peer.sync()?;
        }
        read_footer(reader, header.section_id)?;
        Ok((image, Ram { section_id: header.section_id, sync_each_section }))
    }
}

/// From the list of blocks to the end.
struct Incoming<'a, R> {
    reader: &'a mut WireReader<R>,
    peer: &'a mut dyn Peer,
    image: ImageWriter,
    ram: Ram,
    records: Records,
    /// Everything up to the pages, where postcopy may follow.
    head: Vec<u8>,
    /// State of devices that came before the last pages did: the guest was taken over in postcopy.
    package: Option<Package>,
    recovery: Recovery,
}

/// Whether, and how far, a save that broke off is continued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recovery {
    /// It did not.
    None,
    /// The source asks what is here.
    Asking,
    /// It sends the rest.
    Resumed,
}

impl<R: Read> Incoming<'_, R> {
    fn read(mut self) -> Result<WholeImage, PagerError> {
        let mut ended = false;
        loop {
            let at = self.reader.offset();
            match read_record(self.reader)? {
                Record::Continued { kind, section_id }
                    if section_id == self.ram.section_id && !ended =>
                {
                    self.pages(section_id)?;
                    ended = kind == SectionKind::End;
                    if ended && self.package.is_none() {
                        return self.devices();
                    }
                }
                Record::Command(command) if !ended => self.command(command, at)?,
                // State of devices is in the package, and nothing describes it.
                Record::Eof if ended => {
                    let state = self.package.take().unwrap_or_default();
                    self.image.append_state(state.state())?;
                    let len = self.image.state_len();
                    return self.image.finish(len, None);
                }
                other => return Err(unexpected(&other, at, "among RAM")),
            }
        }
    }

    fn pages(&mut self, section_id: u32) -> Result<(), PagerError> {
        while self.records.take(self.reader, self.image.pages())? == Mark::Flush {
            self.peer.sync()?;
        }
        if self.ram.sync_each_section && self.package.is_none() {
            self.peer.sync()?;
        }
        Ok(read_footer(self.reader, section_id)?)
    }

    fn command(&mut self, command: Command, at: u64) -> Result<(), PagerError> {
        match command {
            Command::PostcopyRamDiscard { block, ranges } if self.package.is_none() => {
                let pages = self.image.pages();
                let block = pages.find(&block)?;
                ranges.iter().try_for_each(|(start, len)| pages.forget(block, *start, *len))
            }
            Command::Packaged { len } if self.package.is_none() => {
                let bytes = self.reader.bytes(u64::from(len), PACKAGE_MAX, "package")?;
                let package = Package::parse(bytes)?;
                // Once the guest is here, there must be room for all that is outstanding.
                self.image.pages().reserve()?;
                kept::put_tail(&mut self.head, package.state());
                self.peer.keep(&self.head)?;
                self.peer.open_return_path();
                for ping in package.pings() {
                    if *ping == PING_PACKAGE_LOADED {
                        self.peer.guest_taken();
                    }
                    self.peer.reply(&ReturnMessage::Pong(*ping))?;
                }
                self.peer.guest_taken();
                self.package = Some(package);
                Ok(())
            }
            Command::RecvBitmap { block } if self.recovery == Recovery::Asking => {
                let pages = self.image.pages();
                let nr_pages = pages.nr_pages(pages.find(&block)?);
                self.peer.reply_nothing_received(&block, nr_pages)
            }
            Command::PostcopyResume if self.recovery == Recovery::Asking => {
                self.recovery = Recovery::Resumed;
                self.peer.reply(&ReturnMessage::ResumeAck)
            }
            command => plain_command(&command, at, self.peer),
        }
    }

    /// State of devices, up to the description that ends the stream.
    fn devices(mut self) -> Result<WholeImage, PagerError> {
        let mut finder = DescriptionFinder::default();
        loop {
            if self.reader.buffered().is_empty() && !self.read_ahead()? {
                return self.closed(&finder);
            }
            let bytes = self.reader.buffered();
            self.image.append_state(bytes)?;
            finder.push(bytes);
            let len = bytes.len();
            self.reader.take(len);
            if self.image.state_len() > STATE_MAX {
                let what = format!("more than {STATE_MAX:#x} bytes of state of devices");
                return Err(PagerError::Protocol(what));
            }
            if self.peer.has_return_path()
                && finder.ends_now().next().is_some()
                && self.peer.is_quiet()?
                && let Some((state_len, json)) = self.description(&finder)?
            {
                return self.image.finish(state_len, Some(&json));
            }
        }
    }

    /// Nothing more comes.
    fn closed(self, finder: &DescriptionFinder) -> Result<WholeImage, PagerError> {
        let Some((state_len, json)) = self.description(finder)? else {
            let what = "QEMU closed the connection in the middle of the state of devices (or its machine type leaves \
                        out the description at the end, by suppress-vmdesc)";
            return Err(PagerError::Peer(what.to_owned()));
        };
        if self.peer.has_return_path() {
            let what = "QEMU closed the connection before it was told that the guest is saved";
            return Err(PagerError::Peer(what.to_owned()));
        }
        self.image.finish(state_len, Some(&json))
    }

    /// The length of the state, and the description after it, if what has come ends with one.
    fn description(
        &self,
        finder: &DescriptionFinder,
    ) -> Result<Option<(u64, Vec<u8>)>, PagerError> {
        for found in finder.ends_now() {
            let mut json = vec![0; (found.end - found.json) as usize];
            self.image.read_state(found.json, &mut json)?;
            if is_description(&json) {
                return Ok(Some((found.state_len, json)));
            }
        }
        Ok(None)
    }

    fn read_ahead(&mut self) -> Result<bool, PagerError> {
        let what = "the end of the state of devices (the description there must not be left out: suppress-vmdesc=off)";
        let offset = self.reader.offset();
        self.reader.read_ahead().map_err(|source| WireError::Io { offset, what, source }.into())
    }
}

/// A command that means the same wherever it stands.
fn plain_command(command: &Command, at: u64, peer: &mut dyn Peer) -> Result<(), PagerError> {
    match command {
        Command::OpenReturnPath => {
            peer.open_return_path();
            Ok(())
        }
        // Answered only where the source reads answers.
        Command::Ping(value) if peer.has_return_path() => peer.reply(&ReturnMessage::Pong(*value)),
        Command::Ping(_) | Command::SwitchoverStart => Ok(()),
        _ => Err(unexpected(&Record::Command(command.clone()), at, "here")),
    }
}

fn kind_name(kind: SectionKind) -> &'static str {
    match kind {
        SectionKind::Start => "a START",
        SectionKind::Part => "a PART",
        SectionKind::End => "an END",
        SectionKind::Full => "a FULL",
    }
}

/// An error about a record that stands where it cannot.
fn unexpected(record: &Record, at: u64, place: &str) -> PagerError {
    let what = match record {
        Record::Section(SectionHeader { kind, idstr, .. }) => {
            format!("{} section of {:?}", kind_name(*kind), printable(idstr))
        }
        Record::Continued { kind, section_id } => {
            format!("{} section with the number {section_id}", kind_name(*kind))
        }
        Record::Command(command) => match command {
            Command::Packaged { .. } => "a package, of which there is one at most,".to_owned(),
            Command::PostcopyResume | Command::RecvBitmap { .. } => {
                "a recovery of postcopy, which there was none of,".to_owned()
            }
            other => format!("the command {other:?}"),
        },
        Record::Eof => "the end of the stream".to_owned(),
        Record::Description(_) => "a description".to_owned(),
    };
    PagerError::Protocol(format!("byte {at:#x} of the stream: {what} {place} is not understood"))
}
