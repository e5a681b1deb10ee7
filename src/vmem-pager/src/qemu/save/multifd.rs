//! A multifd channel: packets of pages, and marks at which all channels wait for each other.

use std::io::Read;

use migration::stream::TARGET_PAGE_SIZE;
use vmstate::wire::{WireRead, WireReader};

use crate::error::PagerError;
use crate::image::pages::Pages;

/// How a channel of this kind begins.
pub(super) const MAGIC: u32 = 0x1122_3344;
const VERSION: u32 = 1;
/// Bytes of the greeting after the number of the channel.
const GREETING_REST: u64 = 7 + 4 * 8;
/// Flag of a mark.
const SYNC: u32 = 1;
/// Pages of a packet: QEMU's 512 KiB.
const PAGES_MAX: u32 = 128;
/// Bytes between the counts of a packet and the name of its block.
const UNUSED: u64 = 4 + 3 * 8;
const NAME: usize = 256;

/// How a channel introduces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Greeting {
    /// Of the VM; the same on all channels.
    pub uuid: [u8; 16],
    /// Number of the channel.
    pub id: u8,
}

impl Greeting {
    /// Reads it, from its magic number on.
    pub fn read(reader: &mut dyn WireRead) -> Result<Self, PagerError> {
        expect(reader, "magic number of a multifd channel", MAGIC)?;
        expect(reader, "version of a multifd channel", VERSION)?;
        let mut uuid = [0; 16];
        reader.read_exact(&mut uuid, "the UUID of a multifd channel")?;
        let id = reader.u8("the number of a multifd channel")?;
        reader.skip(GREETING_REST, "the greeting of a multifd channel")?;
        Ok(Self { uuid, id })
    }
}

/// What a packet was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packet {
    /// Pages, which are in the file now.
    Pages,
    /// A mark: nothing more is to be read until all channels and the main one have come to it.
    Sync,
}

fn expect(reader: &mut dyn WireRead, what: &'static str, wanted: u32) -> Result<(), PagerError> {
    let at = reader.offset();
    let found = reader.be32(what)?;
    if found != wanted {
        let what =
            format!("byte {at:#x} of a multifd channel: {what} is {found:#x}, not {wanted:#x}");
        return Err(PagerError::Protocol(what));
    }
    Ok(())
}

/// Reads packets. Holds the pages of one.
#[derive(Debug, Default)]
pub(super) struct Packets {
    offsets: Vec<u64>,
    bytes: Vec<u8>,
}

impl Packets {
    /// Reads the next packet, and takes its pages over. `pages` gives where they go to, once that is known.
    ///
    /// # Errors
    ///
    /// When the packet is impossible, the channel ends or fails, or the file does not take the pages.
    pub fn next<R: Read>(
        &mut self,
        reader: &mut WireReader<R>,
        pages: &mut dyn FnMut() -> Result<std::sync::Arc<Pages>, PagerError>,
    ) -> Result<Packet, PagerError> {
        let at = reader.offset();
        let wrong = |what: &str, found: u64| {
            let what = format!("byte {at:#x} of a multifd channel: {what} is {found:#x}");
            PagerError::Protocol(what)
        };
        expect(reader, "magic number of a packet", MAGIC)?;
        expect(reader, "version of a packet", VERSION)?;
        let flags = reader.be32("the flags of a packet")?;
        if flags & !SYNC != 0 {
            let what = "flags of a packet (pages that are compressed, or state of devices, are not understood)";
            return Err(wrong(what, flags.into()));
        }
        let allocated = reader.be32("the size of a packet")?;
        let normal = reader.be32("the pages of a packet")?;
        let payload = reader.be32("the payload of a packet")?;
        reader.be64("the number of a packet")?;
        let zero = reader.be32("the pages of zeros of a packet")?;
        reader.skip(UNUSED, "a packet")?;
        let mut name = [0; NAME];
        reader.read_exact(&mut name, "the block of a packet")?;
        let count = normal.checked_add(zero).filter(|count| *count <= PAGES_MAX);
        let Some(count) = count.filter(|count| *count <= allocated) else {
            return Err(wrong("number of pages of a packet", normal.into()));
        };
        if u64::from(payload) != u64::from(normal) * TARGET_PAGE_SIZE {
            return Err(wrong("payload of a packet", payload.into()));
        }
        self.offsets.clear();
        // There is room for as many offsets as a packet can have, whatever it has.
        for _ in 0..PAGES_MAX {
            self.offsets.push(reader.be64("the offset of a page")?);
        }
        if count != 0 {
            let pages = pages()?;
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            let name = String::from_utf8_lossy(name);
            let block = pages.find(&name)?;
            self.offsets.truncate(count as usize);
            self.take(reader, &pages, block, normal as usize)?;
        }
        Ok(if flags & SYNC != 0 { Packet::Sync } else { Packet::Pages })
    }

    fn take<R: Read>(
        &mut self,
        reader: &mut WireReader<R>,
        pages: &Pages,
        block: usize,
        normal: usize,
    ) -> Result<(), PagerError> {
        let (normal, zero) = self.offsets.split_at(normal);
        for offset in normal.iter().chain(zero) {
            pages.check(block, *offset, TARGET_PAGE_SIZE)?;
        }
        self.bytes.resize(normal.len() * TARGET_PAGE_SIZE as usize, 0);
        reader.read_exact(&mut self.bytes, "the pages of a packet")?;
        let follows = |one: &u64, next: &u64| one + TARGET_PAGE_SIZE == *next;
        let mut rest = &self.bytes[..];
        for run in normal.chunk_by(follows) {
            let (bytes, after) = rest.split_at(run.len() * TARGET_PAGE_SIZE as usize);
            pages.write(block, run[0], bytes)?;
            rest = after;
        }
        for run in zero.chunk_by(follows) {
            pages.zero(block, run[0], run.len() as u64 * TARGET_PAGE_SIZE)?;
        }
        Ok(())
    }
}
