//! Sources and destinations that say what the engine's would not.

use std::io::{Read, Write};

use ram_discard::ByteRange;
use vmstate::wire::{WireReader, WireWrite};

use super::*;
use crate::channel::BufferSink;
use crate::handler::{PostcopySave, SaveHandler};
use crate::page_bitmap::PageBitmap;
use crate::stream::{
    AdvisedSizes, Command, PageHeader, PageKind, RAM_SECTION, RAM_VERSION, ReturnMessage,
    SectionHeader, SectionKind, TARGET_PAGE_SIZE, put_command, put_continued, put_end_of_section,
    put_footer, put_header, put_list, put_section,
};
use crate::sys::GatherWrite;

/// Pages of `vmem0` that a [`RawSource`] announces.
pub(super) const ANNOUNCED: std::ops::Range<u64> = 64..80;

/// A source whose guest is stopped, up to the package.
pub(super) struct RawSource {
    stream: UnixStream,
    said: u64,
}

impl RawSource {
    /// Begins, with the list of RAM blocks and the DISCARD of what is [`ANNOUNCED`].
    pub(super) fn begin(stream: UnixStream, to: &Side) -> Self {
        let mut bytes = Vec::new();
        put_header(&mut bytes, &Configuration::new("test"));
        put_command(&mut bytes, &Command::OpenReturnPath);
        let page_sizes = AdvisedSizes { page_sizes: PAGE, target_page_size: TARGET_PAGE_SIZE };
        put_command(&mut bytes, &Command::PostcopyAdvise(Some(page_sizes)));
        put_section(&mut bytes, &header(SectionKind::Start, 0, RAM_SECTION, RAM_VERSION));
        put_list(&mut bytes, &to.blocks.list(OPTIONS).unwrap());
        put_end_of_section(&mut bytes);
        put_footer(&mut bytes, 0);
        let ranges = vec![(ANNOUNCED.start * PAGE, (ANNOUNCED.end - ANNOUNCED.start) * PAGE)];
        let block = "vmem0".to_owned();
        put_command(&mut bytes, &Command::PostcopyRamDiscard { block, ranges });
        let mut source = Self { stream, said: 0 };
        source.say(&bytes);
        source
    }

    /// A destination that has gone does not hear it.
    pub(super) fn say(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
        self.said += bytes.len() as u64;
    }

    /// Says a command; at which byte of the stream.
    pub(super) fn command(&mut self, command: &Command) -> u64 {
        let (at, mut bytes) = (self.said, Vec::new());
        put_command(&mut bytes, command);
        self.say(&bytes);
        at
    }

    /// A package of LISTEN, a device section and commands.
    pub(super) fn package(&mut self, idstr: &str, commands: &[Command]) {
        let mut package = Vec::new();
        put_command(&mut package, &Command::PostcopyListen);
        put_section(&mut package, &header(SectionKind::Full, 1, idstr, 1));
        put_footer(&mut package, 1);
        commands.iter().for_each(|command| put_command(&mut package, command));
        let mut bytes = Vec::new();
        put_command(&mut bytes, &Command::Packaged { len: package.len() as u32 });
        bytes.extend(package);
        self.say(&bytes);
    }

    /// A package with everything, and RUN behind it.
    pub(super) fn hand_over(&mut self) {
        self.package("dev", &[Command::Ping(PING_PACKAGE_LOADED)]);
        self.command(&Command::PostcopyRun);
    }

    /// A section with one page of `vmem0`.
    pub(super) fn page(&mut self, offset: u64) {
        let mut bytes = Vec::new();
        put_continued(&mut bytes, SectionKind::Part, 0);
        bytes.put_be64(PageHeader::page_word(PageKind::Normal, offset, false));
        bytes.put_name("vmem0");
        bytes.put(&[7; PAGE as usize]);
        put_end_of_section(&mut bytes);
        put_footer(&mut bytes, 0);
        self.say(&bytes);
    }

    /// All that is announced, and the end.
    pub(super) fn finish(&mut self) {
        ANNOUNCED.for_each(|page| self.page(page * PAGE));
        self.say(&[0]);
    }

    /// Waits for a message of the destination, and reads no further.
    pub(super) fn hear(&mut self, expected: &ReturnMessage) {
        let mut wanted = Vec::new();
        expected.put(&mut wanted);
        let mut heard = Vec::new();
        while !heard.ends_with(&wanted) {
            let mut byte = [0];
            self.stream.read_exact(&mut byte).unwrap();
            heard.push(byte[0]);
        }
    }
}

fn header(kind: SectionKind, section_id: u32, idstr: &str, version_id: u32) -> SectionHeader {
    SectionHeader { kind, section_id, idstr: idstr.to_owned(), instance_id: 0, version_id }
}

