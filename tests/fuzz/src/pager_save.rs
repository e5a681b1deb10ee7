//! What a source says to `vmem-pager save`: streams made of good parts in any order, edited ones, and bytes.
//!
//! What is promised: no panic; a good stream becomes an image that has the last of each page, whichever channel it
//! came by, and nothing of discarded memory; an image has no name before it is whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use migration::Progress;
use migration::inspect::{Warning, inspect};
use migration::stream::{Command, SectionKind};
use vmem_pager::image::writer::WholeImage;
use vmem_pager::qemu::save::{receive_stream, recover_stream};

use crate::input::Input;
use source::{PAGE, Source, content, multifd_greeting, multifd_packet, state};

#[path = "../../../src/vmem-pager/tests/common/source.rs"]
#[allow(dead_code, reason = "the tests of the pager use more of it")]
mod source;

const BLOCK: u64 = 16 * PAGE as u64;
const REGION: (&str, u64) = ("0000:00:01.0/vmem", 8 * BLOCK);
const BLOCKS: [(&str, u64); 3] = [REGION, ("ram", 64 * PAGE as u64), ("pc.rom", PAGE as u64)];
/// Bounds the time of one input.
const STEPS: usize = 64;
const EDITS: usize = 32;

/// Of how the input is used: bytes as they are; edits; a return path; the guest is given away; two channels; a save
/// that broke off is continued.
const RAW: u8 = 1;
const EDITED: u8 = 2;
const RETURN_PATH: u8 = 4;
const POSTCOPY: u8 = 8;
const MULTIFD: u8 = 16;
const RECOVER: u8 = 32;

type Pages = BTreeMap<(usize, u64), u8>;

/// A page that is sent: block, number, and its content unless that is zeros.
type Sent = (usize, u64, Option<u8>);

/// A good stream, and what an image of it has.
struct Good {
    stream: Vec<u8>,
    channels: Vec<Vec<u8>>,
    pages: Pages,
}

fn page(input: &mut Input<'_>) -> Sent {
    let (block, page, seed) = (usize::from(input.u8()) % BLOCKS.len(), input.u8(), input.u8());
    let pages = BLOCKS[block].1 / PAGE as u64;
    // One in four is zeros.
    (block, u64::from(page) % pages, (!seed.is_multiple_of(4)).then_some(seed))
}

fn note(pages: &mut Pages, plugged: u8, (block, page, seed): Sent) {
    let is_discarded = block == 0 && plugged >> (page * PAGE as u64 / BLOCK) & 1 == 0;
    match seed {
        Some(seed) if !is_discarded => drop(pages.insert((block, page), seed)),
        _ => drop(pages.remove(&(block, page))),
    }
}

/// Builds what the input says.
fn good(how: u8, input: &mut Input<'_>) -> Good {
    let plugged = input.u8();
    let blocks: Vec<u64> = (0..8).filter(|block| plugged >> block & 1 != 0).collect();
    let mut source = Source::new();
    if how & RETURN_PATH != 0 {
        source = source.return_path();
    }
    if how & POSTCOPY != 0 {
        source = source.advise();
    }
    let mut source = source.device("0000:00:01.0", REGION.1, BLOCK, &blocks);
    let sync = multifd_packet(true, "ram", &[], &[]);
    let mut channels: Vec<Vec<u8>> = match how & MULTIFD {
        0 => Vec::new(),
        _ => [0, 1].map(|id| [multifd_greeting(id), sync.clone()].concat()).into(),
    };
    source.put_ram(&BLOCKS);
    if !channels.is_empty() {
        source = source.flush();
    }
    source = source.end_section().section(SectionKind::Part);
    let (mut pages, mut rounds) = (Pages::new(), [const { Vec::new() }; 2]);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        match input.u8() % 8 {
            0..=3 => {
                let sent = page(input);
                let bytes = sent.2.map(content);
                source = source.page(
                    BLOCKS[sent.0].0,
                    sent.1 * PAGE as u64,
                    bytes.as_ref().map(|bytes| &bytes[..]),
                );
                note(&mut pages, plugged, sent);
            }
            4 => source = source.end_section().section(SectionKind::Part),
            5 => {
                source = source.end_section().command(&Command::Ping(9)).section(SectionKind::Part)
            }
            6 if !channels.is_empty() => {
                let index = usize::from(input.u8() % 2);
                let sent: Sent = page(input);
                let (name, offset) = (BLOCKS[sent.0].0, sent.1 * PAGE as u64);
                channels[index].extend(match sent.2 {
                    Some(seed) => multifd_packet(false, name, &[(offset, seed)], &[]),
                    None => multifd_packet(false, name, &[], &[offset]),
                });
                rounds[index].push(sent);
            }
            _ => source = mark(source, &mut channels, &mut rounds, &mut pages, plugged),
        }
    }
    source = mark(source, &mut channels, &mut rounds, &mut pages, plugged).end_section();
    let stream = match how & POSTCOPY {
        0 => source.end(&state()),
        _ => source.package(&state()).end_postcopy(),
    };
    Good { stream: stream.bytes, channels, pages }
}

