//! Channels for pages beside a main one: greetings, packets, barriers and ends in any order, right, edited,
//! or of any bytes; plain, or compressed where that was agreed on and where it was not.
//!
//! What is promised: no panic and no end without an end; nothing gets where memory is discarded; and a load
//! that succeeds had a greeting and the same barriers on every channel.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use migration::ram::{BlockOptions, ListOptions, MigrationBlock, PageChannels, RamBlocks, RamLoad};
use migration::stream::{
    CAPABILITY_MULTIFD, CAPABILITY_MULTIFD_ZSTD, Configuration, Encoding, Greeting, PacketHead,
    RAM_VERSION, SectionKind, put_end_of_section, put_list, put_multifd_flush,
};
use migration::{Channel, LoadHandler, Progress};
use ram_discard::memory::RamBlock;
use ram_discard::{LocalRamDiscardManager, RamDiscardManager};
use vmstate::wire::WireReader;
use zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd_safe::{CCtx, InBuffer, OutBuffer, ResetDirective};

use crate::input::Input;
use crate::migration_stream::{BLOCK, BLOCKS, PAGE, memfd, plugged};

const UUID: [u8; 16] = [0x3c; 16];
/// Longer than a thread takes to read what is there, which tests count on, and the fuzzer does not.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 10_000 } else { 30 });
/// What a channel takes at once.
const SAID_MAX: usize = 100 << 10;

/// The body of the target.
pub fn run(data: &[u8]) {
    drive(data);
}

/// Also returns whether all of it was loaded.
fn drive(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let file = memfd("page-channels");
    let size = BLOCKS as u64 * BLOCK;
    file.set_len(size).unwrap();
    let ram = RamBlock::new("vmem0".to_owned(), 1 << 32, size, file.try_clone().unwrap(), 0);
    let block = MigrationBlock::map(Arc::new(ram.unwrap()), BlockOptions::migratable()).unwrap();
    let manager = LocalRamDiscardManager::new(size);
    manager.add_source(Arc::new(plugged())).unwrap();
    block.set_discard_manager(0, Arc::new(manager) as Arc<dyn RamDiscardManager>).unwrap();
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::new(block)).unwrap();
    let blocks = Arc::new(blocks);

    let how = input.u8();
    let (count, zstd) = (usize::from(how % 3) + 1, how & 0x80 != 0);
    let progress = Arc::new(Progress::new());
    let channel = |stream: UnixStream| {
        let mut channel = Channel::new(stream, Arc::clone(&progress)).unwrap();
        channel.set_write_patience(PATIENCE);
        channel
    };
    let (near, far): (Vec<_>, Vec<_>) = (0..count).map(|_| UnixStream::pair().unwrap()).unzip();
    let far = PageChannels::new(far.into_iter().map(channel).collect()).unwrap();
    let options = ListOptions::default();
    let mut ram =
        RamLoad::new(Arc::clone(&blocks), options, Arc::clone(&progress)).with_channels(far);
    let mut configuration = Configuration {
        capabilities: vec![CAPABILITY_MULTIFD.to_owned()],
        uuid: Some(UUID),
        ..Configuration::new("fuzz")
    };
    if zstd {
        configuration.capabilities.push(CAPABILITY_MULTIFD_ZSTD.to_owned());
    }
    ram.configure(&configuration).unwrap();
    ram.load_setup().unwrap();

    let mut said = vec![Vec::new(); count];
    let mut sections = Vec::new();
    let mut section = Vec::new();
    let mut number = 1;
    let mut streams: Vec<_> = (0..count).map(|_| CCtx::create()).collect();
    while !input.is_empty() && sections.len() < 8 {
        let what = input.u8();
        let channel = usize::from(what >> 4) % count;
        match what % 8 {
            0 => {
                let all = u8::try_from(count).unwrap();
                // As they should be, or one byte otherwise.
                let mut bytes = Vec::new();
                Greeting { uuid: UUID, id: channel as u8, channels: all }.put(&mut bytes);
                edit(&mut bytes, &mut input);
                said[channel].extend(bytes);
            }
            1..=3 => {
                let mut bytes = packet(&mut number, &mut input, &mut streams[channel]);
                if what & 8 != 0 {
                    edit(&mut bytes, &mut input);
                }
                said[channel].extend(bytes);
            }
            4 => {
                // A barrier on all of them.
                for said in &mut said {
                    said.extend(head(number, true, Encoding::Plain, (0, 0), 0, &[]));
                    number += 1;
                }
                put_multifd_flush(&mut section);
            }
            5 => put_multifd_flush(&mut section),
            6 => {
                put_end_of_section(&mut section);
                sections.push(std::mem::take(&mut section));
            }
            _ => {
                let len = usize::from(input.u8());
                said[channel].extend(input.bytes(len));
            }
        }
    }
    put_end_of_section(&mut section);
    let mut list = Vec::new();
    put_list(&mut list, &blocks.list(options).unwrap());
    put_end_of_section(&mut list);
    for (mut stream, mut bytes) in near.into_iter().zip(said) {
        bytes.truncate(SAID_MAX);
        let _ = stream.write_all(&bytes);
        // Then it ends.
    }
    let parts = sections.iter().map(|bytes| (SectionKind::Part, bytes));
    let all = [(SectionKind::Start, &list)].into_iter().chain(parts);
    let all = all.chain([(SectionKind::End, &section)]);
    let mut loaded = Ok(());
    for (kind, bytes) in all {
        loaded = ram.load(kind, RAM_VERSION, &mut WireReader::new(&bytes[..]));
        if loaded.is_err() {
            break;
        }
    }
    let loaded = loaded.and_then(|()| ram.complete());
    drop(ram);
    for discarded in (1..BLOCKS as u64).step_by(2) {
        let mut bytes = vec![0; BLOCK as usize];
        file.read_exact_at(&mut bytes, discarded * BLOCK).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0), "discarded memory was written");
    }
    loaded.is_ok()
}