#[test]
fn a_destination_that_floods_the_source_is_ended_with_its_reason() {
    let (from, _) = filled();
    let (near, mut far) = UnixStream::pair().unwrap();
    let flooding = thread::spawn(move || {
        let mut pong = Vec::new();
        ReturnMessage::Pong(1).put(&mut pong);
        // It reads nothing of what it is sent.
        while far.write_all(&pong).is_ok() {}
    });
    let progress = Arc::new(Progress::new());
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
    let ram = RamSave::new(&from.blocks, OPTIONS, Arc::clone(&progress), tracker).unwrap();
    let source = Reader::new(&from, Vec::new());
    let outgoing = Outgoing {
        parameters: Parameters::new(Configuration::new("test")),
        guest: &source,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    let error = outgoing.run(Channel::new(near, progress).unwrap()).unwrap_err();
    assert!(matches!(error.error, MigrationError::Flooded { limit: 4096, .. }), "{error}");
    flooding.join().unwrap();
}

/// A destination that reads the stream, whatever it is.
pub(super) struct RawDestination(pub(super) UnixStream);

impl RawDestination {
    /// Reads up to and with `wanted`.
    pub(super) fn read_to(&mut self, wanted: &[u8]) {
        let mut read = Vec::new();
        while !read.ends_with(wanted) {
            let mut byte = [0];
            self.0.read_exact(&mut byte).unwrap();
            read.push(byte[0]);
        }
    }

    pub(super) fn read_to_command(&mut self, command: &Command) {
        let mut wanted = Vec::new();
        put_command(&mut wanted, command);
        self.read_to(&wanted);
    }

    pub(super) fn say(&mut self, message: &ReturnMessage) {
        let mut bytes = Vec::new();
        message.put(&mut bytes);
        self.0.write_all(&bytes).unwrap();
    }
}

#[test]
fn a_page_that_is_asked_for_before_the_guest_is_taken_comes_before_that() {
    let (from, _) = filled();
    let (near, far) = UnixStream::pair().unwrap();
    let asking = thread::spawn(move || {
        let mut destination = RawDestination(far);
        destination.say(&ReturnMessage::Pong(1));
        destination.read_to_command(&Command::Ping(PING_PACKAGE_LOADED));
        for (page, next) in [
            (66, ReturnMessage::Pong(PING_PACKAGE_LOADED)),
            // The guest may run, and is not taken yet.
            (70, ReturnMessage::SwitchoverAck),
        ] {
            let (block, start) = (Some("vmem0".to_owned()), page * PAGE);
            destination.say(&ReturnMessage::RequestPages { block, start, len: PAGE as u32 });
            let word = PageHeader::page_word(PageKind::Normal, start, false);
            destination.read_to(&word.to_be_bytes());
            destination.say(&next);
            if page == 66 {
                destination.read_to_command(&Command::PostcopyRun);
            }
        }
        destination.say(&ReturnMessage::Shut(0));
        // The rest.
        let _ = destination.0.read_to_end(&mut Vec::new());
    });
    let progress = Arc::new(Progress::new());
    let (sent, runs) = incoming::send(&from, near, None, &progress);
    sent.unwrap();
    assert_eq!((runs, progress.status()), (0, Status::Completed));
    asking.join().unwrap();
}

fn memory_of(side: &Side) -> RamSave {
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
    let progress = Arc::new(Progress::new());
    let mut ram = RamSave::new(&side.blocks, OPTIONS, progress, tracker).unwrap();
    ram.setup(&mut BufferSink::default()).unwrap();
    ram
}

#[test]
fn a_request_is_no_longer_than_can_be_gathered_at_once() {
    let side = Side::of_region(64 << 20);
    fill(&side.region, 0..10, 7);
    let mut ram = memory_of(&side);
    let mut gathered = GatherWrite::new();
    let long = ByteRange::new(0, 32 << 20).unwrap();
    let error = ram.requested("vmem0", long, &mut gathered).unwrap_err();
    assert!(matches!(error, MigrationError::Unexpected(_)), "{error}");
    assert_eq!(gathered.len_bytes(), 0);
    assert!(ram.requested("vmem0", ByteRange::new(0, 1 << 20).unwrap(), &mut gathered).unwrap());
    assert!(gathered.len_bytes() >= 10 * PAGE);
}

#[test]
fn discarded_pages_that_a_peer_reports_as_missing_are_not_sent_again() {
    let (from, _) = filled();
    let mut ram = memory_of(&from);
    let sent = ram.dirty_pages();
    // It says that nothing was received, of discarded memory either.
    let mut missing = PageBitmap::new(1024);
    missing.set_range(0..1024);
    let mut bytes = Vec::new();
    received::put(&mut bytes, "vmem0", &missing);
    let mut reader = WireReader::new(&bytes[..]);
    ReturnMessage::read(&mut reader).unwrap();
    let missing = received::read(&mut reader, "vmem0", 1024).unwrap();
    assert_eq!(missing.count(), 1024);
    ram.not_received("vmem0", missing).unwrap();
    // Four plugged blocks whole, and what is dirty of boot memory.
    assert_eq!((sent, ram.dirty_pages()), (64 + 54 + 20 + 2, 4 * 64 + 2));
    let mut gathered = GatherWrite::new();
    let discarded = ByteRange::new(700 * PAGE, PAGE).unwrap();
    assert!(!ram.requested("vmem0", discarded, &mut gathered).unwrap());
    assert_eq!(gathered.len_bytes(), 0);
}

#[test]
fn both_ends_agree_on_the_longest_package() {
    let most = usize::try_from(PACKAGE_MAX).unwrap();
    assert_eq!(u64::from(package_len(most).unwrap()), PACKAGE_MAX);
    let error = package_len(most + 1).unwrap_err().to_string();
    assert!(error.contains("at most 1073741824 can be sent"), "{error}");
}