/// What was kept of a save that broke off, and a good rest of its stream.
fn recovery(input: &mut Input<'_>) -> (Vec<u8>, Good) {
    let plugged = input.u8();
    let blocks: Vec<u64> = (0..8).filter(|block| plugged >> block & 1 != 0).collect();
    let kept = Source::new().device("0000:00:01.0", REGION.1, BLOCK, &blocks).ram(&BLOCKS);
    let mut kept = kept.section(SectionKind::End).end_section().bytes;
    kept.extend(state());
    kept.push(0);
    let mut source = Source::default();
    for (block, _) in BLOCKS {
        source = source.command(&Command::RecvBitmap { block: block.to_owned() });
    }
    source = source.command(&Command::PostcopyResume).section(SectionKind::Part);
    let mut pages = Pages::new();
    while !input.is_empty() {
        let sent = page(input);
        let bytes = sent.2.map(content);
        let (name, offset) = (BLOCKS[sent.0].0, sent.1 * PAGE as u64);
        source = source.page(name, offset, bytes.as_ref().map(|bytes| &bytes[..]));
        note(&mut pages, plugged, sent);
    }
    let stream = source.end_section().end_postcopy().bytes;
    (kept, Good { stream, channels: Vec::new(), pages })
}

/// The end of a round: what came by other channels counts from here on.
fn mark(
    source: Source,
    channels: &mut [Vec<u8>],
    rounds: &mut [Vec<Sent>; 2],
    pages: &mut Pages,
    plugged: u8,
) -> Source {
    if channels.is_empty() {
        return source;
    }
    for (channel, round) in channels.iter_mut().zip(rounds) {
        channel.extend(multifd_packet(true, "ram", &[], &[]));
        round.drain(..).for_each(|sent| note(pages, plugged, sent));
    }
    source.flush()
}

/// Runs the target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.u8();
    let folder = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" };
    let dir = tempfile::tempdir_in(folder).expect("a folder is to be had");
    let path = dir.path().join("image");
    let receive = |stream: &[u8], channels: &[Vec<u8>]| {
        let channels: Vec<&[u8]> = channels.iter().map(|channel| &channel[..]).collect();
        let received = receive_stream(stream, channels, &path, &Arc::new(Progress::new())).0;
        let names = fs::read_dir(dir.path()).expect("the folder is there").count();
        assert_eq!(names, 0, "an image has its name before it is whole");
        received
    };
    if how & RAW != 0 {
        let received = receive(input.rest(), &[]);
        return received.iter().for_each(check);
    }
    if how & RECOVER != 0 {
        let recover = |kept: &[u8], stream: &[u8]| {
            recover_stream(kept, stream, &path, &Arc::new(Progress::new())).0
        };
        let steps = input.bytes((data.len() / 2).min(3 * STEPS)).to_vec();
        let (kept, good) = recovery(&mut Input::new(&steps));
        let mut parts = [kept, good.stream];
        if how & EDITED == 0 {
            let image = recover(&parts[0], &parts[1]).expect("a good recovery is taken");
            check(&image);
            assert_eq!(pages(image.file()), good.pages, "the image has other pages");
            return;
        }
        for _ in 0..EDITS {
            if input.is_empty() {
                break;
            }
            let (target, at, value) = (input.u8(), usize::from(input.u16()), input.u8());
            let bytes = &mut parts[usize::from(target % 2)];
            let at = at % bytes.len();
            match target >> 5 {
                0 => bytes.truncate(at + 1),
                _ => bytes[at] = value,
            }
        }
        return recover(&parts[0], &parts[1]).iter().for_each(check);
    }
    let length = data.len() / 2;
    let steps = if how & EDITED != 0 { input.bytes(length) } else { input.rest() };
    let mut good = good(how, &mut Input::new(steps));
    if how & EDITED == 0 {
        let image = receive(&good.stream, &good.channels).expect("a good stream is taken");
        check(&image);
        assert_eq!(pages(image.file()), good.pages, "the image has other pages");
        return;
    }
    for _ in 0..EDITS {
        if input.is_empty() {
            break;
        }
        let (target, at, value) = (input.u8(), usize::from(input.u16()), input.u8());
        let bytes = match good.channels.get_mut(usize::from(target % 4)) {
            Some(channel) => channel,
            None => &mut good.stream,
        };
        // Mostly what stands before the pages and behind them.
        let len = bytes.len();
        let at = if target & 4 == 0 { at % len } else { len - 1 - at % len.min(600) };
        match target >> 5 {
            0 => bytes.truncate(at + 1),
            _ => bytes[at] = value,
        }
    }
    receive(&good.stream, &good.channels).iter().for_each(check);
}

