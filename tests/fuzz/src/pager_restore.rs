//! A restore with hostile files and destinations: images that are right or edited, and a return path of
//! requests, answers and bytes, on one channel or two, from the start or in a recovery.
//!
//! What is promised: no panic and no end without an end; an image that is accepted can be read, and has no page
//! in discarded memory; a page is sent once, and is what the image has.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use clap::Parser;
use migration::stream::{
    BlockEntry, BlockList, CAPABILITY_MAPPED_RAM, Command, Configuration, ListLimits,
    MAPPED_RAM_ALIGNMENT, MappedRamHeader, PageHeader, PageKind, RAM_SECTION, RAM_VERSION, Record,
    ReturnMessage, SectionHeader, SectionKind, entry_len, put_continued, put_end_of_section,
    put_entry, put_eof, put_footer, put_header, put_list, put_list_start, put_section, read_footer,
    read_header, read_record,
};
use vmem_pager::PagerError;
use vmem_pager::cli::args::{Args, Command as Words};
use vmem_pager::cli::report::Report;
use vmem_pager::image::{GuestImage, PageReader};
use vmem_pager::qemu::restore::{self, RestoreMetrics};
use vmem_pager::run::Run;
use vmstate::wire::{WireRead, WireReader, WireWrite};

use crate::input::Input;
use crate::migration_stream::{PAGE, memfd};

const RAM_ID: u32 = 1;
/// Pages of the device's memory, and of RAM.
const VMEM: u64 = 64;
const RAM: u64 = 32;
const DEVICE_BLOCK: u64 = 8 * PAGE;
/// Blocks of the device that are plugged.
const PLUGGED: u64 = 0b1001_0011;
/// A destination that is silent for so long is gone: what follows the input is nothing.
///
/// Tests, which say what comes of an input, have to come to it on a busy machine, too.
const SILENCE: Duration = Duration::from_millis(if cfg!(test) { 2000 } else { 50 });
/// More steps only take longer.
const STEPS: usize = 48;

/// Pages with content, by block and page; each is filled with a byte of its own.
fn contents() -> BTreeMap<(&'static str, u64), u8> {
    let vmem = [0, 1, 9, 15, 32, 39, 56].map(|page| ("vm0/vmem", page));
    let ram = (0..12).chain(20..22).map(|page| ("ram", page));
    vmem.into_iter().chain(ram).map(|(block, page)| ((block, page), page as u8 + 1)).collect()
}

fn section(out: &mut Vec<u8>, kind: SectionKind, section_id: u32, name: &str, version_id: u32) {
    let idstr = name.to_owned();
    put_section(out, &SectionHeader { kind, section_id, idstr, instance_id: 0, version_id });
}

fn early() -> Vec<u8> {
    let mut out = Vec::new();
    [5 << 30, VMEM * PAGE, DEVICE_BLOCK].iter().for_each(|value| out.put_be64(*value));
    out.put_be32(0);
    out.put_be64(u64::from(PLUGGED.count_ones()) * DEVICE_BLOCK);
    out.put_be64(PLUGGED);
    out
}