/// A packet of a few pages, anywhere in the block and behind it.
fn packet(number: &mut u64, input: &mut Input<'_>, stream: &mut CCtx<'_>) -> Vec<u8> {
    let how = input.u8();
    let (normal, zero) = (usize::from(how % 4), usize::from(how >> 2 & 3));
    let pages = BLOCKS as u64 * BLOCK / PAGE + 1;
    let offsets: Vec<u64> =
        (0..normal + zero).map(|_| u64::from(input.u8()) % pages * PAGE).collect();
    let mut payload = vec![how | 1; normal * PAGE as usize];
    let encoding = if how & 0x20 == 0 { Encoding::Plain } else { Encoding::Zstd };
    if normal != 0 {
        match encoding {
            Encoding::Plain => drop(stream.reset(ResetDirective::SessionOnly)),
            Encoding::Zstd => {
                // Far more than it says, sometimes.
                let more = if how & 0x40 != 0 { 1 << 20 } else { 0 };
                payload.resize(payload.len() + more, 0);
                payload = compressed(stream, &payload);
            }
        }
    }
    let sync = how & 0x10 != 0;
    let mut bytes = head(*number, sync, encoding, (normal, zero), payload.len(), &offsets);
    *number += 1;
    bytes.extend(payload);
    bytes
}

/// The next part of a channel's stream.
fn compressed(stream: &mut CCtx<'_>, pages: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(zstd_safe::compress_bound(pages.len()));
    let mut output = OutBuffer::around(&mut out);
    let flush = ZSTD_EndDirective::ZSTD_e_flush;
    let left = stream.compress_stream2(&mut output, &mut InBuffer::around(pages), flush);
    assert_eq!(left, Ok(0));
    out
}

fn head(
    number: u64,
    sync: bool,
    encoding: Encoding,
    (normal, zero): (usize, usize),
    payload: usize,
    offsets: &[u64],
) -> Vec<u8> {
    let head = PacketHead {
        at: 0,
        number,
        sync,
        encoding,
        block: "vmem0".to_owned(),
        normal,
        zero,
        payload,
    };
    let mut bytes = Vec::new();
    head.put(offsets, &mut bytes);
    bytes
}

/// Changes a byte, or cuts what is behind it, or neither.
fn edit(bytes: &mut Vec<u8>, input: &mut Input<'_>) {
    let how = input.u8();
    let at = usize::from(input.u16()) % bytes.len();
    match how % 4 {
        0 => bytes[at] = input.u8(),
        1 => bytes.truncate(at),
        _ => {}
    }
}

/// Inputs to start from.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    // A greeting as it should be on each of two channels; pages 1 and 32 with bytes, 33 of zeros.
    let greetings = [0x00, 2, 0, 0, 0x10, 2, 0, 0];
    let pages = [0x01, 0x06, 1, 32, 33];
    let barrier = [0x04];
    vec![
        [&[1][..], &greetings, &pages, &barrier, &[6], &[0x11, 0x01, 1], &barrier].concat(),
        // Discarded; past the end; without a barrier; a channel too few; edited.
        [&[1][..], &greetings, &[0x01, 0x01, 16], &barrier].concat(),
        [&[1][..], &greetings, &[0x01, 0x01, 128], &barrier].concat(),
        [&[1][..], &greetings, &pages].concat(),
        [&[2][..], &greetings, &pages, &barrier].concat(),
        [&[1][..], &greetings, &[0x09, 0x06, 1, 32, 33, 0, 9, 0, 4], &barrier].concat(),
        // Compressed, plain, and compressed again, on two channels; without agreement; a bomb; edited.
        [
            &[0x82][..],
            &greetings,
            &[0x01, 0x22, 1, 32, 0x11, 0x26, 2, 34, 35],
            &[0x01, 0x22, 1, 32, 0x01, 0x01, 3, 0x01, 0x21, 4],
            &barrier,
        ]
        .concat(),
        [&[1][..], &greetings, &[0x01, 0x22, 1, 32], &barrier].concat(),
        [&[0x82][..], &greetings, &[0x01, 0x62, 1, 32], &barrier].concat(),
        [&[0x82][..], &greetings, &[0x09, 0x22, 1, 32, 0, 0x40, 0x05, 7], &barrier].concat(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_reach_both_outcomes() {
        let driven: Vec<_> = seeds().iter().map(|seed| drive(seed)).collect();
        assert_eq!(driven, [true, false, false, false, false, false, true, false, false, false]);
    }
}