/// What holds for every image.
fn check(image: &WholeImage) {
    let inspection = inspect(image.file());
    let is_stray = |warning: &Warning| matches!(warning, Warning::DiscardedPages { .. });
    assert!(!inspection.warnings.iter().any(is_stray), "{:?}", inspection.warnings);
}

/// The pages of an image of these blocks, by the first byte of their content.
fn pages(file: &File) -> Pages {
    let mut pages = Pages::new();
    for (index, block) in inspect(file).blocks.iter().enumerate() {
        let mapped = block.mapped.expect("an image is mapped-ram");
        let nr_pages = block.used_length / PAGE as u64;
        let mut bits = vec![0; nr_pages.div_ceil(64) as usize * 8];
        file.read_exact_at(&mut bits, mapped.bitmap_offset).expect("there is a bitmap");
        for page in (0..nr_pages).filter(|page| bits[(page / 8) as usize] >> (page % 8) & 1 != 0) {
            let mut bytes = [0; PAGE];
            file.read_exact_at(&mut bytes, mapped.pages_offset + page * PAGE as u64)
                .expect("there is a page");
            // The lowest bit of each byte is set, so that it is no page of zeros.
            let seed = (0..=255u8).find(|seed| !seed.is_multiple_of(4) && content(*seed) == bytes);
            pages.insert((index, page), seed.expect("a page that was sent"));
        }
    }
    pages
}

/// Inputs to start from.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let steps = [0, 0, 1, 5, 0, 1, 2, 6, 4, 1, 1, 2, 9, 2, 0, 17, 3, 3, 1, 2, 4];
    let multifd = [6, 0, 1, 3, 5, 6, 1, 0, 3, 7, 7, 6, 1, 1, 3, 9, 0, 1, 3, 1];
    let with = |how: u8, parts: &[&[u8]]| [&[how, 0b1010_0101][..], &parts.concat()].concat();
    let edits = [0x20, 40, 0, 1, 0x24, 90, 0, 7, 0x44, 3, 0, 0, 0x08, 200, 1, 0];
    let stream = good(RETURN_PATH, &mut Input::new(&steps)).stream;
    vec![
        with(0, &[&steps]),
        with(RETURN_PATH, &[&steps, &steps]),
        with(MULTIFD, &[&multifd, &steps]),
        with(POSTCOPY | RETURN_PATH, &[&steps]),
        with(EDITED | RETURN_PATH, &[&steps, &edits]),
        with(EDITED | MULTIFD, &[&multifd, &edits, &edits]),
        with(EDITED | POSTCOPY, &[&steps, &edits]),
        with(RECOVER, &[&steps, &steps]),
        with(RECOVER | EDITED, &[&steps, &edits, &edits]),
        [&[RAW], &stream[..400]].concat(),
    ]
}