/// A file in either layout.
fn image(mapped: bool) -> Vec<u8> {
    let mut out = Vec::new();
    let mut configuration = Configuration::new("m");
    configuration.capabilities.extend(mapped.then(|| CAPABILITY_MAPPED_RAM.to_owned()));
    put_header(&mut out, &configuration);
    section(&mut out, SectionKind::Full, 2, "vm0/virtio-mem-device-early", 1);
    out.put(&early());
    put_footer(&mut out, 2);
    section(&mut out, SectionKind::Start, RAM_ID, RAM_SECTION, RAM_VERSION);
    let entry = |(id, pages): (&str, u64)| BlockEntry {
        id: id.to_owned(),
        used_length: pages * PAGE,
        page_size: None,
        gpa: None,
        mapped: None,
    };
    let mut list = BlockList { entries: [("vm0/vmem", VMEM), ("ram", RAM)].map(entry).into() };
    let contents = contents();
    if mapped {
        put_list_start(&mut out, &list);
        for entry in &mut list.entries {
            let bitmap_offset = out.len() as u64 + entry_len(entry) + MappedRamHeader::LEN;
            let pages_offset = (bitmap_offset + 8).next_multiple_of(MAPPED_RAM_ALIGNMENT);
            entry.mapped = Some(MappedRamHeader { page_size: PAGE, bitmap_offset, pages_offset });
            put_entry(&mut out, entry);
            let mut bits = 0u64;
            let mut pages = vec![0; entry.used_length as usize];
            for ((_, page), fill) in contents.iter().filter(|((block, _), _)| **block == *entry.id)
            {
                bits |= 1 << page;
                pages[(page * PAGE) as usize..][..PAGE as usize].fill(*fill);
            }
            out.extend(bits.to_le_bytes());
            out.resize(pages_offset as usize, 0);
            out.put(&pages);
        }
    } else {
        put_list(&mut out, &list);
    }
    put_end_of_section(&mut out);
    put_footer(&mut out, RAM_ID);
    for kind in [SectionKind::Part, SectionKind::End] {
        put_continued(&mut out, kind, RAM_ID);
        if kind == SectionKind::Part && !mapped {
            for ((block, page), fill) in &contents {
                out.put_be64(PageHeader::page_word(PageKind::Normal, page * PAGE, false));
                out.put_name(block);
                out.put(&[*fill; PAGE as usize]);
            }
        }
        put_end_of_section(&mut out);
        put_footer(&mut out, RAM_ID);
    }
    section(&mut out, SectionKind::Full, 3, "dev", 1);
    out.put(&[0xa5; 32]);
    put_footer(&mut out, 3);
    put_eof(&mut out);
    out
}

/// A file with a name, for as long as it is held.
fn file_of(bytes: &[u8]) -> (File, String) {
    let file = memfd("image");
    file.set_len(bytes.len() as u64).unwrap();
    // Holes stay holes.
    for (index, piece) in bytes.chunks(PAGE as usize).enumerate() {
        if piece.iter().any(|byte| *byte != 0) {
            file.write_all_at(piece, index as u64 * PAGE).unwrap();
        }
    }
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    (file, name)
}

/// The body.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.u8();
    match how & 1 {
        0 => read_edited(&mut input, how & 2 != 0),
        _ => drop(serve(&mut input, how)),
    }
}

/// An image with changes is refused, or can be read.
fn read_edited(input: &mut Input<'_>, mapped: bool) {
    let mut bytes = image(mapped);
    while !input.is_empty() {
        let kind = input.u8();
        let at = usize::from(input.u16());
        // Headers at the start, or sections at the end.
        let at = if kind & 0x80 == 0 {
            at % bytes.len().max(1)
        } else {
            bytes.len().saturating_sub(at % 600)
        };
        match kind & 3 {
            0 => bytes.truncate(at),
            1 => drop(bytes.splice(at..at, input.bytes(usize::from(kind >> 2 & 7)).to_vec())),
            _ => {
                for (byte, change) in
                    bytes[at..].iter_mut().zip(input.bytes(usize::from(kind >> 2 & 7) + 1))
                {
                    *byte = *change;
                }
            }
        }
        if bytes.is_empty() {
            break;
        }
    }
    let (_file, name) = file_of(&bytes);
    let Ok(image) = GuestImage::open(Path::new(&name)) else { return };
    let mut reader = PageReader::new(&image);
    for block in image.blocks() {
        if let Some(discards) = block.discards() {
            discards.discarded(|run| {
                assert_eq!(block.present().runs(run).next(), None, "a page in discarded memory")
            });
        }
        for run in block.present().runs(0..block.nr_pages()).take(256) {
            let mut expected = run.clone().take(256);
            let run = run.start..run.end.min(run.start + 256);
            // A file that has less than it says is an error then.
            let _ = reader.read(block, run, |page, _| assert_eq!(Some(page), expected.next()));
        }
    }
}

