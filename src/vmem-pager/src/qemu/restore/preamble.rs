//! What comes before pages: all that a guest needs to run.

use migration::stream::{
    AdvisedSizes, BlockEntry, BlockList, Command, RAM_SECTION, RAM_VERSION, SectionHeader,
    SectionKind, TARGET_PAGE_SIZE, put_command, put_continued, put_end_of_section, put_eof,
    put_footer, put_header, put_list, put_section,
};
use vmstate::wire::WireWrite;

use crate::image::GuestImage;

/// Everything in the package is loaded, and the guest can run (QEMU_VM_PING_PACKAGED_LOADED).
pub const PING_LOADED: u32 = 0x42;
/// The first PING: QEMU has accepted the connection once it answers.
pub const PING_FIRST: u32 = 1;
/// QEMU listens for faults: without postcopy-preempt at once, with it only when the second connection is there.
pub const PING_LISTENING: u32 = 4;
/// QEMU is about to; it has read all before.
pub const PING_BEFORE: u32 = 5;
const PING_PACKAGE: u32 = 3;

/// Magic, version, configuration, and the return path.
pub fn put_start(out: &mut Vec<u8>, image: &GuestImage) {
    put_header(out, image.configuration());
    put_command(out, &Command::OpenReturnPath);
    put_command(out, &Command::Ping(PING_FIRST));
}

/// That postcopy follows: page sizes are compared, and all RAM is discarded.
pub fn put_advise(out: &mut Vec<u8>) {
    let sizes = AdvisedSizes { page_sizes: TARGET_PAGE_SIZE, target_page_size: TARGET_PAGE_SIZE };
    put_command(out, &Command::PostcopyAdvise(Some(sizes)));
}

/// The devices that go before RAM, and the list of RAM blocks.
pub fn put_setup(out: &mut Vec<u8>, image: &GuestImage) {
    out.put(image.early());
    let section_id = image.ram_section();
    put_section(
        out,
        &SectionHeader {
            kind: SectionKind::Start,
            section_id,
            idstr: RAM_SECTION.to_owned(),
            instance_id: 0,
            version_id: RAM_VERSION,
        },
    );
    let entries = image.blocks().iter().map(|block| BlockEntry {
        id: block.id().to_owned(),
        used_length: block.used_length(),
        page_size: None,
        gpa: None,
        mapped: None,
    });
    put_list(out, &BlockList { entries: entries.collect() });
    put_end_of_section(out);
    put_footer(out, section_id);
}

/// Has QEMU take the way of postcopy. It needs one discard to be in its state for that; without, pages
/// would go to the loader of precopy, whose thread waits for them itself. Nothing was sent, so any page
/// will do: ADVISE has discarded all of it.
pub fn put_discard(out: &mut Vec<u8>, image: &GuestImage) {
    if let Some(block) = image.blocks().iter().find(|block| block.nr_pages() != 0) {
        let ranges = vec![(0, TARGET_PAGE_SIZE)];
        put_command(out, &Command::PostcopyRamDiscard { block: block.id().to_owned(), ranges });
    }
}

/// The package: devices, and the guest runs.
pub fn put_package(out: &mut Vec<u8>, image: &GuestImage) {
    let mut package = Vec::new();
    put_command(&mut package, &Command::PostcopyListen);
    put_command(&mut package, &Command::Ping(PING_LISTENING));
    package.put(image.device_state());
    put_command(&mut package, &Command::Ping(PING_PACKAGE));
    put_command(&mut package, &Command::Ping(PING_LOADED));
    put_command(&mut package, &Command::PostcopyRun);
    // Not in it: with postcopy-preempt QEMU waits before the whole of it.
    put_command(out, &Command::Ping(PING_BEFORE));
    let len = u32::try_from(package.len()).expect("device state in an image is limited");
    put_command(out, &Command::Packaged { len });
    out.put(&package);
}

/// Starts the one section in which all pages are sent.
pub fn put_pages_start(out: &mut Vec<u8>, image: &GuestImage) {
    put_continued(out, SectionKind::Part, image.ram_section());
}

/// Ends the section of pages, and RAM.
pub fn put_pages_end(out: &mut Vec<u8>, image: &GuestImage) {
    let section_id = image.ram_section();
    put_end_of_section(out);
    put_footer(out, section_id);
    put_continued(out, SectionKind::End, section_id);
    put_end_of_section(out);
    put_footer(out, section_id);
}

/// Ends the stream.
pub fn put_end(out: &mut Vec<u8>) {
    put_eof(out);
}