/// What arrived.
#[derive(Default)]
struct Arrived {
    pages: BTreeMap<(String, u64), Vec<u8>>,
    /// The stream has come to its end.
    ended: bool,
}

/// A destination that says what the input has it say; what the restore ended with, and whether all has arrived.
fn serve(input: &mut Input<'_>, how: u8) -> (Result<(), PagerError>, bool) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vm");
    let listener = UnixListener::bind(&socket).unwrap();
    let (_file, name) = file_of(&image(how & 2 != 0));
    let (preempt, recover, eager) = (how & 4 != 0, how & 8 != 0, how & 24 == 16);
    let mut words = vec!["vmem-pager", "restore", "--vmm", "qemu", "--image", &name, "--socket"];
    let socket = socket.display().to_string();
    words.push(&socket);
    words.extend(recover.then_some("--recover"));
    words.extend(eager.then_some("--eager"));
    words.extend((how & 32 != 0).then_some("--bandwidth=1"));
    let Words::Restore(args) = Args::try_parse_from(words).unwrap().command else { unreachable!() };
    let pager = thread::spawn(move || {
        let run = Run::with_silence(Some(Duration::from_secs(20)), SILENCE);
        restore::run(&args, &run, &Report::silent(), &RestoreMetrics::new())
    });
    let main = listener.accept().unwrap().0;
    let arrived = Arc::new(Mutex::new(Arrived::default()));
    let back = main.try_clone().unwrap();
    let reading = {
        let arrived = Arc::clone(&arrived);
        thread::spawn(move || read_main(main, recover, &arrived))
    };
    // Not to wait for a second connection that never comes.
    listener.set_nonblocking(true).unwrap();
    let mut urgent = None;
    let mut said = Vec::new();
    match recover {
        true => [("vm0/vmem", VMEM), ("ram", RAM)]
            .iter()
            .for_each(|(id, pages)| received(&mut said, id, *pages, input)),
        false => ReturnMessage::Pong(1).put(&mut said),
    }
    if recover {
        ReturnMessage::ResumeAck.put(&mut said);
    }
    ReturnMessage::Pong(5).put(&mut said);
    let mut listens = Vec::new();
    ReturnMessage::Pong(4).put(&mut listens);
    if !preempt {
        said.extend_from_slice(&listens);
    }
    let _ = (&back).write_all(&said);
    let accept = |urgent: &mut Option<_>| {
        let Ok((stream, _)) = listener.accept() else { return };
        stream.set_nonblocking(false).unwrap();
        let arrived = Arc::clone(&arrived);
        if preempt && urgent.is_none() {
            let other = stream.try_clone().unwrap();
            let reading = thread::spawn(move || read_pages(&mut WireReader::new(stream), &arrived));
            *urgent = Some((other, reading));
            let _ = (&back).write_all(&listens);
        }
    };
    for _ in 0..STEPS {
        accept(&mut urgent);
        if input.is_empty() {
            break;
        }
        let mut said = Vec::new();
        let step = input.u8();
        match step % 8 {
            0..=3 => {
                let block = [None, Some("ram"), Some("vm0/vmem"), Some("other")]
                    [usize::from(step >> 3 & 3)];
                let place = input.u8();
                let start = if place == 0xff { input.u64() } else { u64::from(place) * PAGE };
                let len = if step & 0x80 == 0 { PAGE as u32 } else { input.u32() };
                ReturnMessage::RequestPages { block: block.map(str::to_owned), start, len }
                    .put(&mut said);
            }
            4 => ReturnMessage::Pong(u32::from(step >> 3)).put(&mut said),
            5 => ReturnMessage::Shut(u32::from(step >> 3)).put(&mut said),
            6 => said.extend(input.bytes(usize::from(step >> 3))),
            _ => match step >> 3 {
                0..8 => thread::yield_now(),
                8..16 => ReturnMessage::ResumeAck.put(&mut said),
                16..24 => received(&mut said, "ram", RAM, input),
                _ => ReturnMessage::SwitchoverAck.put(&mut said),
            },
        }
        if (&back).write_all(&said).is_err() {
            break;
        }
    }
    // The input is over: either the stream ends, and this is right, or it breaks.
    let mut last = Vec::new();
    ReturnMessage::Shut(0).put(&mut last);
    if input.u8() & 1 == 0 {
        for _ in 0..2 * SILENCE.as_millis() {
            if arrived.lock().unwrap().ended {
                break;
            }
            accept(&mut urgent);
            thread::sleep(Duration::from_millis(1));
        }
        let _ = (&back).write_all(&last);
    }
    let _ = back.shutdown(Shutdown::Write);
    let done = pager.join().expect("the pager ends");
    let _ = back.shutdown(Shutdown::Both);
    reading.join().expect("what is sent is a stream");
    if let Some((stream, reading)) = urgent {
        let _ = stream.shutdown(Shutdown::Both);
        reading.join().expect("what is sent are pages");
    }
    let contents = contents();
    let arrived = arrived.lock().unwrap();
    for ((block, page), bytes) in &arrived.pages {
        let fill = contents.get(&(block.as_str(), *page));
        // A page that was not whole when the channel broke is not here.
        assert_eq!(*bytes, [fill.copied().unwrap_or(0); PAGE as usize], "page {page} of {block}");
    }
    let all = contents
        .keys()
        .all(|(block, page)| arrived.pages.contains_key(&((*block).to_owned(), *page)));
    (done, all)
}

/// The answer to RECV_BITMAP, mostly right.
fn received(out: &mut Vec<u8>, block: &str, pages: u64, input: &mut Input<'_>) {
    ReturnMessage::RecvBitmap { block: block.to_owned() }.put(out);
    let how = input.u8();
    let len = if how == 0xff { input.u64() } else { pages.div_ceil(64) * 8 };
    out.put_be64(len);
    out.extend(input.u64().to_le_bytes());
    out.put_be64(0x0123_4567_89ab_cdef ^ u64::from(how == 0xfe));
}

/// Reads a stream as a destination does, up to where it breaks off.
fn read_main(stream: UnixStream, recover: bool, arrived: &Mutex<Arrived>) {
    let mut reader = WireReader::new(stream);
    if !recover && read_header(&mut reader).is_err() {
        return;
    }
    while let Ok(record) = read_record(&mut reader) {
        match record {
            Record::Command(Command::Packaged { len }) => {
                if reader.skip(u64::from(len), "a package").is_err() {
                    return;
                }
            }
            Record::Section(SectionHeader { kind: SectionKind::Start, section_id, .. }) => {
                let Ok(word) = reader.be64("a list") else { return };
                let Ok(PageHeader::List { total }) = PageHeader::parse(word, 0) else {
                    panic!("no list")
                };
                let list =
                    BlockList::read(&mut reader, total, ListLimits::default(), &mut |_, _| Ok(()));
                if list.is_err()
                    || reader.be64("the end").is_err()
                    || read_footer(&mut reader, section_id).is_err()
                {
                    return;
                }
            }
            Record::Section(SectionHeader { section_id, idstr, .. }) => {
                let len = if idstr == "dev" { 32 } else { early().len() as u64 };
                if reader.skip(len, "a device").is_err()
                    || read_footer(&mut reader, section_id).is_err()
                {
                    return;
                }
            }
            Record::Continued { section_id, .. } => {
                read_pages(&mut reader, arrived);
                if read_footer(&mut reader, section_id).is_err() {
                    return;
                }
            }
            Record::Command(_) | Record::Description(_) => {}
            Record::Eof => arrived.lock().unwrap().ended = true,
        }
    }
}

/// Reads pages up to the end of a section, or of the channel.
fn read_pages(reader: &mut WireReader<impl Read>, arrived: &Mutex<Arrived>) {
    let mut block = None;
    loop {
        let Ok(word) = reader.be64("a page") else { return };
        match PageHeader::parse(word, 0).expect("a page") {
            PageHeader::Page { kind, offset, continued } => {
                if !continued {
                    match reader.name("a block") {
                        Ok(name) => block = Some(name),
                        Err(_) => return,
                    }
                }
                let mut bytes = vec![0; PAGE as usize];
                let read = match kind {
                    PageKind::Normal => reader.read_exact(&mut bytes, "a page"),
                    PageKind::Zero => reader.u8("a fill").map(|fill| assert_eq!(fill, 0)),
                };
                if read.is_err() {
                    return;
                }
                let page = (block.clone().expect("a block is named first"), offset / PAGE);
                let twice = arrived.lock().unwrap().pages.insert(page.clone(), bytes);
                assert!(twice.is_none(), "{page:?} twice");
            }
            PageHeader::EndOfSection => return,
            other => panic!("{other:?}"),
        }
    }
}

/// Inputs to start from.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    // A request of RAM's page 3, again, of a hole, of the device's memory; PONGs; the end.
    let requests = [8, 3, 0, 3, 8, 30, 16, 9, 4, 4];
    let serve = |how: u8| [&[how][..], &requests, &[0]].concat();
    vec![
        serve(1),
        serve(3 | 4),
        serve(1 | 4 | 32),
        // Recoveries: the bitmaps, then requests.
        [
            &[1 | 8 | 4][..],
            &[0, 3, 0, 0, 0, 0, 0, 0, 0],
            &[0, 7, 0, 0, 0, 0, 0, 0, 0],
            &requests,
            &[0],
        ]
        .concat(),
        [&[3 | 8][..], &[0xff, 0, 0, 0, 0, 0, 0, 0, 1], &requests].concat(),
        // Everything before the guest runs.
        serve(1 | 16),
        // An end that comes too early.
        vec![1 | 4, 8, 3, 5],
        // Files: as they are, cut, edited at the start and at the end.
        vec![0],
        vec![2],
        vec![0, 0, 100, 0],
        vec![2, 0x80, 20, 0],
        vec![0, 2, 8, 0, 0xff],
        vec![2, 0x1e, 60, 0, 1, 2, 3, 4, 5, 6, 7, 8],
        vec![0, 0x82, 10, 0, 0],
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_are_right() {
        for mapped in [false, true] {
            let (_file, name) = file_of(&image(mapped));
            let image = GuestImage::open(Path::new(&name)).unwrap();
            assert_eq!(image.present_bytes(), contents().len() as u64 * PAGE);
            assert!(image.blocks()[0].discards().is_some());
        }
    }

    #[test]
    fn the_seeds_reach_what_they_are_there_for() {
        let ends = |how: u8, script: &[u8]| serve(&mut Input::new(script), how);
        for (how, all) in [(1, true), (3, true), (1 | 4, true), (3 | 4, true)] {
            let (done, arrived) = ends(how, &[8, 3, 0, 3, 8, 30, 16, 9, 4, 4, 0]);
            assert!(done.is_ok() && arrived == all, "{how}: {done:?}");
        }
        let (done, arrived) = ends(1 | 16, &[]);
        assert!(done.is_ok() && arrived, "eager: {done:?}");
        // All of the device's memory was received before.
        let bitmaps = [&[0][..], &[0xff; 8], &[0], &[0; 8]].concat();
        let (done, arrived) = ends(1 | 8 | 4, &bitmaps);
        assert!(done.is_ok() && !arrived, "recovery: {done:?}");
        let (done, _) = ends(1 | 4, &[8, 3, 5]);
        assert!(done.unwrap_err().to_string().contains("before it was sent"));
        seeds().iter().for_each(|seed| run(seed));
    }
}
